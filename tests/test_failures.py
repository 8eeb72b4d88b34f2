"""How a run ends that does not end well: signals, full disks."""

import json
import os
import pickle
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
from conftest import REPOSITORY
from test_resume import LAST, STATE, between_steps

import simclr
import training.run
from system.checkpoint import load_checkpoint
from system.errors import Stopped, UserError, describe
from training.run import Run

SMALL = ["projection_dim=8", "hidden_dim=16", "knn_interval=0", "epochs=3"]  # three steps an epoch


@pytest.fixture
def cfg(thin, toy):
    """cfg("epochs=3", …): a config that saves its state after every epoch."""
    return lambda *overrides: toy(*SMALL, "save_minutes=0", *overrides)


@pytest.fixture
def command(thin, toy, call, tmp_path):
    """command(overrides): simclr.py in this process, into the directory `run`; its exit code and
    stderr."""
    data = ["dataset=folder", "data_dir=images", "image_size=8", "batch_size=8", "device=cpu"]
    return lambda *overrides: call("simclr.py", *data, *SMALL, "hydra.run.dir=run", *overrides)


def last_state(folder: Path) -> dict[str, object]:
    return load_checkpoint(folder / LAST, STATE)


@contextmanager
def handler(name, value):
    """The signal has this handler within the block."""
    number = getattr(signal, name)
    before = signal.signal(number, value)
    try:
        yield number
    finally:
        signal.signal(number, before)


@pytest.mark.parametrize(
    "name", ["SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1", "SIGUSR2", "SIGXCPU", "SIGQUIT"]
)
def test_each_signal_ends_the_script_once_the_step_is_saved(command, monkeypatch, name):
    outside = signal.default_int_handler if name == "SIGINT" else signal.SIG_DFL
    with handler(name, outside) as number, monkeypatch.context() as patch:
        between_steps(patch, 4, lambda: os.kill(os.getpid(), number))
        code, error = command()
        assert signal.getsignal(number) is outside
    assert code == 128 + number and error.splitlines()[-1] == (
        f"stopped by {name} after 1 epochs and 2 of 3 steps; the state is saved: the same command "
        "resumes"
    )
    assert last_state(Path("run"))["step"] == 5
    if name == "SIGTERM":
        assert command()[0] == 0 and last_state(Path("run"))["step"] == 9


def test_a_stop_crosses_processes_and_no_except_exception_catches_it():
    """As of Hydra's launchers, which pickle what a job raises."""
    stopped = pickle.loads(pickle.dumps(Stopped(signal.SIGTERM, " in epoch 2")))
    assert describe(stopped) == ("stopped by SIGTERM in epoch 2", 143)
    assert not isinstance(stopped, Exception)


def test_a_process_has_its_directory_for_itself_and_a_signal_ends_it_in_one_line(
    tmp_path, call, request
):
    small = ["hidden_dim=8", "projection_dim=8", "knn_interval=0", "compile=false", "device=cpu"]
    process = subprocess.Popen(
        [sys.executable, str(REPOSITORY / "tests/thin_simclr.py"), "dataset=digits", "image_size=8",
         "batch_size=32", *small], stderr=subprocess.PIPE, text=True, cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
    )  # fmt: skip
    request.addfinalizer(process.kill)
    run = tmp_path / "logs" / "SimCLR" / "digits" / "resnet18"
    while not (run / "config.yaml").exists():
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.1)
    code, error = call("simclr.py", "dataset=digits", "image_size=8", "resume=false", "epochs=1")
    assert code == 1 and error.startswith("error: logs/SimCLR/digits/resnet18 is in use by"), error
    process.send_signal(signal.SIGTERM)
    lines = process.communicate(timeout=60)[1].splitlines()
    assert process.returncode == 143 and lines[-1].startswith("stopped by SIGTERM after ")
    assert "Traceback" not in "".join(lines) and last_state(run)["step"] >= 1


def test_ranks_wait_for_the_reading_of_init_and_the_last_state(cfg, tmp_path, monkeypatch):
    done, write = [], training.run.write_file
    monkeypatch.setattr(training.run, "move_aside", lambda run_dir: done.append("moved"))
    monkeypatch.setattr(training.run, "write_file", lambda *a: write(*a) or done.append(a[0].name))
    monkeypatch.setattr(training.run, "all_reduce_max", lambda n: done.append("barrier") or n)
    between_steps(monkeypatch, 1, lambda: os.kill(os.getpid(), signal.SIGTERM))
    with handler("SIGTERM", signal.SIG_DFL), pytest.raises(Stopped):
        simclr.pretrain(cfg("resume=false"), tmp_path)
    assert done[:2] == ["barrier", "moved"] and done[-2:] == [LAST, "barrier"]


def full_disk(monkeypatch, fails, number=28):
    """Writing fails where `fails` is true, given a file's name and how often it was written."""
    replace, seen = os.replace, []

    def failing(old, new):
        seen.append(new.name)
        if fails(new.name, seen.count(new.name)):
            raise OSError(number, os.strerror(number))
        replace(old, new)

    monkeypatch.setattr(os, "replace", failing)


@pytest.mark.parametrize("number", [28, 13])
def test_a_save_that_fails_is_a_warning_and_the_next_one_succeeds(
    cfg, tmp_path, caplog, monkeypatch, number
):
    """A full disk, or a directory that is read-only, in the second epoch, and at the end."""
    fails = {(LAST, 3), (LAST, 5), ("simclr_resnet18_epoch2.pt", 1), ("metrics.jsonl", 3)}
    full_disk(monkeypatch, lambda name, n: (name, n) in fails, number)
    simclr.pretrain(cfg("log_interval=1"), tmp_path)
    reason = f"could not be written ({os.strerror(number)})"
    warnings = [record.message for record in caplog.records if record.levelname == "WARNING"]
    assert len(warnings) == 4 and all(reason in warning for warning in warnings)
    assert last_state(tmp_path)["step"] == 9 and not list(tmp_path.glob("*.tmp"))
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["epoch"] for line in lines] == [1, 2, 3]


def test_the_last_save_must_succeed_and_the_same_command_makes_up_for_it(command, monkeypatch):
    with monkeypatch.context() as patch:
        full_disk(patch, lambda name, n: "epoch3" in name or (name == LAST and n > 1))
        code, error = command()
    assert code == 1 and error.splitlines()[-1].startswith("error: run/simclr_resnet18_epoch3.pt c")
    assert error.count("last.pt could not be written (No space left on device)") == 1
    assert last_state(Path("run"))["step"] == 0
    assert command()[0] == 0 and last_state(Path("run"))["step"] == 9
    Path("run/simclr_resnet18_epoch3.pt").unlink()
    with monkeypatch.context() as patch:
        full_disk(patch, lambda name, n: "epoch3" in name)
        assert command()[0] == 1  # complete, but for the weights


def test_no_room_for_the_first_state_ends_the_run_and_leaves_no_trace(cfg, tmp_path, monkeypatch):
    (tmp_path / "run").mkdir()
    with monkeypatch.context() as patch, pytest.raises(UserError, match=r"last\.pt could not be w"):
        full_disk(patch, lambda name, n: name == LAST)
        simclr.pretrain(cfg(), tmp_path / "run")
    assert [path.name for path in (tmp_path / "run").iterdir()] == [".simclr.lock"]
    assert simclr.pretrain(cfg(), tmp_path / "run")["epoch"] == 3


def test_a_signal_during_the_last_save_ends_the_sweep_of_the_run(cfg, tmp_path, monkeypatch):
    """The run itself is complete."""

    def stopped(run, *measured):
        end_epoch(run, *measured)
        if run.epoch == 3:
            os.kill(os.getpid(), signal.SIGTERM)

    end_epoch = Run.end_epoch
    monkeypatch.setattr(Run, "end_epoch", stopped)
    with handler("SIGTERM", signal.SIG_DFL), pytest.raises(Stopped):
        simclr.pretrain(cfg(), tmp_path)
    assert last_state(tmp_path)["step"] == 9


def test_a_signal_on_a_full_disk_says_that_nothing_is_saved(cfg, tmp_path, monkeypatch):
    full_disk(monkeypatch, lambda name, n: name == LAST and n > 1)
    between_steps(monkeypatch, 1, lambda: os.kill(os.getpid(), signal.SIGTERM))
    with handler("SIGTERM", signal.SIG_DFL), pytest.raises(Stopped, match="could not be written"):
        simclr.pretrain(cfg(), tmp_path)


class Broken:
    """A stream whose reader has ended."""

    encoding = "utf-8"

    def write(self, text=""):
        raise BrokenPipeError(32, "Broken pipe")

    flush = isatty = write


def test_a_progress_bar_that_cannot_be_written_ends_no_run(cfg, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "stderr", Broken())
    assert simclr.pretrain(cfg("epochs=1"), tmp_path)["epoch"] == 1
