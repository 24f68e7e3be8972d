"""Instructions of the pickle machine by opcode (protocols 0 to 5)."""

from __future__ import annotations

import codecs
import struct
from collections.abc import Callable
from typing import Any

from diffusers_ddpm_ext.compvis.reader.pickle_machine import GlobalName, PickleMachine, StandIn, UnreadableCheckpoint

PROTOCOLS = range(6)


def _proto(machine: PickleMachine) -> None:
    version = machine.read(1)[0]
    if version not in PROTOCOLS:
        raise UnreadableCheckpoint(f"Its pickle has the unknown protocol {version}.")


def _frame(machine: PickleMachine) -> None:
    size = machine.read_number("<Q")
    if size > len(machine.data) - machine.at:
        raise UnreadableCheckpoint("Its pickle is truncated: a frame is incomplete.")


def _int(machine: PickleMachine) -> None:
    line = machine.read_line()
    machine.push({b"00": False, b"01": True}.get(line) if line in (b"00", b"01") else int(line))


def _long(machine: PickleMachine) -> None:
    machine.push(int(machine.read_line().rstrip(b"L")))


def _long_bytes(layout: str) -> Callable[[PickleMachine], None]:
    def read(machine: PickleMachine) -> None:
        count = machine.read_number(layout)
        machine.push(int.from_bytes(machine.read(count), "little", signed=True), 32 + max(count, 0))

    return read


def _string(machine: PickleMachine) -> None:
    line = machine.read_line().strip()
    if len(line) < 2 or line[:1] != line[-1:] or line[:1] not in (b"'", b'"'):
        raise UnreadableCheckpoint("Its pickle is damaged: a string has no quotes.")
    machine.push(codecs.escape_decode(line[1:-1])[0].decode("latin-1"), 64)


def _latin1(layout: str) -> Callable[[PickleMachine], None]:
    def read(machine: PickleMachine) -> None:
        count = machine.read_number(layout)
        machine.charge(max(count, 0))
        machine.push(bytes(machine.read(count)).decode("latin-1"), 64)

    return read


def _mark(machine: PickleMachine) -> None:
    machine.charge(8)
    machine.marks.append(len(machine.stack))


def _pop(machine: PickleMachine) -> None:
    if machine.marks and machine.marks[-1] == len(machine.stack):
        machine.marks.pop()
    else:
        machine.pop()


def _pop_to_mark(machine: PickleMachine) -> None:
    machine.pop_to_mark()


def _tuple(count: int) -> Callable[[PickleMachine], None]:
    def make(machine: PickleMachine) -> None:
        values = [machine.pop() for _ in range(count)]
        machine.push(tuple(reversed(values)), 64)

    return make


def _to_mark(make: Callable[[list[Any]], Any]) -> Callable[[PickleMachine], None]:
    def run(machine: PickleMachine) -> None:
        values = machine.pop_to_mark()
        machine.push(make(values), 64 + 8 * len(values))

    return run


def _dict(machine: PickleMachine) -> None:
    pairs = machine.pop_to_mark()
    machine.push({}, 64)
    machine.set_items(pairs)


def _global(machine: PickleMachine) -> None:
    module, name = machine.read_line(), machine.read_line()
    machine.push_global(module.decode("utf-8"), name.decode("utf-8"))


def _stack_global(machine: PickleMachine) -> None:
    name, module = machine.pop(), machine.pop()
    if not (isinstance(module, str) and isinstance(name, str)):
        raise UnreadableCheckpoint("Its pickle is damaged: a name is not a string.")
    machine.push_global(module, name)


def _reduce(machine: PickleMachine) -> None:
    arguments, function = machine.pop(), machine.pop()
    machine.push_call(function, arguments)


def _new_ex(machine: PickleMachine) -> None:
    keywords, arguments, cls = machine.pop(), machine.pop(), machine.pop()
    if not isinstance(keywords, dict) or not isinstance(arguments, tuple):
        raise UnreadableCheckpoint("Its pickle is damaged: arguments are not a tuple.")
    machine.push(StandIn(cls, (*arguments, keywords) if keywords else arguments), 400 + 8 * len(arguments))


def _inst(machine: PickleMachine) -> None:
    module, name = machine.read_line().decode("utf-8"), machine.read_line().decode("utf-8")
    machine.push_call(GlobalName(module, name), tuple(machine.pop_to_mark()))


def _obj(machine: PickleMachine) -> None:
    values = machine.pop_to_mark()
    if not values:
        raise UnreadableCheckpoint("Its pickle is damaged: an object has no class.")
    machine.push_call(values[0], tuple(values[1:]))


def _set_item(machine: PickleMachine) -> None:
    value, key = machine.pop(), machine.pop()
    machine.set_items([key, value])


def _refuse(what: str) -> Callable[[PickleMachine], None]:
    def refuse(machine: PickleMachine) -> None:
        raise UnreadableCheckpoint(f"Its pickle {what}, as no checkpoint does.")

    return refuse


def _constant(value: Any, cost: int = 8) -> Callable[[PickleMachine], None]:
    return lambda machine: machine.push(value, cost)


INSTRUCTIONS: dict[int, Callable[[PickleMachine], None]] = {
    0x80: _proto,
    0x95: _frame,
    ord("N"): _constant(None),
    0x88: _constant(True),
    0x89: _constant(False),
    ord("I"): _int,
    ord("L"): _long,
    ord("J"): lambda machine: machine.push(machine.read_number("<i")),
    ord("K"): lambda machine: machine.push(machine.read_number("<B")),
    ord("M"): lambda machine: machine.push(machine.read_number("<H")),
    0x8A: _long_bytes("<B"),
    0x8B: _long_bytes("<i"),
    ord("F"): lambda machine: machine.push(float(machine.read_line())),
    ord("G"): lambda machine: machine.push(struct.unpack(">d", machine.read(8))[0]),
    ord("S"): _string,
    ord("T"): _latin1("<i"),
    ord("U"): _latin1("<B"),
    ord("V"): lambda machine: machine.push(machine.read_line().decode("raw-unicode-escape"), 64),
    ord("X"): lambda machine: machine.push_text(machine.read_number("<I")),
    0x8C: lambda machine: machine.push_text(machine.read_number("<B")),
    0x8D: lambda machine: machine.push_text(machine.read_number("<Q")),
    ord("B"): lambda machine: machine.push_bytes(machine.read_number("<I")),
    ord("C"): lambda machine: machine.push_bytes(machine.read_number("<B")),
    0x8E: lambda machine: machine.push_bytes(machine.read_number("<Q")),
    0x96: lambda machine: machine.push_bytes(machine.read_number("<Q")),
    ord("("): _mark,
    ord("0"): _pop,
    ord("1"): _pop_to_mark,
    ord("2"): lambda machine: machine.push(machine.top(), 8),
    ord(")"): _constant(()),
    0x85: _tuple(1),
    0x86: _tuple(2),
    0x87: _tuple(3),
    ord("t"): _to_mark(tuple),
    ord("]"): lambda machine: machine.push([], 64),
    ord("l"): _to_mark(list),
    ord("a"): lambda machine: machine.add_items([machine.pop()]),
    ord("e"): lambda machine: machine.add_items(machine.pop_to_mark()),
    ord("}"): lambda machine: machine.push({}, 64),
    ord("d"): _dict,
    ord("s"): _set_item,
    ord("u"): lambda machine: machine.set_items(machine.pop_to_mark()),
    0x8F: lambda machine: machine.push([], 64),  # a set, as a list
    0x90: lambda machine: machine.add_items(machine.pop_to_mark()),
    0x91: _to_mark(list),
    ord("c"): _global,
    0x93: _stack_global,
    ord("R"): _reduce,
    0x81: _reduce,
    0x92: _new_ex,
    ord("i"): _inst,
    ord("o"): _obj,
    ord("b"): lambda machine: machine.build(),
    ord("p"): lambda machine: machine.memoize(int(machine.read_line())),
    ord("q"): lambda machine: machine.memoize(machine.read_number("<B")),
    ord("r"): lambda machine: machine.memoize(machine.read_number("<I")),
    0x94: lambda machine: machine.memoize(len(machine.memo)),
    ord("g"): lambda machine: machine.push_memo(int(machine.read_line())),
    ord("h"): lambda machine: machine.push_memo(machine.read_number("<B")),
    ord("j"): lambda machine: machine.push_memo(machine.read_number("<I")),
    ord("P"): lambda machine: machine.push_persistent(machine.read_line().decode("latin-1")),
    ord("Q"): lambda machine: machine.push_persistent(machine.pop()),
    0x82: _refuse("uses extension codes"),
    0x83: _refuse("uses extension codes"),
    0x84: _refuse("uses extension codes"),
    0x97: _refuse("refers to buffers outside of it"),
    0x98: _refuse("refers to buffers outside of it"),
}
