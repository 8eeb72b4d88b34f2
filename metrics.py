"""What a run tells about itself: the geometry of z, and a line an epoch for people and plots."""

import json
import math
from pathlib import Path
from statistics import fmean

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

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


def epoch_means(names: list[str], steps: list[list[float]]) -> dict[str, float | None]:
    """Means over an epoch of what each step found, in the order of the names.

    A gradient that overflowed in float16 is left out, as the optimizer does: None if all did.
    """
    columns = dict(zip(names, zip(*steps, strict=True), strict=True))
    finite = [norm for norm in columns.pop("gradient_norm") if math.isfinite(norm)]
    means: dict[str, float | None] = {name: fmean(column) for name, column in columns.items()}
    return {**means, "gradient_norm": fmean(finite) if finite else None}


def write_metrics(out_dir: Path, writer: SummaryWriter, metrics: dict[str, float | None]) -> None:
    """Append an epoch to `out_dir`/metrics.jsonl, and to TensorBoard with the epoch as its step."""
    with open(out_dir / "metrics.jsonl", "a") as file:
        file.write(json.dumps(metrics) + "\n")
    for name, value in metrics.items():
        if name != "epoch" and value is not None:
            writer.add_scalar(name, value, metrics["epoch"])
    writer.flush()


def read_metrics(run: Path) -> list[dict[str, float | None]]:
    """The epochs of a run, from its metrics.jsonl. Raises UserError if it has none."""
    try:
        *lines, _ = (run / "metrics.jsonl").read_text().split("\n")  # the last: cut, or empty
    except OSError as error:
        raise UserError(f"{run} has no epoch to show: metrics.jsonl, {error.strerror}") from None
    return [json.loads(line) for line in lines]
