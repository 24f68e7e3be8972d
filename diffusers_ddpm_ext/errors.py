"""What can go wrong for a user: the two kinds that the command line tells apart, and what a run survives."""

from __future__ import annotations

import sys


class ConfigError(ValueError):
    """An option, a file or a folder that a person can put right before the run: one ``error:`` line, status 2."""


class RunError(RuntimeError):
    """A run that had started and could not go on (a loss that is not finite, a full disk): one line, status 1."""


class Interrupted(Exception):
    """Work that a signal broke off; it is done anew when the run goes on."""


def warn(text: str) -> None:
    """Tell a person, above the progress bar, of something that a run survives.

    Args:
        text: one sentence.
    """
    from tqdm.auto import tqdm  # not at the top: `--help` does not wait for it

    tqdm.write(f"warning: {text}", file=sys.stderr)
