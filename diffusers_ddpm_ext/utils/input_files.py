"""Reading files that may be wrong, damaged or hostile: bounded text, JSON and CSV, with one sentence for any fault.

Whatever is wrong with a file (missing, a folder, a named pipe, too large, not UTF-8, nested without end, of another
type) becomes a ConfigError that names it. Sizes are checked before anything is read. Arrays: `array_files`.
"""

from __future__ import annotations

import csv
import io
import json
import math
import os
import stat
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any, BinaryIO

from diffusers_ddpm_ext.errors import ConfigError, printable

MAX_TEXT_BYTES = 16 * 2**20
MAX_ROW_BYTES = 2**20
MAX_DEPTH = 64
MAX_DIGITS = 20  # 2^64 has 20


def file_name(path: str | os.PathLike[str], what: str = "") -> str:
    """A file as messages name it: its role (an option, say) and its path, on one printable line."""
    return f"{what} {printable(os.fspath(path))}".strip()


def open_input(path: str | os.PathLike[str], what: str = "", max_bytes: int | None = None) -> BinaryIO:
    """Open a regular file of limited size; a named pipe or a device, which could wait forever, is refused.

    Args:
        path: the file; links are followed.
        what: its role in messages, e.g. ``--config``.
        max_bytes: its largest size; any by default.

    Raises:
        ConfigError: it is missing, unreadable, too large, or not a regular file.
    """
    name = file_name(path, what)
    flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0)
    try:
        descriptor = os.open(path, flags)
    except IsADirectoryError:  # on Windows: PermissionError
        raise ConfigError(f"{name} is a folder: give a file.") from None
    except FileNotFoundError:
        raise ConfigError(f"{name} does not exist.") from None
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        raise ConfigError(f"{name} cannot be read: {getattr(error, 'strerror', None) or error}.") from None
    status = os.fstat(descriptor)
    fault = ""
    if stat.S_ISDIR(status.st_mode):
        fault = "is a folder: give a file"
    elif not stat.S_ISREG(status.st_mode):
        fault = "is not a regular file: give a file, not a pipe or a device"
    elif max_bytes is not None and status.st_size > max_bytes:
        fault = f"has {status.st_size:,} bytes, more than the {max_bytes:,} that such a file may have"
    if fault:
        os.close(descriptor)
        raise ConfigError(f"{name} {fault}.")
    return os.fdopen(descriptor, "rb")


def read_bytes(path: str | os.PathLike[str], what: str = "", max_bytes: int = MAX_TEXT_BYTES) -> bytes:
    """The content of a regular file of limited size.

    Raises:
        ConfigError: as `open_input`, or it grew beyond ``max_bytes`` meanwhile.
    """
    with open_input(path, what, max_bytes) as file:
        try:
            content = file.read(max_bytes + 1)
        except OSError as error:
            raise ConfigError(f"{file_name(path, what)} cannot be read: {error.strerror or error}.") from None
    if len(content) > max_bytes:
        raise ConfigError(f"{file_name(path, what)} has more than the {max_bytes:,} bytes that such a file may have.")
    return content


def read_text(path: str | os.PathLike[str], what: str = "", max_bytes: int = MAX_TEXT_BYTES) -> str:
    """The text of a UTF-8 file, without its byte order mark and with ``\\n`` at the end of lines.

    Raises:
        ConfigError: as `read_bytes`, or it is not UTF-8 text.
    """
    return decode_text(read_bytes(path, what, max_bytes), file_name(path, what))


def decode_text(content: bytes, name: str) -> str:
    """`read_text` of a content that has been read; ``name`` is how messages call it."""
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{name} is not text: byte {error.start:,} is not UTF-8.") from None
    if "\0" in text:
        raise ConfigError(f"{name} is not a text file: it holds NUL bytes.")
    return text.replace("\r\n", "\n")


def parse_json(text: str, name: str, allow_nan: bool = False, allow_infinity: bool = False) -> Any:
    """A JSON value whose strings are valid Unicode, whose numbers are finite and whose keys are unique.

    Args:
        text: JSON.
        name: how messages call it, e.g. `file_name` of its file.
        allow_nan: accept the words NaN, Infinity and -Infinity, which Python writes for such floats.
        allow_infinity: accept Infinity and -Infinity.

    Raises:
        ConfigError: it is not JSON, nested over 64 levels, or has a number of over 20 digits.
    """

    def parse_int(digits: str) -> int:
        if len(digits) > MAX_DIGITS:
            raise ConfigError(f"{name} has an integer of {len(digits):,} digits; at most {MAX_DIGITS} can be meant.")
        return int(digits)

    def parse_float(digits: str) -> float:
        number = float(digits)
        if math.isinf(number):
            raise ConfigError(f"{name} has the number {printable(digits, 30)}, which no float can hold.")
        return number

    def parse_constant(word: str) -> float:
        if not (allow_nan or (allow_infinity and word != "NaN")):
            raise ConfigError(f"{name} has {word} where a finite number is expected.")
        return float(word.lower().replace("infinity", "inf"))

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        content = dict(pairs)
        if len(content) < len(pairs):
            twice = Counter(key for key, _ in pairs).most_common(1)[0][0]
            raise ConfigError(f"{name} has the key {printable(twice, 60)!r} twice: keep one of them.")
        return content

    try:
        value = json.loads(
            text, parse_int=parse_int, parse_float=parse_float, parse_constant=parse_constant, object_pairs_hook=unique
        )
    except json.JSONDecodeError as error:
        raise ConfigError(f"{name} is not JSON: line {error.lineno}, column {error.colno}: {error.msg}.") from None
    except RecursionError:
        raise ConfigError(f"{name} is nested more than {MAX_DEPTH} levels deep.") from None
    if "\\u" in text or text.count("[") + text.count("{") > MAX_DEPTH:  # otherwise neither fault is possible
        check_nesting(value, name)
    return value


def check_nesting(value: Any, name: str) -> None:
    """Refuse what is nested over 64 levels deep, and text that is not valid Unicode (a lone surrogate).

    Raises:
        ConfigError: one of these; the message begins with ``name``.
    """
    level = [value]
    for _ in range(MAX_DEPTH + 1):
        below: list[Any] = []
        for item in level:
            if isinstance(item, str):
                if not item.isascii() and any("\ud800" <= c <= "\udfff" for c in item):
                    raise ConfigError(f"{name} has text that is not valid Unicode: {printable(item, 60)}.")
            elif isinstance(item, dict):
                below += [*item, *item.values()]
            elif isinstance(item, list):
                below += item
        if not below:
            return
        level = below
    raise ConfigError(f"{name} is nested more than {MAX_DEPTH} levels deep.")


@dataclass(frozen=True)
class JsonObject:
    """A JSON object and its name in messages; reads typed values, each fault one sentence.

    Every reader takes the key and a default for a missing key; without a default the key must exist.

    Attributes:
        name: how messages call it.
        content: its keys and values.
    """

    name: str
    content: dict[str, Any]

    def __contains__(self, key: object) -> bool:
        return key in self.content

    def integer(self, key: str, low: int | None = None, high: int | None = None, default: int | None = None) -> int:
        """An integer from ``low`` to ``high``; ``2.0`` and ``true`` are not integers."""
        value = self._value(key, default, (int,), "an integer")
        self._check_range(key, value, low, high)
        return int(value)

    def number(
        self, key: str, low: float | None = None, high: float | None = None, default: float | None = None
    ) -> float:
        """A finite number from ``low`` to ``high``."""
        value = self._value(key, default, (int, float), "a number")
        if not math.isfinite(value):
            raise ConfigError(f"{self.name}: {printable(key)} is {value}, not a finite number.")
        self._check_range(key, value, low, high)
        return float(value)

    def string(self, key: str, default: str | None = None) -> str:
        """A text."""
        return str(self._value(key, default, (str,), "a text"))

    def boolean(self, key: str, default: bool | None = None) -> bool:
        """True or false."""
        return bool(self._value(key, default, (bool,), "true or false"))

    def object(self, key: str, default: dict[str, Any] | None = None) -> JsonObject:
        """An object inside this one."""
        return JsonObject(f"{self.name}: {printable(key)}", self._value(key, default, (dict,), "an object"))

    def list(self, key: str, default: Sequence[Any] | None = None) -> Sequence[Any]:
        """A list of any values."""
        value: Sequence[Any] = self._value(key, default, (list,), "a list")
        return value

    def strings(self, key: str, default: Sequence[str] | None = None) -> Sequence[str]:
        """A list of texts."""
        values = self.list(key, default)
        if not all(isinstance(value, str) for value in values):
            raise ConfigError(f"{self.name}: {printable(key)} is not a list of texts.")
        return values

    def numbers(self, key: str, default: Sequence[float] | None = None) -> Sequence[float]:
        """A list of finite numbers."""
        values = self.list(key, default)
        for value in values:
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
                raise ConfigError(f"{self.name}: {printable(key)} is not a list of finite numbers.")
        return values

    def _value(self, key: str, default: Any, types: tuple[type, ...], kind: str) -> Any:
        if key not in self.content:
            if default is None:
                raise ConfigError(f"{self.name} has no {printable(key)}.")
            return default
        value = self.content[key]
        if not isinstance(value, types) or (isinstance(value, bool) and bool not in types):
            shown = printable(json.dumps(value, ensure_ascii=False), 60)
            raise ConfigError(f"{self.name}: {printable(key)} is {shown}, not {kind}.")
        return value

    def _check_range(self, key: str, value: float, low: float | None, high: float | None) -> None:
        if (low is not None and value < low) or (high is not None and value > high):
            allowed = f"at least {low}" if high is None else f"at most {high}" if low is None else f"{low} to {high}"
            raise ConfigError(f"{self.name}: {printable(key)} is {value}; allowed: {allowed}.")


def read_json(
    path: str | os.PathLike[str], what: str = "", max_bytes: int = MAX_TEXT_BYTES, allow_nan: bool = False
) -> Any:
    """The JSON value in a file.

    Raises:
        ConfigError: as `read_text` and `parse_json`.
    """
    return parse_json(read_text(path, what, max_bytes), file_name(path, what), allow_nan)


def read_json_object(
    path: str | os.PathLike[str], what: str = "", max_bytes: int = MAX_TEXT_BYTES, allow_infinity: bool = False
) -> JsonObject:
    """The JSON object in a file, with typed access.

    Raises:
        ConfigError: as `read_json`, or its top level is not an object.
    """
    name = file_name(path, what)
    return json_object(parse_json(read_text(path, what, max_bytes), name, allow_infinity=allow_infinity), name)


def json_object(value: Any, name: str) -> JsonObject:
    """A parsed value as an object.

    Raises:
        ConfigError: it is of another type.
    """
    if not isinstance(value, dict):
        raise ConfigError(f"{name} holds {printable(json.dumps(value), 40)}, not an object with keys.")
    return JsonObject(name, value)


def iter_json_rows(
    path: str | os.PathLike[str], what: str = "", allow_nan: bool = True, skip_partial: bool = True
) -> Iterator[dict[str, Any]]:
    """The objects of a ``.jsonl`` file, one per line, read as they are used; empty lines are skipped.

    Args:
        path: the file.
        what: its role in messages.
        allow_nan: accept NaN and Infinity, which metrics may be.
        skip_partial: leave out a last line without its line end: somebody is writing it.

    Yields:
        One object per line.

    Raises:
        ConfigError: as `open_input`, or a line is not an object, or over 1 MiB long; its number is named.
    """
    name = file_name(path, what)
    with open_input(path, what) as file:
        number = 0
        while line := file.readline(MAX_ROW_BYTES + 1):
            number += 1
            row = f"{name}, line {number}"
            if not line.endswith(b"\n"):
                if len(line) > MAX_ROW_BYTES:
                    raise ConfigError(f"{row} has over {MAX_ROW_BYTES:,} bytes.")
                if skip_partial:
                    return
            text = decode_text(line, row).strip()
            if text:
                yield json_object(parse_json(text, row, allow_nan), row).content


def read_csv_rows(
    path: str | os.PathLike[str], what: str = "", columns: Sequence[str] = (), max_bytes: int = 4 * MAX_TEXT_BYTES
) -> list[dict[str, str]]:
    """The rows of a CSV file with a header, as texts.

    Args:
        path: the file.
        what: its role in messages.
        columns: columns that it must have.
        max_bytes: its largest size.

    Raises:
        ConfigError: as `read_text`, a column is missing or named twice, or a row has another number of fields.
    """
    name = file_name(path, what)
    lines = csv.reader(io.StringIO(read_text(path, what, max_bytes), newline=""), strict=True)
    rows: list[dict[str, str]] = []
    header: list[str] | None = None
    try:
        for fields in lines:
            if not fields:
                continue
            if header is None:
                header = fields
                if len(set(header)) < len(header):
                    twice = Counter(header).most_common(1)[0][0]
                    raise ConfigError(f"{name} has the column {printable(twice, 60)!r} twice: keep one of them.")
                continue
            if len(fields) != len(header):
                raise ConfigError(
                    f"{name}, line {lines.line_num} has {len(fields)} fields and the header has {len(header)}."
                )
            rows.append(dict(zip(header, fields, strict=True)))
    except csv.Error as error:
        raise ConfigError(f"{name}, line {lines.line_num} is not CSV: {error}.") from None
    missing = [column for column in columns if column not in (header or ())]
    if missing:
        raise ConfigError(f"{name} has no column {missing[0]!r}.")
    return rows


def exists(path: str | os.PathLike[str]) -> bool:
    """Whether a path leads to something; False for names that no file can have (over 255 bytes, with a NUL)."""
    try:
        os.stat(path)
    except (OSError, ValueError):
        return False
    return True


def check_folder(path: str | os.PathLike[str], what: str = "") -> Path:
    """An existing folder.

    Raises:
        ConfigError: there is none; the message names what is beside it.
    """
    folder = Path(path)
    if exists(folder) and folder.is_dir():
        return folder
    if exists(folder):
        raise ConfigError(f"{file_name(path, what)} is a file: give a folder.")
    beside = folder.parent
    names = sorted(entry.name for entry in os.scandir(beside) if entry.is_dir()) if exists(beside) else []
    nearest = get_close_matches(folder.name, names, 1) or names[:5]
    there = ", ".join(printable(name, 60) for name in nearest)
    raise ConfigError(
        f"{file_name(path, what)} does not exist"
        + (f"; in {printable(os.fspath(beside))} there is {there}." if there else ".")
    )
