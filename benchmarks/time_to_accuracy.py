"""Time to the same kNN accuracy: the plain pipeline against simclr.py, on images of your own.

    python benchmarks/time_to_accuracy.py data/cifar10-png               # IMAGES
    python benchmarks/time_to_accuracy.py IMAGES --epochs 4 --seed 0 1 2 --runs plain same

ResNet-18, the same images and seed in every run: `plain` (see plain.py), `same` (simclr.py with the
same recipe, views and epochs), `fast` (simclr.py with recipe=fast, over --fast-epochs).
The runs take turns, epoch by epoch, so that a noisy machine favours none; each has a clock that
counts its training alone. kNN is that of simclr_lin.py, k = 10, on test images at 32×32, after each
epoch of the last 40 %. The first time that a run has the accuracy with which `plain` ends is
compared with the end of `plain`, and with the first time that `plain` had it. The defaults take an
hour and more on two cores, most of it in the plain pipeline.
"""

import time
from collections.abc import Iterator

import torch
from harness import (
    Recorder,
    config,
    finish_seeds,
    folder,
    knn,
    parser,
    subset,
    synchronize,
    train_epoch,
)
from plain import Plain, plain_loader, plain_transform
from torch import Tensor

from config import Config
from images.datasets import Split, load_split
from models import SimCLR
from simclr import make_learner
from system.device import select_device
from training.optim import cosine_learning_rate, set_learning_rate

RECIPE = [  # for short runs: docs/jpeg.md
    "batch_size=128", "learning_rate=0.03", "weight_decay=5e-4", "crop_scale=[0.2,1]",
    "grayscale_probability=0.1", "hidden_dim=1024",
]  # fmt: skip
FAST = ["recipe=fast", "views=2", "batch_size=64"]  # 78 steps an epoch of 5,000 images
Point = tuple[float, int, float]  # seconds, epoch, kNN accuracy


def plain_run(cfg: Config, images: Tensor, workers: int = 2) -> Iterator[SimCLR]:
    """The plain pipeline; yields the model after each epoch."""
    torch.manual_seed(cfg.seed)
    model = SimCLR(cfg.backbone, cfg.projection_dim, cfg.hidden_dim)
    plain, transform = Plain(model, cfg, cfg.weight_decay), plain_transform(cfg, cfg.image_size)
    loader = plain_loader(images, cfg.batch_size, transform, cfg.seed, workers)
    for epoch in range(cfg.epochs):
        for i, pair in enumerate(loader):
            rate = cosine_learning_rate(
                epoch * len(loader) + i, cfg.epochs * len(loader),
                cfg.learning_rate, cfg.min_learning_rate,
            )  # fmt: skip
            set_learning_rate(plain.optimizer, rate)
            plain.step(pair)
        synchronize()
        yield model


def our_run(cfg: Config, images: Tensor) -> Iterator[SimCLR]:
    """simclr.py's own training; yields the model after each epoch."""
    device = select_device("auto")
    learner, recorder, images = make_learner(cfg, device), Recorder(), images.to(device)
    while recorder.epoch < cfg.epochs:
        learner.model.train()
        train_epoch(cfg, learner, images, recorder)
        yield learner.model


def race(
    runs: dict[str, Iterator[SimCLR]], epochs: dict[str, int], cfg: Config, splits: list[Split]
) -> dict[str, list[Point]]:
    """Advance the run that is furthest behind, by one epoch; [(seconds, epoch, kNN), …] of each.

    cfg: for kNN; splits: training images and test images.
    """
    trace = {name: [(0.0, 0, 0.0)] for name in runs}
    while unfinished := [name for name in runs if trace[name][-1][1] < epochs[name]]:
        name = min(unfinished, key=lambda name: trace[name][-1][1] / epochs[name])
        start = time.perf_counter()
        model = next(runs[name])
        seconds = trace[name][-1][0] + time.perf_counter() - start
        epoch = trace[name][-1][1] + 1
        found = 0.0
        if epoch >= 0.6 * epochs[name]:
            found = knn(model.enc, cfg, train=splits[0], test=splits[1])
        trace[name].append((seconds, epoch, found))
        print(f"{name} {epoch}/{epochs[name]}: {seconds:.0f} s, kNN {found:.2%}", flush=True)
    return trace


def speedups(plain: list[Point], other: list[Point]) -> dict[str, float] | None:
    """Over the first time that `other` has the accuracy with which `plain` ends: the end of
    `plain`, and the first time that `plain` had it. None if `other` never has it."""
    end, _, wanted = plain[-1]
    first, theirs = (
        next((seconds for seconds, _, found in run if found >= wanted), None)
        for run in (plain, other)
    )
    return None if theirs is None else {"end": end / theirs, "first_time": first / theirs}


def main() -> None:
    """Run the races, a table, and one JSON object as the last line."""
    args = parser(__doc__)
    args.add_argument("data", help="folder with train/<class>/* and test/<class>/*")
    args.add_argument("--images", type=int, default=500, help="training images of each class")
    args.add_argument("--test", type=int, default=400, help="test images of each class")
    args.add_argument("--epochs", type=int, default=15, help="of plain and same")
    args.add_argument("--fast-epochs", type=int, default=3)
    args.add_argument("--fast", nargs="+", default=FAST, help=f"overrides (default: {FAST})")
    args.add_argument("--seed", type=int, nargs="+", default=[0])
    args.add_argument("--runs", nargs="+", default=["plain", "fast"])
    args = args.parse_args()
    judge, device = config(*folder(args.data)), select_device("auto")
    train = subset(load_split(judge, "train"), args.images)
    splits = [train.to(device), subset(load_split(judge, "test"), args.test).to(device)]
    results: dict[str, list[float]] = {}
    for seed in args.seed:
        epochs = {name: args.epochs for name in args.runs}
        runs = {}
        for name in args.runs:
            if name == "fast":
                epochs[name] = args.fast_epochs
            recipe = args.fast if name == "fast" else RECIPE
            cfg = config(*recipe, f"seed={seed}", f"epochs={epochs[name]}")
            runs[name] = (plain_run if name == "plain" else our_run)(cfg, train.images)
        trace = race(runs, epochs, judge, splits)
        for name in runs:
            results.setdefault(f"knn_{name}", []).append(trace[name][-1][2])
            results.setdefault(f"seconds_{name}", []).append(trace[name][-1][0])
        for name in set(runs) - {"plain"} if "plain" in runs else ():
            ratios = speedups(trace["plain"], trace[name])
            if ratios is None:
                print(f"{name} does not reach the accuracy of plain with seed {seed}")
            for key, ratio in (ratios or {}).items():
                results.setdefault(f"time_{name}_vs_{key}_of_plain", []).append(ratio)
    finish_seeds(dict(sorted(results.items())), len(args.seed))


if __name__ == "__main__":
    main()
