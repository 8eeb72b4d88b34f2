"""The terminal ends before the run, is full, closed or not UTF-8: the run is as with any other."""

import io
import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress

import pytest
from conftest import REPOSITORY
from test_bad_input import PRETRAIN, TRAIN
from test_failures import last_state, start, wait_for

from system.terminal import guard_terminal
from training.record import RunRecord

LIN = ["dataset=folder", "data_dir=images", "device=cpu", "finetune_epochs=1", "protocols=[linear]"]


def broken_pipe():
    reader, writer = os.pipe()
    os.close(reader)
    return writer


def closed_session():
    """A terminal whose other end is gone, as after a closed SSH session: EIO."""
    master, terminal = os.openpty()
    os.close(master)
    return terminal


BROKEN = {
    "the reader has ended": broken_pipe,  # | tee log, and Ctrl-C
    "full disk": lambda: os.open("/dev/full", os.O_WRONLY),  # 2>/dev/full
    "closed session": closed_session,
    "only to be read": lambda: os.open(os.devnull, os.O_RDONLY),
    "closed": lambda: None,  # 2>&-
}


@pytest.fixture
def terminal(monkeypatch):
    """terminal(name): sys.stdout and sys.stderr are that file of BROKEN."""
    files = []

    def terminal(name):
        for stream in ("stdout", "stderr"):
            number = BROKEN[name]()
            files.append(number and open(number, "w", buffering=1))  # noqa: SIM115
            monkeypatch.setattr(sys, stream, files[-1])

    yield terminal
    for file in filter(None, files):
        with suppress(OSError):  # of what is left in its buffer
            file.close()


@pytest.fixture
def stop(monkeypatch):
    """stop(k): SIGTERM comes in the k-th step; None: none."""
    log_step = RunRecord.log_step

    def stop(number):
        steps = iter(range(1, 10**6))

        def stopped(*args):
            if next(steps) == number:
                os.kill(os.getpid(), signal.SIGTERM)
                time.sleep(0.1)
            log_step(*args)

        monkeypatch.setattr(RunRecord, "log_step", stopped)

    return stop


@pytest.mark.parametrize("name", BROKEN)
def test_what_cannot_be_written_to_the_terminal_neither_ends_nor_changes_a_run(
    thin, write_images, tmp_path, call, terminal, stop, name
):
    write_images(tmp_path / "images", train=8, test=3)
    run = tmp_path / "logs" / "SimCLR" / "folder" / "resnet18"
    stop(2)
    terminal(name)
    assert call(PRETRAIN, *TRAIN)[0] == 143
    assert last_state(run)["epoch"] == 0 and len(last_state(run)["found"]) == 2
    stop(None)
    for command in (
        (PRETRAIN, *TRAIN),
        ("simclr_lin.py", *LIN),
        ("compare.py", str(run)),
    ):
        assert call(*command)[0] == 0
        sys.stdout.flush()  # as Python does at exit, whose code would be 120
        sys.stderr.flush()
    assert call("compare.py", "nowhere")[0] == 1
    assert call("plot.py", "--help")[0] == 0
    assert call(PRETRAIN, "--cfg", "job")[0] == 0
    assert (run / "simclr_resnet18_epoch1.pt").is_file() and (run / "results.json").is_file()


def test_ctrl_c_that_ends_tee_too_saves_the_run(tmp_path):
    run = tmp_path / "logs" / "SimCLR" / "digits" / "resnet18"
    with subprocess.Popen(["head", "-c", "1"], stdin=subprocess.PIPE) as tee:
        process = start(tmp_path, stdout=tee.stdin, stderr=subprocess.STDOUT)
        wait_for(run / "metrics.jsonl", process)
        assert tee.wait(timeout=60) == 0  # nobody reads any more
    epoch = last_state(run)["epoch"]
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=60) == 130 and last_state(run)["epoch"] > epoch


def test_a_run_without_stdin_stdout_and_stderr_is_a_run(tmp_path):
    """And its files are none of the three, into which libraries write."""
    shell = '"$@" <&- >&- 2>&-', "sh"
    process = start(tmp_path, "epochs=1", before=("sh", "-c", *shell))
    assert process.wait(timeout=120) == 0
    run = tmp_path / "logs" / "SimCLR" / "digits" / "resnet18"
    assert last_state(run)["epoch"] == 1
    code = """
import os, subprocess, sys
from system.terminal import guard_terminal
guard_terminal()
file = open("file", "w+b")
for number in (1, 2):
    os.write(number, b"a library's message")
child = [sys.executable, "-c", "import os; os.write(2, b'from a child')"]
print(file.fileno() > 2, file.read(), subprocess.run(child).returncode, file=open("said", "w"))
print("nowhere", file=sys.stderr)
"""
    command = ["sh", "-c", *shell, sys.executable, "-c", code]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    assert subprocess.run(command, cwd=tmp_path, env=environment).returncode == 0
    assert (tmp_path / "said").read_text() == "True b'' 0\n"


def test_a_pipe_that_does_not_block_gets_everything_and_a_full_disk_is_said(monkeypatch):
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    file = os.fdopen(writer, "w", encoding="utf-8", closefd=False)
    monkeypatch.setattr(sys, "stdout", file)
    monkeypatch.setattr(sys, "stderr", io.TextIOWrapper(io.BytesIO(), "utf-8"))
    guard_terminal()
    guard_terminal()  # of a sweep's jobs too
    assert isinstance(sys.stdout.buffer.stream.buffer, io.BufferedWriter)
    text, found = "a line that is longer than others\n" * 10_000, []

    def read():
        while part := os.read(reader, 65536):
            found.append(part)

    thread = threading.Thread(target=read)
    thread.start()
    print(text, end="")
    os.close(writer)
    thread.join()
    os.close(reader)
    assert b"".join(found).decode() == text
    print("lost")  # to a descriptor that is closed
    print("lost")
    monkeypatch.setattr(sys, "stdout", os.fdopen(broken_pipe(), "w"))
    guard_terminal()
    print("not wanted, as in | head -1")
    said = sys.stderr.buffer.file.getvalue()
    assert said == b"warning: stdout is incomplete (Bad file descriptor)\n"


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_names_that_the_terminal_cannot_show_are_replaced(
    thin, write_images, tmp_path, call, monkeypatch, encoding
):
    """Directory, file and run names, and a name that is not text at all."""
    data, runs = "Bilder-模型", ("Läufe", "模型", os.fsdecode(b"L\xe4ufe"))
    write_images(tmp_path / data, train=8, test=3)
    (tmp_path / data / "train" / "class0").rename(tmp_path / data / "train" / "größe")
    (tmp_path / data / "test" / "class0").rename(tmp_path / data / "test" / "größe")
    for stream, number in (("stdout", 1), ("stderr", 2)):
        file = open(number, "w", encoding=encoding, closefd=False)  # noqa: SIM115
        monkeypatch.setattr(sys, stream, file)
    where = [f"data_dir='{data}'", f"hydra.run.dir='{runs[0]}'"]
    code, error = call(PRETRAIN, *TRAIN, *where)
    assert code == 0 and "images of folder" in call.stdout and "epoch 1: loss" in call.stdout, error
    assert call("simclr_lin.py", *LIN, *where)[0] == 0
    assert "| checkpoint | linear" in call.stdout  # and in the log, in UTF-8
    log = (tmp_path / runs[0] / "simclr_lin.log").read_text(encoding="utf-8")
    assert "| checkpoint | linear" in log and runs[0] in log
    assert call("simclr_lin.py", *LIN, *where, f"predict='{data}/train'")[0] == 0
    assert "their classes are in" in call.stdout
    for other in runs[1:]:
        (tmp_path / other).mkdir()
        for name in ("config.yaml", "metrics.jsonl"):
            (tmp_path / other / name).write_bytes((tmp_path / runs[0] / name).read_bytes())
    assert call("compare.py", *runs)[0] == 0
    table = call.stdout.splitlines()
    assert len(table) == 5 and all(line.startswith("| ") for line in table)
    assert call("plot.py", "--help")[0] == 0 and "RUN RUN" in call.stdout
    (tmp_path / data / "train" / "größe" / "0.png").write_bytes(b"no image")
    code, error = call("simclr_lin.py", *LIN, *where)
    assert code == 1 and error.count("error: ") == 1 and "0.png" in error
    assert "Traceback" not in error


@pytest.mark.parametrize("file", ["images", "nowhere/x.log", "x" * 300, "/dev/full"])
def test_a_log_file_that_cannot_be_written_is_said_once(
    thin, write_images, tmp_path, call, stop, file
):
    write_images(tmp_path / "images", train=8, test=3)
    log = f"hydra.job_logging.handlers.file.filename={file}"
    for command in (
        (PRETRAIN, *TRAIN, log),
        (PRETRAIN, *TRAIN, log, "resume=false"),
        ("simclr_lin.py", *LIN, log),
    ):
        code, error = call(*command)
        assert code == 0 and error.count("is incomplete (") == 1, error
        assert "Traceback" not in error and "1 images" not in error
        assert "images of folder" in call.stdout or "on 24 images" in call.stdout
