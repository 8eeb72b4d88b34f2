"""Files of a run directory: atomic writes, a lock, and which of them are ours."""

import json
import logging
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from config import Architecture, keys
from system.errors import UserError

log = logging.getLogger("simclr")

OTHER = "choose another run directory with hydra.run.dir=PATH"
# What a run, its evaluation and its pictures write, beside results.json.
WEIGHTS = re.compile(r"simclr_\w+_(epoch[1-9]\d*|last)\.pt")
RUN_FILES = re.compile(
    rf"{WEIGHTS.pattern}|config\.yaml|metrics\.jsonl|events\.out\.tfevents\..+\.simclr"
    r"|(curves|views|embedding|neighbours)\.(png|svg)"
)


def write_file(path: Path, content: bytes) -> None:
    """Write, flush, rename: a crash leaves the old file or the new. May raise UserError."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise UserError(f"{path} could not be written ({error.strerror})") from None


def read_config(run_dir: Path) -> dict[str, Any]:
    """config.yaml of a run directory. Raises UserError if it is missing, damaged or another's."""
    path = run_dir / "config.yaml"
    try:
        config = OmegaConf.to_container(OmegaConf.load(path))
    except (OSError, YAMLError, OmegaConfBaseException, ValueError, RecursionError) as error:
        reason = " ".join(str(getattr(error, "strerror", None) or error).split())
        raise UserError(f"{path} cannot be read ({reason})") from None
    if not isinstance(config, dict) or not {"temperature", *keys(Architecture)} <= set(config):
        raise UserError(f"{path} is not of simclr.py: move it away, or {OTHER}")
    return config


def read_json(content: bytes, where: Path | str, *needed: str) -> dict[str, Any]:
    """A JSON object with the keys `needed`; raises UserError, naming `where`, for anything else."""
    with suppress(ValueError, TypeError, RecursionError):
        found = json.loads(content)
        if isinstance(found, dict) and set(needed) <= set(found):
            return found
    raise UserError(f"{where} is damaged or of another program: move it away, or {OTHER}")


def read_metrics(run_dir: Path) -> list[dict[str, float | None]]:
    """The lines of metrics.jsonl; empty in the first epoch. Raises UserError as `read_json`."""
    path = run_dir / "metrics.jsonl"
    lines = path.read_bytes().split(b"\n")[:-1] if path.exists() else []  # the last: cut, or empty
    return [read_json(line, f"{path}, line {n}", "epoch") for n, line in enumerate(lines, 1)]


def read_results(path: Path) -> dict[str, Any]:
    """The content of results.json; empty if there is none, or a file of another program."""
    try:
        return read_json(path.read_bytes(), path, "sha256", "protocols")
    except (FileNotFoundError, UserError):
        return {}


@contextmanager
def locked(directory: Path, name: str, wait: bool = False) -> Iterator[None]:
    """Hold a lock in the block. While another process has it: waits, or raises UserError."""
    lock = FileLock(directory / f".{name}.lock", fallback_to_soft=False)
    try:
        lock.acquire(blocking=wait)
    except Timeout:
        raise UserError(f"{directory} is in use by another {name}.py: wait, or {OTHER}") from None
    except (OSError, NotImplementedError) as error:  # the second: where there are no locks at all
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{directory} cannot be locked ({reason}): choose another") from None
    try:
        yield
    finally:
        lock.release()


def holds_run(run_dir: Path) -> bool:
    """Whether a run of ours has begun in the directory."""
    files = run_dir.glob("*.pt")
    return (run_dir / "config.yaml").exists() or any(WEIGHTS.fullmatch(f.name) for f in files)


def check_ours(run_dir: Path) -> None:
    """Raise UserError if files of another program lie where a run would write its own."""
    if (run_dir / "config.yaml").exists():
        read_config(run_dir)
    elif (path := run_dir / "metrics.jsonl").exists() and not holds_run(run_dir):
        raise UserError(f"{path} is not of simclr.py: move it away, or {OTHER}")


def move_aside(run_dir: Path) -> None:
    """Move the files of a run to a new directory old-1, old-2, …; nothing if there is no run."""
    if not holds_run(run_dir):
        return
    files = [path for path in run_dir.iterdir() if RUN_FILES.fullmatch(path.name)]
    files += [path for path in run_dir.glob("results*.json") if read_results(path)]
    number = 1
    while (aside := run_dir / f"old-{number}").exists():
        number += 1
    aside.mkdir()
    for path in sorted(files):  # the weights last: what is left after a kill is still a run's
        path.rename(aside / path.name)
    log.info(f"moved the files of the earlier run to {aside}")
