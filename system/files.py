"""Atomic writes, locks and archiving for run directories."""

import errno
import io
import json
import logging
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import MarkedYAMLError, YAMLError

from system.errors import ConfigError, UserError

log = logging.getLogger(__name__)

# A directory with one of RUN_MARKS holds a run; RUN_FILES are all that a run and its evaluation
# leave there.
RUN_MARKS = ("simclr_*.pt", "config.yaml", "metrics.jsonl")
RUN_FILES = (
    *RUN_MARKS, "failure.json", "events.out.tfevents.*", "results*.json", "results*.md",
    "predictions.csv", "*.log", "*.png", "*.svg",
)  # fmt: skip
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)  # from a file system without locks


def write_file(path: Path, content: bytes, previous: Path | None = None) -> None:
    """Write `content` to `path` atomically and durably; the old file becomes `previous`.

    The content goes to a temporary file, is flushed to disk (fsync) and then renamed, so that a
    crash or a power cut at any moment leaves either the old file, under one of its two names, or
    the new one. Raises UserError, with the space that it takes, if that fails.
    """
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        if previous is not None and path.exists():
            os.replace(path, previous)
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
        size, free = max(0.1, len(content) / 1e6), ""
        with suppress(OSError):  # the directory is gone
            free = f", {shutil.disk_usage(path.parent).free / 1e6:,.1f} MB are free there"
        raise UserError(
            f"{path} could not be written ({error.strerror}): it takes {size:,.1f} MB{free}; free "
            "up space, or make the directory writable"
        ) from None


def read_yaml(path: Path) -> DictConfig:
    """Read a YAML file of keys and values, UTF-8.

    Raises ConfigError, with the line, if it holds anything else; UserError if it cannot be read.
    """
    content = b""
    try:
        content = path.read_bytes()
        config = OmegaConf.load(io.StringIO(content.decode("utf-8-sig")))
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror})") from None
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        reason = f"byte {content[error.start]:#04x} is not UTF-8: save the file in this encoding"
        raise ConfigError(f"{path}, line {line}: {reason}") from None
    except MarkedYAMLError as error:
        raise ConfigError(f"{path}, line {error.problem_mark.line + 1}: {error.problem}") from None
    except (YAMLError, OmegaConfBaseException, RecursionError) as error:
        key = getattr(error, "full_key", None)
        where = f"{path}, {str(key)[:40]}" if key else path
        raise ConfigError(f"{where}: {str(error).splitlines()[0]}") from None
    if not isinstance(config, DictConfig):
        raise ConfigError(f"{path}: must hold lines of the form key: value")
    return config


def parse_json(content: bytes, where: Path | str) -> dict[str, Any]:
    """The JSON object in `content`. Raises UserError, naming `where`, if it holds anything else."""
    try:
        found = json.loads(content)
        if not isinstance(found, dict):
            raise ValueError("no keys with values")
    except (ValueError, RecursionError) as error:
        reason = f"{where} is damaged or of another program ({error})"
        raise UserError(f"{reason}: mend or remove it") from None
    return found


@contextmanager
def locked(
    directory: Path, name: str, needed: bool = True, wait: str | None = None
) -> Iterator[None]:
    """Hold the lock `directory`/.<name>.lock within the block; does nothing unless `needed`.

    The operating system releases the lock when the process ends, however it ends; the empty file
    may stay. While another process holds it: waits, with the line `wait` in the log, or without
    one raises UserError. Warns on a file system without locks. Raises UserError if the file cannot
    be written; with `wait` the block then runs without, since no other process can write there.
    """
    lock = FileLock(directory / f".{name}.lock", fallback_to_soft=False)
    try:
        if needed:
            lock.acquire(blocking=False)
    except Timeout:
        if wait is None:
            raise UserError(
                f"{directory} is in use by another {name}.py: wait until that ends, or choose "
                "another run directory with hydra.run.dir=PATH"
            ) from None
        log.warning(wait)
        lock.acquire()  # looks again and again, so that signals end it
    except (OSError, NotImplementedError) as error:  # filelock's own word for ENOSYS is the second
        if isinstance(error, NotImplementedError) or error.errno in NO_LOCKS:
            one = f"start one {name}.py" if wait is None else "let one process end its download"
            log.warning(f"warning: {directory} is on a file system without locks: {one}")
        elif wait is None:
            raise UserError(
                f"{lock.lock_file} cannot be written ({error.strerror}): make the directory "
                "writable, or choose another with hydra.run.dir=PATH"
            ) from None
    try:
        yield
    finally:
        lock.release()


def move_aside(run_dir: Path) -> Path | None:
    """Move the files of a run to a new directory old-1, old-2, …; None if there are none."""
    files = sorted({path for pattern in RUN_FILES for path in run_dir.glob(pattern)})
    if not files:
        return None
    number = 1
    while (aside := run_dir / f"old-{number}").exists():
        number += 1
    aside.mkdir()
    for handler in logging.getLogger().handlers:  # reopen the log here, where a later message goes
        if isinstance(handler, logging.FileHandler):
            handler.close()
    for path in files:
        path.rename(aside / path.name)
    return aside
