"""The training state on disk, from which the same command resumes a stopped run."""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from config import Config, ConfigError, may_change
from models import SimCLR
from system.checkpoint import load_checkpoint, load_weights
from system.errors import UserError
from system.files import OTHER, holds_run

# The keys of a state, beside model and config.
STATE = {"optimizer", "scaler", "step", "step_metrics", "seconds", "history", "images"}
START_OVER = f"start over with resume=false, or {OTHER}"


@dataclass
class Learner:
    """What learns: the model, and how it is updated."""

    model: SimCLR
    ddp_model: nn.Module  # the model, in DistributedDataParallel under torchrun
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler  # does nothing unless the precision is fp16
    make_views: Callable[..., Tensor]  # random_views, compiled or not
    graphed: bool  # whether a step is replayed from a CUDA graph

    def restore(self, saved: dict[str, Any]) -> None:
        """Restore weights, optimizer and scaler. Raises UserError if the weights do not fit."""
        rates = [group["lr"] for group in self.optimizer.param_groups]
        load_weights(self.model, saved["model"], f"the training state ({START_OVER})")
        self.optimizer.load_state_dict(saved["optimizer"])
        self.scaler.load_state_dict(saved["scaler"])
        for group, learning_rate in zip(self.optimizer.param_groups, rates, strict=True):
            group["lr"] = learning_rate  # a number, or the tensor of a CUDA graph; set every step


def find_state(run_dir: Path, cfg: Config) -> dict[str, Any] | None:
    """The state in `run_dir`, if any. Raises UserError if it cannot be used; ConfigError if a key
    differs that is not in `may_change`: precision=auto stands for that of the run."""
    paths = sorted(run_dir.glob("simclr_*_last.pt"))
    if not paths:
        if holds_run(run_dir):
            raise UserError(f"{run_dir} holds a run without its training state: {START_OVER}")
        return None
    try:
        saved = load_checkpoint(paths[0], {"model": dict, "config": dict})
    except UserError as error:
        raise UserError(f"{error}: {START_OVER}") from None
    if "random" in saved or not set(saved) >= STATE:
        raise UserError(f"{paths[0]}: of another version, with other random numbers: {START_OVER}")
    left_out = [*may_change(), "precision"] if cfg.precision == "auto" else may_change()
    old, new = saved["config"], asdict(cfg)  # keys that only an old version has do not count
    differ = [key for key in new if key not in left_out and new[key] != old.get(key, "absent")]
    if differ:
        changed = [f"{key}={new[key]} (was {old.get(key, 'absent')})" for key in differ]
        raise ConfigError(
            f"{', '.join(changed)}: must be as in {run_dir} to resume it; {START_OVER}; with "
            f"either, init={paths[0]} starts from these weights (the schedule starts again)"
        )
    return saved
