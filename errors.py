"""A user's mistakes: one line on stderr and an exit code, no traceback."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager


class UserError(Exception):
    """Something the user can mend: data or a checkpoint that is missing, damaged or foreign."""

    exit_code = 1


class ConfigError(UserError):
    """A config value that is not allowed."""

    exit_code = 2


@contextmanager
def one_line_errors() -> Iterator[None]:
    """Turn a UserError into one line on stderr and its exit code; a bug keeps its traceback."""
    try:
        yield
    except UserError as error:
        print("error: " + " ".join(str(error).split()), file=sys.stderr)
        sys.exit(error.exit_code)
