"""Checkpoints: found, refused, never executed."""

import hashlib
import io
import json
import pickle
import shutil
import struct
import zipfile
from collections import Counter, OrderedDict

import pytest
import torch

from models import SimCLR
from system.checkpoint import (
    ADDED,
    ARCHITECTURE,
    Damaged,
    checkpoint_name,
    find_checkpoint,
    load_checkpoint,
    save_checkpoint,
    to_bytes,
)
from system.errors import UserError

CONFIG = {"seed": 1, **ADDED, **dict.fromkeys(ARCHITECTURE, 8)}


@pytest.fixture
def saved(tmp_path):
    """A folder with checkpoints of epochs 9, 10 and, of another backbone, 11."""
    weights = torch.nn.Linear(2, 2).state_dict()
    for backbone, epoch in (("resnet18", 9), ("resnet18", 10), ("resnet34", 11)):
        save_checkpoint(tmp_path / checkpoint_name(backbone, epoch), weights, CONFIG, epoch)
    return tmp_path


def test_what_is_saved_is_loaded(saved):
    content = load_checkpoint(saved / "simclr_resnet18_epoch9.pt")
    assert content["epoch"] == 9 and content["config"] == CONFIG
    assert set(content["model"]) == {"weight", "bias"}
    assert not list(saved.glob("*.tmp"))


def test_the_newest_epoch_is_the_largest_number(saved):
    assert find_checkpoint(saved, "resnet18", None).name == "simclr_resnet18_epoch10.pt"
    assert find_checkpoint(saved, "resnet18", 9).name == "simclr_resnet18_epoch9.pt"


def test_backbones_whose_names_contain_each_other_are_told_apart(tmp_path):
    names = ("resnet50", "wide_resnet50_2", "resnext50_32x4d", "resnext101_32x8d")
    for epoch, backbone in enumerate(names, start=1):
        save_checkpoint(tmp_path / checkpoint_name(backbone, epoch), {}, CONFIG, epoch)
    for epoch, backbone in enumerate(names, start=1):
        path = tmp_path / f"simclr_{backbone}_epoch{epoch}.pt"
        assert find_checkpoint(tmp_path, backbone, None) == path


@pytest.mark.parametrize(("backbone", "epoch"), [("resnet18", 7), ("resnet50", None)])
def test_a_missing_checkpoint_is_an_error_that_lists_those_there_are(saved, backbone, epoch):
    with pytest.raises(UserError) as error:
        find_checkpoint(saved, backbone, epoch)
    for path in saved.glob("*.pt"):
        assert path.name in str(error.value)
    assert backbone in str(error.value) and "checkpoint=PATH" in str(error.value)
    with pytest.raises(UserError, match=r"no checkpoint .*nosuch\.pt.*epoch9\.pt"):
        load_checkpoint(saved / "nosuch.pt")
    with pytest.raises(UserError, match=r"there is no directory .*nowhere"):
        find_checkpoint(saved / "nowhere", backbone, epoch)


def test_a_run_directory_stands_for_its_newest_checkpoint(
    thin, trained, call, write_images, tmp_path
):
    """Or the line says what is there: other backbones, a training state, the runs of a sweep."""
    write_images(tmp_path / "images", train=8, test=3)
    (tmp_path / "a run [1]").mkdir()
    for epoch in (2, 9, 10):
        name = f"simclr_resnet18_epoch{epoch}.pt"
        shutil.copy(trained / "simclr_resnet18_epoch2.pt", tmp_path / "a run [1]" / name)
    data = ["dataset=folder", "data_dir=images", "device=cpu", "batch_size=8"]
    lin = ["simclr_lin.py", *data, "protocols=[knn]", "hydra.run.dir=out"]
    init = ["simclr.py", *data, "image_size=8", "epochs=1", "resume=false", "hydra.run.dir=new"]

    def evaluated(*overrides):
        code, error = call(*lin, *overrides)
        assert code == 0, error
        return json.loads((tmp_path / "out" / "results.json").read_text())["checkpoint"]

    newest = "a run [1]/simclr_resnet18_epoch10.pt"
    assert evaluated("checkpoint='a run [1]'") == newest
    code, error = call(*init, "init='a run [1]'")
    assert code == 0, error
    assert f"init: the encoder starts from {newest}" in (tmp_path / "new/simclr.log").read_text()
    (tmp_path / "a run [1]" / "simclr_resnet34_epoch11.pt").write_bytes(b"")
    assert evaluated("checkpoint='a run [1]'", "backbone=resnet18") == newest
    (tmp_path / "state").mkdir()
    (tmp_path / "state" / "simclr_resnet18_last.pt").write_bytes(b"")
    (tmp_path / "empty").mkdir()
    for directory, *said in (
        (
            "a run [1]",
            "more than one backbone has a checkpoint in a run [1]: found ",
            "resnet34_ep",
        ),
        ("state", "no checkpoint in state: found simclr_resnet18_last.pt, the training state of a"),
        ("empty", "no checkpoint in empty: empty has no .pt file"),
        (
            ".",
            "found a run [1]/simclr_resnet18_epoch10.pt, ",
            "state/simclr_resnet18_last.pt; name",
        ),
    ):
        for command, key in ((lin, "checkpoint"), (init, "init")):
            code, error = call(*command, f"{key}='{directory}'")
            assert code == 1 and error.startswith("error: ") and error.count("\n") == 1, error
            assert all(part in error for part in said) and f"name one with {key}=PATH" in error
    code, error = call(*lin, "checkpoint=state", "backbone=resnet34")
    assert code == 1 and "no checkpoint of resnet34 in state: found simclr_resnet18_last" in error


class Trap:
    """Unpickled, it would create the file `path`."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def test_nothing_in_a_checkpoint_is_executed(tmp_path):
    trap = Trap(tmp_path / "sprung")
    torch.save({"model": {}, "config": {}, "epoch": 1, "extra": trap}, tmp_path / "zip.pt")
    (tmp_path / "plain.pt").write_bytes(pickle.dumps(trap))
    for name, reason in (("zip.pt", "it is not the plain data"), ("plain.pt", "not a zip file")):
        with pytest.raises(UserError, match=rf"{name} is .*no checkpoint.*{reason}") as error:
            load_checkpoint(tmp_path / name)
        assert "trust" not in str(error.value)  # torch's own advice is to execute it
    assert not (tmp_path / "sprung").exists()


def test_damaged_and_foreign_files_are_refused(saved, tmp_path):
    whole = (saved / "simclr_resnet18_epoch9.pt").read_bytes()
    for name, content in {"empty": b"", "cut": whole[: len(whole) // 2], "text": b"hello"}.items():
        (tmp_path / f"{name}.pt").write_bytes(content)
        with pytest.raises(UserError, match=f"{name}.pt is damaged or no checkpoint"):
            load_checkpoint(tmp_path / f"{name}.pt")
    foreign = {"weights": SimCLR(projection_dim=2, hidden_dim=2).state_dict(), "list": [1]}
    for name, content in foreign.items():
        torch.save(content, tmp_path / f"{name}.pt")
        with pytest.raises(UserError, match=r"not written by simclr\.py: it has no model"):
            load_checkpoint(tmp_path / f"{name}.pt")
    with pytest.raises(UserError, match="no checkpoint"):
        load_checkpoint(tmp_path)


def with_old_comment(content):
    """`content` as `to_bytes` of earlier versions wrote it: a SHA-256 as the zip's comment."""
    archive = io.BytesIO()
    torch.save(content, archive)
    archive.seek(-2, io.SEEK_END)
    archive.write((64).to_bytes(2, "little"))  # the length of the comment
    archive.write(hashlib.sha256(archive.getbuffer()).hexdigest().encode())
    return archive.getvalue()


CONTENT = {"model": {"w": torch.arange(4.0)}, "config": CONFIG, "epoch": 1}


def test_a_checkpoint_with_a_sha256_as_comment_still_loads(tmp_path):
    path, old = tmp_path / "old.pt", with_old_comment(CONTENT)
    path.write_bytes(old)
    with zipfile.ZipFile(path) as archive:
        assert len(archive.comment) == 64
    saved = load_checkpoint(path)
    assert torch.equal(saved.pop("model")["w"], torch.arange(4.0))
    assert saved == {"config": CONFIG, "epoch": 1}
    place = old.index(torch.arange(4.0).numpy().tobytes())
    path.write_bytes(old[:place] + b"\1" + old[place + 1 :])  # its tensor is damaged
    with pytest.raises(Damaged, match=r"wrong CRC of .*data/0"):
        load_checkpoint(path)


def entry_bytes(archive):
    """The positions of the bytes of all entries of a zip archive, without its headers."""
    with zipfile.ZipFile(io.BytesIO(archive)) as reader:
        for entry in reader.infolist():
            lengths = archive[entry.header_offset + 26 : entry.header_offset + 30]
            start = entry.header_offset + 30 + sum(struct.unpack("<HH", lengths))
            yield from range(start, start + entry.compress_size)


def test_a_changed_byte_is_noticed_where_content_is_and_changes_nothing_elsewhere(tmp_path):
    """The CRCs leave out the headers and the directory of the zip archive."""
    whole, path, seen = to_bytes(CONTENT), tmp_path / "x.pt", Counter()
    inside = set(entry_bytes(whole))
    assert len(inside) > 16
    for i in range(len(whole)):
        for mask in (1, 16, 255):
            path.write_bytes(whole[:i] + bytes([whole[i] ^ mask]) + whole[i + 1 :])
            try:
                saved = load_checkpoint(path)
            except Damaged:
                seen[i in inside, "noticed"] += 1
            else:
                seen[i in inside, "unnoticed"] += 1
                assert torch.equal(saved.pop("model")["w"], torch.arange(4.0))
                assert saved == {"config": CONFIG, "epoch": 1}
    assert seen[True, "noticed"] == 3 * len(inside) and seen[True, "unnoticed"] == 0
    assert seen[False, "noticed"] > 1000  # names, offsets, sizes, CRCs


def test_what_torch_save_alone_wrote_loads_too(tmp_path):
    torch.save(CONTENT, tmp_path / "x.pt")
    assert load_checkpoint(tmp_path / "x.pt")["epoch"] == 1


class Odd:
    """A pickle of plain names that no reader can make sense of."""

    def __reduce__(self):
        return OrderedDict, (1, 2)


def test_a_machine_with_too_little_memory_is_not_taken_for_a_damaged_file(saved, monkeypatch):
    for error in (MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory: 9 GB")):

        def load(*args, error=error, **options):
            raise error

        monkeypatch.setattr(torch, "load", load)
        with pytest.raises(type(error)):
            load_checkpoint(saved / "simclr_resnet18_epoch9.pt")


def test_whatever_the_readers_raise_the_file_is_named(tmp_path):
    (tmp_path / "odd.pt").write_bytes(to_bytes({"model": Odd()}))
    with pytest.raises(Damaged, match=r"odd\.pt is damaged or no checkpoint"):
        load_checkpoint(tmp_path / "odd.pt")
