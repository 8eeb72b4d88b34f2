"""Checkpoints: found, refused, never executed; files of earlier versions load."""

import pickle
import shutil
from collections import OrderedDict
from pathlib import Path

import pytest
import torch

from models import SimCLR
from system.checkpoint import (
    ARCHITECTURE,
    build_model,
    checkpoint_name,
    find_checkpoint,
    load_checkpoint,
    load_encoder,
    to_bytes,
)
from system.errors import UserError

CONFIG = {"seed": 1, **dict.fromkeys(ARCHITECTURE, 8)}
CONTENT = {"model": {"w": torch.arange(4.0)}, "config": CONFIG, "epoch": 1}
CHECKPOINT = "simclr_resnet18_epoch2.pt"


@pytest.fixture
def saved(tmp_path):
    """A directory with checkpoints of epochs 9, 10 and, of another backbone, 11."""
    for backbone, epoch in (("resnet18", 9), ("resnet18", 10), ("wide_resnet50_2", 11)):
        content = to_bytes({**CONTENT, "epoch": epoch})
        (tmp_path / checkpoint_name(backbone, epoch)).write_bytes(content)
    return tmp_path


def test_what_is_saved_is_loaded(saved):
    content = load_checkpoint(saved / "simclr_resnet18_epoch9.pt")
    assert content["epoch"] == 9 and content["config"] == CONFIG
    assert torch.equal(content["model"]["w"], torch.arange(4.0))


def test_the_newest_epoch_is_the_largest_number_of_the_backbone(saved):
    for backbone, epoch, expected in (
        ("resnet18", None, "simclr_resnet18_epoch10.pt"),
        ("resnet18", 9, "simclr_resnet18_epoch9.pt"),
        ("wide_resnet50_2", None, "simclr_wide_resnet50_2_epoch11.pt"),
        (None, 9, "simclr_resnet18_epoch9.pt"),
    ):
        assert find_checkpoint(saved, backbone, epoch) == saved / expected
    (saved / "simclr_wide_resnet50_2_epoch11.pt").unlink()
    (saved / "simclr_resnet18_last.pt").touch()
    (saved / "simclr_resnet18_epoch010.pt").touch()
    assert find_checkpoint(saved) == saved / "simclr_resnet18_epoch10.pt"


def test_a_missing_checkpoint_is_an_error(saved):
    for backbone, epoch, reason in (
        ("resnet18", 7, "no such checkpoint"),
        ("resnet50", None, "no such checkpoint"),
        (None, None, "checkpoints of several backbones"),
    ):
        with pytest.raises(UserError, match=f"^{reason} in {saved}: simclr.py writes them"):
            find_checkpoint(saved, backbone, epoch)
    assert find_checkpoint(saved / "a file") == saved / "a file"
    with pytest.raises(UserError, match=r"there is no file .*a file"):
        load_checkpoint(saved / "a file")


class Trap:
    """Unpickled, it would create the file `path`."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


class Odd:
    """A pickle of plain names that no reader can make sense of."""

    def __reduce__(self):
        return OrderedDict, (1, 2)


def test_what_is_no_checkpoint_is_refused_in_a_line_and_nothing_is_executed(tmp_path):
    whole, trap = to_bytes(CONTENT), Trap(tmp_path / "sprung")
    # of a tensor, in the archive's directory: torch would return uninitialised memory
    flag = whole.index(b"archive/data/0", whole.index(b"PK\x01\x02")) - 8
    marked = whole[:flag] + b"\x10" + whole[flag + 1 :]
    files = {
        "empty": (b"", "is damaged"),
        "cut": (whole[: len(whole) // 2], "is damaged"),
        "text": (b"hello", "is damaged"),
        "odd": (to_bytes({"model": Odd()}), "is damaged"),
        "pickle": (pickle.dumps(trap), "is damaged"),
        "marked as a directory": (marked, "is damaged"),
        "trap": (to_bytes({**CONTENT, "extra": trap}), "holds more than plain data"),
        "weights": (
            to_bytes(CONTENT["model"]),
            "was not written by this simclr.py: it lacks model",
        ),
        "list": (to_bytes([1]), "was not written by this simclr.py: it lacks model"),
        "other config": (to_bytes({**CONTENT, "config": {}}), "it lacks backbone in its config"),
        "other type": (to_bytes({**CONTENT, "epoch": "1"}), "it lacks epoch"),
    }
    path = tmp_path / "x.pt"
    for name, (content, reason) in files.items():
        path.write_bytes(content)
        with pytest.raises(UserError) as error:
            load_checkpoint(path)
        assert str(error.value).startswith(str(path)) and reason in str(error.value), name
        assert "\n" not in str(error.value) and "trust" not in str(error.value)
    assert not (tmp_path / "sprung").exists()


def test_a_changed_byte_is_refused_or_changes_nothing(tmp_path):
    """CRCs leave out the headers and the directory of the zip archive."""
    path, whole, refused = tmp_path / "x.pt", to_bytes(CONTENT), 0
    for i in range(len(whole)):
        path.write_bytes(whole[:i] + bytes([whole[i] ^ (1, 16, 255)[i % 3]]) + whole[i + 1 :])
        try:
            saved = load_checkpoint(path)
        except UserError:
            refused += 1
            continue
        assert torch.equal(saved["model"]["w"], torch.arange(4.0))
        assert (saved["config"], saved["epoch"]) == (CONFIG, 1)
    assert refused > 500


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("can't allocate memory: 9 GB")])
def test_a_machine_with_too_little_memory_is_not_taken_for_a_damaged_file(
    saved, monkeypatch, error
):
    def load(*args, **options):
        raise error

    monkeypatch.setattr(torch, "load", load)
    with pytest.raises(type(error)):
        load_checkpoint(saved / "simclr_resnet18_epoch9.pt")


def test_a_checkpoint_of_an_earlier_version_loads(thin, trained, tmp_path):
    """Its config lacks keys, and torch.save alone wrote it."""
    old = torch.load(trained / CHECKPOINT, weights_only=True)
    for key in ("init", "blur_probability"):
        del old["config"][key]
    torch.save(old, tmp_path / "old.pt")
    assert load_encoder(tmp_path / "old.pt")[1] == 128


def test_load_encoder_gives_the_encoder_frozen_in_eval_mode(thin, trained):
    enc, feature_dim = load_encoder(trained / CHECKPOINT)
    model = SimCLR()
    model.load_state_dict(torch.load(trained / CHECKPOINT, weights_only=True)["model"])
    x = torch.rand(5, 3, 8, 8)
    assert torch.equal(enc(x), model.eval().enc(x)) and enc(x).shape == (5, feature_dim)
    assert not enc.training and not any(weight.requires_grad for weight in enc.parameters())


def change(path: Path, name: str, value: float) -> None:
    """Change one number of the tensor `name` of a checkpoint."""
    saved = torch.load(path, weights_only=True)
    saved["model"][name].view(-1)[0] = value
    path.write_bytes(to_bytes(saved))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("bn1.bias", torch.nan),
        ("layer2.0.bn1.running_mean", torch.inf),
        ("bn1.running_var", -1.0),  # finite, its root is not
    ],
)
def test_weights_that_are_not_finite_are_refused(thin, trained, tmp_path, name, value):
    path = Path(shutil.copy(trained / CHECKPOINT, tmp_path))
    change(path, f"enc.{name}", value)
    with pytest.raises(UserError, match=f"{path}: {name} has values that are not finite, or neg"):
        load_encoder(path)


def test_weights_that_do_not_fit_the_config_are_refused(thin, trained):
    path = trained / CHECKPOINT
    saved = load_checkpoint(path)
    for other in (
        {"config": {**saved["config"], "cifar_stem": False}},  # other shapes
        {"model": {key: saved["model"][key] for key in saved["model"] if "bn1" not in key}},
        {"model": {**saved["model"], "enc.bn1.bias": 3.0}},  # no tensor
    ):
        with pytest.raises(UserError, match=f"^{path} does not fit") as error:
            build_model({**saved, **other}, path)
        assert "\n" not in str(error.value)
