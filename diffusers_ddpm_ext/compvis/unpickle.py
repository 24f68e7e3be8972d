"""The pickle machine, with nothing behind it: instructions build plain containers and inert stand-ins.

Nothing that a file names is imported or called. Where Python's machine would call something, a `Standin` takes note
of what would have been called; the few names that a checkpoint cannot do without (a tensor's parts, an ordered
dictionary) are understood here, by code of ours. Every length is checked against the bytes that remain, and a budget
bounds the memory that instructions can ask for.
"""

from __future__ import annotations

import codecs
import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

MOST_INSTRUCTIONS = 5_000_000
MEMORY = 40 * 2**20  # bytes that instructions may build, beside as many as the file has
HEADLINE = 40  # bytes of a name that an error shows
SMALL_KEY = (
    2**31
)  # larger whole numbers, and fractions, are dictionary keys as text: their hashes can be made to collide
MOST_TUPLE_KEYS = 10_000
PROTOCOLS = range(6)


class UnreadableCheckpoint(ValueError):
    """A file that is no checkpoint, is damaged, or asks for what no checkpoint needs; one sentence."""


@dataclass(frozen=True)
class Name:
    """A class or function that a file names. It is never looked up."""

    module: str
    name: str

    def __str__(self) -> str:
        return f"{self.module}.{self.name}"[:HEADLINE]


@dataclass(eq=False)
class Standin:
    """What would have been made of a class or function that is not known here.

    Attributes:
        name: what the file named; None where it was no name.
        arguments: as given.
        states: that would have been set.
        items: that would have been added.
    """

    name: Any
    arguments: Any = ()
    states: list[Any] = field(default_factory=list)
    items: list[Any] = field(default_factory=list)


Makers = dict[tuple[str, str], Callable[[tuple[Any, ...]], Any]]
ORDERED = {("collections", name) for name in ("OrderedDict", "defaultdict", "Counter")}


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
    machine = _Machine(data, persistent, makers or {}, start)
    try:
        return machine.run()
    except UnreadableCheckpoint:
        raise
    except (IndexError, KeyError, TypeError, ValueError, OverflowError, RecursionError, struct.error) as error:
        raise UnreadableCheckpoint(
            f"The pickle in it is damaged at byte {machine.at}: {type(error).__name__}."
        ) from None


class _Mark:
    """Where a group of values begins on the stack."""


MARK = _Mark()


class _Machine:
    def __init__(
        self, data: bytes | memoryview, persistent: Callable[[Any], Any] | None, makers: Makers, start: int
    ) -> None:
        self.data = memoryview(data)
        self.at = start
        self.persistent = persistent
        self.makers = makers
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: dict[int, Any] = {}
        self.budget = MEMORY + len(self.data)
        self.tuple_keys = 0

    def run(self) -> Unpickled:
        data, table = self.data, TABLE
        for _ in range(MOST_INSTRUCTIONS):
            if self.at >= len(data):
                raise UnreadableCheckpoint("The pickle in it is cut off: the file is incomplete.")
            code = data[self.at]
            self.at += 1
            if code == 0x2E:  # STOP
                return Unpickled(self.pop(), self.at)
            instruction = table.get(code)
            if instruction is None:
                raise UnreadableCheckpoint(
                    f"The pickle in it is damaged: byte {self.at - 1} ({code:#04x}) is no instruction."
                )
            instruction(self)
        raise UnreadableCheckpoint(
            f"The pickle in it has more than {MOST_INSTRUCTIONS:,} instructions: no checkpoint."
        )

    # ---- bytes

    def take(self, count: int) -> memoryview:
        if count < 0 or count > len(self.data) - self.at:
            raise UnreadableCheckpoint("The pickle in it is cut off, or a length in it is wrong.")
        self.at += count
        return self.data[self.at - count : self.at]

    def number(self, layout: str) -> int:
        return int(struct.unpack(layout, self.take(struct.calcsize(layout)))[0])

    def line(self) -> bytes:
        end = self.at
        chunk = bytes(self.data[end : end + 4096])
        found = chunk.find(b"\n")
        if found < 0:
            raise UnreadableCheckpoint("The pickle in it is damaged: a line does not end.")
        self.at += found + 1
        return chunk[:found]

    def spend(self, count: int) -> None:
        self.budget -= count
        if self.budget < 0:
            raise UnreadableCheckpoint("The pickle in it asks for far more memory than its size: no checkpoint.")

    # ---- stack

    def push(self, value: Any, cost: int = 32) -> None:
        self.spend(cost)
        self.stack.append(value)

    def pop(self) -> Any:
        if not self.stack or (self.marks and self.marks[-1] >= len(self.stack)):
            raise UnreadableCheckpoint("The pickle in it is damaged: a value is missing.")
        return self.stack.pop()

    def top(self) -> Any:
        if not self.stack or (self.marks and self.marks[-1] >= len(self.stack)):
            raise UnreadableCheckpoint("The pickle in it is damaged: a value is missing.")
        return self.stack[-1]

    def group(self) -> list[Any]:
        if not self.marks:
            raise UnreadableCheckpoint("The pickle in it is damaged: a group has no beginning.")
        begin = self.marks.pop()
        found = self.stack[begin:]
        del self.stack[begin:]
        return found

    def text(self, count: int) -> None:
        self.spend(4 * count)  # a single wide character makes all of them four bytes
        self.push(str(self.take(count), "utf-8", "surrogatepass"), 64)

    def plain(self, count: int) -> None:
        self.push(bytes(self.take(count)), count + 40)

    def remember(self, index: int) -> None:
        self.spend(120)
        self.memo[index] = self.top()

    def recall(self, index: int) -> None:
        if index not in self.memo:
            raise UnreadableCheckpoint("The pickle in it is damaged: it recalls what it never stored.")
        self.push(self.memo[index], 8)

    # ---- what would be calls

    def call(self, function: Any, arguments: Any) -> None:
        if not isinstance(arguments, tuple):
            raise UnreadableCheckpoint("The pickle in it is damaged: arguments are no tuple.")
        if isinstance(function, Name):
            place = (function.module, function.name)
            if place in ORDERED:
                return self.push(self.ordered(arguments), 64)
            if place in self.makers:
                return self.push(self.makers[place](arguments), 200)
        return self.push(Standin(function, arguments), 400)

    def ordered(self, arguments: tuple[Any, ...]) -> dict[Any, Any]:
        """A dictionary of the pairs that are given, in whatever form the class takes them."""
        made: dict[Any, Any] = {}
        for given in arguments:
            if isinstance(given, dict):
                self.spend(100 * len(given))
                made.update(given)
            elif isinstance(given, list):
                for pair in given:
                    if isinstance(pair, list | tuple) and len(pair) == 2:
                        self.put(made, pair[0], pair[1])
        return made

    def build(self) -> None:
        state, thing = self.pop(), self.top()
        if isinstance(thing, Standin):
            self.spend(16)
            thing.states.append(state)
        elif isinstance(thing, Name | str | bytes | int | float | tuple | type(None)):
            raise UnreadableCheckpoint("The pickle in it sets attributes of what has none: no checkpoint does.")
        # An ordered dictionary's attributes (`_metadata` of a state_dict) and a tensor's are not needed.

    def set_items(self, pairs: list[Any]) -> None:
        if len(pairs) % 2:
            raise UnreadableCheckpoint("The pickle in it is damaged: a key has no value.")
        thing = self.top()
        if isinstance(thing, dict):
            for index in range(0, len(pairs), 2):
                self.put(thing, pairs[index], pairs[index + 1])
        elif isinstance(thing, Standin):
            self.spend(8 * len(pairs))
            thing.items += pairs
        else:
            raise UnreadableCheckpoint("The pickle in it sets items of what has none: no checkpoint does.")

    def put(self, made: dict[Any, Any], key: Any, value: Any) -> None:
        self.spend(100)
        made[self.key(key)] = value

    def key(self, key: Any) -> Any:
        """Something to look things up by whose hash is cheap."""
        if isinstance(key, bool | str | bytes | Name | type(None)):
            return key
        if isinstance(key, int | float):
            return key if isinstance(key, int) and abs(key) < SMALL_KEY else f"{key:.17g}"
        if isinstance(key, tuple):
            self.tuple_keys += 1
            if self.tuple_keys <= MOST_TUPLE_KEYS and len(key) <= 16 and not any(isinstance(k, tuple) for k in key):
                return tuple(self.key(part) for part in key)
        elif isinstance(key, Standin):
            return key
        raise UnreadableCheckpoint(
            f"The pickle in it has a {type(key).__name__} as a dictionary's key: no checkpoint."
        )

    def add_items(self, items: list[Any]) -> None:
        thing = self.top()
        if isinstance(thing, list):
            self.spend(8 * len(items))
            thing += items
        elif isinstance(thing, Standin):
            self.spend(8 * len(items))
            thing.items += items
        else:
            raise UnreadableCheckpoint("The pickle in it appends to what is no list: no checkpoint does.")

    def named(self, module: str, name: str) -> None:
        self.push(Name(module, name), 150 + len(module) + len(name))

    def persist(self, pid: Any) -> None:
        if self.persistent is None:
            raise UnreadableCheckpoint("The pickle in it refers to something outside of it.")
        self.push(self.persistent(pid), 200)


# ---------------------------------------------------------------------- instructions, by their bytes


def _proto(machine: _Machine) -> None:
    version = machine.take(1)[0]
    if version not in PROTOCOLS:
        raise UnreadableCheckpoint(f"The pickle in it is of protocol {version}, which is not known.")


def _frame(machine: _Machine) -> None:
    size = machine.number("<Q")
    if size > len(machine.data) - machine.at:
        raise UnreadableCheckpoint("The pickle in it is cut off: a frame is incomplete.")


def _int(machine: _Machine) -> None:
    line = machine.line()
    machine.push({b"00": False, b"01": True}.get(line) if line in (b"00", b"01") else int(line))


def _long(machine: _Machine) -> None:
    machine.push(int(machine.line().rstrip(b"L")))


def _long_bytes(layout: str) -> Callable[[_Machine], None]:
    def read(machine: _Machine) -> None:
        count = machine.number(layout)
        machine.push(int.from_bytes(machine.take(count), "little", signed=True), 32 + max(count, 0))

    return read


def _string(machine: _Machine) -> None:
    line = machine.line().strip()
    if len(line) < 2 or line[:1] != line[-1:] or line[:1] not in (b"'", b'"'):
        raise UnreadableCheckpoint("The pickle in it is damaged: a text has no quotes.")
    machine.push(codecs.escape_decode(line[1:-1])[0].decode("latin-1"), 64)


def _latin(layout: str) -> Callable[[_Machine], None]:
    def read(machine: _Machine) -> None:
        count = machine.number(layout)
        machine.spend(max(count, 0))
        machine.push(bytes(machine.take(count)).decode("latin-1"), 64)

    return read


def _mark(machine: _Machine) -> None:
    machine.spend(8)
    machine.marks.append(len(machine.stack))


def _pop(machine: _Machine) -> None:
    if machine.marks and machine.marks[-1] == len(machine.stack):
        machine.marks.pop()
    else:
        machine.pop()


def _pop_mark(machine: _Machine) -> None:
    machine.group()


def _tuple(count: int) -> Callable[[_Machine], None]:
    def make(machine: _Machine) -> None:
        parts = [machine.pop() for _ in range(count)]
        machine.push(tuple(reversed(parts)), 64)

    return make


def _gathered(make: Callable[[list[Any]], Any]) -> Callable[[_Machine], None]:
    def gather(machine: _Machine) -> None:
        parts = machine.group()
        machine.push(make(parts), 64 + 8 * len(parts))

    return gather


def _dict(machine: _Machine) -> None:
    pairs = machine.group()
    machine.push({}, 64)
    machine.set_items(pairs)


def _global(machine: _Machine) -> None:
    module, name = machine.line(), machine.line()
    machine.named(module.decode("utf-8"), name.decode("utf-8"))


def _stack_global(machine: _Machine) -> None:
    name, module = machine.pop(), machine.pop()
    if not (isinstance(module, str) and isinstance(name, str)):
        raise UnreadableCheckpoint("The pickle in it is damaged: a name is no text.")
    machine.named(module, name)


def _reduce(machine: _Machine) -> None:
    arguments, function = machine.pop(), machine.pop()
    machine.call(function, arguments)


def _new_ex(machine: _Machine) -> None:
    named, arguments, kind = machine.pop(), machine.pop(), machine.pop()
    if not isinstance(named, dict) or not isinstance(arguments, tuple):
        raise UnreadableCheckpoint("The pickle in it is damaged: arguments are no tuple.")
    machine.push(Standin(kind, (*arguments, named) if named else arguments), 400 + 8 * len(arguments))


def _inst(machine: _Machine) -> None:
    module, name = machine.line().decode("utf-8"), machine.line().decode("utf-8")
    machine.call(Name(module, name), tuple(machine.group()))


def _obj(machine: _Machine) -> None:
    parts = machine.group()
    if not parts:
        raise UnreadableCheckpoint("The pickle in it is damaged: an object has no class.")
    machine.call(parts[0], tuple(parts[1:]))


def _set_item(machine: _Machine) -> None:
    value, key = machine.pop(), machine.pop()
    machine.set_items([key, value])


def _extension(machine: _Machine) -> None:
    raise UnreadableCheckpoint("The pickle in it uses extension codes: no checkpoint does.")


def _buffer(machine: _Machine) -> None:
    raise UnreadableCheckpoint("The pickle in it refers to buffers outside of it: no checkpoint does.")


def _constant(value: Any, cost: int = 8) -> Callable[[_Machine], None]:
    return lambda machine: machine.push(value, cost)


TABLE: dict[int, Callable[[_Machine], None]] = {
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
