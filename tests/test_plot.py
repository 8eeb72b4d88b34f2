"""The pictures: that they show what they say, of a toy run and of made-up values."""

import json
import os
import shutil
import subprocess
import sys
import xml.etree.ElementTree
from pathlib import Path

import pytest
import torch
from conftest import REPOSITORY, make_images, thin_resnet, toy_config
from matplotlib import colors
from matplotlib.text import Text
from omegaconf import OmegaConf
from PIL import Image

import plot
import simclr
import simclr_lin
from evaluation import figures
from evaluation.features import build_encoder, clean_features, open_checkpoint
from images.datasets import Split, draw_stratified, load_split
from models import BACKBONES
from system.checkpoint import load_checkpoint
from system.errors import UserError

WEIGHTS = "simclr_resnet18_epoch2.pt"
NAMES = {"curves", "views", "confusion", "embedding", "neighbours"}


@pytest.fixture(scope="module")
def evaluated(trained, tmp_path_factory):
    """A copy of the toy run with results.json. Only to be read."""
    run = shutil.copytree(trained, tmp_path_factory.mktemp("evaluated") / "run")
    data = make_images(tmp_path_factory.mktemp("data"), train=8, test=3)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(BACKBONES, "resnet18", thin_resnet)
        simclr_lin.evaluate(toy_config(data, "protocols=[linear]"), run / WEIGHTS, run)
    return run


@pytest.fixture
def run(thin, evaluated, tmp_path):
    """A copy of the run directory of a toy run of two epochs, with results.json."""
    return shutil.copytree(evaluated, tmp_path / "run")


@pytest.fixture
def draw(call):
    """draw("RUN", …): exit code, names of the pictures whose paths were printed, stderr."""

    def draw(*arguments):
        code, error = call("plot.py", *map(str, arguments))
        return code, {Path(line).stem for line in call.stdout.splitlines()}, error

    return draw


@pytest.fixture
def quick(monkeypatch):
    """Figures are made, but empty files written: to draw takes seconds."""
    monkeypatch.setattr(
        figures, "save", lambda _, path: path.with_name(f"{path.name}.png").write_bytes(b"")
    )


def test_one_run_gives_every_picture_as_png_and_svg(draw, run):
    code, drawn, error = draw(run)
    assert (code, drawn) == (0, NAMES) and "not drawn" not in error
    for name in NAMES:
        with Image.open(run / f"{name}.png") as image:
            assert 900 < image.width < 1200 and image.height > 300
        xml.etree.ElementTree.parse(run / f"{name}.svg")
    assert not list(run.glob("*.tmp"))


def test_views_need_no_run(draw, toy, tmp_path):
    images = "dataset=folder", f"data_dir={toy().data_dir}", "image_size=8"
    assert draw(*images, "--out", tmp_path / "new" / "pictures") == (0, {"views"}, "")
    written = {path.name for path in (tmp_path / "new" / "pictures").iterdir()}
    assert written == {"views.png", "views.svg"}


def test_mistakes_are_one_line(draw, run, tmp_path):
    for arguments, code, reason in (
        ([tmp_path], 1, "config.yaml cannot be read (No such file or directory)"),
        (["batchsize=3"], 2, "batchsize"),
        (["temperature=-1"], 2, "temperature=-1"),
        ([run, "temperature=-1"], 2, "temperature=-1"),
        ([run, "recipe=fast"], 2, "recipe: must be left out beside"),
    ):
        found, drawn, error = draw(*arguments, "--out", tmp_path)
        assert (found, drawn, error.count("\n")) == (code, set(), 1) and reason in error, error


def test_without_arguments_it_says_how_to_use_it_and_touches_nothing(draw, tmp_path):
    (tmp_path / "multirun.yaml").write_text("")
    for arguments in ((), ("multirun.yaml",)):
        code, _, error = draw(*arguments)
        assert code == 2 and error.startswith("usage: ") and len(list(tmp_path.iterdir())) == 1


def test_a_tilde_is_the_home_directory(draw, toy, monkeypatch, tmp_path):
    home = tmp_path / "home"
    shutil.copytree(toy().data_dir, home / "images")
    monkeypatch.setenv("HOME", str(home))
    images = "dataset=folder", "data_dir=~/images", "image_size=8"
    assert draw(*images, "--out=~/pictures")[:2] == (0, {"views"})
    assert (home / "pictures" / "views.png").exists() and not Path("~").exists()
    assert "home/gone/config.yaml cannot be read" in draw("~/gone")[2]


def damage_checkpoint(run, weight):
    """Let the last batch norm multiply by `weight`: by 0 all representations are the same."""
    saved = load_checkpoint(run / WEIGHTS)
    saved["model"]["enc.layer2.0.bn2.weight"].fill_(weight)
    saved["model"]["enc.layer2.0.bn2.bias"].fill_(1)
    for name in ("weight", "bias"):
        saved["model"][f"enc.layer2.0.downsample.1.{name}"].fill_(0)
    torch.save(saved, run / WEIGHTS)


@pytest.mark.parametrize(
    ("damage", "lost", "reason"),
    [
        (lambda run: damage_checkpoint(run, 0), {"embedding", "neighbours"}, "all the same: a col"),
        (lambda run: (run / WEIGHTS).unlink(), {"embedding", "neighbours"}, "no checkpoint in"),
        (lambda run: (run / "metrics.jsonl").unlink(), {"curves"}, "there is no epoch to show"),
        (lambda run: (run / "metrics.jsonl").write_text("[1]\n"), {"curves"}, "of another program"),
        (lambda run: (run / "results.json").unlink(), {"confusion"}, "no linear evalu"),
        (lambda run: (run / "results.json").write_text("{}"), {"confusion"}, "no linear evalu"),
        (lambda run: (run / "results.json").write_text("["), {"confusion"}, "no linear evalu"),
    ],
)
def test_a_picture_that_cannot_be_drawn_leaves_the_others(draw, quick, run, damage, lost, reason):
    damage(run)
    code, drawn, error = draw(run)
    assert (code, drawn) == (0, NAMES - lost), error
    assert {path.stem for path in run.glob("*.png")} == NAMES - lost
    assert reason in error and all(f"{name} is not drawn: " in error for name in lost)


def test_nothing_drawn_is_an_error(draw, run):
    (run / "metrics.jsonl").unlink()
    (run / "results.json").unlink()
    code, drawn, error = draw(run, "data_dir=nowhere")
    assert (code, drawn) == (1, set()), error
    assert error.endswith("error: no picture could be drawn\n")
    assert error.count(" is not drawn: ") == 5


def test_a_key_may_be_given_for_a_run_and_an_older_config_be_shorter(draw, run):
    config = OmegaConf.load(run / "config.yaml")
    del config["knn_interval"]
    OmegaConf.save({**config, "gone": 3, "temperature": 0.3}, run / "config.yaml")
    cfg = plot.compose_config(run, ["data_dir=elsewhere", "batch_size=4"])
    assert (cfg.data_dir, cfg.batch_size, cfg.temperature) == ("elsewhere", 4, 0.3)
    assert cfg.knn_interval == 10 and cfg.image_size == 8


def test_the_machine_does_not_change_the_pictures(run, tmp_path):
    """What the environment says to matplotlib is ignored."""
    (tmp_path / "markup").write_text("text.usetex: True\nfont.size: 30\nsavefig.dpi: 10\n")
    environment = {**os.environ, "MPLBACKEND": "TkAgg", "DISPLAY": ""}
    environment |= {"MATPLOTLIBRC": str(tmp_path / "markup"), "SOURCE_DATE_EPOCH": "0"}
    command = [sys.executable, str(REPOSITORY / "plot.py"), "run", "data_dir=nowhere", "--out=out"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    with Image.open(tmp_path / "out" / "curves.png") as image:
        assert 900 < image.width < 1200
    svg = (tmp_path / "out" / "curves.svg").read_text()
    assert "<dc:date>" not in svg and "DejaVu" in svg


NASTY = ["$x$", r"$\frac{$", "back\\slash", "%s {0} {}", "two\nlines", "n" * 200,
         os.fsdecode(b"caf\xe9"), "tab\tand\x1bescape", "a|b", "x_{1}^2 & #"]  # fmt: skip
SHOWN = dict.fromkeys(map(ord, "\n\t\x1b\udce9"), "�")


def texts(figure):
    """What a figure says, and that none of it would be read as markup."""
    found = figure.findobj(Text)
    assert not any(text.get_parse_math() or text.get_usetex() for text in found)
    return {text.get_text() for text in found}


@pytest.mark.filterwarnings("error")
def test_names_are_drawn_as_they_are(tmp_path):
    """Of classes and of runs: as text, which an SVG can hold, and not too long."""
    labels = torch.arange(40) % len(NASTY)
    h, images = torch.eye(len(NASTY))[labels], torch.zeros(40, 3, 8, 8, dtype=torch.uint8)
    split = Split(images, labels, NASTY)
    results = {"classes": NASTY, "confusion": torch.eye(len(NASTY)).tolist(), "linear_acc": 1.0}
    lines = [{"epoch": 1, "loss": 1.0, "knn_acc": None}]
    names = [name.translate(SHOWN) for name in NASTY]
    for figure, most in (
        (figures.plot_embedding({"h": h, "g": h}, labels, NASTY), 16),
        (figures.plot_neighbours(split, h, Split(images[:10], labels[:10], NASTY), h[:10], 8), 20),
        (figures.plot_confusion({**results, "training_images": 40}), 20),
        (figures.plot_curves([(name, lines) for name in NASTY]), 64),
    ):
        names[5] = "n" * (most // 2) + "…" + "n" * (most // 2 - 1)
        assert {*names} <= texts(figure)
        figure.savefig(tmp_path / "picture.svg")
        xml.etree.ElementTree.parse(tmp_path / "picture.svg")


def lines_of(axis):
    return [(list(line.get_xdata()), list(line.get_ydata())) for line in axis.lines]


def legend_of(figure):
    return {text.get_text() for legend in figure.legends for text in legend.get_texts()}


def test_curves_show_the_metrics():
    a = [{"epoch": e, "loss": 5 - e, "contrastive_accuracy": e / 10, "learning_rate": 0.1,
          "knn_acc": e / 20 if e == 2 else None} for e in (1, 2)]  # fmt: skip
    b = [{**line, "loss": 6, "knn_acc": None} for line in a]
    figure = figures.plot_curves([("one", a), ("other", b)])
    loss, contrastive, rate, knn = figure.axes
    assert lines_of(loss) == [([1, 2], [4, 3]), ([1, 2], [6, 6])]
    assert lines_of(contrastive)[0] == ([1, 2], [10, 20])
    assert lines_of(rate)[1] == ([1, 2], [0.1, 0.1])
    assert lines_of(knn) == [([2], [10]), ([], [])]
    assert legend_of(figure) == {"one", "other"}
    assert all(axis.get_title() and axis.get_ylabel() for axis in figure.axes)
    assert not figures.plot_curves([("one", a)]).legends


def test_runs_share_one_picture_and_are_named_by_what_differs(draw, run, tmp_path, monkeypatch):
    other = shutil.copytree(run, tmp_path / "other")
    monkeypatch.chdir(tmp_path)
    assert legend_of(plot.curves([Path("run"), Path("other")])) == {"run", "other"}
    config = OmegaConf.load(run / "config.yaml")
    changed = {**config, "temperature": 0.9, "device": "cuda", "runs": 7}  # the last two may change
    OmegaConf.save(changed, other / "config.yaml")
    assert legend_of(plot.curves([run, other])) == {"temperature 0.5", "temperature 0.9"}
    (tmp_path / "none").mkdir()
    code, drawn, error = draw(run, tmp_path / "none", other, "--out", tmp_path / "both")
    assert (code, drawn, error.count("\n")) == (0, {"curves"}, 1)
    assert error.startswith(f"left out {tmp_path}/none: ")


def shown(figure):
    return [axis.images[0].get_array() for axis in figure.axes]


def test_views_stand_beside_their_image_and_follow_the_config(toy):
    images = torch.randint(0, 256, (20, 3, 8, 8), dtype=torch.uint8)
    plain = "crop_scale=[1,1]", "flip_probability=0", "color_strength=0", "grayscale_probability=0"
    grid = shown(figures.plot_views(images, toy(*plain)))
    assert len(grid) == 8 * 9
    for row in range(8):
        original, *views = grid[9 * row : 9 * row + 9]
        assert all(abs(view - original).max() < 1e-5 for view in views)
        pixels = torch.from_numpy(255 * original).round().permute(2, 0, 1)
        assert (images == pixels).flatten(1).all(dim=1).any()
    gray = shown(figures.plot_views(images, toy("grayscale_probability=1")))
    assert all((view[..., 0] == view[..., 1]).all() for view in gray[1:9])
    assert not (gray[1] == gray[2]).all() and not (gray[0][..., 0] == gray[0][..., 1]).all()
    assert len(shown(figures.plot_views(images[:3], toy()))) == 3 * 9


def test_neighbours_are_the_nearest_by_cosine_with_frames_of_their_class():
    train = Split(torch.arange(4, dtype=torch.uint8)[:, None, None, None].expand(4, 3, 8, 8),
                  torch.tensor([0, 1, 0, 1]), ["cat", "dog"])  # fmt: skip
    test = Split(train.images[:2] + 100, torch.tensor([0, 1]), ["cat", "dog"])
    h, test_h = torch.tensor([[1.0, 0], [0, 1], [9, 1], [1, 9]]), torch.tensor([[2.0, 0], [0, 3]])
    figure = figures.plot_neighbours(train, h, test, test_h, 8, columns=3)
    assert [round(255 * image.max()) for image in shown(figure)] == [100, 0, 2, 3, 101, 1, 3, 2]
    frames = [
        colors.to_hex(axis.spines["top"].get_edgecolor()) if axis.spines["top"].get_visible() else 0
        for axis in figure.axes
    ]
    right, wrong = figures.RIGHT, figures.WRONG
    assert frames == [0, right, right, wrong, 0, right, right, wrong]
    assert [axis.get_xlabel() for axis in figure.axes] == ["", "", "", "dog", "", "", "", "cat"]
    assert [figure.axes[i].get_ylabel() for i in (0, 4)] == ["cat", "dog"]


def test_neighbours_are_of_the_first_test_image_of_each_class(run, monkeypatch):
    seen = []
    monkeypatch.setattr(figures, "plot_neighbours", lambda *args: seen.append(args))
    cfg = plot.compose_config(run, [])
    plot.neighbours(run / WEIGHTS, cfg)
    [(train, h, queries, query_h, size)] = seen
    test, enc = load_split(cfg, "test"), encoder_of(run, cfg, "checkpoint")
    assert size == 8 and queries.labels.tolist() == [0, 1, 2] and queries.classes == test.classes
    assert torch.equal(queries.images, test.images[[0, 3, 6]])
    for images, found in ((train.images, h), (queries.images, query_h)):
        torch.testing.assert_close(found.float(), enc(images / 255), rtol=0.03, atol=0.01)


def encoder_of(run, cfg, name):
    """The frozen encoder of the run's checkpoint, or with its initial weights."""
    saved, _ = open_checkpoint(cfg, run / WEIGHTS)
    return build_encoder(saved, run / WEIGHTS, name, cfg.seed).eval().requires_grad_(False)


def test_embedding_is_of_the_runs_network_before_and_after_pretraining(run, monkeypatch):
    """The same test images, and the initial weights of this very run."""
    seen = []
    monkeypatch.setattr(figures, "plot_embedding", lambda *args: seen.append(args))
    cfg = plot.compose_config(run, ["precision=fp32"])
    plot.embedding(run / WEIGHTS, cfg)
    [(panels, labels, _)] = seen
    assert list(panels) == ["untrained network", "after 2 epochs"]
    test = load_split(cfg, "test")
    chosen = draw_stratified(test.labels, 0.999, seed=0)
    assert len(chosen) > 3 and torch.equal(labels, test.labels[chosen])
    before = simclr.make_learner(cfg, torch.device("cpu")).model.enc.eval()
    after = encoder_of(run, cfg, "checkpoint")
    for enc, h in zip((before, after), panels.values(), strict=True):
        own = clean_features(enc, test.images[chosen], cfg)
        torch.testing.assert_close(h, own, rtol=1e-4, atol=1e-5)
    first, last = panels.values()
    assert (first - last).abs().max() > 0.05


def test_embedding_has_a_point_for_each_image_in_the_colour_of_its_class():
    torch.manual_seed(0)
    labels = torch.arange(60) % 3
    apart = torch.nn.functional.one_hot(labels, 8) + 0.05 * torch.randn(60, 8)
    panels = {"noise": torch.randn(60, 8), "h": apart}
    figure = figures.plot_embedding(panels, labels, ["a", "b", "c"])
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
    assert legend_of(figure) == {"a", "b", "c"} and "60 test images" in figure.get_suptitle()


def test_what_cannot_be_embedded_is_refused():
    """All representations the same would end t-SNE in a segmentation fault."""
    for same in (torch.ones(9, 8), torch.zeros(9, 8), torch.arange(1, 10)[:, None] * torch.ones(8)):
        with pytest.raises(UserError, match="all the same"):
            figures.plot_embedding({"h": same, "g": same}, torch.arange(9), ["a"] * 9)
    two = torch.eye(8)[torch.arange(40) % 2]
    figure = figures.plot_embedding({"two": two, "nearly one": 1 + 1e-5 * two}, two[:, 0], ["a"])
    for axis in figure.axes:
        assert torch.from_numpy(axis.collections[0].get_offsets().data).isfinite().all()


def test_confusion_is_in_shares_of_the_true_class():
    results = {"confusion": [[3, 1, 0], [0, 5, 0], [0, 0, 0]], "classes": ["cat", "dog", "emu"],
               "linear_acc": 8 / 9, "training_images": 5000}  # fmt: skip
    axis = figures.plot_confusion(json.loads(json.dumps(results))).axes[0]
    numbers = ["75", "25", "0", "0", "100", "0", "0", "0", "0"]  # of the emu there is no image
    assert [text.get_text() for text in axis.texts] == numbers
    assert axis.get_title().endswith("5,000 labelled training images: 88.9% right")
    assert (axis.get_xlabel(), axis.get_ylabel()) == ("predicted class", "true class")
    assert [label.get_text() for label in axis.get_yticklabels()] == ["cat", "dog", "emu"]
