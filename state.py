"""The state of a run in training, kept on disk so that one that was stopped is the same run."""

import platform
import random
import subprocess
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torchvision
from torch import Tensor, nn

from checkpoint import FORMAT, Damaged, load_checkpoint, to_bytes
from config import OF_EVALUATION
from errors import ConfigError, UserError
from files import MARKS, write_file
from models import SimCLR

PARTS = {
    "model": dict, "optimizer": dict, "scaler": dict, "random": dict, "epoch": int,
    "order": (Tensor, type(None)), "found": list, "seconds": float, "history": list,
    "images": str, "config": dict, "versions": dict,
}  # fmt: skip

# What a run may go on with another value of: where and how it is computed, not what. Of the images
# in data_dir a checksum is compared, of precision what `auto` stands for.
MAY_CHANGE = (
    "data_dir", "workers", "device", "compile", "activation_checkpointing", "log_interval",
    "knn_interval", "save_minutes", "resume", *OF_EVALUATION,
)  # fmt: skip


@dataclass
class Training:
    """What a run carries from step to step."""

    model: SimCLR
    parallel: nn.Module  # the model, which under torchrun averages gradients over the processes
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler  # does nothing unless dtype is float16
    rng: torch.Generator  # order of the images, and views
    dtype: torch.dtype  # what the model computes in
    make_views: Callable[..., Tensor]  # random_views, compiled or not
    compiled: bool
    epoch: int = 0  # complete ones
    order: Tensor | None = None  # of the images, in the epoch in flight
    found: list[dict[str, float]] = field(default_factory=list)  # by its steps so far
    seconds: float = 0.0  # that those took
    history: list[dict[str, float | None]] = field(default_factory=list)  # metrics.jsonl

    def end_epoch(self, line: dict[str, float | None]) -> None:
        """Count the epoch in flight as complete; `line`: what metrics.jsonl says of it."""
        self.epoch += 1
        self.history.append(line)
        self.order, self.found, self.seconds = None, [], 0.0


def save_state(
    folder: Path,
    training: Training,
    images: str,
    config: dict[str, Any],
    commit: str | None = None,
    keep: bool = True,
) -> None:
    """Write simclr_<backbone>_last.pt; if `keep`, the one before is simclr_<backbone>_previous.pt.

    images: fingerprint of the training images. Takes about 8 bytes a weight on disk, twice.
    Raises UserError where it can't be written; a state that was there is kept.
    """
    content = {
        "format": FORMAT,
        "model": training.model.state_dict(),
        "optimizer": training.optimizer.state_dict(),
        "scaler": training.scaler.state_dict(),
        "random": _random_states(training.rng),
        "epoch": training.epoch,
        "order": training.order,
        "found": training.found,
        "seconds": training.seconds,
        "history": training.history,
        "images": images,
        "config": config,
        "versions": versions(),
        "commit": commit,
    }
    backbone = config["backbone"]
    last, previous = (folder / f"simclr_{backbone}_{name}.pt" for name in ("last", "previous"))
    write_file(last, to_bytes(content), previous if keep else None)


class Found(NamedTuple):
    """A training state on disk."""

    path: Path
    content: dict[str, Any]  # PARTS
    problems: list[str]  # why a newer one was not taken


def load_state(folder: Path) -> Found | None:
    """The newest state in `folder` that is not damaged; None if the folder holds no run at all.

    Raises UserError if it holds one that cannot be continued, or of a newer version.
    """
    states = [path for name in ("last", "previous") for path in folder.glob(f"simclr_*_{name}.pt")]
    problems = []
    if not (states and states[0].name.endswith("_last.pt")):
        problems.append("simclr_<backbone>_last.pt is missing")
    for path in states:
        try:
            return Found(path, load_checkpoint(path, PARTS, state=True), problems)
        except Damaged as error:
            problems.append(str(error))
    if not any(path for pattern in MARKS for path in folder.glob(pattern)):
        return None
    raise UserError(
        f"{folder} holds a run that can't be continued ({'; '.join(problems)}): start over with "
        "resume=false, which moves its files aside, or choose a new folder with hydra.run.dir=PATH"
    )


def check_unchanged(old: dict[str, Any], new: dict[str, Any], path: Path) -> None:
    """Raise ConfigError if `new` differs from `old`, the config of the state in `path`, in a key
    that is not among MAY_CHANGE: what went on would not be the same run."""
    absent = "absent"
    keys = [key for key in {**new, **old} if key not in MAY_CHANGE]
    changed = [key for key in keys if old.get(key, absent) != new.get(key, absent)]
    if changed:
        pairs = (f"{key}={new.get(key, absent)} (was {old.get(key, absent)})" for key in changed)
        raise ConfigError(
            f"{', '.join(pairs)}: must be as in {path} to go on from there; resume=false starts "
            "over and moves its files aside, hydra.run.dir=PATH starts in another folder"
        )


def restore(training: Training, path: Path, saved: dict[str, Any], images: str) -> None:
    """Put `training` where it was when `saved` was written to `path`.

    images: fingerprint of the training images. On another kind of device, whose generator is
    another, all that is drawn follows anew from the seed and the epoch. Raises UserError if
    the images or the weights are others.
    """
    if saved["images"] != images:
        raise UserError(
            f"the training images are not those of {path}: restore them, start over with "
            "resume=false, or choose another folder with hydra.run.dir=PATH"
        )
    try:
        training.model.load_state_dict(saved["model"])
        training.optimizer.load_state_dict(saved["optimizer"])
        training.scaler.load_state_dict(saved["scaler"])
        _set_random_states(training.rng, saved["random"], saved["epoch"])
    except (RuntimeError, ValueError, TypeError, LookupError, AttributeError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{path} does not fit its config ({reason[:300]})") from None
    training.order = saved["order"]
    if training.order is not None:
        training.order = training.order.to(training.rng.device)
    for name in ("epoch", "found", "seconds", "history"):
        setattr(training, name, saved[name])


def versions() -> dict[str, str]:
    """What the numbers of a run depend on, beside the code."""
    return {
        "python": platform.python_version(),
        "torch": str(torch.__version__),  # plain: it is a class of torch's
        "torchvision": torchvision.__version__,
        "numpy": np.__version__,
    }


def commit() -> str | None:
    """The git commit of this code, "-dirty" where it was changed; None where git can't tell."""
    git = ["git", "--no-optional-locks", "-C", str(Path(__file__).parent)]
    try:
        prefix = subprocess.run(
            [*git, "rev-parse", "--show-prefix"], capture_output=True, text=True
        )
        command = [*git, "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
        found = subprocess.run(command, capture_output=True, text=True)
    except OSError:  # no git
        return None
    ours = prefix.returncode == 0 and not prefix.stdout.strip()  # not of a repository around it
    return found.stdout.strip() or None if ours else None


def _random_states(rng: torch.Generator) -> dict[str, Any]:
    """All generators in reach, as plain data. Training draws from `rng` alone."""
    name, *numpy_state = np.random.get_state()
    states = {
        "device": rng.device.type,
        "views": rng.get_state(),
        "torch": torch.get_rng_state(),
        "python": random.getstate(),
        "numpy": (name, numpy_state[0].tolist(), *numpy_state[1:]),
    }
    if rng.device.type != "cpu":
        states["torch_device"] = torch.get_device_module(rng.device).get_rng_state()
    return states


def _set_random_states(rng: torch.Generator, states: dict[str, Any], epoch: int) -> None:
    torch.set_rng_state(states["torch"])
    random.setstate(states["python"])
    np.random.set_state(states["numpy"])
    if states["device"] != rng.device.type:
        rng.manual_seed(rng.initial_seed() + 1 + epoch)
        return
    rng.set_state(states["views"])
    if "torch_device" in states:
        torch.get_device_module(rng.device).set_rng_state(states["torch_device"])
