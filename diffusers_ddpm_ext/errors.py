"""Kinds of error that the command line tells apart, and warnings."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager


class ConfigError(ValueError):
    """A wrong option, file or folder that the user can correct before the run: one ``error:`` line, exit status 2."""


class RunError(RuntimeError):
    """A failure of a run that had started (a non-finite loss, a full disk): one ``error:`` line, exit status 1."""


class Interrupted(Exception):
    """Work stopped by a signal; it is repeated when the run resumes."""


def warn(text: str) -> None:
    """Print a warning to stderr, above the progress bar.

    Args:
        text: one sentence.
    """
    from tqdm.auto import tqdm  # not at the top: `--help` does not wait for it

    tqdm.write(f"warning: {text}", file=sys.stderr)


@contextmanager
def as_config_error(option: str = "") -> Iterator[None]:
    """Re-raise a library's error about a value as a ConfigError, on one line.

    Args:
        option: the option to name, unless the message names it already.

    Yields:
        Nothing.

    Raises:
        ConfigError: in place of a ValueError, TypeError, NotImplementedError or RuntimeError.
    """
    try:
        yield
    except ConfigError:
        raise
    except (ValueError, TypeError, NotImplementedError, RuntimeError) as error:
        text = " ".join(str(error).split())
        raise ConfigError(text if option in text else f"{option}: {text}") from error


@contextmanager
def as_run_error(path: object) -> Iterator[None]:
    """Re-raise an operating system's error as a RunError that names the file.

    Args:
        path: the file or folder to name, unless the error names one.

    Yields:
        Nothing.

    Raises:
        RunError: in place of an OSError.
    """
    try:
        yield
    except OSError as error:
        raise RunError(f"cannot write {error.filename or path}: {error.strerror or error}") from None
