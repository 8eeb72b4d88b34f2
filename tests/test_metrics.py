"""Alignment and uniformity against their definitions, and the means of an epoch."""

import math

import pytest
import torch

from training.metrics import (
    alignment,
    collapsed,
    epoch_means,
    is_finite,
    read_metrics,
    spread,
    uniformity,
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


def test_half_precision_is_computed_in_float32_and_nothing_gets_a_gradient():
    z = torch.randn(8, 4, dtype=torch.bfloat16, requires_grad=True)
    for value in (alignment(z, z + 1), uniformity(z)):
        assert value.dtype == torch.float32 and not value.requires_grad


def test_epoch_means_leave_out_gradients_that_overflowed():
    steps = [
        {"loss": 1.0, "gradient_norm": 2.0},
        {"loss": 3.0, "gradient_norm": math.inf},
        {"loss": 5.0, "gradient_norm": 4.0},
    ]
    assert epoch_means(steps) == {"loss": 3, "gradient_norm": 3}
    assert epoch_means(steps[1:2])["gradient_norm"] is None


def test_the_spread_of_z_is_simsiams_and_says_with_the_accuracy_what_has_collapsed():
    z = torch.randn(4096, 16, generator=torch.Generator().manual_seed(0))
    assert spread(z).item() == pytest.approx(1 / 4, rel=0.01) and spread(4 * z) == spread(z)
    assert spread(z[:1].expand(8, 16)).item() == pytest.approx(0, abs=1e-6)
    chance = 1 / (2 * 64 - 1)
    for z_std, accuracy, expected in (
        (0.02, chance, True), (0.02, 3 * chance, False), (0.05, chance, False), (0.25, 0.5, False),
    ):  # fmt: skip
        line = {"z_std": z_std, "contrastive_accuracy": accuracy}
        assert collapsed(line, batch_size=64, projection_dim=16) == expected


def test_what_is_finite_depends_on_the_scaler_for_the_gradient_alone():
    for loss, norm, without, scaled in (
        (1.0, 1.0, True, True), (1.0, math.inf, False, True), (1.0, math.nan, False, True),
        (math.nan, 1.0, False, False), (-math.inf, 1.0, False, False),
    ):  # fmt: skip
        values = {"loss": loss, "gradient_norm": norm}
        assert (is_finite(values, False), is_finite(values, True)) == (without, scaled)


def test_a_line_that_is_being_written_is_left_out(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"epoch": 1}\n{"epoch": 2}\n{"epo')
    assert read_metrics(tmp_path) == [{"epoch": 1}, {"epoch": 2}]
    assert read_metrics(tmp_path / "nowhere") == []
