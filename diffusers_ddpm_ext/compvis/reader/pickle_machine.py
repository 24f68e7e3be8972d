"""The stack, the memo and the budget of the pickle machine; what would be a call becomes a stand-in."""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

MEMORY = 40 * 2**20  # bytes that instructions may build, beside as many as the file has
HEADLINE = 40  # bytes of a name that an error shows
# Larger whole numbers, and fractions, become text as dictionary keys: their hashes can be made to collide.
SMALL_KEY = 2**31
MOST_TUPLE_KEYS = 10_000


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


class Machine:
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
