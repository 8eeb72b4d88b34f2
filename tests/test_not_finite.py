"""What is not finite ends a run, is never saved, and is never a result."""

import math
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import slowed
from test_resume import LAST, differences, outcome

import simclr
import simclr_lin
import training.run
from evaluation import protocols
from evaluation.protocols import Result
from system.checkpoint import load_checkpoint
from system.errors import UserError
from training.state import STATE


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
        remedy = f"in step {step}, which is not saved: .* resume=false and a lower learning_rate"
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


@pytest.fixture
def checkpoint(thin, trained, tmp_path):
    """A copy of the checkpoint of a toy run."""
    return Path(shutil.copy(trained / "simclr_resnet18_epoch2.pt", tmp_path))


@pytest.mark.parametrize("protocol", protocols.RUN)
def test_scores_that_are_not_finite_are_no_result_whatever_the_protocol(
    toy, checkpoint, tmp_path, monkeypatch, protocol
):
    scores = torch.full((9, 3), -torch.inf if protocol == "knn" else torch.nan)
    monkeypatch.setitem(protocols.RUN, protocol, lambda task: Result(scores, {}))
    name = protocol.removeprefix("weighted_")
    with pytest.raises(UserError, match=f"not finite: scores of {protocol}, checkpoint, seed 42"):
        simclr_lin.evaluate(toy(f"protocols=[{name}]", "finetune_views=1"), checkpoint, tmp_path)
    assert protocol == "weighted_knn" or not (tmp_path / "results.json").exists()


def test_candidates_of_which_none_is_finite_are_no_result(toy, checkpoint, tmp_path):
    cfg = toy("protocols=[linear_clean]", "finetune_learning_rate=[1e38,1e37]", "precision=fp32")
    with pytest.raises(UserError, match="not finite: scores of linear_clean"):
        simclr_lin.evaluate(cfg, checkpoint, tmp_path)


def test_predictions_of_a_layer_that_diverged_are_not_written(toy, checkpoint, tmp_path):
    overrides = f"predict={tmp_path}/images/test", "finetune_learning_rate=1e38", "precision=fp32"
    with pytest.raises(UserError, match="not finite: scores of linear"):
        simclr_lin.predict(toy(*overrides), checkpoint, tmp_path)
    assert not (tmp_path / "predictions.csv").exists()


def test_a_checkpoint_that_is_not_finite_is_one_line_of_each_command(call, toy, checkpoint):
    saved = torch.load(checkpoint, weights_only=True)
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
