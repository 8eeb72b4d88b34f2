"""What a run tells about itself: the geometry of z, and a line an epoch for people and plots."""

import json
import math
from pathlib import Path
from statistics import fmean

import torch
import torch.nn.functional as F
from torch import Tensor

from errors import UserError


def alignment(z1: Tensor, z2: Tensor) -> Tensor:
    """Mean squared distance of the two views of an image on the unit sphere, in [0, 4].

    z1, z2: (N, d), row i of both from image i. Wang & Isola 2020 (arXiv 2005.10242), Eq. 4 with
    α = 2; 0 where both views always have the same direction. A detached float32 scalar.
    """
    z1, z2 = (F.normalize(z.detach().float(), dim=1) for z in (z1, z2))
    return (z1 - z2).square().sum(dim=1).mean()


def uniformity(z: Tensor) -> Tensor:
    """Logarithm of the mean Gaussian potential of all pairs of images, in [-8, 0].

    z: (N, d), one view of each image, N >= 2. Wang & Isola 2020, Eq. 5 with t = 2; 0 where all
    embeddings are the same, and about -4 at best, evenly spread in many dimensions. A detached
    float32 scalar.
    """
    z = F.normalize(z.detach().float(), dim=1)
    potential = torch.exp(4 * (z @ z.T) - 4)  # -t·|a - b|² = 4·cos - 4
    potential.fill_diagonal_(0)
    return (potential.sum() / (len(z) * (len(z) - 1))).log()


def spread(z: Tensor) -> Tensor:
    """Standard deviation of normalised embeddings, the mean over dimensions; z: (N, d), N >= 2.

    1/√d where they are spread evenly, 0 where all are the same (Chen & He 2021, SimSiam, Fig. 2).
    A detached float32 scalar.
    """
    return F.normalize(z.detach().float(), dim=1).std(dim=0).mean()


def collapsed(line: dict[str, float | None], batch_size: int, projection_dim: int) -> bool:
    """Whether all images of an epoch had the same embedding, as far as its means can tell.

    That is: a tenth of the spread there could be, and a partner found as often as by chance, once
    in 2N-1 views, or twice at most.
    """
    chance = 1 / (2 * batch_size - 1)
    return (
        line["z_std"] < 0.1 / math.sqrt(projection_dim)
        and line["contrastive_accuracy"] <= 2 * chance
    )


def is_finite(values: dict[str, float], scaled: bool) -> bool:
    """Whether a training step left usable weights: loss and gradient are finite.

    With a gradient scaler (`scaled`) the gradient may overflow: that step has been left out.
    """
    return math.isfinite(values["loss"]) and (scaled or math.isfinite(values["gradient_norm"]))


def epoch_means(steps: list[dict[str, float]]) -> dict[str, float | None]:
    """Means over an epoch of what each step found.

    A gradient that overflowed in float16 is left out, as the optimizer does: None if all did.
    """
    means: dict[str, float | None] = {name: fmean(s[name] for s in steps) for name in steps[0]}
    finite = [s["gradient_norm"] for s in steps if math.isfinite(s["gradient_norm"])]
    return {**means, "gradient_norm": fmean(finite) if finite else None}


def read_metrics(run: Path) -> list[dict[str, float | None]]:
    """The epochs of a run, from its metrics.jsonl. Raises UserError if it has none."""
    try:
        *lines, _ = (run / "metrics.jsonl").read_text().split("\n")  # the last: cut, or empty
    except OSError as error:
        raise UserError(f"{run} has no epoch to show: metrics.jsonl, {error.strerror}") from None
    return [json.loads(line) for line in lines]
