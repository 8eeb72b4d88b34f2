"""Linear evaluation, all of it, against running the frozen encoder again in every epoch.

    python benchmarks/linear_eval.py               # untrained encoder, random images; a minute
    python benchmarks/linear_eval.py --data data/cifar10-jpeg --checkpoint FILE --accuracy

The plain protocol crops and flips PIL images in two loader processes and passes them through a
float32 encoder in each of 100 epochs; one epoch and one pass over the test images are timed, and
counted 100 times and once. Ours is timed whole: features of K crops of each image and of the test
images, 100 epochs of the linear layer. With --accuracy it tells instead what K does to the test
accuracy. The last row there, as many crops as epochs, is the plain protocol, but that the crops are
ours, whose distribution is torchvision's, and the features of the precision that `auto` takes.
"""

import argparse
import copy
import sys
import time
from pathlib import Path
from statistics import mean, median, stdev

import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader
from torchvision import transforms

sys.path.insert(0, str(Path(__file__).parent.parent))

from harness import alternate, config, describe_machine, finish, parser, subset
from plain import TwoViews

from evaluation.classifiers import EvaluationTask
from evaluation.features import accuracy, build_encoder, clean_features, crop_features
from evaluation.protocols import run_linear_on, run_protocols
from images.datasets import Split, load_split, resize
from models import SimCLR
from system.checkpoint import load_checkpoint
from system.device import select_device, select_precision

SIZE = 32


class OneView(TwoViews):
    """One random crop of each image and its label."""

    def __init__(self, split: Split, transform: transforms.Compose) -> None:
        super().__init__(split.images, transform)
        self.labels = split.labels

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return self.transform(Image.fromarray(self.images[index])), self.labels[index]


def random_split(images: int, seed: int) -> Split:
    """Noise with labels of ten classes."""
    rng = torch.Generator().manual_seed(seed)
    x = torch.randint(0, 256, (images, 3, SIZE, SIZE), dtype=torch.uint8, generator=rng)
    return Split(x, torch.arange(images) % 10, [str(c) for c in range(10)])


def plain_epoch(enc: nn.Module, loader: DataLoader, device: torch.device) -> None:
    """One epoch of the linear layer, the encoder run on every image."""
    head = nn.LazyLinear(10).to(device)
    optimizer = torch.optim.SGD(head.parameters(), lr=0.1, momentum=0.9)
    for x, y in loader:
        with torch.no_grad():
            h = enc(x.to(device))
        loss = F.cross_entropy(head(h), y.to(device))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


@torch.no_grad()
def plain_features(enc: nn.Module, images: torch.Tensor) -> torch.Tensor:
    """Features of the test images in float32."""
    return torch.cat([enc(resize(x, SIZE)) for x in images.split(512)])


def task_of(
    args: argparse.Namespace, views: int, enc: nn.Module, train: Split, test: Split
) -> EvaluationTask:
    """What simclr_lin.py would run with K views of each image."""
    cfg = config(f"batch_size={args.batch}", peak="finetune_learning_rate")
    rate = {"learning_rate": cfg.finetune_learning_rate, "weight_decay": 0.0}
    crop = tuple(cfg.crop_scale), cfg.flip_probability
    return EvaluationTask(
        enc, 512, SIZE, train, test.images, [rate], args.epochs, args.batch,
        cfg.min_learning_rate, cfg.momentum, views, crop,
        select_precision("auto", test.images.device), seed=0,
    )  # fmt: skip


def accuracy_by_views(
    args: argparse.Namespace, enc: nn.Module, train: Split, test: Split
) -> dict[str, float]:
    """Test accuracy for each K, mean over seeds that change crops, order and initial weights."""
    task = task_of(args, args.epochs, enc.eval().requires_grad_(False), train, test)
    start = time.perf_counter()
    views = crop_features(
        enc, train.images, args.epochs, SIZE, *task.crop, task.batch_size, task.dtype, task.seed
    )
    h, test_h = (
        clean_features(enc, split.images, SIZE, task.batch_size, task.dtype)
        for split in (train, test)
    )
    seconds = (time.perf_counter() - start) / (args.epochs + 1 + len(test.labels) / len(views[0]))
    means = {}
    for k in (*args.views, args.epochs):
        found = []
        for seed in range(args.seeds):
            run = task._replace(seed=seed, h=h, test_h=test_h)
            scores = run_linear_on(run, views.roll(-seed * k, 0)[:k]).scores
            found.append(accuracy(scores, test.labels))
        means[f"accuracy_{k}_views"] = mean(found)
        passes = k + 1 + len(test.labels) / len(views[0])
        spread = stdev(found) if len(found) > 1 else 0.0
        print(f"K = {k:3}: {mean(found):.2%} ± {spread:.2%} (n = {len(found)}), "
              f"features in {passes * seconds:.0f} s")  # fmt: skip
    return means


def main() -> None:
    """Time both, or with --accuracy a table over K; the last line is one JSON object."""
    args = parser(__doc__)
    args.add_argument("--checkpoint", help="of simclr.py; none: an untrained ResNet-18")
    args.add_argument("--data", help="folder with train/<class>/* and test/<class>/*")
    args.add_argument("--images", type=int, default=500, help="training images of each class")
    args.add_argument("--epochs", type=int, default=100)
    args.add_argument("--batch", type=int, default=128)
    args.add_argument("--repeats", type=int, default=3)
    args.add_argument(
        "--views", type=int, nargs="+", default=[5, 1, 2, 10], help="K; timed: the first"
    )
    args.add_argument("--seeds", type=int, default=3, help="of --accuracy")
    args.add_argument("--accuracy", action="store_true")
    args = args.parse_args()
    device = select_device("auto")
    if args.data:
        train, test = (load_split("folder", args.data, s, SIZE, 2) for s in ("train", "test"))
        train = subset(train, args.images)
    else:
        train, test = random_split(min(256, 10 * args.images), 0), random_split(64, 1)
    if args.checkpoint:
        path = Path(args.checkpoint)
        enc, _ = build_encoder(load_checkpoint(path), path, "checkpoint", seed=0)
    else:
        enc = SimCLR().enc.to(memory_format=torch.channels_last)
    on_device = train.to(device), test.to(device)
    if args.accuracy:
        finish(accuracy_by_views(args, enc.to(device), *on_device))
        return
    plain_enc = copy.deepcopy(enc).to(device, memory_format=torch.contiguous_format).eval()
    enc = enc.to(device)

    crop = transforms.Compose(
        [transforms.RandomResizedCrop(SIZE), transforms.RandomHorizontalFlip(),
         transforms.ToTensor()]
    )  # fmt: skip
    loader = DataLoader(
        OneView(train, crop), args.batch, shuffle=True, num_workers=2, persistent_workers=True
    )
    task = task_of(args, args.views[0], enc, *on_device)
    seconds = alternate(
        {
            "plain, one epoch": lambda: plain_epoch(plain_enc, loader, device),
            "plain, the test images": lambda: plain_features(plain_enc, on_device[1].images),
            "ours, all of it": lambda: list(run_protocols(["knn", "linear"], task)),
        },
        args.repeats,
    )
    describe_machine()
    for name, times in seconds.items():
        print(f"{name:24} {median(times):8.2f} s ({min(times):.2f} to {max(times):.2f})")
    epoch, last, all_of_ours = (median(times) for times in seconds.values())
    plain = args.epochs * epoch + last
    ratio = plain / all_of_ours
    print(f"plain, {args.epochs} epochs: {plain:.0f} s; ours with K = {task.views}: "
          f"{all_of_ours:.1f} s, {ratio:.0f} times faster")  # fmt: skip
    finish({"linear_eval_vs_every_epoch": ratio})


if __name__ == "__main__":
    main()
