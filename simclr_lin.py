"""What a SimCLR encoder has learned: linear evaluation (Sec. 2.3, App. B.6), kNN, and more.

    python simclr_lin.py backbone=resnet18                    # newest checkpoint in the run folder
    python simclr_lin.py checkpoint=path/to/file.pt           # any file
    python simclr_lin.py protocols=[knn,linear,linear_clean,logistic] baselines=[random,pixels]
    python simclr_lin.py labels=0.01 runs=5                   # few labels, five draws of them
    python simclr_lin.py predict=path/to/images               # predictions.csv instead

knn           cosine kNN: k = 10, and weighted with k = 200, τ = 0.07 (Wu et al. 2018)
linear        a linear layer on random crops and flips, the encoder frozen: the headline
linear_clean  the same layer on the images as they are
logistic      scikit-learn's logistic regression on the same features
finetune      all of the network is trained on the labels: fine-tuning, never linear evaluation

The encoder is in eval mode, without gradients, and checked to be unchanged; finetune trains a copy.
What has to be chosen is chosen on training images; the test set is scored once. The table goes to
the terminal, to simclr_lin.log, results.json and results.md.
"""

import csv
import logging
from collections import defaultdict
from itertools import product
from pathlib import Path
from typing import Any

import hydra
import torch
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, ListConfig
from torch import Tensor, nn

from checkpoint import architecture, build_model, find_checkpoint, load_checkpoint, sha256
from config import check_config, register_config, run_folder
from data import Split, draw_stratified, load_images, load_split
from device import select_device, select_precision
from errors import ConfigError, UserError, one_line_errors
from files import replacing
from protocols import Task, run_protocols
from results import Outcome, per_class, score, summarise, table, write_results

log = logging.getLogger("simclr_lin")

ROWS = {"knn": ["knn", "weighted_knn"]}  # one protocol, two rows; the others are one
ON_PIXELS = ("knn", "weighted_knn", "linear")  # what a baseline without a network is judged by


def evaluate(
    cfg: DictConfig, checkpoint: Path, out_dir: Path, given: frozenset[str] = frozenset()
) -> dict[str, Any]:
    """All of cfg.protocols for the encoder in `checkpoint`, and for cfg.baselines.

    `given` names the keys that the user typed: one that contradicts the checkpoint is refused.
    Returns what it writes to `out_dir`/results.json; accuracies are shares in [0, 1]. Raises
    UserError for a checkpoint or data that cannot be used, RuntimeError if an encoder that should
    be frozen has changed.
    """
    device = select_device(cfg.device)
    saved, size = open_checkpoint(cfg, checkpoint, given)
    train, test = (
        load_split(cfg.dataset, cfg.data_dir, split, size, cfg.workers).to(device)
        for split in ("train", "test")
    )
    name = f"{checkpoint}, epoch {saved['epoch']}, {saved['config']['backbone']} at {size} px"
    log.info(f"{name}, on {cfg.dataset}, {device}")

    outcomes: dict[tuple[str, str], list[Outcome]] = defaultdict(list)
    for encoder in ("checkpoint", *cfg.baselines):
        for run in range(cfg.runs):
            model = build_encoder(saved, checkpoint, encoder, size, cfg.seed + run)
            part = labelled_part(train, cfg.labels, cfg.seed + run)
            task = make_task(cfg, *model, size, part, test.images, cfg.seed + run)
            for protocol, found, seconds in run_protocols(rows_of(cfg, encoder, run), task):
                outcomes[encoder, protocol].append(score(found, test.labels, seconds))
    rows = [summarise(*key, runs) for key, runs in outcomes.items()]
    of_checkpoint = {row["protocol"]: row for row in rows if row["encoder"] == "checkpoint"}
    results = {
        "linear_acc": of_checkpoint.get("linear", {}).get("accuracy"),
        "linear_top5": of_checkpoint.get("linear", {}).get("top5"),
        "knn_acc": of_checkpoint.get("knn", {}).get("accuracy"),
        "checkpoint": str(checkpoint),
        "sha256": sha256(checkpoint),
        "epoch": saved["epoch"],
        "backbone": saved["config"]["backbone"],
        "dataset": cfg.dataset,
        "training_images": len(part.images),
        "test_images": len(test.images),
        "precision": str(task.dtype).removeprefix("torch."),
        "protocols": rows,
        **per_class(outcomes["checkpoint", "linear"], test.classes),
        "config": saved["config"],
    }
    write_results(out_dir, results)
    log.info(f"{len(test.images):,} test images, accuracy in %\n{table(rows, settings=False)}")
    return results


def predict(
    cfg: DictConfig, checkpoint: Path, out_dir: Path, given: frozenset[str] = frozenset()
) -> Path:
    """Classify the images in cfg.predict by the linear layer; writes `out_dir`/predictions.csv.

    The layer is trained on the training images, as in `evaluate`; the test set is not read.
    """
    device = select_device(cfg.device)
    saved, size = open_checkpoint(cfg, checkpoint, given)
    folder = Path(cfg.predict).expanduser()
    if not folder.is_dir():
        raise UserError(f"predict={cfg.predict}: there is no such folder")
    files, images = load_images(folder, size, cfg.workers)
    train = load_split(cfg.dataset, cfg.data_dir, "train", size, cfg.workers).to(device)
    model = build_encoder(saved, checkpoint, "checkpoint", size, cfg.seed)
    part = labelled_part(train, cfg.labels, cfg.seed)
    task = make_task(cfg, *model, size, part, images.to(device), cfg.seed)
    [(_, found, _)] = run_protocols(["linear"], task)
    probability, label = found.scores.softmax(dim=1).max(dim=1)
    path = out_dir / "predictions.csv"
    with (
        replacing(path) as temporary,
        open(temporary, "w", newline="", encoding="utf-8") as file,
    ):
        writer = csv.writer(file)
        writer.writerow(["file", "class", "probability"])
        for name, best, p in zip(files, label.tolist(), probability.tolist(), strict=True):
            writer.writerow([name, train.classes[best], f"{p:.4f}"])
    log.info(f"{len(files):,} images of {cfg.predict}: their classes are in {path}")
    return path


def open_checkpoint(
    cfg: DictConfig, checkpoint: Path, given: frozenset[str]
) -> tuple[dict[str, Any], int]:
    """The checkpoint and its image size; ConfigError if the user typed another architecture."""
    saved = load_checkpoint(checkpoint)
    trained = architecture(saved, checkpoint)
    for key in given & set(trained):
        if cfg[key] != trained[key]:
            raise ConfigError(
                f"{key}={cfg[key]}: must be {trained[key]}, as in {checkpoint}; leave it out"
            )
    return saved, trained["image_size"]


def labelled_part(train: Split, labels: float | None, seed: int) -> Split:
    """The training images whose labels may be used: all, or so many of each class (or a share)."""
    if len(train.classes) < 2:
        raise UserError(f"there is one class, {train.classes[0]}: to classify takes two or more")
    if labels is None:
        return train
    index = draw_stratified(train.labels, labels, seed)
    return Split(train.images[index], train.labels[index], train.classes)


def build_encoder(
    saved: dict[str, Any], path: Path, encoder: str, size: int, seed: int
) -> tuple[nn.Module, int]:
    """An encoder and its feature size: the checkpoint's, the same one untrained, or pixels."""
    if encoder == "pixels":
        return nn.Flatten(), 3 * size * size
    torch.manual_seed(seed)  # weights of an untrained one
    model = build_model(saved, path, trained=encoder == "checkpoint")
    return model.enc.to(memory_format=torch.channels_last), model.feature_dim


def make_task(
    cfg: DictConfig,
    enc: nn.Module,
    feature_dim: int,
    size: int,
    train: Split,
    test_images: Tensor,
    seed: int,
) -> Task:
    """What the config says about the protocols, with the encoder and the images."""
    rates, decays = (
        list(value) if isinstance(value, ListConfig) else [value]
        for value in (cfg.finetune_learning_rate, cfg.finetune_weight_decay)
    )
    return Task(
        enc.to(test_images.device),
        feature_dim,
        size,
        train,
        test_images,
        [{"learning_rate": r, "weight_decay": d} for r, d in product(rates, decays)],
        cfg.finetune_epochs,
        cfg.batch_size,
        cfg.min_learning_rate,
        cfg.momentum,
        cfg.finetune_views,
        (tuple(cfg.crop_scale), cfg.flip_probability),
        select_precision(cfg.precision, test_images.device),
        seed,
    )


def rows_of(cfg: DictConfig, encoder: str, run: int) -> list[str]:
    """The protocols for this encoder, less those in which nothing is random after the first run."""
    rows = [row for protocol in cfg.protocols for row in ROWS.get(protocol, [protocol])]
    if encoder == "pixels":
        rows = [row for row in rows if row in ON_PIXELS]
    if run > 0 and encoder != "random" and cfg.labels is None:
        rows = [row for row in rows if row not in ROWS["knn"]]
    return rows


register_config()


@hydra.main(version_base="1.3", config_path=None, config_name="simclr_config")
def main(cfg: DictConfig) -> None:
    """Check the config, find the checkpoint in the run folder and evaluate it."""
    with one_line_errors():
        cfg = check_config(cfg, peak="finetune_learning_rate")
        out_dir = run_folder()
        overrides = HydraConfig.get().overrides.task
        given = frozenset(override.split("=")[0].lstrip("+") for override in overrides)
        if cfg.checkpoint is not None:
            checkpoint = Path(cfg.checkpoint).expanduser()
        else:
            checkpoint = find_checkpoint(out_dir, cfg.backbone, cfg.load_epoch)
        (evaluate if cfg.predict is None else predict)(cfg, checkpoint, out_dir, given)


if __name__ == "__main__":
    main()
