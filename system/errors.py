"""Errors of the user in one line, signals that stop a run, and a progress bar that ends none."""

import os
import re
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any

from hydra.errors import HydraException, OverrideParseException
from omegaconf.errors import OmegaConfBaseException
from tqdm import tqdm
from yaml import YAMLError

# What asks a process to end: a closed SSH session sends SIGHUP, Ctrl-\ SIGQUIT; SLURM, SGE and LSF
# warn with SIGUSR1, SIGUSR2 or, for the CPU time, SIGXCPU. Windows has SIGTERM and SIGINT alone.
STOP = ("SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1", "SIGUSR2", "SIGXCPU", "SIGQUIT")
AT_ONCE = ("SIGTERM", "SIGINT", "SIGQUIT")  # a second one ends at once; SIGXCPU always comes again
SAME = 1.0  # seconds in which a second signal is the first: terminal and torchrun both send one
OF_HYDRA = ("Unable to configure", "Config group override")  # ValueErrors, for a user's values
OUT_OF_MEMORY = re.compile("out of memory|can't allocate|not enough memory|ALLOC_FAILED", re.I)


class UserError(Exception):
    """An error that the user can fix, such as a missing dataset or a damaged checkpoint."""

    exit_code = 1


class Stopped(BaseException):
    """A signal ended the run: a whole sweep ends, so Hydra must not catch it."""

    def __init__(self, number: int, message: str = "") -> None:
        super().__init__(number, message)  # with which pickle makes it again
        self.exit_code = 128 + number

    def __str__(self) -> str:
        return f"stopped by {signal.Signals(self.args[0]).name}{self.args[1]}"


class StopSignals:
    """In the block a signal of STOP only sets `received`, unless it is ignored. One of AT_ONCE that
    comes again acts as outside: a script ends, a notebook is interrupted."""

    received: int | None = None

    def __enter__(self) -> "StopSignals":
        self._before, self._first = {}, {}  # handlers; when each signal came first
        if threading.current_thread() is threading.main_thread():  # others may not set handlers
            for number in (getattr(signal, name) for name in STOP if hasattr(signal, name)):
                if signal.getsignal(number) not in (signal.SIG_IGN, None):
                    self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.received = self.received or number
        since = time.monotonic() - self._first.setdefault(number, time.monotonic())
        if signal.Signals(number).name in AT_ONCE and since > SAME:
            signal.signal(number, self._before[number])
            signal.raise_signal(number)

    def act(self, number: int, message: str) -> None:
        """Call the handler that a launcher set before the block, which may return; else raise
        Stopped. To be called when the state is saved."""
        handler = self._before.get(number)
        if not callable(handler) or handler is signal.default_int_handler:
            raise Stopped(number, message)
        self.received, self._first = None, {}
        handler(number, sys._getframe())


class Dropping:
    """stderr, dropping what it cannot write: in `2>&1 | tee log` Ctrl-C ends tee before the run."""

    def __getattr__(self, name: str) -> Any:  # encoding, isatty, fileno
        return getattr(sys.stderr, name)

    def write(self, text: str = "") -> None:
        """Write the text to stderr, and flush it, or drop it."""
        with suppress(OSError, ValueError, AttributeError):  # gone, closed, None
            sys.stderr.write(text)
            sys.stderr.flush()

    flush = write


def progress_bar(**options: Any) -> tqdm:
    """tqdm on stderr, drawn once a second, which no output that cannot be written ends."""
    return tqdm(file=Dropping(), mininterval=1, **options)


def describe(error: BaseException) -> tuple[str, int] | None:
    """What a user, a machine or a signal did, in one line, and the exit code; None for a bug."""
    text = " ".join(str(error).split())
    if (exit_code := getattr(error, "exit_code", None)) is not None:
        return text, exit_code
    if isinstance(error, KeyboardInterrupt):
        return "stopped by SIGINT", 128 + signal.SIGINT
    if isinstance(error, OverrideParseException):
        key, _, value = str(error.override).partition("=")
        value = re.sub(r"(\\+)(?='|$)", r"\1\1", value).replace("'", r"\'")
        quoted = re.sub(r'([\\"$`])', r"\\\1", f"{key}='{value}'")  # for the shell
        reason = str(error).splitlines()[0]
        return f'{error.override}: {reason}; a text with such characters is "{quoted}"', 2
    refusal = isinstance(error, (HydraException, OmegaConfBaseException, YAMLError))
    if refusal or text.startswith(OF_HYDRA):
        reason = text.split(" Config search path")[0]  # after the recipes that there are
        if error.__cause__ is not None:
            reason += ": " + " ".join(str(error.__cause__).split())
        return reason, 2
    if isinstance(error, OSError):
        return f"{error.filename or 'system'}: {error.strerror or error}", 1
    # torch.cuda.graph raises another error over the first one
    if isinstance(error, MemoryError) or OUT_OF_MEMORY.search(f"{text} {error.__context__}"):
        advice = "activation_checkpointing=true, a micro_batch_size, or a smaller batch_size"
        return f"out of memory ({text[:200] or 'of the host'}): less is taken by {advice}", 1
    return None


@contextmanager
def error_boundary() -> Iterator[None]:
    """Print an error that `describe` knows in one line and exit with its code; others pass."""
    try:
        yield
    except BaseException as error:
        if (known := describe(error)) is None:
            raise
        line, exit_code = known
        print(line if exit_code > 128 else f"error: {line}", file=Dropping())
        sys.exit(exit_code)
    finally:  # Python flushes at exit; where a reader has ended it would fail, and exit with 120
        for stream in filter(None, (sys.stdout, sys.stderr)):
            try:
                stream.flush()
            except (OSError, ValueError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
