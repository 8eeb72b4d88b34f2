"""Training diagnostics: alignment, uniformity, spread, collapse; metrics.jsonl, TensorBoard."""

import json
import math
from contextlib import suppress
from pathlib import Path
from statistics import fmean

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from system.errors import UserError
from system.files import parse_json, write_file


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
    """Whether all images of an epoch had nearly the same embedding, from its means.

    That is: less than a tenth of the largest possible spread, and a contrastive accuracy of at
    most twice that of chance, 1 in 2N-1.
    """
    chance = 1 / (2 * batch_size - 1)
    return (
        line["z_std"] < 0.1 / math.sqrt(projection_dim)
        and line["contrastive_accuracy"] <= 2 * chance
    )


def is_finite(values: dict[str, float], scaled: bool) -> bool:
    """Whether loss and gradient of a training step are finite.

    With a gradient scaler (`scaled`) the gradient may overflow: the optimizer skips that step.
    """
    return math.isfinite(values["loss"]) and (scaled or math.isfinite(values["gradient_norm"]))


def epoch_means(steps: list[dict[str, float]]) -> dict[str, float | None]:
    """Means of the step metrics over an epoch.

    Gradient norms that overflowed in float16 are skipped, as the optimizer does: None if all did.
    """
    means: dict[str, float | None] = {name: fmean(s[name] for s in steps) for name in steps[0]}
    finite = [s["gradient_norm"] for s in steps if math.isfinite(s["gradient_norm"])]
    return {**means, "gradient_norm": fmean(finite) if finite else None}


def read_metrics(run: Path) -> list[dict[str, float | None]]:
    """Read metrics.jsonl of a run directory, a dict per epoch; empty in its first epoch.

    Raises UserError if it is damaged or of another program.
    """
    path = run / "metrics.jsonl"
    lines = path.read_bytes().split(b"\n")[:-1] if path.exists() else []  # the last: cut, or empty
    history = [parse_json(line, f"{path}, line {n}") for n, line in enumerate(lines, 1)]
    if not all("epoch" in line for line in history):
        raise UserError(f"{path} is not of simclr.py, a line has no epoch: remove it")
    return history


def write_metrics(run_dir: Path, history: list[dict[str, float | None]]) -> None:
    """Write all of metrics.jsonl, 400 bytes per epoch, so that a crash never leaves half a line."""
    lines = "".join(json.dumps(line) + "\n" for line in history)
    write_file(run_dir / "metrics.jsonl", lines.encode())


class TensorBoard:
    """The lines of metrics.jsonl as TensorBoard scalars, one step per epoch."""

    def __init__(self, run_dir: Path) -> None:
        self.run_dir, self.writer, self.epoch = run_dir, None, 0

    def write(self, history: list[dict[str, float | None]]) -> None:
        """Add new epochs. Raises UserError if they cannot be written; the next call retries."""
        try:
            if self.writer is None:  # hides what an earlier process wrote of the same epochs
                self.writer = SummaryWriter(self.run_dir, purge_step=self.epoch + 1)
            for line in history[self.epoch :]:
                for name, value in line.items():
                    if name != "epoch" and value is not None:
                        self.writer.add_scalar(name, value, line["epoch"])
            self.writer.flush()
        except OSError as error:
            self.writer = None  # its thread has ended
            raise UserError(f"TensorBoard's file in {self.run_dir}: {error.strerror}") from None
        self.epoch = len(history)

    def close(self) -> None:
        """Close the file, if there is one."""
        if self.writer is not None:
            with suppress(OSError):
                self.writer.close()
