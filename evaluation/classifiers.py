"""Classifiers on a frozen encoder's features, and fine-tuning: linear, logistic regression."""

import copy
import math
from collections.abc import Callable
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
from training.optim import cosine_learning_rate, make_optimizer, set_learning_rate

Classifier = Callable[[Tensor], Tensor]  # (N, …) -> scores (N, C), larger is likelier


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


def fit_linear(task: Task, views: Tensor, index: Tensor, settings: dict[str, float]) -> Classifier:
    """Train a linear layer on features (K, M, D), cycling through the K views, one per epoch."""
    torch.manual_seed(task.cfg.seed)  # initial weights
    layer = nn.Linear(views.shape[-1], len(task.train.classes)).to(views.device)

    def view(batch: Tensor, epoch: int, step: int) -> Tensor:
        return views[epoch % len(views), batch].float()  # n×D

    train_classifier(layer, view, task, index, settings, precision="fp32")
    return lambda h: layer(h.float()).detach()


def fit_logistic(task: Task, index: Tensor, settings: dict[str, float]) -> Classifier:
    """scikit-learn's logistic regression on standardised features: independent of our layer."""
    model = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000, **settings))
    model.fit(task.h[index].float().cpu().numpy(), task.train.labels[index].cpu().numpy())
    return lambda h: torch.from_numpy(model.predict_proba(h.float().cpu().numpy())).to(h.device)


def fit_network(task: Task, index: Tensor, settings: dict[str, float]) -> Classifier:
    """Fine-tuning (App. B.5): trains a layer and a copy of the encoder, on new crops each step."""
    cfg, device = task.cfg, task.h.device
    torch.manual_seed(cfg.seed)  # initial weights of the layer
    layer = nn.Linear(task.h.shape[1], len(task.train.classes)).to(device)
    model = nn.Sequential(copy.deepcopy(task.enc), layer).train().requires_grad_(True)

    def crops(batch: Tensor, epoch: int, step: int) -> Tensor:
        u = to_device(draw(len(batch), cfg.seed, step, CROPS), device)
        return random_crop_flip(task.train.images[batch], u, cfg.image_size, cfg)

    train_classifier(model, crops, task, index, settings, precision=cfg.precision)
    model.eval()
    return lambda images: clean_features(model, images, cfg).float()


def train_classifier(
    model: nn.Module,
    make_input: Callable[[Tensor, int, int], Tensor],
    task: Task,
    index: Tensor,
    settings: dict[str, float],
    *,
    precision: str,
) -> None:
    """SGD with a cosine schedule on the images of the index, by make_input(batch, epoch, step).

    The batches of an epoch are equal to within one image: a small last one would get the step of
    a full one, and batch norm needs two images.
    """
    cfg, labels, device = task.cfg, task.train.labels, task.h.device
    scaler = torch.amp.GradScaler(device.type, enabled=precision == "fp16")
    sgd = replace(cfg, optimizer="sgd", weight_decay=settings["weight_decay"])
    optimizer = make_optimizer(sgd, model.parameters(), fused=not scaler.is_enabled())
    steps = max(1, min(math.ceil(len(index) / settings["batch_size"]), len(index) // 2))
    total, peak = settings["epochs"] * steps, settings["learning_rate"]
    with progress_bar(total=total, desc="classifier", leave=False) as bar:
        for epoch in range(settings["epochs"]):
            order = index[to_device(shuffle(len(index), cfg.seed, epoch), device)]
            for step, batch in enumerate(order.tensor_split(steps), epoch * steps):
                learning_rate = cosine_learning_rate(step, total, peak, cfg.min_learning_rate)
                set_learning_rate(optimizer, learning_rate)
                x = make_input(batch, epoch, step)  # crops are float32 in every precision
                with autocast(device, precision):
                    scores = model(x)
                loss = F.cross_entropy(scores.float(), labels[batch])
                optimizer.zero_grad()
                scaler.scale(loss).backward()
                scaler.step(optimizer)
                scaler.update()
                bar.update()
