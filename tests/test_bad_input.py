"""What can be wrong with what a user gives: one line that says what, where and how to mend it.

Every case goes through the script's own entry point: `python simclr.py KEY=VALUE …`, in this
process but where the process is what is tested. What is there before stays as it is.
"""

import hashlib
import io
import os
import pickle
import shutil
import subprocess
import sys
import tarfile
import urllib.error
import urllib.request
import zipfile
from pathlib import Path

import pytest
import torch
from conftest import REPOSITORY, make_config, make_images, obey_permissions, thin_resnet
from PIL import Image
from test_config import BAD
from test_data import write_cifar
from torchvision.datasets import CIFAR10

import simclr
from models import BACKBONES
from system.checkpoint import load_checkpoint, to_bytes

PRETRAIN, LIN = "simclr.py", "simclr_lin.py"
RUN = "logs/SimCLR/folder/resnet18"
WEIGHTS = f"{RUN}/simclr_resnet18_epoch1.pt"
TOY = ["dataset=folder", "data_dir=images", "batch_size=8", "device=cpu"]
TRAIN = [*TOY, "image_size=8", "epochs=1", "hidden_dim=8", "projection_dim=8", "knn_interval=0"]
BAD_TYPED = [case for case in BAD if case[:2] != ("data_dir", "2024")]  # a path, as it is typed
EVALUATE = [*TOY, "finetune_epochs=1"]


def snapshot(root: Path) -> dict[Path, bytes]:
    files = [path for path in root.rglob("*") if path.is_file() and path.suffix != ".lock"]
    return {path: path.read_bytes() for path in files}


@pytest.fixture
def refuse(call, tmp_path):
    """refuse(code, message, script, overrides): one line, returned; files stay."""

    def refuse(code, message, script, *overrides):
        before = snapshot(tmp_path)
        found, error = call(script, *overrides)
        assert found == code, error
        lines = error.strip().splitlines()
        assert len(lines) == 1 and lines[0].startswith("error: "), error
        assert message in lines[0], lines[0]
        assert snapshot(tmp_path) == before
        return lines[0]

    return refuse


@pytest.fixture
def images(write_images, tmp_path):
    """A folder of images that has nothing wrong with it: 24 to train on, 9 to test."""
    return write_images(tmp_path / "images", train=8, test=3)


@pytest.fixture(scope="module")
def complete(tmp_path_factory):
    """A folder with images and a run of one epoch of them. Only to be read."""
    folder = tmp_path_factory.mktemp("complete")
    make_images(folder / "images", train=8, test=3)
    (folder / RUN).mkdir(parents=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(BACKBONES, "resnet18", thin_resnet)
        patch.chdir(folder)
        simclr.pretrain(make_config(*TRAIN), Path(RUN))
    return folder


@pytest.fixture
def trained(thin, complete, call, tmp_path):
    """A copy of that folder as the working directory; returns the run's."""
    shutil.copytree(complete, tmp_path, dirs_exist_ok=True)
    return Path(RUN)


@pytest.mark.parametrize(("key", "value", "allowed"), BAD_TYPED)
def test_a_bad_value_is_refused_before_a_folder_is_made(refuse, tmp_path, key, value, allowed):
    script = LIN if key in ("protocols", "labels", "predict") else PRETRAIN
    refuse(2, allowed, script, f"{key}={value}")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("+unknown=1", "unknown: no such key; there are recipe, dataset"),
        ("~temperature", "temperature: must be a number above 0"),
        ("temperature=???", "temperature: must be a number above 0"),
        ("temperature=${nosuch}", "temperature: must be a number above 0"),
        ("temperature=${oc.env:NO_SUCH}", "NO_SUCH"),
        ("temperature=${oc.decode:'['}", "temperature: must be"),
        ("temperature=${nosuch:1}", "temperature: must be a number above 0"),
        ("temperature=${temperature}", "temperature: must be"),
        ("learning_rate=${per_256:a,b}", "learning_rate: must be a number above 0"),
        ("learning_rate=${per_256:1,0,0}", "learning_rate: must be a number above 0"),
        ("data_dir=${oc.env:NO_SUCH}/x", "data_dir: must be a path"),
        ("dataset=${backbone}", "dataset='resnet18': must be one of cifar10"),
        ("backbone=${nosuch}", "backbone: must be one of resnet18"),
        ("~dataset", "dataset: must be one of cifar10"),
        ("seed={a: 1}", "seed={'a': 1}: must be an integer"),
        ("epochs=[1]", "epochs=[1]: must be an integer"),
        ("min_learning_rate=9", "min_learning_rate=9: must be at most learning_rate"),
        ("checkpoint=x.pt", "checkpoint=x.pt: must be null for simclr.py"),
        ("device=cuda", "device='cuda': must be one that this machine has"),
    ],
)
def test_a_bad_config_is_refused_before_a_file_is_made(refuse, monkeypatch, override, message):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    refuse(2, message, PRETRAIN, override)


def test_an_unknown_user_or_an_overlong_name_is_a_path_that_is_not_there(refuse):
    for path, reason in (("~nosuchuser/x", "No such file"), ("x" * 300, "File name too long")):
        refuse(1, reason, PRETRAIN, *TRAIN, f"data_dir='{path}'")
        refuse(1, path[:20], LIN, f"checkpoint='{path}'")
        refuse(1, path[:20], PRETRAIN, "device=cpu", f"data_dir='{path}/y'")


@pytest.mark.parametrize("script", [PRETRAIN, LIN])
def test_what_hydra_refuses_is_one_line_too(refuse, tmp_path, script):
    for override, message in (
        ("batchsize=3", "batchsize: no such key; did you mean batch_size? there are recipe, data"),
        ("hydra.nosuch=3", "hydra.nosuch: no such key"),
        ("hydra/launcher=nosuch", "hydra/launcher=nosuch: must be one of basic"),
        ("recipe=[digits,simsiam]", "recipe=[digits,simsiam]: must be the name of one recipe"),
        ("recipe=null", "must be a string or a list"),
        ("~recipe", "recipe: must be the name of a recipe"),
        ("recipe=nosuch", "recipe=nosuch: must be one of digits, fast, paper, published, simsiam"),
        ("temperature", "parsing override 'temperature'"),
        ("temperature=[", "no viable alternative"),
    ):
        refuse(2, message, script, override)
    assert not list(tmp_path.iterdir())


def test_a_run_folder_that_cannot_be_made_is_refused(refuse, tmp_path):
    Path("file").write_text("")
    for folder in ("file", "file/below", "/proc/below"):
        refuse(1, f"{folder} cannot be made (", PRETRAIN, f"hydra.run.dir={folder}")
    Path("closed/.simclr.lock").mkdir(parents=True)  # a name that cannot be opened for writing
    refuse(1, "cannot be written (Is a dir", PRETRAIN, *TRAIN, "hydra.run.dir=closed")


def picture(path: str, size=(20, 20), mode="RGB", **options) -> Path:
    file = Path("images", path)
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size).save(file, **options)
    return file


def cut(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])


def remove(pattern: str, keep: int = 0) -> None:
    for path in sorted(Path("images").glob(pattern))[keep:]:
        path.unlink()


def frames(suffix: str) -> None:
    shades = [Image.new("RGB", (9, 9), (shade, 0, 0)) for shade in (0, 99, 255)]
    file = Path(f"images/train/class1/x.{suffix}")
    shades[0].save(file, save_all=True, append_images=shades[1:])


def link(source: str, target: str) -> None:
    Path(source).symlink_to(Path(target).absolute())


BAD_DATA = {
    "no folder": (
        lambda: Path("images").rename("elsewhere"),
        "images/train cannot be read (No such",
    ),
    "a file for a folder": (
        lambda: (Path("images").rename("x"), Path("images").write_text("")),
        "images/train cannot be read (Not a directory): dataset=folder needs",
    ),
    "no class": (
        lambda: (Path("images/train").rename("x"), Path("images/train").mkdir()),
        "images/train has no image: add some, for labels in images/train/<class>/",
    ),
    "no image but notes": (
        lambda: (
            Path("images/train").rename("x"),
            Path("images/train").mkdir(),
            Path("images/train/notes.txt").write_text("notes"),
        ),
        "images/train has no image but notes.txt: add some",
    ),
    "empty folders alone": (
        lambda: (Path("images/train").rename("x"), Path("images/train/a/b").mkdir(parents=True)),
        "train/a has no image: add some",
    ),
    "damaged image in no class": (
        lambda: Path("images/train/x.png").write_bytes(b""),
        "images/train/x.png cannot be read as an image",
    ),
    "link outside in no class": (
        lambda: link("images/train/x.png", __file__),
        "images/train/x.png is a link out of images",
    ),
    "one image in no class": (
        lambda: (Path("images/train").rename("x"), picture("train/a.png")),
        "there is 1 training image: a batch takes two or more",
    ),
    "empty class": (
        lambda: Path("images/train/empty").mkdir(),
        "train/empty has no image: add some",
    ),
    "one image": (
        lambda: (
            remove("train/class0/*", 1),
            Path("images/train/class1").rename("x"),
            Path("images/train/class2").rename("y"),
        ),
        "there is 1 training image: a batch takes two or more",
    ),
    "empty file": (
        lambda: Path("images/train/class1/x.png").write_bytes(b""),
        "class1/x.png cannot be",
    ),
    "no image": (
        lambda: Path("images/train/class1/notes.png").write_text("notes"),
        "images/train/class1/notes.png cannot be read as an image",
    ),
    "a zip alone": (
        lambda: (
            Path("images/train/class9").mkdir(),
            zipfile.ZipFile("images/train/class9/x.zip", "w").close(),
        ),
        "train/class9 has no image but x.zip: add some",
    ),
    "truncated JPEG": (
        lambda: cut(picture("train/class1/x.jpg", (90, 90))),
        "class1/x.jpg cannot be read as an image",
    ),
    "truncated PNG": (
        lambda: cut(picture("train/class1/x.png", (90, 90))),
        "class1/x.png cannot be read as an image",
    ),
    "animated GIF": (
        lambda: frames("gif"),
        "class1/x.gif cannot be read as an image (it has 3 frames)",
    ),
    "animated PNG": (
        lambda: frames("png"),
        "class1/x.png cannot be read as an image (it has 3 frames)",
    ),
    "decompression bomb": (
        lambda: picture("train/class1/x.png", (10_000, 10_000), "1"),
        "class1/x.png cannot be read as",
    ),
    "larger bomb": (
        lambda: picture("train/class1/x.png", (20_000, 20_000), "1"),
        "class1/x.png cannot be read as",
    ),
    "link to a file outside": (
        lambda: link("images/train/class1/x.png", __file__),
        "class1/x.png is a link out of images",
    ),
    "link to itself": (
        lambda: link("images/train/class1/x.png", "images/train/class1/x.png"),
        "class1/x.png is a link out of images, or to nothing",
    ),
    "link to nothing": (
        lambda: link("images/train/class1/x.png", "nowhere"),
        "class1/x.png is a link out of images, or",
    ),
    "class that is a link outside": (
        lambda: link("images/train/class9", REPOSITORY),
        "train/class9 is a link out of images",
    ),
    "link to a folder in a class": (
        lambda: link("images/train/class1/more", "images/train/class2"),
        "class1/more is a link to a folder, not followed",
    ),
}


@pytest.mark.parametrize("case", BAD_DATA)
def test_bad_images_are_refused_by_name(refuse, images, tmp_path, case):
    spoil, message = BAD_DATA[case]
    spoil()
    refuse(1, message, PRETRAIN, *TRAIN)


def test_one_image_a_class_leaves_nothing_for_knn(refuse, images, tmp_path):
    for label in range(3):
        remove(f"train/class{label}/*", 1)
    overrides = [*TRAIN, "batch_size=2", "knn_interval=1"]
    refuse(1, "none can be held out: knn_interval=0 leaves kNN out", PRETRAIN, *overrides)


def test_a_batch_of_more_images_than_there_are_is_refused(refuse, images):
    refuse(2, "batch_size=25: must be an integer from 2 to 24", PRETRAIN, *TRAIN, "batch_size=25")


def test_unusual_images_and_names_are_no_mistakes(call, thin, tmp_path):
    for n, mode in enumerate(("RGB", "L", "RGBA", "P", "1", "LA", "I;16")):
        picture(f"train/a class, grüße/{n} 'x' ä 日本.png", mode=mode)
    picture("train/b/dot.png", (1, 1)), picture("train/b/line.png", (1, 300))
    picture("train/b/CMYK.JPG", mode="CMYK"), picture("train/b/still.gif", mode="P")
    link("images/train/b/again.png", "images/train/b/dot.png")
    assert call(PRETRAIN, *TRAIN)[0] == 0
    assert "12 images of folder" in Path(RUN, "simclr.log").read_text()


UNREADABLE = """
import os, runpy, sys
script, *overrides = sys.argv[1:]
for path in ("images/train/class1/3.png", "images/train/class2", "images/train"):
    os.chmod(path, 0)
    sys.argv = [script, *overrides]
    try:
        runpy.run_path(script, run_name="__main__")
    except SystemExit as end:
        print(end.code, file=sys.stderr)
    os.chmod(path, 0o755)
"""


def test_what_may_not_be_read_is_named(tmp_path, write_images):
    """In a process without root's right to read everything."""
    write_images(tmp_path / "images", train=8)
    done = subprocess.run(
        [sys.executable, "-c", UNREADABLE, str(REPOSITORY / "simclr.py"), *TRAIN], cwd=tmp_path,
        capture_output=True, text=True, timeout=120, preexec_fn=obey_permissions,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
    )  # fmt: skip
    said = done.stderr.splitlines()
    assert len(said) == 6 and said[1::2] == ["1", "1", "1"], done.stderr
    for path, line in zip(("class1/3.png", "class2", "images/train"), said[::2], strict=True):
        assert f"{path} cannot be read" in line and "Permission denied" in line


class Trap:
    """Unpickled, it would create the file `sprung`."""

    def __reduce__(self):
        return open, ("sprung", "w")


def trap_in_cifar(monkeypatch):
    """A batch of another content than CIFAR-10's, which is a pickle, and no network."""
    folder = Path("data") / CIFAR10.base_folder
    folder.mkdir(parents=True)
    for name, _ in [*CIFAR10.train_list, *CIFAR10.test_list]:
        (folder / name).write_bytes(pickle.dumps(Trap()))


def escaping_archive(monkeypatch, member):
    """An archive with the right name, and even the right checksum, whose member leads outside."""
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w:gz") as tar:
        if isinstance(member, tarfile.TarInfo):
            tar.addfile(member)
            member = f"{member.name}/sprung"
        info = tarfile.TarInfo(member)
        info.size = 4
        tar.addfile(info, io.BytesIO(b"evil"))
    Path("data").mkdir()
    (Path("data") / CIFAR10.filename).write_bytes(content.getvalue())
    monkeypatch.setattr(CIFAR10, "tgz_md5", hashlib.md5(content.getvalue()).hexdigest())


def outward_link():
    info = tarfile.TarInfo("inside")
    info.type, info.linkname = tarfile.SYMTYPE, "../.."
    return info


BAD_DOWNLOADS = {
    "no network": (lambda patch: None, "could not fetch https://www.cs.toronto.edu/"),
    "damaged archive": (
        lambda patch: write_cifar(patch, Path("data"), damage=True),
        "gz is damaged or incomplete",
    ),
    "malicious batch": (trap_in_cifar, "could not fetch https://www.cs.toronto.edu/"),
    "foreign archive": (
        lambda patch: (Path("data").mkdir(), (Path("data") / CIFAR10.filename).write_bytes(b"x")),
        "gz is damaged or incomplete (its MD5 is not",
    ),
    "archive that leads out": (
        lambda patch: escaping_archive(patch, "../sprung"),
        "gz cannot be unpacked",
    ),
    "archive with an absolute path": (
        lambda patch: escaping_archive(patch, str(Path("sprung").absolute())),
        "could not fetch",
    ),
    "archive with a link out": (
        lambda patch: escaping_archive(patch, outward_link()),
        "gz cannot be unpacked",
    ),
}


@pytest.mark.parametrize("case", BAD_DOWNLOADS)
def test_bad_downloads_are_refused_and_nothing_is_executed(call, tmp_path, monkeypatch, case):
    def no_network(*args, **kwargs):
        raise urllib.error.URLError("no network")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(urllib.request, "urlopen", no_network)
    spoil, message = BAD_DOWNLOADS[case]
    spoil(monkeypatch)
    code, error = call(PRETRAIN, "device=cpu")
    assert code == 1 and message in error and error.count("\n") == 1
    places = {path.relative_to(tmp_path).parts[0] for path in snapshot(tmp_path)}
    assert places <= {"data"} and not (tmp_path.parent / "sprung").exists()


def rewrite(path: str, change) -> None:
    """The file of weights after `change` of its content."""
    saved = torch.load(path, weights_only=True)
    Path(path).write_bytes(to_bytes(change(saved) or saved))


def tampered(path: str) -> None:
    weight = load_checkpoint(Path(path))["model"]["projector.2.weight"].numpy().tobytes()
    content = Path(path).read_bytes()
    Path(path).write_bytes(content.replace(weight, weight[::-1]))


BAD_CHECKPOINTS = {
    "missing": (lambda: Path(WEIGHTS).unlink(), 1, "no checkpoint of resnet18 in logs/", []),
    "another epoch": (lambda: None, 1, "no checkpoint of resnet18 after epoch 7", ["load_epoch=7"]),
    "no such file": (
        lambda: None,
        1,
        "no checkpoint nowhere.pt: . has no .pt file",
        ["checkpoint=nowhere.pt"],
    ),
    "a directory": (lambda: None, 1, "no checkpoint in images", ["checkpoint=images"]),
    "empty": (lambda: Path(WEIGHTS).write_bytes(b""), 1, "is damaged or no checkpoint", []),
    "truncated": (lambda: cut(Path(WEIGHTS)), 1, "is damaged or no checkpoint", []),
    "tampered": (lambda: tampered(WEIGHTS), 1, "is damaged or no checkpoint (wrong CRC of ", []),
    "text": (lambda: Path(WEIGHTS).write_text("text"), 1, "is damaged or no checkpoint", []),
    "a zip": (lambda: zipfile.ZipFile(WEIGHTS, "w").close(), 1, "is no checkpoint", []),
    "an image": (
        lambda: Image.new("L", (9, 9)).save(WEIGHTS, "png"),
        1,
        "is damaged or no check",
        [],
    ),
    "a list": (
        lambda: torch.save([1], WEIGHTS),
        1,
        "not written by simclr.py: it has no model",
        [],
    ),
    "foreign weights": (lambda: torch.save({"a": 1}, WEIGHTS), 1, "it has no model", []),
    "no config": (
        lambda: rewrite(WEIGHTS, lambda s: s.pop("config") and s),
        1,
        "it has no config",
        [],
    ),
    "half a config": (
        lambda: rewrite(WEIGHTS, lambda s: s["config"].pop("backbone") and s),
        1,
        "its config lacks backbone",
        [],
    ),
    "from the future": (
        lambda: rewrite(WEIGHTS, lambda s: {**s, "format": 2}),
        1,
        "has format 2, this version reads 1",
        [],
    ),
    "malicious": (
        lambda: torch.save({"model": {}, "config": {}, "epoch": Trap()}, WEIGHTS),
        1,
        "is no checkpoint: it is not the plain",
        [],
    ),
    "malicious pickle": (
        lambda: Path(WEIGHTS).write_bytes(pickle.dumps(Trap())),
        1,
        "is damaged or no checkpoint",
        [],
    ),
    "another head": (
        lambda: rewrite(WEIGHTS, lambda s: s["config"].update(projection_dim=9)),
        1,
        "its weights do not fit its config",
        [],
    ),
    "no such backbone": (
        lambda: rewrite(WEIGHTS, lambda s: s["config"].update(backbone="vgg")),
        1,
        "its weights do not fit its config (unknown backbone 'vgg'",
        [],
    ),
    "another backbone typed": (
        lambda: None,
        2,
        "backbone=resnet34: must be resnet18, as in",
        [f"checkpoint={WEIGHTS}", "backbone=resnet34"],
    ),
    "another head typed": (
        lambda: None,
        2,
        "projection_dim=64: must be 8, as in",
        ["projection_dim=64"],
    ),
    "both ways to name one": (
        lambda: None,
        2,
        "load_epoch=1: must be null beside checkpoint=",
        ["load_epoch=1", "checkpoint=x"],
    ),
    "classes of another dataset": (
        lambda: Path("images/test/class2").rename("images/test/dog"),
        1,
        "images/test must have the classes of images/train: only one of them has class2, dog",
        [],
    ),
    "one class": (
        lambda: [
            Path(f"images/{split}/class{n}").rename(f"{split}{n}")
            for split in ("train", "test")
            for n in (1, 2)
        ],
        1,
        "there is one class, class0: a classifier needs two or more",
        [],
    ),
    "no classes": (
        lambda: (Path("images/train").rename("x"), picture("train/a.png")),
        1,
        "images/train has images in no class folder (a.png): labels are needed, each image in "
        "data_dir/train/<class>/ or data_dir/test/<class>/",
        [],
    ),
    "no classes to predict": (
        lambda: (picture("train/a.png"), picture("mine/b.png")),
        1,
        "images/train has images in no class folder (a.png): labels are needed",
        ["predict=images/mine"],
    ),
    "an image beside the classes": (
        lambda: [picture(f"test/{n}.png") for n in range(4)],
        1,
        "images/test has images in no class folder (0.png, 1.png, 2.png and 1 more): labels",
        [],
    ),
    "no test images": (
        lambda: Path("images/test").rename("x"),
        1,
        "images/test cannot be read",
        [],
    ),
    "more labels than images": (
        lambda: None,
        1,
        "9 images of each class are too many",
        ["labels=9"],
    ),
    "nothing to predict": (
        lambda: None,
        1,
        "predict=nowhere: there is no directory nowhere",
        ["predict=nowhere"],
    ),
    "no image to predict": (
        lambda: Path("x").mkdir(),
        1,
        "x has no image: add some",
        ["predict=x"],
    ),
}


@pytest.mark.parametrize("case", BAD_CHECKPOINTS)
def test_bad_checkpoints_and_evaluations_are_refused(refuse, trained, tmp_path, case):
    spoil, code, message, overrides = BAD_CHECKPOINTS[case]
    spoil()
    refuse(code, message, LIN, *EVALUATE, *overrides)
    assert not list(tmp_path.rglob("sprung"))


BAD_INITS = {
    "no such file": (
        lambda: None,
        "init=x.pth: must be a file with weights; there is no such file",
    ),
    "a directory": (lambda: Path("x.pth").mkdir(), "no checkpoint in x.pth: x.pth has no .pt file"),
    "empty": (lambda: Path("x.pth").write_bytes(b""), "x.pth is damaged or no checkpoint"),
    "text": (lambda: Path("x.pth").write_text("text"), "x.pth is damaged or no checkpoint"),
    "truncated": (
        lambda: [Path(WEIGHTS).rename("x.pth"), cut(Path("x.pth"))],
        "x.pth is damaged or no checkpoint",
    ),
    "tampered": (
        lambda: [tampered(WEIGHTS), Path(WEIGHTS).rename("x.pth")],
        "x.pth is damaged or no checkpoint (wrong CRC of ",
    ),
    "from the future": (
        lambda: [
            rewrite(WEIGHTS, lambda s: {**s, "format": 2}),
            Path(WEIGHTS).rename("x.pth"),
        ],
        "x.pth has format 2, this version reads 1",
    ),
    "malicious": (
        lambda: torch.save({"model": Trap()}, "x.pth"),
        "x.pth is no checkpoint: it is not the plain data of simclr.py or of a state dict",
    ),
    "malicious pickle": (
        lambda: Path("x.pth").write_bytes(pickle.dumps(Trap(), protocol=2)),
        "x.pth is no checkpoint: it is not the plain data",
    ),
    "another pickle": (
        lambda: Path("x.pth").write_bytes(pickle.dumps(Trap())),
        "x.pth is damaged or no checkpoint (File is not a zip file)",
    ),
    "a list": (lambda: torch.save([1], "x.pth"), "init=x.pth: must hold a checkpoint of"),
    "nothing": (lambda: torch.save({}, "x.pth"), "init=x.pth: must hold a checkpoint of"),
    "no tensors": (lambda: torch.save({"a": 1}, "x.pth"), "init=x.pth: must hold a checkpoint"),
    "no names": (lambda: torch.save({1: torch.ones(1)}, "x.pth"), "init=x.pth: must hold a"),
    "no model": (lambda: torch.save({"model": 1}, "x.pth"), "init=x.pth: must hold a checkpoint"),
    "another encoder": (
        lambda: torch.save({"weight": torch.ones(1)}, "x.pth"),
        "init=x.pth: does not fit the encoder (Error(s) in loading state_dict for ResNet: Missing",
    ),
}


@pytest.mark.parametrize("case", BAD_INITS)
def test_bad_starting_points_are_refused(refuse, trained, tmp_path, case):
    spoil, message = BAD_INITS[case]
    spoil()
    refuse(1, message, PRETRAIN, *TRAIN, "init=x.pth", "resume=false")  # which moves nothing
    refuse(1, message, PRETRAIN, *TRAIN, "init=x.pth", "hydra.run.dir=elsewhere")
    assert not list(tmp_path.rglob("sprung"))


LAST, PREVIOUS = (f"{RUN}/simclr_resnet18_{name}.pt" for name in ("last", "previous"))
BAD_STATES = {
    "another config": (
        lambda: None,
        2,
        "temperature=0.2 (was 0.5): must be as in",
        ["temperature=0.2"],
    ),
    "another dataset": (
        lambda: None,
        2,
        "dataset=digits (was folder)",
        ["dataset=digits", f"hydra.run.dir={RUN}"],
    ),
    "another backbone": (
        lambda: None,
        2,
        "backbone=resnet34 (was resnet18)",
        ["backbone=resnet34", f"hydra.run.dir={RUN}"],
    ),
    "both damaged": (
        lambda: [Path(path).write_bytes(b"x") for path in (LAST, PREVIOUS)],
        1,
        "can't be continued",
        [],
    ),
    "both missing": (
        lambda: [Path(path).unlink() for path in (LAST, PREVIOUS)],
        1,
        "last.pt is missing): start",
        [],
    ),
    "malicious": (
        lambda: [Path(path).write_bytes(to_bytes({"model": Trap()})) for path in (LAST, PREVIOUS)],
        1,
        "is no checkpoint: it is not the plain",
        [],
    ),
}


@pytest.mark.parametrize("case", BAD_STATES)
def test_bad_states_are_refused_with_the_ways_on(refuse, trained, tmp_path, case):
    spoil, code, message, overrides = BAD_STATES[case]
    spoil()
    refuse(code, message, PRETRAIN, *TRAIN, *overrides)
    refuse(code, "resume=false", PRETRAIN, *TRAIN, *overrides)
    refuse(code, "hydra.run.dir=PATH", PRETRAIN, *TRAIN, *overrides)
    assert not list(tmp_path.rglob("sprung"))


def test_there_are_sixty_cases_and_more():
    files = BAD_DATA, BAD_DOWNLOADS, BAD_CHECKPOINTS, BAD_INITS, BAD_STATES
    assert len(BAD) + sum(map(len, files)) > 120
