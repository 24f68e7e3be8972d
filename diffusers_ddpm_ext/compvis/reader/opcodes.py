"""The instructions of the pickle machine, by their bytes (protocols 0 to 5)."""

from __future__ import annotations

import codecs
import struct
from collections.abc import Callable
from typing import Any

from diffusers_ddpm_ext.compvis.reader.pickle_machine import Machine, Name, Standin, UnreadableCheckpoint

PROTOCOLS = range(6)


def _proto(machine: Machine) -> None:
    version = machine.take(1)[0]
    if version not in PROTOCOLS:
        raise UnreadableCheckpoint(f"The pickle in it is of protocol {version}, which is not known.")


def _frame(machine: Machine) -> None:
    size = machine.number("<Q")
    if size > len(machine.data) - machine.at:
        raise UnreadableCheckpoint("The pickle in it is cut off: a frame is incomplete.")


def _int(machine: Machine) -> None:
    line = machine.line()
    machine.push({b"00": False, b"01": True}.get(line) if line in (b"00", b"01") else int(line))


def _long(machine: Machine) -> None:
    machine.push(int(machine.line().rstrip(b"L")))


def _long_bytes(layout: str) -> Callable[[Machine], None]:
    def read(machine: Machine) -> None:
        count = machine.number(layout)
        machine.push(int.from_bytes(machine.take(count), "little", signed=True), 32 + max(count, 0))

    return read


def _string(machine: Machine) -> None:
    line = machine.line().strip()
    if len(line) < 2 or line[:1] != line[-1:] or line[:1] not in (b"'", b'"'):
        raise UnreadableCheckpoint("The pickle in it is damaged: a text has no quotes.")
    machine.push(codecs.escape_decode(line[1:-1])[0].decode("latin-1"), 64)


def _latin(layout: str) -> Callable[[Machine], None]:
    def read(machine: Machine) -> None:
        count = machine.number(layout)
        machine.spend(max(count, 0))
        machine.push(bytes(machine.take(count)).decode("latin-1"), 64)

    return read


def _mark(machine: Machine) -> None:
    machine.spend(8)
    machine.marks.append(len(machine.stack))


def _pop(machine: Machine) -> None:
    if machine.marks and machine.marks[-1] == len(machine.stack):
        machine.marks.pop()
    else:
        machine.pop()


def _pop_mark(machine: Machine) -> None:
    machine.group()


def _tuple(count: int) -> Callable[[Machine], None]:
    def make(machine: Machine) -> None:
        parts = [machine.pop() for _ in range(count)]
        machine.push(tuple(reversed(parts)), 64)

    return make


def _gathered(make: Callable[[list[Any]], Any]) -> Callable[[Machine], None]:
    def gather(machine: Machine) -> None:
        parts = machine.group()
        machine.push(make(parts), 64 + 8 * len(parts))

    return gather


def _dict(machine: Machine) -> None:
    pairs = machine.group()
    machine.push({}, 64)
    machine.set_items(pairs)


def _global(machine: Machine) -> None:
    module, name = machine.line(), machine.line()
    machine.named(module.decode("utf-8"), name.decode("utf-8"))


def _stack_global(machine: Machine) -> None:
    name, module = machine.pop(), machine.pop()
    if not (isinstance(module, str) and isinstance(name, str)):
        raise UnreadableCheckpoint("The pickle in it is damaged: a name is no text.")
    machine.named(module, name)


def _reduce(machine: Machine) -> None:
    arguments, function = machine.pop(), machine.pop()
    machine.call(function, arguments)


def _new_ex(machine: Machine) -> None:
    named, arguments, kind = machine.pop(), machine.pop(), machine.pop()
    if not isinstance(named, dict) or not isinstance(arguments, tuple):
        raise UnreadableCheckpoint("The pickle in it is damaged: arguments are no tuple.")
    machine.push(Standin(kind, (*arguments, named) if named else arguments), 400 + 8 * len(arguments))


def _inst(machine: Machine) -> None:
    module, name = machine.line().decode("utf-8"), machine.line().decode("utf-8")
    machine.call(Name(module, name), tuple(machine.group()))


def _obj(machine: Machine) -> None:
    parts = machine.group()
    if not parts:
        raise UnreadableCheckpoint("The pickle in it is damaged: an object has no class.")
    machine.call(parts[0], tuple(parts[1:]))


def _set_item(machine: Machine) -> None:
    value, key = machine.pop(), machine.pop()
    machine.set_items([key, value])


def _extension(machine: Machine) -> None:
    raise UnreadableCheckpoint("The pickle in it uses extension codes: no checkpoint does.")


def _buffer(machine: Machine) -> None:
    raise UnreadableCheckpoint("The pickle in it refers to buffers outside of it: no checkpoint does.")


def _constant(value: Any, cost: int = 8) -> Callable[[Machine], None]:
    return lambda machine: machine.push(value, cost)


TABLE: dict[int, Callable[[Machine], None]] = {
    0x80: _proto,
    0x95: _frame,
    ord("N"): _constant(None),
    0x88: _constant(True),
    0x89: _constant(False),
    ord("I"): _int,
    ord("L"): _long,
    ord("J"): lambda machine: machine.push(machine.number("<i")),
    ord("K"): lambda machine: machine.push(machine.number("<B")),
    ord("M"): lambda machine: machine.push(machine.number("<H")),
    0x8A: _long_bytes("<B"),
    0x8B: _long_bytes("<i"),
    ord("F"): lambda machine: machine.push(float(machine.line())),
    ord("G"): lambda machine: machine.push(struct.unpack(">d", machine.take(8))[0]),
    ord("S"): _string,
    ord("T"): _latin("<i"),
    ord("U"): _latin("<B"),
    ord("V"): lambda machine: machine.push(machine.line().decode("raw-unicode-escape"), 64),
    ord("X"): lambda machine: machine.text(machine.number("<I")),
    0x8C: lambda machine: machine.text(machine.number("<B")),
    0x8D: lambda machine: machine.text(machine.number("<Q")),
    ord("B"): lambda machine: machine.plain(machine.number("<I")),
    ord("C"): lambda machine: machine.plain(machine.number("<B")),
    0x8E: lambda machine: machine.plain(machine.number("<Q")),
    0x96: lambda machine: machine.plain(machine.number("<Q")),
    ord("("): _mark,
    ord("0"): _pop,
    ord("1"): _pop_mark,
    ord("2"): lambda machine: machine.push(machine.top(), 8),
    ord(")"): _constant(()),
    0x85: _tuple(1),
    0x86: _tuple(2),
    0x87: _tuple(3),
    ord("t"): _gathered(tuple),
    ord("]"): lambda machine: machine.push([], 64),
    ord("l"): _gathered(list),
    ord("a"): lambda machine: machine.add_items([machine.pop()]),
    ord("e"): lambda machine: machine.add_items(machine.group()),
    ord("}"): lambda machine: machine.push({}, 64),
    ord("d"): _dict,
    ord("s"): _set_item,
    ord("u"): lambda machine: machine.set_items(machine.group()),
    0x8F: lambda machine: machine.push([], 64),  # a set, as a list
    0x90: lambda machine: machine.add_items(machine.group()),
    0x91: _gathered(list),
    ord("c"): _global,
    0x93: _stack_global,
    ord("R"): _reduce,
    0x81: _reduce,
    0x92: _new_ex,
    ord("i"): _inst,
    ord("o"): _obj,
    ord("b"): lambda machine: machine.build(),
    ord("p"): lambda machine: machine.remember(int(machine.line())),
    ord("q"): lambda machine: machine.remember(machine.number("<B")),
    ord("r"): lambda machine: machine.remember(machine.number("<I")),
    0x94: lambda machine: machine.remember(len(machine.memo)),
    ord("g"): lambda machine: machine.recall(int(machine.line())),
    ord("h"): lambda machine: machine.recall(machine.number("<B")),
    ord("j"): lambda machine: machine.recall(machine.number("<I")),
    ord("P"): lambda machine: machine.persist(machine.line().decode("latin-1")),
    ord("Q"): lambda machine: machine.persist(machine.pop()),
    0x82: _extension,
    0x83: _extension,
    0x84: _extension,
    0x97: _buffer,
    0x98: _buffer,
}
