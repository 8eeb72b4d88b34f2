"""The pictures: that they show what they say, of a toy run and of made-up values."""

import os
import shutil
import subprocess
import sys
import xml.etree.ElementTree
from pathlib import Path

import pytest
import torch
from conftest import REPOSITORY
from matplotlib import colors
from matplotlib.text import Text
from omegaconf import OmegaConf
from PIL import Image

import plot
import simclr
from evaluation import figures
from evaluation.features import build_encoder, clean_features, open_checkpoint
from images.datasets import Split, draw_stratified, load_split
from system.checkpoint import load_checkpoint
from system.errors import UserError

WEIGHTS = "simclr_resnet18_epoch2.pt"
NAMES = {"curves", "views", "embedding", "neighbours"}


@pytest.fixture
def run(thin, trained, tmp_path):
    """A copy of the run directory of a toy run of two epochs."""
    return shutil.copytree(trained, tmp_path / "run")


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
        ([tmp_path], 1, "config.yaml cannot be read (No such file"),
        (["batchsize=3"], 2, "batchsize"),
        (["temperature=-1"], 2, "temperature=-1"),
        ([run, "temperature=-1"], 2, "temperature=-1"),
        ([run, "recipe=fast"], 2, "recipe: must be left out beside"),
        (["multirun.yaml"], 1, "multirun.yaml/config.yaml cannot be read"),
    ):
        found, drawn, error = draw(*arguments, "--out", tmp_path)
        assert (found, drawn, error.count("\n")) == (code, set(), 1) and reason in error, error


def test_without_one_run_it_says_how_to_use_it_and_touches_nothing(draw, run):
    before = list(run.rglob("*"))
    for arguments in ((), (run, run)):
        code, _, error = draw(*arguments)
        assert code == 2 and error.startswith("usage: ") and list(run.rglob("*")) == before


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
        (lambda run: (run / WEIGHTS).unlink(), {"embedding", "neighbours"}, "no such checkpoint"),
        (lambda run: (run / "metrics.jsonl").unlink(), {"curves"}, "there is no epoch to show"),
        (lambda run: (run / "metrics.jsonl").write_text("[1]\n"), {"curves"}, "of another program"),
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
    code, drawn, error = draw(run, "data_dir=nowhere")
    assert (code, drawn) == (1, set()), error
    assert error.endswith("error: no picture could be drawn\n")
    assert error.count(" is not drawn: ") == 4


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
def test_names_of_classes_are_drawn_as_they_are(tmp_path):
    """As text, which an SVG can hold, and not too long."""
    labels = torch.arange(40) % len(NASTY)
    h, images = torch.eye(len(NASTY))[labels], torch.zeros(40, 3, 8, 8, dtype=torch.uint8)
    split = Split(images, labels, NASTY)
    names = [name.translate(SHOWN) for name in NASTY]
    for figure, most in (
        (figures.plot_embedding({"h": h, "g": h}, labels, NASTY), 16),
        (figures.plot_neighbours(split, h, Split(images[:10], labels[:10], NASTY), h[:10], 8), 20),
    ):
        names[5] = "n" * (most // 2) + "…" + "n" * (most // 2 - 1)
        assert {*names} <= texts(figure)
        figure.savefig(tmp_path / "picture.svg")
        xml.etree.ElementTree.parse(tmp_path / "picture.svg")


def lines_of(axis):
    return [(list(line.get_xdata()), list(line.get_ydata())) for line in axis.lines]


def test_curves_show_the_metrics():
    lines = [{"epoch": e, "loss": 5 - e, "contrastive_accuracy": e / 10, "learning_rate": 0.1,
              "knn_acc": e / 20 if e == 2 else None, "effective_rank": 3 * e, "alignment": e / 2}
             for e in (1, 2)]  # fmt: skip
    figure = figures.plot_curves(lines)
    shown = [([1, 2], [4, 3]), ([1, 2], [10, 20]), ([1, 2], [0.1, 0.1]), ([2], [10]),
             ([1, 2], [3, 6]), ([1, 2], [0.5, 1])]  # fmt: skip
    assert [lines_of(axis) for axis in figure.axes] == [[line] for line in shown]
    assert all(axis.get_title() and axis.get_ylabel() for axis in figure.axes)
    figure = figures.plot_curves([{**line, "knn_acc": None} for line in lines])
    assert lines_of(figure.axes[3]) == [([], [])]


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
    saved, *_ = open_checkpoint(cfg, run / WEIGHTS)
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
    assert {text.get_text() for text in figure.legends[0].get_texts()} == {"a", "b", "c"}
    assert "60 test images" in figure.get_suptitle()


def test_what_cannot_be_embedded_is_refused():
    """All representations the same would end t-SNE in a segmentation fault."""
    line = torch.arange(1, 10)[:, None] * torch.ones(8)
    for h in (torch.ones(9, 8), torch.zeros(9, 8), line, line / 0):
        with pytest.raises(UserError, match="not finite or all the same"):
            figures.plot_embedding({"h": h, "g": h}, torch.arange(9), ["a"] * 9)
    two = torch.eye(8)[torch.arange(40) % 2]
    figure = figures.plot_embedding({"two": two, "nearly one": 1 + 1e-5 * two}, two[:, 0], ["a"])
    for axis in figure.axes:
        assert torch.from_numpy(axis.collections[0].get_offsets().data).isfinite().all()
