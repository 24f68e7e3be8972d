"""The pickle machine, with nothing behind it: instructions build plain containers and inert stand-ins.

Nothing that a file names is imported or called. Where Python's machine would call something, a `Standin` takes note
of what would have been called; the few names that a checkpoint cannot do without (a tensor's parts, an ordered
dictionary) are understood here, by code of ours. Every length is checked against the bytes that remain, and a budget
bounds the memory that instructions can ask for.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from diffusers_ddpm_ext.compvis.reader.opcodes import TABLE
from diffusers_ddpm_ext.compvis.reader.pickle_machine import Machine, Makers, Name, Standin, UnreadableCheckpoint

__all__ = ["Makers", "Name", "Standin", "Unpickled", "UnreadableCheckpoint", "unpickle"]

MOST_INSTRUCTIONS = 5_000_000


@dataclass
class Unpickled:
    """A pickle's value.

    Attributes:
        value: plain containers, numbers, text and stand-ins.
        end: number of bytes that it took.
    """

    value: Any
    end: int


def unpickle(
    data: bytes | memoryview,
    persistent: Callable[[Any], Any] | None = None,
    makers: Makers | None = None,
    start: int = 0,
) -> Unpickled:
    """Run a pickle on the machine.

    Args:
        data: that holds it.
        persistent: gives the value of a persistent id; without it an id is refused.
        makers: what to do with calls that are understood: (module, name) to a function of the arguments.
        start: of the pickle in the data.

    Returns:
        Its value, and where it ends.

    Raises:
        UnreadableCheckpoint: it is damaged, or asks for what no checkpoint needs.
    """
    machine = Machine(data, persistent, makers or {}, start)
    try:
        return _run(machine)
    except UnreadableCheckpoint:
        raise
    except (IndexError, KeyError, TypeError, ValueError, OverflowError, RecursionError, struct.error) as error:
        raise UnreadableCheckpoint(
            f"The pickle in it is damaged at byte {machine.at}: {type(error).__name__}."
        ) from None


def _run(machine: Machine) -> Unpickled:
    data, table = machine.data, TABLE
    for _ in range(MOST_INSTRUCTIONS):
        if machine.at >= len(data):
            raise UnreadableCheckpoint("The pickle in it is cut off: the file is incomplete.")
        code = data[machine.at]
        machine.at += 1
        if code == 0x2E:  # STOP
            return Unpickled(machine.pop(), machine.at)
        instruction = table.get(code)
        if instruction is None:
            raise UnreadableCheckpoint(
                f"The pickle in it is damaged: byte {machine.at - 1} ({code:#04x}) is no instruction."
            )
        instruction(machine)
    raise UnreadableCheckpoint(f"The pickle in it has more than {MOST_INSTRUCTIONS:,} instructions: no checkpoint.")
