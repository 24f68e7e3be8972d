"""Checkpoint files: what kind one is, what it holds, and one sentence about what is wrong with it.

    torch.save, zip format       every member that is read is checked against its CRC, which torch itself does not do
    torch.save, legacy format    a row of pickles and storages, without checksums
    safetensors                  by its own library
    shards of any of these       by their *.index.json

Tensors are mapped, not copied: a file of any size costs the memory of what is looked at. Optimizer states stay where
they are. Nothing is ever executed (:mod:`diffusers_ddpm_ext.compvis.reader.unpickle`).
"""

from __future__ import annotations

import json
import mmap
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor

from diffusers_ddpm_ext.compvis.reader.storages import MAKERS, LazyTensor, Storage, storage_type, whole
from diffusers_ddpm_ext.compvis.reader.unpickle import Name, Standin, UnreadableCheckpoint, unpickle
from diffusers_ddpm_ext.compvis.reader.zip_file import Member, check_member, read_members

PathLike = str | os.PathLike[str]
MAGIC = 0x1950A86A20F9469CFC6C
LEGACY_PROTOCOL = 1001
INDEX = ".index.json"
MOST_INDEX_BYTES = 64 * 2**20
WRAPPERS = ("state_dict", "model_state_dict", "model", "ema", "module", "net", "params")
LFS = b"version https://git-lfs"
# Beginnings of files that are no checkpoint, and what they are.
OTHERS = {
    b"\x1f\x8b": "a gzip file: unpack it first",
    b"7z\xbc\xaf": "a 7-Zip file: unpack it first",
    b"Rar!": "a RAR file: unpack it first",
    b"BZh": "a bzip2 file: unpack it first",
    b"\xfd7zXZ": "an xz file: unpack it first",
    b"\x28\xb5\x2f\xfd": "a Zstandard file: unpack it first",
    b"\x89PNG": "a picture",
    b"\xff\xd8\xff": "a picture",
    b"GIF8": "a picture",
    b"\x89HDF": "an HDF5 file",
    b"%PDF": "a PDF document",
    b"\x93NUMPY": "a NumPy array",
    b"GGUF": "a GGUF file",
    b"\x7fELF": "a program",
}


@dataclass
class Contents:
    """What a checkpoint file holds.

    Attributes:
        value: plain containers, numbers, text, `LazyTensor` and stand-ins.
        format: ``zip``, ``legacy`` or ``safetensors``.
    """

    value: Any
    format: str


@dataclass(frozen=True)
class Tensors:
    """The named tensors of a checkpoint.

    Attributes:
        tensors: by name, on the CPU, mapped from the file.
        wrapper: key under which the file keeps them; empty where they are at the top.
        facts: numbers and texts beside them, such as ``epoch`` and ``global_step``.
        others: names among them that hold no tensor.
    """

    tensors: dict[str, Tensor]
    wrapper: str = ""
    facts: dict[str, Any] = field(default_factory=dict)
    others: list[str] = field(default_factory=list)


def read_tensors(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """Read the tensors of a checkpoint, whatever it wraps them in.

    Args:
        path: a file of ``torch.save`` or safetensors, whatever its name, or the index of shards.

    Returns:
        Name to tensor, on the CPU; the file's pages are read when they are used.

    Raises:
        UnreadableCheckpoint: a ValueError of one sentence.
        OSError: the file cannot be opened.
    """
    return read_named(path).tensors


def read_named(path: str | os.PathLike[str]) -> Tensors:
    """As `read_tensors`, with what stands beside them.

    Args:
        path: as there.

    Returns:
        The tensors, and what the file says of them.

    Raises:
        UnreadableCheckpoint: a ValueError of one sentence.
        OSError: the file cannot be opened.
    """
    place = Path(path)
    try:
        return _read_named(place)
    except UnreadableCheckpoint as error:
        raise UnreadableCheckpoint(f"{place.name} cannot be read as a checkpoint. {error}") from None


def _read_named(place: Path) -> Tensors:
    if place.is_dir():
        raise UnreadableCheckpoint("It is a folder: give a file in it.")
    if place.name.endswith(INDEX):
        return _shards(place)
    contents = _open(place)
    if contents.format == "safetensors":
        return Tensors(contents.value)
    return _named(contents.value)


def read_checkpoint(path: str | os.PathLike[str]) -> Any:
    """Read all that a file of ``torch.save`` says, with nothing executed and no tensor loaded.

    Args:
        path: the file.

    Returns:
        Dicts, lists, tuples, numbers, text; `LazyTensor` for tensors (``.load()`` maps one), `Standin` and `Name` for
        objects, classes and functions. Of safetensors, name to tensor.

    Raises:
        UnreadableCheckpoint: a ValueError of one sentence.
        OSError: the file cannot be opened.
    """
    place = Path(path)
    try:
        if place.is_dir():
            raise UnreadableCheckpoint("It is a folder: give a file in it.")
        return _open(place).value
    except UnreadableCheckpoint as error:
        raise UnreadableCheckpoint(f"{place.name} cannot be read as a checkpoint. {error}") from None


def _open(place: Path) -> Contents:
    with place.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        head = file.read(512)
        _refuse_others(head, size)
        if head.startswith(b"PK"):
            return Contents(_read_zip(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)), "zip")
        if head[8:9] == b"{" and int.from_bytes(head[:8], "little") <= size:
            return Contents(_read_safetensors(place), "safetensors")
        if head.startswith(b"\x80"):
            return Contents(_read_legacy(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)), "legacy")
    raise UnreadableCheckpoint("It is of no kind that is known here: renamed, encrypted or damaged.")


def _refuse_others(head: bytes, size: int) -> None:
    if not size:
        raise UnreadableCheckpoint("It is empty.")
    for begin, what in OTHERS.items():
        if head.startswith(begin):
            raise UnreadableCheckpoint(f"It is {what}.")
    if head.startswith(LFS):
        raise UnreadableCheckpoint("It is a pointer of git-lfs, not the weights: run git lfs pull.")
    if head[257:262] == b"ustar":
        raise UnreadableCheckpoint("It is a tar file, as torch 0.1 wrote: load and save it with an old torch.")
    text = head.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if text.startswith((b"<!doctype", b"<html", b"<head", b"<?xml")):
        raise UnreadableCheckpoint("It is a web page, not the weights: the download went wrong.")
    if text.startswith((b"{", b"[")) or (b"\0" not in head and _is_text(head)):
        raise UnreadableCheckpoint("It is a text file, not weights.")


def _is_text(head: bytes) -> bool:
    try:
        start = head[:480]
        return start.decode("utf-8").isprintable() or (b"\n" in start and start.isascii())
    except UnicodeDecodeError:
        return False


# ---------------------------------------------------------------------- zip


def _read_zip(memory: mmap.mmap) -> Any:
    members = read_members(memory)
    pickles = [name for name in members if name.endswith("/data.pkl") or name == "data.pkl"]
    if len(pickles) != 1:
        if any(name.endswith("/constants.pkl") for name in members):
            raise UnreadableCheckpoint("It is a TorchScript program, not weights.")
        raise UnreadableCheckpoint("It is a zip file without exactly one data.pkl: not written by torch.save.")
    root = pickles[0].removesuffix("data.pkl")
    if f"{root}constants.pkl" in members:
        raise UnreadableCheckpoint("It is a TorchScript program, not weights.")
    order = members.get(f"{root}byteorder")
    if order is not None and bytes(check_member(memory, order)) != b"little":
        raise UnreadableCheckpoint("Its numbers are big-endian, or its byte order is damaged.")
    checked: set[str] = set()

    def locate(storage: Storage) -> tuple[mmap.mmap, int]:
        member = _data(members, root, storage)
        if storage.key not in checked:
            check_member(memory, member)
            checked.add(storage.key)
        return memory, member.start

    def persistent(pid: Any) -> Storage:
        _, kind, key, _, numel = _pid(pid, 5)
        return Storage(storage_type(kind), whole(numel, "length"), key, locate)

    return unpickle(check_member(memory, members[pickles[0]]), persistent, MAKERS).value


def _data(members: Mapping[str, Member], root: str, storage: Storage) -> Member:
    member = members.get(f"{root}data/{storage.key}")
    if member is None:
        raise UnreadableCheckpoint(f"The storage {storage.key[:40]!r} is missing: the file is incomplete or damaged.")
    if member.size != storage.numel * storage.dtype.itemsize:
        raise UnreadableCheckpoint(
            f"The storage {storage.key[:40]!r} has {member.size:,} bytes and should have "
            f"{storage.numel * storage.dtype.itemsize:,}: the file is damaged."
        )
    return member


def _pid(pid: Any, parts: int) -> tuple[Any, ...]:
    """A storage's persistent id: what, kind, key, place, number of entries."""
    if not isinstance(pid, tuple) or len(pid) < parts or pid[0] != "storage" or not isinstance(pid[2], str):
        raise UnreadableCheckpoint("The pickle in it refers to something that is no storage.")
    return pid[:parts]


# ---------------------------------------------------------------------- legacy


def _read_legacy(memory: mmap.mmap) -> Any:
    data = memoryview(memory)
    first = unpickle(data)
    if first.value != MAGIC:
        raise UnreadableCheckpoint("It is a plain pickle, not written by torch.save: nothing in it is executed here.")
    protocol = unpickle(data, start=first.end)
    if protocol.value != LEGACY_PROTOCOL:
        raise UnreadableCheckpoint("Its protocol is not torch's: the file is damaged.")
    system = unpickle(data, start=protocol.end)
    if not isinstance(system.value, dict) or system.value.get("little_endian") is not True:
        raise UnreadableCheckpoint("Its numbers are big-endian, or its head is damaged.")
    storages: dict[str, Storage] = {}
    places: dict[str, int] = {}

    def locate(storage: Storage) -> tuple[mmap.mmap, int]:
        return memory, places[storage.key]

    def persistent(pid: Any) -> Any:
        if isinstance(pid, tuple) and len(pid) == 4 and pid[0] == "module":
            return pid[1]  # a class with its source code, which is not looked at
        _, kind, key, _, numel, *view = _pid(pid, 6)
        known = storages.setdefault(key, Storage(storage_type(kind), whole(numel, "length"), key, locate))
        if known.dtype != storage_type(kind) or known.numel != numel:
            raise UnreadableCheckpoint("It describes a storage in two ways: the file is damaged.")
        return known if view[0] is None else _view(known, view[0])

    body = unpickle(data, persistent, MAKERS, start=system.end)
    keys = unpickle(data, start=body.end)
    if not isinstance(keys.value, list) or set(map(_text, keys.value)) != set(storages):
        raise UnreadableCheckpoint("Its list of storages is not that of its tensors: the file is damaged.")
    at = keys.end
    for key in keys.value:
        storage = storages[key]
        size = storage.numel * storage.dtype.itemsize
        if at + 8 > len(memory) or int.from_bytes(memory[at : at + 8], "little") != storage.numel:
            raise UnreadableCheckpoint("A storage's length is wrong: the file is damaged or incomplete.")
        places[key], at = at + 8, at + 8 + size
        if at > len(memory):
            raise UnreadableCheckpoint("The last storages are missing: the file is incomplete.")
    if at != len(memory):
        raise UnreadableCheckpoint(f"It has {len(memory) - at:,} bytes too many: the file is damaged.")
    return body.value


def _text(key: Any) -> str:
    return key if isinstance(key, str) else ""


def _view(root: Storage, view: Any) -> Storage:
    """A part of a storage, as old files have them."""
    if not isinstance(view, tuple) or len(view) != 3:
        raise UnreadableCheckpoint("It describes a part of a storage in a way that is not known.")
    offset, numel = whole(view[1], "offset"), whole(view[2], "length")
    if offset + numel > root.numel:
        raise UnreadableCheckpoint("It describes a part of a storage that reaches beyond it.")

    def locate(storage: Storage) -> tuple[mmap.mmap, int]:
        memory, first = root.locate(root)
        return memory, first + offset * root.dtype.itemsize

    return Storage(root.dtype, numel, root.key, locate)


# ---------------------------------------------------------------------- safetensors, shards


def _read_safetensors(place: Path) -> dict[str, Tensor]:
    try:
        with safe_open(place, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is no mapping
    except Exception as error:  # safetensors' own error class differs between its versions
        why = " ".join(str(error).split())[:120]
        raise UnreadableCheckpoint(f"Its safetensors header is damaged ({why}).") from None


def _shards(place: Path) -> Tensors:
    if place.stat().st_size > MOST_INDEX_BYTES:
        raise UnreadableCheckpoint("The index of shards is too large to be one.")
    try:
        names = json.loads(place.read_text(encoding="utf-8"))["weight_map"]
    except (ValueError, KeyError, TypeError, RecursionError):
        raise UnreadableCheckpoint("The index of shards is no JSON with a weight_map.") from None
    if not isinstance(names, dict) or not names or not all(isinstance(name, str) for name in names.values()):
        raise UnreadableCheckpoint("The index of shards has no weight_map of names to files.")
    tensors: dict[str, Tensor] = {}
    for shard in dict.fromkeys(names.values()):
        if Path(shard).name != shard or shard.endswith(INDEX) or shard in ("", ".", ".."):
            raise UnreadableCheckpoint("The index of shards names a file outside of its folder.")
        if not (place.parent / shard).is_file():
            raise UnreadableCheckpoint(f"The shard {shard[:80]} is missing.")
        held = read_tensors(place.parent / shard)
        lacking = [name for name, where in names.items() if where == shard and name not in held]
        if lacking:
            raise UnreadableCheckpoint(f"The shard {shard[:80]} lacks {', '.join(lacking[:3])}.")
        tensors |= {name: held[name] for name, where in names.items() if where == shard}
    return Tensors(tensors)


# ---------------------------------------------------------------------- what is in it


def _named(value: Any) -> Tensors:
    """The dictionary of tensors in what a pickle holds."""
    if isinstance(value, Standin | Name):
        raise UnreadableCheckpoint("It is a whole pickled object, not a state_dict: save model.state_dict() instead.")
    if isinstance(value, LazyTensor):
        raise UnreadableCheckpoint("It holds a single tensor without a name, not a state_dict.")
    if not isinstance(value, dict):
        raise UnreadableCheckpoint(f"It holds a {type(value).__name__}, not a state_dict.")
    wrapper = next((key for key in WRAPPERS if isinstance(value.get(key), dict) and _has_tensors(value[key])), "")
    held = value[wrapper] if wrapper else value
    if not _has_tensors(held):
        if any(isinstance(value.get(key), Standin) for key in WRAPPERS):
            raise UnreadableCheckpoint("It holds a whole pickled object, not a state_dict.")
        raise UnreadableCheckpoint("It holds no dictionary of tensors, at the top or under state_dict.")
    lazy = {name: entry for name, entry in held.items() if isinstance(name, str) and isinstance(entry, LazyTensor)}
    tensors = {name: entry.load() for name, entry in lazy.items()}
    facts = {
        key: entry
        for key, entry in (value.items() if wrapper else ())
        if isinstance(key, str) and isinstance(entry, bool | int | float | str)
    }
    return Tensors(tensors, wrapper, facts, [str(name)[:80] for name in held if name not in tensors])


def _has_tensors(held: Mapping[Any, Any]) -> bool:
    return any(isinstance(entry, LazyTensor) for entry in held.values())
