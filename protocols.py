"""How an encoder is judged: kNN, a linear layer, logistic regression, fine-tuning.

Each protocol gives scores of the test images, whose labels it never gets.
"""

import copy
import math
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor, nn
from tqdm import tqdm

from augment import draw, random_crop_flip
from data import Split, hold_out
from device import autocast
from evaluation import accuracy, clean_features, crop_features, frozen, knn_scores
from optim import cosine_learning_rate, make_optimizer, set_learning_rate

VALIDATION_SHARE = 0.1  # of the labelled training images, where something is to be chosen
INVERSE_PENALTIES = [{"C": c} for c in (1e-4, 1e-3, 1e-2, 0.1, 1.0)]  # of logistic regression

Classifier = Callable[[Tensor], Tensor]  # (N, …) -> scores (N, C), larger is likelier


class Task(NamedTuple):
    """What every protocol is given: of the test set the images, not their labels."""

    enc: nn.Module
    feature_dim: int  # D
    size: int  # side in pixels that the encoder sees
    train: Split  # the labelled training images
    test_images: Tensor  # (N, 3, H, W), uint8
    candidates: list[dict[str, float]]  # learning_rate and weight_decay, to choose among
    epochs: int
    batch_size: int
    min_learning_rate: float
    momentum: float
    views: int  # K, random crops of each image for the linear layer to cycle through
    crop: tuple[tuple[float, float], float]  # crop_scale, flip_probability
    dtype: torch.dtype  # what the encoder computes in
    seed: int
    h: Tensor | None = None  # features of the training images as they are, (M, D)
    test_h: Tensor | None = None  # (N, D)


class Found(NamedTuple):
    """What a protocol gives."""

    scores: Tensor  # (N, C), of the test images
    settings: dict[str, Any]
    selection: dict[str, Any] | None = None  # where something was chosen: among what, on what


def run_protocols(protocols: list[str], task: Task) -> Iterator[tuple[str, Found, float]]:
    """Each protocol of RUN: its name, what it found, and the seconds that it takes alone.

    Raises RuntimeError if one other than finetune has changed the encoder, UserError if there are
    too few labels to hold some out where something is to be chosen.
    """
    if "logistic" in protocols or len(task.candidates) > 1:
        validation_part(task)  # before hours are spent
    feature_seconds = 0.0
    if set(protocols) - {"finetune"}:
        start = time.perf_counter()
        with frozen(task.enc):
            h, test_h = (
                clean_features(task.enc, images, task.size, task.batch_size, task.dtype)
                for images in (task.train.images, task.test_images)
            )
        task = task._replace(h=h, test_h=test_h)
        feature_seconds = time.perf_counter() - start
    for protocol in protocols:
        start = time.perf_counter()
        if protocol == "finetune":
            found = RUN[protocol](task)
        else:
            start -= feature_seconds
            with frozen(task.enc):
                found = RUN[protocol](task)
        settings = found.settings
        if "learning_rate" in settings:
            settings = {"epochs": task.epochs, "batch_size": task.batch_size, **settings}
        found = Found(found.scores.cpu(), settings, found.selection)  # waits for a GPU
        yield protocol, found, time.perf_counter() - start


def run_knn(task: Task, **settings: float) -> Found:
    """Cosine kNN; the features of the training images are the bank."""
    labels, classes = task.train.labels, len(task.train.classes)
    return Found(knn_scores(task.h, labels, task.test_h, classes, **settings), settings)


def run_linear(task: Task) -> Found:
    """Linear evaluation (Sec. 2.3): a linear layer on the features of random crops and flips."""
    k = min(task.views, task.epochs)  # more would not be seen
    how = task.size, *task.crop, task.batch_size, task.dtype, task.seed
    found = run_linear_on(task, crop_features(task.enc, task.train.images, k, *how))
    return found._replace(settings={"views": k, **found.settings})


def run_linear_on(task: Task, views: Tensor) -> Found:
    """A linear layer on the features (K, M, D) of K views of each training image."""
    return select_and_fit(task, task.candidates, partial(fit_linear, task, views))


def run_logistic(task: Task) -> Found:
    """scikit-learn's logistic regression: it shares no code with our linear layer."""
    return select_and_fit(task, INVERSE_PENALTIES, partial(fit_logistic, task))


def run_finetune(task: Task) -> Found:
    """Fine-tuning (App. B.5): a copy of the encoder is trained too. Not linear evaluation."""
    images = task.train.images, task.test_images
    return select_and_fit(task, task.candidates, partial(fit_network, task), *images)


RUN = {
    "knn": partial(run_knn, k=10),
    "weighted_knn": partial(run_knn, k=200, temperature=0.07),  # Wu et al. 2018
    "linear": run_linear,
    "linear_clean": lambda task: run_linear_on(task, task.h[None]),
    "logistic": run_logistic,
    "finetune": run_finetune,
}


def select_and_fit(
    task: Task,
    candidates: list[dict[str, float]],
    fit: Callable[..., Classifier],
    inputs: Tensor | None = None,
    test_inputs: Tensor | None = None,
) -> Found:
    """Test scores of the best candidate, fitted on all labelled training images.

    fit(index, **candidate) trains on the images of the index alone. Of several candidates each is
    fitted on nine tenths and scored on the tenth that is left, whose inputs are inputs[index]; the
    first of the best is fitted again on everything, and only that one sees the test inputs.
    Inputs are the features of the images as they are unless given.
    """
    if inputs is None:
        inputs, test_inputs = task.h, task.test_h
    labels, chosen, selection = task.train.labels, candidates[0], None
    if len(candidates) > 1:
        rest, part = validation_part(task)
        found = [accuracy(fit(rest, **c)(inputs[part]), labels[part]) for c in candidates]
        chosen = candidates[found.index(max(found))]
        tried = [{**c, "accuracy": value} for c, value in zip(candidates, found, strict=True)]
        selection = {"chosen": chosen, "validation_images": len(part), "candidates": tried}
    everything = torch.arange(len(labels), device=labels.device)
    return Found(fit(everything, **chosen)(test_inputs), chosen, selection)


def validation_part(task: Task) -> tuple[Tensor, Tensor]:
    """Indices of nine tenths of the labelled training images and of the rest, stratified."""
    remedy = "give more labels, or one finetune_learning_rate and weight decay and no logistic"
    return hold_out(task.train.labels, VALIDATION_SHARE, task.seed, remedy)


def fit_linear(task: Task, views: Tensor, index: Tensor, **candidate: float) -> Classifier:
    """A linear layer on features (K, M, D): in each epoch the next of the K views."""
    torch.manual_seed(task.seed)  # initial weights
    head = nn.Linear(views.shape[-1], len(task.train.classes)).to(views.device)

    def view(epoch: int, batch: Tensor) -> Tensor:
        return views[epoch % len(views), batch].float()  # n×D

    train_classifier(head, view, task, index, torch.float32, "linear layer", **candidate)
    return lambda h: head(h.float()).detach()


def fit_logistic(task: Task, index: Tensor, **penalty: float) -> Classifier:
    """Logistic regression on standardised features, L-BFGS until it converges."""
    model = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000, **penalty))
    model.fit(task.h[index].float().cpu().numpy(), task.train.labels[index].cpu().numpy())

    def scores(h: Tensor) -> Tensor:
        return torch.from_numpy(model.predict_proba(h.float().cpu().numpy())).to(h.device)

    return scores


def fit_network(task: Task, index: Tensor, **candidate: float) -> Classifier:
    """The network with a linear layer on it: new crops in each epoch, batch norm in train mode."""
    torch.manual_seed(task.seed)  # initial weights of the layer
    layer = nn.Linear(task.feature_dim, len(task.train.classes)).to(task.train.labels.device)
    model = nn.Sequential(copy.deepcopy(task.enc), layer).train().requires_grad_(True)
    rng = torch.Generator(task.train.labels.device).manual_seed(task.seed)

    def crops(epoch: int, batch: Tensor) -> Tensor:
        u = draw(len(batch), rng)
        return random_crop_flip(task.train.images[batch], u, task.size, *task.crop)

    train_classifier(model, crops, task, index, task.dtype, "fine-tuning", **candidate)
    model.eval()
    return lambda x: clean_features(model, x, task.size, task.batch_size, task.dtype).float()


def train_classifier(
    model: nn.Module,
    inputs: Callable[[int, Tensor], Tensor],
    task: Task,
    index: Tensor,
    dtype: torch.dtype,
    name: str,
    learning_rate: float,
    weight_decay: float,
) -> None:
    """Train `model` on the labels of the index; inputs(epoch, indices of a batch) is what it sees.

    SGD and a cosine. Each image is seen once an epoch, in batches of equal size to within one
    image: a last one of a few would step as far as the others, and batch norm needs two images.
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
                with autocast(device, dtype):
                    scores = model(inputs(epoch, batch))
                loss = F.cross_entropy(scores.float(), labels[batch])
                optimizer.zero_grad()
                scaler.scale(loss).backward()
                scaler.step(optimizer)
                scaler.update()
                if bar.update():
                    bar.set_postfix_str(f"epoch {epoch + 1}, loss {loss:.3f}", refresh=False)
