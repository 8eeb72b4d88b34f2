"""What is not finite ends a run, and is never saved nor evaluated."""

import math
from types import SimpleNamespace

import pytest
import torch
from conftest import slowed
from test_resume import LAST, STATE, differences, outcome

import simclr
import training.run
from system.checkpoint import load_checkpoint
from system.errors import UserError


@pytest.fixture
def cfg(thin, toy):
    """cfg("epochs=3", …): a config that saves its state after every epoch."""
    small = ["projection_dim=8", "hidden_dim=16", "knn_interval=0", "epochs=3", "save_minutes=0"]
    return lambda *overrides: toy(*small, *overrides)


def spoil(monkeypatch, k, **values):
    """The k-th step returns these metrics."""
    train_step, count = simclr.train_step, []

    def spoiled(*args):
        count.append(1)
        found = train_step(*args)
        changed = {name: torch.tensor(value) for name, value in values.items()}
        return {**found, **changed} if len(count) == k else found

    monkeypatch.setattr(simclr, "train_step", spoiled)
    return count


@pytest.mark.parametrize(
    ("step", "values"),
    [(1, {"loss": math.nan}), (5, {"gradient_norm": math.inf}), (6, {"loss": math.inf})],
    ids=["first step", "middle of an epoch", "an epoch's last"],
)
def test_a_step_that_is_not_finite_ends_the_run_and_is_never_saved(
    cfg, tmp_path, monkeypatch, step, values
):
    """Within the epoch; the same command goes on from the last state, as if it was an accident."""
    for name in ("whole", "run"):
        (tmp_path / name).mkdir()
    simclr.pretrain(cfg(), tmp_path / "whole")
    with monkeypatch.context() as patch:
        count = spoil(patch, step, **values)
        remedy = f"in step {step}, not saved: start over with resume=false, .* lower learning_rate"
        with pytest.raises(UserError, match=remedy):
            simclr.pretrain(cfg("log_interval=1"), tmp_path / "run")
    epochs = (step - 1) // 3
    assert len(count) == 3 * (epochs + 1) and (
        load_checkpoint(tmp_path / "run" / LAST, STATE)["step"] == 3 * epochs
    )
    assert len(list((tmp_path / "run").glob("*epoch*.pt"))) == epochs
    simclr.pretrain(cfg(), tmp_path / "run")
    assert differences(outcome(tmp_path / "run"), outcome(tmp_path / "whole")) == []


def test_a_step_that_is_not_finite_ends_a_long_epoch_within_a_second(cfg, tmp_path, monkeypatch):
    count = spoil(monkeypatch, 2, loss=math.nan)
    clock = [0.0]
    monkeypatch.setattr(simclr, "train_step", slowed(clock, 0.6, simclr.train_step))
    timer = SimpleNamespace(perf_counter=lambda: clock[0], monotonic=lambda: clock[0])
    monkeypatch.setattr(training.run, "time", timer)
    with pytest.raises(UserError, match=r"loss nan, gradient norm .* in step 2"):
        simclr.pretrain(cfg("batch_size=4"), tmp_path)
    assert len(count) == 2


def test_a_gradient_that_overflows_in_float16_is_no_failure(cfg, tmp_path, monkeypatch):
    spoil(monkeypatch, 2, gradient_norm=math.inf)
    assert simclr.pretrain(cfg("precision=fp16", "epochs=1"), tmp_path)["epoch"] == 1


def test_a_checkpoint_that_is_not_finite_is_one_line_of_each_command(thin, call, toy, trained):
    saved, checkpoint = load_checkpoint(trained / "simclr_resnet18_epoch2.pt"), "bad.pt"
    saved["model"]["enc.bn1.bias"][0] = torch.nan
    torch.save(saved, checkpoint)
    data = ["dataset=folder", "data_dir=images", "image_size=8", "device=cpu", "batch_size=8"]
    for command in (
        ("simclr_lin.py", f"checkpoint={checkpoint}"),
        ("simclr.py", f"init={checkpoint}", "epochs=1"),
    ):
        code, error = call(*command, *data, "hydra.run.dir=out")
        assert code == 1 and error.startswith("error: ") and error.count("\n") == 1, error
        assert "bn1.bias has values that are not finite" in error
