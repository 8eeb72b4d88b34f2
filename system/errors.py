"""Error types, signal handling and exit codes: one line on stderr instead of a traceback."""

import logging
import os
import re
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

STOP = (signal.SIGTERM, signal.SIGINT)
TWICE = 1.0  # seconds in which a second signal counts as the first: terminal and launcher both send
OUT_OF_MEMORY = re.compile("out of memory|can't allocate|not enough memory|ALLOC_FAILED")
PEER_ENDED = re.compile("gloo|NCCL|ProcessGroup|Connection (closed|reset) by peer")


class UserError(Exception):
    """An error that the user can fix, such as a missing dataset or a damaged checkpoint."""

    exit_code = 1


class ConfigError(UserError):
    """A config value that is not allowed."""

    exit_code = 2


class NotFinite(Exception):
    """Raised for a non-finite loss or gradient; holds the step metrics and learning rate."""

    def __init__(self, step_metrics: dict[str, float], learning_rate: float) -> None:
        super().__init__("not finite")
        self.step_metrics, self.learning_rate = step_metrics, learning_rate


class Stopped(Exception):
    """The process was asked to end by SIGTERM or SIGINT."""

    def __init__(self, number: int, message: str = "") -> None:
        super().__init__(f"stopped by {signal.Signals(number).name}{message}")
        self.number = number
        self.exit_code = 128 + number


class StopSignals:
    """Record SIGTERM and SIGINT in the block; one a second later or more ends the process.

    A pre-emption by SLURM is a SIGTERM. A thread reads the signals: Python's own handlers wait for
    the main thread, which a backward pass keeps for a whole step. A launcher's signal reaches the
    ranks at different moments; `agree` (the maximum over the ranks) makes all stop at one step.
    """

    received: int | None = None

    def __init__(self, agree: Callable[[int], int] = lambda number: number) -> None:
        self.agree = agree

    def __enter__(self) -> "StopSignals":
        self._before = {}
        if threading.current_thread() is threading.main_thread():  # others may not set handlers
            reader, self._writer = socket.socketpair()
            self._writer.setblocking(False)
            self._fd = signal.set_wakeup_fd(self._writer.fileno())
            threading.Thread(target=self._listen, args=(reader,), daemon=True).start()
            for number in STOP:
                self._before[number] = signal.signal(number, lambda *_: None)
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        if self._before:
            signal.set_wakeup_fd(self._fd)
            self._writer.close()

    def _listen(self, reader: socket.socket) -> None:
        with reader:
            while number := reader.recv(1):  # empty: the block has ended
                if number[0] not in STOP:
                    continue
                if self.received is None:
                    self.received, first = number[0], time.monotonic()
                elif time.monotonic() - first > TWICE:
                    os._exit(128 + number[0])

    def noted(self) -> int:
        """The signal received, or 0. Under torchrun a collective: every rank must call it."""
        return self.agree(self.received or 0)

    def check(self) -> None:
        """Raise Stopped if a signal was received."""
        if number := self.noted():
            raise Stopped(number)


def out_of_memory(error: BaseException | None) -> str | None:
    """What was asked for, in words, if memory of the host or a GPU was used up; else None.

    Most of torch's errors have no class of their own, and one that comes of cleaning up hides it.
    """
    while error is not None:
        sentences = [s for s in str(error).split(". ") if OUT_OF_MEMORY.search(s)]
        if sentences or isinstance(error, MemoryError):
            return f"out of memory ({(sentences or [str(error) or 'of the host'])[0]})"
        error = error.__context__
    return None


@contextmanager
def one_line_errors() -> Iterator[None]:
    """Print user, system and out-of-memory errors as one line on stderr, and exit with a code.

    Other exceptions keep their traceback.
    """
    logging.raiseExceptions = False  # a log on a full disk: the terminal still has the message
    try:
        yield
    except UserError as error:
        _end("error: " + " ".join(str(error).split()), error.exit_code)
    except Stopped as stopped:
        _end(str(stopped), stopped.exit_code)
    except (MemoryError, RuntimeError) as error:  # torch's own on CUDA alone has a class
        if "RANK" in os.environ and PEER_ENDED.search(str(error)):
            _end(f"error: another rank has ended ({str(error).splitlines()[0][:200]})", 1)
        if (what := out_of_memory(error)) is None:
            raise
        _end(f"error: {what}: this machine has too little for it", 1)
    except OSError as error:
        _end(f"error: {error.filename or 'system'}: {error.strerror or error}", 1)
    except KeyboardInterrupt:
        _end("stopped by SIGINT", 128 + signal.SIGINT)


def _end(line: str, exit_code: int) -> None:
    rank = os.environ.get("RANK", "0")  # of torchrun
    print(line if rank == "0" else f"rank {rank}: {line}", file=sys.stderr)
    sys.exit(exit_code)
