"""Linear evaluation of a SimCLR encoder (Sec. 2.3, App. B.6): one linear layer on frozen h.

    python simclr_lin.py backbone=resnet18                    # newest checkpoint in the run folder
    python simclr_lin.py load_epoch=500                       # an earlier one
    python simclr_lin.py checkpoint=path/to/file.pt           # any file
    python simclr_lin.py baseline=random                      # the same network, untrained

The encoder is in eval mode, gets no gradient and is checked to be unchanged at the end. The
layer is trained on all training labels; the test set is scored once, after the last epoch, and
nothing is chosen on it. Cosine kNN (k=10) on the same representation stands beside it. Results
go to the terminal, to simclr_lin.log and to results.json.
"""

import json
import logging
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hydra
import torch
import torch.nn.functional as F
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig
from torch import Tensor, nn
from tqdm import tqdm

from augment import draw, random_crop_flip
from checkpoint import find_checkpoint, load_checkpoint
from config import check_config, register_config, run_folder
from data import load_split, resize
from device import select_device, select_precision
from errors import ConfigError, UserError, one_line_errors
from evaluation import extract_features, frozen, knn_accuracy, top_k_accuracy
from models import SimCLR
from optim import cosine_learning_rate, make_optimizer, set_learning_rate

log = logging.getLogger("simclr_lin")

ARCHITECTURE = ("backbone", "projection_dim", "hidden_dim", "cifar_stem", "image_size")


def evaluate(
    cfg: DictConfig, checkpoint: Path, out_dir: Path, given: frozenset[str] = frozenset()
) -> dict[str, Any]:
    """Linear evaluation of the encoder in `checkpoint` with the checked config `cfg`.

    `given` names the keys that the user typed: one that contradicts the checkpoint is refused.
    Returns what it writes to `out_dir`/results.json (results_<baseline>.json for a baseline);
    accuracies are shares in [0, 1]. Raises UserError for a checkpoint or data that cannot be
    used, RuntimeError if the encoder has changed.
    """
    device = select_device(cfg.device)
    dtype = select_precision(cfg.precision, device)
    saved = load_checkpoint(checkpoint)
    trained = architecture(saved, checkpoint, {key: cfg[key] for key in given & set(ARCHITECTURE)})
    size = trained["image_size"]
    train, test = (
        load_split(cfg.dataset, cfg.data_dir, split, size, cfg.workers).to(device)
        for split in ("train", "test")
    )
    torch.manual_seed(cfg.seed)  # weights of the linear layer and of baseline=random
    enc = build_encoder(saved, checkpoint, cfg.baseline).to(device)

    name = f"baseline {cfg.baseline}" if cfg.baseline else f"{checkpoint}, epoch {saved['epoch']}"
    log.info(f"{name}: {trained['backbone']} at {size} px on {cfg.dataset}, {device}")
    with frozen(enc):
        train_features, crop_features, test_features = all_features(
            cfg, enc, train.images, test.images, size, dtype
        )
    head = train_linear_layer(cfg, crop_features, train.labels, len(train.classes))
    with torch.no_grad():
        logits = head(test_features.float())  # N×C: every test image, once, at the end
    results = {
        "linear_acc": top_k_accuracy(logits, test.labels, 1),
        "linear_top5": top_k_accuracy(logits, test.labels, 5) if len(test.classes) >= 10 else None,
        "knn_acc": knn_accuracy(train_features, train.labels, test_features, test.labels),
        "epoch": saved["epoch"] if cfg.baseline is None else None,
        "checkpoint": str(checkpoint),
        "backbone": trained["backbone"] if cfg.baseline != "pixels" else None,
        "dataset": cfg.dataset,
        "baseline": cfg.baseline,
        "precision": str(train_features.dtype).removeprefix("torch."),
    }
    report(results, out_dir)
    return results


def architecture(saved: dict[str, Any], path: Path, typed: dict[str, Any]) -> dict[str, Any]:
    """The keys of ARCHITECTURE from the checkpoint's config.

    Raises UserError if one is not there, ConfigError if the user typed another value.
    """
    trained = {key: saved["config"].get(key) for key in ARCHITECTURE}
    for key, value in trained.items():
        if value is None:
            raise UserError(f"{path} was not written by simclr.py: its config lacks {key}")
        if typed.get(key, value) != value:
            raise ConfigError(f"{key}={typed[key]}: must be {value}, as in {path}; leave it out")
    return trained


def build_encoder(saved: dict[str, Any], path: Path, baseline: str | None) -> nn.Module:
    """The checkpoint's encoder, or with `baseline` the same network untrained, or none: pixels.

    Raises UserError if the weights do not fit the architecture that the checkpoint names.
    """
    if baseline == "pixels":
        return nn.Flatten()
    try:
        model = SimCLR(**{key: saved["config"][key] for key in ARCHITECTURE if key != "image_size"})
        if baseline is None:
            model.load_state_dict(saved["model"])
    except (RuntimeError, ValueError, TypeError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{path}: its weights do not fit its config ({reason[:300]} …)") from None
    return model.enc.to(memory_format=torch.channels_last)


def all_features(
    cfg: DictConfig, enc: nn.Module, train: Tensor, test: Tensor, size: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """All that is needed of the frozen encoder, each image's features extracted once.

    Of the M training images: their features (M, D) for kNN, and those of `finetune_views` random
    crops and flips of each, (K, M, D), for the linear layer. Of the N test images: (N, D).
    """
    rng = torch.Generator(train.device).manual_seed(cfg.seed)  # crops and flips

    def plain(images: Tensor) -> Iterator[Tensor]:
        for part in images.split(cfg.batch_size):
            yield resize(part, size)
            bar.update()

    def crops() -> Iterator[Tensor]:
        for part in train.split(cfg.batch_size):
            u = draw(len(part), rng)
            yield random_crop_flip(part, u, size, tuple(cfg.crop_scale), cfg.flip_probability)
            bar.update()

    views = min(cfg.finetune_views, cfg.finetune_epochs)  # more would not be seen
    batches = [math.ceil(len(images) / cfg.batch_size) for images in (train, test)]
    total = batches[0] * (1 + views) + batches[1]
    with tqdm(total=total, desc="features", unit="batch", mininterval=1) as bar:
        train_features = extract_features(enc, plain(train), dtype)
        crop_features = train_features.new_empty(views, *train_features.shape)
        for k in range(views):
            crop_features[k] = extract_features(enc, crops(), dtype)
        return train_features, crop_features, extract_features(enc, plain(test), dtype)


def train_linear_layer(
    cfg: DictConfig, crop_features: Tensor, labels: Tensor, classes: int
) -> nn.Linear:
    """A linear layer on h, trained on (K, M, D) features: in each epoch the next of K crops.

    The paper's protocol draws a new crop and flip in every epoch; the encoder is frozen, so that
    K of them, extracted beforehand, are what is left to pay for.
    """
    rng = torch.Generator(crop_features.device).manual_seed(cfg.seed)  # order of the images
    head = nn.Linear(crop_features.shape[-1], classes).to(crop_features.device)
    optimizer = make_optimizer("sgd", head.parameters(), cfg.momentum, weight_decay=0.0)
    steps = math.ceil(len(labels) / cfg.batch_size)  # the last, smaller batch counts too
    total_steps = cfg.finetune_epochs * steps
    with tqdm(total=total_steps, desc="linear layer", unit="step", mininterval=1) as bar:
        for epoch in range(cfg.finetune_epochs):
            order = torch.randperm(len(labels), device=crop_features.device, generator=rng)
            for i, batch in enumerate(order.split(cfg.batch_size)):
                h = crop_features[epoch % len(crop_features), batch].float()  # n×D
                loss = F.cross_entropy(head(h), labels[batch])
                step = epoch * steps + i
                learning_rate = cosine_learning_rate(
                    step, total_steps, cfg.finetune_learning_rate, cfg.min_learning_rate
                )
                set_learning_rate(optimizer, learning_rate)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                if bar.update():
                    bar.set_postfix_str(f"epoch {epoch + 1}, loss {loss:.3f}", refresh=False)
    return head


def report(results: dict[str, Any], out_dir: Path) -> None:
    """Say the results and write them to results.json, whole or not at all."""
    baseline = results["baseline"]
    source = f"baseline {baseline}" if baseline else results["checkpoint"]
    top5 = results["linear_top5"]
    log.info(
        f"{source} on {results['dataset']} (test): linear {results['linear_acc']:.2%}"
        + (f", top-5 {top5:.2%}" if top5 is not None else "")
        + f", kNN {results['knn_acc']:.2%}"
    )
    path = out_dir / (f"results_{baseline}.json" if baseline else "results.json")
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(results, indent=2) + "\n")
    os.replace(temporary, path)


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
        evaluate(cfg, checkpoint, out_dir, given)


if __name__ == "__main__":
    main()
