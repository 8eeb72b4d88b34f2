"""Optimizers, and schedules as pure functions of the step: learning rate and view size."""

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from config import Config, Pretraining

TRUST = 0.001  # LARS trust coefficient, as in google-research/simclr
TINY = 1e-7
NEWTON_SCHULZ = 3.4445, -4.7750, 2.0315  # of Muon: five steps take 0.01 to 1 into 0.7 to 1.2


def make_optimizer(
    cfg: Pretraining,
    parameters: Iterable[nn.Parameter],
    *,
    fused: bool = True,
    learning_rate: float | Tensor = 0.0,
) -> torch.optim.Optimizer:
    """SGD with Nesterov momentum and decay of all parameters, as published; LARS; or Muon.

    `fused` updates all in one kernel; not with a gradient scaler, since a first step that overflows
    leaves torch's fused momentum uninitialised (torch 2.14.1, torch/optim/sgd.py). A CUDA graph
    needs a learning rate that is a tensor.
    """
    defaults = {"lr": learning_rate, "momentum": cfg.momentum, "weight_decay": cfg.weight_decay}
    if cfg.optimizer == "sgd":
        return torch.optim.SGD(parameters, **defaults, nesterov=cfg.momentum > 0, fused=fused)
    return {"lars": LARS, "muon": Muon}[cfg.optimizer](parameters, defaults)


class _PerWeight(torch.optim.Optimizer):
    """Updates weight by weight, each with a velocity; subclasses say how one is updated."""

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """One update of every weight that has a gradient."""
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.grad is None:
                    continue
                state = self.state[weight]
                if "momentum_buffer" not in state:
                    state["momentum_buffer"] = torch.zeros_like(weight)
                self._update(weight, weight.grad, state["momentum_buffer"], group)


class LARS(_PerWeight):
    """LARS, a learning rate per layer for large batches (You et al. 2017, arXiv 1708.03888).

        v ← μ·v + η·λ·(g + β·w),  w ← w - v,  λ = 0.001 · |w| / |g + β·w|

    η is the learning rate, μ the momentum, β the weight decay (Algorithm 1, in the form of
    google-research/simclr). One-dimensional weights, found by shape since the name "bn" misses
    downsample.1, have λ = 1 and β = 0. λ = 1 also where |w| or the gradient is 0. No host sync.
    """

    def _update(
        self, weight: Tensor, gradient: Tensor, velocity: Tensor, group: dict[str, Any]
    ) -> None:
        if weight.dim() > 1:
            gradient = gradient.add(weight, alpha=group["weight_decay"])
            w, g = weight.norm(), gradient.norm()
            gradient = gradient * torch.where((w > 0) & (g > 0), TRUST * w / g, 1.0)
        velocity.mul_(group["momentum"]).add_(gradient * group["lr"])  # lr: maybe a tensor
        weight.sub_(velocity)


class Muon(_PerWeight):
    """Muon, orthogonal updates (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon).

        v ← μ·v + g,  UΣVᵀ = g + μ·v,  w ← w - η·|w|·UVᵀ / |UVᵀ|,  then w is scaled back to its |w|

    η is the learning rate, μ the momentum; a convolution is a matrix, output channels × the rest.
    A step is relative to the weight, whose norm stays: batch norm and the cosine hide it from the
    loss (but for biases of the head). So η is about the angle of a step, in radians, and there is
    no weight decay. One-dimensional weights have SGD with Nesterov momentum and weight decay, at
    the same η. A weight of zeros gets norm 1. No host sync.
    """

    def _update(
        self, weight: Tensor, gradient: Tensor, velocity: Tensor, group: dict[str, Any]
    ) -> None:
        matrix = weight.dim() > 1
        if not matrix:
            gradient = gradient.add(weight, alpha=group["weight_decay"])
        velocity.mul_(group["momentum"]).add_(gradient)
        update = gradient.add(velocity, alpha=group["momentum"])
        if not matrix:
            weight.sub_(update * group["lr"])
            return
        update = orthogonalise(update.flatten(1)).view_as(weight)
        norm = torch.where((norm := weight.norm()) > 0, norm, 1.0)
        weight.sub_(update * (group["lr"] * norm / update.norm().clamp(min=TINY)))
        weight.mul_(norm / weight.norm().clamp(min=TINY))


def orthogonalise(matrix: Tensor) -> Tensor:
    """About UVᵀ for a matrix UΣVᵀ: singular values above 0.002 of its norm become 0.7 to 1.2.

    Five steps of Newton-Schulz, x ← a·x + b·x³ + c·x⁵ for each singular value, applied to the
    smaller square, the matrix times its transpose: half the time. Needs float32, not TF32, since
    they are squared. Smaller ones are multiplied by up to 485; zeros stay.
    """
    if len(matrix) > matrix.shape[1]:
        return orthogonalise(matrix.T).T
    a, b, c = NEWTON_SCHULZ

    def polynomial(gram: Tensor) -> Tensor:  # a + b·x² + c·x⁴ of each singular value x
        factor = torch.addmm(gram, gram, gram, beta=b, alpha=c)
        factor.diagonal().add_(a)
        return factor

    matrix = matrix / matrix.norm().clamp(min=TINY)  # singular values up to 1
    gram = matrix @ matrix.T  # UΣ²Uᵀ
    total = factor = polynomial(gram)
    for _ in range(4):
        gram = factor @ gram @ factor
        factor = polynomial(gram)
        total = factor @ total
    return total @ matrix


def cosine_learning_rate(
    step: int, total_steps: int, peak: float, floor: float, warmup_steps: int = 0
) -> float:
    """Linear warm-up to `peak` at step `warmup_steps` - 1, then cosine decay (Sec. 2.3) to `floor`
    at the last step, `total_steps` - 1. A pure function of the global step: no state to save."""
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    progress = (step - warmup_steps) / max(1, total_steps - 1 - warmup_steps)
    return floor + (peak - floor) * 0.5 * (1 + math.cos(math.pi * progress))


def view_size(step: int, total_steps: int, view_sizes: list[list[float]]) -> int:
    """Size of the views at this step; view_sizes: [[pixels, fraction of the steps], …] in order."""
    end = 0.0
    for pixels, fraction in view_sizes:
        end += fraction
        if step < round(end * total_steps):
            return int(pixels)
    return int(pixels)  # fractions that sum to a little less than 1


def schedule(cfg: Config, step: int, total_steps: int) -> tuple[float, int]:
    """Learning rate and view size in pixels: pure functions of the global step."""
    warmup_steps = cfg.warmup_epochs * (total_steps // cfg.epochs)
    learning_rate = cosine_learning_rate(
        step, total_steps, cfg.learning_rate, cfg.min_learning_rate, warmup_steps
    )
    return learning_rate, view_size(step, total_steps, cfg.view_sizes or [[cfg.image_size, 1.0]])


def set_learning_rate(optimizer: torch.optim.Optimizer, learning_rate: float) -> None:
    """Set the rate of every group; a tensor is filled, whose address is part of a CUDA graph."""
    for group in optimizer.param_groups:
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(learning_rate)
        else:
            group["lr"] = learning_rate
