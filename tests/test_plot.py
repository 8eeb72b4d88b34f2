"""The pictures: that they show what they say, of a toy run and of made-up values."""

import json
import shutil
import sys

import pytest
import torch
from matplotlib import colors, pyplot
from omegaconf import OmegaConf
from PIL import Image

import plot
import simclr_lin
from evaluation.features import clean_features
from images.datasets import Split, draw_stratified, load_split
from simclr import start_training
from system.checkpoint import load_encoder
from system.device import select_precision


@pytest.fixture
def draw(monkeypatch, capsys):
    """draw("RUN", "--out", …): what plot.py says; its exit code if it refuses."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["plot.py", *map(str, arguments)])
        try:
            plot.main()
        except SystemExit as end:
            return end.code, capsys.readouterr().err
        return capsys.readouterr().out

    return run


@pytest.fixture
def run(thin, trained, tmp_path):
    """A copy of the run directory of a toy run of two epochs."""
    return shutil.copytree(trained, tmp_path / "run")


NAMES = {"views", "curves", "embedding", "neighbours", "confusion"}


def test_one_run_gives_every_picture_as_png_and_svg(draw, run, toy):
    cfg = toy(peak="finetune_learning_rate")
    simclr_lin.evaluate(cfg, run / "simclr_resnet18_epoch2.pt", run)
    said = draw(run)
    for name in NAMES:
        with Image.open(run / f"{name}.png") as image:
            assert 900 < image.width < 1200 and image.height > 300
        assert "<svg" in (run / f"{name}.svg").read_text()
        assert f"{name}.png" in said
    assert not list(run.glob("*.tmp"))


def test_what_is_missing_for_a_picture_is_said_and_the_others_are_drawn(run, capsys):
    assert [name for name, _ in plot.pictures([run], [])] == [
        "curves", "views", "embedding", "neighbours",
    ]  # fmt: skip
    said = capsys.readouterr().out
    assert "no linear evaluation" in said and "no checkpoint" not in said
    (run / "simclr_resnet18_epoch2.pt").unlink()
    assert [name for name, _ in plot.pictures([run], [])] == ["curves", "views"]
    assert f"no checkpoint in {run} yet" in capsys.readouterr().out
    pyplot.close("all")


def test_views_need_no_run(draw, toy, tmp_path):
    cfg = toy()
    said = draw("dataset=folder", f"data_dir={cfg.data_dir}", "image_size=8", "--out",
                tmp_path / "new" / "pictures")  # fmt: skip
    assert said.splitlines() == [str(tmp_path / "new" / "pictures" / "views.png")]
    assert {path.name for path in (tmp_path / "new" / "pictures").iterdir()} == {
        "views.png", "views.svg",
    }  # fmt: skip


def test_mistakes_are_one_line(draw, tmp_path, run):
    for arguments, code, message in (
        ([tmp_path], 1, "is not a run directory: it has no config.yaml"),
        (["batchsize=3"], 2, "batchsize"),
        (["temperature=-1"], 2, "temperature=-1: must be a number above 0"),
        (["dataset=folder", "data_dir=nowhere"], 1, "nowhere/train cannot be read"),
    ):
        found, line = draw(*arguments, "--out", tmp_path)
        assert (found, line.count("\n")) == (code, 1) and message in line, line
    assert "is not a run directory" in draw(run / "simclr_resnet18_epoch2.pt")[1]
    (run / "metrics.jsonl").unlink()
    assert "has no epoch to show: metrics.jsonl" in draw(run)[1]


def test_a_key_may_be_given_for_a_run_and_an_older_config_be_shorter(toy, tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    OmegaConf.save(toy("temperature=0.3"), run / "config.yaml")
    lines = (run / "config.yaml").read_text().splitlines()
    rest = [line for line in lines if not line.startswith(("knn_interval", "data_dir"))]
    (run / "config.yaml").write_text("\n".join([*rest, "gone: 3", "data_dir: nowhere"]))
    cfg = plot.read_config(run, ["data_dir=elsewhere", "batch_size=64"])
    assert (cfg.data_dir, cfg.batch_size, cfg.temperature) == ("elsewhere", 64, 0.3)
    assert cfg.knn_interval == 10 and "gone" not in cfg


def lines_of(axis):
    return [(list(line.get_xdata()), list(line.get_ydata())) for line in axis.lines]


def test_curves_show_the_metrics_and_name_what_differs(toy):
    a = [{"epoch": e, "loss": 5 - e, "contrastive_accuracy": e / 10, "learning_rate": 0.1,
          "knn_acc": e / 20 if e == 2 else None} for e in (1, 2)]  # fmt: skip
    b = [{**line, "loss": 6, "knn_acc": None} for line in a]
    one, other = toy("temperature=0.1", "workers=3", "finetune_epochs=7"), toy("seed=7")
    figure = plot.plot_curves({"one": (one, a), "other": (other, b)})
    loss, contrastive, rate, knn = figure.axes
    assert lines_of(loss) == [([1, 2], [4, 3]), ([1, 2], [6, 6])]
    assert lines_of(contrastive)[0] == ([1, 2], [10, 20])
    assert lines_of(rate)[1] == ([1, 2], [0.1, 0.1])
    assert lines_of(knn) == [([2], [10]), ([], [])]
    [legend] = figure.legends
    assert {text.get_text() for text in legend.get_texts()} == {
        "seed 42, temperature 0.1", "seed 7, temperature 0.5",
    }  # fmt: skip
    assert all(axis.get_title() and axis.get_ylabel() for axis in figure.axes)
    old = [{"epoch": 1, "loss": 3.0, "contrastive_accuracy": 0.1, "learning_rate": 0.1}]
    figure = plot.plot_curves({"logs/a": (toy(), a), "logs/b": (toy(), old)})  # before kNN
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["logs/a", "logs/b"]
    assert not plot.plot_curves({"one": (toy(), a)}).legends
    pyplot.close("all")


def test_several_runs_share_one_picture(draw, run, tmp_path):
    other = shutil.copytree(run, tmp_path / "other")
    config = OmegaConf.load(run / "config.yaml")
    OmegaConf.save({**config, "temperature": 0.9}, other / "config.yaml")
    assert draw(run, other, "--out", tmp_path / "both").splitlines() == [
        str(tmp_path / "both" / "curves.png")
    ]
    svg = (tmp_path / "both" / "curves.svg").read_text()
    assert "temperature 0.5" in svg and "temperature 0.9" in svg


def shown(figure):
    return [axis.images[0].get_array() for axis in figure.axes]


def test_views_stand_beside_their_image_and_follow_the_config(toy):
    images = torch.randint(0, 256, (20, 3, 8, 8), dtype=torch.uint8)
    plain = "crop_scale=[1,1]", "flip_probability=0", "color_strength=0", "grayscale_probability=0"
    figure = plot.plot_views(toy(*plain), images)
    grid = shown(figure)
    assert len(grid) == 8 * 9
    for row in range(8):
        original, *views = grid[9 * row : 9 * row + 9]
        assert all(abs(view - original).max() < 1e-5 for view in views)
        assert any((255 * original).round().astype(int).tolist() == image.permute(1, 2, 0).tolist()
                   for image in images)  # fmt: skip
    gray = shown(plot.plot_views(toy("grayscale_probability=1"), images))
    assert all((view[..., 0] == view[..., 1]).all() for view in gray[1:9])
    assert not (gray[1] == gray[2]).all() and not (gray[0][..., 0] == gray[0][..., 1]).all()
    assert len(shown(plot.plot_views(toy(), images[:3]))) == 3 * 9
    pyplot.close("all")


def test_neighbours_are_the_nearest_by_cosine_with_frames_of_their_class():
    train = Split(torch.arange(4, dtype=torch.uint8)[:, None, None, None].expand(4, 3, 8, 8),
                  torch.tensor([0, 1, 0, 1]), ["cat", "dog"])  # fmt: skip
    test = Split(train.images[:3] + 100, torch.tensor([1, 1, 0]), ["cat", "dog"])
    h = torch.tensor([[1.0, 0], [0, 1], [9, 1], [1, 9]])
    test_h = torch.tensor([[0.0, 3], [5, 5], [2, 0]])
    figure = plot.plot_neighbours(train, h, test, test_h, 8, columns=3)
    values = [round(255 * image.max()) for image in shown(figure)]
    assert values == [102, 0, 2, 3, 100, 1, 3, 2]  # the first test cat and dog, 2 and 0
    frames = [
        colors.to_hex(axis.spines["top"].get_edgecolor()) if axis.spines["top"].get_visible() else 0
        for axis in figure.axes
    ]
    right, wrong = plot.RIGHT, plot.WRONG
    assert frames == [0, right, right, wrong, 0, right, right, wrong]
    assert [axis.get_xlabel() for axis in figure.axes] == ["", "", "", "dog", "", "", "", "cat"]
    assert [figure.axes[i].get_ylabel() for i in (0, 4)] == ["cat", "dog"]
    pyplot.close("all")


def test_embedding_has_a_point_for_each_image_in_the_colour_of_its_class():
    torch.manual_seed(0)
    labels = torch.arange(60) % 3
    apart = torch.nn.functional.one_hot(labels, 8) + 0.05 * torch.randn(60, 8)
    figure = plot.plot_embedding({"noise": torch.randn(60, 8), "h": apart}, labels, ["a", "b", "c"])
    assert [axis.get_title() for axis in figure.axes] == ["noise", "h"]
    shares = []
    for axis in figure.axes:
        points = [torch.from_numpy(c.get_offsets().data).float() for c in axis.collections]
        assert [len(p) for p in points] == [20, 20, 20]
        assert len({tuple(c.get_facecolor()[0]) for c in axis.collections}) == 3
        centres = torch.stack([p.mean(dim=0) for p in points])
        nearest = torch.stack([torch.cdist(p, centres).argmin(dim=1) for p in points])
        shares.append((nearest == torch.arange(3)[:, None]).float().mean())
    assert shares[0] < 0.8 and shares[1] > 0.9  # classes that lie apart are drawn apart
    [legend] = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["a", "b", "c"]
    assert "60 test images" in figure.get_suptitle()
    pyplot.close("all")


def test_embedding_is_of_the_runs_network_before_and_after_pretraining(run, monkeypatch):
    """The same test images, and the initial weights of this very run."""
    drawn = []
    embedding = plot.plot_embedding
    monkeypatch.setattr(
        plot, "plot_embedding", lambda *args: drawn.append(args) or embedding(*args)
    )
    cfg = plot.read_config(run, [])
    dict(plot.pictures_of_checkpoint(run, cfg))
    [(panels, labels, _)] = drawn
    assert list(panels) == ["untrained network", "after 2 epochs"]
    before = start_training(cfg, torch.device("cpu"), 2).model.enc.eval()
    after, _ = load_encoder(run / "simclr_resnet18_epoch2.pt")
    test = load_split("folder", cfg.data_dir, "test", 8)
    chosen = draw_stratified(test.labels, 0.999, seed=0)
    assert len(chosen) > 3 and torch.equal(labels, test.labels[chosen])
    dtype = select_precision(cfg.precision, torch.device("cpu"))
    for enc, h in zip((before, after), panels.values(), strict=True):
        own = clean_features(enc, test.images[chosen], 8, 8, dtype)  # in other batches
        torch.testing.assert_close(h, own, rtol=0.03, atol=0.01)
    first, last = panels.values()
    assert (first - last).abs().max() > 0.05
    pyplot.close("all")


def test_confusion_is_in_shares_of_the_true_class(tmp_path):
    results = {"confusion": [[3, 1], [0, 5]], "classes": ["cat", "dog"], "linear_acc": 8 / 9,
               "training_images": 5000}  # fmt: skip
    figure = plot.plot_confusion(json.loads(json.dumps(results)))
    axis = figure.axes[0]
    assert [text.get_text() for text in axis.texts] == ["75", "25", "0", "100"]
    assert axis.get_title().endswith("5,000 labelled training images: 88.9% right")
    assert (axis.get_xlabel(), axis.get_ylabel()) == ("predicted class", "true class")
    assert [label.get_text() for label in axis.get_yticklabels()] == ["cat", "dog"]
    pyplot.close("all")
