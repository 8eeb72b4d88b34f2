"""Optimizers by hand and against torch's; schedules in closed form."""

import itertools
import math
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from models import SimCLR
from training.optim import (
    NEWTON_SCHULZ,
    cosine_learning_rate,
    make_optimizer,
    orthogonalise,
    schedule,
    set_learning_rate,
    view_size,
)


def optimizer_of(
    name: str, *weights: nn.Parameter, momentum=0.9, weight_decay=0.1, **options: object
) -> torch.optim.Optimizer:
    cfg = SimpleNamespace(optimizer=name, momentum=momentum, weight_decay=weight_decay)
    return make_optimizer(cfg, weights, **options)


def step(optimizer: torch.optim.Optimizer, weight: nn.Parameter, gradient: Tensor, rate: float):
    set_learning_rate(optimizer, rate)
    weight.grad = torch.as_tensor(gradient).clone()
    optimizer.step()


def test_cosine_goes_from_the_peak_to_the_floor():
    total = 9_700
    rates = [cosine_learning_rate(step, total, 0.6, 0.001) for step in range(total)]
    assert rates[0] == 0.6
    assert rates[-1] == pytest.approx(0.001, abs=1e-12)
    quarter = 0.001 + 0.599 * (1 + math.cos(math.pi / 4)) / 2
    assert cosine_learning_rate(250, 1001, 0.6, 0.001) == pytest.approx(quarter)
    assert all(later < earlier for earlier, later in itertools.pairwise(rates))
    assert cosine_learning_rate(0, 1, 0.6, 0.001) == 0.6  # a run of one step


def test_the_warm_up_is_a_line_to_the_peak_and_the_cosine_follows():
    rates = [cosine_learning_rate(step, 100, 0.6, 0.001, warmup_steps=10) for step in range(100)]
    assert rates[:10] == pytest.approx([0.06 * (step + 1) for step in range(10)])
    assert rates[10:] == pytest.approx([cosine_learning_rate(s, 90, 0.6, 0.001) for s in range(90)])


def test_view_sizes_are_shares_of_the_steps_in_their_order():
    sizes = [view_size(step, 10, [[16, 0.5], [24, 0.3], [32, 0.2]]) for step in range(10)]
    assert sizes == [16] * 5 + [24] * 3 + [32] * 2
    thirds = [[16, 0.333333], [24, 0.333333], [32, 0.333333]]
    assert view_size(10**7 - 1, 10**7, thirds) == 32


def test_the_schedule_of_a_run_follows_from_its_config(config):
    """The cosine ends with the run, the warm-up after its epochs, each by steps."""
    rates = "learning_rate=0.6", "min_learning_rate=0.001", "warmup_epochs=2"
    cfg = config("epochs=10", *rates, "view_sizes=[[16,0.5],[32,0.5]]")
    for step in (0, 13, 14, 34, 35, 69):
        rate = cosine_learning_rate(step, 70, 0.6, 0.001, warmup_steps=14)
        assert schedule(cfg, step, 70) == (rate, 16 if step < 35 else 32)
    assert schedule(config("image_size=40"), 0, 1000)[1] == 40


@pytest.mark.parametrize("name", ["sgd", "lars", "muon"])
def test_a_learning_rate_is_set_as_a_number_or_into_the_tensor_of_a_cuda_graph(name):
    weight = nn.Parameter(torch.ones(3))
    tensor, moved = torch.zeros(()), []
    for learning_rate in (0.0, tensor):
        optimizer = optimizer_of(name, weight, learning_rate=learning_rate)
        with torch.no_grad():
            weight.fill_(1)
        step(optimizer, weight, torch.ones(3), 0.5)
        moved.append(weight.detach().clone())
    assert optimizer.param_groups[0]["lr"] is tensor and tensor == 0.5
    assert optimizer_of(name, weight).param_groups[0]["lr"] == 0.0
    assert moved[0].max() < 1 and torch.equal(*moved)


def test_sgd_is_nesterov_with_weight_decay_on_every_parameter():
    """One hand-computed step from v = 0: g' = g + λw, v = g', w ← w - η(g' + μv)."""
    weight = nn.Parameter(torch.tensor([2.0]))
    step(optimizer_of("sgd", weight), weight, [1.0], 0.5)
    decayed = 1.0 + 0.1 * 2.0
    assert weight.item() == pytest.approx(2.0 - 0.5 * (decayed + 0.9 * decayed))
    assert optimizer_of("sgd", weight, momentum=0.0).param_groups[0]["momentum"] == 0


def test_the_update_in_one_kernel_is_the_same():
    weights = [nn.Parameter(torch.linspace(-1, 1, 7)) for _ in range(2)]
    pair = [optimizer_of("sgd", w, fused=f) for w, f in zip(weights, (True, False), strict=True)]
    assert [optimizer.param_groups[0]["fused"] for optimizer in pair] == [True, False]
    for rate in (0.5, 0.4, 0.3):
        for weight, optimizer in zip(weights, pair, strict=True):
            step(optimizer, weight, weight.detach() ** 2, rate)
    torch.testing.assert_close(*weights)


def test_lars_is_the_paper_s_step_by_hand():
    """Two steps of Alg. 1, with another learning rate in the second: it belongs to the velocity."""
    weight = nn.Parameter(torch.tensor([[3.0, 4.0]]))
    optimizer = optimizer_of("lars", weight)
    w, v = [3.0, 4.0], [0.0, 0.0]
    for rate, gradient in ((2.0, [1.0, 0.0]), (0.5, [0.0, -1.0])):
        step(optimizer, weight, [gradient], rate)
        g = [a + 0.1 * b for a, b in zip(gradient, w, strict=True)]
        trust = 0.001 * math.hypot(*w) / math.hypot(*g)
        v = [0.9 * a + rate * trust * b for a, b in zip(v, g, strict=True)]
        w = [a - b for a, b in zip(w, v, strict=True)]
        assert weight.detach()[0].tolist() == pytest.approx(w, rel=1e-6)


def test_lars_leaves_biases_and_batch_norm_to_plain_momentum_whatever_they_are_called():
    """By dimension: a substring misses downsample.1."""
    model = SimCLR("resnet18", 8, 16)
    before = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    for weight in model.parameters():
        weight.grad = torch.ones_like(weight)
    optimizer_of("lars", *model.parameters(), learning_rate=0.1).step()
    assert before["enc.layer2.0.downsample.1.weight"].dim() == 1
    for name, weight in model.named_parameters():
        change, gradient = before[name] - weight.detach(), torch.ones_like(weight)
        if weight.dim() > 1:  # with decay, and the trust ratio
            gradient = gradient + 0.1 * before[name]
            gradient = 0.001 * before[name].norm() / gradient.norm() * gradient
        torch.testing.assert_close(change, 0.1 * gradient, rtol=1e-4, atol=1e-7)


def test_lars_moves_what_is_initialised_with_zeros():
    """Pitfall 11: a trust ratio of 0 would keep it there for ever."""
    for shape in ((3,), (2, 3)):
        weight = nn.Parameter(torch.zeros(shape))
        step(optimizer_of("lars", weight), weight, torch.ones(shape), 0.5)
        torch.testing.assert_close(weight.detach(), torch.full(shape, -0.5))
    optimizer = optimizer_of("lars", weight, weight_decay=0.0)
    step(optimizer, weight, torch.zeros(shape), 0.5)  # nor is a gradient of 0 divided by
    torch.testing.assert_close(weight.detach(), torch.full(shape, -0.5))


@pytest.mark.parametrize("shape", [(8, 8), (8, 30), (30, 8), (64, 27), (1, 5)])
def test_orthogonalise_keeps_the_singular_vectors_and_makes_the_values_about_one(shape):
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    matrix *= torch.logspace(0, -1, shape[1])  # singular values that differ
    u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    found = u.T @ orthogonalise(1e-3 * matrix) @ vh.T  # of any scale
    assert s.max() > 2 * s.min() or min(shape) == 1
    assert found.diagonal().min() > 0.65 and found.diagonal().max() < 1.25
    torch.testing.assert_close(found, found.diagonal().diag(), atol=1e-4, rtol=0)


def test_orthogonalise_does_not_blow_up_what_is_not_there(device):
    """Of a gradient of rank 3, and with singular values of 1 to 1e-4: no direction is invented."""
    draw = partial(torch.randn, generator=torch.Generator().manual_seed(0))
    rank_3 = draw(64, 3) @ draw(3, 256)
    u, _, vh = torch.linalg.svd(draw(64, 256), full_matrices=False)
    a, b, c = NEWTON_SCHULZ
    for matrix in (rank_3, u @ torch.logspace(0, -4, 64).diag() @ vh):
        x = matrix.double() / matrix.double().norm()
        for _ in range(5):  # as it is published, on the matrix itself
            gram = x @ x.T
            x = a * x + (b * gram + c * gram @ gram) @ x
        found = orthogonalise(matrix.to(device)).cpu().double()
        assert (found - x).norm() < 0.01 * x.norm()


def test_muon_turns_a_weight_by_the_learning_rate_and_keeps_its_norm():
    """Two steps: momentum is Nesterov's, and a kernel is a matrix of output channels × the rest."""
    weight = nn.Parameter(torch.randn(6, 3, 2, 2, generator=torch.Generator().manual_seed(1)))
    optimizer = optimizer_of("muon", weight)
    expected, velocity = weight.detach().flatten(1).clone(), torch.zeros(6, 12)
    norm = expected.norm()
    for seed, rate in ((2, 0.1), (3, 0.02)):
        gradient = torch.randn(6, 3, 2, 2, generator=torch.Generator().manual_seed(seed))
        step(optimizer, weight, gradient, rate)
        velocity = 0.9 * velocity + gradient.flatten(1)
        direction = orthogonalise(gradient.flatten(1) + 0.9 * velocity)
        expected = expected - rate * norm * direction / direction.norm()
        expected = expected * norm / expected.norm()
        torch.testing.assert_close(weight.detach().flatten(1), expected)


def test_muon_agrees_with_torch_s():
    """torch's, for matrices alone, in bfloat16, turns and stretches: what turns is the same."""
    ours, theirs = (nn.Linear(40, 10, bias=False) for _ in range(2))
    mine = optimizer_of("muon", ours.weight, weight_decay=0.0, learning_rate=1e-3)
    muon = torch.optim.Muon(theirs.parameters(), lr=1e-3, momentum=0.9, weight_decay=0.0)
    for seed in range(3):
        before = ours.weight.detach().clone()
        theirs.load_state_dict(ours.state_dict())
        for layer in (ours, theirs):
            layer.weight.grad = torch.randn(10, 40, generator=torch.Generator().manual_seed(seed))
        mine.step(), muon.step()
        a, b = (layer.weight.detach() - before for layer in (ours, theirs))
        b = b - before * (b * before).sum() / before.square().sum()
        assert torch.cosine_similarity(a.flatten(), b.flatten(), dim=0) > 0.999


def test_muon_is_sgd_for_biases_and_batch_norm():
    weights = [nn.Parameter(torch.linspace(-1, 1, 7)) for _ in range(2)]
    pair = [optimizer_of(name, w) for name, w in zip(("muon", "sgd"), weights, strict=True)]
    for rate in (0.5, 0.4, 0.3):
        for weight, optimizer in zip(weights, pair, strict=True):
            step(optimizer, weight, weight.detach() ** 2, rate)
    torch.testing.assert_close(*weights)


def test_muon_moves_what_is_initialised_with_zeros():
    weight = nn.Parameter(torch.zeros(2, 3))
    optimizer = optimizer_of("muon", weight, weight_decay=0.0)
    step(optimizer, weight, torch.zeros(2, 3), 0.1)  # nothing is divided by 0
    assert torch.equal(weight.detach(), torch.zeros(2, 3))
    step(optimizer, weight, torch.ones(2, 3), 0.1)
    torch.testing.assert_close(weight.detach(), torch.full((2, 3), -(6**-0.5)))
