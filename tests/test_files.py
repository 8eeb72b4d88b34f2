"""Writing a file whole or not at all, the lock of a directory, and what is moved aside."""

import errno
import fcntl
import logging
import os
import resource
import signal
import subprocess
import sys
from contextlib import contextmanager

import pytest
from conftest import REPOSITORY
from filelock import FileLock

from system.errors import UserError
from system.files import locked, move_aside, write_file


@contextmanager
def file_size_limit(size):
    """As on a full disk: no file can grow beyond `size` bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_file_is_replaced_and_the_one_before_it_kept(tmp_path):
    path, previous = tmp_path / "a", tmp_path / "b"
    for content in (b"1", b"2", b"3"):
        write_file(path, content, previous)
    assert (path.read_bytes(), previous.read_bytes()) == (b"3", b"2")
    write_file(path, b"4")
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == {"a": b"4", "b": b"2"}


def test_the_content_is_on_disk_before_the_name_and_the_folder_after_it(tmp_path, monkeypatch):
    done = []
    fsync, replace = os.fsync, os.replace

    def record_fsync(descriptor):
        target = os.readlink(f"/proc/self/fd/{descriptor}")
        done.append(("fsync", os.path.basename(target), os.path.exists(tmp_path / "a")))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", record_fsync)
    monkeypatch.setattr(os, "replace", lambda *names: done.append("replace") or replace(*names))
    write_file(tmp_path / "a", b"1")
    assert done == [("fsync", "a.tmp", False), "replace", ("fsync", tmp_path.name, True)]


def test_on_a_full_disk_the_old_file_stays_and_the_space_is_named(tmp_path):
    path, previous = tmp_path / "a", tmp_path / "b"
    write_file(path, b"1", previous)
    with file_size_limit(1000), pytest.raises(UserError) as error:
        write_file(path, bytes(2_000_000), previous)
    for part in (str(path), "File too large", "takes 2.0 MB", "are free there", "free up space"):
        assert part in str(error.value)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == {"a": b"1"}


def test_a_folder_that_is_gone_is_an_error_that_names_the_file(tmp_path):
    with pytest.raises(UserError, match=r"gone/a could not be written \(No such file"):
        write_file(tmp_path / "gone" / "a", b"1")


def test_a_lock_that_cannot_be_written_is_an_error_that_names_the_file(tmp_path):
    (tmp_path / "file").write_text("no directory")
    (tmp_path / ".simclr.lock").mkdir()
    for run_dir, reason in ((tmp_path / "file", "exists|Not a dir"), (tmp_path, "Is a directory")):
        message = rf"{run_dir}/\.simclr\.lock cannot be written \(.*({reason}).*hydra\.run\.dir"
        with pytest.raises(UserError, match=message), locked(run_dir, "simclr"):
            pass


def failing_flock(monkeypatch, number):
    """Let the system call that filelock makes fail with this error number."""

    def flock(descriptor, operation):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", flock)


def failing_acquire(monkeypatch, error):
    """Let filelock itself fail, as it does where the system call is not there at all."""

    def acquire(self, **arguments):
        raise error

    monkeypatch.setattr(FileLock, "acquire", acquire)


NO_LOCKS = {
    "ENOLCK": (failing_flock, errno.ENOLCK),
    "ENOSYS": (failing_flock, errno.ENOSYS),
    "EOPNOTSUPP": (failing_flock, errno.EOPNOTSUPP),
    "NotImplementedError": (failing_acquire, NotImplementedError("no flock here")),
}


@pytest.mark.parametrize("case", NO_LOCKS)
def test_on_a_file_system_without_locks_there_is_one_warning_and_the_block_runs(
    tmp_path, monkeypatch, caplog, case
):
    fail, reason = NO_LOCKS[case]
    fail(monkeypatch, reason)
    for repetition in (1, 2):  # a file that the first one leaves does not lock the second one out
        with locked(tmp_path, "simclr"):
            (tmp_path / f"ran{repetition}").write_text("")
        assert (tmp_path / f"ran{repetition}").exists()
        [record] = caplog.records
        assert record.levelname == "WARNING" and record.getMessage() == (
            f"warning: {tmp_path} is on a file system without locks: start one simclr.py"
        )
        caplog.clear()


def test_a_lock_that_fails_for_another_reason_is_refused(tmp_path, monkeypatch, caplog):
    failing_flock(monkeypatch, errno.EIO)
    with (
        pytest.raises(UserError, match=r"\.simclr\.lock cannot be written \(Input/output error"),
        locked(tmp_path, "simclr"),
    ):
        pass
    assert not caplog.records


def test_an_error_within_the_block_is_not_taken_for_one_of_the_lock(tmp_path, caplog):
    for error in (OSError(errno.ENOLCK, "no locks"), NotImplementedError("in the block")):
        with pytest.raises(type(error), match=str(error.args[-1])), locked(tmp_path, "simclr"):
            raise error
    assert not caplog.records
    with locked(tmp_path, "simclr"):  # and the lock was released
        pass


HOLD = """
import sys, time
from pathlib import Path
from system.files import locked
with locked(Path(sys.argv[1]), "simclr"):
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_folder_is_one_process_s_until_that_ends_however_it_ends(tmp_path):
    command = [sys.executable, "-c", HOLD, str(tmp_path)]
    holder = subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout.readline() == "held\n"
        with (
            pytest.raises(UserError, match=r"in use by another simclr\.py: .*hydra\.run\.dir"),
            locked(tmp_path, "simclr"),
        ):
            pass
        with locked(tmp_path, "simclr", needed=False):  # one rank locks for all
            pass
        with locked(tmp_path, "simclr_lin"):  # an evaluation beside a training is no conflict
            pass
    finally:
        holder.send_signal(signal.SIGKILL)
        holder.wait()
        holder.stdout.close()
    for _ in range(2):
        with locked(tmp_path, "simclr"):
            pass


def test_files_of_a_run_are_moved_and_no_others(tmp_path):
    ours = ["simclr_resnet18_epoch3.pt", "simclr_resnet18_last.pt", "config.yaml", "results.json",
            "metrics.jsonl", "events.out.tfevents.1.x.2", "results_labels0.1.md", "curves.png",
            "simclr.log", "failure.json", "predictions.csv"]  # fmt: skip
    for name in [*ours, "notes.txt", ".simclr.lock"]:
        (tmp_path / name).write_text(name)
    assert move_aside(tmp_path) == tmp_path / "old-1"
    assert {path.name for path in (tmp_path / "old-1").iterdir()} == set(ours)
    assert {path.name for path in tmp_path.iterdir()} == {"old-1", "notes.txt", ".simclr.lock"}
    assert move_aside(tmp_path) is None
    (tmp_path / "config.yaml").write_text("new")
    assert move_aside(tmp_path) == tmp_path / "old-2"
    assert (tmp_path / "old-1" / "config.yaml").read_text() == "config.yaml"


def test_an_open_log_is_moved_with_the_old_run_and_the_new_run_has_its_own(tmp_path, monkeypatch):
    """A message may have opened it before the old files are moved."""
    log = logging.FileHandler(tmp_path / "simclr.log", delay=True)
    monkeypatch.setattr(logging.getLogger(), "handlers", [log])
    logging.getLogger().warning("before")
    move_aside(tmp_path)
    logging.getLogger().warning("after")
    log.close()
    assert (tmp_path / "old-1" / "simclr.log").read_text() == "before\n"
    assert (tmp_path / "simclr.log").read_text() == "after\n"
