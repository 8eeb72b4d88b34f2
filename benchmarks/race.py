"""The race: from the command to 70 % kNN accuracy on CIFAR-10, ResNet-18, without a GPU.

    python benchmarks/race.py data/cifar10-png                         # IMAGES, as docs/race.md
    python benchmarks/race.py IMAGES --seed 0 --run recipe=simsiam epochs=8 log_interval=1

For each seed it starts simclr.py on all training images of IMAGES (train/<class>/*, and test for
the queries) and takes the time from the command to each checkpoint: imports, decoding and
compiling count too. Then kNN of the checkpoints, which does not count: k = 10, cosine, the bank is
all training images, the queries are all test images. The result is the first checkpoint from which
on none is below the target, null if one of the seeds has none.

Machines differ, so the time is also given in plain steps: over the median time of a step of the
plain pipeline (plain.py, batch 256), timed in this process before and after each run.
"""

import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from pathlib import Path
from statistics import median

import torch
from harness import config, describe_machine, finish_seeds, folder, knn, parser, synchronize
from plain import Plain, plain_loader, plain_transform

from config import Config
from images.datasets import Split, load_split
from models import SimCLR
from system.checkpoint import load_encoder
from system.device import select_device

SIMCLR = Path(__file__).resolve().parent.parent / "simclr.py"
RUN = ["recipe=fast", "epochs=1"]


def plain_steps(cfg: Config, train: Split, batch: int, repeats: int) -> list[float]:
    """Seconds of each of `repeats` steps of the plain pipeline, after one that does not count."""
    plain, transform = Plain(SimCLR("resnet18"), cfg), plain_transform(cfg, cfg.image_size)
    times = []
    for pair in plain_loader(train.images[: batch * (repeats + 1)].cpu(), batch, transform):
        plain.step(pair)
        synchronize()
        times.append(time.perf_counter())
    return [b - a for a, b in pairwise(times)]


def timed_run(overrides: list[str], run_dir: Path) -> list[tuple[float, Path]]:
    """Run simclr.py; seconds from the command to each checkpoint, and its path, in order."""
    every = ["knn_interval=0", f"hydra.run.dir={run_dir}"]
    start = time.time()
    subprocess.run([sys.executable, SIMCLR, *every, *overrides], check=True)
    return sorted((path.stat().st_mtime - start, path) for path in run_dir.glob("*_epoch*.pt"))


def score(path: Path, cfg: Config, train: Split, test: Split) -> float:
    """kNN accuracy in % of a checkpoint."""
    enc, _ = load_encoder(path)
    enc = enc.to(train.images.device, memory_format=torch.channels_last)
    return 100 * knn(enc, cfg, train, test)


def first_that_stays(
    checkpoints: list[tuple[float, Path]], accuracy: Callable[[Path], float], target: float
) -> tuple[float, float] | None:
    """Seconds and score of the first from which on none is below the target; None: the last is."""
    first = None
    for seconds, path in reversed(checkpoints):
        found = accuracy(path)
        print(f"{seconds:.0f} s, {path.name}: kNN {found:.2f}", flush=True)
        if found < target:
            break
        first = seconds, found
    return first


def main() -> None:
    """The runs, a line for each, and one JSON object as the last line."""
    args = parser(__doc__)
    args.add_argument("data", help="folder with train/<class>/* and test/<class>/*")
    args.add_argument("--target", type=float, default=70.0, help="kNN accuracy in %%")
    args.add_argument("--seed", type=int, nargs="+", default=[0, 1, 2])
    args.add_argument("--run", nargs="+", default=RUN, help=f"overrides (default: {RUN})")
    args.add_argument("--batch", type=int, default=256, help="of a plain step")
    args.add_argument("--repeats", type=int, default=3, help="plain steps before, and after")
    args = args.parse_args()
    describe_machine()
    overrides = folder(args.data, *args.run)
    cfg, device = config(*overrides), select_device("auto")
    judge = config(*folder(args.data), f"image_size={cfg.image_size}")  # in any run's precision
    train, test = (load_split(judge, part).to(device) for part in ("train", "test"))
    results: dict[str, list[float]] = {"seconds": [], "plain_steps": [], "knn": []}
    for seed in args.seed:
        with tempfile.TemporaryDirectory() as run_dir:
            steps = plain_steps(cfg, train, args.batch, args.repeats)
            checkpoints = timed_run([*overrides, f"seed={seed}"], Path(run_dir))
            steps += plain_steps(cfg, train, args.batch, args.repeats)
            accuracy = partial(score, cfg=judge, train=train, test=test)
            first = first_that_stays(checkpoints, accuracy, args.target)
        spread = f"{min(steps):.2f} to {max(steps):.2f} s"
        print(f"seed {seed}: plain step {median(steps):.2f} s ({spread}, n = {len(steps)})")
        if first is None:
            print(f"seed {seed} does not reach {args.target:.1f} %")
            continue
        seconds, found = first
        for name, value in zip(results, (seconds, seconds / median(steps), found), strict=True):
            results[name].append(value)
    finish_seeds(results, len(args.seed))


if __name__ == "__main__":
    main()
