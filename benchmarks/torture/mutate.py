"""Seeded mutations of a file that know its structure: JSON, YAML, rows, tables, arrays, or plain bytes.

A mutation is *invalid* where no reader can mean anything by the result (a list for a number, NaN, half a file), and
*open* where the result may have a meaning of its own (a key left out, another number, a name renamed).
"""

from __future__ import annotations

import io
import json
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

DEEP = 200
RAW: dict[str, str] = {
    "NaN": "NaN",
    "Infinity": "Infinity",
    "-Infinity": "-Infinity",
    "1e999": "1e999",
    "4000 digits": "9" * 4000,
    "10^30": "1" + "0" * 30,
    "deep list": "[" * DEEP + "]" * DEEP,
    "deep object": '{"a":' * DEEP + "0" + "}" * DEEP,
    "lone surrogate": '"\\ud800"',
    "control characters": '"\\u001b[31m\\u0000"',
    "object": '{"a": 1}',
    "list of itself": "",  # in brackets; see `_replacement`
}
"""What is written in place of a value, in JSON's (and YAML's flow) syntax."""
TEXTS = ("list of itself", "control characters")
"""Of these, what a list or a text could be: a name may have control characters."""
OPEN_VALUES = ("null", "-1", "0", "true", '""', '"text"', "[]", "{}", "1.5", "7", '"' + "n" * 300 + '"')


@dataclass(frozen=True)
class Mutation:
    """A changed file.

    Attributes:
        name: what was done.
        place: key that was changed, list positions as ``*``; empty for the file as a whole.
        data: the file's bytes.
        invalid: whether no reader can mean anything by it.
    """

    name: str
    place: str
    data: bytes
    invalid: bool


def _places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Paths of all values of a document; of long lists only the first and the last element."""
    if path:
        yield path
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _places(inner, (*path, key))
    elif isinstance(value, list):
        for index in sorted({0, len(value) - 1} & set(range(len(value)))):
            yield from _places(value[index], (*path, index))


def _label(path: tuple[Any, ...]) -> str:
    return ".".join("*" if isinstance(part, int) else str(part) for part in path)


def _parent(document: Any, path: tuple[Any, ...]) -> Any:
    for part in path[:-1]:
        document = document[part]
    return document


MARK = "@@raw@@"


def _replacement(value: Any, draw: random.Random) -> tuple[str, str, bool]:
    """Name, text and validity of what stands in place of a value."""
    if draw.random() < 0.6:
        name = draw.choice(list(RAW))
        text = RAW[name] if name != "list of itself" else f"[{json.dumps(value)}]"
        plausible = name in TEXTS and isinstance(value, list if name == "list of itself" else str)
        return name, text, not plausible
    text = draw.choice(OPEN_VALUES)
    name = text if len(text) < 20 else "300 characters"
    wrong_type = {int: ('"text"', "{}", '""'), float: ('"text"', "{}", "[]", '""'), dict: ("7", "1.5"), list: ("{}",)}
    return name, text, text in wrong_type.get(type(value), ())


def mutate_document(data: bytes, draw: random.Random, dump: Callable[[Any], str]) -> Mutation:
    """Change one value or key of a JSON or YAML document.

    Args:
        data: JSON, or text that `dump` of its content is equivalent to.
        draw: the random choice.
        dump: writes a document.
    """
    document = json.loads(data)
    path = draw.choice(list(_places(document)))
    inner, last = _parent(document, path), path[-1]
    action = draw.choice(("value", "value", "value", "value", "delete", "rename", "twice"))
    if action == "value" or not isinstance(inner, dict):
        name, text, invalid = _replacement(inner[last], draw)
        inner[last] = MARK
        return Mutation(name, _label(path), dump(document).replace(f'"{MARK}"', text).encode(), invalid)
    if action == "twice":
        value = inner.pop(last)
        first = {last: MARK, f"{last}{MARK}": value}
        text = dump({**document, **first} if len(path) == 1 else _with(document, path, first))
        return Mutation("twice", _label(path), text.replace(MARK, "7", 1).replace(MARK, "").encode(), True)
    value = inner.pop(last)
    if action == "rename":
        inner[draw.choice((f"{last}_", str(last).upper(), "n" * 300))] = value
    return Mutation(action, _label(path), dump(document).encode(), False)


def _with(document: Any, path: tuple[Any, ...], items: dict[str, Any]) -> Any:
    _parent(document, path).update(items)
    return document


def mutate_text(data: bytes, draw: random.Random) -> Mutation:
    """Damage a text file as a whole."""
    cut = draw.randrange(1, max(2, len(data)))
    choices: dict[str, tuple[bytes, bool]] = {
        "BOM": (b"\xef\xbb\xbf" + data, False),
        "UTF-16": (data.decode("utf-8", "replace").encode("utf-16"), True),
        "NUL": (data[:cut] + b"\0" + data[cut:], True),
        "invalid UTF-8": (data[:cut] + b"\xff\xc0" + data[cut:], True),
        "cut": (data[:cut], False),
        "doubled": (data + data, True),
        "empty": (b"", True),
        "spaces": (b"   \n", True),
        "Windows lines": (data.replace(b"\n", b"\r\n"), False),
        "line left out": (b"".join(_without_one(data.splitlines(keepends=True), draw)), False),
        "lines swapped": (b"".join(_shuffled(data.splitlines(keepends=True), draw)), False),
    }
    name = draw.choice(list(choices))
    return Mutation(name, "", *choices[name])


def _without_one(lines: list[bytes], draw: random.Random) -> list[bytes]:
    del lines[draw.randrange(len(lines))]
    return lines


def _shuffled(lines: list[bytes], draw: random.Random) -> list[bytes]:
    i, j = draw.randrange(len(lines)), draw.randrange(len(lines))
    lines[i], lines[j] = lines[j], lines[i]
    return lines


def mutate_json(data: bytes, draw: random.Random) -> Mutation:
    """A JSON object: one value or key, or the text."""
    if draw.random() < 0.2:
        return mutate_text(data, draw)
    return mutate_document(data, draw, lambda document: json.dumps(document, indent=1))


def mutate_yaml(data: bytes, draw: random.Random) -> Mutation:
    """A YAML mapping; what is written is the same mapping in flow style, which is YAML too."""
    if draw.random() < 0.2:
        return mutate_text(data, draw)
    import yaml

    made = mutate_document(json.dumps(yaml.safe_load(data)).encode(), draw, json.dumps)
    text = made.data.replace(b"NaN", b".nan").replace(b"Infinity", b".inf")
    return Mutation(made.name, made.place, text, made.invalid)


def mutate_rows(data: bytes, draw: random.Random) -> Mutation:
    """A JSON object per line: one line as a document, or the text."""
    if draw.random() < 0.25:
        return mutate_text(data, draw)
    lines = data.splitlines()
    number = draw.randrange(len(lines))
    made = mutate_document(lines[number], draw, json.dumps)
    text = b"\n".join([*lines[:number], made.data, *lines[number + 1 :]]) + b"\n"
    return Mutation(f"row {number}: {made.name}", made.place, text, made.invalid)


def mutate_table(data: bytes, draw: random.Random) -> Mutation:
    """A CSV table: one cell, or the text."""
    if draw.random() < 0.25:
        return mutate_text(data, draw)
    lines = [line.split(",") for line in data.decode().splitlines()]
    row, column = draw.randrange(len(lines)), draw.randrange(len(lines[0]))
    cells = {"nan": True, "inf": True, "": True, "9" * 4000: True, "1e400": True, "\x1b[31m": False, "n" * 300: False,
             "-1": False, "x": False, "../../x": False, "10000000000": False, "1.5": False, '"': True}  # fmt: skip
    cell, name = draw.choice(list(cells)), lines[0][column]
    lines[row][column] = cell
    text = "".join(",".join(line) + "\n" for line in lines)
    return Mutation(f"row {row}: {cell[:20]!r}", name, text.encode(), cells[cell])


def mutate_bytes(data: bytes, draw: random.Random) -> Mutation:
    """Any file: one byte, one bit, a cut, a block of zeros."""
    place = draw.randrange(len(data))
    choices = {
        "bit": bytes([data[place] ^ 1 << draw.randrange(8)]),
        "byte": bytes([(data[place] + draw.randrange(1, 256)) % 256]),
    }
    name = draw.choice(("bit", "byte", "cut", "zeros", "doubled", "empty"))
    if name in choices:
        return Mutation(f"{name} {place}", "", data[:place] + choices[name] + data[place + 1 :], True)
    end = min(len(data), place + 64)
    wholes = {"cut": data[:place], "zeros": data[:place] + b"\0" * (end - place) + data[end:], "doubled": data * 2}
    return Mutation(f"{name} {place}", "", wholes.get(name, b""), True)


def mutate_header(data: bytes, draw: random.Random) -> Mutation:
    """A safetensors file: a value of its header, its length, or the end of the file. Values stay as they are."""
    length = int.from_bytes(data[:8], "little")
    header, values = data[8 : 8 + length], data[8 + length :]
    if draw.random() < 0.3:
        return Mutation("values cut", "", data[: -draw.randrange(1, len(values))], True)
    made = mutate_document(header.rstrip(), draw, lambda document: json.dumps(document, separators=(",", ":")))
    text = made.data
    return Mutation(made.name, made.place, len(text).to_bytes(8, "little") + text + values, made.invalid)


def mutate_array(data: bytes, draw: random.Random) -> Mutation:
    """An .npy file: its values, type and shape, or its bytes."""
    import numpy as np

    array = np.load(io.BytesIO(data))
    flat = array.astype(np.float64)
    changes: dict[str, tuple[Any, bool]] = {
        "complex": (array.astype(np.complex128), True),
        "texts": (array.astype("<U4"), True),
        "dates": (array.astype("datetime64[s]"), True),
        "objects": (array.astype(object), True),
        "no elements": (array[:0], True),
        "records": (np.zeros(array.shape, dtype=[("a", "<f4")]), True),
        "one axis more": (array[None], True),
        "float64": (flat, False),
        "big endian": (array.astype(array.dtype.newbyteorder(">")), False),
        "Fortran order": (np.asfortranarray(array), False),
        "a longer axis": (np.concatenate([array, array], axis=-1), True),
    }
    for name, value in {"NaN": np.nan, "infinity": np.inf, "1e300": 1e300}.items():
        changed = flat.copy()
        changed.flat[draw.randrange(changed.size)] = value
        changes[name] = (changed, True)
    if draw.random() < 0.3:
        header = data.index(b"\n") + 1
        made = mutate_bytes(data[:header], draw)
        return Mutation(f"header: {made.name}", "", made.data + data[header:], False)
    name = draw.choice(list(changes))
    file = io.BytesIO()
    np.save(file, changes[name][0], allow_pickle=True)
    return Mutation(name, "", file.getvalue(), changes[name][1])
