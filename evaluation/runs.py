"""What a run directory says about itself: its config, and the results of its evaluation."""

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from system.checkpoint import ARCHITECTURE
from system.errors import ConfigError, UserError, describe
from system.files import parse_json, read_yaml

EVALUATED = ("dataset", "data_dir", "workers", "device")  # of the config of an evaluation
Failed = dict[tuple[str, int], list[str]]  # what failed, by error line and exit code (`describe`)


@contextmanager
def noted(failed: Failed, name: str) -> Iterator[None]:
    """Where the block fails, but for a bug, note `name` in `failed` and go on after the block."""
    try:
        yield
    except Exception as error:
        if (known := describe(error)) is None:
            raise
        failed.setdefault(known, []).append(name)


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
    if not isinstance(results.get("linear_acc", ""), int | float | None):
        raise UserError(f"{path} is not of simclr_lin.py, it has no linear_acc: remove it")
    theirs = results.get("config", {})
    ours = run_config(run) if (run / "config.yaml").exists() else {}
    keys = [key for key in theirs if key in ours and key not in may_change]
    if differing := [f"{key} {theirs[key]}" for key in keys if theirs[key] != ours[key]]:
        raise UserError(f"{path} is of a run with {', '.join(differing[:3])}: evaluate this one")
    return results
