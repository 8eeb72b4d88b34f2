"""The figures of plot.py. Text of the user is drawn as it is, never as markup.

Importing this module chooses matplotlib's own style and its backend Agg, whatever the environment
variable MPLBACKEND, a matplotlibrc or a notebook says: pictures do not depend on the machine.
"""

import io
import logging
import math
import os
import warnings
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from omegaconf import DictConfig
from sklearn.manifold import TSNE
from sklearn.metrics import ConfusionMatrixDisplay
from torch import Tensor

from evaluation.results import printable
from images.augment import draw, random_views
from images.datasets import Split, resize
from system.errors import UserError
from system.files import write_file

os.environ.update(MPLBACKEND="agg", MATPLOTLIBRC=os.devnull)  # read while matplotlib is imported
logging.getLogger("matplotlib").setLevel(logging.ERROR)  # no word on its cache, on absent FONTS
from matplotlib import pyplot  # noqa: E402
from matplotlib.figure import Figure  # noqa: E402

# Ten colours that differ for colour-blind readers too (Petroff 2021, arXiv 2107.02270, Table 1).
COLORS = ("#3f90da", "#ffa90e", "#bd1f01", "#94a4a2", "#832db6",
          "#a96b59", "#e76300", "#b9ac70", "#717581", "#92dadd")  # fmt: skip
RIGHT, WRONG = COLORS[0], COLORS[6]  # blue and orange
MARKERS = "osD^vP*X<>"
# A letter is drawn in the first of these that is installed and has it. matplotlib brings the first
# two; the others are those of Linux, macOS and Windows for what these lack, such as 猫.
FONTS = ["DejaVu Sans", "STIXGeneral", "Noto Sans CJK JP", "Noto Sans CJK SC", "Hiragino Sans",
         "Arial Unicode MS", "Yu Gothic", "Microsoft YaHei", "Malgun Gothic"]  # fmt: skip
pyplot.rcdefaults()
pyplot.rcParams.update({
    "font.family": FONTS, "font.size": 9, "axes.prop_cycle": pyplot.cycler(color=COLORS),
    "text.parse_math": False,
})  # fmt: skip
# A letter that none of them has is drawn as a box, with one line that says so.
warnings.filterwarnings("once", "Glyph")
warnings.formatwarning = lambda message, *_: f"warning: {message}\n"


def plot_curves(runs: list[tuple[str, list[dict[str, Any]]]]) -> Figure:
    """Training curves of runs, each with its name in the legend."""
    panels = {
        "loss": ("NT-Xent loss", "nats", 1),
        "contrastive_accuracy": ("Contrastive accuracy", "% of the views", 100),
        "learning_rate": ("Learning rate", "at the epoch's last step", 1),
        "knn_acc": ("kNN among training images", "accuracy in %", 100),
    }
    names = [shorten(name, 64) for name, _ in runs]
    columns = max(1, min(len(runs), 100 // (max(map(len, names)) + 8)))  # 8: line and gaps
    height = 5 + 0.2 * math.ceil(len(runs) / columns)
    figure, axes = pyplot.subplots(2, 2, figsize=(8, height), layout="constrained", sharex=True)
    for axis, (name, (title, unit, factor)) in zip(axes.flat, panels.items(), strict=True):
        for _, metrics in runs:
            points = [(m["epoch"], factor * m[name]) for m in metrics if m.get(name) is not None]
            axis.plot(*zip(*points, strict=True) if points else ([], []), ".-")
        axis.set(title=title, ylabel=unit)
        axis.grid(alpha=0.3)
        axis.xaxis.get_major_locator().set_params(integer=True)
    for axis in axes[1]:
        axis.set_xlabel("epoch")
    if len(runs) > 1:
        add_legend(figure, axes[0, 0].lines, names, loc="outside lower center", ncols=columns)
    return figure


def plot_views(cfg: DictConfig, images: Tensor, rows: int = 8, columns: int = 8) -> Figure:
    """`rows` random images, each with `columns` of its random views."""
    rng, size = torch.Generator().manual_seed(cfg.seed), cfg.image_size
    chosen = images[torch.randperm(len(images), generator=rng)[:rows]].cpu()
    views = random_views(
        chosen.repeat_interleave(columns, 0), draw(columns * len(chosen), rng, blur=True), size,
        tuple(cfg.crop_scale), cfg.flip_probability, cfg.color_strength,
        cfg.grayscale_probability, cfg.blur_probability,
    ).unflatten(0, (len(chosen), columns))  # fmt: skip
    grid = [[image, *own] for image, own in zip(resize(chosen, size), views, strict=True)]
    return image_grid("An image and random views of it: any two make a positive pair", grid)[0]


def plot_embedding(panels: dict[str, Tensor], labels: Tensor, classes: list[str]) -> Figure:
    """t-SNE (cosine) of each panel's representations h (N, D), coloured by class.

    Raises UserError for fewer than four images and as `directions`.
    """
    if len(labels) < 4:
        raise UserError(f"t-SNE needs four test images or more, there are {len(labels)}")
    points = {title: directions(h).cpu().numpy() for title, h in panels.items()}
    figure, axes = pyplot.subplots(1, len(panels), figsize=(8, 4.3), layout="constrained")
    figure.suptitle(f"t-SNE of the representations h of {len(labels):,} test images", fontsize=10)
    perplexity = min(30.0, (len(labels) - 1) / 3)
    for axis, (title, h) in zip(axes, points.items(), strict=True):
        tsne = TSNE(metric="cosine", init="pca", perplexity=perplexity, random_state=0)
        h = tsne.fit_transform(h)
        for label in range(len(classes)):
            own = h[(labels == label).cpu().numpy()]
            style = {"color": COLORS[label % 10], "marker": MARKERS[(label // 10 + label) % 10]}
            axis.scatter(*own.T, s=12, linewidths=0, rasterized=True, **style)
        axis.set(title=title, xticks=[], yticks=[])
    if len(classes) <= 20:  # more would fill the picture
        style = {"loc": "outside right center", "markerscale": 2}
        add_legend(figure, axes[0].collections, [shorten(c, 16) for c in classes], **style)
    return figure


def plot_neighbours(
    train: Split, h: Tensor, test: Split, test_h: Tensor, size: int, columns: int = 8
) -> Figure:
    """The first test image of up to ten classes with its nearest training images by cosine.

    Raises UserError as `directions`.
    """
    queries = [int((test.labels == label).nonzero()[0]) for label in test.labels.unique()[:10]]
    unit = directions(torch.cat([test_h[queries], h]))
    cosine = unit[: len(queries)] @ unit[len(queries) :].T
    nearest = cosine.topk(min(columns, len(h)), dim=1).indices
    pairs = list(zip(queries, nearest, strict=True))
    title = "Test images and the training images nearest to them: blue, the same class; orange, not"
    grid = [[*resize(test.images[[q]], size), *resize(train.images[i], size)] for q, i in pairs]
    figure, axes = image_grid(title, grid)
    for row, (q, index) in zip(axes, pairs, strict=True):
        name = shorten(test.classes[test.labels[q]])
        row[0].set_ylabel(name, rotation=0, ha="right", va="center")
        for axis, label in zip(row[1:], train.labels[index], strict=True):
            right = bool(label == test.labels[q])
            axis.spines[:].set(visible=True, color=RIGHT if right else WRONG, linewidth=2.5)
            if not right:
                name = shorten(train.classes[label], 10)
                axis.set_xlabel(name, color=WRONG, fontsize=7, labelpad=2)
    return figure


def plot_confusion(results: dict[str, Any]) -> Figure:
    """Confusion matrix in % of each true class. Raises UserError if `results` has none."""
    if "confusion" not in results:
        raise UserError("no linear evaluation in the run directory yet: simclr_lin.py makes it")
    title = "Linear layer, {training_images:,} labelled training images: {linear_acc:.1%} right"
    counts, names = np.array(results["confusion"]), [shorten(c) for c in results["classes"]]
    matrix = 100 * counts / counts.sum(axis=1, keepdims=True).clip(1)  # 0: no image of the class
    figure, axis = pyplot.subplots(figsize=(8, 6.8), layout="constrained")
    few = len(matrix) <= 20  # more numbers and names than that can't be read
    shown = ConfusionMatrixDisplay(matrix, display_labels=names if few else None)
    shown.plot(ax=axis, cmap="Blues", include_values=few, values_format=".0f", xticks_rotation=45)
    pyplot.setp(axis.get_xticklabels(), ha="right", rotation_mode="anchor")
    axis.images[0].colorbar.set_label("% of the true class")
    axis.set(title=title.format_map(results), xlabel="predicted class", ylabel="true class")
    return figure


def directions(h: Tensor) -> Tensor:
    """Unit vectors (N, D), float32, of representations h (N, D): their products are cosines.

    Raises UserError where all are the same, or zero, to the accuracy of float32: they say nothing,
    and t-SNE would end in a segmentation fault.
    """
    unit = F.normalize(h.float(), dim=1)
    if ((unit - unit[0]).abs() < 1e-6).all():
        raise UserError("representations are all the same: a collapsed or damaged checkpoint")
    return unit


def image_grid(title: str, rows: list[list[Tensor]]) -> tuple[Figure, Any]:
    """A grid of images (3, S, S) in [0, 1] without ticks and frames; returns figure and axes."""
    shape = len(rows), len(rows[0])
    size = 8, 8 * (shape[0] + 0.4) / (shape[1] + 0.6)
    figure, axes = pyplot.subplots(*shape, figsize=size, layout="constrained", squeeze=False)
    figure.get_layout_engine().set(w_pad=0.02, h_pad=0.02, hspace=0.02, wspace=0.02)
    figure.suptitle(title, fontsize=10)
    for axis, image in zip(axes.flat, chain(*rows), strict=True):
        axis.imshow(image.permute(1, 2, 0).cpu().numpy(), interpolation="nearest")
        axis.set(xticks=[], yticks=[])
        axis.spines[:].set_visible(False)
    return figure, axes


def shorten(text: str, most: int = 20) -> str:
    """Text of the user on one line, without its middle if it is longer than `most` letters."""
    text, half = printable(text), most // 2
    return text if len(text) <= most else f"{text[:half]}…{text[1 - half :]}"


def add_legend(figure: Figure, handles: Any, names: Any, **style: Any) -> None:
    """A legend of these names; matplotlib itself drops those that begin with an underscore."""
    handles = list(handles)
    legend = figure.legend(handles, ["-"] * len(handles), **style)
    for text, name in zip(legend.get_texts(), names, strict=True):
        text.set_text(name)


def save(figure: Figure, path: Path) -> None:
    """Write path.png and path.svg, and close the figure. Raises UserError if that fails."""
    path.parent.mkdir(parents=True, exist_ok=True)
    for suffix in ("png", "svg"):
        picture = io.BytesIO()  # without the date, which comes from SOURCE_DATE_EPOCH if set
        figure.savefig(picture, format=suffix, dpi=130, metadata={"Date": None})
        write_file(path.with_name(f"{path.name}.{suffix}"), picture.getvalue())
    pyplot.close(figure)
