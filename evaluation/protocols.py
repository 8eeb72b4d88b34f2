"""Evaluation protocols: kNN, linear, logistic regression, fine-tuning.

Each protocol returns scores of the test images; it never gets their labels.
"""

from collections.abc import Callable, Iterable
from functools import partial
from itertools import product
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn

from config import Config, as_list
from evaluation import classifiers, features
from evaluation.classifiers import Classifier, Task
from images.datasets import Images, Split, hold_out, select_images
from system.errors import UserError

LINEAR_RATES = [0.01, 0.03, 0.1, 0.3, 1.0]  # of SGD, for 256 images
INVERSE_PENALTIES = [{"C": c} for c in (1e-4, 1e-3, 1e-2, 0.1, 1.0)]  # logistic regression
Fit: TypeAlias = Callable[[Tensor, list[dict[str, Any]]], Iterable[Classifier]]


class Result(NamedTuple):
    """The output of a protocol."""

    scores: Tensor  # (N, C), of the test images
    settings: dict[str, Any]
    selection: dict[str, Any] | None = None  # how the settings were chosen, if they were


def vote(task: Task, **settings: float) -> Result:
    """Cosine kNN; the features of the unaugmented training images are the bank."""
    labels, classes = task.train.labels, len(task.train.classes)
    return Result(features.knn_scores(task.h, labels, task.test_h, classes, **settings), settings)


def linear(task: Task, clean: bool = False) -> Result:
    """Linear evaluation (Sec. 2.3): a linear layer on the features of random crops and flips, or of
    the unaugmented training images if `clean`."""
    views, k = task.h[None], min(task.cfg.finetune_views, task.cfg.finetune_epochs)
    if not clean:  # no epoch would see more than k
        views = features.crop_features(task.enc, task.train.images, task.cfg, k)
    several = task.train.labels.bincount().max() > 1  # else none can be held out to choose on
    candidates = sgd_settings(task.cfg, LINEAR_RATES if several else [0.1], views=len(views))
    fit = partial(classifiers.fit_linear, task, views)
    return fit_best(task, candidates, fit, inputs=task.h, test_inputs=task.test_h)


def logistic(task: Task) -> Result:
    """Logistic regression on the features of the unaugmented training images."""
    fit = partial(classifiers.fit_logistic, task)
    return fit_best(task, INVERSE_PENALTIES, fit, inputs=task.h, test_inputs=task.test_h)


def finetune(task: Task) -> Result:
    """Fine-tuning, not a linear evaluation: a copy of the encoder is trained with the layer."""
    fit, candidates = partial(classifiers.fit_network, task), sgd_settings(task.cfg, [0.1])
    images, test_images = task.train.images, task.test_images
    return fit_best(task, candidates, fit, inputs=images, test_inputs=test_images)


RUN: dict[str, Callable[[Task], Result]] = {
    "knn": partial(vote, k=10),
    "weighted_knn": partial(vote, k=200, temperature=0.07),  # Wu et al. 2018, Sec. 3.4
    "linear": linear,
    "linear_clean": partial(linear, clean=True),
    "logistic": logistic,
    "finetune": finetune,
}


def make_task(cfg: Config, encoder: str, enc: nn.Module, train: Split, test_images: Images) -> Task:
    """The input of the protocols, with the features of the frozen encoder; as `run_protocol`."""
    with features.frozen(enc):
        h = features.clean_features(enc, train.images, cfg)
        test_h = features.clean_features(enc, test_images, cfg)
    name = f"{encoder}, seed {cfg.seed}"
    check_finite(h, f"features of {name}")
    check_finite(test_h, f"features of {name}")
    return Task(cfg, enc, train, test_images, h=h, test_h=test_h, name=name)


def run_protocol(protocol: str, task: Task) -> Result:
    """Run a protocol of `RUN`; its scores are on the CPU. Raises UserError if one is not finite."""
    with features.frozen(task.enc):
        result = RUN[protocol](task)
    check_finite(result.scores, f"scores of {protocol}, {task.name}")
    return result._replace(scores=result.scores.cpu())


def check_finite(values: Tensor, what: str) -> None:
    """Raise UserError unless all values are finite."""
    if not features.is_finite(values):
        remedy = "take precision=fp32 or a lower finetune_learning_rate"
        raise UserError(f"not finite: {what}; {remedy}")


def protocols_for(cfg: Config, encoder: str, first_run: bool) -> list[str]:
    """The names in `RUN` of cfg.protocols for an encoder. "knn" stands for both kNNs, which are
    left out of later runs unless the seed draws the labelled images or the encoder."""
    left_out = {"finetune"} if encoder == "pixels" else set()  # no network
    if not first_run and cfg.labels is None and encoder != "random":
        left_out.add("knn")
    names = []
    for protocol in cfg.protocols:
        if protocol not in left_out:
            names += ["knn", "weighted_knn"] if protocol == "knn" else [protocol]
    return names


def sgd_settings(cfg: Config, rates: list[float], **fixed: int) -> list[dict[str, Any]]:
    """Each learning rate of the config, by default `rates` for 256 images, with each decay."""
    if cfg.finetune_learning_rate is None:
        rates = [rate * cfg.batch_size / 256 for rate in rates]
    else:
        rates = as_list(cfg.finetune_learning_rate)
        allowed = f"at most finetune_learning_rate, {min(rates):g}"
        cfg.require("min_learning_rate", cfg.min_learning_rate <= min(rates), allowed)
    decays = as_list(cfg.finetune_weight_decay)
    fixed |= {"epochs": cfg.finetune_epochs, "batch_size": cfg.batch_size}
    return [{**fixed, "learning_rate": r, "weight_decay": d} for r, d in product(rates, decays)]


def fit_best(
    task: Task, candidates: list[dict[str, Any]], fit: Fit, *, inputs: Images, test_inputs: Images
) -> Result:
    """The test scores of the classifier with the best of the candidate settings.

    fit(index, candidates) trains one with each. Several are fitted on nine tenths and scored on the
    rest; the first of the best is fitted again on all. Divergence loses.
    """
    labels, chosen, selection = task.train.labels, candidates[0], None
    if len(candidates) > 1:
        rest, held_out = hold_out(labels, 0.1, task.cfg.seed)
        tried, best, known = [], -1.0, select_images(inputs, held_out)
        for settings, classify in zip(candidates, fit(rest, candidates), strict=True):
            scores, reached = classify(known), None
            if features.is_finite(scores):
                reached = features.accuracy(scores, labels[held_out])
            if reached is not None and reached > best:
                chosen, best = settings, reached
            tried.append({**settings, "accuracy": reached})
        selection = {"chosen": chosen, "validation_images": len(held_out), "candidates": tried}
    [classify] = fit(torch.arange(len(labels), device=labels.device), [chosen])
    return Result(classify(test_inputs), chosen, selection)
