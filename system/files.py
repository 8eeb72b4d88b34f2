"""Files of a run directory: atomic writes, a lock, and which of them are ours."""

import errno
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
NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)  # of a file system
# What a run, its evaluation and its pictures write, beside results and predictions.
WEIGHTS = re.compile(r"simclr_\w+_(epoch[1-9]\d*|last|previous)\.pt")
RUN_FILES = re.compile(
    rf"{WEIGHTS.pattern}|config\.yaml|metrics\.jsonl|events\.out\.tfevents\..+\.simclr"
    r"|simclr(_lin)?\.log|(curves|views|embedding|neighbours|confusion)\.(png|svg)"
)


def write_file(path: Path, content: bytes) -> None:
    """Write, flush to disk and rename: a crash or power cut leaves the old file or the new one.

    Raises UserError if that fails.
    """
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        with suppress(OSError):  # Windows and some file systems cannot sync a directory
            directory = os.open(path.parent, os.O_RDONLY)
            try:
                os.fsync(directory)
            finally:
                os.close(directory)
    except OSError as error:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise UserError(
            f"{path} could not be written ({error.strerror}): it takes {len(content) / 1e6:,.1f} "
            "MB; free up space, or make the directory writable"
        ) from None


def read_config(run_dir: Path) -> dict[str, Any]:
    """The config of the run in a directory, from its config.yaml.

    Raises UserError if the file is missing, damaged or of another program.
    """
    path = run_dir / "config.yaml"
    try:
        config = OmegaConf.to_container(OmegaConf.load(path))
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror or error})") from None
    except (YAMLError, OmegaConfBaseException, ValueError, RecursionError) as error:
        raise UserError(f"{path} is damaged ({' '.join(str(error).split())})") from None
    if not isinstance(config, dict) or not {"temperature", *keys(Architecture)} <= set(config):
        raise UserError(f"{path} is not of simclr.py: move it away, or {OTHER}")
    return config


def read_json(content: bytes, where: Path | str, *needed: str) -> dict[str, Any]:
    """The JSON object in `content`; `needed`: keys that it must have.

    Raises UserError, naming `where`, if it holds anything else.
    """
    try:
        found = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where} is damaged ({error}): mend it or move it away") from None
    if not isinstance(found, dict) or not set(needed) <= set(found):
        raise UserError(f"{where} is of another program: move it away, or {OTHER}")
    return found


def read_metrics(run_dir: Path) -> list[dict[str, float | None]]:
    """Read metrics.jsonl of a run directory, a dict per epoch; empty in its first epoch.

    Raises UserError if it is damaged or of another program.
    """
    path = run_dir / "metrics.jsonl"
    lines = path.read_bytes().split(b"\n")[:-1] if path.exists() else []  # the last: cut, or empty
    return [read_json(line, f"{path}, line {n}", "epoch") for n, line in enumerate(lines, 1)]


@contextmanager
def locked(directory: Path, name: str, wait: bool = False) -> Iterator[None]:
    """Hold the lock `directory`/.<name>.lock within the block. Warns where there are no locks.

    While another process holds it: waits, or without `wait` raises UserError.
    """
    lock = FileLock(directory / f".{name}.lock", fallback_to_soft=False)
    try:
        lock.acquire(blocking=wait)
    except Timeout:
        used = f"{directory} is in use by another {name}.py"
        raise UserError(f"{used}: wait until that ends, or {OTHER}") from None
    except (OSError, NotImplementedError) as error:  # filelock's word for ENOSYS is the second
        if getattr(error, "errno", errno.ENOSYS) not in NO_LOCKS:
            raise UserError(f"{directory} cannot be written ({error.strerror}): {OTHER}") from None
        log.warning(f"warning: {directory} is on a file system without locks: start one {name}.py")
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
    for path in run_dir.glob("results*.json"):
        files += [path, path.with_suffix(".md")] if is_results(path) else []
    for path in run_dir.glob("predictions.csv"):
        files += [path] if path.read_bytes().startswith(b"file,class,probability") else []
    number = 1
    while (aside := run_dir / f"old-{number}").exists():
        number += 1
    aside.mkdir()
    for handler in logging.getLogger().handlers:  # reopen the log here, where a later message goes
        if isinstance(handler, logging.FileHandler):
            handler.close()
    for path in sorted(path for path in files if path.exists()):
        path.rename(aside / path.name)
    log.info(f"moved the files of the earlier run to {aside}")


def is_results(path: Path) -> bool:
    """Whether a file was written by simclr_lin.py as results.json."""
    try:
        read_json(path.read_bytes(), path, "sha256", "protocols")
    except UserError:
        return False
    return True
