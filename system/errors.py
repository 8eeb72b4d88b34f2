"""Error types, signal handling and exit codes: one line on stderr instead of a traceback."""

import os
import re
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from system.terminal import guard_terminal

# What asks a process to end: a closed SSH session sends SIGHUP, Ctrl-\ SIGQUIT; SLURM, SGE and LSF
# warn with SIGUSR1, SIGUSR2 or, for the CPU time, SIGXCPU. Windows has the first two.
ALWAYS = (signal.SIGTERM, signal.SIGINT)
OTHERS = ("SIGHUP", "SIGQUIT", "SIGUSR1", "SIGUSR2", "SIGXCPU")
STOP = (*ALWAYS, *(getattr(signal, name) for name in OTHERS if hasattr(signal, name)))
AT_ONCE = (*ALWAYS, getattr(signal, "SIGQUIT", None))  # SIGXCPU comes every second
TWICE = 1.0  # seconds in which a second signal counts as the first: terminal and launcher both send
rank: int | None = None  # of this process, where training.distributed has started several
OUT_OF_MEMORY = re.compile("out of memory|can't allocate|not enough memory|ALLOC_FAILED")
PEER_ENDED = re.compile("gloo|NCCL|ProcessGroup|Connection (closed|reset) by peer")


class UserError(Exception):
    """An error that the user can fix, such as a missing dataset or a damaged checkpoint."""

    exit_code = 1


class ConfigError(UserError):
    """A config value that is not allowed."""

    exit_code = 2


class Stopped(BaseException):
    """The process was asked to end by a signal: the whole sweep, so Hydra must not catch it."""

    def __init__(self, number: int, message: str = "") -> None:
        super().__init__(number, message)  # all of it, for pickle
        self.number, self.message = number, message

    def __str__(self) -> str:
        return f"stopped by {signal.Signals(self.number).name}{self.message}"


class StopSignals:
    """Record the signals of STOP in the block; the same one a second later ends the process.

    The last holds for AT_ONCE. Unless it is SIGTERM or SIGINT, a signal that is ignored, as SIGHUP
    under nohup, or has a handler stays so. To a rank the end of its torchrun is a SIGTERM, as when
    a SIGUSR1 has ended that, which it does not handle.

    A thread reads the signals: Python's own handlers wait for the main thread, which a backward
    pass keeps for a whole step. A launcher's signal reaches the ranks at different moments; `agree`
    (the maximum over the ranks) makes all stop at one step.
    """

    received: int | None = None

    def __init__(self, agree: Callable[[int], int] = lambda number: number) -> None:
        self.agree = agree
        self._agent = os.getppid() if "TORCHELASTIC_RUN_ID" in os.environ else None

    def __enter__(self) -> "StopSignals":
        self._before = {}
        if threading.current_thread() is threading.main_thread():  # others may not set handlers
            reader, self._writer = socket.socketpair()
            self._writer.setblocking(False)
            self._fd = signal.set_wakeup_fd(self._writer.fileno())
            threading.Thread(target=self._listen, args=(reader,), daemon=True).start()
            for number in STOP:
                if number in ALWAYS or signal.getsignal(number) is signal.SIG_DFL:
                    self._before[number] = signal.signal(number, lambda *_: None)
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        if self._before:
            signal.set_wakeup_fd(self._fd)
            self._writer.close()

    def _listen(self, reader: socket.socket) -> None:
        first: dict[int, float] = {}
        with reader:
            while byte := reader.recv(1):  # empty: the block has ended
                if (number := byte[0]) not in STOP:
                    continue
                self.received = self.received or number
                since = time.monotonic() - first.setdefault(number, time.monotonic())
                if number in AT_ONCE and since > TWICE:
                    os._exit(128 + number)

    def noted(self) -> int:
        """The signal received, or 0. Under torchrun a collective: every rank must call it."""
        left = self._agent not in (None, os.getppid())
        return self.agree(self.received or (signal.SIGTERM if left else 0))

    def check(self) -> None:
        """Raise Stopped if a signal was received."""
        if number := self.noted():
            raise Stopped(number)


def out_of_memory(error: BaseException | None) -> str | None:
    """What was asked for, in words, if memory of the host or a GPU was used up; else None.

    Most of torch's errors have no class of their own, and one that comes of cleaning up hides it.
    """
    while error is not None:
        text = " ".join(str(error).split())
        sentences = [s for s in text.split(". ") if OUT_OF_MEMORY.search(s)]
        if sentences or isinstance(error, MemoryError):
            return f"out of memory ({(sentences or [text or 'of the host'])[0]})"
        error = error.__context__
    return None


def describe(error: BaseException) -> tuple[str, int] | None:
    """What a user, a machine or a signal did, in one line, and the exit code; None for a bug."""
    text = " ".join(str(error).split())
    if isinstance(error, UserError):
        return text, error.exit_code
    if isinstance(error, Stopped):
        return text, 128 + error.number
    if isinstance(error, KeyboardInterrupt):
        return "stopped by SIGINT", 128 + signal.SIGINT
    if isinstance(error, OSError):
        return f"{error.filename or 'system'}: {error.strerror or error}", 1
    if not isinstance(error, (MemoryError, RuntimeError)):  # torch's own on CUDA alone has a class
        return None
    if rank is not None and PEER_ENDED.search(text):
        return f"another rank has ended ({str(error).splitlines()[0][:200]})", 1
    what = out_of_memory(error)
    return None if what is None else (f"{what}: this machine has too little for it", 1)


@contextmanager
def one_line_errors() -> Iterator[None]:
    """Print an error that `describe` knows as one line on stderr, and exit with its code.

    Other exceptions keep their traceback. The terminal is guarded from here on (`guard_terminal`).
    """
    guard_terminal()
    try:
        yield
    except BaseException as error:
        if (known := describe(error)) is None:
            raise
        line, exit_code = known
        line = line if exit_code > 128 else f"error: {line}"  # a signal is no error
        print(f"rank {rank}: {line}" if rank else line, file=sys.stderr)
        sys.exit(exit_code)
