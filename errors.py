"""How a process ends early: a user's mistake or a signal, in one line on stderr, no traceback."""

import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


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
    """Within the block the first SIGTERM or SIGINT is noted, the second ends the process at once.

    A pre-emption by SLURM is a SIGTERM.
    """

    received: int | None = None

    def __enter__(self) -> "StopSignals":
        self._before = {}
        if threading.current_thread() is threading.main_thread():  # others may not set handlers
            for number in (signal.SIGTERM, signal.SIGINT):
                self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.received = number
        for each in self._before:
            signal.signal(each, signal.SIG_DFL)

    def check(self) -> None:
        """Raise Stopped if there was a signal."""
        if self.received is not None:
            raise Stopped(self.received)


@contextmanager
def one_line_errors() -> Iterator[None]:
    """Turn these into one line on stderr and an exit code; a bug keeps its traceback."""
    try:
        yield
    except UserError as error:
        _end("error: " + " ".join(str(error).split()), error.exit_code)
    except Stopped as stopped:
        _end(str(stopped), stopped.exit_code)
    except KeyboardInterrupt:
        _end("stopped by SIGINT", 128 + signal.SIGINT)


def _end(line: str, exit_code: int) -> None:
    print(line, file=sys.stderr)
    sys.exit(exit_code)
