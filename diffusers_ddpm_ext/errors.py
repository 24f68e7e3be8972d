"""Kinds of error that the command line tells apart; errors, warnings and names from outside on the terminal."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress


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

    tqdm.write(f"warning: {printable(text)}", file=sys.stderr)


def print_lines(text: str) -> None:
    """Write lines to standard output, at once; names from outside in them cannot control the terminal."""
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    sys.stdout.write(printable_lines(text).encode(encoding, "backslashreplace").decode(encoding))
    sys.stdout.flush()  # here, where an error can be reported


def print_error(error: object) -> None:
    """Print an ``error:`` line to stderr, on a line of its own below any progress bar."""
    tqdm = sys.modules.get("tqdm.std")
    for bar in list(getattr(getattr(tqdm, "tqdm", None), "_instances", ())):
        with suppress(Exception):  # a bar whose stream was closed
            bar.close()
    sys.stderr.write(f"error: {printable(' '.join(str(error).split()))}\n")


def printable(text: str, limit: int = 1000) -> str:
    """Text from outside as one line for a terminal.

    Control characters (ANSI sequences, line ends), characters that change the direction of writing, and bytes of file
    names that are not UTF-8 are escaped as in Python's source. Of a long text the middle is left out.

    Args:
        text: any text: a path, a key, a name.
        limit: the largest number of characters.
    """
    if len(text) > limit:
        text = f"{text[: limit // 2]} ... {text[-(limit // 2) :]}"
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)


def printable_lines(text: str) -> str:
    """`printable` for a text of several lines of any length: line ends and tabs stay."""
    return "\n".join("\t".join(printable(part, len(part)) for part in line.split("\t")) for line in text.split("\n"))


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
