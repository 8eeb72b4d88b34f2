"""How a process ends early: a user's mistake or a signal, in one line on stderr, no traceback."""

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
TWICE = 1.0  # seconds in which a signal is the same one again: of the terminal and of a launcher
OUT_OF_MEMORY = re.compile("out of memory|can't allocate memory")
PEER_ENDED = re.compile("gloo|NCCL|ProcessGroup|Connection (closed|reset) by peer")


class UserError(Exception):
    """Something the user can mend: data or a checkpoint that is missing, damaged or foreign."""

    exit_code = 1


class ConfigError(UserError):
    """A config value that is not allowed."""

    exit_code = 2


class NotFinite(Exception):
    """A training step whose loss or gradient is not finite, and what it returned."""

    def __init__(self, values: dict[str, float]) -> None:
        super().__init__("not finite")
        self.values = values


class Stopped(Exception):
    """The process was asked to end by SIGTERM or SIGINT."""

    def __init__(self, number: int, message: str = "") -> None:
        super().__init__(f"stopped by {signal.Signals(number).name}{message}")
        self.number = number
        self.exit_code = 128 + number


class StopSignals:
    """Within the block a SIGTERM or SIGINT is noted, and one a second later ends the process.

    A pre-emption by SLURM is a SIGTERM. A thread reads the signals: Python's own handlers wait for
    the main thread, which a backward pass keeps for a whole step. Of several processes, to which
    a launcher's signal comes at different moments, all obey the one that `agree` gives them.
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
        """The signal that there was, or 0; all processes must ask equally often."""
        return self.agree(self.received or 0)

    def check(self) -> None:
        """Raise Stopped if there was a signal."""
        if number := self.noted():
            raise Stopped(number)


@contextmanager
def one_line_errors() -> Iterator[None]:
    """Turn these into one line on stderr and an exit code; a bug keeps its traceback, but for an
    OSError, which is the system's word."""
    logging.raiseExceptions = False  # on a full disk the terminal has what the log has not
    try:
        yield
    except UserError as error:
        _end("error: " + " ".join(str(error).split()), error.exit_code)
    except Stopped as stopped:
        _end(str(stopped), stopped.exit_code)
    except (MemoryError, RuntimeError) as error:  # torch's own on CUDA alone has a class
        if "RANK" in os.environ and PEER_ENDED.search(str(error)):
            _end(f"error: another process has ended ({str(error).splitlines()[0][:200]})", 1)
        if not isinstance(error, MemoryError) and not OUT_OF_MEMORY.search(str(error)):
            raise
        what = str(error).split(". ")[0]
        _end(f"error: out of memory ({what}): lower batch_size, or take fewer or smaller images", 1)
    except OSError as error:
        _end(f"error: {error.filename or 'system'}: {error.strerror or error}", 1)
    except KeyboardInterrupt:
        _end("stopped by SIGINT", 128 + signal.SIGINT)


def _end(line: str, exit_code: int) -> None:
    rank = os.environ.get("RANK", "0")  # of torchrun
    print(line if rank == "0" else f"process {rank}: {line}", file=sys.stderr)
    sys.exit(exit_code)
