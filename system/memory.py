"""Free memory, refusal of what surely does not fit into it, and advice when it is used up."""

import math
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
from omegaconf import DictConfig

from models import SimCLR
from system.errors import ConfigError, UserError, out_of_memory

PROC, CGROUPS = Path("/proc"), Path("/sys/fs/cgroup")
PRETRAINING = (  # what helps when simclr.py runs out of memory
    "take activation_checkpointing=true; or a smaller batch_size, or a micro_batch_size that "
    "divides it, with resume=false"
)


def free_memory(device: torch.device) -> float:
    """Bytes that can still be allocated on a device; math.inf if the system does not say.

    Of a GPU that is what is free and what torch keeps for reuse; else what the machine has
    available, or less where a container or a batch system sets a limit (cgroups), and free swap.
    Outside Linux it is all memory of the machine, a bound from above too.
    """
    if device.type == "cuda":
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + kept
    info = _table(PROC / "meminfo")  # in kB
    sysconf = getattr(os, "sysconf", lambda name: math.inf)  # Windows has none
    free = sysconf("SC_PHYS_PAGES") * sysconf("SC_PAGE_SIZE")
    free = min(free, 1024 * info.get("MemAvailable", math.inf), *_left_in_cgroups())
    return free + 1024 * info.get("SwapFree", 0)


def _left_in_cgroups() -> Iterator[float]:
    """What is left within each limit, of the process's own cgroup and of all that it lies in.

    Cached files count as usage there, but are given up for an allocation: only anonymous memory is
    taken off. In a container the path may be the host's, of which only the root is visible.
    """
    for line in _lines(PROC / "self" / "cgroup"):
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue  # an empty list is version 2
        root = CGROUPS / "memory" if controllers else CGROUPS
        group = root / path.lstrip("/")
        for directory in (group, *group.parents[: len(group.parts) - len(root.parts)]):
            stat = _table(directory / "memory.stat")
            used = stat.get("anon", stat.get("total_rss", 0))
            for name in ("memory.max", "memory.limit_in_bytes"):
                yield from (int(n) - used for n in _lines(directory / name) if n != "max")


def _lines(path: Path) -> list[str]:
    with suppress(OSError):
        return path.read_text(encoding="utf-8", errors="replace").splitlines()
    return []


def _table(path: Path) -> dict[str, int]:
    """A file of lines `name: number`."""
    rows = (line.replace(":", " ").split() for line in _lines(path))
    return {row[0]: int(row[1]) for row in rows if len(row) > 1 and row[1].isdigit()}


def check_fits(
    setting: str, what: str, needed: float, device: torch.device, most: Callable[[float], float]
) -> None:
    """Raise ConfigError if `needed` bytes surely do not fit into the free memory of a device.

    setting: `key=value`; what: what takes the bytes, in words, plural; most(bytes): the largest
    value of the key that fits into so many.
    """
    free = free_memory(device)
    if needed <= free:
        return
    largest = int(most(free))
    allowed = f"must be at most {largest}" if largest > 0 else "no value fits"
    raise ConfigError(
        f"{setting}: {allowed} here: {what} take {in_words(needed)} of memory, of which "
        f"{in_words(free)} are free on {device}"
    )


def check_training(cfg: DictConfig, device: torch.device) -> None:
    """Raise ConfigError if weights, gradients and momentum of the model surely do not fit."""
    with torch.device("meta"):  # takes neither memory nor random numbers
        model = SimCLR(cfg.backbone, cfg.projection_dim, cfg.hidden_dim, cfg.cifar_stem)
    weights = sum(weight.nbytes for weight in model.parameters())
    unit = 4 * (model.feature_dim + 1 + cfg.projection_dim)  # of the hidden layer
    setting = f"hidden_dim={cfg.hidden_dim} beside projection_dim={cfg.projection_dim}"
    check_fits(
        setting, "weights, gradients and momentum", 3 * weights, device,
        lambda free: cfg.hidden_dim + (free / 3 - weights) / unit,
    )  # fmt: skip


def in_words(nbytes: float) -> str:
    """Bytes as `153.6 MB` or `2.4 GB`."""
    unit, name = (1e9, "GB") if nbytes >= 1e9 else (1e6, "MB")
    return f"{nbytes / unit:,.1f} {name}"


@contextmanager
def memory_advice(advice: str) -> Iterator[None]:
    """Turn running out of memory in the block into a UserError that ends with what helps there."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if (what := out_of_memory(error)) is None:
            raise
        raise UserError(f"{what}: {advice}") from None
