"""Evaluation protocols: kNN, linear, logistic regression, fine-tuning.

Each protocol returns scores of the test images; it never gets their labels.
"""

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from evaluation.classifiers import (
    Classifier,
    EvaluationTask,
    fit_linear,
    fit_logistic,
    fit_network,
)
from evaluation.features import (
    NotFinite,
    accuracy,
    check_finite,
    clean_features,
    crop_features,
    frozen,
    knn_scores,
)
from images.datasets import hold_out
from images.host import Images, take
from system.errors import UserError
from system.memory import memory_advice

log = logging.getLogger("simclr_lin")

VALIDATION_FRACTION = 0.1  # of the labelled training images, to choose hyperparameters on
SMALLER = {  # what helps where memory is used up; elsewhere batch_size
    "knn": "labels", "weighted_knn": "labels", "logistic": "labels",
    "linear": "finetune_views or batch_size",
}  # fmt: skip
INVERSE_PENALTIES = [{"C": c} for c in (1e-4, 1e-3, 1e-2, 0.1, 1.0)]  # logistic regression


class ProtocolResult(NamedTuple):
    """The output of a protocol."""

    scores: Tensor  # (N, C), of the test images
    settings: dict[str, Any]
    selection: dict[str, Any] | None = None  # where hyperparameters were chosen: how


def run_protocols(
    protocols: list[str], task: EvaluationTask
) -> Iterator[tuple[str, ProtocolResult, float]]:
    """Run each protocol of RUN: yields its name, its result and the seconds it takes alone.

    Raises RuntimeError if a protocol other than finetune has changed the encoder, UserError if
    there are too few labels to hold some out for choosing hyperparameters, if features, loss or
    scores are not finite, or if memory is used up.
    """
    if "logistic" in protocols or len(task.candidates) > 1:
        validation_split(task)  # refuses too few labels before hours are spent
    feature_seconds = 0.0
    if set(protocols) - {"finetune"}:
        start = time.perf_counter()
        with naming(task, f"features for {', '.join(protocols)}"), frozen(task.enc):
            h, test_h = (
                clean_features(task.enc, images, task.size, task.batch_size, task.dtype)
                for images in (task.train.images, task.test_images)
            )
        task = task._replace(h=h, test_h=test_h)
        feature_seconds = time.perf_counter() - start
    for protocol in protocols:
        tunes = protocol == "finetune"  # a copy of the encoder, and needs no features
        start = time.perf_counter() - (0 if tunes else feature_seconds)
        with naming(task, protocol):
            with nullcontext() if tunes else frozen(task.enc):
                result = RUN[protocol](task)
            trained = "learning_rate" in result.settings
            check_finite("the scores are", result.scores, torch.float32, trained)
        settings = result.settings
        if trained:
            settings = {"epochs": task.epochs, "batch_size": task.batch_size, **settings}
        result = ProtocolResult(result.scores.cpu(), settings, result.selection)  # waits for a GPU
        yield protocol, result, time.perf_counter() - start


@contextmanager
def naming(task: EvaluationTask, protocol: str) -> Iterator[None]:
    """Name protocol and encoder if in the block something is not finite, or memory is used up."""
    try:
        with memory_advice(f"take a smaller {SMALLER.get(protocol, 'batch_size')}"):
            yield
    except UserError as error:
        raise type(error)(f"{protocol} of {task.encoder}, seed {task.seed}: {error}") from None


def run_knn(task: EvaluationTask, **settings: float) -> ProtocolResult:
    """Cosine kNN; the features of the training images are the bank."""
    labels, classes = task.train.labels, len(task.train.classes)
    return ProtocolResult(knn_scores(task.h, labels, task.test_h, classes, **settings), settings)


def run_linear(task: EvaluationTask) -> ProtocolResult:
    """Linear evaluation (Sec. 2.3): a linear layer on the features of random crops and flips."""
    k = min(task.views, task.epochs)  # more would not be seen
    crops = task.size, *task.crop, task.batch_size, task.dtype, task.seed
    result = run_linear_on(task, crop_features(task.enc, task.train.images, k, *crops))
    return result._replace(settings={"views": k, **result.settings})


def run_linear_on(task: EvaluationTask, views: Tensor) -> ProtocolResult:
    """Train a linear layer on the features (K, M, D) of K views of each training image."""
    return select_and_fit(task, task.candidates, partial(fit_linear, task, views))


RUN = {
    "knn": partial(run_knn, k=10),
    "weighted_knn": partial(run_knn, k=200, temperature=0.07),  # Wu et al. 2018
    "linear": run_linear,
    "linear_clean": lambda task: run_linear_on(task, task.h[None]),
    "logistic": lambda task: select_and_fit(task, INVERSE_PENALTIES, partial(fit_logistic, task)),
    "finetune": lambda task: select_and_fit(
        task, task.candidates, partial(fit_network, task), task.train.images, task.test_images
    ),
}


def protocols_for(
    encoder: str, protocols: list[str], repeated: bool, few_labels: bool
) -> list[str]:
    """The protocols of RUN for an encoder: "checkpoint", or a baseline "random" or "pixels".

    "knn" stands for both kNNs. `repeated`: not for the first seed, when deterministic protocols
    are skipped: kNN, unless the labels or the encoder are drawn by the seed.
    """
    both = ["knn", "weighted_knn"]
    names = [name for protocol in protocols for name in (both if protocol == "knn" else [protocol])]
    if encoder == "pixels":  # no network to fine-tune
        names = [name for name in names if name != "finetune"]
    deterministic = both if encoder != "random" and not few_labels else []
    return [name for name in names if not (repeated and name in deterministic)]


def select_and_fit(
    task: EvaluationTask,
    candidates: list[dict[str, float]],
    fit: Callable[..., Classifier],
    inputs: Images | None = None,
    test_inputs: Images | None = None,
) -> ProtocolResult:
    """Test scores of the best candidate, fitted on all labelled training images.

    fit(index, **candidate) trains on the images of the index alone. Several candidates are each
    fitted on nine tenths and scored on the held-out tenth; the best one (the first of equals) is
    fitted again on everything, and it alone sees the test inputs. A candidate that diverges has no
    accuracy and loses; if all do, NotFinite is raised. Inputs are the features of unaugmented
    images unless given.
    """
    if inputs is None:
        inputs, test_inputs = task.h, task.test_h
    labels, chosen, selection = task.train.labels, candidates[0], None
    if len(candidates) > 1:
        rest, held_out = validation_split(task)
        part, accuracies = take(inputs, held_out), []
        for candidate in candidates:
            try:
                scores = fit(rest, **candidate)(part)
                check_finite("the scores are", scores, torch.float32, "learning_rate" in candidate)
                accuracies.append(accuracy(scores, labels[held_out]))
            except NotFinite as error:
                accuracies.append(None)
                log.warning(f"warning: one of {len(candidates)} candidates is left out: {error}")
                failure = error
        kept = [a for a in accuracies if a is not None]
        if not kept:
            raise NotFinite(f"no candidate of {len(candidates)} is left: {failure}")
        chosen = candidates[accuracies.index(max(kept))]
        tried = [{**c, "accuracy": a} for c, a in zip(candidates, accuracies, strict=True)]
        selection = {"chosen": chosen, "validation_images": len(held_out), "candidates": tried}
    everything = torch.arange(len(labels), device=labels.device)
    return ProtocolResult(fit(everything, **chosen)(test_inputs), chosen, selection)


def validation_split(task: EvaluationTask) -> tuple[Tensor, Tensor]:
    """Indices of nine tenths of the labelled training images and of the held-out tenth."""
    remedy = "give more labels, or one finetune_learning_rate and weight decay and no logistic"
    return hold_out(task.train.labels, VALIDATION_FRACTION, task.seed, remedy)
