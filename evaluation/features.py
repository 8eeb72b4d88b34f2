"""Feature extraction and kNN (Wu et al. 2018) for a frozen encoder; accuracies."""

import hashlib
import logging
import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from images.augment import draw, random_crop_flip
from images.datasets import Split, resize
from images.host import Images
from system.checkpoint import build_model
from system.device import autocast
from system.errors import UserError

log = logging.getLogger("simclr")

SIMILARITIES = 2**26  # computed at once: 256 MiB


class NotFinite(UserError):
    """Features, a classifier's loss or its scores have values that are not finite."""


def check_finite(what: str, values: Tensor, dtype: torch.dtype, trained: bool = False) -> Tensor:
    """The same values; raises NotFinite if one of them is inf or nan, or their norm overflows.

    dtype: what they were computed in; trained: whether with weights that the evaluation trains. The
    norm, in float32, shows inf and nan and takes no memory. On a GPU this waits for the values.
    """
    if not (norm := torch.linalg.vector_norm(values, dtype=torch.float32)).isfinite():
        ways = ["lower finetune_learning_rate"] if trained else []
        ways += ["take precision=fp32"] if dtype != torch.float32 else []
        ways += [] if trained else ["take another checkpoint"]
        raise NotFinite(f"{what} not finite (norm {norm:g}): {', or '.join(ways)}")
    return values


@contextmanager
def frozen(enc: nn.Module) -> Iterator[nn.Module]:
    """Put the encoder in eval mode without gradients, and check afterwards that it is unchanged.

    `module.requires_grad = False` freezes nothing, and in train mode batch-norm statistics move:
    both bugs affect the published 92.06 %. Every tensor is hashed (SHA-256) before and after.
    Raises RuntimeError, naming the parameters and buffers that have changed.
    """
    enc.eval().requires_grad_(False)
    before = _hashes(enc)
    yield enc
    changed = [name for name, digest in _hashes(enc).items() if digest != before[name]]
    if changed:
        raise RuntimeError(f"the frozen encoder has changed: {', '.join(changed)}")


def _hashes(module: nn.Module) -> dict[str, bytes]:
    return {
        name: hashlib.sha256(tensor.cpu().numpy().tobytes()).digest()
        for name, tensor in module.state_dict().items()
    }


def build_encoder(
    saved: dict[str, Any], path: Path, encoder: str, seed: int
) -> tuple[nn.Module, int]:
    """An encoder and its feature size D.

    encoder: "checkpoint"; "random", the same network untrained; or "pixels", the image itself.
    """
    if encoder == "pixels":
        return nn.Flatten(), 3 * saved["config"]["image_size"] ** 2
    torch.manual_seed(seed)  # weights of an untrained one
    model = build_model(saved, path, trained=encoder == "checkpoint")
    return model.enc.to(memory_format=torch.channels_last), model.feature_dim


@torch.no_grad()
def extract_features(
    enc: nn.Module, batches: Iterable[Tensor], dtype: torch.dtype, trained: bool = False
) -> Tensor:
    """Features (N, D) of all rows of the batches (n, 3, S, S), in order.

    Computed in mixed precision `dtype` and kept in the encoder's output precision: converting to
    float32 would double the memory and add no information. Raises NotFinite as `check_finite`.
    """
    features = []
    for x in batches:
        with autocast(x.device, dtype):
            features.append(enc(x))
    return check_finite("the output of the network is", torch.cat(features), dtype, trained)


def clean_features(
    enc: nn.Module,
    images: Images,
    size: int,
    batch_size: int,
    dtype: torch.dtype,
    check: Callable[[], None] = lambda: None,
    trained: bool = False,
) -> Tensor:
    """Features (N, D) of unaugmented images; images: (N, 3, H, W), uint8.

    `check` is called before each batch, and may raise. Raises NotFinite as `check_finite`.
    """

    def batches() -> Iterator[Tensor]:
        parts, count = images.split(batch_size), math.ceil(len(images) / batch_size)
        for x in tqdm(parts, "features", count, leave=False, mininterval=1, unit="batch"):
            check()
            yield resize(x, size)

    with closing(batches()) as parts:  # and the bar, before an error is printed
        return extract_features(enc, parts, dtype, trained)


def crop_features(
    enc: nn.Module,
    images: Images,
    views: int,
    size: int,
    crop_scale: tuple[float, float],
    flip_probability: float,
    batch_size: int,
    dtype: torch.dtype,
    seed: int,
) -> Tensor:
    """Features (K, N, D) of K = `views` random crops and flips of each image.

    The paper's linear evaluation draws new crops in every epoch; since the encoder is frozen, K
    sets of features can be extracted once and cycled through.
    """
    rng = torch.Generator(images.device).manual_seed(seed)
    features = None
    with tqdm(range(views), "features of crops", leave=False, unit="view") as bar:
        for k in bar:
            crops = (
                random_crop_flip(x, draw(len(x), rng), size, crop_scale, flip_probability)
                for x in images.split(batch_size)
            )
            view = extract_features(enc, crops, dtype)
            if features is None:
                features = view.new_empty(views, *view.shape)
            features[k] = view
    return features


@torch.no_grad()
def knn_scores(
    bank: Tensor,
    bank_labels: Tensor,
    queries: Tensor,
    classes: int,
    k: int = 10,
    temperature: float | None = None,
) -> Tensor:
    """Votes (N, classes) of the k nearest neighbours, by cosine, of each query in the bank.

    bank: (M, D), queries: (N, D). Each neighbour has one vote, or exp(cos / τ) with a temperature
    τ (Wu et al. 2018, arXiv 1805.01978, Sec. 3.4). k is capped at the bank size.
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


def held_out_knn(
    enc: nn.Module,
    split: Split,
    bank: Tensor,
    queries: Tensor,
    size: int,
    batch_size: int,
    dtype: torch.dtype,
    check: Callable[[], None] = lambda: None,
) -> float | None:
    """kNN accuracy in [0, 1] during pretraining; bank and queries are indices of training images.

    The encoder runs in eval mode and returns to its former mode. Costs one forward pass per image.
    `check` is called before each batch, and may raise. None, and a warning, if the features are not
    finite.
    """
    was_training = enc.training
    try:
        h = clean_features(enc.eval(), split.images, size, batch_size, dtype, check)
    except NotFinite:  # while the loss, with the statistics of a batch, still is
        return log.warning("warning: no kNN: in eval mode the features are not finite")
    finally:
        enc.train(was_training)
    scores = knn_scores(h[bank], split.labels[bank], h[queries], len(split.classes))
    return accuracy(scores, split.labels[queries])


def accuracy(scores: Tensor, labels: Tensor) -> float:
    """Fraction in [0, 1] of rows of scores (N, C) whose largest score is at the label (N,).

    A tie goes to the smallest class, as in scikit-learn's kNN.
    """
    return (scores.argmax(dim=1) == labels).sum().item() / len(labels)


def top_k_accuracy(scores: Tensor, labels: Tensor, k: int) -> float:
    """Fraction in [0, 1] of rows of scores (N, C) with the label (N,) among the k largest."""
    return (scores.topk(k, dim=1).indices == labels[:, None]).sum().item() / len(labels)
