"""Hostile files of at most 1 MiB, by kind: name -> a function that writes one at a path.

Most are plain bytes; some are no regular files at all (a pipe, a link to an endless device, a folder).
"""

from __future__ import annotations

import gzip
import io
import json
import os
import pickle
import random
import struct
import zipfile
import zlib
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path

Write = Callable[[Path], None]
MIB = 2**20


def content(data: bytes | str) -> Write:
    """A file with this content."""
    encoded = data.encode("utf-8", "surrogatepass") if isinstance(data, str) else data
    if len(encoded) > MIB:
        raise ValueError(f"{len(encoded)} bytes: the property is about files of at most 1 MiB")
    return lambda path: _replace(path, encoded)


def _replace(path: Path, data: bytes) -> None:
    remove(path)
    path.write_bytes(data)


def remove(path: Path) -> None:
    """Make room at a path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.is_symlink() or path.exists():
        path.unlink()


def link(target: str) -> Write:
    """A symbolic link."""

    def write(path: Path) -> None:
        remove(path)
        path.symlink_to(path.name if target == "." else target)

    return write


def pipe(path: Path) -> None:
    """A named pipe: whoever opens it for reading waits."""
    remove(path)
    os.mkfifo(path)


def folder(path: Path) -> None:
    """A folder where a file should be."""
    remove(path)
    path.mkdir()


NO_FILES: dict[str, Write] = {
    "pipe": pipe,
    "folder": folder,
    "link to itself": link("."),
    "link to nothing": link("nothing-here"),
    "link to /dev/zero": link("/dev/zero"),
    "link to /dev/stdin": link("/dev/stdin"),
    "link to /proc/self/mem": link("/proc/self/mem"),
}


def _random(size: int) -> bytes:
    return random.Random(size).randbytes(size)


@cache
def _gzip_bomb() -> bytes:
    return gzip.compress(b"\0" * 200_000_000)


def damaged_text(valid: bytes) -> dict[str, Write]:
    """Damage that any text format can have.

    Args:
        valid: intact content, at most 1 MiB.
    """
    half = valid[: len(valid) // 2]
    texts: dict[str, bytes] = {
        "empty": b"",
        "one space": b" ",
        "only a BOM": b"\xef\xbb\xbf",
        "with a BOM": b"\xef\xbb\xbf" + valid,
        "UTF-16": valid.decode("utf-8", "replace").encode("utf-16"),
        "UTF-32": valid.decode("utf-8", "replace").encode("utf-32"),
        "invalid UTF-8 inside": half + b"\xff\xfe\xc0\x80" + valid[len(half) :],
        "NUL inside": half + b"\0" + valid[len(half) :],
        "NULs after": valid + b"\0" * 1000,
        "all NULs": b"\0" * MIB,
        "half": half,
        "twice": (valid + valid)[:MIB],
        "text after": valid + b"\ntail, tail: [tail]\n",
        "escape sequence before": b"\x1b[31m\x1b]0;title\x07" + valid,
        "Windows lines": valid.replace(b"\n", b"\r\n"),
        "random bytes": _random(65536),
        "PNG header": b"\x89PNG\r\n\x1a\n" + _random(1000),
        "gzip of zeros": _gzip_bomb(),
        "a million newlines": b"\n" * MIB,
        "a line of 1 MiB": b"a" * MIB,
    }
    return {name: content(data) for name, data in texts.items()} | NO_FILES


def json_files(valid: bytes) -> dict[str, Write]:
    """JSON documents: other types on top, depth, width, numbers, text.

    Args:
        valid: an intact JSON object.
    """
    body = valid.strip()
    head = body[:-1].rstrip()
    joint = b"," if len(head) > 1 else b""

    def extra(member: str) -> bytes:
        return head + joint + member.encode("utf-8", "surrogatepass") + b"}"

    keys = ",".join(f'"k{number}":0' for number in range(85_000))
    texts: dict[str, bytes | str] = {
        "null": "null",
        "true": "true",
        "number": "-1",
        "string": '"text"',
        "empty list": "[]",
        "list of itself": b"[" + body + b"]",
        "empty object": "{}",
        "NaN": "NaN",
        "lists, depth 500000, open": "[" * 500_000,
        "lists, depth 100000": "[" * 100_000 + "]" * 100_000,
        "lists, depth 900": "[" * 900 + "]" * 900,
        "objects, depth 100000": '{"a":' * 100_000 + "0" + "}" * 100_000,
        "extra key, depth 5000": extra('"extra":' + "[" * 5000 + "]" * 5000),
        "85,000 keys": "{" + keys + "}",
        "extra 80,000 keys": extra(keys[: keys.index(',"k80000"')])[:MIB],
        "a key 80,000 times": "{" + ",".join(['"k":0'] * 80_000) + "}",
        "500,000 zeros": "[" + ",".join(["0"] * 500_000) + "]",
        "300,000 objects": "[" + ",".join(["{}"] * 300_000) + "]",
        "integer of 4000 digits": extra('"extra":' + "9" * 4000),
        "integer of 400000 digits": extra('"extra":' + "9" * 400_000),
        "a key of 900 kB": extra('"' + "k" * 900_000 + '":0'),
        "a string of 900 kB": extra('"extra":"' + "s" * 900_000 + '"'),
        "a key of control characters": extra('"\\u001b[31m\\u202e\\r\\n":0'),
        "a lone surrogate as a key": extra('"\\ud800":0'),
        "a lone surrogate as a value": extra('"extra":"\\udfff"'),
        "1e999": extra('"extra":1e999'),
        "number of 100000 decimals": extra('"extra":0.' + "1" * 100_000),
        "a comment": b"// comment\n" + body,
        "single quotes": body.replace(b'"', b"'"),
    }
    return {name: content(data) for name, data in texts.items()} | damaged_text(valid)


def changed_json(valid: bytes, changes: Mapping[str, object]) -> dict[str, Write]:
    """An intact JSON object with one value changed: name of the key (dots: inside) and what is written there.

    Args:
        valid: an intact JSON object.
        changes: "key = description" -> value.
    """
    files: dict[str, Write] = {}
    for name, value in changes.items():
        document = json.loads(valid)
        key = name.split(" = ")[0]
        *parents, last = key.split(".") if key.split(".")[0] in document else [key]
        inner = document
        for parent in parents:
            inner = inner[int(parent) if isinstance(inner, list) else parent]
        inner[int(last) if isinstance(inner, list) else last] = value
        files[name] = content(json.dumps(document, separators=(",", ":")))
    return files


def yaml_files(valid: bytes) -> dict[str, Write]:
    """YAML documents: aliases, merges, tags, depth, width, numbers."""
    laughs = "a0: &a0 [x]\n" + "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 30))
    merges = "a0: &a0 {x: 0}\n" + "".join(f"a{n}: &a{n} {{<<: [*a{n - 1}, *a{n - 1}]}}\n" for n in range(1, 40))
    texts: dict[str, bytes | str] = {
        "null": "null",
        "number": "3",
        "list": "- 1\n- 2\n",
        "text": "just words",
        "tabs": "a:\n\tb: 1\n",
        "aliases of aliases": laughs,
        "merges of merges": merges,
        "an alias of itself": "a: &a [*a]\n",
        "merge of itself": "a: &a\n  <<: *a\n",
        "alias of nothing": "a: *b\n",
        "3000 anchors": "".join(f"k{n}: &a{n} 0\n" for n in range(3000))
        + "".join(f"l{n}: *a{n}\n" for n in range(3000)),
        "python object": "a: !!python/object/apply:os.system ['echo hi']\n",
        "python name": "a: !!python/name:os.system\n",
        "unknown tag": "a: !thing 3\n",
        "binary": "a: !!binary aGVsbG8=\n",
        "a set": "? a\n? b\n",
        "an ordered map": "a: !!omap [b: 1, c: 2]\n",
        "a date": "a: 2001-01-01\nseed: 2001-12-14t21:59:43.10-05:00\n",
        "an invalid date": "a: 2001-99-99\n",
        "sexagesimal": "seed: 190:20:30\n",
        "octal": "seed: 0o17\nresolution: 017\n",
        "underscores": "seed: 1_000\n",
        "yes": "seed: yes\nuse_ema: no\n",
        "keys that are lists": "? [a, b]\n: 1\n",
        "keys that are maps": "? {a: b}\n: 1\n",
        "key null": "~: 1\n",
        "key true": "true: 1\n",
        "number as a key": "1: 1\n",
        "NaN": "seed: .nan\nlearning_rate: .inf\n",
        "documents": "---\na: 1\n---\nb: 2\n",
        "a directive": "%YAML 9.9\n---\na: 1\n",
        "flow lists, depth 100000": "a: " + "[" * 100_000,
        "flow lists, depth 900": "a: " + "[" * 900 + "]" * 900,
        "block maps, depth 700": "".join(" " * n + "a:\n" for n in range(700)),
        "block maps, depth 1400": "".join(" " * n + "a:\n" for n in range(1400)),
        "block lists, depth 50000": "- " * 50_000 + "x",
        "80,000 keys": "".join(f"k{n}: 0\n" for n in range(80_000)),
        "a key 100,000 times": "k: 0\n" * 100_000,
        "300,000 list items": "a: [" + "0," * 300_000 + "]\n",
        "integer of 5000 digits": "seed: " + "9" * 5000 + "\n",
        "integer of 900000 digits": "seed: " + "9" * 900_000 + "\n",
        "hexadecimal of 900000 digits": "seed: 0x" + "f" * 900_000 + "\n",
        "a key of 900 kB": "k" * 900_000 + ": 0\n",
        "a string of 900 kB": "output_dir: " + "s" * 900_000 + "\n",
        "escape sequences": '"\\x1b[31m\\u202e": "\\e]0;title\\a"\n',
        "escape in a value": 'seed: "\\e[31mred"\n',
        "a comment of 1 MB": "# " + "*a " * 330_000 + "\n",
        "interpolation": "seed: ${oc.env:HOME}\n",
        "a surrogate": '"\\ud800": 1\n',
        "nested quotes": "a: '" + "''" * 400_000 + "'\n",
        "a block scalar": "a: |\n" + " x\n" * 300_000,
        "question marks": "? " * 20_000 + "a\n",
    }
    with_valid = {
        f"intact and {name}": valid + b"\n" + text.encode("utf-8", "surrogatepass")
        for name, text in {
            "depth": "extra: " + "[" * 400 + "]" * 400 + "\n",
            "long key": "extra" * 1000 + ": 0\n",
            "its first key again": valid.decode().split("\n")[0] + "\n",
            "an unknown key": "unknown_option: 3\n",
        }.items()
    }
    return {name: content(data) for name, data in (texts | with_valid).items()} | damaged_text(valid)


def csv_files(valid: bytes) -> dict[str, Write]:
    """CSV tables of the columns ``file_name,class,hint,embedding``."""
    header = valid.split(b"\n")[0].decode()
    first = valid.split(b"\n")[1].decode()
    cells = first.split(",")

    def with_class(value: str) -> bytes:
        return valid.replace(first.encode(), ",".join([cells[0], value, *cells[2:]]).encode("utf-8", "surrogatepass"))

    def with_file(value: str) -> bytes:
        return valid + (",".join([value, *cells[1:]]) + "\n").encode("utf-8", "surrogatepass")

    texts: dict[str, bytes | str] = {
        "only a header": header + "\n",
        "no header": first + "\n",
        "no column of names": "a,b\n1,2\n",
        "a column twice": valid.replace(b"class", b"hint", 1),
        "a short row": valid + b"x.png\n",
        "a long row": valid + b"x.png,1,2,3,4,5,6\n",
        "semicolons": valid.replace(b",", b";"),
        "tabs": valid.replace(b",", b"\t"),
        "an open quote": valid + b'"' + b"x" * 200_000,
        "a field of 900 kB": with_class("c" * 900_000),
        "300,000 commas": valid + b"," * 300_000,
        "20,000 columns": ",".join(f"c{n}" for n in range(20_000)) + "\n" + "0," * 20_000,
        "60,000 rows": header + "\n" + "x.png,1,y,z\n" * 60_000,
        "60,000 other names": header + "\n" + "".join(f"{n}.png,1,y,z\n" for n in range(60_000)),
        "a row twice": valid + first.encode() + b"\n",
        "a name outside": with_file("../../../../etc/passwd"),
        "an absolute name": with_file("/etc/passwd"),
        "a name of 5000 characters": with_file("n" * 5000),
        "an empty name": with_file(""),
        "a name with a NUL": with_file("a\0b.png"),
        "a name with an escape": with_file("\x1b[31mred.png"),
        "carriage returns": valid.replace(b"\n", b"\r"),
    }  # fmt: skip
    for value in ("nan", "inf", "-1", "1e400", "9" * 4000, "10000000000", "99999999999999999999", "0x10", "1_000",
                  "", " ", "1.5", "-0", "+1", "٣", "\x1b[31m", "true", "None", "[1, 2]", "1e3"):  # fmt: skip
        texts[f"class {value[:30]!r}"] = with_class(value)
    return {name: content(data) for name, data in texts.items()} | damaged_text(valid)


def npy(header: str | bytes, data: bytes = b"", version: bytes = b"\x01\x00") -> bytes:
    """An .npy file with any header."""
    encoded = header.encode() if isinstance(header, str) else header
    length = struct.pack("<H", len(encoded)) if version[0] == 1 else struct.pack("<I", len(encoded))
    return b"\x93NUMPY" + version + length + encoded + data


def _header(shape: object, descr: object = "<f4", order: object = False) -> str:
    return f"{{'descr': {descr!r}, 'fortran_order': {order!r}, 'shape': {shape!r}, }}\n"


def array_files(shape: tuple[int, ...]) -> dict[str, Write]:
    """.npy files where an array of a shape belongs: lying headers, other types, values that are no numbers."""
    import numpy as np

    def saved(array: object) -> bytes:
        file = io.BytesIO()
        np.save(file, array, allow_pickle=True)
        return file.getvalue()

    plain = np.full(shape, 0.5, dtype=np.float32)
    one = plain.copy()
    texts: dict[str, bytes] = {
        "shape of 10^12": npy(_header((10**12,)), b"\0" * 64),
        "shape of 2^62 x 4": npy(_header((2**62, 4)), b"\0" * 64),
        "shape of 10^5 x 10^5": npy(_header((10**5, 10**5)), b"\0" * 64),
        "shape of 2^64": npy(_header((2**64, 0)), b"\0" * 64),
        "shape of zeros": npy(_header((0, 10**9))),
        "shape of -1": npy(_header((-1, 4)), b"\0" * 64),
        "shape of floats": npy(_header((2.0, 4)), b"\0" * 64),
        "shape of 40 ones": npy(_header((1,) * 40), b"\0" * 4),
        "shape of true": npy(_header((True, True)), b"\0" * 4),
        "no shape": npy("{'descr': '<f4', 'fortran_order': False}\n"),
        "header of 60,000 parentheses": npy("(" * 60_000),
        "header of 900 kB": npy("{" + " " * 900_000, version=b"\x02\x00"),
        "header length of 4 GB": b"\x93NUMPY\x02\x00\xff\xff\xff\xff{",
        "header that is no Python": npy("shape: 3\n"),
        "header that calls": npy("__import__('os').system('echo hi')\n"),
        "header of digits": npy("{'shape': (" + "9" * 50_000 + ",)}"),
        "version 9": npy(_header(shape), b"", b"\x09\x00"),
        "objects": saved(np.array([{}, None], dtype=object)),
        "objects, header only": npy(_header((3,), "|O"), b"\0" * 24),
        "records": saved(np.zeros(shape, dtype=[("a", "<f4"), ("b", "<i4")])),
        "type of 1 GB": npy(_header((1,), "|V1000000000"), b"\0" * 8),
        "text type of 1 GB": npy(_header((1,), "<U250000000"), b"\0" * 8),
        "no type": npy(_header(shape, "nonsense"), b"\0" * 64),
        "type of length 0": npy(_header((10**9,), "|V0")),
        "text of length 0": npy(_header((10**10,), "<U0")),
        "complex": saved(plain.astype(np.complex64)),
        "dates": saved(plain.astype("datetime64[s]")),
        "durations": saved(plain.astype("timedelta64[s]")),
        "texts": saved(plain.astype("<U8")),
        "bytes": saved(plain.astype("S8")),
        "booleans": saved(plain.astype(bool)),
        "float16": saved(plain.astype(np.float16)),
        "float64": saved(plain.astype(np.float64)),
        "float64 of 1e300": saved(np.full(shape, 1e300)),
        "long double": saved(plain.astype(np.longdouble)),
        "int64": saved(plain.astype(np.int64)),
        "uint64 at its limit": saved(np.full(shape, 2**64 - 1, dtype=np.uint64)),
        "big endian": saved(plain.astype(">f4")),
        "Fortran order": saved(np.asfortranarray(plain)),
        "a number": saved(np.float32(3)),
        "one axis less": saved(plain[0]),
        "one axis more": saved(plain[None]),
        "no elements": saved(plain[:0]),
        "no width": saved(plain[..., :0]),
        "half": saved(plain)[: -plain.nbytes // 2],
        "bytes after": saved(plain) + _random(1000),
        "200,000 numbers": saved(np.zeros(200_000, dtype=np.float32)),
        "a pickle": pickle.dumps(plain),
        "text": b"0.5 0.5\n0.5 0.5\n",
        "empty": b"",
        "magic only": b"\x93NUMPY",
        "random bytes": _random(5000),
    }
    for name, value in {"NaN": np.nan, "infinity": np.inf, "-infinity": -np.inf, "3e38": 3e38}.items():
        one.flat[0] = value
        texts[f"one {name}"] = saved(one.copy())
    return {name: content(data) for name, data in texts.items()} | NO_FILES


def zip_of(members: Mapping[str, bytes], method: int = zipfile.ZIP_DEFLATED) -> bytes:
    """A zip archive."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", method) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return file.getvalue()


@cache
def archive_files(key: str, shape: tuple[int, ...]) -> dict[str, Write]:
    """.npz files where an array of a shape belongs under a key."""
    import numpy as np

    intact = io.BytesIO()
    np.save(intact, np.zeros(shape, dtype=np.uint8))
    intact_bytes, name = intact.getvalue(), f"{key}.npy"
    bomb = npy(_header((800_000_000,), "|u1"), b"\0" * 800_000_000)
    lying = zip_of({name: intact_bytes})
    texts: dict[str, bytes] = {
        "a bomb of 800 MB": zip_of({name: bomb}),
        "a bomb, shape fits": zip_of({name: npy(_header((900, 900, 900, 1), "|u1"), b"\0" * 729_000_000)}),
        "a bomb beside": zip_of({name: intact_bytes, "other.npy": bomb[:300_000_000]}),
        "no member": zip_of({}),
        "other member": zip_of({"other.npy": intact_bytes}),
        "member is no array": zip_of({name: b"text"}),
        "member without suffix": zip_of({key: intact_bytes}),
        "10,000 members": zip_of({f"{n}.npy": b"" for n in range(6_000)} | {name: intact_bytes}, zipfile.ZIP_STORED),
        "a name of 60,000 bytes": zip_of({"n" * 60_000: b"", name: intact_bytes}),
        "a name outside": zip_of({"../../x": b"x", name: intact_bytes}),
        "lzma": zip_of({name: intact_bytes}, zipfile.ZIP_LZMA),
        "bzip2": zip_of({name: intact_bytes}, zipfile.ZIP_BZIP2),
        "wrong checksum": lying.replace(struct.pack("<I", zlib.crc32(intact_bytes)), b"\1\2\3\4"),
        "encrypted flag": lying.replace(b"PK\x01\x02\x14\x03\x14\x00\x00\x00", b"PK\x01\x02\x14\x03\x14\x00\x01\x00"),
        "unknown method": lying.replace(b"\x14\x00\x00\x00\x08\x00", b"\x14\x00\x00\x00\x63\x00"),
        "half": lying[: len(lying) // 2],
        "end only": lying[-22:],
        "bytes before": b"x" * 1000 + lying,
        "an .npy file": intact_bytes,
        "objects": zip_of({name: npy(_header((3,), "|O"), pickle.dumps([1, 2, 3]))}),
        "shape of 10^12": zip_of({name: npy(_header((10**12,), "|u1"), b"\0" * 64)}),
        "other shape": zip_of({name: npy(_header((3,), "|u1"), b"\0" * 3)}),
        "floats of NaN": zip_of({name: npy(_header((1, 1), "<f4"), struct.pack("<f", float("nan")))}),
        "texts": zip_of({name: npy(_header((1,), "<U2"), b"a\0\0\0b\0\0\0")}),
        "empty": b"",
        "random bytes": _random(5000),
    }
    return {name: content(data) for name, data in texts.items()} | NO_FILES


def safetensors(header: str | bytes, data: bytes = b"", length: int | None = None) -> bytes:
    """A safetensors file with any header."""
    encoded = header.encode("utf-8", "surrogatepass") if isinstance(header, str) else header
    return struct.pack("<Q", len(encoded) if length is None else length) + encoded + data


def tensor_files(key: str, shape: tuple[int, ...]) -> dict[str, Write]:
    """.safetensors files where a tensor of a shape belongs under a key."""
    count = 1
    for size in shape:
        count *= size

    def one(dtype: str = "F32", size: object = None, offsets: object = None, data: bytes | None = None) -> bytes:
        data = b"\0" * (4 * count) if data is None else data
        entry = {"dtype": dtype, "shape": list(shape) if size is None else size}
        entry["data_offsets"] = [0, len(data)] if offsets is None else offsets
        return safetensors(json.dumps({key: entry}), data)

    many = {f"t{n}": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for n in range(14_000)}
    texts: dict[str, bytes] = {
        "header length of 2^63": safetensors("{}", length=2**63),
        "header length of 2^64 - 1": safetensors("{}", length=2**64 - 1),
        "header length of 90 MB": safetensors("{}", length=90_000_000),
        "header of spaces": safetensors(" " * 900_000),
        "header of lists": safetensors("[" * 500_000),
        "header of objects": safetensors('{"a":' * 100_000 + "0" + "}" * 100_000),
        "header null": safetensors("null"),
        "header list": safetensors("[]"),
        "no tensors": safetensors("{}"),
        "14,000 tensors": safetensors(json.dumps(many)),
        "other tensor": safetensors('{"other":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}', b"\0" * 4),
        "other shape": one(size=[1], data=b"\0" * 4),
        "shape of 10^12": one(size=[10**12]),
        "shape of 0 x 10^18": one(size=[0, 10**18], data=b""),
        "shape of 2^32 squared": one(size=[2**32, 2**32]),
        "negative shape": one(size=[-1, 4]),
        "shape of text": one(size="text"),
        "offsets beyond": one(offsets=[0, 10**12]),
        "offsets backward": one(offsets=[8, 0]),
        "offsets of 2^64": one(offsets=[2**64, 2**64]),
        "unknown type": one("F33"),
        "FP8": one("F8_E4M3", data=b"\0" * count),
        "integers": one("I32"),
        "booleans": one("BOOL", data=b"\0" * count),
        "bfloat16": one("BF16", data=b"\0" * (2 * count)),
        "all NaN": one(data=struct.pack("<f", float("nan")) * count),
        "infinity": one(data=struct.pack("<f", float("inf")) * count),
        "3e38": one(data=struct.pack("<f", 3e38) * count),
        "float64 of 1e300": one("F64", data=struct.pack("<d", 1e300) * count),
        "metadata of 900 kB": safetensors(json.dumps({"__metadata__": {"k": "v" * 900_000}})),
        "metadata with escapes": safetensors('{"__metadata__":{"\\u001b[31m":"x"},"\\u001b[31m":{}}'),
        "a surrogate in a name": safetensors('{"\\ud800":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}}'),
        "half": one()[: 8 + 20],
        "bytes after": one() + b"x" * 100,
        "empty": b"",
        "7 bytes": b"1234567",
        "a pickle": pickle.dumps({key: [0.0]}),
        "a zip": zip_of({"a": b"b"}),
        "Git LFS pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 1\n",
        "random bytes": _random(5000),
    }
    return {name: content(data) for name, data in texts.items()} | NO_FILES


def png(
    width: int, height: int, data: bytes | None = None, bits: int = 8, color: int = 2, extra: bytes = b""
) -> bytes:
    """A PNG file of any stated size; its pixels are zeros that compress well, or any bytes."""

    def chunk(name: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    channels = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}.get(color, 1)
    if data is None:
        row = 1 + (width * channels * bits + 7) // 8
        packer, parts = zlib.compressobj(9), []
        for _ in range(height):
            parts.append(packer.compress(b"\0" * row))
        data = b"".join([*parts, packer.flush()])
    header = struct.pack(">IIBBBBB", width, height, bits, color, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + extra + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def png_chunk(name: bytes, body: bytes) -> bytes:
    """A chunk of a PNG file, for `png`'s ``extra``."""
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))


@cache
def image_files() -> dict[str, tuple[str, Write]]:
    """Image files: name -> suffix and content. Extreme shapes, bombs, many frames, every other format, damage."""
    from PIL import Image

    def saved(kind: str, image: Image.Image, **options: object) -> bytes:
        file = io.BytesIO()
        image.save(file, kind, **options)
        return file.getvalue()

    plain = Image.frombytes("RGB", (8, 8), _random(192))
    frames = [Image.new("L", (8, 8), n % 256) for n in range(2000)]
    wide_frames = [Image.new("P", (1000, 1000), n % 256) for n in range(60)]
    bomb_text = png_chunk(b"zTXt", b"k\0\0" + zlib.compress(b"\0" * 300_000_000, 9)[:900_000])
    profile = png_chunk(b"iCCP", b"p\0\0" + zlib.compress(b"\0" * 300_000_000, 9)[:900_000])
    files: dict[str, tuple[str, bytes]] = {
        "1 x 1,000,000": ("png", png(1, 1_000_000)),
        "1,000,000 x 1": ("png", png(1_000_000, 1)),
        "1 x 1,000,000 gray": ("png", png(1, 1_000_000, color=0)),
        "1 x 100,000,000 stated": ("png", png(1, 100_000_000, b"x")),
        "2^31 - 1 squared, stated": ("png", png(2**31 - 1, 2**31 - 1, b"x")),
        "12000 x 12000": ("png", png(12_000, 12_000, bits=1, color=0)),
        "9400 x 9400": ("png", png(9_400, 9_400, color=0)),
        "5000 x 5000 color": ("png", png(5_000, 5_000)),
        "3000 x 3000 of 16 bits": ("png", png(3_000, 3_000, bits=16, color=0)),
        "3000 x 3000 color of 16 bits": ("png", png(3_000, 3_000, bits=16, color=2)),
        "2 x 300,000": ("png", png(2, 300_000)),
        "0 x 0": ("png", png(0, 0, b"x")),
        "text of 300 MB": ("png", png(8, 8, extra=bomb_text)),
        "profile of 300 MB": ("png", png(8, 8, extra=profile)),
        "50,000 text chunks": ("png", png(8, 8, extra=png_chunk(b"tEXt", b"k\0v") * 50_000)),
        "palette without one": ("png", png(8, 8, color=3)),
        "unknown color type": ("png", png(8, 8, color=7)),
        "no pixels": ("png", png(8, 8, b"")),
        "pixels of another size": ("png", png(800, 800, zlib.compress(b"\0" * 10))),
        "header only": ("png", png(8, 8)[:33]),
        "half": ("png", saved("PNG", plain)[:100]),
        "APNG of 2000 frames": ("png", saved("PNG", frames[0], save_all=True, append_images=frames[1:])[:MIB]),
        "GIF of 2000 frames": ("gif", saved("GIF", frames[0], save_all=True, append_images=frames[1:])),
        "GIF of 60 large frames": ("gif", saved("GIF", wide_frames[0], save_all=True, append_images=wide_frames[1:])),
        "GIF of 65535 x 65535": ("gif", b"GIF89a\xff\xff\xff\xff\x00\x00\x00,\0\0\0\0\xff\xff\xff\xff\0\2\2L\1\0;"),
        "TIFF of 2000 frames": ("tif", saved("TIFF", frames[0], save_all=True, append_images=frames[1:])),
        "TIFF that ends in itself": ("tif", b"II*\0\x08\0\0\0\0\0\x08\0\0\0"),
        "TIFF of 60,000 tags": ("tif", b"II*\0\x08\0\0\0\x60\xea" + (b"\0\1\3\0\1\0\0\0\1\0\0\0" * 60_000)),
        "TIFF with a tag of 4 GB": ("tif", b"II*\0\x08\0\0\0\1\0\0\1\2\0\xff\xff\xff\xff\x10\0\0\0\0\0\0\0"),
        "TIFF of floats": ("tif", saved("TIFF", plain.convert("F"))),
        "TIFF of 32 bits": ("tif", saved("TIFF", plain.convert("I"))),
        "TIFF, deflated 8000 x 8000": ("tif", saved("TIFF", Image.new("L", (8000, 8000)), compression="tiff_deflate")),
        "JPEG": ("jpg", saved("JPEG", plain)),
        "JPEG, half": ("jpg", saved("JPEG", plain)[:200]),
        "JPEG of 60000 x 60000, stated": ("jpg", saved("JPEG", plain).replace(b"\0\x08\0\x08\x03", b"\xea`\xea`\x03")),
        "JPEG, 65500 x 1": ("jpg", saved("JPEG", Image.new("RGB", (65_500, 1)))),
        "JPEG, CMYK": ("jpg", saved("JPEG", plain.convert("CMYK"))),
        "JPEG, progressive, 5000 x 5000": ("jpg", saved("JPEG", Image.new("L", (5000, 5000)), progressive=True)),
        "JPEG with an EXIF of 60 kB": ("jpg", saved("JPEG", plain, exif=b"Exif\0\0" + _random(60_000))),
        "JPEG 2000, 4000 x 4000": ("jp2", saved("JPEG2000", Image.new("L", (4000, 4000)))),
        "WebP, 8000 x 8000": ("webp", saved("WEBP", Image.new("RGB", (8000, 8000)), lossless=True)),
        "WebP of 300 frames": ("webp", saved("WEBP", frames[0].convert("RGB"), save_all=True,
                                             append_images=[f.convert("RGB") for f in frames[1:300]])),
        "WebP, half": ("webp", saved("WEBP", plain)[:40]),
        "BMP of 30000 x 30000, stated": ("bmp", b"BM" + struct.pack("<IHHI", 100, 0, 0, 54)
                                         + struct.pack("<IiiHHIIiiII", 40, 30_000, 30_000, 1, 24, 0, 0, 0, 0, 0, 0)),
        "BMP, run lengths": ("bmp", b"BM" + struct.pack("<IHHI", 2000, 0, 0, 1078)
                             + struct.pack("<IiiHHIIiiII", 40, 20_000, 20_000, 1, 8, 1, 900, 0, 0, 256, 0)
                             + b"\0" * 1024 + b"\xff\x01" * 450),
        "BMP of negative size": ("bmp", b"BM" + struct.pack("<IHHI", 100, 0, 0, 54)
                                 + struct.pack("<IiiHHIIiiII", 40, -8, -2**31, 1, 24, 0, 0, 0, 0, 0, 0)),
        "PGM of 60000 x 60000, stated": ("pgm", b"P5 60000 60000 255\n" + b"\0" * 1000),
        "PGM of a number of 5000 digits": ("pgm", b"P5 " + b"9" * 5000 + b" 1 255\n\0"),
        "PGM in text": ("pgm", b"P2 8 8 255\n" + b"7 " * 64),
        "PGM comment of 1 MB": ("pgm", b"P5\n#" + b"c" * 900_000 + b"\n8 8 255\n" + b"\0" * 64),
        "PFM": ("pfm", b"PF\n8 8\n-1.0\n" + b"\0" * 768),
        "ICO": ("ico", saved("ICO", plain.resize((16, 16)))),
        "ICO of 60,000 icons": ("ico", b"\0\0\1\0`\xea" + b"\x10\x10\0\0\1\0 \0\xff\xff\xff\0\x16\0\0\0" * 60_000),
        "TGA": ("tga", saved("TGA", plain)),
        "TGA of 65535 x 65535": ("tga", b"\0\0\x0a" + b"\0" * 9 + b"\xff\xff\xff\xff\x18\0" + b"\xff\0\0\0" * 100),
        "PCX of 65535 squared": ("pcx", b"\n\5\1\x08\0\0\0\0\xfe\xff\xfe\xff" + b"\0" * 116 + b"\xff\0" * 500),
        "PSD of 30000 x 30000": ("psd", b"8BPS\0\1" + b"\0" * 6 + struct.pack(">HIIHH", 3, 30_000, 30_000, 8, 3)
                                 + b"\0" * 12 + b"\0\0"),
        "DDS of 16384 x 16384": ("dds", b"DDS " + struct.pack("<7I", 124, 0x1007, 16384, 16384, 0, 0, 0) + b"\0" * 44
                                 + struct.pack("<2I4s5I", 32, 4, b"DXT1", 0, 0, 0, 0, 0) + b"\0" * 20 + b"\0" * 99),
        "SGI of 65535 x 65535": ("sgi", b"\x01\xda\1\1\0\3\xff\xff\xff\xff\0\3" + b"\0" * 500),
        "EPS": ("eps", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9999 9999\n%%EndComments\n"
                       b"{ } loop\n%%EOF\n"),
        "PDF": ("pdf", b"%PDF-1.4\n" + b"1 0 obj " * 1000),
        "SVG": ("svg", b'<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"/>'),
        "XBM of 30000 squared": ("xbm", b"#define a_width 30000\n#define a_height 30000\nstatic char a[] = {\n0 };"),
        "XPM of 1 MB": ("xpm", b'/* XPM */\nstatic char *x[] = {\n"9999 9999 2 1",\n' + b'"a c #000000",\n' * 50_000),
        "FITS": ("fits", b"SIMPLE  =                    T".ljust(80) + b"BITPIX  =                    8".ljust(80)
                 + b"NAXIS   =                    2".ljust(80) + b"NAXIS1  =                99999".ljust(80)
                 + b"NAXIS2  =                99999".ljust(80) + b"END".ljust(80) + b" " * 2400),
        "HEIC": ("heic", b"\0\0\0\x18ftypheic\0\0\0\0heicmif1" + _random(500)),
        "AVIF": ("avif", b"\0\0\0\x18ftypavif\0\0\0\0avifmif1" + _random(500)),
        "IM of 30000": ("im", b"Image type: RGB image\r\nImage size (x*y): 9999*9999\r\n".ljust(511, b"\0") + b"\x1a"),
        "MSP": ("msp", b"LinS" + struct.pack("<HH", 65535, 65535) + b"\0" * 24 + b"\xff\0" * 300),
        "QOI of 30000 x 30000": ("qoi", b"qoif" + struct.pack(">IIBB", 30_000, 30_000, 3, 0) + b"\xfd" * 500_000),
        "text as .png": ("png", b"hello\n"),
        "empty": ("png", b""),
        "zip as .png": ("png", zip_of({"a": b"b"})),
        "random bytes": ("png", _random(10_000)),
        "ANSI name": ("\x1b[31m.png", saved("PNG", plain)),
        "name with a newline": ("\n.png", saved("PNG", plain)),
    }  # fmt: skip
    made = {name: (suffix, content(data)) for name, (suffix, data) in files.items() if len(data) <= MIB}
    missing = files.keys() - made.keys()
    if missing:
        print(f"left out, larger than 1 MiB: {', '.join(sorted(missing))}")
    return made | {name: ("png", write) for name, write in NO_FILES.items()}


@cache
def checkpoint_files() -> dict[str, Write]:
    """.ckpt files that are pickles or zips, none with weights."""

    def torch_zip(program: bytes, storage: bytes = b"\0" * 16, method: int = zipfile.ZIP_STORED) -> bytes:
        members = {"archive/data.pkl": program, "archive/version": b"3\n", "archive/data/0": storage}
        return zip_of(members, method)

    def tensor(size: bytes = b"K\x04", shape: bytes = b"K\x04\x85", stride: bytes = b"K\x01\x85") -> bytes:
        """A state dict of one float tensor over storage 0: the program of `torch.save`."""
        return (
            b"\x80\x02}X\x01\x00\x00\x00wctorch._utils\n_rebuild_tensor_v2\n((X\x07\x00\x00\x00storagectorch\n"
            b"FloatStorage\nX\x01\x00\x00\x000X\x03\x00\x00\x00cpu"
            + size
            + b"tQK\x00"
            + shape
            + stride
            + b"\x89ccollections\n"
            b"OrderedDict\n)RtRs."
        )

    big = b"\x8a\x08" + struct.pack("<q", 10**15)
    texts: dict[str, bytes] = {
        "empty": b"",
        "a pickle of nothing": b"\x80\x02N.",
        "a pickle that runs": b"cos\nsystem\n(S'echo hi'\ntR.",
        "lists, depth 300000": b"\x80\x02" + b"]" * 300_000 + b"a" * 299_999 + b".",
        "tuples, depth 500000": b"\x80\x02" + b")" + b"\x85" * 500_000 + b".",
        "500,000 marks": b"\x80\x02" + b"(" * 500_000 + b".",
        "a memo of 2^31": b"\x80\x02]r\xff\xff\xff\x7f.",
        "bytes of 4 GB": b"\x80\x03B\xff\xff\xff\xff",
        "text of 2^63 bytes": b"\x80\x04\x8d" + b"\xff" * 7 + b"\x7f",
        "an integer of 900 kB": b"\x80\x02\x8b" + struct.pack("<i", 900_000) + b"\xff" * 900_000 + b".",
        "an integer in text of 900 kB": b"I" + b"9" * 900_000 + b"\n.",
        "doubling lists": b"\x80\x02]q\x00" + b"".join(b"(h\x00h\x00lq\x00" for _ in range(60)) + b".",
        "a string that doubles": b"\x80\x02X\x01\0\0\0aq\0" + b"(h\0h\0t0" * 50_000 + b".",
        "no stop": b"\x80\x02]",
        "stack empty": b"\x80\x020.",
        "extension": b"\x80\x02\x84\xff\xff\xff\x7f.",
        "frame of 2^63": b"\x80\x04\x95" + b"\xff" * 7 + b"\x7f.",
        "protocol 200": b"\x80\xc8N.",
        "a zip without members": zip_of({}),
        "a zip of text": zip_of({"a.txt": b"hello"}),
        "a zip bomb as data.pkl": torch_zip(b"\0" * 900_000_000, method=zipfile.ZIP_DEFLATED),
        "a storage bomb": torch_zip(tensor(b"J\0\0\0\x30", b"J\0\0\0\x30\x85"), b"\0" * 800_000_000, 8),
        "a tensor of 10^15": torch_zip(tensor(shape=big + b"\x85")),
        "a storage of 10^15": torch_zip(tensor(size=big)),
        "a tensor of stride 0": torch_zip(tensor(shape=b"J\0\0\0\x40\x85", stride=b"K\0\x85")),
        "a negative shape": torch_zip(tensor(shape=b"J\xff\xff\xff\xff\x85")),
        "a tensor, intact": torch_zip(tensor()),
        "10,000 members": zip_of({f"archive/data/{n}": b"" for n in range(7_000)}, zipfile.ZIP_STORED),
        "half a zip": torch_zip(tensor())[:200],
        "a gzip bomb": _gzip_bomb(),
        "Git LFS pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 1\n",
        "a page": b"<!DOCTYPE html><html><body>404</body></html>",
        "random bytes": _random(100_000),
        "all NULs": b"\0" * MIB,
        "a tar of nothing": b"\0" * 10240,
        "old torch magic": pickle.dumps(0x1950A86A20F9469CFC6C, 2) + pickle.dumps(1001, 2) + b"]" * 1000,
    }  # fmt: skip
    return {name: content(data) for name, data in texts.items()} | NO_FILES
