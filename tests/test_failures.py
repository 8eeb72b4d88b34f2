"""What goes wrong during a run: full disks, numbers that are not finite, signals, memory."""

import json
import math
import os
import pickle
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import REPOSITORY, obey_permissions, stop_in_step
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_files import file_size_limit

import simclr
from images.datasets import load_split
from system.checkpoint import load_checkpoint
from system.errors import Stopped, StopSignals, UserError, describe, one_line_errors
from training import metrics, record
from training.state import STATE_PARTS


@pytest.fixture
def cfg(thin, toy):
    """cfg("epochs=3", …): a toy config, three steps an epoch, without kNN."""
    small = ["projection_dim=8", "hidden_dim=16", "knn_interval=0", "save_minutes=0", "epochs=3"]
    return lambda *overrides: toy(*small, *overrides)


@pytest.fixture
def at_step(monkeypatch):
    """at_step(k, change): the values that the k-th step returns go through `change` first."""
    step, count = simclr.train_step, []

    def change_at(k, change):
        def changed(*args):
            count.append(1)
            values = step(*args)
            return {**values, **change(values)} if len(count) == k else values

        monkeypatch.setattr(simclr, "train_step", changed)
        return count

    return change_at


def last_state(folder):
    return load_checkpoint(folder / "simclr_resnet18_last.pt", STATE_PARTS)


@pytest.mark.parametrize("step", [1, 5, 6, 9], ids=["first", "middle", "epoch's end", "last"])
@pytest.mark.parametrize("name", ["loss", "gradient_norm"])
def test_a_loss_or_gradient_that_is_not_finite_stops_within_a_step(
    cfg, tmp_path, at_step, step, name
):
    count = at_step(step, lambda values: {name: torch.tensor(math.nan)})
    with pytest.raises(UserError, match=rf"{name.replace('_', ' ')} nan.* in step {step} of epoch"):
        simclr.pretrain(cfg("precision=fp32"), tmp_path)
    epochs = (step - 1) // 3
    assert len(count) in (step, step + 1)
    assert last_state(tmp_path)["epoch"] == epochs and not last_state(tmp_path)["found"]
    assert not list(tmp_path.glob("*epoch*.pt"))
    failure = json.loads((tmp_path / "failure.json").read_text())
    assert (failure["epoch"], failure["step"], failure[name]) == (epochs + 1, step, "nan")
    assert failure["learning_rate"] > 0 and len(set(failure["batch"])) == 8


@pytest.mark.parametrize("end", ["signal", "not finite"])
def test_ranks_end_after_the_files_are_written(cfg, tmp_path, at_step, monkeypatch, end):
    """A rank that ends makes torchrun end the others, in the middle of a write."""
    done = []
    for name in ("save_state", "write_file"):
        write = getattr(record, name)
        monkeypatch.setattr(record, name, lambda *a, w=write: w(*a) or done.append("written"))
    monkeypatch.setattr(record, "barrier", lambda: done.append("barrier"))
    if end == "signal":
        stop_in_step(monkeypatch, 2)
    else:
        at_step(2, lambda values: {"loss": torch.tensor(math.nan)})
    with pytest.raises((Stopped, UserError)):
        simclr.pretrain(cfg("precision=fp32"), tmp_path)
    assert done[-2:] == ["written", "barrier"]


def test_failure_json_names_the_images_of_the_step(cfg, tmp_path, at_step, monkeypatch):
    at_step(5, lambda values: {"loss": torch.tensor(math.inf)})
    seen = []
    views = simclr.random_views
    monkeypatch.setattr(
        simclr, "random_views", lambda images, *args: seen.append(images) or views(images, *args)
    )
    with pytest.raises(UserError, match=r"lower learning_rate .*temperature .*precision=fp32"):
        simclr.pretrain(cfg(), tmp_path)
    failure = json.loads((tmp_path / "failure.json").read_text())
    images = load_split("folder", cfg().data_dir, "pretrain", 8).images
    assert torch.equal(seen[4][:8], images[failure["batch"]])
    rate = simclr.cosine_learning_rate(4, 9, cfg().learning_rate, cfg().min_learning_rate)
    assert failure["learning_rate"] == rate and failure["loss"] == "inf"


def test_a_run_goes_on_after_a_failure_that_was_an_accident(cfg, tmp_path, at_step):
    """From the last good state; with the same config, as always."""
    at_step(5, lambda values: {"loss": torch.tensor(math.nan)})
    with pytest.raises(UserError, match="loss nan"):
        simclr.pretrain(cfg(), tmp_path)
    assert simclr.pretrain(cfg(), tmp_path)["epoch"] == 3


def test_a_step_that_float16_leaves_out_is_no_failure(cfg, tmp_path, at_step):
    at_step(2, lambda values: {"gradient_norm": torch.tensor(math.inf)})
    simclr.pretrain(cfg("precision=fp16"), tmp_path)
    assert last_state(tmp_path)["epoch"] == 3
    at_step(10, lambda values: {"loss": torch.tensor(math.nan)})
    with pytest.raises(UserError, match="loss nan"):
        simclr.pretrain(cfg("precision=fp16", "resume=false"), tmp_path)


def test_a_collapse_is_warned_about_once(cfg, tmp_path, at_step, monkeypatch, caplog):
    flat = {"z_std": torch.tensor(1e-4), "contrastive_accuracy": torch.tensor(0.07)}
    step = simclr.train_step
    monkeypatch.setattr(simclr, "train_step", lambda *args: {**step(*args), **flat})
    simclr.pretrain(cfg(), tmp_path)
    assert caplog.text.count("all images have nearly the same embedding") == 1
    caplog.clear()
    monkeypatch.setattr(simclr, "train_step", step)
    simclr.pretrain(cfg("resume=false", "learning_rate=0.01"), tmp_path)
    assert "embedding" not in caplog.text


def test_the_metrics_of_a_step_are_read_after_the_next_was_started(cfg, tmp_path, monkeypatch):
    """So that a GPU never waits for the CPU; those of an epoch's last step at once."""
    done, copy, step = [], record.start_copy, simclr.train_step

    def start_copy(metrics):
        number = sum(name == "start" for name, _ in done)
        read = copy(metrics)
        return lambda: done.append(("read", number)) or read()

    def train_step(*args):
        done.append(("start", sum(name == "start" for name, _ in done) + 1))
        return step(*args)

    monkeypatch.setattr(record, "start_copy", start_copy)
    monkeypatch.setattr(simclr, "train_step", train_step)
    simclr.pretrain(cfg("epochs=1"), tmp_path)
    order = [("start", 1), ("start", 2), ("read", 1), ("start", 3), ("read", 2), ("read", 3)]
    assert done == order


def test_a_full_disk_is_said_and_the_run_goes_on_and_saves_when_there_is_room(
    cfg, tmp_path, caplog, monkeypatch
):
    """The first state was written; then the disk is full for the state of epoch 1."""
    save, full = record.save_state, []

    def save_state(folder, training, *args):
        full.append(training.epoch)
        with file_size_limit(50_000 if training.epoch == 1 else 2**40):
            save(folder, training, *args)

    monkeypatch.setattr(record, "save_state", save_state)
    simclr.pretrain(cfg(), tmp_path)
    assert full == [0, 1, 2, 3]
    assert caplog.text.count("last.pt could not be written (File too large): it takes 2.") == 1
    assert last_state(tmp_path)["epoch"] == 3 and len(last_state(tmp_path)["history"]) == 3


def test_a_complete_run_whose_weights_cannot_be_written_again_is_an_error(cfg, tmp_path):
    simclr.pretrain(cfg(), tmp_path)
    (tmp_path / "simclr_resnet18_epoch3.pt").unlink()
    with (
        file_size_limit(50_000),
        pytest.raises(UserError, match=r"epoch3\.pt could not be written"),
    ):
        simclr.pretrain(cfg(), tmp_path)


def test_a_run_whose_end_is_not_on_disk_is_an_error(cfg, tmp_path, monkeypatch):
    """With the state before it intact, so that the same command ends it when there is room."""
    end_epoch = record.RunRecord.end_epoch

    def full(self, training, *line):
        with file_size_limit(50_000 if training.epoch == 2 else 2**40):
            end_epoch(self, training, *line)

    with monkeypatch.context() as patch:
        patch.setattr(record.RunRecord, "end_epoch", full)
        with pytest.raises(UserError) as error:
            simclr.pretrain(cfg(), tmp_path)
    for name in ("simclr_resnet18_epoch3.pt", "simclr_resnet18_last.pt"):
        assert f"{name} could not be written" in str(error.value)
    assert last_state(tmp_path)["epoch"] == 2 and not list(tmp_path.glob("*.tmp"))
    simclr.pretrain(cfg(), tmp_path)
    assert last_state(tmp_path)["epoch"] == 3


def test_no_room_for_the_first_state_ends_the_run_before_it_begins(cfg, tmp_path):
    with file_size_limit(50_000), pytest.raises(UserError, match=r"last\.pt could not be written"):
        simclr.pretrain(cfg(), tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {".simclr.lock", "images"}


def test_tensorboard_on_a_full_disk_is_said_and_caught_up_with(cfg, tmp_path, monkeypatch, caplog):
    writer, made = metrics.SummaryWriter, []

    class Full(writer):
        def __init__(self, *args, **kwargs):
            made.append(kwargs["purge_step"])
            super().__init__(*args, **kwargs)

        def flush(self):
            if len(made) == 1:
                raise OSError(28, "No space left on device")
            super().flush()

    monkeypatch.setattr(metrics, "SummaryWriter", Full)
    simclr.pretrain(cfg(), tmp_path)
    assert made == [1, 1] and caplog.text.count("TensorBoard's file") == 1
    found = EventAccumulator(str(tmp_path)).Reload().Scalars("loss")
    assert "No space left" in caplog.text and [event.step for event in found] == [1, 2, 3]


def test_a_first_signal_is_noted_and_the_handlers_are_put_back():
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    with StopSignals() as stop:
        stop.check()
        os.kill(os.getpid(), signal.SIGTERM)
        for _ in range(100):
            time.sleep(0.01 if stop.received is None else 0)
        with pytest.raises(Stopped, match="stopped by SIGTERM"):
            stop.check()
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before
    assert signal.set_wakeup_fd(-1) == -1


def test_ctrl_c_before_and_after_training_is_one_line_too(capsys):
    with pytest.raises(SystemExit) as end, one_line_errors():
        raise KeyboardInterrupt
    assert end.value.code == 130 and capsys.readouterr().err == "stopped by SIGINT\n"


def test_what_the_system_refuses_is_one_line_too(capsys, tmp_path):
    with pytest.raises(SystemExit) as end, one_line_errors():
        (tmp_path / ("x" * 300)).read_text()
    assert end.value.code == 1
    assert capsys.readouterr().err.endswith("xxx: File name too long\n")
    with pytest.raises(SystemExit), one_line_errors():
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. And so on.")
    said = "error: out of memory (CUDA out of memory): this machine has too little for it"
    assert capsys.readouterr().err.startswith(said)
    for error in (MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory: 8 GB")):
        with pytest.raises(SystemExit), one_line_errors():
            raise error
        assert capsys.readouterr().err.startswith("error: out of memory (")
    with pytest.raises(RuntimeError, match="a bug"), one_line_errors():
        raise RuntimeError("a bug")


def test_a_log_on_a_full_disk_is_no_traceback(tmp_path):
    log = "hydra.job_logging.handlers.file.filename=/dev/full"
    process = start(tmp_path, "epochs=1", log)
    error = process.communicate(timeout=120)[1]
    assert process.returncode == 0 and "Traceback" not in error and "Logging" not in error


def test_nothing_is_made_of_a_run_that_is_ended_before_it_begins(cfg, tmp_path, monkeypatch):
    """Ctrl-C while images are read: there is nothing to save yet."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's & ignores it
    monkeypatch.setattr(
        simclr, "load_pretraining", lambda *args, **kwargs: os.kill(os.getpid(), signal.SIGINT)
    )
    try:
        with pytest.raises(KeyboardInterrupt):
            simclr.pretrain(cfg(), tmp_path)
    finally:
        signal.signal(signal.SIGINT, before)
    assert {path.name for path in tmp_path.iterdir()} == {".simclr.lock", "images"}


def test_a_signal_before_the_first_step_ends_the_run_without_one(cfg, tmp_path, monkeypatch):
    """As while a state is read: no step is begun, which may take a minute to compile."""
    steps, move = [], record.move_aside

    def interrupted(run_dir):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.1)
        return move(run_dir)

    monkeypatch.setattr(record, "move_aside", interrupted)
    monkeypatch.setattr(simclr, "train_step", lambda *args: steps.append(args))
    with pytest.raises(Stopped, match="in epoch 1 after 0 of 3 steps; the state is saved"):
        simclr.pretrain(cfg("resume=false"), tmp_path)
    assert steps == []


def start(folder, *overrides, script="tests/thin_simclr.py", before=(), **options):
    """A run of its own at toy size, of many epochs of a tenth of a second."""
    command = [*before, sys.executable, str(REPOSITORY / script), "dataset=digits", "image_size=8",
               "batch_size=32", "hidden_dim=8", "projection_dim=8", "epochs=2000", "device=cpu",
               "compile=false", "knn_interval=0", *overrides]  # fmt: skip
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    options = {"stderr": subprocess.PIPE, "text": True, "env": environment, **options}
    return subprocess.Popen(command, cwd=folder, **options)


def wait_for(path, process):
    for _ in range(600):
        if path.exists():
            return
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.1)
    raise TimeoutError(path)


def test_a_folder_that_is_unwritable_for_a_while_is_said_and_the_run_goes_on(tmp_path):
    run, said = tmp_path / "logs" / "SimCLR" / "digits" / "resnet18", tmp_path / "said"
    with open(said, "w") as out:
        process = start(tmp_path, "save_minutes=0", preexec_fn=obey_permissions, stdout=out)
        wait_for(run / "metrics.jsonl", process)
        run.chmod(0o555)
        line = "simclr_resnet18_last.pt could not be written (Permission denied): it takes "
        for _ in range(600):
            if line in said.read_text():
                break
            assert process.poll() is None, process.stderr.read()
            time.sleep(0.1)
        run.chmod(0o755)
        done = last_state(run)["epoch"]
        process.send_signal(signal.SIGTERM)
        error = process.communicate(timeout=60)[1]
    assert line in said.read_text() and process.returncode == 143, error
    assert "the state is saved" in error and last_state(run)["epoch"] >= done
    assert "Traceback" not in error


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_process_with_128_and_its_number_in_one_line(tmp_path, number):
    run = tmp_path / "logs" / "SimCLR" / "digits" / "resnet18"
    process = start(tmp_path)
    wait_for(run / "metrics.jsonl", process)
    if number == signal.SIGTERM:  # once is enough
        second = subprocess.run(
            process.args, cwd=tmp_path, capture_output=True, text=True, timeout=60,
            env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        )  # fmt: skip
        assert second.returncode == 1
        assert second.stderr.startswith("error: logs/SimCLR/digits/resnet18 is in use by another s")
        assert "imclr.py: wait until that ends, or choose" in second.stderr
    process.send_signal(number)
    said = process.communicate(timeout=60)[1].split("\n")
    assert process.returncode == 128 + number, said
    assert said[-2].startswith(f"stopped by {number.name} in epoch ") and said[-1] == ""
    assert "the state is saved: the same command resumes the run" in said[-2]
    assert last_state(run)["epoch"] >= 1 and "Traceback" not in "".join(said)


def test_every_signal_that_asks_a_process_to_end_is_saved(tmp_path, write_images):
    """In one process, each call of simclr.py resumes what the signal before has stopped."""
    codes = {
        "SIGHUP": 129,  # the terminal is closed
        "SIGUSR1": 138,  # SLURM: --signal=B:USR1@60
        "SIGUSR2": 140,  # LSF, SGE -notify
        "SIGQUIT": 131,  # Ctrl-\, and torchrun passes it on
        "SIGXCPU+SIGXCPU": 152,  # a limit of CPU time: every second
        "SIGUSR1+SIGTERM": 138,  # SLURM's warning, and its end a minute later: both are the first
        "nohup": 0,
    }
    data = write_images(tmp_path / "images", train=16)
    script = REPOSITORY / "tests" / "signalled_run.py"
    done = subprocess.run(
        [sys.executable, script, ",".join(codes), "dataset=folder", f"data_dir={data}", "epochs=4",
         "image_size=8", "batch_size=8", "hidden_dim=8", "projection_dim=8", "knn_interval=0",
         "device=cpu"], cwd=tmp_path, capture_output=True, text=True, timeout=120,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
    )  # fmt: skip
    said = [line for line in done.stdout.splitlines() if line.split(":")[0] in codes]
    assert said == [f"{name}: {code}" for name, code in codes.items()], done.stderr
    for name in codes:
        if name != "nohup":
            assert f"stopped by {name.split('+')[0]} in epoch" in done.stderr
    assert done.stderr.count("the state is saved: the same command resumes the run") == 6
    assert done.stdout.count("resumes from") == 6 and "Traceback" not in done.stderr


def test_stopped_crosses_processes_and_is_not_caught_as_a_mistake():
    """As in Hydra's sweeps, whose jobs' exceptions are caught, and by joblib pickled."""
    stopped = pickle.loads(pickle.dumps(Stopped(signal.SIGTERM, " in epoch 2")))
    assert describe(stopped) == ("stopped by SIGTERM in epoch 2", 143)
    assert not isinstance(stopped, Exception)


def test_a_second_signal_ends_the_process_at_once_and_the_state_is_whole(tmp_path):
    run = tmp_path / "logs" / "SimCLR" / "digits" / "resnet18"
    large = "image_size=48", "batch_size=1437"  # a step of half a minute
    process = start(tmp_path, *large, script="simclr.py")
    wait_for(run / "config.yaml", process)
    time.sleep(2)
    process.send_signal(signal.SIGTERM)
    time.sleep(1.5)
    assert process.poll() is None
    sent = time.monotonic()
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM and time.monotonic() - sent < 5
    assert last_state(run)["epoch"] == 0 and not last_state(run)["found"]
