"""Diagnostics against their definitions, collapse, and a TensorBoard that does not work."""

import json
import math
import sys
from types import ModuleType

import pytest
import torch
from torch.utils.tensorboard import SummaryWriter

import simclr
from models import nt_xent
from training.metrics import (
    alignment,
    epoch_means,
    is_collapsed,
    spread,
    summary,
    uniformity,
    warn_of_collapse,
)


def test_alignment_and_uniformity_are_wang_and_isolas():
    """Eq. 4 and 5 of arXiv 2005.10242, pair by pair in float64."""
    z1, z2 = torch.randn(2, 7, 5, generator=torch.Generator().manual_seed(0))
    a, b = ([row / row.norm() for row in z.double()] for z in (z1, z2))
    distances = [(x - y).norm() ** 2 for x, y in zip(a, b, strict=True)]
    assert alignment(z1, 3 * z2).item() == pytest.approx(sum(distances).item() / 7, rel=1e-5)
    pairs = [math.exp(-2 * (a[i] - a[j]).norm() ** 2) for i in range(7) for j in range(i)]
    assert uniformity(5 * z1).item() == pytest.approx(math.log(sum(pairs) / 21), rel=1e-5)


def test_alignment_and_uniformity_at_their_ends():
    z = torch.ones(4, 3)
    assert alignment(z, 2 * z) == 0 and alignment(z, -z) == pytest.approx(4)
    assert uniformity(z) == pytest.approx(0, abs=1e-5)
    assert uniformity(torch.tensor([[1.0, 0], [-1, 0]])) == pytest.approx(-8)


def test_the_spread_of_z_is_simsiams():
    z = torch.randn(4096, 16, generator=torch.Generator().manual_seed(0))
    assert spread(z).item() == pytest.approx(1 / 4, rel=0.01) and spread(4 * z) == spread(z)
    assert spread(z[:1].expand(8, 16)).item() == pytest.approx(0, abs=1e-6)


def test_half_precision_is_computed_in_float32_and_nothing_gets_a_gradient():
    z = torch.randn(8, 4, dtype=torch.bfloat16, requires_grad=True)
    for value in (alignment(z, z + 1), uniformity(z), spread(z)):
        assert value.dtype == torch.float32 and not value.requires_grad


def test_epoch_means_leave_out_gradients_that_overflowed():
    steps = [
        {"loss": 1.0, "gradient_norm": 2.0},
        {"loss": 3.0, "gradient_norm": math.inf},
        {"loss": 5.0, "gradient_norm": 4.0},
    ]
    assert epoch_means(steps) == {"loss": 3, "gradient_norm": 3}
    assert epoch_means(steps[1:2])["gradient_norm"] is None


def test_collapsed_is_a_small_spread_with_the_accuracy_of_chance_and_is_said_once(config, caplog):
    cfg = config("batch_size=64", "projection_dim=16", "views=4")
    chance = 1 / (4 * 63 + 1)
    for z_std, accuracy, expected in (
        (0.02, chance, True), (0.02, 3 * chance, False), (0.05, chance, False), (0.25, 0.5, False),
    ):  # fmt: skip
        line = {"z_std": z_std, "contrastive_accuracy": accuracy}
        assert is_collapsed(line, cfg) == expected
    fine, flat = ({"z_std": z, "contrastive_accuracy": chance} for z in (0.25, 0.02))
    warnings = []
    for n in range(1, 6):
        warn_of_collapse([fine, flat, flat, fine, flat][:n], cfg)
        warnings.append(len(caplog.records))
    assert warnings == [0, 1, 1, 1, 1] and "in epoch 2 all images have nearly the" in caplog.text


def test_the_last_line_names_loss_and_accuracy_of_a_collapsed_encoder(config):
    line = {"epoch": 9, "loss": 5.1787, "contrastive_accuracy": 0.866}
    text = "epoch 9: loss 5.1787 (collapsed: 6.9305), contrastive accuracy 86.6% (collapsed: 0.1%)"
    cfg, none = config("batch_size=512"), {"knn_acc": None, "effective_rank": None}
    assert summary({**line, **none}, cfg, None) == summary({**line, **none}, cfg, 3.2) == text
    measured = {**line, "knn_acc": 0.5, "effective_rank": 20.04}
    text += ", kNN 50.0% (training images), effective rank 20.0 (untrained: 3.2)"
    assert summary(measured, cfg, 3.2) == text
    for views, loss in ((2, "6.9305"), (4, "7.6232")):  # as the loss itself gives
        assert f"{nt_xent(torch.ones(views, 512, 8))[0].item():.4f}" == loss
        assert f"collapsed: {loss}" in summary(measured, config(f"views={views}"), 3.2)


class Broken(ModuleType):
    """A module whose import raises, as that of a protobuf that does not fit."""

    def __getattr__(self, name: str) -> None:
        raise TypeError("Descriptors cannot be created directly")


def full_disk(self: SummaryWriter) -> None:
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize("cause", ["Descriptors", "No space left"])
def test_a_tensorboard_that_does_not_work_is_one_warning(
    thin, toy, tmp_path, monkeypatch, caplog, cause
):
    """metrics.jsonl has everything."""
    cfg = toy("epochs=3")  # before: Hydra looks at every module
    if cause == "Descriptors":
        monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", Broken("tensorboard"))
    else:
        monkeypatch.setattr(SummaryWriter, "flush", full_disk)
    simclr.pretrain(cfg, tmp_path)
    warnings = [record.message for record in caplog.records if record.levelname == "WARNING"]
    assert len(warnings) == 1 and cause in warnings[0] and "metrics.jsonl has it" in warnings[0]
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["epoch"] for line in lines] == [1, 2, 3]
