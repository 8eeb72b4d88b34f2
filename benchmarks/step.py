"""Views a second of the whole training step, against the plain pipeline, and where its time goes.

    python benchmarks/step.py                          # under a minute
    python benchmarks/step.py --batch 256 --compile    # the numbers of docs/speed.md, six minutes
    python benchmarks/step.py --backbone resnet50 --batch 512 --compile --no-plain  # on a GPU

Two views of each image: augmentation, forward, loss, backward, optimizer. The plain pipeline
(plain.py) is timed over epochs of a few batches, its loader processes at work beside the step.
The table under it is of one eager step of ours: its parts timed one by one, and torch's profiler.
On a GPU all steps here are eager or compiled; benchmarks/gpu.py times the CUDA graphs of a run.
"""

import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

sys.path.insert(0, str(Path(__file__).parent.parent))

from harness import alternate, finish, parser, report, synchronize
from plain import plain_loader, plain_step, plain_transform

from images.augment import draw, random_views
from models import SimCLR, nt_xent
from simclr import train_step
from system.device import select_device, select_precision
from training.optim import make_optimizer, set_learning_rate

CROP_SCALE, STRENGTH, GRAY = (0.08, 1.0), 0.5, 0.2
BATCHES = 16 if torch.cuda.is_available() else 2  # of the plain pipeline, an epoch
PLAIN = "plain pipeline"
IMAGES = 50_000  # of CIFAR-10, for the seconds an epoch would take
CONVOLUTION_OR_NORM = (  # parts of the names of operations, and of cuDNN's kernels on a GPU
    "conv", "fprop", "dgrad", "wgrad", "implicit", "batch_norm", "batchnorm", "bn_",
)  # fmt: skip


def make_views(images: Tensor, rng: torch.Generator, views: Callable[..., Tensor]) -> Tensor:
    """Two views of each image with the default settings."""
    u = draw(2 * len(images), rng)
    size = images.shape[-1]
    return views(images.repeat(2, 1, 1, 1), u, size, CROP_SCALE, 0.5, STRENGTH, GRAY)


def our_step(
    backbone: str,
    images: Tensor,
    dtype: torch.dtype,
    compiled: bool = False,
    activation_checkpointing: bool = False,
) -> Callable[[], object]:
    """One step of simclr.py on these images."""
    device = images.device
    torch.backends.cudnn.benchmark = True
    model = SimCLR(backbone, activation_checkpointing=activation_checkpointing)
    model = model.to(device, memory_format=torch.channels_last).train()
    optimizer = make_optimizer("sgd", model.parameters(), momentum=0.9, weight_decay=1e-6)
    set_learning_rate(optimizer, 0.01)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    rng = torch.Generator(device).manual_seed(0)
    views = random_views
    if compiled:
        model.compile(dynamic=False)
        views = torch.compile(random_views, dynamic=False)

    def step() -> None:
        batch = make_views(images, rng, views)
        train_step(model, optimizer, scaler, batch, 0.5, dtype)

    return step


def plain_epoch(backbone: str, images: Tensor, batch_size: int) -> Callable[[], object]:
    """An epoch of the plain pipeline."""
    device = select_device("auto")
    model = SimCLR(backbone).to(device).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, nesterov=True)
    transform = plain_transform(images.shape[-1], CROP_SCALE, STRENGTH, GRAY)
    loader = plain_loader(images, batch_size, transform)

    def epoch() -> None:
        for pair in loader:
            plain_step(model, optimizer, torch.cat(pair).to(device), 0.5)

    return epoch


def parts(backbone: str, images: Tensor) -> dict[str, list[float]]:
    """Seconds of what is not the model: augmentation, loss, optimizer, the log's additions."""
    device = images.device
    rng = torch.Generator(device).manual_seed(0)
    model = SimCLR(backbone).to(device)
    optimizer = make_optimizer("sgd", model.parameters(), momentum=0.9, weight_decay=1e-6)
    for weight in model.parameters():
        weight.grad = torch.zeros_like(weight)
    z = torch.randn(2, len(images), 128, device=device, requires_grad=True)
    totals = torch.zeros(2, device=device)
    functions = {
        "augmentation": lambda: make_views(images, rng, random_views),
        "loss and its gradient": lambda: nt_xent(*z, 0.5)[0].backward(),
        "optimizer": optimizer.step,
        "logging": lambda: totals.add_(torch.stack([totals[0], totals[1]])),
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


def peak_memory(step: Callable[[], object]) -> float:
    """GiB of GPU memory at the peak of a step, with nothing else on the GPU yet."""
    for _ in range(2):  # in the first the optimizer has no momentum yet
        torch.cuda.reset_peak_memory_stats()
        step()
    return torch.cuda.max_memory_allocated() / 2**30


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
    device = select_device("auto")
    dtype = select_precision("auto", device)
    cpu_images = torch.randint(0, 256, (args.batch, 3, 32, 32), dtype=torch.uint8)
    images = cpu_images.to(device)
    result = {}
    step = our_step(args.backbone, images, dtype)
    if torch.cuda.is_available():
        result["peak_gib"] = peak_memory(step)
    functions = {}
    if not args.no_plain:
        epoch_images = cpu_images.repeat(BATCHES, 1, 1, 1)
        functions[PLAIN] = plain_epoch(args.backbone, epoch_images, args.batch)
        functions["ours, float32"] = our_step(args.backbone, images, torch.float32)
    functions["ours"] = step
    if args.activation_checkpointing:
        functions["ours, recomputed"] = our_step(
            args.backbone, images, dtype, activation_checkpointing=True
        )
    if args.compile:
        functions["ours, compiled"] = our_step(args.backbone, images, dtype, compiled=True)
    seconds = alternate(functions, args.repeats)
    if PLAIN in seconds:
        seconds[PLAIN] = [value / BATCHES for value in seconds[PLAIN]]
    print(f"{args.backbone}, batch {args.batch}, ours in {str(dtype).removeprefix('torch.')}")
    report(seconds, 2 * args.batch)
    middle = {name: median(times) for name, times in seconds.items()}
    for name, value in middle.items():
        print(f"{name}: {value * (IMAGES // args.batch):,.0f} s an epoch of {IMAGES:,} images")

    share = 0.0
    print("of one eager step of ours:")
    for name, times in parts(args.backbone, images).items():
        share += median(times) / middle["ours"]
        print(f"    {median(times) / middle['ours']:6.2%}  {name}")
    print("by operation:")
    result |= profiled(step)
    result["share_of_augmentation_loss_optimizer_logging"] = share

    def ratio(reference: str, name: str) -> float | None:
        rows = [middle.get(row) for row in (reference, name)]
        return rows[0] / rows[1] if all(rows) else None

    result["step_eager_vs_plain"] = ratio(PLAIN, "ours")
    result["step_float32_vs_plain"] = ratio(PLAIN, "ours, float32")
    result["step_compiled_vs_plain"] = ratio(PLAIN, "ours, compiled")
    result["step_recomputed_vs_not"] = ratio("ours, recomputed", "ours")
    finish(result)


if __name__ == "__main__":
    main()
