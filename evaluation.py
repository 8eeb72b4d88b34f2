"""What linear evaluation and kNN share: a frozen encoder, its features, accuracies."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data import Split, resize
from device import autocast


@contextmanager
def frozen(enc: nn.Module) -> Iterator[nn.Module]:
    """The encoder in eval mode and without gradients; afterwards checked to be bit-identical.

    `module.requires_grad = False` is an attribute that nothing reads, and in train mode the
    statistics of batch norm move; a published 92.06 % rests on both. Raises RuntimeError, naming
    the tensors, if any parameter or buffer has changed.
    """
    enc.eval().requires_grad_(False)
    before = {name: tensor.clone() for name, tensor in enc.state_dict().items()}
    yield enc
    after = enc.state_dict()
    changed = [name for name in before if not torch.equal(before[name], after[name])]
    if changed:
        raise RuntimeError(f"the frozen encoder has changed: {', '.join(changed)}")


@torch.no_grad()
def extract_features(enc: nn.Module, batches: Iterable[Tensor], dtype: torch.dtype) -> Tensor:
    """Features (N, D) of all rows of the batches (n, 3, S, S), in their order.

    In mixed precision `dtype`, and returned in what the encoder returns then: half precision
    keeps half the memory, and loses nothing more.
    """
    features = []
    for x in batches:
        with autocast(x.device, dtype):
            features.append(enc(x))
    return torch.cat(features)


@torch.no_grad()
def knn_accuracy(
    bank: Tensor, bank_labels: Tensor, queries: Tensor, labels: Tensor, k: int = 10
) -> float:
    """Share in [0, 1] of queries whose k nearest neighbours in the bank vote for their label.

    bank: (M, D), queries: (N, D); nearest by cosine, each neighbour one vote, a tie goes to the
    smallest label, as in scikit-learn. With fewer than k images in the bank all of them vote.
    """
    bank = F.normalize(bank.float(), dim=1)
    classes = int(bank_labels.max()) + 1
    correct = 0
    for part, wanted in zip(queries.float().split(1024), labels.split(1024), strict=True):
        similarity = F.normalize(part, dim=1) @ bank.T  # n×M
        nearest = similarity.topk(min(k, len(bank)), dim=1).indices  # n×k
        votes = F.one_hot(bank_labels[nearest], classes).sum(dim=1)  # n×C
        correct += (votes.argmax(dim=1) == wanted).sum().item()
    return correct / len(labels)


def held_out_knn(
    enc: nn.Module, split: Split, bank: Tensor, queries: Tensor, size: int, dtype: torch.dtype
) -> float:
    """kNN accuracy during pretraining: both bank and queries (indices) are training images.

    In eval mode, and afterwards back in the mode it was in; costs one forward pass an image.
    """
    was_training = enc.training
    enc.eval()
    features = extract_features(enc, (resize(x, size) for x in split.images.split(512)), dtype)
    enc.train(was_training)
    labels = split.labels
    return knn_accuracy(features[bank], labels[bank], features[queries], labels[queries])


def top_k_accuracy(logits: Tensor, labels: Tensor, k: int) -> float:
    """Share in [0, 1] of rows of logits (N, C) with the label (N,) among the k largest."""
    return (logits.topk(k, dim=1).indices == labels[:, None]).any(dim=1).float().mean().item()
