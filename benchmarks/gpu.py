"""Steps of simclr.py on a GPU: eager, as a CUDA graph, compiled; and of the plain pipeline.

    python benchmarks/gpu.py                        # docs/speed.md, two minutes on an H100
    python benchmarks/gpu.py --batch 16 --images 32 --sizes 8 --steps 2 --workers 1    # on a CPU

Milliseconds a step, seconds until the first ten steps are done, and peak memory, one line of JSON
each. First of all: whether 28 steps with a graph are bit for bit 28 steps without.
"""

import json
import sys
import time
from contextlib import suppress
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent.parent))

from harness import EpochEnd, NoRecord, config, describe_machine, parser, synchronize
from plain import plain_loader, plain_step, plain_transform

import simclr
from models import SimCLR
from system.device import select_device
from training.state import Training

FIRST = 10  # steps in which cuDNN chooses, the graph is recorded, or torch compiles


class Record(NoRecord):
    """Keeps copies of the metrics, since a graph overwrites them, and the time of some steps."""

    def __init__(self, steps: int) -> None:
        super().__init__()
        self.steps, self.times = steps, {}

    def log_step(self, training: Training, metrics: dict[str, Tensor], rate: float) -> None:
        """Ends simclr.train after the last step."""
        self.step_metrics.append(torch.stack(list(metrics.values())))
        if (done := len(self.step_metrics)) in (FIRST, self.steps):
            synchronize()
            self.times[done] = time.perf_counter()
        if done == self.steps:
            raise EpochEnd

    def end_epoch(self, training: Training, *line: object) -> None:
        """Go on with the next epoch."""
        training.end_epoch({})


def run(
    images: Tensor, steps: int, graphed: bool, *overrides: str
) -> tuple[Tensor, dict[str, Tensor], dict[str, float]]:
    """The metrics of each step, the weights at the end, and times and memory."""
    cfg = config("recipe=simsiam", "epochs=100", "compile=false", "min_learning_rate=0", *overrides)
    cuda = images.device.type == "cuda"
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    training = simclr.start_training(cfg, images.device, steps)
    training.graphed = graphed and cuda
    record = Record(steps)
    with suppress(EpochEnd):
        simclr.train(cfg, training, images, None, record)
    after = record.times.get(FIRST, start)
    costs = {
        "ms": 1e3 * (record.times[steps] - after) / max(1, steps - FIRST),
        "first_seconds": after - start,
        "peak_gib": torch.cuda.max_memory_allocated() / 2**30 if cuda else 0.0,
    }
    return torch.stack(record.step_metrics).cpu(), training.model.state_dict(), costs


def plain(images: Tensor, batch: int, workers: int) -> float:
    """Milliseconds of a step of the plain pipeline with loader processes, in its second epoch."""
    model = SimCLR("resnet18").to(images.device).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, nesterov=True)
    transform = plain_transform(images.shape[-1], (0.2, 1.0), 0.5, 0.1)
    loader = plain_loader(images.cpu(), batch, transform, workers=workers)
    for _ in range(2):
        start = time.perf_counter()
        for pair in loader:
            plain_step(model, optimizer, torch.cat(pair).to(images.device), 0.5)
        synchronize()
    return 1e3 * (time.perf_counter() - start) / len(loader)


def say(what: str, **values: object) -> None:
    """One line of JSON."""
    rounded = {k: round(v, 3) if isinstance(v, float) else v for k, v in values.items()}
    print(json.dumps({"what": what, **rounded}), flush=True)


def main() -> None:
    """In an order in which each line is worth having if the next ones are cut off."""
    args = parser(__doc__)
    args.add_argument("--batch", type=int, default=512)
    args.add_argument("--images", type=int, default=5120)
    args.add_argument("--sizes", type=int, nargs="+", default=[32, 24, 16])
    args.add_argument("--steps", type=int, default=60)
    args.add_argument("--workers", type=int, nargs="+", default=[16, 2])
    args = args.parse_args()
    describe_machine()
    rng = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (args.images, 3, 32, 32), dtype=torch.uint8, generator=rng)
    images, batch = images.to(select_device("auto")), f"batch_size={args.batch}"
    sizes = f"view_sizes=[[{args.sizes[-1]},0.4],[{args.sizes[0]},0.6]]"
    steps = min(28, args.steps)
    (a, weights, _), (b, others, _) = (run(images, steps, g, batch, sizes) for g in (True, False))
    same = torch.equal(a, b) and all(torch.equal(w, others[name]) for name, w in weights.items())
    say("a graph is bit for bit the eager step", same=same)
    rows = [("resnet18", size, "false") for size in args.sizes]
    rows += [("resnet50", args.sizes[0], "false"), ("resnet18", args.sizes[0], "true")]
    for backbone, size, compiled in rows[: None if images.is_cuda else 1]:
        options = batch, f"backbone={backbone}", f"view_sizes=[[{size},1]]", f"compile={compiled}"
        for graphed in (True, False) if images.is_cuda else (False,):
            costs = run(images, args.steps, graphed, *options)[2]
            how = ("graph" if graphed else "eager") + ", compiled" * (compiled == "true")
            say(f"{backbone}, {size} pixels, {how}", **costs)
    for workers in args.workers:
        say(f"plain pipeline, {workers} workers", ms=plain(images, args.batch, workers))


if __name__ == "__main__":
    main()
