"""A run that was stopped goes on as if it had not been: bit for bit on a CPU, or not at all."""

import hashlib
import json
import math
import os
import random
import shutil
import signal
from dataclasses import asdict
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import make_images, slowed, stop_in_step, toy_config
from omegaconf import OmegaConf
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import simclr
import training.run
import training.state
from config import ConfigError, may_change
from system.checkpoint import find_checkpoint, load_checkpoint, to_bytes
from system.errors import Stopped, UserError
from training.run import Run
from training.state import find_state

TIMED = "views_per_second", "seconds"
SMALL = "epochs=3", "projection_dim=8", "hidden_dim=16", "knn_interval=2"  # three steps an epoch
STATE = {"config": dict, "step": int}  # keys of a training state
LAST, WEIGHTS = "simclr_resnet18_last.pt", "simclr_resnet18_epoch3.pt"
WHOLE: dict[tuple[str, ...], dict[str, str]] = {}  # what uninterrupted runs end with
compose_toy = cache(toy_config)  # takes as long as nine steps


def lines(folder: Path) -> list[dict[str, float | None]]:
    """metrics.jsonl, without what a clock measured."""
    found = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: line[key] for key in line if key not in TIMED} for line in found]


def digests(value: object, name: str) -> dict[str, str]:
    """The SHA-256 of each tensor and value within dicts and lists, by its path."""
    if isinstance(value, dict | list | tuple):
        found = {}
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            found |= digests(item, f"{name}.{key}")
        return found
    content = repr(value).encode()
    if isinstance(value, torch.Tensor):
        content = repr((value.dtype, value.shape)).encode() + value.contiguous().numpy().tobytes()
    return {name: hashlib.sha256(content).hexdigest()}


def outcome(folder: Path) -> dict[str, str]:
    """The digests of all that two equal runs have in common."""
    saved = load_checkpoint(folder / LAST, STATE)
    del saved["history"], saved["config"]  # compared as metrics.jsonl, and of the checkpoint
    del saved["optimizer"]["param_groups"][0]["lr"]  # set in each step
    weights = load_checkpoint(find_checkpoint(folder, None, None))
    weights["config"] = {k: v for k, v in weights["config"].items() if k not in may_change()}
    return digests({"metrics": lines(folder), "state": saved, "checkpoint": weights}, "")


def differences(one: dict[str, str], other: dict[str, str]) -> list[str]:
    """The first names whose digests differ: pytest prints them at once, unlike 5 MB of bytes."""
    return sorted(name for name in {**one, **other} if one.get(name) != other.get(name))[:5]


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Training images that all runs of this file share."""
    return make_images(tmp_path_factory.mktemp("data") / "images", train=8, test=3)


@pytest.fixture
def toy(images, device):
    """The config of a run of three steps an epoch."""
    return lambda *overrides: compose_toy(images, f"device={device}", *SMALL, *overrides)


@pytest.fixture
def run(same_convolutions, thin, toy, tmp_path, monkeypatch):
    """run(name, overrides, stop=k): pretrain in the directory `name`, which it returns; a SIGTERM
    comes in the k-th step of this call."""

    def pretrain(name, *overrides, stop=None):
        folder = tmp_path / name
        folder.mkdir(exist_ok=True)
        stop_in_step(monkeypatch, stop)
        for seed in (torch.manual_seed, random.seed, np.random.seed):
            seed(len(list(folder.iterdir())))  # what another process would not share
        if stop is None:
            simclr.pretrain(toy(*overrides), folder)
            return folder
        with pytest.raises(Stopped, match=r"SIGTERM after .* saved: the same command resumes"):
            simclr.pretrain(toy(*overrides), folder)
        return folder

    return pretrain


@pytest.fixture
def whole(run):
    """whole(overrides): the outcome of the run that nothing stops."""

    def uninterrupted(*overrides):
        if overrides not in WHOLE:
            WHOLE[overrides] = outcome(run("whole", *overrides))
        return WHOLE[overrides]

    return uninterrupted


@pytest.mark.parametrize(
    "stops",
    [[1], [2], [3], [4], [9], [1, 1], [5, 1, 2]],
    ids=["first step", "first epoch", "epoch's end", "second epoch", "last step", "twice in a row",
         "three times"],
)  # fmt: skip
def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(run, whole, stops):
    for stop in stops:
        run("stopped", stop=stop)
    assert differences(outcome(run("stopped")), whole()) == []


@pytest.mark.parametrize(
    "settings",
    [
        ("optimizer=lars", "learning_rate=4", "warmup_epochs=1"),
        ("optimizer=muon", "learning_rate=0.1", "micro_batch_size=4", "views=3"),
        ("precision=fp16", "epochs=2"),
        ("precision=bf16", "epochs=2"),
    ],
    ids=lambda settings: settings[0],
)
def test_every_optimizer_and_precision_is_resumed_with_its_state(run, whole, settings):
    run("stopped", *settings, stop=5)
    found = run("stopped", *settings)
    assert differences(outcome(found), whole(*settings)) == []
    saved = load_checkpoint(found / LAST, STATE)
    assert settings[0] != "precision=fp16" or saved["scaler"]["_growth_tracker"] == 6


def test_a_signal_during_knn_ends_it_and_it_is_done_after_the_resume(run, whole, monkeypatch):
    knn, called = simclr.held_out_knn, []

    def interrupted(*args, **options):
        called.append(1)
        if len(called) == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return knn(*args, **options)

    monkeypatch.setattr(simclr, "held_out_knn", interrupted)
    with pytest.raises(Stopped, match="SIGTERM after 1 epochs and 3 of 3 steps"):
        run("stopped")
    assert differences(outcome(run("stopped")), whole()) == [] and len(called) == 3


def between_steps(monkeypatch, k, act):
    """Call `act` once the k-th step of the process is recorded."""
    log_step, count = Run.log_step, []

    def record(self, metrics):
        log_step(self, metrics)
        count.append(1)
        if len(count) == k:
            act()

    monkeypatch.setattr(Run, "log_step", record)


@pytest.mark.parametrize("error", [KeyboardInterrupt(), SystemExit(3), RuntimeError("a bug")])
def test_whatever_leaves_training_saves_the_last_complete_step_and_passes_on(
    run, whole, tmp_path, monkeypatch, error
):
    def leave():
        raise error

    with monkeypatch.context() as patch, pytest.raises(type(error)) as raised:
        between_steps(patch, 5, leave)
        run("stopped")
    assert raised.value is error
    assert load_checkpoint(tmp_path / "stopped" / LAST, STATE)["step"] == 5
    assert differences(outcome(run("stopped")), whole()) == []


@pytest.mark.parametrize("where", ["nt_xent", "the update", "after the update", "reading metrics"])
def test_a_step_that_is_interrupted_halfway_is_not_saved_and_done_again(
    run, whole, tmp_path, monkeypatch, caplog, where
):
    """Its batch-norm statistics, its weights or its count of steps are ahead of the others."""
    monkeypatch.setattr(training.run, "math", SimpleNamespace(isfinite=math.isfinite))
    owner, name = {
        "nt_xent": (simclr, "nt_xent"),
        "the update": (torch.optim.SGD, "step"),
        "after the update": (Run, "log_step"),
        "reading metrics": (training.run.math, "isfinite"),  # twice a step
    }[where]
    function, count, last = getattr(owner, name), [], 9 if name == "isfinite" else 5

    def interrupted(*args, **options):
        count.append(1)
        if len(count) == last:
            raise SystemExit(3)
        return function(*args, **options)

    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(owner, name, interrupted)
        run("stopped", "save_minutes=0")
    assert "the last step was cut short or diverged: it is not saved" in caplog.text
    assert load_checkpoint(tmp_path / "stopped" / LAST, STATE)["step"] == 3
    assert differences(outcome(run("stopped")), whole()) == []


@pytest.mark.parametrize("exits", [True, False])
def test_a_launcher_s_own_handler_decides_once_the_state_is_saved(
    run, whole, tmp_path, monkeypatch, exits
):
    """As submitit's, which hands the job in again and ends the process."""
    steps = []

    def handle(number, frame):
        steps.append(load_checkpoint(tmp_path / "stopped" / LAST, STATE)["step"])
        if exits:
            raise SystemExit(3)

    before = signal.signal(signal.SIGUSR2, handle)
    try:
        between_steps(monkeypatch, 4, lambda: os.kill(os.getpid(), signal.SIGUSR2))
        if exits:
            with pytest.raises(SystemExit, match="3"):
                run("stopped")
        found = run("stopped")
        assert signal.getsignal(signal.SIGUSR2) is handle
    finally:
        signal.signal(signal.SIGUSR2, before)
    assert steps == [5] and differences(outcome(found), whole()) == []


def test_auto_goes_on_in_the_precision_of_the_run(run, whole, monkeypatch):
    folder = run("stopped", "precision=bf16", "epochs=2", stop=4)
    machine = {"auto": "fp32"}  # of another kind
    monkeypatch.setattr(simclr, "select_precision", lambda name, _: machine.get(name, name))
    found = run("stopped", "precision=auto", "epochs=2")
    assert differences(outcome(found), whole("precision=bf16", "epochs=2")) == []
    assert OmegaConf.load(folder / "config.yaml").precision == "bf16"
    with pytest.raises(ConfigError, match=r"precision=fp32 \(was bf16\)"):
        run("stopped", "precision=fp32", "epochs=2")  # named, it is another run


def test_where_and_how_it_is_computed_may_change(run, whole):
    run("stopped", stop=4)
    found = run("stopped", "workers=2", "save_minutes=0", "log_interval=2", "finetune_epochs=7")
    assert differences(outcome(found), whole()) == []
    assert OmegaConf.load(found / "config.yaml").workers == 2
    assert (found / "simclr_resnet18_epoch2.pt").is_file()


def test_every_other_key_is_compared_and_named_with_both_values(toy, tmp_path, monkeypatch):
    cfg = toy("precision=fp32")
    (tmp_path / LAST).touch()
    for key, value in asdict(cfg).items():
        saved = {**dict.fromkeys(training.state.STATE), "config": {**asdict(cfg), key: "another"}}
        monkeypatch.setattr(training.state, "load_checkpoint", lambda *_, saved=saved: saved)
        if key in may_change():
            assert find_state(tmp_path, cfg) is saved
            continue
        with pytest.raises(ConfigError) as error:
            find_state(tmp_path, cfg)
        assert str(error.value).startswith(f"{key}={value} (was another): must be as in {tmp_path}")
        del saved["config"][key]  # as in a state from before the key was there
        with pytest.raises(ConfigError, match=rf"^{key}=.* \(was absent\): must"):
            find_state(tmp_path, cfg)
    read_by_training = {"temperature", "crop_scale", "seed", "batch_size", "weight_decay", "init"}
    assert not read_by_training & {*may_change()}


def test_another_config_is_refused_with_the_ways_on_and_changes_no_file(run):
    folder = run("run")
    before = {path: path.read_bytes() for path in folder.iterdir()}
    for override, reason in (
        ("batch_size=12", r"batch_size=12 \(was 8\), learning_rate=.* \(was .*"),
        ("backbone=resnet34", r"backbone=resnet34 \(was resnet18\)"),
        ("epochs=4", r"epochs=4 \(was 3\)"),
    ):
        with pytest.raises(ConfigError, match=f"^{reason}: must be as in {folder} to ") as error:
            run("run", override)
        for way in ("start over with resume=false", "hydra.run.dir=PATH", f"init={folder / LAST}"):
            assert way in str(error.value)
    assert {path: path.read_bytes() for path in folder.iterdir()} == before
    assert lines(run("longer", "epochs=4", f"init={folder / LAST}"))[-1]["epoch"] == 4


def test_a_state_of_an_earlier_version_is_refused_with_the_reason(run):
    folder = run("run", stop=4)
    saved = load_checkpoint(folder / LAST, STATE)
    old = {key: saved[key] for key in ("model", "optimizer", "scaler", "seconds", "history")}
    old |= {"random": {"device": "cpu"}, "order": torch.randperm(24), "found": [], "epoch": 1}
    (folder / LAST).write_bytes(to_bytes({**old, "images": "", "config": saved["config"]}))
    with pytest.raises(UserError, match="of another version, with other random numbers: start"):
        run("run")


def test_other_images_are_refused_and_the_same_in_another_place_are_not(run, images, tmp_path):
    run("run", stop=4)
    shutil.copytree(images, tmp_path / "moved")
    run("run", f"data_dir={tmp_path}/moved", stop=1)
    Image.new("RGB", (12, 12)).save(tmp_path / "moved" / "train" / "class0" / "0.png")
    with pytest.raises(UserError, match="was trained on other images: start over with resume=fa"):
        run("run", f"data_dir={tmp_path}/moved")


def raw(saved):
    """The bytes of a weight, as they stand in the file."""
    return saved["model"]["projector.0.bias"].numpy().tobytes()


DAMAGE = {
    "truncated": (lambda whole, saved: whole[:-1000], r"last\.pt is damaged"),
    "changed": (lambda whole, saved: whole.replace(raw(saved), raw(saved)[::-1]),
                r"last\.pt is damaged"),
    "foreign": (lambda whole, saved: to_bytes({"weights": torch.ones(3)}), "was not written by"),
    "other weights": (lambda whole, saved: to_bytes({**saved, "model": {}}),
                      "training state"),
    "missing": (None, "holds a run without its training state"),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_state_is_refused_with_the_remedy(run, damage):
    path = run("run", stop=4) / LAST
    change, reason = DAMAGE[damage]
    if change is None:
        path.unlink()
    else:
        path.write_bytes(change(path.read_bytes(), load_checkpoint(path, STATE)))
    with pytest.raises(UserError, match=f"{reason}.*start over with resume=false, or choose"):
        run("run")


def test_a_complete_run_says_so_and_gets_back_its_metrics(run, toy, caplog):
    folder = run("run")
    before = {path: path.read_bytes() for path in folder.iterdir() if "tfevents" not in path.name}
    (folder / "metrics.jsonl").unlink()
    caplog.set_level("INFO")
    metrics = simclr.pretrain(toy(), folder)
    assert f"{folder} holds this run, complete; resume=false starts over" in caplog.text
    assert metrics["epoch"] == 3 and metrics["knn_acc"] == lines(folder)[-1]["knn_acc"]
    assert [path.name for path in before if path.read_bytes() != before[path]] == []


def test_starting_over_moves_the_files_of_the_run_and_no_others(run, whole):
    folder = run("run", "seed=1")
    (folder / "notes.log").write_text("mine")
    files = {path.name: path.read_bytes() for path in folder.iterdir() if path.name[0] != "."}
    del files["notes.log"]
    with pytest.raises(AssertionError, match="the same command without resume=false resumes"):
        run("run", "resume=false", stop=5)
    assert {path.name: path.read_bytes() for path in (folder / "old-1").iterdir()} == files
    assert differences(outcome(run("run")), whole()) == []
    assert (folder / "notes.log").read_text() == "mine"
    run("run", "resume=false")
    assert (folder / "old-2" / WEIGHTS).is_file() and not (folder / "old-3").exists()


def test_where_it_goes_on_is_said(run, caplog):
    folder = run("run", stop=5)
    with caplog.at_level("INFO"):
        run("run")
    assert f"{folder}: 1 epochs and 2 steps are done" in caplog.messages


def test_metrics_after_the_state_are_cut_off(run):
    """Later epochs and half a line are what a kill leaves, by which a state is not written."""
    folder = run("run", stop=4)
    first = (folder / "metrics.jsonl").read_text()
    (folder / "metrics.jsonl").write_text(first + '{"epoch": 2}\n{"epoch": 3}\n{"epo')
    run("run", stop=1)
    assert (folder / "metrics.jsonl").read_text() == first
    state = (folder / LAST).read_bytes()
    run("run")
    (folder / LAST).write_bytes(state)  # as if it was killed before it wrote a later one
    events = EventAccumulator(str(run("run"))).Reload().Scalars("loss")
    assert [event.step for event in events] == [1, 2, 3]  # of TensorBoard, each epoch once
    assert [event.value for event in events] == pytest.approx([x["loss"] for x in lines(folder)])


def slow_steps(monkeypatch, seconds):
    """Each step takes so many seconds by the clock of a run, and nothing else any."""
    clock = [0.0]
    monkeypatch.setattr(simclr, "train_step", slowed(clock, seconds, simclr.train_step))
    timer = SimpleNamespace(perf_counter=lambda: clock[0], monotonic=lambda: clock[0])
    monkeypatch.setattr(training.run, "time", timer)


def test_the_seconds_before_a_stop_count(run, monkeypatch):
    slow_steps(monkeypatch, 1)
    run("run", stop=2)
    found = [json.loads(line) for line in (run("run") / "metrics.jsonl").read_text().splitlines()]
    assert [line["seconds"] for line in found] == [3, 3, 3]


def test_a_state_is_written_every_save_minutes(run, monkeypatch):
    slow_steps(monkeypatch, 20)  # a step: an epoch takes a minute
    written, save = [], Run.save
    monkeypatch.setattr(Run, "save", lambda self: written.append(self.step) or save(self))
    for name, minutes in (("often", 0.5), ("seldom", 10), ("within epochs", 1.3)):
        run(name, f"save_minutes={minutes}")
    assert written == [0, 2, 4, 6, 8, 9, 0, 9, 0, 4, 8, 9]
    monkeypatch.setattr(Run, "_write", lambda run, *_: run.step and run.unwritten.update(state="x"))
    with pytest.raises(UserError, match="x"):
        run("full disk", "save_minutes=1.3")
    assert written[12:] == [0, 4, 8, 9, 9]


def test_the_ranks_compare_the_states_that_they_see(run, monkeypatch):
    seen = []
    monkeypatch.setattr(training.run, "check_same", lambda number, what: seen.append(number))
    run("run", stop=5)
    run("run")
    assert seen == [-1, 5]


def test_a_key_that_is_gone_from_the_config_is_no_difference(run, whole):
    path = run("stopped", stop=4) / LAST
    saved = load_checkpoint(path, STATE)
    saved["config"]["predict"] = True  # as states of an earlier version have
    path.write_bytes(to_bytes(saved))
    assert differences(outcome(run("stopped")), whole()) == []
