"""Device, precision and torch.compile."""

import logging
import os
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch._dynamo.exc import TorchDynamoException
from torch._functorch import config as functorch

from config import ConfigError

log = logging.getLogger("simclr")

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def select_device(name: str) -> torch.device:
    """The device called `name`; `auto`, the first of cuda, mps, cpu that works, warns of a GPU that
    torch cannot use. Raises ConfigError for a device that this machine does not have."""
    problem = find_cuda_problem() if name in ("auto", "cuda") else None
    names = ["cuda"] if problem is None and torch.cuda.is_available() else []
    names += ["mps", "cpu"] if torch.backends.mps.is_available() else ["cpu"]
    if name not in ("auto", *names):
        allowed = f"one that this machine has, {', '.join(names)}, or auto"
        raise ConfigError(f"device={name}: must be {allowed} ({problem or 'no such device'})")
    if name == "auto" and problem and "LOCAL_RANK" in os.environ:  # the ranks must not differ
        raise ConfigError(f"device=auto: {problem}")
    if name == "auto" and problem:
        log.warning(f"warning: runs on {names[0]}, since torch cannot use the GPU: {problem}")
    torch.backends.cudnn.benchmark = True  # autotunes once per shape; shapes are static
    torch.set_float32_matmul_precision("highest")  # for the loss; an environment may ask for TF32
    return torch.device(names[0] if name == "auto" else name)


def find_cuda_problem() -> str | None:
    """Why torch cannot compute on the GPU of this machine; None if it can, or there is none."""
    problem = None
    with warnings.catch_warnings(record=True) as caught:  # of a driver that is too old
        warnings.simplefilter("always")
        available = torch.cuda.is_available()
    if available:
        gpu, index = "the GPU", int(os.environ.get("LOCAL_RANK") or 0)
        try:
            gpu = torch.cuda.get_device_name(index)
            (torch.zeros(1, device=f"cuda:{index}") + 1).item()  # the first kernel
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, AssertionError) as error:
            problem = f"{gpu}: {str(error).splitlines()[0]}"
    elif caught:
        problem = " ".join(str(caught[0].message).split())[:300]
    elif os.path.exists("/proc/driver/nvidia/version") and torch.version.cuda is None:
        problem = f"this torch, {torch.__version__}, is built without CUDA"
    remedy = "install the torch build that fits GPU and driver (pytorch.org), or take device=cpu"
    return problem and f"{problem}; {remedy}"


def select_precision(name: str, device: torch.device) -> str:
    """A name of PRECISIONS. `auto`: bf16 if in hardware; fp16, with loss scaling, on older GPUs."""
    if name != "auto":
        return name
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    if device.type == "cpu":  # without these torch takes bfloat16 too, but slower than float32
        capabilities = getattr(torch.cpu, "get_capabilities", dict)()  # torch 2.13 and newer
        if capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"):
            return "bf16"
    return "fp32"


def autocast(device: torch.device, precision: str) -> AbstractContextManager:
    """Mixed precision: convolutions and matrix products in `precision`, with float32 weights."""
    dtype = PRECISIONS[precision]
    return nullcontext() if precision == "fp32" else torch.autocast(device.type, dtype)


def to_device(x: Tensor, device: torch.device) -> Tensor:
    """Copy a tensor from host memory; for a GPU from pinned memory, so that nothing waits."""
    if device.type != "cuda":
        return x.to(device)
    return x.pin_memory().to(device, non_blocking=True)


def compile_static(f: Callable[..., Any], choice: bool | str) -> Callable[..., Any]:
    """`f` compiled for static shapes when first called, with its backward pass. Where that fails,
    `f` itself runs after a warning if `choice` is "auto"; True raises ConfigError."""
    torch.compiler.reset()  # of earlier jobs of a sweep: after eight forms torch stops compiling
    torch.compiler.set_stance("default")
    functorch.force_non_lazy_backward_lowering = True
    compiled = torch.compile(f, dynamic=False)

    def call(*args: Any, **kwargs: Any) -> Any:
        try:
            return compiled(*args, **kwargs)
        except TorchDynamoException as error:
            text = str(error).split("Set TORCHDYNAMO_VERBOSE")[0].split("Output:\n")[-1]
            reason = f"{type(error).__name__}: {' '.join(text.split())[:200]}"
        if choice is True:
            raise ConfigError(f"compile=true: must be false or auto on this machine ({reason})")
        log.warning(f"warning: compile=auto does not compile on this machine ({reason})")
        torch.compiler.set_stance("force_eager")  # this function, and others
        return f(*args, **kwargs)

    return call
