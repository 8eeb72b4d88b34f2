"""Classifiers on a frozen encoder's features, and fine-tuning: linear, logistic regression."""

import copy
import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor, nn
from tqdm import tqdm

from evaluation.features import check_finite, clean_features
from images.augment import draw, random_crop_flip
from images.datasets import Split
from images.host import Images
from system.device import autocast
from training.optim import cosine_learning_rate, make_optimizer, set_learning_rate

Classifier = Callable[[Tensor], Tensor]  # (N, …) -> scores (N, C), larger is likelier


class EvaluationTask(NamedTuple):
    """The input of every protocol; of the test set it has no labels."""

    enc: nn.Module
    feature_dim: int  # D
    size: int  # input size of the encoder in pixels
    train: Split  # the labelled training images
    test_images: Images  # (N, 3, H, W), uint8
    candidates: list[dict[str, float]]  # learning_rate and weight_decay to choose from
    epochs: int
    batch_size: int
    min_learning_rate: float
    momentum: float
    views: int  # K, random crops of each image that the linear layer cycles through
    crop: tuple[tuple[float, float], float]  # crop_scale, flip_probability
    dtype: torch.dtype  # what the encoder computes in
    seed: int
    h: Tensor | None = None  # features of the unaugmented training images, (M, D)
    test_h: Tensor | None = None  # (N, D)
    encoder: str = "checkpoint"  # or the name of a baseline


def fit_linear(
    task: EvaluationTask, views: Tensor, index: Tensor, **candidate: float
) -> Classifier:
    """Train a linear layer on features (K, M, D), cycling through the K views, one per epoch."""
    torch.manual_seed(task.seed)  # initial weights
    head = nn.Linear(views.shape[-1], len(task.train.classes)).to(views.device)

    def view(epoch: int, batch: Tensor) -> Tensor:
        return views[epoch % len(views), batch].float()  # n×D

    train_classifier(head, view, task, index, torch.float32, "linear layer", **candidate)
    return lambda h: head(h.float()).detach()


def fit_logistic(task: EvaluationTask, index: Tensor, **penalty: float) -> Classifier:
    """scikit-learn's logistic regression on standardised features: independent of our layer."""
    model = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000, **penalty))
    model.fit(task.h[index].float().cpu().numpy(), task.train.labels[index].cpu().numpy())
    return lambda h: torch.from_numpy(model.predict_proba(h.float().cpu().numpy())).to(h.device)


def fit_network(task: EvaluationTask, index: Tensor, **candidate: float) -> Classifier:
    """Fine-tuning (App. B.5), not a linear evaluation: trains encoder and layer on new crops."""
    torch.manual_seed(task.seed)  # initial weights of the layer
    layer = nn.Linear(task.feature_dim, len(task.train.classes)).to(task.train.labels.device)
    model = nn.Sequential(copy.deepcopy(task.enc), layer).train().requires_grad_(True)
    rng = torch.Generator(task.train.labels.device).manual_seed(task.seed)

    def crops(epoch: int, batch: Tensor) -> Tensor:
        u = draw(len(batch), rng)
        return random_crop_flip(task.train.images[batch], u, task.size, *task.crop)

    train_classifier(model, crops, task, index, task.dtype, "fine-tuning", **candidate)
    model.eval()
    inference = task.size, task.batch_size, task.dtype
    return lambda x: clean_features(model, x, *inference, trained=True).float()


def train_classifier(
    model: nn.Module,
    inputs: Callable[[int, Tensor], Tensor],
    task: EvaluationTask,
    index: Tensor,
    dtype: torch.dtype,
    name: str,
    learning_rate: float,
    weight_decay: float,
) -> None:
    """Train `model` by SGD with a cosine schedule on the images of the index and their labels.

    inputs(epoch, indices of a batch) returns the input of a step. Each image is seen once per
    epoch, in batches of equal size to within one image: a small last batch would get the same step
    size as a full one, and batch norm needs two images. Raises NotFinite after an epoch whose last
    loss is not.
    """
    device, labels = task.train.labels.device, task.train.labels
    rng = torch.Generator(device).manual_seed(task.seed)  # order of the images
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    optimizer = make_optimizer(
        "sgd", model.parameters(), task.momentum, weight_decay, fused=not scaler.is_enabled()
    )
    steps = max(1, min(math.ceil(len(index) / task.batch_size), len(index) // 2))
    total = task.epochs * steps
    with tqdm(total=total, desc=name, unit="step", mininterval=1, leave=False) as bar:
        for epoch in range(task.epochs):
            order = index[torch.randperm(len(index), device=device, generator=rng)]
            for i, batch in enumerate(order.tensor_split(steps)):
                step = epoch * steps + i
                set_learning_rate(
                    optimizer,
                    cosine_learning_rate(step, total, learning_rate, task.min_learning_rate),
                )
                x = inputs(epoch, batch)  # crops are float32 in every precision
                with autocast(device, dtype):
                    scores = model(x)
                loss = F.cross_entropy(scores.float(), labels[batch])
                optimizer.zero_grad()
                scaler.scale(loss).backward()
                scaler.step(optimizer)
                scaler.update()
                if bar.update():
                    bar.set_postfix_str(f"epoch {epoch + 1}, loss {loss:.3f}", refresh=False)
            what = f"with learning rate {learning_rate:g} the loss in epoch {epoch + 1} is"
            check_finite(what, loss.detach(), dtype, trained=True)
