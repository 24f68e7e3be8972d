"""Unpickling without execution: instructions build plain containers and inert stand-ins.

Nothing that a file names is imported or called. Where Python's unpickler would call something, a `StandIn` records the
call; the few names that a checkpoint needs (parts of a tensor, an ordered dictionary) are handled here, by our own
code. Every length is checked against the remaining bytes, and a budget bounds the memory that instructions can use.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from diffusers_ddpm_ext.compvis.reader.opcodes import INSTRUCTIONS
from diffusers_ddpm_ext.compvis.reader.pickle_machine import Constructors, PickleMachine, UnreadableCheckpoint

MAX_INSTRUCTIONS = 5_000_000


@dataclass
class Unpickled:
    """A pickle's value: plain containers, numbers, text and stand-ins; and the offset of its end."""

    value: Any
    end: int


def unpickle(
    data: bytes | memoryview,
    persistent: Callable[[Any], Any] | None = None,
    constructors: Constructors | None = None,
    start: int = 0,
) -> Unpickled:
    """Run a pickle on the machine; the arguments are those of `PickleMachine`.

    Raises:
        UnreadableCheckpoint: it is damaged, or requests something that no checkpoint needs.
    """
    machine = PickleMachine(data, persistent, constructors or {}, start)
    try:
        return _run(machine)
    except UnreadableCheckpoint:
        raise
    except (IndexError, KeyError, TypeError, ValueError, OverflowError, RecursionError, struct.error) as error:
        raise UnreadableCheckpoint(f"Its pickle is damaged at byte {machine.at}: {type(error).__name__}.") from None


def _run(machine: PickleMachine) -> Unpickled:
    data, instructions = machine.data, INSTRUCTIONS
    for _ in range(MAX_INSTRUCTIONS):
        if machine.at >= len(data):
            raise UnreadableCheckpoint("Its pickle is truncated: the file is incomplete.")
        code = data[machine.at]
        machine.at += 1
        if code == 0x2E:  # STOP
            return Unpickled(machine.pop(), machine.at)
        instruction = instructions.get(code)
        if instruction is None:
            raise UnreadableCheckpoint(
                f"Its pickle is damaged: byte {machine.at - 1} ({code:#04x}) is not an instruction."
            )
        instruction(machine)
    raise UnreadableCheckpoint(f"Its pickle has more than {MAX_INSTRUCTIONS:,} instructions, as no checkpoint has.")
