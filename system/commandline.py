"""The command line, which Hydra reads: paths as typed, refusals in one line, and Python 3.14."""

import difflib
import os
import re
import sys
from argparse import Action, ArgumentParser
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from functools import wraps
from pathlib import Path
from traceback import extract_tb
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, QuotedString
from hydra.errors import HydraException, MissingConfigException, OverrideParseException

from system.errors import ConfigError, UserError, one_line_errors
from system.sweeps import listing_failures

# Keys whose value is a path, which may have characters of Hydra's grammar.
PATH_KEYS = ("data_dir", "init", "checkpoint", "predict", "hydra.run.dir", "hydra.sweep.dir")


def run_command(main: Callable[[], Any], keys: Iterable[str]) -> None:
    """Run a script's main function under Hydra; what Hydra refuses is one line too."""
    os.environ["HYDRA_FULL_ERROR"] = "1"  # raise, where it would print several lines
    sweep = bool({"-m", "--multirun", "hydra.mode=MULTIRUN"} & {*sys.argv})
    sys.argv[1:] = (quote_path(argument, sweep) for argument in sys.argv[1:])
    with one_line_errors(), listing_failures(), refusals(keys, sys.argv[1:]):
        main()


def quote_path(override: str, sweep: bool = False) -> str:
    """The override, in Hydra's quotes if it is a path that Hydra would not read as typed.

    What is quoted already, null, and several values of a sweep stay as they are.
    """
    key, equals, value = override.partition("=")
    if not equals or key.lstrip("+") not in PATH_KEYS:
        return override
    with suppress(HydraException):
        parsed = OverridesParser.create().parse_override(override)
        if _is_as_typed(parsed, value) or (sweep and parsed.is_sweep_override()):
            return override
    escaped = re.sub(r"(\\*)('|$)", lambda m: 2 * m[1] + m[2].replace("'", r"\'"), value)
    return f"{key}='{escaped}'"


def _is_as_typed(parsed: Override, value: str) -> bool:
    if parsed.is_sweep_override():
        return False
    return parsed.value() in (value, None) or isinstance(parsed._value, QuotedString)


@contextmanager
def refusals(keys: Iterable[str], overrides: list[str]) -> Iterator[None]:
    """Turn what Hydra refuses in the block into ConfigError; `keys` are those of the config.

    Several recipes at once are refused here: Hydra would mix them under the name of the last.
    """
    for override in overrides:
        if override.startswith("recipe=["):
            raise ConfigError(f"{override}: must be the name of one recipe")
    try:
        yield
    except HydraException as error:
        raise ConfigError(describe_refusal(error, keys)) from None
    except Exception as error:  # of many types, for what concerns Hydra's own block
        if isinstance(error, UserError) or not _raised_by_hydra(error):
            raise
        key = getattr(error, "full_key", None) or "hydra"
        raise ConfigError(f"{key}: {str(error) or type(error).__name__}") from None


def _raised_by_hydra(error: Exception) -> bool:
    """Whether none of our code was running, in which the same error is a bug."""
    ours = Path(__file__).parents[1]
    for frame in reversed(extract_tb(error.__traceback__)):
        path = Path(frame.filename)
        if "hydra" in path.parts:
            return True
        if ours in path.parents and "site-packages" not in path.parts:
            return False
    return False


def describe_refusal(error: HydraException, keys: Iterable[str]) -> str:
    """What is wrong with the command line, and what is allowed."""
    if isinstance(error, OverrideParseException):
        reason = str(error.message).splitlines()[0]
        return f"{error.override}: must be key=value, such as seed=1 or protocols=[knn] ({reason})"
    if isinstance(error, MissingConfigException) and error.options:
        group, _, name = str(error.missing_cfg_file).rpartition("/")
        return f"{group}={name}: must be one of {', '.join(error.options)}"
    key = getattr(error.__cause__, "full_key", None)  # of OmegaConf's error
    if isinstance(key, str) and key not in keys:
        return no_such_key(key, keys)
    return str(error)


def no_such_key(key: str, keys: Iterable[str]) -> str:
    """The message for a key that is not in the config."""
    if key.startswith("hydra."):
        return f"{key}: no such key"
    near = difflib.get_close_matches(key, keys, n=1)
    hint = f"did you mean {near[0]}? " if near else ""
    return f"{key}: no such key; {hint}there are {', '.join(keys)}"


def skip_check_of_lazy_help() -> None:
    """Let Hydra start where argparse checks help texts as they are registered (Python 3.14).

    Hydra up to 1.3.8 registers one that is no string but is made when printed (hydra issue 3121).
    """
    check = getattr(ArgumentParser, "_check_help", None)
    if check is not None and not hasattr(check, "__wrapped__"):

        @wraps(check)
        def check_strings(parser: ArgumentParser, action: Action) -> None:
            if isinstance(action.help, str):
                check(parser, action)

        ArgumentParser._check_help = check_strings


def run_directory() -> Path:
    """Hydra's output directory, relative to the working directory where it lies below it."""
    run_dir = Path(HydraConfig.get().runtime.output_dir)
    return run_dir.relative_to(Path.cwd()) if run_dir.is_relative_to(Path.cwd()) else run_dir
