"""What a run directory says about itself: its config, and the results of its evaluation."""

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf

from system.checkpoint import ARCHITECTURE
from system.errors import ConfigError, UserError
from system.files import parse_json, read_yaml

NUMBER = int | float | None
RESULTS = {"linear_acc": NUMBER, "knn_acc": NUMBER, "epoch": int, "checkpoint": str,
           "config": dict, "evaluation_config": dict}  # fmt: skip
EVALUATED = ("dataset", "data_dir", "workers", "device")  # of the config of an evaluation
# What may be wrong with the files, the data or the machine for one picture or run, not for all.
FAILURES = UserError, OSError, MemoryError, torch.OutOfMemoryError


@contextmanager
def noted(failed: list[tuple[str, UserError]], name: str = "") -> Iterator[None]:
    """Where the block fails for a reason in FAILURES, note name and error in `failed`; go on."""
    try:
        yield
    except UserError as error:
        failed.append((name, error))
    except FAILURES as error:
        failed.append((name, UserError(f"{type(error).__name__}: {error}")))


def run_config(run: Path) -> dict[str, Any]:
    """The config of a run, not yet checked, from its config.yaml.

    A directory without it, where a checkpoint from elsewhere was evaluated, has the config of that
    checkpoint with the data of the evaluation. Raises UserError if there is neither, ConfigError
    for a file that is damaged or of another program.
    """
    path = run / "config.yaml"
    if path.exists():
        config = OmegaConf.to_container(read_yaml(path))
    elif results := run_results(run):
        path, evaluation = run / "results.json", results.get("evaluation_config", {})
        data = {key: evaluation[key] for key in EVALUATED if key in evaluation}
        config = {**results.get("config", {}), **data, "checkpoint": results.get("checkpoint")}
    else:
        raise UserError(f"{run} is not a run directory: it has no config.yaml, no results.json")
    if lacking := [key for key in ("epochs", *ARCHITECTURE) if key not in config]:
        raise ConfigError(f"{path} is not of simclr.py: it has no {', '.join(lacking)}")
    return config


def run_results(run: Path, may_change: Collection[str] = ()) -> dict[str, Any]:
    """results.json of a run directory, empty without one.

    Raises UserError if it is damaged, or of a checkpoint that was trained with another config than
    the run's config.yaml, the keys in `may_change` left out.
    """
    path = run / "results.json"
    if not path.exists():
        return {}
    results = parse_json(path.read_bytes(), path)
    for key, kind in RESULTS.items():
        if key in results and not isinstance(results[key], kind):
            raise UserError(f"{path}: {key} is not what simclr_lin.py writes: remove the file")
    if "linear_acc" not in results:
        raise UserError(f"{path} is not of simclr_lin.py, it has no linear_acc: remove it")
    theirs = results.get("config", {})
    ours = run_config(run) if (run / "config.yaml").exists() else theirs
    keys = [key for key in ours if key in theirs and key not in may_change]
    differing = [key for key in keys if theirs[key] != ours[key]]
    if differing:
        there, here = ([f"{key} {c[key]}" for key in differing[:3]] for c in (theirs, ours))
        raise UserError(
            f"{path} is of a run with {', '.join(there)}, not {', '.join(here)}: evaluate this one"
        )
    return results
