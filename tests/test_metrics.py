"""Alignment and uniformity against their definitions, and the means of an epoch."""

import math

import pytest
import torch

from errors import UserError
from metrics import alignment, epoch_means, read_metrics, uniformity


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
    values = [[1.0, 2.0], [3.0, math.inf], [5.0, 4.0]]
    names = ["loss", "gradient_norm"]
    assert epoch_means(names, values) == {"loss": 3, "gradient_norm": 3}
    assert epoch_means(names, values[1:2])["gradient_norm"] is None
    assert math.isnan(epoch_means(names, [[math.nan, 1.0]])["loss"])


def test_a_line_that_is_being_written_is_left_out(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"epoch": 1}\n{"epoch": 2}\n{"epo')
    assert read_metrics(tmp_path) == [{"epoch": 1}, {"epoch": 2}]
    with pytest.raises(UserError, match="has no epoch to show"):
        read_metrics(tmp_path / "nowhere")
