"""Pictures of a run: augmented views, training curves, embedding, neighbours, confusion matrix.

    python plot.py RUN                 # all of them, as PNG and SVG, into the run directory
    python plot.py RUN RUN … --out D   # the curves of several runs in one picture, in directory D
    python plot.py dataset=digits      # views.png alone, from the config, before any training

curves       loss, contrastive accuracy, learning rate and kNN over the epochs
views        images, each with eight of its random views
embedding    t-SNE of the representations of test images, before and after (newest checkpoint)
neighbours   the first test image of each class, and its nearest training images
confusion    confusion matrix of the linear evaluation, from results.json

Keys of simclr_config.yml may follow (data_dir=…), as for the two scripts.
"""

import system.environment  # noqa: F401, first
import argparse
import io
import json
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
import torch.nn.functional as F
from hydra import compose, initialize
from matplotlib import pyplot
from matplotlib.figure import Figure
from omegaconf import DictConfig, OmegaConf
from sklearn.manifold import TSNE
from sklearn.metrics import ConfusionMatrixDisplay
from torch import Tensor

from config import MAY_CHANGE, RULES, check_values, register_config
from evaluation.features import build_encoder, clean_features
from images.augment import draw, random_views
from images.datasets import Split, draw_stratified, load_split, resize
from images.host import take
from system.checkpoint import find_checkpoint, load_checkpoint
from system.commandline import quote_path, refusals
from system.device import select_device, select_precision
from system.errors import ConfigError, UserError, one_line_errors
from system.files import write_file
from training.metrics import read_metrics

matplotlib.use("Agg")
# Ten colours that differ for colour-blind readers too (Petroff 2021, arXiv 2107.02270, Table 1).
COLORS = ("#3f90da", "#ffa90e", "#bd1f01", "#94a4a2", "#832db6",
          "#a96b59", "#e76300", "#b9ac70", "#717581", "#92dadd")  # fmt: skip
RIGHT, WRONG = COLORS[0], COLORS[6]  # blue and orange
MARKERS = "osD^vP*X<>"
EMBEDDED = 2000  # test images in the t-SNE; more take minutes and look no different
pyplot.rcParams.update({"font.size": 9, "axes.prop_cycle": pyplot.cycler(color=COLORS)})


def plot_curves(runs: dict[str, tuple[DictConfig, list[dict[str, Any]]]]) -> Figure:
    """Training curves; the legend shows the settings that differ, or else the run's name."""
    panels = {
        "loss": ("NT-Xent loss", "nats", 1),
        "contrastive_accuracy": ("Contrastive accuracy", "% of the views", 100),
        "learning_rate": ("Learning rate", "at the epoch's last step", 1),
        "knn_acc": ("kNN among training images", "accuracy in %", 100),
    }
    figure, axes = pyplot.subplots(2, 2, figsize=(8, 5.2), layout="constrained", sharex=True)
    first, *others = (cfg for cfg, _ in runs.values())
    differing = [k for k in first if k not in MAY_CHANGE and any(c[k] != first[k] for c in others)]
    for axis, (name, (title, unit, factor)) in zip(axes.flat, panels.items(), strict=True):
        for run, (cfg, metrics) in runs.items():
            points = [(m["epoch"], factor * m[name]) for m in metrics if m.get(name) is not None]
            label = ", ".join(f"{key} {cfg[key]}" for key in differing) or run
            axis.plot(*zip(*points, strict=True) if points else ([], []), ".-", label=label)
        axis.set(title=title, ylabel=unit)
        axis.grid(alpha=0.3)
        axis.xaxis.get_major_locator().set_params(integer=True)
    figure.supxlabel("epoch", fontsize="medium")
    if len(runs) > 1:
        handles, labels = axes[0, 0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=min(len(runs), 3))
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
    """t-SNE (cosine) of each panel's representations h (N, D), coloured by class."""
    figure, axes = pyplot.subplots(1, len(panels), figsize=(8, 3.9), layout="constrained")
    figure.suptitle(f"t-SNE of the representations h of {len(labels):,} test images", fontsize=10)
    perplexity = min(30.0, (len(labels) - 1) / 3)
    for axis, (title, h) in zip(axes, panels.items(), strict=True):
        tsne = TSNE(metric="cosine", init="pca", perplexity=perplexity, random_state=0)
        points = tsne.fit_transform(h.float().cpu().numpy())
        for label in range(len(classes)):
            own = points[(labels == label).cpu().numpy()]
            style = {"color": COLORS[label % 10], "marker": MARKERS[(label // 10 + label) % 10]}
            axis.scatter(*own.T, s=12, linewidths=0, rasterized=True, **style)
        axis.set(title=title, xticks=[], yticks=[])
    if len(classes) <= 20:  # more would fill the picture
        figure.legend(axes[0].collections, classes, loc="outside right center", markerscale=2)
    return figure


def plot_neighbours(
    train: Split, h: Tensor, test: Split, test_h: Tensor, size: int, columns: int = 8
) -> Figure:
    """The first test image of up to ten classes with its nearest training images by cosine."""
    queries = [int((test.labels == label).nonzero()[0]) for label in test.labels.unique()[:10]]
    cosine = F.normalize(test_h[queries].float(), dim=1) @ F.normalize(h.float(), dim=1).T
    nearest = cosine.topk(min(columns, len(h)), dim=1).indices
    pairs = list(zip(queries, nearest, strict=True))
    title = "Test images and the training images nearest to them: blue, the same class; orange, not"
    grid = [[*resize(test.images[[q]], size), *resize(train.images[i], size)] for q, i in pairs]
    figure, axes = image_grid(title, grid)
    for row, (q, index) in zip(axes, pairs, strict=True):
        row[0].set_ylabel(test.classes[test.labels[q]], rotation=0, ha="right", va="center")
        for axis, label in zip(row[1:], train.labels[index], strict=True):
            right = bool(label == test.labels[q])
            axis.spines[:].set(visible=True, color=RIGHT if right else WRONG, linewidth=2.5)
            if not right:
                axis.set_xlabel(train.classes[label], color=WRONG, fontsize=7, labelpad=2)
    return figure


def plot_confusion(results: dict[str, Any]) -> Figure:
    """Confusion matrix in % of each true class."""
    matrix = np.array(results["confusion"])
    matrix = 100 * matrix / matrix.sum(axis=1, keepdims=True)
    figure, axis = pyplot.subplots(figsize=(8, 6.8), layout="constrained")
    few = len(matrix) <= 20  # more numbers and names than that can't be read
    shown = ConfusionMatrixDisplay(matrix, display_labels=results["classes"] if few else None)
    shown.plot(ax=axis, cmap="Blues", include_values=few, values_format=".0f", xticks_rotation=45)
    axis.images[0].colorbar.set_label("% of the true class")
    title = "Linear layer, {training_images:,} labelled training images: {linear_acc:.1%} right"
    axis.set(title=title.format_map(results), xlabel="predicted class", ylabel="true class")
    return figure


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


def pictures_of_checkpoint(run: Path, cfg: DictConfig) -> Iterator[tuple[str, Figure]]:
    """The pictures that need the encoder: embedding and neighbours, from the newest checkpoint."""
    device, size = select_device(cfg.device), cfg.image_size
    saved = load_checkpoint(path := find_checkpoint(run, cfg.backbone, None))
    names = "checkpoint", "random"  # with the run's seed: its initial weights, but with an init
    encoders = [build_encoder(saved, path, name, cfg.seed)[0].to(device).eval() for name in names]
    source = cfg.dataset, cfg.data_dir
    try:
        splits = [load_split(*source, name, size, cfg.workers) for name in ("train", "test")]
    except UserError as error:
        if cfg.dataset != "folder":
            raise
        return print(f"neither embedding nor neighbours: {error}")
    train, test = (split.to(device) for split in splits)
    inference = size, cfg.batch_size, select_precision(cfg.precision, device)
    h, test_h = (clean_features(encoders[0], s.images, *inference) for s in (train, test))
    chosen = draw_stratified(test.labels, min(EMBEDDED / len(test.labels), 0.999), seed=0)
    if len(chosen) > 3:
        before = clean_features(encoders[1], take(test.images, chosen), *inference)
        panels = {"untrained network": before, f"after {saved['epoch']} epochs": test_h[chosen]}
        yield "embedding", plot_embedding(panels, test.labels[chosen], test.classes)
    yield "neighbours", plot_neighbours(train, h, test, test_h, cfg.image_size)


def pictures(runs: list[Path], overrides: list[str]) -> Iterator[tuple[str, Figure]]:
    """Yield each picture that can be drawn with its name, and print what the others need."""
    configs = [read_config(run, overrides) for run in runs or [None]]
    if runs:
        named = zip(runs, configs, strict=True)
        yield "curves", plot_curves({str(run): (cfg, read_metrics(run)) for run, cfg in named})
    if len(runs) > 1:
        return
    cfg = configs[0]
    split = load_split(cfg.dataset, cfg.data_dir, "pretrain", cfg.image_size, cfg.workers)
    yield "views", plot_views(cfg, split.images)
    for run in runs:
        if list(run.glob("simclr_*_epoch*.pt")):
            yield from pictures_of_checkpoint(run, cfg)
        else:
            print(f"no checkpoint in {run} yet: neither embedding nor neighbours")
        file = run / "results.json"
        results = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
        if "confusion" in results:
            yield "confusion", plot_confusion(results)
        else:
            print(f"no linear evaluation in {run} yet: no confusion; simclr_lin.py makes it")


def read_config(run: Path | None, overrides: list[str]) -> DictConfig:
    """The checked config of a run, or of simclr_config.yml if `run` is None, with overrides."""
    register_config()
    given = {override.split("=")[0] for override in overrides}
    if run is not None and "recipe" in given:
        raise ConfigError(f"recipe: must be left out beside {run}, whose config has the values")
    with refusals(RULES, overrides), initialize(version_base="1.3", config_path=None):
        cfg = compose("simclr_config", overrides=overrides)
    try:
        saved = {} if run is None else OmegaConf.load(run / "config.yaml")
    except OSError:
        raise UserError(f"{run} is not a run directory: it has no config.yaml") from None
    return check_values(OmegaConf.merge(cfg, {k: saved[k] for k in set(saved) & set(cfg) - given}))


@one_line_errors()
def main() -> None:
    """Draw all pictures that can be drawn, and print their paths."""
    as_written = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=as_written)
    parser.add_argument("arguments", nargs="*", metavar="RUN or key=value")
    parser.add_argument("--out", type=Path, help="directory for the pictures; default: the run's")
    args = parser.parse_args()
    given = [a for a in args.arguments if not a.endswith(".yaml")]  # a sweep's, beside its runs
    runs = [Path(a) for a in given if "=" not in a or Path(a).is_dir()]
    overrides = [quote_path(a) for a in given if Path(a) not in runs]
    with one_line_errors():
        out = args.out or (runs[0] if runs else Path())
        for name, figure in pictures(runs, overrides):
            out.mkdir(parents=True, exist_ok=True)
            for suffix in ("png", "svg"):
                picture = io.BytesIO()
                figure.savefig(picture, format=suffix, dpi=130)
                write_file(out / f"{name}.{suffix}", picture.getvalue())
            pyplot.close(figure)
            print(out / f"{name}.png")


if __name__ == "__main__":
    main()
