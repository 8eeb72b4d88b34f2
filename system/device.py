"""Device, precision and torch.compile selection; device-to-host copies."""

import logging
import math
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._dynamo.exc import TorchDynamoException
from torch._functorch import config as functorch

from system.errors import ConfigError

log = logging.getLogger("simclr")

DEVICES = ("auto", "cuda", "mps", "cpu")
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

# Views of 32×32 from which on compiling pays for itself (docs/speed.md). ResNet-18 takes 55 s to
# compile on two CPU cores and is 9 % faster after that: break-even at 120,000 views; on an H100 it
# takes 39 s and a step of 1,024 views 12.8 ms instead of 18.9: break-even at 6.5 million.
COMPILE_PAYS = {"cpu": 200_000, "cuda": 7_000_000}


def select_device(name: str) -> torch.device:
    """The device called `name`; `auto` takes the first available of cuda, mps, cpu.

    Raises ConfigError for a device that this machine does not have.
    """
    there = torch.cuda.is_available(), torch.backends.mps.is_available(), True
    devices = [device for device, is_there in zip(DEVICES[1:], there, strict=True) if is_there]
    if name not in ("auto", *devices):
        raise ConfigError(
            f"device={name!r}: must be one that this machine has, {', '.join(devices)}, "
            "or auto, which takes the first of them"
        )
    torch.backends.cudnn.benchmark = True  # autotunes once per shape; shapes are static
    torch.set_float32_matmul_precision("highest")  # for the loss; an environment may ask for TF32
    return torch.device(devices[0] if name == "auto" else name)


def select_precision(name: str, device: torch.device) -> torch.dtype:
    """The dtype of convolutions and matrix products: a name of PRECISIONS, or `auto`.

    `auto` is bfloat16 if the hardware supports it, which needs no loss scaling; float16 on older
    GPUs, whose small range needs a gradient scaler; else float32.
    """
    if name != "auto":
        return PRECISIONS[name]
    if device.type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
        return torch.bfloat16 if native else torch.float16
    if device.type == "cpu":  # without these torch takes bfloat16 too, but slower than float32
        capabilities = getattr(torch.cpu, "get_capabilities", dict)()  # torch 2.13 and newer
        if capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"):
            return torch.bfloat16
    return torch.float32


def precision_name(dtype: torch.dtype) -> str:
    """The name of a dtype in PRECISIONS."""
    return next(name for name, precision in PRECISIONS.items() if precision == dtype)


def computes_in(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether `device` has a convolution in `dtype`, and its gradient."""
    x = torch.ones(2, 8, 8, 8, device=device, requires_grad=True)
    try:
        with autocast(device, dtype):
            y = F.conv2d(x, torch.ones(8, 8, 3, 3, device=device))
        y.sum().backward()
    except RuntimeError:
        return False
    return y.dtype == dtype  # without it, autocast may only warn


def select_compile(
    choice: bool | str, device: torch.device, views: float, supported: bool = True
) -> bool:
    """Whether to use torch.compile: `choice` is True, False or "auto".

    "auto" compiles where `views`, in views of 32×32, are enough to pay for it (COMPILE_PAYS), and
    `supported` is true: it is not with recomputed activations or several ranks. A trivial function
    is compiled first, since a compiler, Python's headers or triton may be missing, or fail: "auto"
    then warns, and True raises ConfigError.
    """
    pays = supported and views >= COMPILE_PAYS.get(device.type, math.inf)
    if choice is False or (choice == "auto" and not pays):
        return False
    torch.compiler.reset()  # of earlier runs: after eight forms torch goes on without compiling
    new = time.time()  # a constant that no cache of torch's holds, so that all parts do run
    try:
        torch.compile(lambda x: x.sin() + new)(torch.zeros(2, device=device))
    except Exception as error:
        return _not_compiled(choice, error)
    return True


def compile_static(f: Callable[..., Any], choice: bool | str) -> Callable[..., Any]:
    """`f` compiled, for static shapes; what `select_compile` tried may still fail with it.

    If `choice` is "auto" `f` itself runs from then on, after a warning: a failure to compile comes
    before anything has run, that of the backward pass too. True raises ConfigError.
    """
    functorch.force_non_lazy_backward_lowering = True
    run = torch.compile(f, dynamic=False)

    def call(*args: Any) -> Any:
        nonlocal run
        try:
            return run(*args)
        except TorchDynamoException as error:
            _not_compiled(choice, error)
        run = f
        return f(*args)

    return call


def _not_compiled(choice: bool | str, error: Exception) -> bool:
    """Warn for "auto", raise ConfigError for True, in one line of torch's many."""
    text = str(error).split("Set TORCHDYNAMO_VERBOSE")[0].split("Output:\n")[-1]
    reason = f"{type(error).__name__}: {' '.join(text.split())[:200]}"
    if choice is True:
        raise ConfigError(
            f"compile=true: must be false or auto on this machine ({reason})"
        ) from None
    log.warning(f"warning: compile=auto does not compile on this machine ({reason})")
    return False


def autocast(device: torch.device, dtype: torch.dtype) -> AbstractContextManager:
    """Convolutions and matrix products in `dtype`, with float32 weights (mixed precision)."""
    return nullcontext() if dtype == torch.float32 else torch.autocast(device.type, dtype)


def start_copy(scalars: dict[str, Tensor]) -> Callable[[], dict[str, float]]:
    """Start copying scalars to the CPU without waiting; the returned function waits and reads."""
    values = torch.stack(list(scalars.values()))
    done = torch.cuda.Event() if values.is_cuda else None
    copy = values.to("cpu", non_blocking=values.is_cuda)
    if done is not None:
        done.record()

    def read() -> dict[str, float]:
        if done is not None:
            done.synchronize()
        return dict(zip(scalars, copy.tolist(), strict=True))

    return read
