"""The optimizer, and what changes over a run: learning rate and view size, by the step alone."""

import math
from collections.abc import Iterable

import torch
from torch import nn

OPTIMIZERS = ("sgd", "lars")
TRUST = 0.001  # LARS: rate of a layer as a share of |w| / |g|, as in google-research/simclr
FUSED = ("cuda", "mps", "cpu")  # devices on which torch updates all parameters in one kernel


def make_optimizer(
    name: str,
    parameters: Iterable[nn.Parameter],
    momentum: float,
    weight_decay: float,
    fused: bool = True,
) -> torch.optim.Optimizer:
    """SGD with Nesterov momentum, or LARS; `set_learning_rate` sets the rate at each step.

    SGD's weight decay applies to all parameters, as in the published repository; for LARS see
    there. `fused`: in one kernel
    on the devices that have it; not for use with a gradient scaler, because a first step that
    overflows leaves torch's fused momentum uninitialised (2.14.1, torch/optim/sgd.py).
    Raises ValueError for a name that is not in `OPTIMIZERS`.
    """
    if name not in OPTIMIZERS:
        raise ValueError(f"unknown optimizer {name!r}: choose one of {', '.join(OPTIMIZERS)}")
    parameters = list(parameters)
    if name == "lars":
        return LARS(parameters, momentum, weight_decay)
    return torch.optim.SGD(
        parameters,
        lr=0.0,
        momentum=momentum,
        nesterov=momentum > 0,
        weight_decay=weight_decay,
        fused=fused and parameters[0].device.type in FUSED,
    )


class LARS(torch.optim.Optimizer):
    """A rate for each layer, for batches of thousands (You et al. 2017, arXiv 1708.03888, Alg. 1).

        v ← μ·v + η·λ·(g + β·w),  w ← w - v,  λ = 0.001 · |w| / |g + β·w|

    η is the learning rate, μ the momentum, β the weight decay, as google-research/simclr has it.
    Weights of one dimension, which biases and all of batch norm are, have λ = 1 and β = 0; names
    are not asked ("bn" misses downsample.1). λ = 1 also where |w| or the gradient is 0, so that
    what is initialised with zeros moves. Nothing is read back from the device.
    """

    def __init__(self, parameters: list[nn.Parameter], momentum: float, weight_decay: float):
        super().__init__(
            parameters, {"lr": 0.0, "momentum": momentum, "weight_decay": weight_decay}
        )

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """One update of every weight that has a gradient."""
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.grad is None:
                    continue
                update = weight.grad
                if weight.dim() > 1:
                    update = update.add(weight, alpha=group["weight_decay"])
                    w, g = weight.norm(), update.norm()
                    update = update * torch.where((w > 0) & (g > 0), TRUST * w / g, 1.0)
                state = self.state[weight]
                if "momentum_buffer" not in state:
                    state["momentum_buffer"] = torch.zeros_like(weight)
                velocity = state["momentum_buffer"]
                velocity.mul_(group["momentum"]).add_(update, alpha=group["lr"])
                weight.sub_(velocity)


def cosine_learning_rate(
    step: int, total_steps: int, peak: float, floor: float, warmup_steps: int = 0
) -> float:
    """A straight line up to `peak` in the first `warmup_steps`, the last of which has it; then
    half a cosine from `peak` to `floor` at the last step, total_steps - 1 (Sec. 2.3).

    A pure function of the global step: there is no scheduler state to save or to lose.
    """
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    progress = (step - warmup_steps) / max(1, total_steps - 1 - warmup_steps)
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
