"""Kinds of error that the command line tells apart, and warnings."""

from __future__ import annotations

import sys


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
