"""Feature extraction and kNN (Wu et al. 2018) for a frozen encoder; accuracies."""

import hashlib
import logging
import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from config import Architecture, Config, keys
from images.augment import CROPS, draw, random_crop_flip
from images.datasets import Images, Probe, resize
from system.checkpoint import build_model, load_checkpoint
from system.device import autocast, select_device, select_precision, to_device
from system.errors import progress_bar

log = logging.getLogger("simclr")

CROP_KEYS = ("crop_scale", "flip_probability")  # of the run, unless the command line has them
SIMILARITIES = 2**26  # computed at once: 256 MiB


def open_checkpoint(
    cfg: Config, path: Path, given: frozenset[str] = frozenset()
) -> tuple[dict[str, Any], Config, torch.device]:
    """A checkpoint, cfg with its network and crops, and the device.

    Raises ConfigError if `given`, keys on the command line, contradicts it.
    """
    saved = load_checkpoint(path)
    architecture = {key: saved["config"][key] for key in keys(Architecture)}
    for key in given & set(architecture):
        cfg.require(
            key, getattr(cfg, key) == architecture[key], f"{architecture[key]}, as in {path}"
        )
    crops = {key: saved["config"][key] for key in {*CROP_KEYS} & {*saved["config"]} - given}
    device = select_device(cfg.device)
    precision = select_precision(cfg.precision, device)
    return saved, replace(cfg, **architecture, **crops, precision=precision), device


def is_finite(values: Tensor) -> bool:
    """Whether no value is inf or nan, by their norm, which takes no memory; waits for a GPU."""
    return bool(torch.linalg.vector_norm(values, dtype=torch.float32).isfinite())


@contextmanager
def frozen(enc: nn.Module) -> Iterator[None]:
    """The encoder in eval mode without gradients; RuntimeError if its SHA-256 changes meanwhile."""
    enc.eval().requires_grad_(False)

    def digest() -> str:
        weights = b"".join(tensor.cpu().numpy().tobytes() for tensor in enc.state_dict().values())
        return hashlib.sha256(weights).hexdigest()

    before = digest()
    yield
    if digest() != before:
        raise RuntimeError("the frozen encoder has changed")


def build_encoder(saved: dict[str, Any], path: Path, encoder: str, seed: int) -> nn.Module:
    """encoder: "checkpoint"; "random", the same network untrained; "pixels", the image itself."""
    if encoder == "pixels":
        return nn.Flatten()
    torch.manual_seed(seed)  # weights of an untrained one
    model = build_model(saved, path, trained=encoder == "checkpoint")
    return model.enc.to(memory_format=torch.channels_last)


@torch.no_grad()
def extract_features(enc: nn.Module, batches: Iterable[Tensor], precision: str) -> Tensor:
    """Features (N, D) of batches (n, 3, S, S), in the precision that the encoder computes in."""
    features = []
    for x in batches:
        with autocast(x.device, precision):
            features.append(enc(x))
    return torch.cat(features)


def clean_features(
    enc: nn.Module, images: Images, cfg: Config, check: Callable[[], None] = lambda: None
) -> Tensor:
    """Features (N, D) of unaugmented uint8 images, resized to cfg.image_size; `check` may raise."""
    n = min(512, cfg.batch_size, 2 * (cfg.micro_batch_size or 256))  # fits where training does
    batches, total = images.split(n), math.ceil(len(images) / n)

    def prepare(x: Tensor) -> Tensor:
        check()
        return resize(x, cfg.image_size)

    with progress_bar(iterable=batches, total=total, desc="features", leave=False, delay=1) as bar:
        return extract_features(enc, map(prepare, bar), cfg.precision)


def crop_features(enc: nn.Module, images: Images, cfg: Config, views: int) -> Tensor:
    """Features (K, N, D) of K = `views` random crops and flips of each image, to cycle through."""
    n, features = cfg.batch_size, []
    with progress_bar(iterable=range(views), desc="features of crops", leave=False) as bar:
        for k in bar:
            u = to_device(draw(len(images), cfg.seed, step=k, stream=CROPS), images.device)
            batches = zip(images.split(n), u.split(n, dim=1), strict=True)
            crops = (random_crop_flip(x, own, cfg.image_size, cfg) for x, own in batches)
            features.append(extract_features(enc, crops, cfg.precision))
    return torch.stack(features)


@torch.no_grad()
def knn_scores(
    bank: Tensor,
    bank_labels: Tensor,
    queries: Tensor,
    classes: int,
    *,
    k: int = 10,
    temperature: float | None = None,
) -> Tensor:
    """Votes (N, classes) of the k nearest of bank (M, D), by cosine, for each query (N, D).

    A neighbour has one vote, or with a temperature τ exp(cos / τ) (Wu et al. 2018, Sec. 3.4).
    """
    bank = F.normalize(bank.float(), dim=1)
    scores = []
    for part in queries.float().split(max(1, SIMILARITIES // len(bank))):
        similarity = F.normalize(part, dim=1) @ bank.T  # n×M
        cosine, nearest = similarity.topk(min(k, len(bank)), dim=1)  # n×k
        weights = torch.ones_like(cosine) if temperature is None else (cosine / temperature).exp()
        votes = weights.new_zeros(len(part), classes)
        scores.append(votes.scatter_add_(1, bank_labels[nearest], weights))
    return torch.cat(scores)


def effective_rank(h: Tensor) -> float:
    """RankMe of features h (N, D), from 1 to min(N, D) (Garrido et al. 2023, arXiv 2210.02885): the
    exponential of the entropy of the singular values, which are divided by their sum."""
    values = torch.linalg.svdvals(h.float().cpu())
    return torch.special.entr(values / values.sum().clamp(min=1e-7)).sum().exp().item()


def sample_rank(enc: nn.Module, images: Images, cfg: Config) -> float | None:
    """Effective rank of the features of unaugmented images, of an encoder in train mode; None, with
    a warning, if one is not finite, as in eval mode it may be."""
    h = clean_features(enc.eval(), images, cfg)
    enc.train()
    if not is_finite(h):
        log.warning("warning: no rank: in eval mode the features are not finite")
        return None
    return effective_rank(h)


def held_out_knn(
    enc: nn.Module, probe: Probe, cfg: Config, check: Callable[[], None]
) -> float | None:
    """kNN accuracy in [0, 1] of the probe's queries in its bank, of an encoder in train mode."""
    split, bank, queries = probe.labelled, probe.bank, probe.queries
    h = clean_features(enc.eval(), split.images, cfg, check)
    enc.train()
    if not is_finite(h):
        log.warning("warning: no kNN: in eval mode the features are not finite")
        return None
    scores = knn_scores(h[bank], split.labels[bank], h[queries], len(split.classes))
    return accuracy(scores, split.labels[queries])


def accuracy(scores: Tensor, labels: Tensor) -> float:
    """Fraction of rows (N, C) whose first largest score is at the label (N,), in [0, 1]."""
    best = scores.argsort(dim=1, descending=True, stable=True)[:, 0]
    return (best == labels).sum().item() / len(labels)
