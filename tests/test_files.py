"""Writing a file whole or not at all, the lock of a directory, and whose files those there are."""

import errno
import fcntl
import json
import os
from pathlib import Path

import pytest

from system.errors import UserError
from system.files import locked, move_aside, read_config, read_metrics, write_file


def test_the_content_is_on_disk_before_the_name(tmp_path, monkeypatch):
    done = []
    fsync, replace = os.fsync, os.replace

    def record_fsync(descriptor):
        target = os.readlink(f"/proc/self/fd/{descriptor}")
        done.append(("fsync", os.path.basename(target), (tmp_path / "a").exists()))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", record_fsync)
    monkeypatch.setattr(os, "replace", lambda *names: done.append("replace") or replace(*names))
    write_file(tmp_path / "a", b"1")
    assert done == [("fsync", "a.tmp", False), "replace"]
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {"a": b"1"}


@pytest.mark.parametrize("crash", [True, False])
def test_what_comes_between_write_and_rename_leaves_the_old_file(tmp_path, monkeypatch, crash):
    """A crash, which nothing catches, or a disk that is full, which is one line."""
    write_file(tmp_path / "a", b"1")

    def fail(descriptor):
        raise KeyboardInterrupt if crash else OSError(28, "No space left on device")

    with monkeypatch.context() as patch, pytest.raises((KeyboardInterrupt, UserError)) as error:
        patch.setattr(os, "fsync", fail)
        write_file(tmp_path / "a", bytes(2_000_000))
    assert (tmp_path / "a").read_bytes() == b"1"
    if not crash:
        assert not list(tmp_path.glob("*.tmp"))
        reason = "a could not be written (No space left on device)"
        assert reason in str(error.value)
    write_file(tmp_path / "a", b"3")
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {"a": b"3"}


def fail_with(error):
    def fail(*args, **options):
        raise error

    return fail


def test_a_lock_that_is_held_or_cannot_be_is_refused(tmp_path, monkeypatch):
    """Within the block nothing is caught, and after it the lock is free again."""
    for _ in range(2):
        with pytest.raises(OSError, match="of the block"), locked(tmp_path, "simclr"):
            in_use = r"in use by another simclr\.py: wait, or choose another run dir"
            with pytest.raises(UserError, match=in_use), locked(tmp_path, "simclr"):
                pass
            with locked(tmp_path, "simclr_lin"):  # an evaluation beside a training is no conflict
                raise OSError(errno.ENOLCK, "of the block")
    (tmp_path / "file").write_text("no directory")
    message = r"file cannot be locked \(.*(exists|Not a dir).*: choose another"
    with pytest.raises(UserError, match=message), locked(tmp_path / "file", "simclr"):
        pass
    monkeypatch.setattr(fcntl, "flock", fail_with(OSError(errno.EIO, "Input/output error")))
    with pytest.raises(UserError, match=r"\(Input/output error\)"), locked(tmp_path, "simclr"):
        pass


OURS = {"backbone": "resnet18", "projection_dim": 8, "hidden_dim": 16, "cifar_stem": True,
        "image_size": 8, "temperature": 0.5}  # fmt: skip


@pytest.mark.parametrize(
    "content",
    ["", "3", "[1, 2]", "hello", "a: 1", "a: 1\na: 2", "a: ${b", "a: !!int x", "a: &a [*a]",
     "a: 1\n---\nb: 2", "!!python/object/apply:os.mkdir [sprung]", "[" * 500, b"\xff\xfe\0"],
)  # fmt: skip
def test_a_config_of_another_program_or_a_damaged_one_is_refused(tmp_path, monkeypatch, content):
    monkeypatch.chdir(tmp_path)
    Path("config.yaml").write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError, match=r"^config\.yaml (is|cannot be read)") as error:
        read_config(Path())
    assert "\n" not in str(error.value) and not Path("sprung").exists()


def test_metrics_are_read_but_for_half_a_line_and_refused_if_damaged(tmp_path):
    assert read_metrics(tmp_path) == []
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"epoch": 1}\n{"epoch": 2}\n{"ep')
    assert read_metrics(tmp_path) == [{"epoch": 1}, {"epoch": 2}]
    for line in ("{]", '["epoch"]', "1", '{"a": 1}'):
        path.write_text(f'{{"epoch": 1}}\n{line}\n')
        with pytest.raises(UserError, match=r"metrics\.jsonl, line 2 is damaged or of another"):
            read_metrics(tmp_path)


RESULTS = json.dumps({"sha256": "", "protocols": []})
RUN = {  # what a run, its evaluation and its pictures write
    "config.yaml": json.dumps(OURS), "metrics.jsonl": "",
    "simclr_resnet18_epoch3.pt": "", "simclr_wide_resnet50_2_last.pt": "", "curves.svg": "",
    "events.out.tfevents.1.host.2.3.simclr": "", "results.json": RESULTS,
    "results_labels0.1.json": RESULTS, "neighbours.png": "",
}  # fmt: skip
FOREIGN = {
    "figure.png": "", "thesis.svg": "", "notes.log": "", "views.py": "", "curves.csv": "",
    "results_old.md": "", "results2.json": "[]", "results2.md": "", "model.pt": "",
    "events.out.tfevents.1.host": "", "simclr_notes.pt": "", "simclr_resnet18_epoch3.pt.bak": "",
}  # fmt: skip


def write_all(directory: Path, contents: dict[str, str]) -> None:
    for name, content in contents.items():
        (directory / name).write_text(content)


def names(directory: Path) -> set[str]:
    return {path.name for path in directory.iterdir() if path.name[0] != "."}


def test_files_of_a_run_are_moved_and_no_others(tmp_path):
    write_all(tmp_path, {**RUN, **FOREIGN})
    move_aside(tmp_path)
    assert names(tmp_path / "old-1") == set(RUN) and names(tmp_path) == {"old-1", *FOREIGN}
    move_aside(tmp_path)
    assert names(tmp_path) == {"old-1", *FOREIGN}
    write_all(tmp_path, {"config.yaml": "new", "results.md": "mine"})
    move_aside(tmp_path)
    assert names(tmp_path / "old-2") == {"config.yaml"}
    assert (tmp_path / "old-1" / "config.yaml").read_text() == RUN["config.yaml"]


@pytest.fixture
def train(thin, toy, call, tmp_path):
    """train(overrides): the command in the directory `work`, which is also the run directory."""
    (tmp_path / "work").mkdir()
    data = ["dataset=folder", f"data_dir={tmp_path}/images", "image_size=8", "batch_size=8"]
    small = ["device=cpu", "epochs=1", "projection_dim=8", "hidden_dim=16", "hydra.run.dir=."]

    def train(*overrides):
        os.chdir(tmp_path / "work")
        return call("simclr.py", *data, *small, *overrides)

    return train


@pytest.mark.parametrize("resume", ["true", "false"])
def test_files_of_others_are_neither_moved_nor_replaced(train, tmp_path, resume):
    """A run in a directory of something else, and a second one that starts over there."""
    work = tmp_path / "work"
    others = "results.json", "results.md", "curves.png"
    mine = {name: f"{name} of mine" for name in (*FOREIGN, *others)}
    write_all(work, mine)
    code, error = train(f"resume={resume}")
    assert code == 0, error
    assert {name: (work / name).read_text() for name in mine} == mine
    assert not list(work.glob("old-*"))
    del mine["curves.png"]  # beside a run it is taken for a picture of plot.py
    code, error = train("resume=false")
    assert code == 0, error
    assert {name: (work / name).read_text() for name in mine} == mine
    assert "simclr_resnet18_epoch1.pt" in names(work / "old-1")


@pytest.mark.parametrize("resume", ["true", "false"])
@pytest.mark.parametrize("name", ["config.yaml", "metrics.jsonl"])
def test_where_a_run_would_replace_a_file_of_others_it_is_refused(train, tmp_path, resume, name):
    write_all(tmp_path / "work", {name: "name: mine", "figure.png": "mine", "results.md": "mine"})
    code, error = train(f"resume={resume}")
    assert code == 1 and error.startswith(f"error: {name} is not of") and error.count("\n") == 1
    assert "choose another run directory with hydra.run.dir=PATH" in error
    assert names(tmp_path / "work") == {name, "figure.png", "results.md"}
    assert (tmp_path / "work" / name).read_text() == "name: mine"
