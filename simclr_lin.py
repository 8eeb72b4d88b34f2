"""What a SimCLR encoder has learned: linear evaluation (Sec. 2.3, App. B.6), kNN, and more.

    python simclr_lin.py backbone=resnet18                    # newest checkpoint in the run folder
    python simclr_lin.py checkpoint=path/to/file.pt           # any file
    python simclr_lin.py "protocols=[knn,linear,logistic]" "baselines=[random,pixels]"
    python simclr_lin.py labels=0.01 runs=5                   # few labels, five draws of them
    python simclr_lin.py predict=path/to/images               # predictions.csv instead

The encoder is in eval mode, without gradients, and checked to be unchanged; finetune trains a copy.
What has to be chosen is chosen on training images; the test set is scored once. The table goes to
the terminal, to simclr_lin.log, results.json and results.md.
"""

import csv
import io
import logging
import os
from collections import defaultdict
from itertools import product
from pathlib import Path
from typing import Any

import hydra
import torch
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, ListConfig, OmegaConf
from torch import Tensor, nn

from checkpoint import ARCHITECTURE, build_model, find_checkpoint, load_checkpoint, sha256
from config import check_config, register_config, run_folder
from data import Split, draw_stratified, load_split
from device import select_device, select_precision
from distributed import launched
from errors import ConfigError, UserError, one_line_errors
from files import locked, write_file
from folder import load_images
from protocols import Task, run_protocols
from results import per_class, score, summarise, table, write_results

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
    outcomes: dict[tuple[str, str], list[dict[str, Any]]] = defaultdict(list)
    for encoder in ("checkpoint", *cfg.baselines):
        for seed in range(cfg.seed, cfg.seed + cfg.runs):
            task = make_task(cfg, saved, checkpoint, encoder, train, test.images, seed)
            if not outcomes:  # nothing can be refused any more
                log.info(f"{name}, on {cfg.dataset}, {device}")
            for protocol, found, seconds in run_protocols(rows_of(cfg, encoder, seed), task):
                outcome = score(found, test.labels.cpu(), seconds)
                outcomes[encoder, protocol].append(outcome)
                log.info(f"{encoder}, seed {seed}, {protocol}: {outcome['accuracy']:.2%}")
    rows = [summarise(*key, found) for key, found in outcomes.items()]
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
        "labels": cfg.labels,
        "training_images": len(task.train.images),
        "test_images": len(test.images),
        "precision": str(task.dtype).removeprefix("torch."),
        "protocols": rows,
        **per_class(outcomes["checkpoint", "linear"], test.classes),
        "config": saved["config"],
        "evaluation_config": OmegaConf.to_container(cfg),
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
    folder = Path(os.path.expanduser(cfg.predict))
    if not folder.is_dir():
        raise UserError(f"predict={cfg.predict}: there is no such folder")
    files, images = load_images(folder, size, cfg.workers)
    train = load_split(cfg.dataset, cfg.data_dir, "train", size, cfg.workers).to(device)
    task = make_task(cfg, saved, checkpoint, "checkpoint", train, images.to(device), cfg.seed)
    [(_, found, _)] = run_protocols(["linear"], task)
    probability, label = found.scores.softmax(dim=1).max(dim=1)
    path, text = out_dir / "predictions.csv", io.StringIO(newline="")
    writer = csv.writer(text)
    writer.writerow(["file", "class", "probability"])
    for name, best, p in zip(files, label.tolist(), probability.tolist(), strict=True):
        writer.writerow([name, train.classes[best], f"{p:.4f}"])
    write_file(path, text.getvalue().encode(errors="surrogateescape"))
    log.info(f"{len(files):,} images of {cfg.predict}: their classes are in {path}")
    return path


def open_checkpoint(
    cfg: DictConfig, checkpoint: Path, given: frozenset[str]
) -> tuple[dict[str, Any], int]:
    """The checkpoint and its image size; ConfigError if the user typed another architecture."""
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
    test_images: Tensor,
    seed: int,
) -> Task:
    """What the protocols are given: an encoder, the labelled images for this seed, the settings."""
    if len(train.classes) < 2:
        raise UserError(f"there is one class, {train.classes[0]}: to classify takes two or more")
    if cfg.labels is not None:
        index = draw_stratified(train.labels, cfg.labels, seed)
        train = Split(train.images[index], train.labels[index], train.classes)
    size = saved["config"]["image_size"]
    enc, feature_dim = build_encoder(saved, path, encoder, seed)
    rates, decays = map(as_list, (cfg.finetune_learning_rate, cfg.finetune_weight_decay))
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


def build_encoder(
    saved: dict[str, Any], path: Path, encoder: str, seed: int
) -> tuple[nn.Module, int]:
    """An encoder and its feature size: the checkpoint's, the same one untrained, or pixels."""
    if encoder == "pixels":
        return nn.Flatten(), 3 * saved["config"]["image_size"] ** 2
    torch.manual_seed(seed)  # weights of an untrained one
    model = build_model(saved, path, trained=encoder == "checkpoint")
    return model.enc.to(memory_format=torch.channels_last), model.feature_dim


def as_list(value: float | ListConfig) -> list[float]:
    """A value, or a list of values to choose from, as a list."""
    return list(value) if isinstance(value, ListConfig) else [value]


def rows_of(cfg: DictConfig, encoder: str, seed: int) -> list[str]:
    """The protocols for this encoder; what is not random is left out after the first seed."""
    rows = [row for protocol in cfg.protocols for row in ROWS.get(protocol, [protocol])]
    if encoder == "pixels":
        rows = [row for row in rows if row in ON_PIXELS]
    if seed > cfg.seed and encoder != "random" and cfg.labels is None:
        rows = [row for row in rows if row not in ROWS["knn"]]
    return rows


register_config()


@hydra.main(version_base="1.3", config_path=None, config_name="simclr_config")
def main(cfg: DictConfig) -> None:
    """Check the config, find the checkpoint in the run folder and evaluate it."""
    with one_line_errors():
        if launched():
            raise ConfigError("simclr_lin.py is for one process: start it by python, not torchrun")
        cfg = check_config(cfg, peak="finetune_learning_rate")
        out_dir = run_folder()
        overrides = HydraConfig.get().overrides.task
        given = frozenset(override.split("=")[0].lstrip("+") for override in overrides)
        if cfg.checkpoint is not None:
            checkpoint = Path(os.path.expanduser(cfg.checkpoint))
        else:
            checkpoint = find_checkpoint(out_dir, cfg.backbone, cfg.load_epoch)
        with locked(out_dir, "simclr_lin"):
            (evaluate if cfg.predict is None else predict)(cfg, checkpoint, out_dir, given)


if __name__ == "__main__":
    main()
