"""Importing torch and Diffusers in a command, in three quarters of the time."""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def garbage_collector_paused() -> Iterator[None]:
    """Do not search for garbage while the body imports torch, and never again in what it imported.

    Some 4,000 modules make a million objects that stay to the end, and each search for cycles visits those that are
    there already: 1.2 of 5.1 seconds of the processor. Nothing changes where torch is already imported, so that the
    objects of a program that calls `main` are collected as before.
    """
    if "torch" in sys.modules or not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()
