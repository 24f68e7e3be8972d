"""State of the pickle machine: stack, memo and memory budget; classes, functions and calls become inert stand-ins."""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

MEMORY_BUDGET = 40 * 2**20  # bytes that instructions may build, in addition to the size of the file
MAX_NAME_LENGTH = 40  # of a name in an error message
# Larger integers, and floats, become text as dictionary keys: their hashes can be made to collide.
MAX_KEY = 2**31
MAX_TUPLE_KEYS = 10_000


class UnreadableCheckpoint(ValueError):
    """A file that is not a checkpoint, is damaged, or requests something that no checkpoint needs; one sentence."""


@dataclass(frozen=True)
class GlobalName:
    """A class or function that a file names. It is never looked up."""

    module: str
    name: str

    def __str__(self) -> str:
        return f"{self.module}.{self.name}"[:MAX_NAME_LENGTH]


@dataclass(eq=False)
class StandIn:
    """Placeholder of an object that a call of an unknown class or function would have created.

    Attributes:
        name: the class or function; any value in a damaged file.
        arguments: of the call.
        states: that would have been set.
        items: that would have been added.
    """

    name: Any
    arguments: Any = ()
    states: list[Any] = field(default_factory=list)
    items: list[Any] = field(default_factory=list)


Constructors = dict[tuple[str, str], Callable[[tuple[Any, ...]], Any]]
DICT_CLASSES = {("collections", name) for name in ("OrderedDict", "defaultdict", "Counter")}


class PickleMachine:
    """Stack machine that the instructions of `opcodes` operate on.

    Args:
        data: bytes with the pickle.
        persistent: gives the value of a persistent id; without it an id is refused.
        constructors: what to do with calls that are supported: (module, name) to a function of the arguments.
        start: of the pickle in the data.
    """

    def __init__(
        self, data: bytes | memoryview, persistent: Callable[[Any], Any] | None, constructors: Constructors, start: int
    ) -> None:
        self.data = memoryview(data)
        self.at = start
        self.persistent = persistent
        self.constructors = constructors
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: dict[int, Any] = {}
        self.budget = MEMORY_BUDGET + len(self.data)
        self.tuple_keys = 0

    # ---- bytes

    def read(self, count: int) -> memoryview:
        if count < 0 or count > len(self.data) - self.at:
            raise UnreadableCheckpoint("Its pickle is truncated, or a length in it is wrong.")
        self.at += count
        return self.data[self.at - count : self.at]

    def read_number(self, layout: str) -> int:
        return int(struct.unpack(layout, self.read(struct.calcsize(layout)))[0])

    def read_line(self) -> bytes:
        chunk = bytes(self.data[self.at : self.at + 4096])
        end = chunk.find(b"\n")
        if end < 0:
            raise UnreadableCheckpoint("Its pickle is damaged: a line does not end.")
        self.at += end + 1
        return chunk[:end]

    def charge(self, size: int) -> None:
        """Count memory against the budget."""
        self.budget -= size
        if self.budget < 0:
            raise UnreadableCheckpoint("Its pickle requests far more memory than its size, as no checkpoint does.")

    # ---- stack

    def push(self, value: Any, cost: int = 32) -> None:
        self.charge(cost)
        self.stack.append(value)

    def pop(self) -> Any:
        self.top()
        return self.stack.pop()

    def top(self) -> Any:
        if not self.stack or (self.marks and self.marks[-1] >= len(self.stack)):
            raise UnreadableCheckpoint("Its pickle is damaged: a value is missing.")
        return self.stack[-1]

    def pop_to_mark(self) -> list[Any]:
        if not self.marks:
            raise UnreadableCheckpoint("Its pickle is damaged: a mark is missing.")
        mark = self.marks.pop()
        values = self.stack[mark:]
        del self.stack[mark:]
        return values

    def push_text(self, count: int) -> None:
        self.charge(4 * count)  # a single wide character makes all of them four bytes
        self.push(str(self.read(count), "utf-8", "surrogatepass"), 64)

    def push_bytes(self, count: int) -> None:
        self.push(bytes(self.read(count)), count + 40)

    def memoize(self, index: int) -> None:
        self.charge(120)
        self.memo[index] = self.top()

    def push_memo(self, index: int) -> None:
        if index not in self.memo:
            raise UnreadableCheckpoint("Its pickle is damaged: it refers to a memo entry that does not exist.")
        self.push(self.memo[index], 8)

    def push_global(self, module: str, name: str) -> None:
        self.push(GlobalName(module, name), 150 + len(module) + len(name))

    def push_persistent(self, pid: Any) -> None:
        if self.persistent is None:
            raise UnreadableCheckpoint("Its pickle refers to something outside of it.")
        self.push(self.persistent(pid), 200)

    # ---- calls, replaced by stand-ins

    def push_call(self, function: Any, arguments: Any) -> None:
        if not isinstance(arguments, tuple):
            raise UnreadableCheckpoint("Its pickle is damaged: arguments are not a tuple.")
        if isinstance(function, GlobalName):
            name = (function.module, function.name)
            if name in DICT_CLASSES:
                return self.push(self._dict(arguments), 64)
            if name in self.constructors:
                return self.push(self.constructors[name](arguments), 200)
        return self.push(StandIn(function, arguments), 400)

    def _dict(self, arguments: tuple[Any, ...]) -> dict[Any, Any]:
        """A dictionary from the arguments of its class: dictionaries and lists of pairs."""
        result: dict[Any, Any] = {}
        for argument in arguments:
            if isinstance(argument, dict):
                self.charge(100 * len(argument))
                result.update(argument)
            elif isinstance(argument, list):
                for pair in argument:
                    if isinstance(pair, list | tuple) and len(pair) == 2:
                        self.charge(100)
                        result[self._key(pair[0])] = pair[1]
        return result

    def build(self) -> None:
        state, target = self.pop(), self.top()
        if isinstance(target, StandIn):
            self.charge(16)
            target.states.append(state)
        elif isinstance(target, GlobalName | str | bytes | int | float | tuple | type(None)):
            raise UnreadableCheckpoint("Its pickle sets attributes of a value that has none, as no checkpoint does.")
        # Attributes of an ordered dictionary (`_metadata` of a state_dict) and of a tensor are not needed.

    def set_items(self, pairs: list[Any]) -> None:
        if len(pairs) % 2:
            raise UnreadableCheckpoint("Its pickle is damaged: a key has no value.")
        target = self.top()
        if isinstance(target, dict):
            for index in range(0, len(pairs), 2):
                self.charge(100)
                target[self._key(pairs[index])] = pairs[index + 1]
        elif isinstance(target, StandIn):
            self.charge(8 * len(pairs))
            target.items += pairs
        else:
            raise UnreadableCheckpoint("Its pickle sets items of a value that has none, as no checkpoint does.")

    def _key(self, key: Any) -> Any:
        """A dictionary key with a cheap hash."""
        if isinstance(key, bool | str | bytes | GlobalName | type(None)):
            return key
        if isinstance(key, int | float):
            return key if isinstance(key, int) and abs(key) < MAX_KEY else f"{key:.17g}"
        if isinstance(key, tuple):
            self.tuple_keys += 1
            if self.tuple_keys <= MAX_TUPLE_KEYS and len(key) <= 16 and not any(isinstance(k, tuple) for k in key):
                return tuple(self._key(part) for part in key)
        elif isinstance(key, StandIn):
            return key
        raise UnreadableCheckpoint(
            f"Its pickle has a {type(key).__name__} as a dictionary key, as no checkpoint does."
        )

    def add_items(self, items: list[Any]) -> None:
        target = self.top()
        if not isinstance(target, list | StandIn):
            raise UnreadableCheckpoint("Its pickle appends to a value that is not a list, as no checkpoint does.")
        self.charge(8 * len(items))
        (target if isinstance(target, list) else target.items).extend(items)
