"""Views a second of the whole training step, against the plain pipeline, and where its time goes.

    python benchmarks/step.py                          # under a minute
    python benchmarks/step.py --batch 256 --compile    # the numbers of docs/speed.md, six minutes
    python benchmarks/step.py --backbone resnet50 --batch 512 --compile --no-plain  # on a GPU

Two views of each image: augmentation, forward, loss, backward, optimizer. The plain pipeline
(plain.py) is timed over epochs of a few batches, its loader processes at work beside the step.
The table under it is of one eager step of ours: its parts timed one by one, and torch's profiler.
On a GPU all steps here are eager or compiled; benchmarks/gpu.py times the CUDA graphs of a run.
"""

import time
from collections.abc import Callable
from functools import partial
from itertools import count
from statistics import median

import torch
from harness import alternate, config, finish, parser, ratio, report, synchronize
from plain import Plain, plain_loader, plain_transform
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from config import Config
from images.augment import draw, random_views
from models import SimCLR, nt_xent
from simclr import make_learner, train_step
from system.device import select_device, to_device
from training.optim import set_learning_rate

BATCHES = 16 if torch.cuda.is_available() else 2  # of the plain pipeline, an epoch
PLAIN = "plain pipeline"
IMAGES = 50_000  # of CIFAR-10, for the seconds an epoch would take
CONVOLUTION_OR_NORM = (  # parts of the names of operations, and of cuDNN's kernels on a GPU
    "conv", "fprop", "dgrad", "wgrad", "implicit", "batch_norm", "batchnorm", "bn_",
)  # fmt: skip


def our_step(cfg: Config, images: Tensor) -> Callable[[], object]:
    """One step of simclr.py on these images, with new views each time."""
    learner, steps, device = make_learner(cfg, images.device), count(), images.device
    set_learning_rate(learner.optimizer, 0.01)

    def step() -> None:
        noise = to_device(draw(2 * len(images), cfg.seed, next(steps)), device)
        train_step(cfg, learner, images, noise, images.shape[-1])

    return step


def parts(cfg: Config, images: Tensor) -> dict[str, list[float]]:
    """Seconds of what is not the model: augmentation, loss, optimizer, the log's additions."""
    device, n, size = images.device, len(images), images.shape[-1]
    learner, steps = make_learner(cfg, device), count()
    for weight in learner.model.parameters():
        weight.grad = torch.zeros_like(weight)
    z = torch.randn(2, n, 128, device=device, requires_grad=True)
    totals = torch.zeros(2, device=device)

    def augment() -> None:
        noise = to_device(draw(2 * n, cfg.seed, next(steps)), device)
        random_views(images.repeat(2, 1, 1, 1), noise, size, cfg)

    functions = {
        "augmentation": augment,
        "loss and its gradient": lambda: nt_xent(z, 0.5)[0].backward(),
        "optimizer": learner.optimizer.step,
        "logging": lambda: torch.stack([totals[0], totals[1]]),
    }
    return alternate(functions, 7)


def profiled(step: Callable[[], object]) -> dict[str, float]:
    """What torch's profiler sees of a step; on a GPU also the share of time in which it waits."""
    step()
    cuda = torch.cuda.is_available()
    steps = 10 if cuda else 1  # a queue that has filled up
    activities = [ProfilerActivity.CUDA if cuda else ProfilerActivity.CPU]
    with profile(activities=activities, acc_events=True) as profiler:
        synchronize()
        start = time.perf_counter()
        for _ in range(steps):
            step()
        synchronize()
        wall = time.perf_counter() - start
    times = {
        event.key: event.self_device_time_total if cuda else event.self_cpu_time_total
        for event in profiler.key_averages()
    }
    total = sum(times.values())
    model = sum(t for key, t in times.items() if any(k in key.lower() for k in CONVOLUTION_OR_NORM))
    for key, t in sorted(times.items(), key=lambda item: -item[1])[:8]:
        print(f"    {t / total:6.1%}  {key}")
    result = {"share_of_all_but_convolution_and_batch_norm": 1 - model / total}
    if cuda:
        result["share_gpu_waits"] = 1 - total / 1e6 / wall
    return result


def main() -> None:
    """Time all of them in turn; the last line is one JSON object."""
    args = parser(__doc__)
    args.add_argument("--backbone", default="resnet18")
    args.add_argument("--batch", type=int, default=64, help="images, of two views each")
    args.add_argument("--repeats", type=int, default=3)
    args.add_argument("--compile", action="store_true", help="a row more, after compiling")
    args.add_argument("--activation-checkpointing", action="store_true", help="a row more")
    args.add_argument("--no-plain", action="store_true", help="where it needs too much memory")
    args = args.parse_args()
    size = f"backbone={args.backbone}", f"batch_size={args.batch}"

    def ours(*overrides: str) -> Callable[[], object]:
        return our_step(config(*size, "compile=false", *overrides), images)

    cfg = config(*size, "compile=false")
    cpu_images = torch.randint(0, 256, (args.batch, 3, 32, 32), dtype=torch.uint8)
    images = cpu_images.to(select_device("auto"))
    step = ours()
    functions = {}
    if not args.no_plain:
        epoch, transform = cpu_images.repeat(BATCHES, 1, 1, 1), plain_transform(cfg, 32)
        plain = Plain(SimCLR(args.backbone), cfg)
        functions[PLAIN] = partial(plain.epoch, plain_loader(epoch, args.batch, transform))
        functions["ours, float32"] = ours("precision=fp32")
    functions["ours"] = step
    if args.activation_checkpointing:
        functions["ours, recomputed"] = ours("activation_checkpointing=true")
    if args.compile:
        functions["ours, compiled"] = ours("compile=true")
    seconds = alternate(functions, args.repeats)
    if PLAIN in seconds:
        seconds[PLAIN] = [value / BATCHES for value in seconds[PLAIN]]
    print(f"{args.backbone}, batch {args.batch}, ours in {cfg.precision}")
    report(seconds, 2 * args.batch)
    for name, times in seconds.items():
        epoch = median(times) * (IMAGES // args.batch)
        print(f"{name}: {epoch:,.0f} s an epoch of {IMAGES:,} images")
    print("of one eager step of ours:")
    whole, shares = median(seconds["ours"]), {}
    for name, times in parts(cfg, images).items():
        shares[name] = median(times) / whole
        print(f"    {shares[name]:6.2%}  {name}")
    print("by operation:")
    result = {
        **profiled(step),
        "share_of_augmentation_loss_optimizer_logging": sum(shares.values()),
    }
    result["step_eager_vs_plain"] = ratio(seconds, PLAIN, "ours")
    result["step_float32_vs_plain"] = ratio(seconds, PLAIN, "ours, float32")
    result["step_compiled_vs_plain"] = ratio(seconds, PLAIN, "ours, compiled")
    result["step_recomputed_vs_not"] = ratio(seconds, "ours, recomputed", "ours")
    finish(result)


if __name__ == "__main__":
    main()
