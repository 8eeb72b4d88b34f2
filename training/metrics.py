"""Training diagnostics: alignment, uniformity, spread, collapse; the lines of metrics.jsonl."""

import json
import logging
import math
from pathlib import Path
from statistics import fmean

import torch
import torch.nn.functional as F
from torch import Tensor

from config import Config

log = logging.getLogger("simclr")


def alignment(z1: Tensor, z2: Tensor) -> Tensor:
    """Mean squared distance of the views z1, z2 (N, d) on the unit sphere, in [0, 4]. Detached.

    Wang & Isola 2020 (arXiv 2005.10242), Eq. 4 with α = 2.
    """
    z1, z2 = (F.normalize(z.detach().float(), dim=1) for z in (z1, z2))
    return (z1 - z2).square().sum(dim=1).mean()


def uniformity(z: Tensor) -> Tensor:
    """Log of the mean Gaussian potential of all pairs of images, in [-8, 0]; z: (N, d). Detached.

    Wang & Isola 2020, Eq. 5 with t = 2: 0 if all embeddings are the same, about -4 if they spread.
    """
    z = F.normalize(z.detach().float(), dim=1)
    potential = torch.exp(4 * (z @ z.T) - 4)  # -t·|a - b|² = 4·cos - 4
    potential.fill_diagonal_(0)
    return (potential.sum() / (len(z) * (len(z) - 1))).log()


def spread(z: Tensor) -> Tensor:
    """Standard deviation of normalised z (N, d), the mean over dimensions: 1/√d where they spread
    evenly, 0 where all are the same (Chen & He 2021, SimSiam, Fig. 2). Detached."""
    return F.normalize(z.detach().float(), dim=1).std(dim=0).mean()


def warn_of_collapse(history: list[dict[str, float | None]], cfg: Config) -> None:
    """Warn after the first epoch of a run in which all images had nearly the same embedding."""
    if [line for line in history if is_collapsed(line, cfg)] == history[-1:]:
        log.warning(
            f"warning: in epoch {len(history)} all images have nearly the same embedding: lower "
            f"learning_rate ({cfg.learning_rate:g}), or wait if this is one of the first epochs"
        )


def is_collapsed(line: dict[str, float | None], cfg: Config) -> bool:
    """Whether the spread is below a tenth of the largest, and accuracy at most twice chance."""
    narrow = line["z_std"] < 0.1 / math.sqrt(cfg.projection_dim)
    return narrow and line["contrastive_accuracy"] <= 2 / candidates(cfg)


def candidates(cfg: Config) -> int:
    """How many views compete in `nt_xent`, of all ranks: the partner and the negatives."""
    return cfg.views * (cfg.batch_size - 1) + 1


def summary(line: dict[str, float | None], cfg: Config, untrained_rank: float | None) -> str:
    """An epoch in words: loss and contrastive accuracy beside those of a collapsed encoder."""
    n = candidates(cfg)
    text = (
        f"epoch {line['epoch']}: loss {line['loss']:.4f} (collapsed: {math.log(n):.4f}), "
        f"contrastive accuracy {line['contrastive_accuracy']:.1%} (collapsed: {1 / n:.1%})"
    )
    if line["knn_acc"] is not None:
        text += f", kNN {line['knn_acc']:.1%} (training images)"
    if None not in (line.get("effective_rank"), untrained_rank):
        text += f", effective rank {line['effective_rank']:.1f} (untrained: {untrained_rank:.1f})"
    return text


def epoch_means(steps: list[dict[str, float]]) -> dict[str, float | None]:
    """Means of the step metrics; of the gradient norm over steps that did not overflow in fp16."""
    means: dict[str, float | None] = {name: fmean(s[name] for s in steps) for name in steps[0]}
    finite = [s["gradient_norm"] for s in steps if math.isfinite(s["gradient_norm"])]
    return {**means, "gradient_norm": fmean(finite) if finite else None}


def to_lines(history: list[dict[str, float | None]]) -> bytes:
    """All of metrics.jsonl: written whole, 400 bytes an epoch, no crash leaves half a line."""
    return "".join(json.dumps(line) + "\n" for line in history).encode()


class TensorBoard:
    """The lines of metrics.jsonl as TensorBoard scalars. What fails, the import too, warns once."""

    def __init__(self, run_dir: Path) -> None:
        self.run_dir, self.writer, self.failed = run_dir, None, False

    def write(self, line: dict[str, float | None]) -> None:
        """Add an epoch; the first hides later ones of an earlier process."""
        if self.failed:
            return
        try:
            if self.writer is None:
                from torch.utils.tensorboard import SummaryWriter  # its protobuf may not fit

                options = {"purge_step": line["epoch"], "filename_suffix": ".simclr"}
                self.writer = SummaryWriter(self.run_dir, **options)
            for name, value in line.items():
                if name != "epoch" and value is not None:
                    self.writer.add_scalar(name, value, line["epoch"])
            self.writer.flush()
        except Exception as error:  # an import can raise anything
            self.failed = True
            log.warning(f"warning: TensorBoard gets nothing ({error}); metrics.jsonl has it")
