"""Pretraining by really running it: what the optimizer, the views and the files are."""

import copy
import json
import math
import time
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import slowed
from omegaconf import OmegaConf
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import models
import simclr
from evaluation import features
from images import datasets
from models import SimCLR, nt_xent
from system.checkpoint import load_checkpoint
from system.device import precision_name, select_precision
from system.errors import ConfigError, UserError
from training import optim, record
from training.metrics import alignment, uniformity
from training.record import RunRecord


@pytest.fixture
def rates(monkeypatch):
    """The learning rate of every optimizer step, read where the optimizer uses it."""
    used = []
    step = torch.optim.SGD.step

    def record(self, *args, **kwargs):
        used.append(self.param_groups[0]["lr"])
        return step(self, *args, **kwargs)

    monkeypatch.setattr(torch.optim.SGD, "step", record)
    return used


@pytest.fixture
def run(thin, toy, tmp_path):
    """run("epochs=3", …): pretrain at toy size; returns the run folder."""
    folders = []

    def pretrain(*overrides):
        folders.append(tmp_path / f"run{len(folders)}")
        folders[-1].mkdir()
        simclr.pretrain(toy(*overrides), folders[-1])
        return folders[-1]

    return pretrain


@pytest.fixture
def batches(monkeypatch):
    """(images given to the augmentation, views it returned) for every step."""
    seen = []
    random_views = simclr.random_views

    def record(images, *args):
        views = random_views(images, *args)
        seen.append((images, views))
        return views

    monkeypatch.setattr(simclr, "random_views", record)
    return seen


def metrics(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_the_optimizer_uses_the_cosine_from_learning_rate_to_min_learning_rate(run, rates):
    folder = run("epochs=3", "learning_rate=0.6")
    total = 3 * 3  # 24 images, batch 8
    expected = [
        0.001 + 0.599 * (1 + math.cos(math.pi * step / (total - 1))) / 2 for step in range(total)
    ]
    assert rates == pytest.approx(expected)
    assert (rates[0], rates[-1]) == pytest.approx((0.6, 0.001))
    assert [line["learning_rate"] for line in metrics(folder)] == rates[2::3]


def test_the_same_seed_gives_the_same_run_to_the_last_bit(run):
    first, second, other = run(), run(), run("seed=43")
    timed = "views_per_second", "seconds"
    lines = [
        [{key: line[key] for key in line if key not in timed} for line in metrics(folder)]
        for folder in (first, second, other)
    ]
    assert lines[0] == lines[1] != lines[2]
    weights = [
        load_checkpoint(folder / "simclr_resnet18_epoch2.pt")["model"]
        for folder in (first, second, other)
    ]
    assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0])
    assert not torch.equal(weights[0]["enc.conv1.weight"], weights[2]["enc.conv1.weight"])


def test_initial_weights_and_views_both_follow_from_the_seed(run, batches, monkeypatch):
    weights = []
    make = simclr.make_optimizer

    def record(name, parameters, *args, **kwargs):
        parameters = list(parameters)
        weights.append(parameters[0].detach().clone())
        return make(name, parameters, *args, **kwargs)

    monkeypatch.setattr(simclr, "make_optimizer", record)
    run("epochs=1")
    run("epochs=1", "seed=43")
    assert not torch.equal(*weights)
    assert not torch.equal(batches[0][1], batches[3][1])


def test_metrics_have_one_line_an_epoch(run):
    lines = metrics(run("epochs=3"))
    assert [line["epoch"] for line in lines] == [1, 2, 3]
    assert [line["step"] for line in lines] == [3, 6, 9]
    for line in lines:
        assert set(line) == {
            "epoch", "step", "loss", "contrastive_accuracy", "alignment", "uniformity", "z_std",
            "gradient_norm", "knn_acc", "learning_rate", "view_size", "views_per_second", "seconds",
        }  # fmt: skip
        assert 0 < line["loss"] < 2 * math.log(15) and 0 <= line["contrastive_accuracy"] <= 1
        assert line["views_per_second"] * line["seconds"] == pytest.approx(2 * 8 * 3)


def test_checkpoints_every_log_interval_and_at_the_end_as_plain_data(run, toy):
    folder = run("epochs=5", "log_interval=2", "projection_dim=16", "hidden_dim=32")
    names = [f"simclr_resnet18_{name}.pt" for name in ("epoch2", "epoch4", "epoch5", "last")]
    names.append("simclr_resnet18_previous.pt")
    assert sorted(path.name for path in folder.glob("*.pt*")) == names
    saved = torch.load(folder / names[2], weights_only=True)
    cfg = toy("epochs=5", "log_interval=2", "projection_dim=16", "hidden_dim=32", "precision=fp32")
    assert set(saved) == {"model", "config", "epoch"} and saved["epoch"] == 5
    assert {**saved["config"], "precision": "fp32"} == dict(cfg)
    SimCLR("resnet18", 16, 32).load_state_dict(saved["model"], strict=True)


def test_steps_on_one_batch_lower_the_loss_below_that_of_a_collapsed_encoder(device):
    torch.manual_seed(0)
    model = SimCLR().to(device)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    x = torch.rand(8, 3, 8, 8)
    views = torch.cat([x, x + 0.1 * torch.rand_like(x)]).to(device)
    scaler = torch.amp.GradScaler(device.type, enabled=False)
    steps = [
        simclr.train_step(model, optimizer, scaler, views, 0.5, torch.float32) for _ in range(12)
    ]
    assert steps[-1]["loss"] < math.log(15) - 0.5 and steps[-1]["contrastive_accuracy"] == 1
    assert not any(value.requires_grad for value in steps[0].values())


def test_rows_i_and_n_plus_i_are_two_different_views_of_one_image(run, batches):
    run("image_size=12")
    for images, views in batches:
        assert images.shape == views.shape == (16, 3, 12, 12)
        assert torch.equal(images[:8], images[8:])
        assert (views[:8] - views[8:]).abs().amax(dim=(1, 2, 3)).min() > 0.01


def test_the_loss_gets_the_two_views_of_an_image_in_the_same_row(run, batches, monkeypatch):
    seen, outputs = [], []
    embed = SimCLR.forward

    def loss(z1, z2, temperature, *processes):
        seen.append((z1, z2, temperature))
        return nt_xent(z1, z2, temperature)

    monkeypatch.setattr(simclr, "nt_xent", loss)

    def forward(self, x):
        outputs.append((x, embed(self, x)))
        return outputs[-1][1]

    monkeypatch.setattr(SimCLR, "forward", forward)
    run("epochs=1", "temperature=0.3", "precision=fp32")
    for (x, (_, z)), (z1, z2, temperature), (_, views) in zip(outputs, seen, batches, strict=True):
        assert torch.equal(x, views) and temperature == 0.3
        assert torch.equal(z1, z[:8]) and torch.equal(z2, z[8:])


def test_no_two_steps_draw_the_same_numbers(run, monkeypatch):
    drawn = []
    draw = simclr.draw
    monkeypatch.setattr(simclr, "draw", lambda *args: drawn.append(draw(*args)) or drawn[-1])
    run("epochs=3")
    assert len({tuple(u.flatten().tolist()) for u in drawn}) == 9


def test_an_epoch_sees_each_image_once_in_a_new_order(run, batches):
    run()
    epochs = [torch.cat([images[:8] for images, _ in batches[i : i + 3]]) for i in (0, 3)]
    rows = [list(map(tuple, epoch.flatten(1).tolist())) for epoch in epochs]
    assert len(set(rows[0])) == 24 and set(rows[0]) == set(rows[1]) and rows[0] != rows[1]


def test_the_config_reaches_the_augmentation(run, monkeypatch):
    seen = []
    monkeypatch.setattr(
        simclr,
        "random_views",
        lambda images, u, size, *args: (
            seen.append((size, *args)) or torch.rand(len(images), 3, size, size)
        ),
    )
    run(
        "image_size=21",
        "crop_scale=[0.3,0.7]",
        "flip_probability=0.1",
        "color_strength=0.7",
        "grayscale_probability=0.4",
        "blur_probability=0.3",
    )
    assert set(seen) == {(21, (0.3, 0.7), 0.1, 0.7, 0.4, 0.3)}


def test_the_config_reaches_the_optimizer(run, monkeypatch):
    groups = []
    step = torch.optim.SGD.step
    monkeypatch.setattr(
        torch.optim.SGD,
        "step",
        lambda self, *args: groups.append(self.param_groups[0]) or step(self, *args),
    )
    run("epochs=1", "momentum=0.5", "weight_decay=0.01")
    assert {(g["momentum"], g["weight_decay"], g["nesterov"]) for g in groups} == {
        (0.5, 0.01, True)
    }


def test_only_the_pretraining_split_is_read(run, monkeypatch):
    splits = []
    load_split = datasets.load_split
    monkeypatch.setattr(
        datasets, "load_split", lambda *args: splits.append(args[2:]) or load_split(*args)
    )
    run("workers=3")
    assert splits == [("pretrain", 8, 3)]


@pytest.mark.parametrize("batch_size", [2, 5, 24])
def test_any_batch_size_up_to_the_training_set_runs(run, batch_size):
    lines = metrics(run(f"batch_size={batch_size}", "epochs=1"))
    assert lines[0]["step"] == 24 // batch_size and math.isfinite(lines[0]["loss"])


def test_a_batch_larger_than_the_training_set_is_refused(toy, tmp_path):
    with pytest.raises(ConfigError, match=r"batch_size=25: must be an integer from 2 to 24"):
        simclr.pretrain(toy("batch_size=25"), tmp_path)
    assert not list(tmp_path.glob("*.pt")) and not (tmp_path / "metrics.jsonl").exists()


@pytest.mark.parametrize("recompute", ["activation_checkpointing=true", "micro_batch_size=4"])
def test_compiling_what_can_not_be_compiled_is_refused_before_anything_is_read(toy, recompute):
    with pytest.raises(ConfigError, match="compile=true: must be false or auto with activation_ch"):
        toy("compile=true", recompute, "data_dir=nowhere")
    toy("compile=auto", recompute)


def test_an_epoch_waits_for_no_value_of_a_step(thin, device, toy, tmp_path, monkeypatch):
    """Logging costs no sync a step: the metrics are copied without waiting, and read later."""
    cfg = toy("precision=fp32", "epochs=1", "knn_interval=0")
    training = simclr.start_training(cfg, device, 3)
    images = torch.randint(0, 256, (24, 3, 8, 8), dtype=torch.uint8).to(device)
    record = RunRecord(tmp_path, OmegaConf.to_container(cfg), "images", 3)
    steps = []
    monkeypatch.setattr(
        record,
        "end_epoch",
        lambda training, *line: steps.extend(training.step_metrics) or training.end_epoch({}),
    )
    with record.recording(training, None, start_over=False), no_sync(device):
        simclr.train(cfg, training, images, None, record)
    assert len(steps) == 3 and all(isinstance(s["loss"], float) for s in steps)


def test_a_step_reports_its_gradient_norm_unscaled_and_the_geometry_of_z(thin, toy):
    for precision in ("fp32", "fp16"):
        cfg = toy(f"precision={precision}", "projection_dim=4", "hidden_dim=8")
        training = simclr.start_training(cfg, torch.device("cpu"), 2)
        model, optimizer, scaler = training.model, training.optimizer, training.scaler
        plain = copy.deepcopy(model)
        views = torch.rand(8, 3, 8, 8)
        found = simclr.train_step(model, optimizer, scaler, views, 0.5, torch.float32)
        z1, z2 = plain(views)[1].chunk(2)
        nt_xent(z1, z2)[0].backward()
        for name, value in (("alignment", alignment(z1, z2)), ("uniformity", uniformity(z1))):
            torch.testing.assert_close(found[name], value, rtol=1e-3, atol=1e-5)
        norm = torch.cat([weight.grad.flatten() for weight in plain.parameters()]).norm()
        torch.testing.assert_close(found["gradient_norm"], norm, rtol=1e-2, atol=0)


def test_knn_in_training_never_sees_the_test_set_and_changes_nothing(run, monkeypatch):
    """Every knn_interval epochs and at the end: a tenth of the training images asks the others."""
    seen = []
    knn = features.knn_scores

    def record(bank, labels, queries, classes):
        seen.append(((*bank.shape,), labels.bincount().tolist(), (*queries.shape,), classes))
        return knn(bank, labels, queries, classes)

    monkeypatch.setattr(features, "knn_scores", record)
    narrow = "epochs=5", "projection_dim=16"  # z is not as wide as h
    with_knn, without = run(*narrow, "knn_interval=2"), run(*narrow, "knn_interval=0")
    assert seen == [((21, 128), [7, 7, 7], (3, 128), 3)] * 3  # h, not z
    lines = metrics(with_knn)
    assert [line["knn_acc"] is None for line in lines] == [True, False, True, False, False]
    assert {line["knn_acc"] for line in metrics(without)} == {None}
    a, b = (load_checkpoint(f / "simclr_resnet18_epoch5.pt")["model"] for f in (with_knn, without))
    assert all(torch.equal(a[key], b[key]) for key in a)


def test_knn_is_at_the_full_size_whatever_the_views(run, monkeypatch):
    sizes = []
    monkeypatch.setattr(simclr, "held_out_knn", lambda *args: sizes.append(args[4]) or 0.5)
    run("view_sizes=[[8,0.5],[12,0.5]]", "image_size=16", "epochs=2", "knn_interval=1")
    assert sizes == [16, 16]


def test_knn_takes_512_images_at_a_time_however_large_the_batch(run, write_images, tmp_path):
    """Beside what a CUDA graph keeps there may be no room for more."""
    data = write_images(tmp_path / "many", train=90, test=1)
    sizes = []

    def record(*args: object) -> float:
        sizes.append(args[5])
        return 0.5

    for batch_size in (20, 260):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(simclr, "held_out_knn", record)
            run(f"data_dir={data}", f"batch_size={batch_size}", "epochs=1")
    assert sizes == [40, 512]


def test_seconds_are_those_of_the_steps_without_knn_and_saving(run, monkeypatch):
    clock = [0.0]
    takes = partial(slowed, clock)
    monkeypatch.setattr(simclr, "train_step", takes(1, simclr.train_step))
    monkeypatch.setattr(simclr, "held_out_knn", takes(100, simclr.held_out_knn))
    monkeypatch.setattr(record, "save_state", takes(1000, record.save_state))
    timer = SimpleNamespace(perf_counter=lambda: clock[0], monotonic=time.monotonic)
    monkeypatch.setattr(record, "time", timer)
    lines = metrics(run("epochs=3", "knn_interval=1", "save_minutes=0"))
    assert [line["seconds"] for line in lines] == [3, 3, 3]


def test_the_held_out_tenth_is_the_same_for_every_seed(run, monkeypatch):
    seen = []
    monkeypatch.setattr(
        simclr, "held_out_knn", lambda enc, split, bank, queries, *args: seen.append(queries) or 0.5
    )
    run("epochs=1", "seed=1"), run("epochs=1", "seed=2")
    assert torch.equal(*seen)


def test_one_image_a_class_can_be_pretrained_on_without_knn(thin, toy, write_images, tmp_path):
    data = f"data_dir={write_images(tmp_path / 'few', classes=4, train=1)}"
    with pytest.raises(UserError, match="none can be held out: knn_interval=0 leaves kNN out"):
        simclr.pretrain(toy(data, "batch_size=4"), tmp_path)
    simclr.pretrain(toy(data, "batch_size=4", "knn_interval=0"), tmp_path)


def test_unlabelled_images_are_judged_by_the_labelled_training_images(run, monkeypatch):
    """STL-10: pretraining images without labels, of which kNN can say nothing."""
    splits, seen = [], []
    load = datasets.load_split

    def unlabelled(dataset, data_dir, split, *args):
        splits.append(split)
        found = load(dataset, data_dir, split, *args)
        return found._replace(labels=found.labels * 0 - 1) if split == "pretrain" else found

    monkeypatch.setattr(datasets, "load_split", unlabelled)
    monkeypatch.setattr(
        simclr, "held_out_knn", lambda enc, split, *args: seen.append(split.labels.tolist()) or 0.5
    )
    assert metrics(run("epochs=1"))[0]["knn_acc"] == 0.5
    assert splits == ["pretrain", "train"] and set(seen[0]) == {0, 1, 2}


def test_tensorboard_finds_the_same_values(run):
    folder = run("epochs=2", "knn_interval=2")
    found = EventAccumulator(str(folder)).Reload()
    lines = metrics(folder)
    assert set(found.Tags()["scalars"]) == set(lines[0]) - {"epoch"}
    for name in ("loss", "alignment", "uniformity"):
        assert [(e.step, e.value) for e in found.Scalars(name)] == [
            (line["epoch"], pytest.approx(line[name])) for line in lines
        ]
    assert [event.step for event in found.Scalars("knn_acc")] == [2]


def test_the_resolved_config_is_beside_the_run(run, toy):
    """`precision` too is what `auto` stands for."""
    found = OmegaConf.load(run("temperature=0.2") / "config.yaml")
    precision = precision_name(select_precision("auto", torch.device("cpu")))
    assert found == toy("temperature=0.2", f"precision={precision}")


def test_views_grow_over_the_run_as_view_sizes_says(run, batches):
    folder = run("view_sizes=[[8,0.5],[12,0.25],[16,0.25]]", "image_size=16", "epochs=4")
    assert [views.shape[-1] for _, views in batches] == [8] * 6 + [12] * 3 + [16] * 3
    assert [line["view_size"] for line in metrics(folder)] == [8, 8, 12, 16]


@pytest.mark.parametrize(
    ("name", "dtype"), [("fp32", torch.float32), ("bf16", torch.bfloat16), ("fp16", torch.float16)]
)
def test_the_model_computes_in_the_precision_and_the_loss_in_float32(
    device, run, monkeypatch, name, dtype
):
    seen = []

    def loss(z1, z2, temperature, *processes):
        value, accuracy = nt_xent(z1, z2, temperature)
        seen.append((z1.dtype, value.dtype))
        return value, accuracy

    monkeypatch.setattr(simclr, "nt_xent", loss)
    folder = run(f"precision={name}", "epochs=1")
    assert set(seen) == {(dtype, torch.float32)}
    weights = load_checkpoint(folder / "simclr_resnet18_epoch1.pt")["model"].values()
    assert all(w.dtype == torch.float32 for w in weights if w.is_floating_point())


def test_float16_gradients_are_scaled_and_a_step_that_overflows_is_left_out(
    device, thin, toy, monkeypatch
):
    cfg = toy("precision=fp16", "projection_dim=4", "hidden_dim=8")
    training = simclr.start_training(cfg, device, 2)
    model, optimizer, scaler = training.model, training.optimizer, training.scaler
    optim.set_learning_rate(optimizer, 0.1)
    plain = copy.deepcopy(model)
    before = [weight.detach().clone() for weight in model.parameters()]
    views = torch.rand(8, 3, 8, 8, device=device)
    scale = scaler.get_scale()

    def step():
        simclr.train_step(model, optimizer, scaler, views, 0.5, torch.float32)

    with monkeypatch.context() as patch:
        patch.setattr(
            simclr, "nt_xent", lambda *args: (nt_xent(*args)[0] * math.inf, nt_xent(*args)[1])
        )
        step()
    assert all(map(torch.equal, before, model.parameters())) and scaler.get_scale() == scale / 2
    step()  # as if the other had not been: no momentum of it, and the scale taken out again
    nt_xent(*plain(views)[1].chunk(2))[0].backward()
    for old, new, weight in zip(before, model.parameters(), plain.parameters(), strict=True):
        first = 0.1 * (1 + cfg.momentum) * (weight.grad + cfg.weight_decay * old)
        torch.testing.assert_close(new.detach(), old - first, atol=1e-6, rtol=1e-4)


def test_float16_alone_gets_a_scaler(thin, toy):
    for name, enabled in (("fp32", False), ("bf16", False), ("fp16", True)):
        training = simclr.start_training(toy(f"precision={name}"), torch.device("cpu"), 6)
        assert training.scaler.is_enabled() == enabled
        assert training.optimizer.param_groups[0]["fused"] != enabled


def test_model_and_optimizer_are_laid_out_for_speed(thin, toy):
    training = simclr.start_training(toy(), torch.device("cpu"), 6)
    last = torch.channels_last
    assert training.model.enc.layer1[0].conv1.weight.is_contiguous(memory_format=last)
    assert training.model.enc.conv1(torch.rand(2, 3, 8, 8)).is_contiguous(memory_format=last)
    assert training.optimizer.param_groups[0]["fused"]


class NoCopies(TorchFunctionMode):
    """Refuses a tensor made of Python numbers, which a GPU would have to be waited for."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        assert function not in (torch.tensor, torch.as_tensor, torch.from_numpy), function
        return function(*args, **(kwargs or {}))


class NoSync(TorchDispatchMode):
    """Refuses a value that is read, and a shape that depends on one."""

    WAITS = "_local_scalar_dense", "nonzero", "masked_select", "unique", "equal"

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        assert not name.startswith(self.WAITS), name
        if name in ("index", "index_put_", "index_put"):
            assert all(i is None or i.dtype != torch.bool for i in args[1]), "a mask as index"
        return function(*args, **(kwargs or {}))


@contextmanager
def no_sync(device):
    """NoSync, which sees each operation; on a GPU torch's own check, which sees what waits."""
    if device.type != "cuda":
        with NoSync():
            yield
        return
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("backbone", ["resnet18", "resnet50", "resnext101_32x8d"])
@pytest.mark.parametrize("recompute", ["true", "false"])
def test_a_whole_step_runs_on_the_meta_device(toy, backbone, recompute):
    """There are no values there: static shapes, no sync with the device, no tensor left on the
    CPU, since each of these would be an error."""
    meta = torch.device("meta")
    cfg = toy(
        f"backbone={backbone}", f"activation_checkpointing={recompute}", "precision=fp32",
        "batch_size=6",
    )  # fmt: skip
    with meta:
        model = SimCLR(cfg.backbone, activation_checkpointing=cfg.activation_checkpointing)
        images = torch.empty(30, 3, 32, 32, dtype=torch.uint8)
        order = torch.randperm(30)
        u = torch.rand(36, 12)
    optimizer = simclr.make_optimizer("sgd", model.parameters(), 0.9, 1e-6)
    optim.set_learning_rate(optimizer, 0.1)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    with NoCopies(), NoSync():
        batch = images[order[:6]].repeat(2, 1, 1, 1)
        views = simclr.random_views(batch, u, 24, (0.08, 1.0), 0.5, 0.5, 0.2)
        found = simclr.train_step(model, optimizer, scaler, views, 0.5, torch.float32)
    assert views.shape == (12, 3, 24, 24)
    assert {t.device for t in (views, *found.values(), *model.parameters())} == {meta}
    assert all(weight.grad.device == meta for weight in model.parameters())


def test_recomputation_is_passed_on_and_gives_the_same_run(device, same_convolutions, run, toy):
    plain, recomputed = run(), run("activation_checkpointing=true")
    training = simclr.start_training(toy("activation_checkpointing=true"), device, 1)
    assert "forward" in vars(training.model.enc.layer1[0])
    losses = [[line["loss"] for line in metrics(folder)] for folder in (plain, recomputed)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def no_batch_norm(model):
    """The same network with batch norm replaced by a constant scale: no image sees another."""
    for block in list(model.modules()):
        for name, child in block.named_children():
            if isinstance(child, torch.nn.BatchNorm2d):
                setattr(block, name, torch.nn.Identity())
    return model


def gradients(model, views, micro_batch_size, precision=torch.float32):
    model.micro_batch_size = micro_batch_size
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    scaler = torch.amp.GradScaler(views.device.type, enabled=False)
    found = simclr.train_step(model, optimizer, scaler, views, 0.5, precision)
    return found, [weight.grad.clone() for weight in model.parameters()]


@pytest.mark.usefixtures("same_convolutions")
@pytest.mark.parametrize("micro_batch_size", [1, 2, 3, 6])
def test_without_batch_norm_micro_batches_are_the_plain_step(device, thin, micro_batch_size):
    """Loss, gradients and all that is reported: the negatives are those of the whole batch."""
    torch.manual_seed(0)
    model = no_batch_norm(SimCLR(projection_dim=8, hidden_dim=16)).to(device)
    views = torch.rand(12, 3, 8, 8).to(device)
    whole, expected = gradients(model, views, None)
    parts, found = gradients(model, views, micro_batch_size)
    for name in whole:
        torch.testing.assert_close(parts[name], whole[name], rtol=1e-4, atol=1e-6)
    scale = max(gradient.abs().max() for gradient in expected).item()
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5 * scale)


def test_with_batch_norm_each_part_has_its_own_statistics_counted_once(thin):
    """As on several GPUs without synchronised batch norm: both views of a part's images go
    through the same network; here with plain autograd through all parts at once."""
    torch.manual_seed(0)
    model = SimCLR(projection_dim=8, hidden_dim=16)
    plain = copy.deepcopy(model)
    views = torch.rand(12, 3, 8, 8)
    found, gradient = gradients(model, views, 2)
    z = [plain(views[[i, i + 1, i + 6, i + 7]])[1].chunk(2) for i in (0, 2, 4)]
    loss, _ = nt_xent(*(torch.cat(half) for half in zip(*z, strict=True)), 0.5)
    loss.backward()
    torch.testing.assert_close(found["loss"], loss.detach())
    scale = max(weight.grad.abs().max() for weight in plain.parameters()).item()
    for a, weight in zip(gradient, plain.parameters(), strict=True):
        torch.testing.assert_close(a, weight.grad, rtol=1e-4, atol=1e-5 * scale)
    for a, b in zip(model.buffers(), plain.buffers(), strict=True):
        torch.testing.assert_close(a, b)
    assert model.enc.bn1.num_batches_tracked == 3


def test_micro_batches_and_recomputed_blocks_go_together(thin):
    torch.manual_seed(0)
    model = SimCLR(projection_dim=8, hidden_dim=16)
    recomputed = SimCLR(projection_dim=8, hidden_dim=16, activation_checkpointing=True)
    recomputed.load_state_dict(model.state_dict())
    views = torch.rand(12, 3, 8, 8)
    (_, a), (_, b) = (gradients(m, views, 2) for m in (model, recomputed))
    for one, other in zip(a, b, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    for one, other in zip(model.buffers(), recomputed.buffers(), strict=True):
        torch.testing.assert_close(one, other)


def test_the_config_reaches_micro_batches_lars_and_warm_up(run, rates, monkeypatch):
    sizes, optimizers = [], []
    split, make = models.embed_in_micro_batches, simclr.make_optimizer
    monkeypatch.setattr(
        models, "embed_in_micro_batches", lambda *args: sizes.append(args[3]) or split(*args)
    )
    monkeypatch.setattr(
        simclr, "make_optimizer", lambda *args: optimizers.append(make(*args)) or optimizers[-1]
    )
    folder = run("micro_batch_size=4", "optimizer=lars", "warmup_epochs=1", "epochs=3")
    assert sizes == [4] * 9 and type(optimizers[0]).__name__ == "LARS"
    peak = optimizers[0].param_groups[0]["weight_decay"], metrics(folder)[0]["learning_rate"]
    assert peak == (1e-6, pytest.approx(0.3 * 8 / 256))  # the last step of the warm-up


def test_compile_takes_the_model_and_the_views(thin, toy, monkeypatch):
    compiled = []

    def compile_function(f, **options):
        if options:  # not the trial of a trivial function
            compiled.append(f)
        return f

    monkeypatch.setattr(torch, "compile", compile_function)
    simclr.start_training(toy("compile=false"), torch.device("cpu"), 10**9)
    assert compiled == []
    for overrides, enough in (
        (["image_size=32"], 12_500),  # · 16 views a step: 200,000
        (["image_size=16"], 50_000),  # of a quarter of the work
        (["view_sizes=[[16,0.5],[32,0.5]]"], 100_000),  # each size is compiled for itself
    ):
        for steps, expected in ((enough - 1, False), (enough, True)):
            training = simclr.start_training(toy(*overrides), torch.device("cpu"), steps)
            assert training.compiled == expected
    long = 10**9
    for override in ("activation_checkpointing=true", "micro_batch_size=4"):
        training = simclr.start_training(toy(override), torch.device("cpu"), long)
        assert not training.compiled
    with monkeypatch.context() as patch:
        patch.setattr(simclr.distributed, "world_size", lambda: 2)
        patch.setattr(simclr.distributed, "wrap_ddp", lambda model, sync: model)
        assert not simclr.start_training(toy(), torch.device("cpu"), long).compiled
    compiled.clear()
    training = simclr.start_training(toy("compile=true"), torch.device("cpu"), 1)
    forward = SimCLR.forward.__get__(training.model)
    assert compiled == [forward, simclr.random_views] and training.compiled


def test_main_returns_the_knn_accuracy_for_hydra_s_sweepers(thin, toy, tmp_path, monkeypatch):
    monkeypatch.setattr(simclr, "run_directory", lambda: tmp_path)
    found = simclr.main.__wrapped__(toy("epochs=1"))
    assert found == metrics(tmp_path)[-1]["knn_acc"] and 0 <= found <= 1


def test_the_end_line_names_loss_and_accuracy_of_a_collapsed_encoder(caplog):
    caplog.set_level("INFO")
    line = {"epoch": 9, "loss": 5.1787, "contrastive_accuracy": 0.866, "knn_acc": None}
    config = {"batch_size": 512, "backbone": "resnet18"}
    assert record.log_summary(Path("run"), config, [{}, line]) == line
    assert "loss 5.1787 (collapsed: 6.9305), contrastive accuracy 86.6% (collapsed: 0.1%);" in (
        caplog.text
    )
    z = torch.ones(2, 512, 8)  # log(2N - 1), as the loss itself gives
    assert f"{nt_xent(*z)[0].item():.4f}" == "6.9305"
