"""Evaluation of a SimCLR encoder: linear (Sec. 2.3, App. B.6), kNN, and more.

    python simclr_lin.py backbone=resnet18                    # newest checkpoint of the run
    python simclr_lin.py checkpoint=path/to/file.pt           # any checkpoint
    python simclr_lin.py "protocols=[knn,linear,logistic]" "baselines=[random,pixels]"
    python simclr_lin.py labels=0.01 runs=5                   # few labels, five draws of them
    python simclr_lin.py predict=path/to/images               # predictions.csv instead

The encoder runs in eval mode without gradients, and is checked to be unchanged; finetune trains a
copy. Hyperparameters are chosen on training images; the test set is scored once. The table goes to
the terminal, to simclr_lin.log, results.json and results.md.
"""

import system.environment  # noqa: F401, first
import logging
import os
from itertools import product
from pathlib import Path
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, ListConfig

from config import RULES, check_config, register_config
from evaluation import results as report
from evaluation.classifiers import EvaluationTask
from evaluation.features import build_encoder
from evaluation.memory import check_memory
from evaluation.protocols import protocols_for, run_protocols
from images.datasets import Split, draw_stratified, load_split
from images.folder import load_images
from images.host import Images, describe, place, take
from system.checkpoint import ARCHITECTURE, find_checkpoint, load_checkpoint, named_checkpoint
from system.commandline import run_command, run_directory
from system.device import select_device, select_precision
from system.errors import ConfigError, UserError
from system.files import locked
from training.distributed import is_distributed

log = logging.getLogger("simclr_lin")


def evaluate(
    cfg: DictConfig, checkpoint: Path, out_dir: Path, given: frozenset[str] = frozenset()
) -> dict[str, Any]:
    """Evaluate a checkpoint, and cfg.baselines, with every protocol in the config.

    given: the keys on the command line; one that contradicts the checkpoint is refused. Returns
    what it writes to `out_dir`/results.json after each protocol, with accuracies in [0, 1]. Raises
    UserError for a checkpoint or data that cannot be used, and as `check_memory` and
    `run_protocols`; RuntimeError if a frozen encoder has changed.
    """
    device = select_device(cfg.device)
    saved, size = open_checkpoint(cfg, checkpoint, given)
    train, test = (
        load_split(cfg.dataset, cfg.data_dir, split, size, cfg.workers).to(device)
        for split in ("train", "test")
    )
    scored: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for encoder, seed in product(("checkpoint", *cfg.baselines), range(cfg.runs)):
        task = make_task(cfg, saved, checkpoint, encoder, train, test.images, cfg.seed + seed)
        if not scored:
            check_memory(task, ["checkpoint", *cfg.baselines], cfg.protocols)
            used = describe(train.images, cfg.dataset)  # nothing can be refused any more
            name = f"{checkpoint}, epoch {saved['epoch']}, {saved['config']['backbone']}"
            for line in (
                f"{name} at {size} px, on {used}, {device}",
                *train.remarks,
                *test.remarks,
            ):
                log.info(line)
            about = report.describe_source(cfg, saved, checkpoint, task)
        names = protocols_for(encoder, cfg.protocols, seed > 0, cfg.labels is not None)
        for protocol, result, seconds in run_protocols(names, task):
            outcome = report.score(result, test.labels.cpu(), seconds)
            scored.setdefault((encoder, protocol), []).append(outcome)
            log.info(f"{encoder}, seed {task.seed}, {protocol}: {outcome['accuracy']:.2%}")
            results = report.write_results(out_dir, about, scored, test.classes)
    shown = report.table(results["protocols"], settings=False)
    log.info(f"{len(test.images):,} test images, accuracy in %\n{shown}")
    return results


def predict(
    cfg: DictConfig, checkpoint: Path, out_dir: Path, given: frozenset[str] = frozenset()
) -> Path:
    """Classify the images below cfg.predict; returns the path of predictions.csv in `out_dir`.

    The linear layer is trained on the training images, as in `evaluate`; the test set is not read.
    Raises as `evaluate`.
    """
    device = select_device(cfg.device)
    saved, size = open_checkpoint(cfg, checkpoint, given)
    directory = Path(os.path.expanduser(cfg.predict))
    if not directory.is_dir():
        raise UserError(f"predict={cfg.predict}: there is no directory {directory}")
    files, images, remarks = load_images(directory, size, cfg.workers)
    train = load_split(cfg.dataset, cfg.data_dir, "train", size, cfg.workers).to(device)
    task = make_task(cfg, saved, checkpoint, "checkpoint", train, place(images, device), cfg.seed)
    check_memory(task, ["checkpoint"], ["linear"])
    [(_, result, _)] = run_protocols(["linear"], task)
    probability, label = result.scores.softmax(dim=1).max(dim=1)
    classes = [train.classes[best] for best in label.tolist()]
    path = report.write_predictions(out_dir, files, classes, probability.tolist())
    for remark in (*remarks, *train.remarks):
        log.info(remark)
    log.info(f"{len(files):,} images of {cfg.predict}: their classes are in {path}")
    return path


def open_checkpoint(
    cfg: DictConfig, checkpoint: Path, given: frozenset[str]
) -> tuple[dict[str, Any], int]:
    """The checkpoint and its image size.

    Raises ConfigError if the command line names another architecture; else as `load_checkpoint`.
    """
    saved = load_checkpoint(checkpoint)
    for key in given & set(ARCHITECTURE):
        if cfg[key] != (trained := saved["config"][key]):
            raise ConfigError(
                f"{key}={cfg[key]}: must be {trained}, as in {checkpoint}; leave it out"
            )
    return saved, saved["config"]["image_size"]


def make_task(
    cfg: DictConfig,
    saved: dict[str, Any],
    path: Path,
    encoder: str,
    train: Split,
    test_images: Images,
    seed: int,
) -> EvaluationTask:
    """The input of the protocols for one encoder and one seed."""
    if len(train.classes) < 2:
        raise UserError(
            f"there is one class, {train.classes[0]}: a classifier needs two or more; name "
            "labelled images with dataset= and data_dir=, beside checkpoint=PATH"
        )
    if cfg.labels is not None:
        index = draw_stratified(train.labels, cfg.labels, seed)
        train = Split(take(train.images, index), train.labels[index], train.classes)
    size = saved["config"]["image_size"]
    enc, feature_dim = build_encoder(saved, path, encoder, seed)
    choices = cfg.finetune_learning_rate, cfg.finetune_weight_decay  # each a value or a list
    choices = (list(c) if isinstance(c, ListConfig) else [c] for c in choices)
    candidates = [{"learning_rate": r, "weight_decay": d} for r, d in product(*choices)]
    return EvaluationTask(
        enc.to(test_images.device),
        feature_dim,
        size,
        train,
        test_images,
        candidates,
        cfg.finetune_epochs,
        cfg.batch_size,
        cfg.min_learning_rate,
        cfg.momentum,
        cfg.finetune_views,
        (tuple(cfg.crop_scale), cfg.flip_probability),
        select_precision(cfg.precision, test_images.device),
        seed,
        encoder=encoder,
    )


register_config()


@hydra.main(version_base="1.3", config_path=None, config_name="simclr_config")
def main(cfg: DictConfig) -> None:
    """Check the config, find the checkpoint in Hydra's run directory and evaluate it."""
    if is_distributed():
        reason = "start it with python, or env -u WORLD_SIZE python where a job script has set that"
        raise ConfigError(f"simclr_lin.py runs in one process: {reason}")
    cfg, out_dir = check_config(cfg, peak="finetune_learning_rate"), run_directory()
    overrides = HydraConfig.get().overrides.task
    given = frozenset(override.split("=")[0].lstrip("+") for override in overrides)
    if cfg.checkpoint is not None:
        backbone = cfg.backbone if "backbone" in given else None
        checkpoint = named_checkpoint(cfg.checkpoint, backbone, cfg.load_epoch)
    else:
        checkpoint = find_checkpoint(out_dir, cfg.backbone, cfg.load_epoch)
    with locked(out_dir, "simclr_lin"):
        (evaluate if cfg.predict is None else predict)(cfg, checkpoint, out_dir, given)


if __name__ == "__main__":
    run_command(main, RULES)
