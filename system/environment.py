"""Environment variables. Import this module first: torch and others read theirs when imported.

A variable that is set but empty, as a container's or a job script's often is, counts as not set.
"""

import os
import re
import sys
from traceback import walk_tb
from types import TracebackType
from typing import NamedTuple

from system.errors import ConfigError

# Of these an empty value says something: no GPU, UTC, no proxy.
EMPTY_SAYS = ("_VISIBLE_DEVICES", "TZ", "_PROXY")
NEEDED = ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
ALONE = (
    "start the ranks with torchrun, which sets it, or one process alone with "
    "env -u WORLD_SIZE -u RANK python simclr.py"
)


def drop_empty() -> None:
    """Remove every variable whose value is empty or blank from this process and its children."""
    for name in [name for name, value in os.environ.items() if not value.strip()]:
        if not name.upper().endswith(EMPTY_SAYS):
            del os.environ[name]


def _excepthook(
    kind: type[BaseException], error: BaseException, trace: TracebackType | None
) -> None:
    """Say in one line that a package's import failed because of a variable, and of which."""
    names = [frame.f_code.co_name for frame, _ in walk_tb(trace)]
    if isinstance(error, ValueError) and "<module>" in names[1:]:  # [0] is the script
        said = " ".join(str(error).split())[:300]
        for name, value in os.environ.items():
            if re.search(rf"\b{re.escape(name)}\b", said) or repr(value) in said:
                line = f"error: the environment variable {name}={value}: {said}; unset {name}"
                print(line, file=sys.stderr)
                sys.exit(ConfigError.exit_code)
    sys.__excepthook__(kind, error, trace)


class Launch(NamedTuple):
    """What torchrun, or another launcher, tells one of several processes."""

    world_size: int = 1
    rank: int = 0
    local_rank: int = 0
    host: str = ""  # of rank 0, and a port there
    port: int = 0
    serves: bool = False  # whether this process has to serve a store at that port
    restarts: int = 0


def launch() -> Launch:
    """Read the launcher's variables; without WORLD_SIZE the others mean nothing.

    Raises ConfigError: the variable, its value and what is allowed.
    """
    if "WORLD_SIZE" not in os.environ or not os.environ["WORLD_SIZE"].strip():
        return Launch()
    world_size = _integer("WORLD_SIZE", 1, 10**6)
    missing = [name for name in NEEDED if not os.environ.get(name, "").strip()]
    if world_size > 1 and missing:
        raise ConfigError(f"WORLD_SIZE={world_size}, but not set: {', '.join(missing)}; {ALONE}")
    rank = _integer("RANK", 0, world_size - 1)
    return Launch(
        world_size,
        rank,
        _integer("LOCAL_RANK", 0, world_size - 1),
        os.environ.get("MASTER_ADDR", "").strip(),
        _integer("MASTER_PORT", 1, 65535),
        rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True",
        _integer("TORCHELASTIC_RESTART_COUNT", 0, 10**6),
    )


def _integer(name: str, low: int, high: int) -> int:
    value = os.environ.get(name, "").strip() or str(low)
    if not (value.isdecimal() and low <= int(value) <= high):
        raise ConfigError(
            f"the environment variable {name}={value}: must be an integer from {low} to {high}; "
            f"{ALONE}"
        )
    return int(value)


drop_empty()
sys.excepthook = _excepthook
