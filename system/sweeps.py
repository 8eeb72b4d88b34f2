"""Sweeps (Hydra's multirun): a directory for each job, and the jobs that failed."""

import hashlib
import logging
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from traceback import clear_frames

from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig, OmegaConf

from system.errors import ConfigError, UserError, describe

log = logging.getLogger("simclr")

LONGEST = 120  # characters of a directory's name; file systems allow 143 (eCryptfs) to 255 bytes
FAILURES = ".failures.log"  # in the sweep's directory: a line for each failed job, by any launcher
LISTS = ("protocols", "baselines", "finetune_learning_rate", "finetune_weight_decay")
_started: list[tuple[Path, int]] = []  # that file, and its size when the sweep started


def directory_name(overrides: str) -> str:
    """A job's directory: its overrides, without characters of a shell or Hydra, and not too long.

    It ends with a hash of the overrides where something was replaced or cut off.
    """
    name = re.sub(r"[^\w.]+", "-", overrides, flags=re.ASCII).strip("-.")
    if name == overrides and len(name) <= LONGEST:
        return name
    digest = hashlib.sha256(overrides.encode(errors="surrogateescape")).hexdigest()
    return f"{name[: LONGEST - 9]}-{digest[:8]}"


def start_sweep(hydra: DictConfig) -> None:
    """Check a sweep before its first job; `hydra` is Hydra's own config.

    Raises ConfigError where two jobs would have one directory, and the last overwrite the others.
    """
    unnamed = set(hydra.job.config.override_dirname.exclude_keys) - {"labels"}  # names its results
    overrides = OverridesParser.create().parse_overrides([*hydra.overrides.task])
    swept = {str(o.key_or_group): str(o.input_line) for o in overrides if o.is_sweep_override()}
    swept |= {str(key): str(key) for key in OmegaConf.select(hydra, "sweeper.params") or {}}
    for key, override in swept.items():
        if key in unnamed:
            raise ConfigError(
                f"{override}: must not vary in a sweep, whose jobs would all write to one run "
                f"directory: start one command for each value{_as_list(key, override)}"
            )
    for override in overrides:
        values = list(override.sweep_string_iterator()) if override.is_discrete_sweep() else []
        if len(set(values)) < len(values):
            raise ConfigError(f"{override.input_line}: must not have a value twice")
    subdir = OmegaConf.to_container(hydra.sweep)["subdir"]
    if swept and "${" not in subdir:
        raise ConfigError(
            f"hydra.sweep.subdir={subdir}: must differ between jobs, as "
            "'${hydra.job.num}' does; left out, it is made of the overrides"
        )
    file = Path(hydra.sweep.dir) / FAILURES
    _started[:] = [(file, file.stat().st_size if file.is_file() else 0)]


def _as_list(key: str, override: str) -> str:
    values = override.partition("=")[2]
    return f", or give a list, {key}=[{values}], in one" if key in LISTS and values else ""


def note_failure(hydra: DictConfig, error: BaseException | None) -> None:
    """Log why the job failed, and add it to the list of its sweep; frees what its frames hold."""
    known = describe(error)
    reason = known[0] if known else " ".join(f"{type(error).__name__}: {error}".split())
    log.error(f"error: {reason}", exc_info=None if known else error)
    with open(Path(hydra.sweep.dir) / FAILURES, "a", encoding="utf-8", errors="replace") as file:
        file.write(f"{os.path.relpath(hydra.runtime.output_dir)}: {reason}\n")
    while error is not None:  # Hydra keeps it until the sweep ends: not with the job's tensors
        clear_frames(error.__traceback__)
        error = error.__context__


@contextmanager
def listing_failures() -> Iterator[None]:
    """List the failed jobs of a sweep that ran in the block.

    Raises UserError with their number instead of the first job's error, with its exit code.
    """
    try:
        yield
    except BaseException as error:
        if not (count := _list_failures()) or not isinstance(error, Exception):
            raise
        failed = UserError(
            f"{count} of the sweep's jobs failed; the same command repeats them and leaves the "
            "complete ones as they are"
        )
        failed.exit_code = (describe(error) or ("", 1))[1]
        raise failed from None
    else:
        _list_failures()  # which the sweeper allows


def _list_failures() -> int:
    lines: list[str] = []
    for file, size in _started:
        if file.is_file():
            lines = file.read_bytes()[size:].decode(errors="replace").splitlines()
    for line in lines:
        print(f"failed: {line}", file=sys.stderr)
    return len(lines)
