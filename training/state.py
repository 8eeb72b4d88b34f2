"""Save and restore the training state, from which a stopped run continues as the same run."""

import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torchvision
from torch import Tensor, nn

from models import SimCLR
from system.checkpoint import FORMAT, Damaged, load_checkpoint, to_bytes
from system.device import PRECISIONS, computes_in, precision_name, select_precision
from system.errors import ConfigError, UserError
from system.files import RUN_MARKS, write_file
from training.distributed import all_reduce_max, check_same

log = logging.getLogger("simclr")

STATE_PARTS = {
    "model": dict, "optimizer": dict, "scaler": dict, "random": dict, "epoch": int,
    "order": (Tensor, type(None)), "found": list, "seconds": float, "history": list,
    "images": str, "config": dict, "versions": dict,
}  # fmt: skip
# On which the numbers of a run depend; plain strings, torch.__version__ is a class of torch's.
VERSIONS = {"torch": str(torch.__version__), "torchvision": torchvision.__version__}
ELSE = "start over with resume=false, or choose another run directory with hydra.run.dir=PATH"


@dataclass
class Training:
    """The state of a run: model, optimizer, scaler, random generator, progress."""

    model: SimCLR
    ddp_model: nn.Module  # the model, wrapped in DistributedDataParallel under torchrun
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler  # does nothing unless dtype is float16
    rng: torch.Generator  # order of the images, and views
    dtype: torch.dtype  # what the model computes in
    make_views: Callable[..., Tensor]  # random_views, compiled or not
    compiled: bool
    graphed: bool = False  # whether a step is replayed from a CUDA graph
    init: str | None = None  # what the encoder starts from, in words; None: random weights
    epoch: int = 0  # completed epochs
    order: Tensor | None = None  # of the images, in the current epoch
    step_metrics: list[dict[str, float]] = field(default_factory=list)  # of the current epoch
    seconds: float = 0.0  # that those steps took
    history: list[dict[str, float | None]] = field(default_factory=list)  # metrics.jsonl

    def start_epoch(self, images: int) -> Tensor:
        """The order of the images in this epoch: a new permutation, or that of a resumed epoch."""
        if self.order is None:
            self.order = torch.randperm(images, device=self.rng.device, generator=self.rng)
        return self.order

    @property
    def steps_done(self) -> int:
        """Steps of the current epoch whose metrics are recorded."""
        return len(self.step_metrics)

    def end_epoch(self, line: dict[str, float | None]) -> None:
        """Complete the current epoch with its line of metrics.jsonl."""
        self.epoch += 1
        self.history.append(line)
        self.order, self.step_metrics, self.seconds = None, [], 0.0


class SavedState(NamedTuple):
    """A training state read from disk."""

    path: Path
    content: dict[str, Any]  # STATE_PARTS
    problems: list[str]  # why a newer one was not taken


def save_state(
    run_dir: Path, training: Training, images: str, config: dict[str, Any], keep: bool = True
) -> None:
    """Write simclr_<backbone>_last.pt; if `keep`, the old one becomes …_previous.pt.

    images: fingerprint of the training images. Takes about 8 bytes per weight on disk, twice.
    Raises UserError if it cannot be written; the old state then stays.
    """
    content = {
        "format": FORMAT,
        "model": training.model.state_dict(),
        "optimizer": training.optimizer.state_dict(),
        "scaler": training.scaler.state_dict(),
        "random": {"device": training.rng.device.type, "views": training.rng.get_state()},
        "epoch": training.epoch,
        "order": training.order,
        "found": training.step_metrics,  # their name in format 1
        "seconds": training.seconds,
        "history": training.history,
        "images": images,
        "config": config,
        "versions": VERSIONS,
    }
    backbone = config["backbone"]
    last, previous = (run_dir / f"simclr_{backbone}_{name}.pt" for name in ("last", "previous"))
    write_file(last, to_bytes(content), previous if keep else None)


def load_state(run_dir: Path) -> SavedState | None:
    """The newest undamaged state in `run_dir`; None if the directory holds no run at all.

    Raises UserError if it holds a run without a usable state, or a state of a newer format.
    """
    names = [f"simclr_*_{name}.pt" for name in ("last", "previous")]
    states = [path for name in names for path in run_dir.glob(name)]
    problems = []
    if not (states and states[0].name.endswith("_last.pt")):
        problems.append("simclr_<backbone>_last.pt is missing")
    for path in states:
        try:
            return SavedState(path, load_checkpoint(path, STATE_PARTS), problems)
        except Damaged as error:
            problems.append(str(error))
    if not any(path for pattern in RUN_MARKS for path in run_dir.glob(pattern)):
        return None
    raise UserError(
        f"{run_dir} holds a run that can't be continued ({'; '.join(problems)}): {ELSE}"
    )


def find_state(
    run_dir: Path, config: dict[str, Any], may_change: tuple[str, ...]
) -> SavedState | None:
    """Load the state from which a run with this config resumes, or None for a new run.

    Raises UserError as `load_state`, or if the ranks see different states; ConfigError as
    `check_unchanged`.
    """
    saved = load_state(run_dir)
    done = (saved.content["epoch"], len(saved.content["found"])) if saved else (-1, 0)
    check_same(done, f"training states in {run_dir}")
    if saved is not None:
        check_unchanged(saved.content["config"], config, saved.path, may_change)
    return saved


def check_unchanged(
    old: dict[str, Any], new: dict[str, Any], path: Path, may_change: tuple[str, ...]
) -> None:
    """Raise ConfigError if `new` differs from `old`, the config of the state in `path`.

    Keys in `may_change` are not compared: they say where and how a run is computed, not what; nor
    precision=auto, for which `choose_precision` takes that of the run.
    """
    absent, auto = "absent", ("precision",) if new.get("precision") == "auto" else ()
    keys = [key for key in {**new, **old} if key not in (*may_change, *auto)]
    changed = [key for key in keys if old.get(key, absent) != new.get(key, absent)]
    if changed:
        pairs = (f"{key}={new.get(key, absent)} (was {old.get(key, absent)})" for key in changed)
        raise ConfigError(
            f"{', '.join(pairs)}: must be as in {path} to resume that run; resume=false starts "
            "over and moves its files aside, hydra.run.dir=PATH starts in another run directory"
        )


def choose_precision(choice: str, device: torch.device, saved: SavedState | None) -> str:
    """The name of a run's precision: for "auto" that of the saved run, if there is one.

    Raises ConfigError if this device cannot compute in that, or "auto" differs between ranks.
    """
    name = new = precision_name(select_precision(choice, device))
    if choice == "auto" and saved is not None:
        name = saved.content["config"].get("precision", new)
        if name not in PRECISIONS or not computes_in(PRECISIONS[name], device):
            raise ConfigError(
                f"precision=auto: the run of {saved.path} has precision={name}, in which this "
                f"{device.type} cannot compute: resume it on a machine that can, {ELSE}"
            )
        if name != new:
            log.info(f"precision=auto: {name}, in which the run began; a new one would take {new}")
    number = list(PRECISIONS).index(name)
    if all_reduce_max(number) != -all_reduce_max(-number):
        raise ConfigError(f"precision=auto: differs between the ranks, {name} on this: name one")
    return name


def restore(training: Training, saved: SavedState, images: str) -> None:
    """Restore `training` from the saved state.

    images: fingerprint of the training images. On another device type the state of the random
    generator cannot be restored; it is seeded anew from seed and epoch. Raises UserError if the
    images differ or the weights do not fit.
    """
    content = saved.content
    if content["images"] != images:
        raise UserError(f"the training images are not those of {saved.path}: restore them, {ELSE}")
    try:
        training.model.load_state_dict(content["model"])
        training.optimizer.load_state_dict(content["optimizer"])
        training.scaler.load_state_dict(content["scaler"])
        if content["random"]["device"] == training.rng.device.type:
            training.rng.set_state(content["random"]["views"])
        else:
            training.rng.manual_seed(training.rng.initial_seed() + 1 + content["epoch"])
    except (RuntimeError, ValueError, TypeError, LookupError, AttributeError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{saved.path} does not fit its config ({reason[:300]})") from None
    if content["order"] is not None:
        training.order = content["order"].to(training.rng.device)
    training.epoch, training.step_metrics = content["epoch"], content["found"]
    training.seconds, training.history = content["seconds"], content["history"]


def describe_resume(training: Training, saved: SavedState) -> str:
    """A sentence for the log: which state is resumed, and whether the results stay identical."""
    instead = f" ({'; '.join(saved.problems)})" if saved.problems else ""
    then = {**saved.content["versions"], "device": saved.content["random"]["device"]}
    now = {**VERSIONS, "device": training.rng.device.type}
    other = [f"{name} {then.get(name)}" for name in now if then.get(name) != now[name]]
    change = f"; saved with {', '.join(other)}: identical only up to rounding" if other else ""
    if "device" in change:
        change += ", and with other views"
    done = f"{training.epoch} epochs and {training.steps_done} steps are done"
    return f"resumes from {saved.path}{instead}: {done}{change}"
