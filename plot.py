"""Pictures of a run: augmented views, training curves, embedding, neighbours.

    python plot.py RUN                 # all of them, as PNG and SVG, into the run directory
    python plot.py dataset=digits      # views.png alone, from the config, before any training

curves       loss, contrastive accuracy, learning rate, kNN, effective rank over the epochs
views        images, each with eight of its random views
embedding    t-SNE of the representations of test images, before and after (newest checkpoint)
neighbours   the first test image of each class, and its nearest training images

Keys of simclr_config.yml may follow. The exit code is 0 if a picture was drawn.
"""

import argparse
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from hydra import compose, initialize
from matplotlib.figure import Figure

from config import Config, ConfigError, keys
from evaluation import figures
from evaluation.features import build_encoder, clean_features, open_checkpoint
from images.datasets import Split, draw_stratified, load_split, select_images
from system.checkpoint import find_checkpoint
from system.commandline import register_config, to_config
from system.errors import UserError, describe, error_boundary
from system.files import read_config, read_metrics

EMBEDDED = 2000  # test images in the t-SNE; more take minutes and look no different


def embedding(path: Path, cfg: Config) -> Figure:
    """t-SNE of test images, with the seed's initial weights and with those of the checkpoint."""
    saved, cfg, device = open_checkpoint(cfg, path)
    test = load_split(cfg, "test").to(device)
    chosen = draw_stratified(test.labels, min(EMBEDDED / len(test.labels), 0.999), seed=0)
    images, panels = select_images(test.images, chosen), {}
    titles = {"random": "untrained network", "checkpoint": f"after {saved['epoch']} epochs"}
    for encoder, title in titles.items():
        enc = build_encoder(saved, path, encoder, cfg.seed).to(images.device).eval()
        panels[title] = clean_features(enc, images, cfg)
    return figures.plot_embedding(panels, test.labels[chosen], test.classes)


def neighbours(path: Path, cfg: Config) -> Figure:
    """The first test image of up to ten classes, and the training images nearest to it."""
    saved, cfg, device = open_checkpoint(cfg, path)
    train, test = (load_split(cfg, split).to(device) for split in ("train", "test"))
    first = torch.cat([(test.labels == label).nonzero()[0] for label in test.labels.unique()[:10]])
    queries = Split(select_images(test.images, first), test.labels[first], test.classes)
    enc = build_encoder(saved, path, "checkpoint", cfg.seed).to(device).eval()
    h, query_h = (clean_features(enc, split.images, cfg) for split in (train, queries))
    return figures.plot_neighbours(train, h, queries, query_h, cfg.image_size)


def compose_config(run: Path | None, overrides: list[str]) -> Config:
    """The config of a run, or of simclr_config.yml if `run` is None, with the overrides."""
    register_config()
    with initialize(version_base="1.3", config_path=None):
        cfg = to_config(compose("simclr_config", overrides=overrides))
    if run is None:
        return cfg
    given = {override.split("=")[0] for override in overrides}
    if "recipe" in given:
        raise ConfigError(f"recipe: must be left out beside {run}, whose config has the values")
    saved = read_config(run)
    return replace(cfg, **{key: saved[key] for key in keys(Config) if key in saved.keys() - given})


def pictures(run: Path | None, overrides: list[str]) -> dict[str, Callable[[], Figure]]:
    """Name and function of each picture, the quick ones first: none needs another."""
    cfg = compose_config(run, overrides)
    views = {"views": lambda: figures.plot_views(load_split(cfg, "pretrain").images, cfg)}
    if run is None:
        return views

    def checkpoint() -> Path:
        return find_checkpoint(Path(cfg.checkpoint or run), None, cfg.load_epoch)

    return views | {
        "curves": lambda: figures.plot_curves(read_metrics(run)),
        "embedding": lambda: embedding(checkpoint(), cfg),
        "neighbours": lambda: neighbours(checkpoint(), cfg),
    }


def main() -> None:
    """Draw all pictures that can be drawn, and print their paths, and why others cannot."""
    raw = argparse.RawTextHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("arguments", nargs="+", metavar="RUN or key=value")
    parser.add_argument("--out", help="directory for the pictures; default: the run's")
    args = parser.parse_args()
    given = [text.replace("=~/", f"={Path.home()}/") for text in args.arguments]  # as a shell
    overrides = [text for text in given if "=" in text and not Path(text).is_dir()]
    runs = [Path(text).expanduser() for text in given if text not in overrides]
    if len(runs) > 1:
        parser.error("more than one run directory: TensorBoard shows several")
    run = runs[0] if runs else None
    out = Path(args.out or run or "").expanduser()
    drawn = []
    with error_boundary():
        for name, picture in pictures(run, overrides).items():
            try:
                figures.save(picture(), out / name)
                drawn.append(name)
                print(out / f"{name}.png")
            except Exception as error:
                if (known := describe(error)) is None:  # a bug
                    raise
                print(f"{name} is not drawn: {known[0]}", file=sys.stderr)
        if not drawn:
            raise UserError("no picture could be drawn")


if __name__ == "__main__":
    main()
