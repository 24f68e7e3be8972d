"""Files that are wrong, damaged or hostile become one sentence that names them; right ones are read as written."""

from __future__ import annotations

import io
import json
import os
import struct
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save, save_file

from diffusers_ddpm_ext.errors import ConfigError, printable, printable_lines
from diffusers_ddpm_ext.utils.array_files import read_array, read_arrays, read_tensors
from diffusers_ddpm_ext.utils.input_files import (
    iter_json_rows,
    parse_json,
    read_bytes,
    read_csv_rows,
    read_json,
    read_json_object,
    read_text,
)

DEEP = 100_000


def refuse(read: Any, *args: Any, **options: Any) -> str:
    """The message of a refusal: one printable line."""
    with pytest.raises(ConfigError) as caught:
        list(read(*args, **options))
    message = str(caught.value)
    assert message.isprintable()
    return message


@pytest.mark.parametrize("value", [{"a": [1, 2.5, None, True, "é\u2028"]}, [], "text", 2**63, -1e-300, {"": {}}])
def test_json_is_read_as_python_reads_it(value: Any, tmp_path: Path) -> None:
    """Oracle: json.loads."""
    (tmp_path / "a.json").write_text(json.dumps(value))
    assert read_json(tmp_path / "a.json") == json.loads(json.dumps(value))


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("", "not JSON"),
        ("{", "not JSON"),
        ("{'a': 1}", "not JSON"),
        ('{"a": NaN}', "NaN"),
        ("[-Infinity]", "-Infinity"),
        ("[1e999]", "no float"),
        ("[-1e400]", "no float"),
        ("[" * DEEP, "levels"),
        ("[" * DEEP + "]" * DEEP, "levels"),
        ('{"a":' * 70 + "1" + "}" * 70, "levels"),
        ("9" * 4_000, "4,000 digits"),
        ("9" * 10_000, "10,000 digits"),
        ('["\\ud800"]', "not valid Unicode"),
        ('{"\\udfff": 1}', "not valid Unicode"),
        ('{"a": 1, "a": 2}', "twice"),
        ('{"a": {"b": 1, "\\u0062": 2}}', "twice"),
    ],
    ids=lambda value: value[:16] if isinstance(value, str) else None,
)
def test_json_that_no_program_writes_is_refused(text: str, fault: str) -> None:
    assert fault in refuse(parse_json, text, "run.json")


def test_nan_is_allowed_on_request() -> None:
    values = parse_json("[NaN, Infinity, -Infinity]", "metrics", allow_nan=True)
    assert np.array_equal(values, [np.nan, np.inf, -np.inf], equal_nan=True)
    assert parse_json("[-Infinity, 1]", "config", allow_infinity=True) == [-np.inf, 1]
    assert "NaN" in refuse(parse_json, "[NaN]", "config", allow_infinity=True)


@pytest.mark.parametrize(
    ("content", "fault"),
    [(b"\xff\xfe{\x00}\x00", "UTF-8"), (b'{"a": "\xe9"}', "UTF-8"), (b"{}\0", "NUL"), (b"\xef\xbb\xbf", "not JSON")],
)
def test_bytes_that_are_no_text_are_refused(content: bytes, fault: str, tmp_path: Path) -> None:
    (tmp_path / "a.json").write_bytes(content)
    message = refuse(read_json, tmp_path / "a.json", "--config")
    assert fault in message
    assert message.startswith(f"--config {tmp_path / 'a.json'}")


def test_a_byte_order_mark_and_windows_lines_are_read(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_bytes(b'\xef\xbb\xbf{"a":\r\n1}')
    assert read_json_object(tmp_path / "a.json").integer("a") == 1


def test_what_is_not_a_regular_file_is_refused_without_waiting(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    (tmp_path / "dangling").symlink_to(tmp_path / "nothing")
    assert "regular file" in refuse(read_bytes, tmp_path / "pipe")
    assert "regular file" in refuse(read_bytes, "/dev/zero")
    assert "folder" in refuse(read_bytes, tmp_path)
    assert "does not exist" in refuse(read_bytes, tmp_path / "dangling")
    for path in [tmp_path / "loop", tmp_path / ("n" * 300), f"{tmp_path}/a\0b", tmp_path / "pipe" / "below"]:
        assert "cannot be read" in refuse(read_bytes, path)


def test_a_file_of_too_many_bytes_is_not_read(tmp_path: Path) -> None:
    with (tmp_path / "large").open("wb") as file:
        file.truncate(10 * 2**30)  # sparse
    assert "10,737,418,240 bytes" in refuse(read_text, tmp_path / "large")


@pytest.mark.parametrize(
    ("value", "read"),
    [
        (True, "integer"),
        (2.0, "integer"),
        ("3", "integer"),
        (None, "number"),
        (True, "number"),
        ([], "object"),
        ("no", "boolean"),
        (1, "string"),
        ({}, "list"),
        (["a", 1], "strings"),
        ([1, False], "numbers"),
    ],
)
def test_a_value_of_another_type_names_file_and_key(value: Any, read: str, tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(json.dumps({"key": value}))
    content = read_json_object(tmp_path / "a.json")
    for key in ("key", "missing"):
        message = refuse(getattr(content, read), key)
        assert key in message
        assert "a.json" in message


def test_ranges_and_defaults(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('{"n": 5}')
    content = read_json_object(tmp_path / "a.json")
    assert (content.integer("n", 5, 5), content.number("m", default=0.5)) == (5, 0.5)
    assert "allowed: 6 to 9" in refuse(content.integer, "n", 6, 9)
    assert "at most 4" in refuse(content.number, "n", high=4)
    assert "an object" in refuse(read_json_object, _write(tmp_path / "b.json", b"[1]"))


def _write(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def test_rows_being_written_are_read_up_to_the_last_complete_one(tmp_path: Path) -> None:
    path = _write(tmp_path / "m.jsonl", b'{"a": 1}\n\n{"a": NaN}\n{"a": 3')
    assert next(row["a"] for row in iter_json_rows(path)) == 1
    assert len(list(iter_json_rows(path))) == 2
    assert "line 4" in refuse(iter_json_rows, path, skip_partial=False)
    assert "line 2" in refuse(iter_json_rows, _write(path, b"{}\n[]\n"))
    assert "line 1" in refuse(iter_json_rows, _write(path, b"\0" * 5000 + b"{}\n"))
    assert "bytes" in refuse(iter_json_rows, _write(path, b"x" * (2 * 2**20)))


def test_csv_is_read_as_texts(tmp_path: Path) -> None:
    path = _write(tmp_path / "a.csv", b'\xef\xbb\xbfa,b\r\n1,"x\r\ny"\r\n\r\n"2""",\r\n')
    assert read_csv_rows(path, columns=["a"]) == [{"a": "1", "b": "x\ny"}, {"a": '2"', "b": ""}]


@pytest.mark.parametrize(
    ("content", "fault"),
    [
        (b"", "no column 'a'"),
        (b"b\n1\n", "no column 'a'"),
        (b"a,a\n1,2\n", "twice"),
        (b"a,b\n1\n", "1 fields"),
        (b"a\n1,2\n", "2 fields"),
        (b'a\n"open', "not CSV"),
        (b"a\n" + b"x" * 200_000, "not CSV"),
        (b"a\n\xff\n", "UTF-8"),
    ],
)
def test_csv_faults_name_the_file(content: bytes, fault: str, tmp_path: Path) -> None:
    assert fault in refuse(read_csv_rows, _write(tmp_path / "a.csv", content), columns=["a"])


@pytest.mark.parametrize("dtype", ["bool", "uint8", "int64", "float16", ">f8"])
@pytest.mark.parametrize("shape", [(), (0, 3), (2, 3)])
def test_arrays_are_read_as_numpy_reads_them(dtype: str, shape: tuple[int, ...], tmp_path: Path) -> None:
    """Oracle: numpy.load, in both orders of memory."""
    array = np.asfortranarray(np.arange(np.prod(shape, dtype=int)).reshape(shape).astype(dtype))
    np.save(tmp_path / "a.npy", array)
    np.savez_compressed(tmp_path / "a.npz", x=array, y=array)
    np.testing.assert_array_equal(read_array(tmp_path / "a.npy"), np.load(tmp_path / "a.npy"))
    assert read_array(tmp_path / "a.npz", key="y").tobytes() == array.tobytes()
    assert read_arrays(tmp_path / "a.npz").keys() == {"x", "y"}


def _npy(shape: str, dtype: str = "'<f4'", values: bytes = b"") -> bytes:
    header = f"{{'descr': {dtype}, 'fortran_order': False, 'shape': {shape}}}".ljust(117).encode() + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header + values


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x93NUMPY",
        b"\x93NUMPY\x09\x00" + b" " * 200,
        _npy("(1000000000000,)"),
        _npy("(-1,)", values=b"abcd"),
        _npy("(2,)", values=b"abcd"),
        _npy("(1,)", values=b"abcdefgh"),
        _npy("(99999999999999999999, 0)"),
        _npy("(1,)", "'|O'", b"abcdefgh"),
        _npy("(1,)", "'<c8'", b"abcdefgh"),
        _npy("(1,)", "'<M8[s]'", b"abcdefgh"),
        _npy("(1,)", "[('a', '<f4')]", b"abcd"),
        _npy("(" * 5000),
        b"PK\x03\x04" + b"\0" * 50,
    ],
    ids=range(14),
)
def test_damaged_arrays_are_refused(content: bytes, tmp_path: Path) -> None:
    if b"99999999999999999999" in content:  # holds nothing, as it says
        with pytest.raises(ConfigError):
            read_array(_write(tmp_path / "a.npy", content))
        return
    assert "a.npy" in refuse(read_array, _write(tmp_path / "a.npy", content))


def test_archives_that_expand_without_end_are_refused(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "bomb.npz", "w", zipfile.ZIP_DEFLATED) as archive, archive.open("x.npy", "w") as f:
        f.write(_npy(f"({75 * 2**20},)"))
        for _ in range(300):
            f.write(b"\0" * 2**20)
    assert "expands" in refuse(read_array, tmp_path / "bomb.npz")
    np.savez_compressed(tmp_path / "zeros.npz", np.zeros(1_000_000))
    assert read_array(tmp_path / "zeros.npz").sum() == 0
    buffer = io.BytesIO()
    np.savez(buffer, x=np.zeros(3))
    content = buffer.getvalue()
    for broken in (content[:-30], content[:-300] + b"\xff" * 8 + content[-292:], content.replace(b"PK", b"QK", 1)):
        refuse(read_array, _write(tmp_path / "broken.npz", broken))


def test_damaged_safetensors_are_refused(tmp_path: Path) -> None:
    save_file({"a": torch.ones(2)}, tmp_path / "a.safetensors")
    assert read_tensors(tmp_path / "a.safetensors")["a"].tolist() == [1, 1]
    content = save({"a": torch.ones(2)})
    faults = [b"", content[:-1], struct.pack("<Q", 2**60) + content[8:], content.replace(b"F32", b"X99"), b"{}" * 40]
    for fault in faults:
        assert "not a complete safetensors" in refuse(read_tensors, _write(tmp_path / "b.safetensors", fault))
    refuse(read_tensors, tmp_path)


@pytest.mark.parametrize("text", ["\x1b[31mred", "a\nb", "\u202egnp", "\udc80", "\x9b2J", "\u2028"])
def test_text_from_outside_cannot_steer_a_terminal(text: str) -> None:
    assert printable(text).isprintable()
    assert printable_lines(f"x\n\t{text}").replace("\n", "").replace("\t", "").isprintable()


def test_plain_names_are_printed_as_they_are() -> None:
    assert printable("Größe/絵.png") == "Größe/絵.png"
    assert len(printable("x" * 10**6, 60)) < 70
