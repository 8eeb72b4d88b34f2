"""Evaluation of a SimCLR encoder: linear (Sec. 2.3, App. B.6), kNN, and more.

    python simclr_lin.py backbone=resnet18                    # newest checkpoint of the run
    python simclr_lin.py checkpoint=path/to/file.pt           # any checkpoint
    python simclr_lin.py "protocols=[knn,linear,logistic]" "baselines=[random,pixels]"
    python simclr_lin.py labels=0.01 runs=5                   # few labels, five draws of them

The encoder is frozen, and checked to be unchanged; finetune trains a copy. Hyperparameters are
chosen on training images; the test set is scored once, into results.json and a table.
"""

import hashlib
import json
import logging
from collections import defaultdict
from dataclasses import asdict, replace
from itertools import product
from pathlib import Path
from typing import Any

import hydra
import torch
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig
from torch import Tensor

from config import Config
from evaluation import results as report
from evaluation.features import accuracy, build_encoder, open_checkpoint
from evaluation.protocols import Result, make_task, protocols_for, run_protocol
from images import datasets
from images.datasets import Split, load_split
from system.checkpoint import find_checkpoint
from system.commandline import run_command, run_directory, to_config
from system.files import locked, write_file

log = logging.getLogger("simclr_lin")


def evaluate(
    cfg: Config, checkpoint: Path, out_dir: Path, given: frozenset[str] = frozenset()
) -> dict[str, Any]:
    """Evaluate a checkpoint, and cfg.baselines, with every protocol in the config.

    Returns what it writes to `out_dir`/results.json; given: the keys on the command line. Raises
    ConfigError, UserError, and RuntimeError if a frozen encoder has changed.
    """
    saved, cfg, device = open_checkpoint(cfg, checkpoint, given)
    train, test = (load_split(cfg, split) for split in ("train", "test"))
    images = hashlib.sha256()
    for values in (train.images, train.labels, test.images, test.labels):
        images.update(values.contiguous().numpy())
    train, test = train.to(device), test.to(device)
    path = out_dir / ("results.json" if cfg.labels is None else f"results_labels{cfg.labels}.json")
    results = report.open_results(path, {
        "checkpoint": str(checkpoint),
        "sha256": hashlib.sha256(checkpoint.read_bytes()).hexdigest(),
        "epoch": saved["epoch"],
        **{key: getattr(cfg, key) for key in ("backbone", "dataset", "labels", "precision")},
        "training_images": len(draw_labelled(train, cfg).labels),
        "test_images": len(test.labels),
        "classes": test.classes,
        "images_sha256": images.hexdigest(),
        "config": saved["config"],
        "evaluation_config": asdict(cfg),
    })  # fmt: skip
    log.info(f"{checkpoint}, {cfg.backbone} at {cfg.image_size} px, {cfg.dataset}, on {device}")

    scored = defaultdict(list)
    for encoder, run in product(("checkpoint", *cfg.baselines), range(cfg.runs)):
        run_cfg = replace(cfg, seed=cfg.seed + run)
        names = protocols_for(run_cfg, encoder, first_run=run == 0)
        if not names:
            continue
        labelled = draw_labelled(train, run_cfg)
        enc = build_encoder(saved, checkpoint, encoder, run_cfg.seed).to(device)
        task = make_task(run_cfg, encoder, enc, labelled, test.images)
        for protocol in names:
            outcome = score(run_protocol(protocol, task), test.labels.cpu())
            log.info(f"{task.name}, {protocol}: {outcome['accuracy']:.2%}")
            scored[encoder, protocol].append(outcome)
            report.add_row(results, encoder, protocol, scored[encoder, protocol])
            write_file(path, (json.dumps(results, indent=2) + "\n").encode())
    log.info(f"{len(test.labels):,} test images, accuracy in %\n{report.table(results)}")
    return results


def draw_labelled(train: Split, cfg: Config) -> Split:
    """The labelled training images: all, or those that cfg.seed draws for cfg.labels."""
    allowed = f"of labelled images in two classes or more: there is {train.classes[0]} alone"
    cfg.require("dataset", len(train.classes) > 1, allowed)
    if cfg.labels is None:
        return train
    index = datasets.draw_stratified(train.labels, cfg.labels, cfg.seed)
    images = datasets.select_images(train.images, index)
    return Split(images, train.labels[index], train.classes)


def score(result: Result, labels: Tensor) -> dict[str, Any]:
    """Score by the labels (N,) of the test images; confusion: (C, C), a row for each true class."""
    classes = result.scores.shape[1]
    confusion = torch.bincount(labels * classes + result.scores.argmax(dim=1), minlength=classes**2)
    return {
        "accuracy": accuracy(result.scores, labels),
        "confusion": confusion.view(classes, classes),
        "settings": result.settings,
        "selection": result.selection,
    }


@hydra.main(version_base="1.3", config_path=None, config_name="simclr_config")
def main(cfg: DictConfig) -> None:
    """Check the config, find the checkpoint in Hydra's run directory and evaluate it."""
    checked, out_dir = to_config(cfg), run_directory()
    overrides = HydraConfig.get().overrides.task
    given = frozenset(override.split("=")[0].lstrip("+") for override in overrides)
    checkpoint = Path(checked.checkpoint or out_dir)
    backbone = cfg.backbone if checked.checkpoint is None or "backbone" in given else None
    checkpoint = find_checkpoint(checkpoint, backbone, cfg.load_epoch)
    with locked(out_dir, "simclr_lin"):
        evaluate(checked, checkpoint, out_dir, given)


if __name__ == "__main__":
    run_command(main)
