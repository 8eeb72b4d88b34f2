"""Terminal and log file: what cannot be written there neither ends nor changes a run."""

import errno
import io
import logging
import os
import sys
import time
from contextlib import suppress
from typing import Any


class Terminal(io.RawIOBase):
    """The file behind `stream`, which drops what it cannot write there.

    Such as to a pipe whose reader has ended, a full disk, or the terminal of a closed SSH session.
    The first loss is said on stderr, but for the reader's end. Nothing is left in a buffer, which
    Python would flush at exit and end with code 120.
    """

    failed = False

    def __init__(self, stream: Any, name: str) -> None:
        self.stream, self.file = stream, getattr(stream.buffer, "raw", stream.buffer)
        self.name = name

    def writable(self) -> bool:
        return True

    def isatty(self) -> bool:
        return self.file.isatty()

    def fileno(self) -> int:
        return self.file.fileno()

    def write(self, data: Any) -> int:
        rest = memoryview(data)
        try:
            while rest:
                written = self.file.write(rest)
                rest = rest[written or 0 :]
                if written is None:  # a full pipe that another process has made non-blocking
                    time.sleep(0.01)
        except OSError as error:
            report(self, self.name, error)
        return len(data)


def guard_terminal() -> None:
    """Make sys.stdout and sys.stderr exist, and drop or replace what they cannot write or encode.

    Closed descriptors 0 to 2 (2>&-) become the null device: the next file that is opened would get
    the number of stderr, and with it what libraries write there.
    """
    while (free := os.open(os.devnull, os.O_RDWR)) <= 2:
        os.set_inheritable(free, True)
    os.close(free)
    for name, errors in (("stdout", "replace"), ("stderr", "backslashreplace")):
        stream = getattr(sys, name) or open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
        if isinstance(getattr(stream, "buffer", None), Terminal | None):  # a notebook's has none
            continue
        with suppress(OSError):
            stream.flush()
        file = Terminal(stream, name)
        setattr(sys, name, io.TextIOWrapper(file, stream.encoding, errors, line_buffering=True))


def report(file: Any, name: str, error: BaseException | None) -> None:
    """Say once on stderr that `file` is incomplete, unless its reader wants no more."""
    failed, file.failed = file.failed, True
    if not failed and getattr(error, "errno", None) != errno.EPIPE:
        reason = getattr(error, "strerror", None) or error
        print(f"warning: {name} is incomplete ({reason})", file=sys.stderr)


class LogFile(logging.FileHandler):
    """A log file that may also fail to open; its first loss is said on stderr."""

    failed = False

    def emit(self, record: logging.LogRecord) -> None:
        try:
            super().emit(record)  # opens the file if it has to (delay)
        except OSError:
            self.handleError(record)

    def handleError(self, record: logging.LogRecord) -> None:
        report(self, self.baseFilename, sys.exc_info()[1])
