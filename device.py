"""What the machine can do: the device, its number format, and whether compiling pays."""

import importlib.util
import math
import os
import shlex
import shutil
import sys
import sysconfig
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import torch
from torch import Tensor

from errors import ConfigError, UserError

DEVICES = ("auto", "cuda", "mps", "cpu")
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

# Views of 32×32 from which on a run earns the compile time back. On two CPU cores ResNet-18 takes
# 55 s to compile and is 9 % faster after that: break-even is at 120,000 views, and from 200,000 on
# it pays (benchmarks/step.py --compile). On a GPU this is an estimate: 200 epochs of CIFAR-10.
COMPILE_PAYS = {"cpu": 200_000, "cuda": 20_000_000}


def select_device(name: str) -> torch.device:
    """The device called `name`; `auto` is the first there is of cuda, mps, cpu.

    Raises ConfigError for one that this machine does not have.
    """
    found = [
        torch.cuda.is_available() and "cuda",
        torch.backends.mps.is_available() and "mps",
        "cpu",
    ]
    found = [device for device in found if device]
    if name not in ("auto", *found):
        raise ConfigError(
            f"device={name!r}: must be one that this machine has, {', '.join(found)}, "
            "or auto, which takes the first of them"
        )
    return torch.device(found[0] if name == "auto" else name)


def select_precision(name: str, device: torch.device) -> torch.dtype:
    """What convolutions and matrix products compute in: a name of PRECISIONS, or `auto`.

    `auto` is bfloat16 where the device multiplies it in hardware, which needs no care since its
    range is that of float32; float16 on an older GPU, whose small range needs a gradient scaler;
    float32 elsewhere.
    """
    if name != "auto":
        return PRECISIONS[name]
    if device.type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
        return torch.bfloat16 if native else torch.float16
    if device.type == "cpu":  # without these torch takes bfloat16 too, but slower than float32
        found = getattr(torch.cpu, "get_capabilities", dict)()  # torch before 2.13 can't tell
        if found.get("avx512_bf16") or found.get("amx_bf16"):
            return torch.bfloat16
    return torch.float32


def tune_convolutions() -> None:
    """Let cuDNN try its algorithms once for each shape; ours are static."""
    torch.backends.cudnn.benchmark = True


def precision_name(dtype: torch.dtype) -> str:
    """The name of a format in PRECISIONS."""
    return next(name for name, found in PRECISIONS.items() if found == dtype)


def select_compile(
    choice: bool | str, device: torch.device, views: float, obstacle: str | None
) -> bool:
    """Whether to use torch.compile in a run of so many views of 32×32: true, false, or `auto`.

    obstacle: of `compile_obstacle`. Each size of the views is compiled for itself, so that the
    rarest one decides. `auto` compiles where it is possible and the run is long enough to earn the
    time back, see COMPILE_PAYS.
    """
    if choice != "auto":
        return bool(choice)
    long_enough = views >= COMPILE_PAYS.get(device.type, math.inf)
    return long_enough and obstacle is None


def compile_obstacle(device: torch.device, recompute: bool, processes: int = 1) -> str | None:
    """Why torch.compile is not possible on this device, with recomputation or in processes."""
    if recompute:
        return (
            "with activation_checkpointing=true or micro_batch_size, whose batch-norm bookkeeping "
            "torch.compile does not trace"
        )
    if processes > 1:
        return f"in {processes} processes, for which it has not been tried"
    missing = _missing_for_compile(device)
    return missing and f"without {missing}"


def _missing_for_compile(device: torch.device) -> str | None:
    """What torch.compile needs on this device and does not find, in words; None: nothing."""
    if device.type == "cuda":
        if torch.cuda.get_device_capability(device) < (7, 0):
            return "a GPU of compute capability 7.0 (Volta) or newer"
        if importlib.util.find_spec("triton") is None:
            return "the package triton"
    compiler = os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++")
    if not shutil.which(shlex.split(compiler)[0]):
        return f"the C++ compiler {compiler}"
    header = Path(sysconfig.get_path("include"), "Python.h")
    return None if header.exists() else f"Python's headers ({header})"


def autocast(device: torch.device, dtype: torch.dtype) -> AbstractContextManager:
    """Convolutions and matrix products in `dtype`, the weights stay float32 (mixed precision)."""
    return nullcontext() if dtype == torch.float32 else torch.autocast(device.type, dtype)


def read_late(steps: Iterator[dict[str, Tensor]]) -> Iterator[dict[str, float]]:
    """The scalars that each step returns, as numbers, read once the next step has been started.

    The CPU is then one step ahead of the GPU, which so never waits for it, and yet what goes wrong
    in a step is known one step later.
    """
    waiting = None
    for found in steps:
        copied = _start_copy(found)
        if waiting is not None:
            yield waiting()
        waiting = copied
    if waiting is not None:
        yield waiting()


def _start_copy(found: dict[str, Tensor]) -> Callable[[], dict[str, float]]:
    """Copy scalars to the CPU without waiting for them; what is returned waits."""
    values = torch.stack(list(found.values()))
    done = torch.cuda.Event() if values.is_cuda else None
    copy = values.to("cpu", non_blocking=values.is_cuda)
    if done is not None:
        done.record()

    def read() -> dict[str, float]:
        if done is not None:
            done.synchronize()
        return dict(zip(found, copy.tolist(), strict=True))

    return read


def out_of_memory(
    step: Callable[[int], object] | None,
    device: torch.device,
    held: int,
    activation_checkpointing: bool,
) -> UserError:
    """What to do where a GPU is too small for `held` images at once.

    step(n) makes a training step with n images, for an estimate of what would fit.
    """
    ways = [] if activation_checkpointing else ["activation_checkpointing=true"]
    fits = largest_batch(step, device, held) if step is not None else 0
    number = f"{fits}, which would fit by estimate"
    if fits < 2:
        number = f"below {held}" if step is None else f"far below {held}"
    ways.append(f"resume=false and a batch_size or micro_batch_size of {number}")
    name = torch.cuda.get_device_name(device)
    return UserError(f"out of memory on {name}, {held} images at once: {', or '.join(ways)}")


def largest_batch(step: Callable[[int], object], device: torch.device, too_large: int) -> int:
    """An estimate of how many images fit into a GPU's memory, from two small steps; 0: unknown.

    Memory grows with the images in a straight line, but for the loss, whose 32·n² bytes matter
    from some thousand on. A tenth is left for fragmentation.
    """
    sizes, peaks = [max(1, too_large // 8), max(2, too_large // 4)], []
    try:
        for n in sizes:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(device)
            with torch.compiler.set_stance("force_eager"):  # nothing is compiled for these sizes
                step(n)
            peaks.append(torch.cuda.max_memory_allocated(device))
    except torch.OutOfMemoryError:
        return 0
    each = (peaks[1] - peaks[0]) / (sizes[1] - sizes[0])
    if each <= 0:  # something else than the images decided
        return 0
    torch.cuda.empty_cache()
    free, _ = torch.cuda.mem_get_info(device)
    room = 0.9 * (free + torch.cuda.memory_reserved(device)) - peaks[1]
    return min(too_large - 1, max(0, sizes[1] + int(room / each)))
