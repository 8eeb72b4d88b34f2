"""Pretraining by really running it: what each step is given, what is written and returned."""

import copy
import itertools
import json
import math
import time
from dataclasses import asdict
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import slowed
from omegaconf import OmegaConf
from test_resume import differences, digests, lines, outcome

import simclr
import training.run
from config import ConfigError
from evaluation import features
from images import datasets
from images.augment import draw, shuffle
from models import SimCLR, nt_xent
from system.checkpoint import load_checkpoint
from system.device import PRECISIONS
from training.optim import schedule, set_learning_rate
from training.run import Run

CPU = torch.device("cpu")
SMALL = "projection_dim=8", "hidden_dim=16"


@pytest.fixture
def run(thin, toy, tmp_path):
    """run("epochs=3", …): pretrain in a new directory, which it returns; three steps an epoch."""
    numbers = itertools.count()

    def pretrain(*overrides: str) -> Path:
        folder = tmp_path / f"run{next(numbers)}"
        folder.mkdir()
        pretrain.returned = simclr.pretrain(toy(*SMALL, *overrides), folder)
        return folder

    return pretrain


@pytest.fixture
def steps(monkeypatch):
    """What every step was given: batch, noise, size, and the learning rate of the optimizer."""
    seen = []
    train_step = simclr.train_step

    def record(cfg, learner, batch, noise, size):
        rate = learner.optimizer.param_groups[0]["lr"]
        in_training = all(module.training for module in learner.model.modules())
        found = {"batch": batch, "noise": noise, "size": size, "rate": rate, "train": in_training}
        seen.append(SimpleNamespace(**found))
        return train_step(cfg, learner, batch, noise, size)

    monkeypatch.setattr(simclr, "train_step", record)
    return seen


def test_images_views_rate_and_size_of_a_step_follow_from_seed_and_step(run, steps, toy):
    """kNN comes between the epochs, and the last 3 of 24 images are in no batch."""
    overrides = (
        "batch_size=7", "view_sizes=[[8,0.5],[12,0.5]]", "warmup_epochs=1", "knn_interval=1",
        "seed=5",
    )  # fmt: skip
    metrics = lines(run(*overrides))
    cfg = toy(*overrides)
    images = datasets.load_split(cfg, "pretrain").images
    assert len(images) == 24 and len(steps) == 2 * 3
    for step, seen in enumerate(steps):
        epoch, i = divmod(step, 3)
        assert torch.equal(seen.batch, images[shuffle(24, 5, epoch)[7 * i : 7 * i + 7]])
        assert torch.equal(seen.noise, draw(14, 5, step))
        assert (seen.rate, seen.size) == schedule(cfg, step, 6)
        assert seen.train
    assert [(x["learning_rate"], x["view_size"]) for x in metrics] == [
        (seen.rate, seen.size) for seen in steps[2::3]
    ]


def test_the_same_seed_gives_the_same_run_to_the_last_bit_and_another_another(run, steps):
    same = [outcome(run("seed=1")) for _ in range(2)]
    assert differences(same[0], same[1]) == []
    run("seed=2", "epochs=1")
    first, other = steps[0], steps[12]
    assert not torch.equal(first.batch, other.batch) and not torch.equal(first.noise, other.noise)


def test_initial_weights_follow_from_the_seed_alone(thin, toy):
    weights = []
    for seed in (1, 1, 2):
        torch.rand(len(weights))  # what came before does not matter
        learner = simclr.make_learner(toy(*SMALL, f"seed={seed}"), CPU)
        weights.append(digests(learner.model.state_dict(), ""))
    assert differences(weights[0], weights[1]) == []
    assert ".enc.conv1.weight" in differences(weights[0], weights[2])


def test_knn_never_sees_the_test_set_and_changes_nothing(run, monkeypatch):
    """Every knn_interval epochs and at the end: a tenth of the training images asks the others, by
    h, which is wider than z, in eval mode."""
    seen, modes = [], []
    knn, extract = features.knn_scores, features.extract_features

    def record(bank, labels, queries, classes):
        seen.append((tuple(bank.shape), labels.bincount().tolist(), len(queries), classes))
        return knn(bank, labels, queries, classes)

    def extract_features(enc, *args):
        modes.append(enc.training)
        return extract(enc, *args)

    monkeypatch.setattr(features, "knn_scores", record)
    monkeypatch.setattr(features, "extract_features", extract_features)
    with_knn, without = run("epochs=5", "knn_interval=2"), run("epochs=5", "knn_interval=0")
    assert seen == [((21, 128), [7, 7, 7], 3, 3)] * 3 and modes == [False] * 7  # untrained too
    assert [x["knn_acc"] is None for x in lines(with_knn)] == [True, False, True, False, False]
    assert {(x["knn_acc"], x["effective_rank"]) for x in lines(without)} == {(None, None)}
    assert all((x["effective_rank"] or 2) > 1 for x in lines(with_knn))
    assert lines(with_knn)[1]["effective_rank"] is not None
    found = [load_checkpoint(f / "simclr_resnet18_epoch5.pt")["model"] for f in (with_knn, without)]
    assert differences(digests(found[0], ""), digests(found[1], "")) == []


def test_what_a_run_writes_and_returns(run, toy, caplog):
    caplog.set_level("INFO")
    folder = run("epochs=5", "log_interval=2", "views=3")
    metrics = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert run.returned == metrics[-1]
    for epoch, line in enumerate(metrics, start=1):
        assert list(line) == [
            "epoch", "step", "loss", "contrastive_accuracy", "alignment", "uniformity", "z_std",
            "gradient_norm", "knn_acc", "effective_rank", "learning_rate", "view_size",
            "views_per_second", "seconds",
        ]  # fmt: skip
        assert (line["epoch"], line["step"]) == (epoch, 3 * epoch)
        assert 0 < line["loss"] < 2 * math.log(22) and 0 <= line["contrastive_accuracy"] <= 1
        assert line["views_per_second"] * line["seconds"] == pytest.approx(3 * 8 * 3)
    names = [f"simclr_resnet18_{name}.pt" for name in ("epoch2", "epoch4", "epoch5", "last")]
    assert sorted(path.name for path in folder.glob("*.pt*")) == names
    cfg = asdict(toy("epochs=5", "log_interval=2", "views=3", *SMALL, "precision=fp32"))
    assert OmegaConf.load(folder / "config.yaml") == cfg
    saved = torch.load(folder / names[2], weights_only=True)
    assert set(saved) == {"model", "config", "epoch"}
    assert (saved["config"], saved["epoch"]) == (cfg, 5)
    SimCLR("resnet18", 8, 16).load_state_dict(saved["model"], strict=True)
    assert "24 images of folder, resnet18, recipe published, on c" in caplog.text
    end = caplog.messages[-1]
    assert end.startswith(f"epoch 5: loss {metrics[-1]['loss']:.4f} (collapsed: 3.0910), contrast")
    assert end.endswith(f"saved {folder}/simclr_resnet18_epoch5.pt")


def test_main_returns_the_knn_accuracy_for_hydra_s_sweepers(thin, toy, tmp_path, monkeypatch):
    cfg = toy(*SMALL, "epochs=1")
    monkeypatch.setattr(simclr, "run_directory", lambda: tmp_path)
    monkeypatch.setattr(simclr, "to_config", lambda cfg: cfg)
    found = simclr.main.__wrapped__(cfg)
    assert found == lines(tmp_path)[-1]["knn_acc"] and 0 <= found <= 1


@pytest.mark.parametrize("override", ["checkpoint=x.pt", "load_epoch=3", "labels=10"])
def test_a_key_of_the_evaluation_is_refused(toy, tmp_path, override):
    with pytest.raises(ConfigError, match=f"{override}: must be null for simclr.py"):
        simclr.pretrain(toy(override), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_collapse_is_warned_about_once(run, monkeypatch, caplog):
    flat = {"z_std": torch.tensor(1e-4), "contrastive_accuracy": torch.tensor(0.07)}
    step = simclr.train_step
    monkeypatch.setattr(simclr, "train_step", lambda *args: {**step(*args), **flat})
    run("epochs=3")
    assert caplog.text.count("in epoch 1 all images have nearly the same embedding") == 1
    assert caplog.text.count("warning") == 1


def test_seconds_are_those_of_the_steps_without_knn_and_saving(run, monkeypatch):
    clock = [0.0]
    takes = partial(slowed, clock)
    monkeypatch.setattr(simclr, "train_step", takes(2, simclr.train_step))
    knn = takes(100, lambda: 0.5)
    monkeypatch.setattr(simclr, "held_out_knn", lambda *args, **options: knn())
    monkeypatch.setattr(Run, "save", takes(1000, Run.save))
    timer = SimpleNamespace(perf_counter=lambda: clock[0], monotonic=time.monotonic)
    monkeypatch.setattr(training.run, "time", timer)
    folder = run("epochs=3", "knn_interval=1", "save_minutes=0")
    metrics = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["seconds"] for line in metrics] == [6, 6, 6]


def test_compile_auto_compiles_from_100_epochs_on_what_can_be_compiled(thin, toy, monkeypatch):
    compiled = []

    def compile_static(f, choice):
        compiled.append((f, choice))
        return f

    monkeypatch.setattr(simclr, "compile_static", compile_static)

    def compiles(*overrides):
        compiled.clear()
        learner = simclr.make_learner(toy(*SMALL, *overrides), CPU)
        forward = SimCLR.forward.__get__(learner.model)
        choice = bool(compiled) and compiled[0][1]
        functions = [(forward, choice), (simclr.random_views, choice)]
        assert compiled == (functions if compiled else [])
        return choice

    assert compiles("epochs=99") is False and compiles("epochs=100") == "auto"
    assert compiles("epochs=100", "compile=false") is False and compiles("compile=true") is True
    for override in ("activation_checkpointing=true", "micro_batch_size=4"):
        assert compiles("epochs=100", override) is False
    monkeypatch.setattr(simclr.distributed, "world_size", lambda: 2)
    monkeypatch.setattr(simclr.distributed, "wrap_ddp", lambda model, sync: model)
    assert compiles("epochs=100") is False


def test_the_config_reaches_model_and_optimizer(thin, toy):
    recompute = "micro_batch_size=4", "activation_checkpointing=true"
    cfg = toy(*SMALL, *recompute, "momentum=0.5", "weight_decay=0.01")
    learner = simclr.make_learner(cfg, CPU)
    group, model = learner.optimizer.param_groups[0], learner.model
    assert (group["momentum"], group["weight_decay"], group["nesterov"]) == (0.5, 0.01, True)
    assert model.micro_batch_size == 4 and "forward" in vars(model.enc.layer1[0])
    assert [tuple(model.projector[i].weight.shape) for i in (0, 2)] == [(16, 128), (8, 16)]
    for name in ("lars", "muon"):
        optimizer = simclr.make_learner(toy(*SMALL, f"optimizer={name}", "learning_rate=0.1"), CPU)
        assert type(optimizer.optimizer).__name__.lower() == name


def test_model_and_optimizer_are_laid_out_for_speed(thin, toy):
    """Channels last, and one kernel for all weights where no scaler may leave out a step."""
    for precision, scaled in (("fp32", False), ("bf16", False), ("fp16", True)):
        learner = simclr.make_learner(toy(f"precision={precision}"), CPU)
        assert learner.scaler.is_enabled() == scaled
        assert learner.optimizer.param_groups[0]["fused"] != scaled
    weight = learner.model.enc.layer1[0].conv1.weight
    assert weight.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("name", ["fp32", "bf16", "fp16"])
def test_the_model_computes_in_the_precision_and_the_loss_in_float32(run, monkeypatch, name):
    seen = set()

    def loss(zs, *rest):
        found = nt_xent(zs, *rest)
        seen.add((zs[0].dtype, found[0].dtype))
        return found

    monkeypatch.setattr(simclr, "nt_xent", loss)
    saved = load_checkpoint(run(f"precision={name}", "epochs=1") / "simclr_resnet18_epoch1.pt")
    assert seen == {(PRECISIONS[name], torch.float32)} and saved["config"]["precision"] == name
    assert {w.dtype for w in saved["model"].values()} == {torch.float32, torch.int64}


def test_float16_gradients_are_scaled_and_a_step_that_overflows_is_left_out(
    device, thin, toy, monkeypatch
):
    learner = simclr.make_learner(toy("precision=fp16", *SMALL), device)
    cfg = toy("precision=fp32", *SMALL)  # the scaler alone, so that the numbers are exact
    set_learning_rate(learner.optimizer, 0.1)
    before = [weight.detach().clone() for weight in learner.model.parameters()]
    plain = copy.deepcopy(learner.model)
    batch = torch.randint(0, 256, (4, 3, 8, 8), dtype=torch.uint8, device=device)
    noise, scale = draw(8, 0, 0).to(device), learner.scaler.get_scale()
    with monkeypatch.context() as patch:
        patch.setattr(simclr, "nt_xent", lambda *args: (nt_xent(*args)[0] * math.inf, batch[0]))
        simclr.train_step(cfg, learner, batch, noise, 8)
    assert all(map(torch.equal, before, learner.model.parameters()))
    assert learner.scaler.get_scale() == scale / 2
    metrics = simclr.train_step(cfg, learner, batch, noise, 8)  # as if the other had not been
    views = simclr.random_views(batch.repeat(2, 1, 1, 1), noise, 8, cfg)
    nt_xent(plain(views)[1].chunk(2))[0].backward()
    after = learner.model.parameters()
    for old, new, weight in zip(before, after, plain.parameters(), strict=True):
        first = 0.1 * (1 + cfg.momentum) * (weight.grad + cfg.weight_decay * old)
        torch.testing.assert_close(new.detach(), old - first, atol=1e-6, rtol=1e-4)
    norm = torch.cat([weight.grad.flatten() for weight in plain.parameters()]).norm()
    torch.testing.assert_close(metrics["gradient_norm"], norm, rtol=1e-3, atol=0)


@pytest.mark.parametrize("optimizer", ["sgd", "lars"])
@pytest.mark.parametrize("recompute", ["true", "false"])
def test_a_whole_step_runs_on_the_meta_device(thin, toy, monkeypatch, optimizer, recompute):
    """There are no values there: a value that is read, a shape that depends on one and a tensor
    left on the CPU are errors."""
    cfg = toy(f"optimizer={optimizer}", f"activation_checkpointing={recompute}", "precision=fp32")
    make = simclr.make_optimizer  # there is no kernel for all weights there
    monkeypatch.setattr(simclr, "make_optimizer", lambda *args, **_: make(*args, fused=False))
    with torch.device("meta"):
        learner = simclr.make_learner(cfg, torch.device("meta"))
        batch, noise = torch.empty(6, 3, 32, 32, dtype=torch.uint8), torch.rand(38, 12)
    set_learning_rate(learner.optimizer, 0.1)
    metrics = simclr.train_step(cfg, learner, batch, noise, 24)
    tensors = [*metrics.values(), *learner.model.parameters()]
    assert {tensor.device.type for tensor in tensors} == {"meta"}
    assert all(weight.grad.device.type == "meta" for weight in learner.model.parameters())


def test_an_epoch_waits_for_no_value_of_a_step(thin, device, toy, tmp_path, monkeypatch):
    """The metrics stay on the device until the bar is drawn, once a second, or the epoch ends."""
    cfg = toy("precision=fp32", "epochs=1", "knn_interval=0", *SMALL)
    learner = simclr.make_learner(cfg, device)
    images = torch.randint(0, 256, (24, 3, 8, 8), dtype=torch.uint8).to(device)
    run = Run(tmp_path, cfg, learner, images="", steps=4)  # one more than there are
    monkeypatch.setattr(run, "end_epoch", lambda *_: run.history.append({}))
    clock = SimpleNamespace(perf_counter=lambda: 0.0, monotonic=lambda: 0.0)
    monkeypatch.setattr(training.run, "time", clock)
    with run.stop:
        simclr.train(cfg, learner, images, None, run)
    assert len(run.pending) == 3 and run.step_metrics == []
