"""Files of a run folder: written whole or not at all, by one process, and never over older ones."""

import fcntl
import os
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from errors import UserError

# What tells that a folder holds a run, and all that a run and its evaluation leave there.
MARKS = ("simclr_*.pt", "config.yaml", "metrics.jsonl")
OF_A_RUN = (
    *MARKS, "failure.json", "events.out.tfevents.*", "results*.json", "results*.md",
    "predictions.csv", "*.log", "*.png", "*.svg",
)  # fmt: skip


def write_file(path: Path, content: bytes, previous: Path | None = None) -> None:
    """Replace `path` by a file that is complete and on disk; what was there becomes `previous`.

    It is written under a temporary name and flushed (fsync) before it is renamed, and the folder
    after that, so that a crash or a power cut at any moment leaves the old file, under one of its
    two names, or the new one. So does a failure: UserError, which names the space that it takes.
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
        with suppress(OSError):  # not every file system can do this to a folder
            _sync_folder(path.parent)
    except OSError as error:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise UserError(
            f"{path} could not be written ({error.strerror}): it takes {_size(len(content))}"
            f"{_free(path.parent)}; make room, or the folder writable"
        ) from None


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _size(n: int) -> str:
    return f"{n / 1e6:,.1f} MB" if n >= 1e5 else f"{n / 1e3:,.1f} kB"


def _free(folder: Path) -> str:
    try:
        return f", {_size(shutil.disk_usage(folder).free)} are free there"
    except OSError:  # the folder is gone
        return ""


@contextmanager
def locked(folder: Path, name: str, needed: bool = True) -> Iterator[None]:
    """Hold `folder`/.<name>.lock; UserError if another process does. Does nothing unless `needed`.

    The lock is the kernel's (flock), on the open file: it ends with the process, however that
    ends. The file stays; it says who has it.
    """
    if not needed:
        yield
        return
    path = folder / f".{name}.lock"
    try:
        file = open(path, "a+", encoding="utf-8")  # noqa: SIM115
    except OSError as error:
        raise UserError(f"{path} cannot be written ({error.strerror}): choose another folder with "
                        "hydra.run.dir=PATH, or make this one writable") from None  # fmt: skip
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise UserError(
                f"{folder} is in use by another {name}.py ({file.read().strip()}): wait for it, "
                "or choose another folder with hydra.run.dir=PATH"
            ) from None
        except OSError as error:
            raise UserError(
                f"{path} cannot be locked ({error.strerror}): choose a folder on another file "
                "system with hydra.run.dir=PATH"
            ) from None
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        file.flush()
        yield


def move_aside(folder: Path) -> Path | None:
    """Move the files of a run into a new folder old-1, old-2, …; None where there are none."""
    files = sorted({path for pattern in OF_A_RUN for path in folder.glob(pattern)})
    if not files:
        return None
    number = 1
    while (aside := folder / f"old-{number}").exists():
        number += 1
    aside.mkdir()
    for path in files:
        path.rename(aside / path.name)
    return aside
