"""Classifiers on a frozen encoder's features, and fine-tuning: linear, logistic regression."""

import copy
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor, nn

from config import Config
from evaluation.features import clean_features
from images.augment import CROPS, draw, random_crop_flip, shuffle
from images.datasets import Images, Split
from system.device import autocast, to_device
from system.errors import progress_bar
from training.optim import cosine_learning_rate, make_optimizer

Classifier = Callable[[Tensor], Tensor]  # (N, …) -> scores (N, C), larger is likelier
Settings = list[dict[str, float]]  # of each classifier


@dataclass
class Task:
    """What a protocol gets: of the test set the images, not the labels."""

    cfg: Config  # with the checkpoint's architecture, a precision by name, the seed of this run
    enc: nn.Module
    train: Split  # the labelled training images
    test_images: Images  # (N, 3, H, W), uint8
    h: Tensor  # features of the unaugmented training images, (M, D)
    test_h: Tensor  # (N, D)
    name: str  # for messages: encoder and seed


def fit_linear(task: Task, views: Tensor, index: Tensor, candidates: Settings) -> list[Classifier]:
    """A linear layer for each candidate, trained on features (K, M, D), one of K views an epoch.

    Their outputs are columns of one matrix product: five take little longer than one.
    """
    torch.manual_seed(task.cfg.seed)  # initial weights
    layer = nn.Linear(views.shape[-1], len(task.train.classes)).to(views.device)
    layers = nn.ModuleList(copy.deepcopy(layer) for _ in candidates)

    def scores(batch: Tensor, epoch: int, step: int) -> Tensor:
        weight = torch.cat([layer.weight for layer in layers])  # of all candidates, (R·C, D)
        bias = torch.cat([layer.bias for layer in layers])
        return F.linear(views[epoch % len(views), batch].float(), weight, bias)  # n×R·C

    train_classifiers(layers, scores, task, index, candidates)
    return [lambda h, layer=layer: layer(h.float()).detach() for layer in layers]


def fit_logistic(task: Task, index: Tensor, candidates: Settings) -> Iterator[Classifier]:
    """scikit-learn's logistic regression on standardised features: independent of our layer."""
    h, labels = task.h[index].float().cpu().numpy(), task.train.labels[index].cpu().numpy()
    for settings in candidates:
        model = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000, **settings))
        model.fit(h, labels)
        score = model.predict_proba
        yield lambda x, score=score: torch.from_numpy(score(x.float().cpu().numpy())).to(x.device)


def fit_network(task: Task, index: Tensor, candidates: Settings) -> Iterator[Classifier]:
    """Fine-tuning (App. B.5): trains a layer and a copy of the encoder, on new crops each step."""
    precision = "fp32" if task.cfg.precision == "fp16" else task.cfg.precision  # without a scaler
    cfg = replace(task.cfg, precision=precision)

    def scores(batch: Tensor, epoch: int, step: int) -> Tensor:
        u = to_device(draw(len(batch), cfg.seed, step, CROPS), task.h.device)
        x = random_crop_flip(task.train.images[batch], u, cfg.image_size, cfg)  # in float32
        with autocast(x.device, cfg.precision):
            return model(x)

    for settings in candidates:
        torch.manual_seed(cfg.seed)  # initial weights of the layer
        layer = nn.Linear(task.h.shape[1], len(task.train.classes)).to(task.h.device)
        model = nn.Sequential(copy.deepcopy(task.enc), layer).train().requires_grad_(True)
        train_classifiers([model], scores, task, index, [settings])
        model.eval()
        yield lambda images, model=model: clean_features(model, images, cfg).float()


def train_classifiers(
    models: Iterable[nn.Module],
    scores: Callable[[Tensor, int, int], Tensor],
    task: Task,
    index: Tensor,
    candidates: Settings,
) -> None:
    """Train R classifiers by SGD with a cosine schedule; scores(batch, epoch, step): (n, R·C).

    Batches, of the index, are equal to within one image: a small last one would get the step of a
    full one, and batch norm needs two images.
    """
    cfg, labels, device = task.cfg, task.train.labels, task.h.device
    groups = []
    for model, settings in zip(models, candidates, strict=True):
        rate, decay = settings["learning_rate"], settings["weight_decay"]
        groups.append({"params": [*model.parameters()], "peak": rate, "weight_decay": decay})
    optimizer = make_optimizer(replace(cfg, optimizer="sgd"), groups)
    epochs, batch_size, rows = candidates[0]["epochs"], candidates[0]["batch_size"], len(candidates)
    steps = max(1, min(math.ceil(len(index) / batch_size), len(index) // 2))
    total = epochs * steps
    with progress_bar(total=total, desc="classifier", leave=False) as bar:
        for epoch in range(epochs):
            order = index[to_device(shuffle(len(index), cfg.seed, epoch), device)]
            for step, batch in enumerate(order.tensor_split(steps), epoch * steps):
                for group in optimizer.param_groups:
                    peak, floor = group["peak"], min(cfg.min_learning_rate, group["peak"])
                    group["lr"] = cosine_learning_rate(step, total, peak, floor)
                output = scores(batch, epoch, step).float().view(len(batch) * rows, -1)
                target = labels[batch].repeat_interleave(rows)
                loss = rows * F.cross_entropy(output, target)  # the sum over the classifiers
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                bar.update()
