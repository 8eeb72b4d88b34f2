"""The pictures: that they show what they say, of a toy run and of made-up values."""

import json
import os
import shutil
import subprocess
import sys
import warnings
import xml.etree.ElementTree
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from conftest import REPOSITORY, make_images, thin_resnet, toy_config
from matplotlib import colors, font_manager, pyplot
from matplotlib.text import Text
from omegaconf import OmegaConf
from PIL import Image

import plot
import simclr
import simclr_lin
from evaluation import figures
from evaluation.features import clean_features
from evaluation.runs import noted
from images.datasets import Split, draw_stratified, load_split
from models import BACKBONES
from simclr import start_training
from system.checkpoint import load_checkpoint, load_encoder
from system.device import select_precision
from system.errors import UserError


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


WEIGHTS = "simclr_resnet18_epoch2.pt"
REPRESENTED = ["embedding", "neighbours"]
NAMES = {"views", "curves", "confusion", *REPRESENTED}


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


def test_what_is_missing_for_a_picture_is_said_and_the_others_are_drawn(run, draw):
    said = draw(run).splitlines()
    assert said[:-1] == [f"{run}/{name}.png" for name in ("curves", "views", *REPRESENTED)]
    assert said[-1].startswith("not drawn: confusion: no linear evaluation in the run directory")
    (run / "simclr_resnet18_epoch2.pt").unlink()
    said = draw(run).splitlines()
    assert said[:2] == [f"{run}/{name}.png" for name in ("curves", "views")]
    assert f"not drawn: embedding, neighbours: no checkpoint of resnet18 in {run}" in said[-1]


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


@pytest.fixture(scope="module")
def evaluated(trained, tmp_path_factory):
    """A copy of the toy run with results.json. Only to be read."""
    run = shutil.copytree(trained, tmp_path_factory.mktemp("evaluated") / "run")
    data = make_images(tmp_path_factory.mktemp("data"), train=8, test=3)
    cfg = toy_config(data, peak="finetune_learning_rate")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(BACKBONES, "resnet18", thin_resnet)
        simclr_lin.evaluate(cfg, run / WEIGHTS, run)
    return run


def write(name, content):
    """What writes `content` to a file of the run."""
    return lambda run: (run / name).write_bytes(content)


def scaled(weight, bias):
    """What makes the last batch norm of the checkpoint multiply by `weight` and add `bias`."""

    def change(run):
        saved = load_checkpoint(run / WEIGHTS)
        last = "enc.layer2.0.bn2."
        saved["model"][last + "weight"].fill_(weight)
        saved["model"][last + "bias"].fill_(bias)
        saved["model"]["enc.layer2.0.downsample.1.weight"].fill_(0)
        saved["model"]["enc.layer2.0.downsample.1.bias"].fill_(0)
        torch.save(saved, run / WEIGHTS)

    return change


def of_another_run(run):
    results = json.loads((run / "results.json").read_text())
    results["config"]["temperature"] = 0.9
    (run / "results.json").write_text(json.dumps(results))


def with_results(**values):
    def change(run):
        results = {**json.loads((run / "results.json").read_text()), **values}
        (run / "results.json").write_text(json.dumps(results))

    return change


NO_CURVES = [
    (lambda run: (run / "metrics.jsonl").unlink(), "has no epoch to show yet"),
    (write("metrics.jsonl", b""), "has no epoch to show yet"),  # resumed in its first epoch
    (
        write("metrics.jsonl", b'{"epoch": 1\n{}\n'),
        "metrics.jsonl, line 1 is damaged or of another",
    ),
    (write("metrics.jsonl", b"[1]\n"), "line 1 is damaged or of another program (no keys"),
    (write("metrics.jsonl", b'{"epoch": 1}\n{"loss": 1}\n'), "metrics.jsonl is not of simclr.py"),
    (write("metrics.jsonl", b'{"epoch": "\xe9"}\n'), "is damaged or of another"),
]
NO_CONFUSION = [
    (lambda run: (run / "results.json").unlink(), "no linear evaluation in"),
    (write("results.json", b'{"linear_acc": 0.1, '), "results.json is damaged or of another progr"),
    (write("results.json", b'{"knn_acc": 1}'), "results.json is not of simclr_lin.py"),
    (write("results.json", b"[" * 99999), "recursion"),
    (of_another_run, "is of a run with temperature 0.9: evaluate this one"),
]
NO_FEATURES = [
    (scaled(0, 1), "representations are all the same: a collapsed or damaged checkpoint"),
    (scaled(0, 0), "representations are all the same"),
    (scaled(torch.nan, 0), "has values that are not finite"),
    (scaled(1e38, 0), "not finite"),  # the representations alone
    (write(WEIGHTS, b"PK"), "is damaged or no checkpoint"),
    (lambda run: (run / WEIGHTS).unlink(), "no checkpoint of resnet18"),
]


@pytest.mark.parametrize(
    "damages",
    [
        {("curves",): NO_CURVES[2], tuple(REPRESENTED): NO_FEATURES[0]},
        {("curves",): NO_CURVES[0], ("confusion",): NO_CONFUSION[1]},
        {("confusion",): NO_CONFUSION[4], tuple(REPRESENTED): NO_FEATURES[4]},
    ],
)
def test_a_picture_that_fails_takes_no_other_down(draw, thin, evaluated, tmp_path, damages):
    run = shutil.copytree(evaluated, tmp_path / "run")
    for damage, _ in damages.values():
        damage(run)
    said = draw(run)
    assert isinstance(said, str), said
    drawn = NAMES - {name for names in damages for name in names}
    for suffix in ("png", "svg"):
        assert {path.stem for path in run.glob(f"*.{suffix}")} == drawn
    lines = [line for line in said.splitlines() if not line.endswith(".png")]
    for line, (names, (_, reason)) in zip(lines, damages.items(), strict=True):
        assert line.startswith(f"not drawn: {', '.join(names)}: ") and reason in line


@pytest.mark.parametrize(
    ("picture", "damage", "reason"),
    [
        *(("curves", *case) for case in NO_CURVES),
        *(("confusion", *case) for case in NO_CONFUSION),
        *((name, *case) for name in REPRESENTED for case in NO_FEATURES),
    ],
)
def test_each_reason_is_one_sentence(thin, evaluated, tmp_path, picture, damage, reason):
    run = shutil.copytree(evaluated, tmp_path / "run")
    damage(run)
    failed = {}
    for name, function in plot.pictures([run], [], failed):
        if name == picture:
            with noted(failed, name):
                function()
    [((line, code), names)] = failed.items()
    assert (code, names) == (1, [picture]) and reason in line and "\n" not in line


def test_without_its_data_a_run_has_curves_and_confusion(draw, thin, evaluated, tmp_path):
    run = shutil.copytree(evaluated, tmp_path / "run")
    *paths, line = draw(run, "data_dir=nowhere").splitlines()
    assert paths == [f"{run}/curves.png", f"{run}/confusion.png"]
    assert line.startswith("not drawn: views, embedding, neighbours: nowhere/train cannot be read")


def test_what_the_machine_cannot_do_for_one_picture_it_may_for_another(draw, run, monkeypatch):
    for error, reason in (
        (MemoryError(), "out of memory (of the host): this machine has too little for it"),
        (PermissionError(13, "Permission denied", "a"), "a: Permission denied"),
        (torch.OutOfMemoryError("CUDA out of memory"), "out of memory (CUDA out of memory): this"),
    ):
        monkeypatch.setattr(plot, "represent", Mock(side_effect=error))
        said = draw(run, "data_dir=nowhere").splitlines()
        assert said[0] == f"{run}/curves.png"
        assert said[-1].startswith(f"not drawn: embedding, neighbours: {reason}")
    monkeypatch.setattr(plot, "represent", Mock(side_effect=ZeroDivisionError))  # a bug of ours
    with pytest.raises(ZeroDivisionError):
        draw(run, "data_dir=nowhere")


def test_where_a_checkpoint_from_elsewhere_was_evaluated_is_drawn_from_it(
    draw, thin, evaluated, tmp_path
):
    """hydra.run.dir of an evaluation: it has results.json and no config.yaml."""
    run = tmp_path / "only"
    run.mkdir()
    shutil.copy(evaluated / "results.json", run)
    *paths, line = draw(run).splitlines()
    assert {Path(path).stem for path in paths} == NAMES - {"curves"}
    assert line.startswith(f"not drawn: curves: {run} has no epoch to show yet")
    with_results(checkpoint="gone.pt")(run)
    line = draw(run, "data_dir=nowhere").splitlines()[-1]
    assert line.startswith("not drawn: embedding, neighbours: no checkpoint gone.pt")
    with_results(config={"a": 1})(run)
    code, line = draw(run)
    assert code == 2 and line.startswith(f"error: {run}/results.json is not of simclr.py: it has n")


BROKEN = [
    ("seed: 1\n\tepochs: 2\n", "line 2: "),
    ("epochs: 2\nepochs: 3\n", "epochs"),
    ("epochs: é\n".encode("latin-1"), "line 1: byte 0xe9 is not UTF-8"),
    ("epochs: 2\n".encode("utf-16"), "line 1: byte 0xff is not UTF-8"),
    ("- 1\n", "must hold lines of the form key: value"),
    ("", "is not of simclr.py: it has no epochs, backbone"),
    ("model: vit\nlr: 0.1\n", "is not of simclr.py: it has no epochs, backbone"),
]


@pytest.mark.parametrize(("content", "reason"), BROKEN)
def test_a_broken_config_is_one_line_and_takes_no_other_run_down(
    draw, run, tmp_path, content, reason
):
    broken = tmp_path / "broken"
    broken.mkdir()
    shutil.copy(run / "metrics.jsonl", broken)
    content = content if isinstance(content, bytes) else content.encode()
    (broken / "config.yaml").write_bytes(content)
    code, error = draw(broken)
    assert code == 2 and error.startswith(f"error: {broken}/config.yaml") and reason in error
    assert error.count("\n") == 1
    failed = {}
    [(name, _)] = plot.pictures([run, broken], [], failed)
    [(line, _)] = failed
    assert name == "curves" and reason in line


def test_a_value_in_a_config_that_is_not_allowed_names_the_run(draw, run):
    text = (run / "config.yaml").read_text()
    for new in ("many", "???", "${nosuch}", "[1]"):
        (run / "config.yaml").write_text(text.replace("\nepochs: 2", f"\nepochs: {new}"))
        code, error = draw(run)
        assert code == 2 and f"error: the config of {run}: epochs" in error, error


NASTY = [
    "$x$", r"$\frac{$", "_leading", "back\\slash", "%s {0} {}", "two\nlines", "n" * 200,
    os.fsdecode(b"caf\xe9"), "猫が好き", "tab\tand\x1bescape", "a|b", "x_{1}^2 & #",
]  # fmt: skip


def texts(figure):
    """What a figure says, and that none of it would be read as markup."""
    found = figure.findobj(Text)
    assert not any(text.get_parse_math() or text.get_usetex() for text in found)
    return [text.get_text() for text in found]


ENVIRONMENTS = [
    {"MPLBACKEND": "module://matplotlib_inline.backend_inline", "MPLCONFIGDIR": "file"},
    {"MPLBACKEND": "module://nosuch", "MATPLOTLIBRC": "nosuch"},
    {"MPLBACKEND": "TkAgg", "MATPLOTLIBRC": "markup", "DISPLAY": ""},
    {"MPLBACKEND": "", "MATPLOTLIBRC": "", "MPLCONFIGDIR": ""},
]
FORKS = """
import os, runpy, sys
import evaluation.features, hydra, sklearn.manifold
assert "matplotlib" not in sys.modules
sys.argv = ["plot.py", "run", "data_dir=nowhere", "--out", "out"]
for environment in {}:
    if (child := os.fork()) == 0:
        os.environ.update(environment)
        runpy.run_path({!r}, run_name="__main__")
        sys.stdout.flush()
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0, environment
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="one start for all environments")
def test_what_the_environment_says_to_matplotlib_is_ignored(run, tmp_path):
    """Each in a process of its own: matplotlib reads it while it is imported."""
    (tmp_path / "file").touch()
    (tmp_path / "markup").write_text(
        "text.usetex: True\nfigure.figsize: 1, 1\nno key\nfont.size: a"
    )
    done = subprocess.run(
        [sys.executable, "-c", FORKS.format(ENVIRONMENTS, str(REPOSITORY / "plot.py"))],
        cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(REPOSITORY)}, capture_output=True,
        text=True,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    paths = [line for line in done.stdout.splitlines() if not line.startswith("not drawn: ")]
    assert paths == len(ENVIRONMENTS) * ["out/curves.png"]
    with Image.open(tmp_path / "out" / "curves.png") as image:
        assert image.width > 900  # not one inch
    assert "<dc:date>" not in (tmp_path / "out" / "curves.svg").read_text()  # SOURCE_DATE_EPOCH


@pytest.fixture
def figure_of(monkeypatch):
    """The figures that plot.py has saved, by name."""
    saved, save = {}, figures.save
    monkeypatch.setattr(
        figures,
        "save",
        lambda figure, path: saved.update({path.name: figure}) or save(figure, path),
    )
    return saved


@pytest.mark.filterwarnings("error", "ignore:Glyph")  # no font of matplotlib has 猫
def test_names_of_classes_are_drawn_as_they_are(draw, thin, tmp_path, figure_of):
    data = tmp_path / "images"
    for split, n in (("train", 4), ("test", 2)):
        make_images(data, classes=len(NASTY), **{split: n})
        for label, name in enumerate(NASTY):
            (data / split / f"class{label}").rename(data / split / name)
    run = tmp_path / "run $a$ _b"
    run.mkdir()
    cfg = toy_config("nowhere", "epochs=1", peak="finetune_learning_rate")
    cfg.data_dir = str(data)
    simclr.pretrain(cfg, run)
    simclr_lin.evaluate(cfg, run / WEIGHTS.replace("2", "1"), run)
    assert "not drawn" not in draw(run)
    names = [name.translate(dict.fromkeys(map(ord, "\n\t\x1b\udce9"), "�")) for name in NASTY]
    for picture, letters in (("embedding", 8), ("confusion", 10)):
        names[6] = "n" * letters + "…" + "n" * (letters - 1)
        assert set(names) <= {*texts(figure_of[picture])}
    beside = {axis.get_ylabel() for axis in figure_of["neighbours"].axes} - {""}
    assert len(beside) == 10 and beside <= {*names} and texts(figure_of["neighbours"])
    for name in NAMES:
        xml.etree.ElementTree.parse(run / f"{name}.svg")


@pytest.mark.filterwarnings("error")
def test_names_and_settings_of_runs_are_drawn_as_they_are(
    draw, run, tmp_path, monkeypatch, figure_of
):
    runs = []
    monkeypatch.chdir(tmp_path)
    for name in ("$x$", "_leading", "{a} %s", os.fsdecode(b"\xe9"), "n" * 200):
        runs.append(Path(name))
        shutil.copytree(run, name)
    assert "curves.png" in draw(*runs, "--out", "curves")
    expected = {"$x$", "_leading", "{a} %s", "�", "n" * 32 + "…" + "n" * 31}
    assert {text.get_text() for text in figure_of["curves"].legends[0].get_texts()} == expected
    for n, name in enumerate(runs):
        config = OmegaConf.load(name / "config.yaml")
        OmegaConf.save({**config, "init": f"$_{n}$"}, name / "config.yaml")
    assert "curves.png" in draw(*runs, "--out", "curves")
    assert {f"init $_{n}$" for n in range(5)} <= {*texts(figure_of["curves"])}
    xml.etree.ElementTree.parse("curves/curves.svg")


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
    figure = plot.curves({"one": (one, a), "other": (other, b)})
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
    figure = plot.curves({"logs/a": (toy(), a), "logs/b": (toy(), old)})  # before kNN
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["logs/a", "logs/b"]
    assert not plot.curves({"logs/a": (toy(), a)}).legends
    pyplot.close("all")


def test_several_runs_share_one_picture(draw, run, tmp_path):
    other = shutil.copytree(run, tmp_path / "other")
    config = OmegaConf.load(run / "config.yaml")
    OmegaConf.save({**config, "temperature": 0.9}, other / "config.yaml")
    assert draw(run, other, "--out", tmp_path / "both").splitlines() == [
        str(tmp_path / "both" / "curves.png")
    ]
    (tmp_path / "none").mkdir()
    assert draw(run, tmp_path / "none", other, "--out", tmp_path / "both").splitlines()[1:] == [
        f"not drawn: curves: {tmp_path}/none is not a run directory: it has no config.yaml, no "
        "results.json"
    ]
    svg = (tmp_path / "both" / "curves.svg").read_text()
    assert "temperature 0.5" in svg and "temperature 0.9" in svg


def shown(figure):
    return [axis.images[0].get_array() for axis in figure.axes]


def test_views_stand_beside_their_image_and_follow_the_config(toy):
    images = torch.randint(0, 256, (20, 3, 8, 8), dtype=torch.uint8)
    plain = "crop_scale=[1,1]", "flip_probability=0", "color_strength=0", "grayscale_probability=0"
    figure = figures.plot_views(toy(*plain), images)
    grid = shown(figure)
    assert len(grid) == 8 * 9
    for row in range(8):
        original, *views = grid[9 * row : 9 * row + 9]
        assert all(abs(view - original).max() < 1e-5 for view in views)
        assert any((255 * original).round().astype(int).tolist() == image.permute(1, 2, 0).tolist()
                   for image in images)  # fmt: skip
    gray = shown(figures.plot_views(toy("grayscale_probability=1"), images))
    assert all((view[..., 0] == view[..., 1]).all() for view in gray[1:9])
    assert not (gray[1] == gray[2]).all() and not (gray[0][..., 0] == gray[0][..., 1]).all()
    assert len(shown(figures.plot_views(toy(), images[:3]))) == 3 * 9
    pyplot.close("all")


def test_neighbours_are_the_nearest_by_cosine_with_frames_of_their_class():
    train = Split(torch.arange(4, dtype=torch.uint8)[:, None, None, None].expand(4, 3, 8, 8),
                  torch.tensor([0, 1, 0, 1]), ["cat", "dog"])  # fmt: skip
    test = Split(train.images[:3] + 100, torch.tensor([1, 1, 0]), ["cat", "dog"])
    h = torch.tensor([[1.0, 0], [0, 1], [9, 1], [1, 9]])
    test_h = torch.tensor([[0.0, 3], [5, 5], [2, 0]])
    figure = figures.plot_neighbours(train, h, test, test_h, 8, columns=3)
    values = [round(255 * image.max()) for image in shown(figure)]
    assert values == [102, 0, 2, 3, 100, 1, 3, 2]  # the first test cat and dog, 2 and 0
    frames = [
        colors.to_hex(axis.spines["top"].get_edgecolor()) if axis.spines["top"].get_visible() else 0
        for axis in figure.axes
    ]
    right, wrong = figures.RIGHT, figures.WRONG
    assert frames == [0, right, right, wrong, 0, right, right, wrong]
    assert [axis.get_xlabel() for axis in figure.axes] == ["", "", "", "dog", "", "", "", "cat"]
    assert [figure.axes[i].get_ylabel() for i in (0, 4)] == ["cat", "dog"]
    pyplot.close("all")


def test_embedding_has_a_point_for_each_image_in_the_colour_of_its_class():
    torch.manual_seed(0)
    labels = torch.arange(60) % 3
    apart = torch.nn.functional.one_hot(labels, 8) + 0.05 * torch.randn(60, 8)
    figure = figures.plot_embedding(
        {"noise": torch.randn(60, 8), "h": apart}, labels, ["a", "b", "c"]
    )
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


def test_embedding_is_of_the_runs_network_before_and_after_pretraining(run):
    """The same test images, and the initial weights of this very run."""
    cfg = plot.read_config(run, [])
    (panels, labels, _), _ = plot.represent(run, cfg)
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


@pytest.mark.filterwarnings("error")
def test_few_images_and_classes_are_drawn_or_the_reason_said(tmp_path):
    images = torch.randint(0, 256, (40, 3, 8, 8), dtype=torch.uint8)
    h, classes = torch.randn(40, 8), [f"class {n}" for n in range(30)]
    for label in (torch.arange(40) % 25, torch.arange(40) % 3 * 2, torch.zeros(40).long()):
        split = Split(images, label, classes)
        figure = figures.plot_neighbours(split, h, split, h + 1, 8)
        assert len(figure.axes) == 9 * min(10, len(label.unique()))
        figures.save(
            figures.plot_embedding({"h": h, "g": h}, label, classes[:20]), tmp_path / "embedding"
        )
    one, two = (Split(images[:n], torch.arange(n), classes) for n in (1, 2))
    assert len(figures.plot_neighbours(one, h[:1], two, h[1:3], 8).axes) == 2 * 2
    with pytest.raises(UserError, match="needs four test images or more, there are 3"):
        figures.plot_embedding({"h": h[:3]}, label[:3], classes)
    results = {"training_images": 5, "linear_acc": 0.5, "classes": classes}
    counts = torch.eye(30).long()
    counts[3] = 0  # no test image
    figure = figures.plot_confusion({**results, "confusion": counts.tolist()})
    assert figure.axes[0].images[0].get_array().sum() == 29 * 100
    results = {**results, "classes": ["a", "b"], "confusion": [[0, 0], [1, 1]]}
    assert [text.get_text() for text in figures.plot_confusion(results).axes[0].texts] == [
        "0", "0", "50", "50",
    ]  # fmt: skip
    pyplot.close("all")


def test_two_points_many_times_and_zeros_do_not_end_t_sne():
    label, two = torch.arange(400) % 2, torch.eye(8)[torch.arange(400) % 2]
    h = {"two": two, "zeros": two * (label == 0)[:, None], "nearly one": 1 + 1e-5 * two}
    points = [axis.collections for axis in figures.plot_embedding(h, label, ["a", "b"]).axes]
    assert all(torch.from_numpy(c.get_offsets().data).isfinite().all() for p in points for c in p)
    for same in (torch.ones(9, 8), torch.zeros(9, 8), torch.arange(1, 10)[:, None] * torch.ones(8)):
        with pytest.raises(UserError, match="all the same"):
            figures.plot_embedding({"h": same}, label[:9], ["a", "b"])
    pyplot.close("all")


def test_letters_that_the_font_lacks_are_taken_from_another_or_said_once(tmp_path):
    """Of the fonts that matplotlib brings, STIX has a letter that DejaVu Sans lacks."""
    fonts = [font_manager.get_font(font_manager.findfont(name)).get_charmap()
             for name in figures.FONTS[:2]]  # fmt: skip
    pyplot.figure().text(0, 0, "a" + chr(max(fonts[1].keys() - fonts[0].keys())))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        figures.save(pyplot.gcf(), tmp_path / "a")
    pyplot.figure().text(0, 0, "\U0010fff0")
    with pytest.warns(UserWarning, match="missing from font"):
        figures.save(pyplot.gcf(), tmp_path / "a")


def test_confusion_is_in_shares_of_the_true_class(tmp_path):
    results = {"confusion": [[3, 1], [0, 5]], "classes": ["cat", "dog"], "linear_acc": 8 / 9,
               "training_images": 5000}  # fmt: skip
    figure = figures.plot_confusion(json.loads(json.dumps(results)))
    axis = figure.axes[0]
    assert [text.get_text() for text in axis.texts] == ["75", "25", "0", "100"]
    assert axis.get_title().endswith("5,000 labelled training images: 88.9% right")
    assert (axis.get_xlabel(), axis.get_ylabel()) == ("predicted class", "true class")
    assert [label.get_text() for label in axis.get_yticklabels()] == ["cat", "dog"]
    pyplot.close("all")
