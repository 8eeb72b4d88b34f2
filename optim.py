"""The optimizer, and what changes over a run: learning rate and view size, by the step alone."""

import math
from collections.abc import Iterable

import torch
from torch import nn

OPTIMIZERS = ("sgd",)
FUSED = ("cuda", "mps", "cpu")  # devices on which torch updates all parameters in one kernel


def make_optimizer(
    name: str,
    parameters: Iterable[nn.Parameter],
    momentum: float,
    weight_decay: float,
    fused: bool = True,
) -> torch.optim.Optimizer:
    """SGD with Nesterov momentum; the learning rate is set at each step by `set_learning_rate`.

    Weight decay applies to all parameters, as in the published repository. `fused`: in one kernel
    on the devices that have it; not for use with a gradient scaler, because a first step that
    overflows leaves torch's fused momentum uninitialised (2.14.1, torch/optim/sgd.py).
    Raises ValueError for a name that is not in `OPTIMIZERS`.
    """
    if name not in OPTIMIZERS:
        raise ValueError(f"unknown optimizer {name!r}: choose one of {', '.join(OPTIMIZERS)}")
    parameters = list(parameters)
    return torch.optim.SGD(
        parameters,
        lr=0.0,
        momentum=momentum,
        nesterov=momentum > 0,
        weight_decay=weight_decay,
        fused=fused and parameters[0].device.type in FUSED,
    )


def cosine_learning_rate(step: int, total_steps: int, peak: float, floor: float) -> float:
    """Half a cosine from `peak` at step 0 to `floor` at the last step, total_steps - 1.

    A pure function of the global step: there is no scheduler state to save or to lose.
    """
    progress = step / max(1, total_steps - 1)
    return floor + (peak - floor) * 0.5 * (1 + math.cos(math.pi * progress))


def view_size(step: int, total_steps: int, view_sizes: list[list[float]]) -> int:
    """The side in pixels of the views of this step: progressive resolution.

    view_sizes: [[pixels, share of the steps], …] in the order of the run, shares summing to 1.
    Small views cost less and come first; evaluation is at the full size.
    """
    end = 0.0
    for pixels, share in view_sizes:
        end += share
        if step < round(end * total_steps):
            return int(pixels)
    return int(pixels)  # shares that sum to a little less


def set_learning_rate(optimizer: torch.optim.Optimizer, learning_rate: float) -> None:
    """Give every parameter group this absolute rate (not a factor, as LambdaLR would want)."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate
