"""Accelerate keeps device and precision for the life of a process; tests begin and end without them."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from accelerate.state import AcceleratorState, GradientState


def reset_accelerate() -> None:
    """Forget device, precision and accumulation."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


@pytest.fixture(autouse=True)
def fresh_accelerate() -> Iterator[None]:
    """For every test of a module that imports it."""
    reset_accelerate()
    yield
    reset_accelerate()
