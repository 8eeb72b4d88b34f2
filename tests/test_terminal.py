"""system/errors.py: errors in a line, signals, and a terminal that is closed, gone or full."""

import logging
import os
import signal
import subprocess
import sys
import threading
from contextlib import suppress

import pytest
import torch
from conftest import REPOSITORY
from hydra.errors import HydraException

from config import ConfigError
from system import errors
from system.errors import STOP, Stopped, StopSignals, UserError, describe, error_boundary

TRAIN = ["dataset=digits", "image_size=8", "batch_size=256", "hidden_dim=8", "projection_dim=8",
         "knn_interval=0", "epochs=1", "device=cpu", "compile=false"]  # fmt: skip


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
    """terminal(name): sys.stdout and sys.stderr are that file of BROKEN, until the test ends."""
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


def flush_at_exit():
    """As Python does at exit, whose code would be 120."""
    for stream in filter(None, (sys.stdout, sys.stderr)):
        stream.flush()


@pytest.mark.parametrize("name", BROKEN)
def test_what_cannot_be_written_ends_nothing_and_changes_no_exit_code(terminal, monkeypatch, name):
    terminal(name)
    monkeypatch.setattr(logging, "raiseExceptions", False)  # as run_command does
    with error_boundary(), errors.progress_bar(total=2) as bar:
        log = logging.Logger("a run")
        log.addHandler(logging.StreamHandler(sys.stdout))
        log.info("a line")
        bar.set_postfix(loss=1.0)
        bar.update(2)
    flush_at_exit()
    with pytest.raises(SystemExit, match="1"), error_boundary():
        raise UserError("a line")
    flush_at_exit()


@pytest.mark.parametrize(
    "shell", ['("$@" 2>&1; echo $? >code) | head -c 1', '"$@" >/dev/full 2>&-; echo $? >code']
)
def test_the_exit_code_is_that_of_the_run_whatever_becomes_of_its_output(tmp_path, shell):
    command = [sys.executable, str(REPOSITORY / "tests" / "thin_simclr.py"), *TRAIN]
    environment = {name: os.environ[name] for name in os.environ if name != "PYTHONUNBUFFERED"}
    environment["PYTHONPATH"] = str(REPOSITORY)
    subprocess.run(["sh", "-c", shell, "sh", *command], cwd=tmp_path, env=environment, timeout=120)
    assert (tmp_path / "code").read_text() == "0\n"
    assert (tmp_path / "logs/SimCLR/digits/resnet18/simclr_resnet18_epoch1.pt").is_file()


def test_memory_that_ran_out_while_a_graph_was_recorded_is_told():
    """torch.cuda.graph then raises another error, over it."""
    error = RuntimeError("CUDA error: operation failed due to a previous error during capture")
    error.__context__ = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB")
    assert describe(error)[0].startswith("out of memory")
    assert describe(RuntimeError("a bug")) is None


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (UserError("a file\n is missing"), 1, "error: a file is missing"),
        (ConfigError("a=1: must be 2"), 2, "error: a=1: must be 2"),
        (FileNotFoundError(2, "No such file", "x.png"), 1, "error: x.png: No such file"),
        (OSError("an error of a library"), 1, "error: system: an error of a library"),
        (MemoryError(), 1, "error: out of memory (of the host): less is taken by activation_check"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried"), 1, "error: out of memory (CUDA out"),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"), 1,
         "or a smaller batch_size"),
        (RuntimeError("CUDNN_STATUS_ALLOC_FAILED"), 1, "a micro_batch_size, or a smaller"),
        (HydraException("what Hydra\n  says"), 2, "error: what Hydra says"),
        (KeyboardInterrupt(), 130, "stopped by SIGINT"),
        (Stopped(signal.SIGTERM, " in epoch 2"), 143, "stopped by SIGTERM in epoch 2"),
    ],
)  # fmt: skip
def test_an_error_of_the_user_is_one_line_with_its_exit_code(capsys, error, code, line):
    with pytest.raises((SystemExit, KeyboardInterrupt)) as end, error_boundary():
        raise error
    said = capsys.readouterr().err
    assert end.value.code == code and said.count("\n") == 1
    assert said.startswith(line) or (line in said and said.startswith("error: out of memory ("))


@pytest.mark.parametrize(
    "bug", [ZeroDivisionError("x"), ValueError("x"), RuntimeError("CUDA error: device-side assert")]
)
def test_a_bug_keeps_its_traceback_and_an_exit_its_code(capsys, bug):
    with pytest.raises(type(bug)), error_boundary():
        raise bug
    with pytest.raises(SystemExit) as end, error_boundary():
        sys.exit(7)
    assert end.value.code == 7 and capsys.readouterr().err == ""


@pytest.fixture
def handlers():
    """handlers(value): each signal of STOP has this handler, until the test ends."""
    numbers = [getattr(signal, name) for name in STOP]
    before = [signal.getsignal(number) for number in numbers]
    yield lambda value: [signal.signal(number, value) for number in numbers]
    for number, handler in zip(numbers, before, strict=True):
        signal.signal(number, handler)


def test_signals_set_a_flag_and_what_is_ignored_stays_ignored(handlers):
    outside = []
    handlers(outside.append)
    for name in STOP:
        with StopSignals() as stop:
            assert stop.received is None
            os.kill(os.getpid(), number := getattr(signal, name))
            os.kill(os.getpid(), number)  # at once: torchrun and terminal both send it
            assert stop.received == number and not outside
        assert signal.getsignal(number) == outside.append
    handlers(signal.SIG_IGN)
    with StopSignals() as stop:
        for name in STOP:
            os.kill(os.getpid(), getattr(signal, name))
        assert stop.received is None


def test_without_a_handler_a_signal_ends_the_run_by_its_name(handlers):
    handlers(signal.SIG_DFL)
    for name in STOP:
        with pytest.raises(Stopped, match=f"stopped by {name} in epoch 1"), StopSignals() as stop:
            stop.act(getattr(signal, name), " in epoch 1")


def test_which_signals_end_at_once_when_they_come_again(handlers, monkeypatch):
    """SIGXCPU comes every second once the time is up."""
    monkeypatch.setattr(errors, "SAME", 0)
    outside = []
    handlers(lambda number, frame: outside.append(signal.Signals(number).name))
    for name in STOP:
        with StopSignals() as stop:
            os.kill(os.getpid(), signal.SIGUSR1)
            os.kill(os.getpid(), getattr(signal, name))
            assert name not in outside and stop.received == signal.SIGUSR1
            os.kill(os.getpid(), getattr(signal, name))
    assert outside == ["SIGTERM", "SIGINT", "SIGQUIT"]


def test_somebody_else_s_handler_decides_and_training_goes_on_if_it_returns(handlers):
    called = []
    handlers(lambda number, frame: called.append((number, frame is not None)))
    with StopSignals() as stop:
        os.kill(os.getpid(), signal.SIGUSR2)
        assert stop.received == signal.SIGUSR2 and not called  # not before the state is saved
        stop.act(signal.SIGUSR2, "")
        assert stop.received is None and called == [(signal.SIGUSR2, True)]
        os.kill(os.getpid(), signal.SIGUSR2)
        assert stop.received == signal.SIGUSR2 and len(called) == 1
    handlers(lambda number, frame: sys.exit(3))  # as submitit's
    with StopSignals() as stop, pytest.raises(SystemExit, match="3"):
        stop.act(signal.SIGUSR2, "")


def test_a_thread_trains_without_handlers():
    """Python lets only the main thread set them."""
    before, inside = signal.getsignal(signal.SIGTERM), []

    def train():
        with StopSignals() as stop:
            inside.append((stop.received, signal.getsignal(signal.SIGTERM)))

    thread = threading.Thread(target=train)
    thread.start()
    thread.join()
    assert inside == [(None, before)]
