"""The training state on disk, from which the same command resumes a stopped run."""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torchvision
from torch import Tensor, nn

from config import Config, ConfigError, may_change
from models import SimCLR
from system.checkpoint import load_checkpoint
from system.errors import UserError
from system.files import OTHER, holds_run

STATE = {
    "model": dict, "optimizer": dict, "scaler": dict, "step": int, "step_metrics": list,
    "seconds": float, "history": list, "images": str, "config": dict, "versions": dict,
}  # fmt: skip
# On which the numbers of a run depend; plain strings, torch.__version__ is a class of torch's.
VERSIONS = {"torch": str(torch.__version__), "torchvision": torchvision.__version__}
START_OVER = f"start over with resume=false, or {OTHER}"


def state_path(run_dir: Path, backbone: str) -> Path:
    """Where the training state of a run is."""
    return run_dir / f"simclr_{backbone}_last.pt"


@dataclass
class Learner:
    """What learns: the model, and how it is updated."""

    model: SimCLR
    ddp_model: nn.Module  # the model, in DistributedDataParallel under torchrun
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler  # does nothing unless the precision is fp16
    make_views: Callable[..., Tensor]  # random_views, compiled or not
    graphed: bool  # whether a step is replayed from a CUDA graph

    def state(self) -> dict[str, Any]:
        """What a resumed run needs of it; 8 bytes a weight."""
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
        }

    def restore(self, saved: dict[str, Any]) -> None:
        """Restore a `state`. Raises UserError if it does not fit."""
        rates = [group["lr"] for group in self.optimizer.param_groups]
        try:
            self.model.load_state_dict(saved["model"])
            self.optimizer.load_state_dict(saved["optimizer"])
            self.scaler.load_state_dict(saved["scaler"])
        except (RuntimeError, ValueError, TypeError, LookupError, AttributeError) as error:
            reason = " ".join(str(error).split())[:300]
            raise UserError(f"the state does not fit its config ({reason}): {START_OVER}") from None
        for group, learning_rate in zip(self.optimizer.param_groups, rates, strict=True):
            group["lr"] = learning_rate  # a number, or the tensor of a CUDA graph; set every step


def find_state(run_dir: Path, cfg: Config) -> dict[str, Any] | None:
    """The training state in `run_dir` (STATE), or None if the directory holds no run.

    Raises UserError for a run without a usable state, ConfigError if a hyperparameter differs.
    """
    paths = sorted(run_dir.glob("simclr_*_last.pt"))
    if not paths:
        if holds_run(run_dir):
            raise UserError(f"{run_dir} holds a run without its training state: {START_OVER}")
        return None
    try:
        saved = load_checkpoint(paths[0], {"model": dict, "config": dict})
        if "random" in saved:
            raise UserError(f"{paths[0]} is of an earlier version, with other random numbers")
        saved = load_checkpoint(paths[0], STATE)
    except UserError as error:
        raise UserError(f"{error}: {START_OVER}") from None
    check_unchanged(saved, cfg, run_dir)
    return saved


def check_unchanged(saved: dict[str, Any], cfg: Config, run_dir: Path) -> None:
    """Raise ConfigError if the config differs from that of the saved state in `run_dir`.

    But for the keys in `may_change`, and precision=auto, which stands for that of the run.
    """
    old, new = saved["config"], asdict(cfg)
    left_out = [*may_change(), "precision"] if cfg.precision == "auto" else may_change()
    keys = [key for key in {**new, **old} if key not in left_out]
    pairs = [(key, new.get(key, "absent"), old.get(key, "absent")) for key in keys]
    changed = [f"{key}={now} (was {before})" for key, now, before in pairs if now != before]
    if changed:
        raise ConfigError(
            f"{', '.join(changed)}: must be as in {run_dir} to resume it; resume=false starts "
            "over, its files move aside; hydra.run.dir=PATH starts in another run directory, "
            f"beside init={run_dir} from these weights (the schedule starts again)"
        )
