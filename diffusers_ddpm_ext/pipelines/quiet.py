"""Diffusers without its bars and warnings, for commands that speak for themselves."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def quiet_diffusers() -> Iterator[None]:
    """Keep Diffusers' bars and warnings back while a pipeline is read: what is wrong, we say.

    Yields:
        Nothing.
    """
    from diffusers.utils import logging

    level = logging.get_verbosity()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        logging.enable_progress_bar()
