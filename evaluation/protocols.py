"""Evaluation protocols: kNN, linear, logistic regression, fine-tuning.

Each protocol returns scores of the test images; it never gets their labels.
"""

from collections.abc import Callable
from functools import partial
from itertools import product
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from config import Config, as_list
from evaluation import classifiers, features
from evaluation.classifiers import Classifier, Task
from images.datasets import Images, Split, hold_out, select_images
from system.errors import UserError

VALIDATION_FRACTION = 0.1  # of the labelled training images, to choose settings on
INVERSE_PENALTIES = [{"C": c} for c in (1e-4, 1e-3, 1e-2, 0.1, 1.0)]  # logistic regression


class Result(NamedTuple):
    """The output of a protocol."""

    scores: Tensor  # (N, C), of the test images
    settings: dict[str, Any]
    selection: dict[str, Any] | None = None  # how the settings were chosen, if they were


def knn(task: Task) -> Result:
    """Cosine kNN with k = 10; the features of the training images are the bank."""
    return _vote(task, {"k": 10})


def weighted_knn(task: Task) -> Result:
    """Weighted kNN, as in Wu et al. 2018 (arXiv 1805.01978), Sec. 3.4."""
    return _vote(task, {"k": 200, "temperature": 0.07})


def _vote(task: Task, settings: dict[str, Any]) -> Result:
    labels, classes = task.train.labels, len(task.train.classes)
    return Result(features.knn_scores(task.h, labels, task.test_h, classes, **settings), settings)


def linear(task: Task) -> Result:
    """Linear evaluation (Sec. 2.3): a linear layer on the features of random crops and flips."""
    candidates = sgd_settings(task.cfg)
    k = min(task.cfg.finetune_views, task.cfg.finetune_epochs)  # more would not be seen
    views = features.crop_features(task.enc, task.train.images, task.cfg, k)
    fit = partial(classifiers.fit_linear, task, views)
    layer, settings, selection = fit_best(task, candidates, fit, task.h)
    return Result(layer(task.test_h), {"views": k, **settings}, selection)


def linear_clean(task: Task) -> Result:
    """A linear layer on the features of the unaugmented training images."""
    fit = partial(classifiers.fit_linear, task, task.h[None])  # one view
    layer, settings, selection = fit_best(task, sgd_settings(task.cfg), fit, task.h)
    return Result(layer(task.test_h), settings, selection)


def logistic(task: Task) -> Result:
    """Logistic regression on the features of the unaugmented training images."""
    fit = partial(classifiers.fit_logistic, task)
    model, settings, selection = fit_best(task, INVERSE_PENALTIES, fit, task.h)
    return Result(model(task.test_h), settings, selection)


def finetune(task: Task) -> Result:
    """Fine-tuning, not a linear evaluation: a copy of the encoder is trained with the layer."""
    fit, images = partial(classifiers.fit_network, task), task.train.images
    network, settings, selection = fit_best(task, sgd_settings(task.cfg), fit, images)
    return Result(network(task.test_images), settings, selection)


RUN = {
    protocol.__name__: protocol
    for protocol in (knn, weighted_knn, linear, linear_clean, logistic, finetune)
}


def make_task(cfg: Config, encoder: str, enc: nn.Module, train: Split, test_images: Images) -> Task:
    """The input of the protocols, with the features of the frozen encoder.

    Raises UserError if one is not finite, RuntimeError if the encoder has changed.
    """
    with features.frozen(enc):
        h = features.clean_features(enc, train.images, cfg)
        test_h = features.clean_features(enc, test_images, cfg)
    name = f"{encoder}, seed {cfg.seed}"
    for values in (h, test_h):
        check_finite(values, f"features of {name}")
    return Task(cfg, enc, train, test_images, h=h, test_h=test_h, name=name)


def run_protocol(protocol: str, task: Task) -> Result:
    """Run a protocol of `RUN`; its scores are on the CPU.

    Raises UserError if one is not finite or there are too few labels to choose settings on,
    RuntimeError if the encoder has changed.
    """
    with features.frozen(task.enc):
        result = RUN[protocol](task)
    check_finite(result.scores, f"scores of {protocol}, {task.name}")
    return result._replace(scores=result.scores.cpu())


def check_finite(values: Tensor, what: str) -> None:
    """Raise UserError unless all values are finite."""
    if not features.is_finite(values):
        remedy = "take precision=fp32, a lower finetune_learning_rate or another checkpoint"
        raise UserError(f"not finite: {what}; {remedy}")


def protocols_for(cfg: Config, encoder: str, first_run: bool) -> list[str]:
    """The names in `RUN` of cfg.protocols for an encoder; "knn" stands for both kNNs.

    kNN is deterministic, and left out after the first run, unless the seed draws the labelled
    images or the encoder. The pixels have no network to fine-tune.
    """
    names = []
    for protocol in cfg.protocols:
        drawn = cfg.labels is not None or encoder == "random"
        if protocol == "knn" and (first_run or drawn):
            names += ["knn", "weighted_knn"]
        elif protocol != "knn" and (protocol, encoder) != ("finetune", "pixels"):
            names.append(protocol)
    return names


def sgd_settings(cfg: Config) -> list[dict[str, Any]]:
    """The candidates of SGD: each learning rate of the config with each weight decay.

    Raises ConfigError for a learning rate below the end of the schedule.
    """
    rates, decays = as_list(cfg.finetune_learning_rate), as_list(cfg.finetune_weight_decay)
    allowed = f"at most finetune_learning_rate, {min(rates):g}, which follows batch_size unless set"
    cfg.require("min_learning_rate", cfg.min_learning_rate <= min(rates), allowed)
    fixed = {"epochs": cfg.finetune_epochs, "batch_size": cfg.batch_size}
    return [{**fixed, "learning_rate": r, "weight_decay": d} for r, d in product(rates, decays)]


def fit_best(
    task: Task,
    candidates: list[dict[str, Any]],
    fit: Callable[[Tensor, dict[str, Any]], Classifier],
    inputs: Images,
) -> tuple[Classifier, dict[str, Any], dict[str, Any] | None]:
    """The classifier with the best of the candidate settings; these; how they were chosen.

    fit(index, settings) trains on the training images of the index; inputs: what the classifier
    takes, images or features, for all of them. Several candidates are each fitted on nine tenths
    and scored on the held-out tenth; the best, the first of equals, is fitted again on everything.
    One that diverges has no accuracy, and loses. Raises UserError if no class has two images.
    """
    labels, chosen, selection = task.train.labels, candidates[0], None
    if len(candidates) > 1:
        remedy = "give more labels, or one finetune_learning_rate and weight decay and no logistic"
        rest, held_out = hold_out(labels, VALIDATION_FRACTION, task.cfg.seed, remedy)
        tried = []
        for settings in candidates:
            classifier = fit(rest, settings)
            scores = classifier(select_images(inputs, held_out))
            reached = None  # it has diverged
            if features.is_finite(scores):
                reached = features.accuracy(scores, labels[held_out])
            tried.append({**settings, "accuracy": reached})
        best = max(tried, key=lambda one: -1 if one["accuracy"] is None else one["accuracy"])
        chosen = candidates[tried.index(best)]
        selection = {"chosen": chosen, "validation_images": len(held_out), "candidates": tried}
    everything = torch.arange(len(labels), device=labels.device)
    return fit(everything, chosen), chosen, selection
