"""A run that was stopped goes on as if it had not been: bit for bit on a CPU, or not at all."""

import ast
import json
import os
import random
import shutil
import signal
import time
import weakref
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import REPOSITORY, slowed, stop_in_step
from omegaconf import OmegaConf
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import simclr
import system.device
from config import KEYS, MAY_CHANGE
from system.checkpoint import load_checkpoint, load_encoder, to_bytes
from system.errors import ConfigError, Stopped, UserError
from training import record, state

TIMED = "views_per_second", "seconds"


@pytest.fixture
def views(monkeypatch):
    """Every batch of views that a step was given, also in a step that was interrupted."""
    seen = []
    random_views = simclr.random_views
    monkeypatch.setattr(
        simclr, "random_views", lambda *args: seen.append(random_views(*args)) or seen[-1]
    )
    return seen


@pytest.fixture
def run(same_convolutions, thin, toy, tmp_path, monkeypatch):
    """run(name, overrides, stops=[k]): pretrain in the folder `name`, three steps an epoch; a
    SIGTERM comes while the k-th step of this call is computed. Returns the folder."""

    def pretrain(name, *overrides, stop=None):
        folder = tmp_path / name
        folder.mkdir(exist_ok=True)
        stop_in_step(monkeypatch, stop)
        cfg = toy("epochs=3", "projection_dim=8", "hidden_dim=16", "knn_interval=2", *overrides)
        for seed in (torch.manual_seed, random.seed, np.random.seed):
            seed(len(list(folder.iterdir())))  # what another process would not share
        if stop is None:
            simclr.pretrain(cfg, folder)
        else:
            with pytest.raises(Stopped) as stopped:
                simclr.pretrain(cfg, folder)
            assert stopped.value.number == signal.SIGTERM
            assert "the same command resumes the run" in str(stopped.value), stopped.value
        return folder

    return pretrain


def lines(folder):
    """metrics.jsonl, without what a clock measured."""
    found = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: line[key] for key in line if key not in TIMED} for line in found]


def plain(value):
    """Tensors as bytes, so that == compares every bit."""
    if isinstance(value, torch.Tensor):
        return value.dtype, (*value.shape,), value.cpu().contiguous().numpy().tobytes()
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    return [plain(item) for item in value] if isinstance(value, list | tuple) else value


def outcome(folder, epochs=3):
    """All that two equal runs have in common."""
    saved = load_checkpoint(folder / "simclr_resnet18_last.pt", state.STATE_PARTS)
    parts = ("model", "optimizer", "scaler", "epoch", "order", "found", "images", "config")
    weights = load_checkpoint(folder / f"simclr_resnet18_epoch{epochs}.pt")
    return plain([lines(folder), {key: saved[key] for key in parts}, saved["random"]["views"],
                  weights])  # fmt: skip


@pytest.mark.parametrize(
    "stops",
    [[1], [2], [3], [4], [9], [1, 1], [5, 1, 2]],
    ids=["first step", "first epoch", "epoch's end", "second epoch", "last step", "twice in a row",
         "three times"],
)  # fmt: skip
def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(device, run, views, stops):
    """Weights, momentum, metrics, order of the images, views: wherever it was stopped."""
    whole = run("whole")
    seen = [view.clone() for view in views]
    views.clear()
    for stop in stops:
        run("stopped", stop=stop)
    assert outcome(run("stopped")) == outcome(whole)
    if device.type == "cpu":  # a CUDA graph makes them where the last ones were
        assert len(views) == 9 and all(map(torch.equal, views, seen))


def test_a_saved_state_is_freed_once_it_is_restored(run, monkeypatch):
    """It is a second copy of the weights."""
    weights, alive = [], []
    restore, log_step = record.restore, record.RunRecord.log_step

    def keep(training, saved, images):
        weights.append(weakref.ref(saved.content["model"]["projector.0.weight"]))
        restore(training, saved, images)

    def look(self, *step):
        alive.extend(weight() is not None for weight in weights)
        log_step(self, *step)

    monkeypatch.setattr(record, "restore", keep)
    monkeypatch.setattr(record.RunRecord, "log_step", look)
    run("stopped", stop=4)
    run("stopped")
    assert alive == [False] * 5


def test_the_ranks_compare_the_states_that_they_see(run, monkeypatch):
    seen = []
    monkeypatch.setattr(state, "check_same", lambda numbers, what: seen.append((numbers, what)))
    run("run", stop=5)
    run("run")
    found = f"training states in {run('run')}"
    assert seen == [((-1, 0), found), ((1, 2), found), ((3, 0), found)]


@pytest.mark.parametrize("micro_batch_size", ["null", 4])  # as a graph on a GPU, and never
@pytest.mark.parametrize(("optimizer", "rate"), [("lars", 4), ("muon", 0.1)])
def test_every_optimizer_is_resumed_with_its_velocity(
    device, run, optimizer, rate, micro_batch_size
):
    rates = f"optimizer={optimizer}", f"learning_rate={rate}"
    settings = *rates, "warmup_epochs=1", f"micro_batch_size={micro_batch_size}"
    whole = run("whole", *settings)
    run("stopped", *settings, stop=5)
    assert outcome(run("stopped", *settings)) == outcome(whole)


def machine(monkeypatch, *capabilities):
    """A CPU of another kind, by what precision=auto looks at."""
    there = dict.fromkeys(capabilities, True)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: there, raising=False)


@pytest.mark.parametrize(("first", "then"), [("fp32", "bf16"), ("bf16", "fp32")])
def test_auto_goes_on_in_the_precision_of_the_run(run, monkeypatch, caplog, first, then):
    caplog.set_level("INFO")
    whole = outcome(run("whole", f"precision={first}"))
    has = {"fp32": (), "bf16": ("amx_bf16",)}
    machine(monkeypatch, *has[first])
    folder = run("stopped", "precision=auto", stop=5)
    machine(monkeypatch, *has[then])
    said = f"precision=auto: {first}, in which the run began; a new one would take {then}"
    assert said not in caplog.text
    assert outcome(run("stopped", "precision=auto")) == whole
    assert said in caplog.text
    assert OmegaConf.load(folder / "config.yaml").precision == first
    assert OmegaConf.load(run("new", "precision=auto") / "config.yaml").precision == then


def test_a_precision_that_the_machine_has_not_is_refused_by_name(call, monkeypatch, tmp_path, run):
    """As a float16 run of a GPU is on a machine whose autocast has no float16, or fails there."""
    whole = run("stopped", "precision=fp16", stop=5)
    command = [
        "dataset=folder", f"data_dir={tmp_path / 'images'}", "image_size=8", "batch_size=8",
        "epochs=3", "device=cpu", "projection_dim=8", "hidden_dim=16", "knn_interval=2",
        f"hydra.run.dir={whole}",
    ]  # fmt: skip
    before = {path: path.read_bytes() for path in whole.glob("*.pt")}

    def unsupported(*args, **kwargs):
        raise RuntimeError("not implemented for Half")

    for cannot in (lambda device, dtype: nullcontext(), unsupported):
        with monkeypatch.context() as other:
            other.setattr(system.device, "autocast", cannot)
            code, error = call("simclr.py", *command)
        assert code == 2 and error.startswith("error: precision=auto: the run of ")
        assert "has precision=fp16, in which this cpu cannot compute" in error
    assert {path: path.read_bytes() for path in whole.glob("*.pt")} == before
    code, error = call("simclr.py", *command)
    assert code == 0, error
    code, error = call("simclr.py", *command, "precision=bf16")  # named, it is another run
    assert code == 2 and "precision=bf16 (was fp16)" in error


def test_ranks_that_would_compute_in_different_precisions_are_refused(monkeypatch):
    monkeypatch.setattr(state, "all_reduce_max", lambda number: max(number, 0))
    machine(monkeypatch, "amx_bf16")
    with pytest.raises(ConfigError, match="precision=auto: differs between the ranks, bf16 on"):
        state.choose_precision("auto", torch.device("cpu"), None)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_every_precision_is_resumed_with_its_scaler(device, run, precision):
    whole = run("whole", f"precision={precision}")
    run("stopped", f"precision={precision}", stop=5)
    assert outcome(run("stopped", f"precision={precision}")) == outcome(whole)
    if precision == "fp16":
        saved = load_checkpoint(whole / "simclr_resnet18_last.pt", state.STATE_PARTS)
        assert saved["scaler"]["_growth_tracker"] == 9


def test_momentum_and_weights_keep_their_layout(run, monkeypatch):
    """The fused kernel goes through both in the order of memory."""
    strides = []
    restore = state.restore

    def record_strides(training, *args):
        restore(training, *args)
        moments = training.optimizer.state.values()
        strides.extend((m["momentum_buffer"].stride()) for m in moments)
        strides.extend(weight.stride() for weight in training.model.parameters())

    monkeypatch.setattr(record, "restore", record_strides)
    run("stopped", stop=2)
    run("stopped")
    half = len(strides) // 2
    assert half > 20 and strides[:half] == strides[half:]


def test_a_signal_during_knn_ends_it_and_it_is_done_after_the_resume(run, monkeypatch):
    whole = run("whole")
    knn, called = simclr.held_out_knn, []

    def interrupted(*args):
        called.append(args)
        if len(called) == 1:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.1)
        return knn(*args)

    monkeypatch.setattr(simclr, "held_out_knn", interrupted)
    with pytest.raises(Stopped, match="in epoch 2 after 3 of 3 steps"):
        run("stopped")
    assert outcome(run("stopped")) == outcome(whole)
    assert len(called) == 3 and [line["knn_acc"] is None for line in lines(whole)] == [1, 0, 0]


def test_on_another_kind_of_device_the_views_follow_from_seed_and_epoch(run, toy):
    folder = run("run", stop=4)  # in the second epoch
    saved = state.load_state(folder)
    saved.content["random"] = {"device": "cuda", "views": None}
    drawn = []
    for epoch in (0, 3, 3):
        saved.content["epoch"] = epoch
        cfg = toy("epochs=3", "projection_dim=8", "hidden_dim=16")
        training = simclr.start_training(cfg, torch.device("cpu"), 9)
        state.restore(training, saved, saved.content["images"])
        drawn.append(torch.rand(1, generator=training.rng).item())
    fresh = torch.rand(1, generator=torch.Generator().manual_seed(cfg.seed)).item()
    assert drawn[0] != drawn[1] == drawn[2] and fresh not in drawn
    assert "saved with device cuda" in state.describe_resume(training, saved)


def test_a_complete_run_says_so_and_is_left_as_it_is(run, caplog):
    folder = run("run")
    before = {path: path.read_bytes() for path in folder.iterdir()}
    with caplog.at_level("INFO"):
        assert run("run") == folder
    assert "holds this run, complete with 3 epochs" in caplog.text
    assert "resume=false starts over" in caplog.text
    assert {path: path.read_bytes() for path in folder.iterdir()} == before


def test_what_is_missing_of_a_complete_run_is_written_again(run):
    folder = run("run")
    before = outcome(folder)
    for name in ("metrics.jsonl", "simclr_resnet18_epoch3.pt"):
        (folder / name).unlink()
    assert outcome(run("run")) == before


def test_the_same_command_says_where_it_goes_on(run, caplog):
    run("run", stop=5)
    with caplog.at_level("INFO"):
        run("run")
    assert "simclr_resnet18_last.pt: 1 epochs and 2 steps are done" in caplog.text
    assert "rounding" not in caplog.text


def test_another_version_of_torch_is_said(run, caplog, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(state, "VERSIONS", {**state.VERSIONS, "torch": "1.0"})
        run("run", stop=5)
    with caplog.at_level("INFO"):
        run("run")
    assert "saved with torch 1.0: identical only up to rounding" in caplog.text


def test_a_state_says_what_wrote_it(run):
    saved = load_checkpoint(run("run") / "simclr_resnet18_last.pt", state.STATE_PARTS)
    assert saved["versions"]["torch"] == torch.__version__ and saved["format"] == 1


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("temperature=0.2", r"temperature=0\.2 \(was 0\.5\): must be as in .*last\.pt"),
        ("epochs=4", r"epochs=4 \(was 3\)"),
        ("batch_size=12", r"batch_size=12 \(was 8\), learning_rate=.* \(was "),
        ("backbone=resnet34", r"backbone=resnet34 \(was resnet18\)"),
        ("precision=fp16", r"precision=fp16 \(was (fp32|bf16)\)"),
        ("hidden_dim=8", r"hidden_dim=8 \(was 16\)"),
    ],
)
def test_another_config_is_refused_with_both_values_and_the_ways_on(run, override, message):
    folder = run("run", stop=4)
    before = {path: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(ConfigError, match=message) as error:
        run("run", override)
    for way in ("resume=false starts over", "hydra.run.dir=PATH"):
        assert way in str(error.value)
    assert {path: path.read_bytes() for path in folder.iterdir()} == before


def test_what_may_change_may_change(run):
    """Where and how it is computed, not what; and what is looked at."""
    whole = run("whole")
    run("stopped", stop=4)
    changes = ["workers=2", "save_minutes=0", "runs=3", "compile=false", "log_interval=3",
               "device=auto", "finetune_epochs=7"]  # fmt: skip
    found = run("stopped", *changes)
    assert lines(found) == lines(whole)
    assert OmegaConf.load(found / "config.yaml").workers == 2
    saved = load_checkpoint(found / "simclr_resnet18_last.pt", state.STATE_PARTS)
    assert saved["config"]["workers"] == 2 and set(MAY_CHANGE) < set(KEYS)


def test_all_that_pretraining_does_not_read_may_change():
    tree = ast.parse((REPOSITORY / "simclr.py").read_text())
    read = {n.attr for n in ast.walk(tree) if isinstance(n, ast.Attribute)}
    unread = {key for key in KEYS if key not in read}
    assert unread < set(MAY_CHANGE) and {"checkpoint", "finetune_epochs"} < unread
    for key in KEYS:
        if key in MAY_CHANGE:
            state.check_unchanged({key: 1}, {key: 2}, Path("state"), MAY_CHANGE)
        else:
            with pytest.raises(ConfigError, match=f"{key}=2 .was 1."):
                state.check_unchanged({key: 1}, {key: 2}, Path("state"), MAY_CHANGE)


def test_other_images_are_refused(run, write_images, tmp_path):
    """The same images in another place are not."""
    run("run", stop=4)
    shutil.copytree(tmp_path / "images", tmp_path / "moved")
    moved = f"data_dir={tmp_path / 'moved'}"
    run("run", moved, stop=1)
    Image.new("RGB", (12, 12)).save(tmp_path / "moved" / "train" / "class1" / "3.png")
    with pytest.raises(UserError, match=r"training images are not those of .*last\.pt"):
        run("run", moved)


def test_starting_over_moves_the_old_files_aside_and_never_over_older_ones(run, caplog):
    folder = run("run")
    (folder / "notes.txt").write_text("mine")
    with caplog.at_level("INFO"):
        run("run", "resume=false", "temperature=0.2")
    assert f"moved the files of the earlier run to {folder / 'old-1'}" in caplog.text
    run("run", "resume=false")
    temperatures = [
        load_checkpoint(folder / place / "simclr_resnet18_epoch3.pt")["config"]["temperature"]
        for place in ("old-1", "old-2", ".")
    ]
    assert temperatures == [0.5, 0.2, 0.5] and len(lines(folder / "old-1")) == 3
    assert (folder / "notes.txt").read_text() == "mine"


def test_a_run_that_is_refused_moves_nothing(run, tmp_path):
    folder = run("run")
    before = {path: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(ConfigError, match="batch_size=25"):
        run("run", "resume=false", "batch_size=25")
    assert {path: path.read_bytes() for path in folder.iterdir()} == before


def test_a_run_without_a_state_is_neither_continued_nor_written_over(run):
    folder = run("run")
    for path in folder.glob("*[st].pt"):
        path.unlink()
    before = {path: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(UserError, match=r"holds a run that can't be continued .*resume=false"):
        run("run")
    assert {path: path.read_bytes() for path in folder.iterdir()} == before


def test_metrics_have_each_epoch_once_whatever_a_crash_left(run):
    """After a state of epoch 1, lines of later epochs and half a line are what a kill leaves."""
    whole = run("whole")
    folder = run("run", "save_minutes=0", stop=4)
    with open(folder / "metrics.jsonl", "a") as file:
        file.write('{"epoch": 2}\n{"epoch": 3}\n{"epo')
    assert lines(run("run", "save_minutes=0", stop=1)) == lines(whole)[:1]  # already at the start
    assert lines(run("run", "save_minutes=0")) == lines(whole)


def test_tensorboard_shows_each_epoch_once(run):
    folder = run("run", stop=8)
    found = EventAccumulator(str(run("run"))).Reload().Scalars("loss")
    assert [event.step for event in found] == [1, 2, 3]
    assert [event.value for event in found] == pytest.approx(
        [line["loss"] for line in lines(folder)]
    )


def slow_steps(monkeypatch, seconds):
    """Each step takes so many seconds by the clock of record.py, and nothing else any."""
    clock = [0.0]
    monkeypatch.setattr(simclr, "train_step", slowed(clock, seconds, simclr.train_step))
    timer = SimpleNamespace(perf_counter=lambda: clock[0], monotonic=lambda: clock[0])
    monkeypatch.setattr(record, "time", timer)


def test_the_seconds_before_a_stop_count(run, monkeypatch):
    slow_steps(monkeypatch, 1)
    run("run", stop=2)
    found = [json.loads(line) for line in (run("run") / "metrics.jsonl").read_text().splitlines()]
    assert [line["seconds"] for line in found] == [3, 3, 3]


def test_a_state_is_written_every_save_minutes(run, monkeypatch):
    slow_steps(monkeypatch, 20)  # a minute an epoch
    written = []
    save = record.save_state
    monkeypatch.setattr(
        record, "save_state", lambda folder, training, *args: written.append(training.epoch) or
        save(folder, training, *args),
    )  # fmt: skip
    run("often", "save_minutes=0")
    run("seldom")
    run("between", "save_minutes=2")
    assert written == [0, 1, 2, 3, 0, 3, 0, 2, 3]


@pytest.mark.parametrize("damage", ["truncated", "empty", "foreign", "tampered", "missing"])
def test_a_damaged_state_is_left_for_the_one_before_it(run, damage, caplog):
    whole = run("whole")
    folder = run("run", "save_minutes=0", stop=5)  # states of epoch 1, and of two steps more
    path = folder / "simclr_resnet18_last.pt"
    content = path.read_bytes()
    if damage == "missing":
        path.unlink()
    elif damage == "foreign":
        torch.save({"weights": torch.zeros(3)}, path)
    else:
        i = content.index(saved_bytes(path))
        tampered = content[:i] + bytes([content[i] ^ 1]) + content[i + 1 :]
        path.write_bytes({"truncated": content[:-1000], "empty": b"", "tampered": tampered}[damage])
    with caplog.at_level("INFO"):
        run("run", "save_minutes=0", stop=5)
    assert "resumes from" in caplog.text and "previous.pt" in caplog.text
    reason = {
        "tampered": "wrong CRC of ",
        "missing": "is missing",
        "foreign": "was not written by simclr.py",
    }
    assert reason.get(damage, "damaged or no checkpoint") in caplog.text
    if damage == "missing":
        assert "1 epochs and 0 steps" in caplog.text
    assert outcome(run("run", "save_minutes=0"))[0] == outcome(whole)[0]


def saved_bytes(path):
    """Of a weight, as they stand in the file."""
    return load_checkpoint(path, state.STATE_PARTS)["model"]["projector.2.weight"].numpy().tobytes()


def test_a_damaged_state_never_takes_the_place_of_a_good_one(run):
    folder = run("run", "save_minutes=0", stop=5)
    torch.save({"weights": torch.zeros(3)}, folder / "simclr_resnet18_last.pt")
    good = (folder / "simclr_resnet18_previous.pt").read_bytes()
    run("run", "save_minutes=0", stop=1)
    assert (folder / "simclr_resnet18_previous.pt").read_bytes() == good


def test_two_damaged_states_are_both_named(run):
    folder = run("run", stop=5)
    for name in ("last", "previous"):
        (folder / f"simclr_resnet18_{name}.pt").write_bytes(b"damaged")
    with pytest.raises(UserError, match=r"can't be continued \(.*last\.pt is.*previous\.pt is"):
        run("run")


def test_a_state_of_other_weights_is_refused(run):
    folder = run("run", stop=5)
    for name in ("last", "previous"):
        path = folder / f"simclr_resnet18_{name}.pt"
        saved = torch.load(path, weights_only=True)
        del saved["model"]["projector.2.weight"]
        path.write_bytes(to_bytes(saved))
    with pytest.raises(UserError, match=r"last\.pt does not fit its config .*projector\.2\.weight"):
        run("run")


def test_a_state_from_the_future_is_refused_though_the_one_before_could_be_read(run):
    path = run("run", "save_minutes=0", stop=5) / "simclr_resnet18_last.pt"
    path.write_bytes(to_bytes({"format": 2, "another": "content"}))
    with pytest.raises(UserError, match=r"last\.pt has format 2, this version reads 1"):
        run("run", "save_minutes=0")


def test_a_signal_to_a_run_that_starts_over_says_what_goes_on(run):
    folder = run("run")
    with pytest.raises(AssertionError, match="the same command, without resume=false, resumes"):
        run("run", "resume=false", stop=5)
    assert lines(run("run"))[-1]["epoch"] == 3 and (folder / "old-1").is_dir()


def test_a_state_can_be_evaluated(run):
    encoder, dim = load_encoder(run("run", stop=5) / "simclr_resnet18_last.pt")
    assert dim == 128 and not encoder.training
