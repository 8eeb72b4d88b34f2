"""The schedule in closed form; the rates that the optimizers really use are in the script tests."""

import itertools
import math

import pytest
import torch

from optim import cosine_learning_rate, make_optimizer, set_learning_rate, view_size


def test_cosine_goes_from_the_peak_to_the_floor():
    total = 97_000
    rates = [cosine_learning_rate(step, total, 0.6, 0.001) for step in range(total)]
    assert rates[0] == 0.6
    assert rates[-1] == pytest.approx(0.001, abs=1e-12)
    assert cosine_learning_rate(500, 1001, 0.6, 0.001) == pytest.approx((0.6 + 0.001) / 2)
    quarter = 0.001 + 0.599 * (1 + math.cos(math.pi / 4)) / 2
    assert cosine_learning_rate(250, 1001, 0.6, 0.001) == pytest.approx(quarter)
    assert all(later < earlier for earlier, later in itertools.pairwise(rates))


def test_a_run_of_one_step_uses_the_peak():
    assert cosine_learning_rate(0, 1, 0.6, 0.001) == 0.6


def test_sgd_is_nesterov_with_weight_decay_on_every_parameter():
    """One hand-computed step from v = 0: g' = g + λw, v = g', w ← w - η(g' + μv)."""
    weight = torch.nn.Parameter(torch.tensor([2.0]))
    optimizer = make_optimizer("sgd", [weight], momentum=0.9, weight_decay=0.1)
    set_learning_rate(optimizer, 0.5)
    weight.grad = torch.tensor([1.0])
    optimizer.step()
    decayed = 1.0 + 0.1 * 2.0
    assert weight.item() == pytest.approx(2.0 - 0.5 * (decayed + 0.9 * decayed))


def test_momentum_may_be_zero():
    weight = torch.nn.Parameter(torch.zeros(1))
    assert make_optimizer("sgd", [weight], 0.0, 0.0).param_groups[0]["momentum"] == 0


def test_an_unknown_optimizer_is_refused_with_the_list():
    with pytest.raises(ValueError, match=r"'adam'.*sgd"):
        make_optimizer("adam", [torch.nn.Parameter(torch.zeros(1))], 0.9, 0.0)


def test_the_update_is_one_kernel_where_torch_has_one_and_the_same_everywhere():
    weights = [torch.nn.Parameter(torch.linspace(-1, 1, 7)) for _ in range(2)]
    fused = make_optimizer("sgd", [weights[0]], 0.9, 0.1)
    plain = torch.optim.SGD(
        [weights[1]], lr=0.0, momentum=0.9, nesterov=True, weight_decay=0.1, foreach=False
    )
    assert fused.param_groups[0]["fused"]
    for rate in (0.5, 0.4, 0.3):
        for weight, optimizer in zip(weights, (fused, plain), strict=True):
            set_learning_rate(optimizer, rate)
            weight.grad = weight.detach() ** 2
            optimizer.step()
    torch.testing.assert_close(*weights)
    on_meta = torch.nn.Parameter(torch.zeros(2, device="meta"))
    assert not make_optimizer("sgd", [on_meta], 0.9, 0.1).param_groups[0]["fused"]


def test_view_sizes_are_shares_of_the_steps_in_their_order():
    schedule = [[16, 0.5], [24, 0.3], [32, 0.2]]
    sizes = [view_size(step, 10, schedule) for step in range(10)]
    assert sizes == [16] * 5 + [24] * 3 + [32] * 2
    thirds = [[16, 0.333333], [24, 0.333333], [32, 0.333333]]
    assert view_size(10**7 - 1, 10**7, thirds) == 32
