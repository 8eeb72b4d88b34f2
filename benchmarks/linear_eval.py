"""Linear evaluation, all of it, against running the frozen encoder again in every epoch.

    python benchmarks/linear_eval.py               # untrained encoder, random images; a minute
    python benchmarks/linear_eval.py --data IMAGES --checkpoint FILE --accuracy
    python benchmarks/linear_eval.py --data IMAGES --checkpoint FILE --images 5000 --dkobak

The plain protocol crops and flips PIL images in two loader processes and passes them through a
float32 encoder in each of 100 epochs; one epoch and one pass over the test images are timed, and
counted 100 times and once. Ours is timed whole: features of K crops of each image and of the test
images, 100 epochs of the linear layer. With --accuracy it tells instead what K does to the test
accuracy. The last row there, as many crops as epochs, is the plain protocol, but that the crops are
ours, whose distribution is torchvision's, and the features of the precision that `auto` takes.
With --dkobak it gives the accuracies by the rules of dkobak/simclr-cifar10, to be set beside
theirs; these have new crops in each epoch, so --views 100 --epochs 100, where K here are cached.
"""

import copy
import time
from dataclasses import replace
from statistics import mean, median, stdev

import torch
import torch.nn.functional as F
from harness import alternate, config, describe_machine, finish, folder, parser, subset
from PIL import Image
from plain import TwoViews
from torch import nn
from torch.utils.data import DataLoader
from torchvision import transforms

from config import Config
from evaluation.classifiers import fit_linear
from evaluation.features import accuracy, crop_features
from evaluation.protocols import make_task, run_protocol, sgd_settings
from images.datasets import Split, load_split, resize
from models import SimCLR
from system.checkpoint import load_encoder
from system.device import select_device

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


def accuracy_by_views(
    cfg: Config, enc: nn.Module, train: Split, test: Split, *, numbers: list[int], seeds: int
) -> dict[str, float]:
    """Test accuracy for each K, mean over seeds that change crops, order and initial weights."""
    start = time.perf_counter()
    task = make_task(cfg, "checkpoint", enc, train, test.images)
    views = crop_features(enc, train.images, cfg, cfg.finetune_epochs)
    others = 1 + len(test.labels) / len(train.labels)  # passes: the images themselves, the test set
    seconds = (time.perf_counter() - start) / (len(views) + others)
    index = torch.arange(len(train.labels), device=train.labels.device)
    means = {}
    for k in (*numbers, len(views)):
        found = []
        for seed in range(seeds):
            run = replace(task, cfg=replace(cfg, seed=seed))
            settings = sgd_settings(cfg, [0.1])  # one: nothing is chosen here
            [layer] = fit_linear(run, views.roll(-seed * k, 0)[:k], index, settings)
            found.append(accuracy(layer(task.test_h), test.labels))
        means[f"accuracy_{k}_views"] = mean(found)
        spread = stdev(found) if len(found) > 1 else 0.0
        print(f"K = {k:3}: {mean(found):.2%} ± {spread:.2%} (n = {len(found)}), "
              f"features in {(k + others) * seconds:.0f} s")  # fmt: skip
    return means


def fit_adam(
    views: torch.Tensor, labels: torch.Tensor, *, rate: float, decay: float, epochs: int, batch: int
) -> nn.Linear:
    """A linear layer trained by Adam on features (K, M, D), the cosine to 0 by epoch."""
    layer = nn.Linear(views.shape[-1], int(labels.max()) + 1).to(views.device)
    optimizer = torch.optim.Adam(layer.parameters(), lr=rate, weight_decay=decay)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    for epoch in range(epochs):
        for index in torch.randperm(len(labels), device=labels.device).split(batch):
            loss = F.cross_entropy(layer(views[epoch % len(views), index].float()), labels[index])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        cosine.step()
    return layer


def dkobak_rules(
    cfg: Config, enc: nn.Module, train: Split, test: Split, views: int
) -> dict[str, float]:
    """Test accuracy of a linear layer as dkobak/simclr-cifar10 trains it, on clean images and on
    crops from 20 % of the area (its script of 2025-07-29)."""
    torch.manual_seed(cfg.seed)
    task = make_task(cfg, "checkpoint", enc, train, test.images)
    clean = fit_adam(task.h[None], train.labels, rate=0.01, decay=5e-6, epochs=500, batch=1000)
    with torch.no_grad():
        crops = crop_features(enc, train.images, replace(cfg, crop_scale=[0.2, 1.0]), views)
    on_crops = fit_adam(crops, train.labels, rate=0.1, decay=0.0, epochs=100, batch=512)
    return {
        f"dkobak_{name}": 100 * accuracy(layer(task.test_h.float()).detach(), test.labels)
        for name, layer in (("clean", clean), (f"{views}_crops", on_crops))
    }


def main() -> None:
    """Time both, or with --accuracy a table over K; the last line is one JSON object."""
    args = parser(__doc__)
    args.add_argument("--checkpoint", help="of simclr.py; none: an untrained ResNet-18")
    args.add_argument("--data", help="folder with train/<class>/* and test/<class>/*")
    args.add_argument("--images", type=int, default=500, help="training images of each class")
    args.add_argument("--epochs", type=int, default=100)
    args.add_argument("--batch", type=int, default=128)
    args.add_argument("--repeats", type=int, default=3)
    args.add_argument("--views", type=int, nargs="+", default=[5, 1, 2, 10], help="K, or the first")
    args.add_argument("--seeds", type=int, default=3, help="of --accuracy")
    args.add_argument("--accuracy", action="store_true")
    args.add_argument("--dkobak", action="store_true")
    args = args.parse_args()
    device, views = select_device("auto"), min(args.views[0], args.epochs)
    sizes = f"batch_size={args.batch}", f"finetune_epochs={args.epochs}", f"finetune_views={views}"
    cfg = config(*(folder(args.data) if args.data else []), *sizes, "seed=0")
    if args.data:
        train, test = subset(load_split(cfg, "train"), args.images), load_split(cfg, "test")
    else:
        train, test = random_split(min(256, 10 * args.images), 0), random_split(64, 1)
    enc = load_encoder(args.checkpoint)[0] if args.checkpoint else SimCLR().enc
    plain_enc = copy.deepcopy(enc).to(device).eval()
    enc = enc.to(device, memory_format=torch.channels_last)
    ours = train.to(device), test.to(device)
    if args.dkobak:
        finish(dkobak_rules(cfg, enc, train=ours[0], test=ours[1], views=views))
        return
    if args.accuracy:
        table = {"numbers": args.views, "seeds": args.seeds}
        finish(accuracy_by_views(cfg, enc, train=ours[0], test=ours[1], **table))
        return
    crop = transforms.RandomResizedCrop(SIZE), transforms.RandomHorizontalFlip()
    crops = OneView(train, transforms.Compose([*crop, transforms.ToTensor()]))
    loader = DataLoader(crops, args.batch, shuffle=True, num_workers=2, persistent_workers=True)

    def evaluate() -> None:
        task = make_task(cfg, "checkpoint", enc, ours[0], ours[1].images)
        for protocol in ("knn", "weighted_knn", "linear"):
            run_protocol(protocol, task)

    seconds = alternate(
        {
            "plain, one epoch": lambda: plain_epoch(plain_enc, loader, device),
            "plain, the test images": lambda: plain_features(plain_enc, ours[1].images),
            "ours, all of it": evaluate,
        },
        args.repeats,
    )
    describe_machine()
    for name, times in seconds.items():
        print(f"{name:24} {median(times):8.2f} s ({min(times):.2f} to {max(times):.2f})")
    epoch, last, all_of_ours = (median(times) for times in seconds.values())
    plain = args.epochs * epoch + last
    print(f"plain, {args.epochs} epochs: {plain:.0f} s; ours with K = {views}: {all_of_ours:.1f} s")
    finish({"linear_eval_vs_every_epoch": plain / all_of_ours})


if __name__ == "__main__":
    main()
