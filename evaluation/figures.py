"""The figures of plot.py. Text of the user is drawn as it is, never as markup.

No backend and no style of the machine is used: pictures are the same everywhere.
"""

import io
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
import torch.nn.functional as F
from matplotlib import cycler
from matplotlib.figure import Figure
from sklearn.manifold import TSNE
from torch import Tensor

from config import Config
from evaluation.results import printable
from images.augment import draw, random_views, shuffle
from images.datasets import Split, resize
from system.errors import UserError
from system.files import write_file

# Ten colours that differ for colour-blind readers too (Petroff 2021, arXiv 2107.02270, Table 1).
COLORS = ("#3f90da", "#ffa90e", "#bd1f01", "#94a4a2", "#832db6",
          "#a96b59", "#e76300", "#b9ac70", "#717581", "#92dadd")  # fmt: skip
RIGHT, WRONG = COLORS[0], COLORS[6]  # blue and orange
MARKERS = "osD^vP*X<>"
matplotlib.rcdefaults()
matplotlib.rc("font", size=9)
matplotlib.rc("axes", prop_cycle=cycler(color=COLORS))
matplotlib.rc("text", parse_math=False)


def plot_curves(metrics: list[dict[str, Any]]) -> Figure:
    """Training curves, from the lines of metrics.jsonl. Raises UserError if there is none."""
    if not metrics:
        raise UserError("there is no epoch to show yet")
    panels = {
        "loss": ("NT-Xent loss", "nats", 1),
        "contrastive_accuracy": ("Contrastive accuracy", "% of the pairs", 100),
        "learning_rate": ("Learning rate", "at the epoch's last step", 1),
        "knn_acc": ("kNN among training images", "accuracy in %", 100),
        "effective_rank": ("Effective rank of h", "RankMe", 1),
        "alignment": ("Alignment of z", "squared distance", 1),
    }
    figure = Figure(figsize=(9, 5), layout="constrained")
    axes = figure.subplots(2, 3, sharex=True)
    for axis, (key, (title, unit, factor)) in zip(axes.flat, panels.items(), strict=True):
        shown = [(line["epoch"], line[key]) for line in metrics if line.get(key) is not None]
        epochs, values = np.array(shown).reshape(-1, 2).T
        axis.plot(epochs, factor * values, ".-")
        axis.set(title=title, ylabel=unit)
        axis.grid(alpha=0.3)
        axis.xaxis.get_major_locator().set_params(integer=True)
    figure.supxlabel("epoch", fontsize="medium")
    return figure


def plot_views(images: Tensor, cfg: Config, rows: int = 8, columns: int = 8) -> Figure:
    """`rows` random images (N, 3, H, W), uint8, each with `columns` of its random views."""
    chosen = images[shuffle(len(images), cfg.seed, epoch=0)[:rows]]
    u = draw(columns * len(chosen), cfg.seed, step=0)
    views = random_views(chosen.repeat_interleave(columns, 0), u, cfg.image_size, cfg)
    title = "An image and random views of it: any two make a positive pair"
    return image_grid(title, resize(chosen, cfg.image_size), views)[0]


def plot_embedding(panels: dict[str, Tensor], labels: Tensor, classes: list[str]) -> Figure:
    """t-SNE (cosine) of each panel's representations h (N, D), coloured by class (N,)."""
    labels = labels.cpu().numpy()
    figure = Figure(figsize=(8, 4.3), layout="constrained")
    figure.suptitle(f"t-SNE of the representations h of {len(labels):,} test images", fontsize=10)
    axes = figure.subplots(1, len(panels))
    few = min(30.0, (len(labels) - 1) / 3)  # scikit-learn's default, if there are images enough
    tsne = TSNE(metric="cosine", init="pca", perplexity=few, random_state=0)
    for axis, (title, h) in zip(axes, panels.items(), strict=True):
        points = tsne.fit_transform(directions(h).cpu().numpy())
        for label in range(len(classes)):
            x, y = points[labels == label].T
            color, marker = COLORS[label % 10], MARKERS[(label // 10 + label) % 10]
            axis.scatter(x, y, s=12, color=color, marker=marker, linewidths=0, rasterized=True)
        axis.set(title=title, xticks=[], yticks=[])
    if len(classes) <= 20:  # more would fill the picture
        names = [shorten(name, 16) for name in classes]
        figure.legend(axes[0].collections, names, loc="outside right center", markerscale=2)
    return figure


def plot_neighbours(
    train: Split, h: Tensor, test: Split, test_h: Tensor, size: int, columns: int = 8
) -> Figure:
    """Each test image, and in its row the training images whose h (N, D) is nearest by cosine."""
    unit = directions(torch.cat([test_h, h]))
    cosine = unit[: len(test_h)] @ unit[len(test_h) :].T
    nearest = cosine.topk(min(columns, len(h)), dim=1).indices
    title = "Test images and the training images nearest to them: blue, the same class; orange, not"
    found = resize(train.images[nearest.flatten()], size)
    figure, axes = image_grid(title, resize(test.images, size), found)
    for row, own, index in zip(axes, test.labels, nearest, strict=True):
        row[0].set_ylabel(shorten(test.classes[own]), rotation=0, ha="right", va="center")
        for axis, label in zip(row[1:], train.labels[index], strict=True):
            color = RIGHT if label == own else WRONG
            axis.spines[:].set(visible=True, color=color, linewidth=2.5)
            name = "" if label == own else shorten(train.classes[label], 10)
            axis.set_xlabel(name, color=color, fontsize=7, labelpad=2)
    return figure


def directions(h: Tensor) -> Tensor:
    """Unit vectors of h (N, D). UserError where t-SNE would crash: not finite, or all the same."""
    unit = F.normalize(h.float(), dim=1)
    if not unit.isfinite().all() or ((unit - unit[0]).abs() < 1e-6).all():
        raise UserError("h is not finite or all the same: a collapsed or damaged checkpoint")
    return unit


def image_grid(title: str, first: Tensor, others: Tensor) -> tuple[Figure, Any]:
    """Figure and axes of a grid: each image of `first` (N, 3, S, S) and K of `others` (N·K, …)."""
    rows = torch.cat([first[:, None], others.unflatten(0, (len(first), -1))], dim=1)
    height, width = rows.shape[:2]
    figure = Figure(figsize=(8, 8 * (height + 0.4) / (width + 0.6)), layout="constrained")
    axes = figure.subplots(height, width, squeeze=False)
    figure.get_layout_engine().set(w_pad=0.02, h_pad=0.02, hspace=0.02, wspace=0.02)
    figure.suptitle(title, fontsize=10)
    for axis, image in zip(axes.flat, rows.flatten(0, 1), strict=True):
        axis.imshow(image.permute(1, 2, 0).cpu().numpy(), interpolation="nearest")
        axis.set(xticks=[], yticks=[])
        axis.spines[:].set_visible(False)
    return figure, axes


def shorten(text: str, most: int = 20) -> str:
    """Text of the user on one line, without its middle if it is longer than `most` letters."""
    text, half = printable(text), most // 2
    return text if len(text) <= most else f"{text[:half]}…{text[1 - half :]}"


def save(figure: Figure, path: Path) -> None:
    """Write path.png and path.svg. Raises UserError if that fails."""
    path.parent.mkdir(parents=True, exist_ok=True)
    for suffix in ("png", "svg"):
        picture = io.BytesIO()  # without the date, which comes from SOURCE_DATE_EPOCH if set
        figure.savefig(picture, format=suffix, dpi=130, metadata={"Date": None})
        write_file(path.with_name(f"{path.name}.{suffix}"), picture.getvalue())
