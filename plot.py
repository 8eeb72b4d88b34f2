"""Pictures of a run: augmented views, training curves, embedding, neighbours, confusion matrix.

    python plot.py RUN                 # all of them, as PNG and SVG, into the run directory
    python plot.py RUN RUN … --out D   # the curves of several runs in one picture, in directory D
    python plot.py dataset=digits      # views.png alone, from the config, before any training

curves       loss, contrastive accuracy, learning rate and kNN over the epochs
views        images, each with eight of its random views
embedding    t-SNE of the representations of test images, before and after (newest checkpoint)
neighbours   the first test image of each class, and its nearest training images
confusion    confusion matrix of the linear evaluation, from results.json

Keys of simclr_config.yml may follow (data_dir=…), as for the two scripts. What cannot be drawn is
named with the reason; the exit code is 0 if a picture was drawn.
"""

import system.environment  # noqa: F401, first
import argparse
import os
from collections.abc import Callable, Iterator
from functools import cache, partial
from pathlib import Path
from typing import NamedTuple

from hydra import compose, initialize
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from config import MAY_CHANGE, RULES, check_values, register_config
from evaluation.features import build_encoder, clean_features
from evaluation.figures import (
    Figure,
    plot_confusion,
    plot_curves,
    plot_embedding,
    plot_neighbours,
    plot_views,
    save,
)
from evaluation.runs import noted, run_config, run_results
from images.datasets import Split, draw_stratified, load_split
from images.host import Images, take
from system.checkpoint import find_checkpoint, load_checkpoint
from system.commandline import quote_path, refusals
from system.device import select_device, select_precision
from system.errors import ConfigError, UserError, one_line_errors
from training.metrics import read_metrics

EMBEDDED = 2000  # test images in the t-SNE; more take minutes and look no different
Failed = list[tuple[str, UserError]]


def views(cfg: DictConfig) -> Figure:
    """Random views of images of the pretraining split."""
    split = load_split(cfg.dataset, cfg.data_dir, "pretrain", cfg.image_size, cfg.workers)
    return plot_views(cfg, split.images)


def curves(
    configs: dict[Path, DictConfig], metrics: dict[Path, list[dict[str, float | None]]]
) -> Figure:
    """Training curves of the runs in `metrics`, named by the settings that differ, or by path."""
    first, *others = (configs[run] for run in metrics)
    differing = [k for k in first if k not in MAY_CHANGE and any(c[k] != first[k] for c in others)]
    named = [
        (", ".join(f"{key} {configs[run][key]}" for key in differing) or str(run), lines)
        for run, lines in metrics.items()
    ]
    return plot_curves(named)


class Represented(NamedTuple):
    """Labelled images and their representations by a checkpoint."""

    train: Split
    h: Tensor  # (M, D), of the training images
    test: Split
    test_h: Tensor  # (N, D)
    epoch: int  # of the checkpoint
    untrained: Callable[[Images], Tensor]  # representations by the same network before training


def represent(run: Path, cfg: DictConfig) -> Represented:
    """Representations by cfg.checkpoint, else the newest of the run.

    Raises UserError if the checkpoint or the labelled data is missing or damaged.
    """
    device, size = select_device(cfg.device), cfg.image_size
    given = cfg.checkpoint and Path(os.path.expanduser(cfg.checkpoint))
    saved = load_checkpoint(path := given or find_checkpoint(run, cfg.backbone, None))
    names = "checkpoint", "random"  # with the run's seed: its initial weights, but with an init
    encoders = [build_encoder(saved, path, name, cfg.seed)[0].to(device).eval() for name in names]
    train, test = (
        load_split(cfg.dataset, cfg.data_dir, split, size, cfg.workers).to(device)
        for split in ("train", "test")
    )
    settings = {"size": size, "batch_size": cfg.batch_size,
                "dtype": select_precision(cfg.precision, device)}  # fmt: skip
    after, before = (partial(clean_features, encoder, **settings) for encoder in encoders)
    return Represented(train, after(train.images), test, after(test.images), saved["epoch"], before)


def embedding(data: Represented) -> Figure:
    """t-SNE of a sample of the test images, before and after pretraining."""
    labels = data.test.labels
    chosen = draw_stratified(labels, min(EMBEDDED / len(labels), 0.999), seed=0)
    before = data.untrained(take(data.test.images, chosen))
    panels = {"untrained network": before, f"after {data.epoch} epochs": data.test_h[chosen]}
    return plot_embedding(panels, labels[chosen], data.test.classes)


def neighbours(data: Represented, size: int) -> Figure:
    """Test images and their nearest training images."""
    return plot_neighbours(data.train, data.h, data.test, data.test_h, size)


def confusion(run: Path) -> Figure:
    """The confusion matrix of a run. Raises UserError without one."""
    results = run_results(run, MAY_CHANGE)
    if "confusion" not in results:
        raise UserError(f"no linear evaluation in {run} yet; simclr_lin.py makes it")
    return plot_confusion(results)


def pictures(
    runs: list[Path], overrides: list[str], failed: Failed
) -> Iterator[tuple[str, Callable[[], Figure]]]:
    """Name and function of each picture, the quick ones first: none needs another.

    A function raises UserError if its picture cannot be drawn; runs that cannot be read are noted
    in `failed`.
    """
    configs, metrics = {}, {}
    for run in runs or [None]:
        with noted(failed):
            configs[run] = read_config(run, overrides)
            with noted(failed, "curves"):
                if run is not None:
                    metrics[run] = read_epochs(run)
    if metrics:
        yield "curves", partial(curves, configs, metrics)
    if len(runs) > 1 or not configs:
        return
    [(run, cfg)] = configs.items()
    yield "views", partial(views, cfg)
    if run is not None:
        data = cache(partial(represent, run, cfg))
        yield "confusion", partial(confusion, run)
        yield "embedding", lambda: embedding(data())
        yield "neighbours", lambda: neighbours(data(), cfg.image_size)


def read_epochs(run: Path) -> list[dict[str, float | None]]:
    """The lines of metrics.jsonl. Raises UserError if there is none yet, and as `read_metrics`."""
    if not (lines := read_metrics(run)):
        raise UserError(f"{run} has no epoch to show yet: metrics.jsonl is empty")
    return lines


def read_config(run: Path | None, overrides: list[str]) -> DictConfig:
    """The checked config of a run, or of simclr_config.yml if `run` is None, with overrides."""
    register_config()
    given = {override.split("=")[0] for override in overrides}
    if run is not None and "recipe" in given:
        raise ConfigError(f"recipe: must be left out beside {run}, whose config has the values")
    with refusals(RULES, overrides), initialize(version_base="1.3", config_path=None):
        cfg = compose("simclr_config", overrides=overrides)
    checked = check_values(cfg)
    if run is None:
        return checked
    saved = run_config(run)
    try:
        known = {key: saved[key] for key in saved if key in RULES and key not in given}
        return check_values(OmegaConf.create({**OmegaConf.to_container(cfg), **known}))
    except ConfigError as error:
        raise ConfigError(f"the config of {run}: {error}") from None


def draw(runs: list[Path], overrides: list[str], out: Path) -> None:
    """Write the pictures that can be drawn to `out`; print their paths, and why others cannot.

    Raises UserError if there is no picture.
    """
    failed: Failed = []
    drawn, boxes = set(), set()
    for name, picture in pictures(runs, overrides, failed):
        with noted(failed, name):
            figure = picture()
            out.mkdir(parents=True, exist_ok=True)
            boxes |= save(figure, out / name)
            drawn.add(name)
        if name in drawn:
            print(out / f"{name}.png")
    reasons: dict[str, list[str]] = {}
    for name, error in failed:
        reasons.setdefault(" ".join(str(error).split()), []).append(name)
    said = [f"{', '.join(names)}: {reason}".lstrip(", :") for reason, names in reasons.items()]
    if not drawn:
        worst = max((error for _, error in failed), key=lambda error: error.exit_code)
        raise type(worst)("; ".join(said))
    for line in said:
        print(f"not drawn: {line}")
    if boxes:
        print(f"drawn as boxes, for no installed font has them: {''.join(sorted(boxes))}")


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
        draw(runs, overrides, args.out or (runs[0] if runs else Path()))


if __name__ == "__main__":
    main()
