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
from collections.abc import Callable, Iterator
from functools import cache, partial
from pathlib import Path
from typing import Any

from hydra import compose, initialize
from omegaconf import DictConfig, OmegaConf

from config import MAY_CHANGE, RULES, check_values, register_config
from evaluation import figures
from evaluation.features import build_encoder, clean_features
from evaluation.runs import Failed, noted, run_config, run_results
from images.datasets import draw_stratified, load_split
from images.host import take
from system.checkpoint import find_checkpoint, load_checkpoint, named_checkpoint
from system.commandline import quote_path, refusals
from system.device import select_device, select_precision
from system.errors import ConfigError, UserError, one_line_errors
from training.metrics import read_metrics

EMBEDDED = 2000  # test images in the t-SNE; more take minutes and look no different


def curves(runs: dict[Path, tuple[DictConfig, list[dict[str, float | None]]]]) -> figures.Figure:
    """Curves of runs (config, metrics), each named by the settings that differ, or by its path."""
    first, *others = (cfg for cfg, _ in runs.values())
    differing = [k for k in first if k not in MAY_CHANGE and any(c[k] != first[k] for c in others)]
    named = [
        (", ".join(f"{key} {cfg[key]}" for key in differing) or str(run), metrics)
        for run, (cfg, metrics) in runs.items()
    ]
    return figures.plot_curves(named)


def represent(run: Path, cfg: DictConfig) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """The arguments of `plot_embedding` and `plot_neighbours`, for cfg.checkpoint or the newest.

    Raises UserError if the checkpoint or the labelled data is missing or damaged.
    """
    device, size = select_device(cfg.device), cfg.image_size
    given = cfg.checkpoint and named_checkpoint(cfg.checkpoint)
    saved = load_checkpoint(path := given or find_checkpoint(run, cfg.backbone, None))
    names = "checkpoint", "random"  # with the run's seed: its initial weights, but with an init
    encoders = [build_encoder(saved, path, name, cfg.seed)[0].to(device).eval() for name in names]
    train, test = (
        load_split(cfg.dataset, cfg.data_dir, split, size, cfg.workers).to(device)
        for split in ("train", "test")
    )
    inference = size, cfg.batch_size, select_precision(cfg.precision, device)
    h, test_h = (clean_features(encoders[0], split.images, *inference) for split in (train, test))
    labels = test.labels
    chosen = draw_stratified(labels, min(EMBEDDED / len(labels), 0.999), seed=0)
    before = clean_features(encoders[1], take(test.images, chosen), *inference)
    panels = {"untrained network": before, f"after {saved['epoch']} epochs": test_h[chosen]}
    return (panels, labels[chosen], test.classes), (train, h, test, test_h, size)


def pictures(
    runs: list[Path], overrides: list[str], failed: Failed
) -> Iterator[tuple[str, Callable[[], figures.Figure]]]:
    """Name and function of each picture, the quick ones first: none needs another.

    A function raises UserError if its picture cannot be drawn. What the curves of a run lack is
    noted in `failed`; a single run without a config raises UserError.
    """
    read = {}
    for run in runs:
        with noted(failed, "curves"):
            cfg, metrics = read_config(run, overrides), read_metrics(run)
            if not metrics:
                raise UserError(f"{run} has no epoch to show yet")
            read[run] = cfg, metrics
    if read:
        yield "curves", partial(curves, read)
    if len(runs) > 1:
        return
    run = runs[0] if runs else None
    cfg = read_config(run, overrides)
    source = cfg.dataset, cfg.data_dir, "pretrain", cfg.image_size, cfg.workers
    yield "views", lambda: figures.plot_views(cfg, load_split(*source).images)
    if run is not None:
        data = cache(partial(represent, run, cfg))
        yield "confusion", lambda: figures.plot_confusion(run_results(run, MAY_CHANGE))
        yield "embedding", lambda: figures.plot_embedding(*data()[0])
        yield "neighbours", lambda: figures.plot_neighbours(*data()[1])


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
    failed: Failed = {}
    drawn = 0
    for name, picture in pictures(runs, overrides, failed):
        with noted(failed, name):
            figures.save(picture(), out / name)
            print(out / f"{name}.png")
            drawn += 1
    reasons = [f"{', '.join(names)}: {line}" for (line, _), names in failed.items()]
    if not drawn:
        raise UserError("; ".join(reasons))
    for reason in reasons:
        print(f"not drawn: {reason}")


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
    draw(runs, overrides, args.out or (runs[0] if runs else Path()))


if __name__ == "__main__":
    main()
