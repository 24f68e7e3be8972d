"""Checkpoint files: detection of their format, reading of their tensors, and one sentence about a damaged file.

    torch.save, zip format       the CRC of every member that is read is checked, which torch itself does not do
    torch.save, legacy format    pickles followed by storages, without checksums
    safetensors                  by its own library
    shards of any of these       by their *.index.json

Tensors are mapped, not copied, so that memory grows only with the tensors that are used; optimizer states are not
loaded. Nothing is ever executed (`diffusers_ddpm_ext.compvis.reader.unpickle`).
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor

from diffusers_ddpm_ext.compvis.reader.pickle_machine import GlobalName, StandIn, UnreadableCheckpoint
from diffusers_ddpm_ext.compvis.reader.storages import (
    TENSOR_CONSTRUCTORS,
    LazyTensor,
    Storage,
    check_count,
    storage_dtype,
)
from diffusers_ddpm_ext.compvis.reader.unpickle import unpickle
from diffusers_ddpm_ext.compvis.reader.zip_file import ZipMember, check_member, read_members
from diffusers_ddpm_ext.errors import ConfigError
from diffusers_ddpm_ext.utils.input_files import open_input, read_json_object

PathLike = str | os.PathLike[str]
LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
LEGACY_PROTOCOL = 1001
SHARD_INDEX_SUFFIX = ".index.json"
MAX_INDEX_BYTES = 64 * 2**20
STATE_DICT_KEYS = ("state_dict", "model_state_dict", "model", "ema", "module", "net", "params")
GIT_LFS_HEADER = b"version https://git-lfs"
# First bytes of files that are not checkpoints.
OTHER_FORMATS = {
    b"\x1f\x8b": "a gzip file: decompress it first",
    b"7z\xbc\xaf": "a 7-Zip file: decompress it first",
    b"Rar!": "a RAR file: decompress it first",
    b"BZh": "a bzip2 file: decompress it first",
    b"\xfd7zXZ": "an xz file: decompress it first",
    b"\x28\xb5\x2f\xfd": "a Zstandard file: decompress it first",
    b"\x89PNG": "an image",
    b"\xff\xd8\xff": "an image",
    b"GIF8": "an image",
    b"\x89HDF": "an HDF5 file",
    b"%PDF": "a PDF document",
    b"\x93NUMPY": "a NumPy array",
    b"GGUF": "a GGUF file",
    b"\x7fELF": "a program",
}


def read_tensors(path: PathLike) -> dict[str, Tensor]:
    """Read the tensors of a checkpoint, at its top level or under a key such as ``state_dict``.

    Args:
        path: a file of ``torch.save`` or safetensors with any suffix, or the index of shards.

    Returns:
        Name to tensor, on the CPU, mapped from the file.

    Raises:
        UnreadableCheckpoint: a ValueError of one sentence.
        OSError: the file cannot be opened.
    """
    file = Path(path)
    try:
        if file.is_dir():
            raise UnreadableCheckpoint("It is a folder: give a file in it.")
        return _read_shards(file) if file.name.endswith(SHARD_INDEX_SUFFIX) else _read_file(file)
    except UnreadableCheckpoint as error:
        raise UnreadableCheckpoint(f"{file.name} cannot be read as a checkpoint. {error}") from None


def _read_file(path: Path) -> dict[str, Tensor]:
    with open_input(path) as file:
        size = os.fstat(file.fileno()).st_size
        head = file.read(512)
        _refuse_other_formats(head, size)
        if head.startswith(b"PK"):
            return _state_dict(read_zip(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)))
        if head[8:9] == b"{" and int.from_bytes(head[:8], "little") <= size:
            return _read_safetensors(path)
        if head.startswith(b"\x80"):
            return _state_dict(read_legacy(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)))
    raise UnreadableCheckpoint("It has an unknown format, or it is encrypted or damaged.")


def _refuse_other_formats(head: bytes, size: int) -> None:
    if not size:
        raise UnreadableCheckpoint("It is empty.")
    for magic, what in OTHER_FORMATS.items():
        if head.startswith(magic):
            raise UnreadableCheckpoint(f"It is {what}.")
    if head.startswith(GIT_LFS_HEADER):
        raise UnreadableCheckpoint("It is a pointer of git-lfs, not the weights: run git lfs pull.")
    if head[257:262] == b"ustar":
        raise UnreadableCheckpoint("It is a tar file, as torch 0.1 wrote: load and save it with an old torch.")
    text = head.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if text.startswith((b"<!doctype", b"<html", b"<head", b"<?xml")):
        raise UnreadableCheckpoint("It is a web page, not the weights: the download failed.")
    if text.startswith((b"{", b"[")) or (b"\0" not in head and _is_text(head)):
        raise UnreadableCheckpoint("It is a text file, not weights.")


def _is_text(head: bytes) -> bool:
    try:
        start = head[:480]
        return start.decode("utf-8").isprintable() or (b"\n" in start and start.isascii())
    except UnicodeDecodeError:
        return False


# ---------------------------------------------------------------------- zip


def read_zip(memory: mmap.mmap) -> Any:
    """The content of a file of ``torch.save`` in the zip format: plain containers, `LazyTensor` and stand-ins."""
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
        raise UnreadableCheckpoint("It is big-endian, or its byte order is damaged.")
    checked: set[str] = set()

    def locate(storage: Storage) -> tuple[mmap.mmap, int]:
        member = _storage_member(members, root, storage)
        if storage.key not in checked:
            check_member(memory, member)
            checked.add(storage.key)
        return memory, member.start

    def persistent(pid: Any) -> Storage:
        _, storage_class, key, _, numel = _check_pid(pid, 5)
        return Storage(storage_dtype(storage_class), check_count(numel, "length"), key, locate)

    return unpickle(check_member(memory, members[pickles[0]]), persistent, TENSOR_CONSTRUCTORS).value


def _storage_member(members: Mapping[str, ZipMember], root: str, storage: Storage) -> ZipMember:
    member = members.get(f"{root}data/{storage.key}")
    if member is None:
        raise UnreadableCheckpoint(f"The storage {storage.key[:40]!r} is missing: the file is incomplete or damaged.")
    expected = storage.numel * storage.dtype.itemsize
    if member.size != expected:
        raise UnreadableCheckpoint(
            f"The storage {storage.key[:40]!r} has {member.size:,} bytes instead of {expected:,}: the file is damaged."
        )
    return member


def _check_pid(pid: Any, parts: int) -> tuple[Any, ...]:
    """The parts of a storage's persistent id: "storage", its class, key, device, number of elements, ..."""
    if not isinstance(pid, tuple) or len(pid) < parts or pid[0] != "storage" or not isinstance(pid[2], str):
        raise UnreadableCheckpoint("Its pickle refers to something that is not a storage.")
    return pid[:parts]


# ---------------------------------------------------------------------- legacy


def read_legacy(memory: mmap.mmap) -> Any:
    """The content of a file of ``torch.save`` in the legacy format: plain containers, `LazyTensor` and stand-ins."""
    data = memoryview(memory)
    start = _check_legacy_header(data)
    storages: dict[str, Storage] = {}
    offsets: dict[str, int] = {}

    def locate(storage: Storage) -> tuple[mmap.mmap, int]:
        return memory, offsets[storage.key]

    def persistent(pid: Any) -> Any:
        if isinstance(pid, tuple) and len(pid) == 4 and pid[0] == "module":
            return pid[1]  # a class with its source code, which is ignored
        _, storage_class, key, _, numel, *view = _check_pid(pid, 6)
        dtype = storage_dtype(storage_class)
        known = storages.setdefault(key, Storage(dtype, check_count(numel, "length"), key, locate))
        if known.dtype != dtype or known.numel != numel:
            raise UnreadableCheckpoint("It describes one storage in two ways: the file is damaged.")
        return known if view[0] is None else _storage_view(known, view[0])

    content = unpickle(data, persistent, TENSOR_CONSTRUCTORS, start=start)
    keys = unpickle(data, start=content.end)
    order = [key if isinstance(key, str) else "" for key in keys.value] if isinstance(keys.value, list) else None
    if order is None or set(order) != set(storages):
        raise UnreadableCheckpoint("Its list of storages does not match its tensors: the file is damaged.")
    offsets.update(_storage_offsets(memory, [storages[key] for key in order], keys.end))
    return content.value


def _check_legacy_header(data: memoryview) -> int:
    """Check magic number, protocol and byte order; return the offset of the next pickle."""
    magic = unpickle(data)
    if magic.value != LEGACY_MAGIC:
        raise UnreadableCheckpoint("It is a plain pickle, not written by torch.save: nothing in it is executed here.")
    protocol = unpickle(data, start=magic.end)
    if protocol.value != LEGACY_PROTOCOL:
        raise UnreadableCheckpoint("Its protocol is not torch's: the file is damaged.")
    system = unpickle(data, start=protocol.end)
    if not isinstance(system.value, dict) or system.value.get("little_endian") is not True:
        raise UnreadableCheckpoint("It is big-endian, or its header is damaged.")
    return system.end


def _storage_offsets(memory: mmap.mmap, storages: list[Storage], start: int) -> dict[str, int]:
    """Offset of each storage's first byte, by key; each is preceded by its length, and the last ends the file."""
    offsets = {}
    for storage in storages:
        if start + 8 > len(memory) or int.from_bytes(memory[start : start + 8], "little") != storage.numel:
            raise UnreadableCheckpoint("The length of a storage is wrong: the file is damaged or incomplete.")
        offsets[storage.key] = start + 8
        start += 8 + storage.numel * storage.dtype.itemsize
        if start > len(memory):
            raise UnreadableCheckpoint("The last storages are missing: the file is incomplete.")
    if start != len(memory):
        raise UnreadableCheckpoint(f"It has {len(memory) - start:,} bytes too many: the file is damaged.")
    return offsets


def _storage_view(root: Storage, view: Any) -> Storage:
    """A part of a storage, as in old files."""
    if not isinstance(view, tuple) or len(view) != 3:
        raise UnreadableCheckpoint("It describes a part of a storage in an unknown way.")
    offset, numel = check_count(view[1], "offset"), check_count(view[2], "length")
    if offset + numel > root.numel:
        raise UnreadableCheckpoint("It describes a part of a storage that exceeds the storage.")

    def locate(storage: Storage) -> tuple[mmap.mmap, int]:
        memory, start = root.locate(root)
        return memory, start + offset * root.dtype.itemsize

    return Storage(root.dtype, numel, root.key, locate)


# ---------------------------------------------------------------------- safetensors, shards


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
    except Exception as error:  # the error class of safetensors differs between its versions
        why = " ".join(str(error).split())[:120]
        raise UnreadableCheckpoint(f"Its safetensors header is damaged ({why}).") from None


def _read_shards(index: Path) -> dict[str, Tensor]:
    try:
        files = read_json_object(index, max_bytes=MAX_INDEX_BYTES).object("weight_map").content
    except ConfigError as error:
        raise UnreadableCheckpoint(f"The index of shards is not JSON with a weight_map: {error}") from None
    if not isinstance(files, dict) or not files or not all(isinstance(file, str) for file in files.values()):
        raise UnreadableCheckpoint("The index of shards has no weight_map from names to files.")
    tensors: dict[str, Tensor] = {}
    for shard in dict.fromkeys(files.values()):
        if Path(shard).name != shard or shard.endswith(SHARD_INDEX_SUFFIX) or shard in ("", ".", ".."):
            raise UnreadableCheckpoint("The index of shards names a file outside of its folder.")
        if not (index.parent / shard).is_file():
            raise UnreadableCheckpoint(f"The shard {shard[:80]} is missing.")
        content = read_tensors(index.parent / shard)
        names = [name for name, file in files.items() if file == shard]
        missing = [name for name in names if name not in content]
        if missing:
            raise UnreadableCheckpoint(f"The shard {shard[:80]} lacks {', '.join(missing[:3])}.")
        tensors |= {name: content[name] for name in names}
    return tensors


# ---------------------------------------------------------------------- state_dict


def _state_dict(content: Any) -> dict[str, Tensor]:
    """The dictionary of tensors in the content of a pickle."""
    if isinstance(content, StandIn | GlobalName):
        raise UnreadableCheckpoint("It is a pickled object, not a state_dict: save model.state_dict() instead.")
    if isinstance(content, LazyTensor):
        raise UnreadableCheckpoint("It is a single tensor without a name, not a state_dict.")
    if not isinstance(content, dict):
        raise UnreadableCheckpoint(f"It is a {type(content).__name__}, not a state_dict.")
    nested = (content[key] for key in STATE_DICT_KEYS if isinstance(content.get(key), dict))
    state_dict = next((value for value in nested if _has_tensors(value)), content)
    if not _has_tensors(state_dict):
        if any(isinstance(content.get(key), StandIn) for key in STATE_DICT_KEYS):
            raise UnreadableCheckpoint("It contains a pickled object, not a state_dict.")
        raise UnreadableCheckpoint("It contains no dictionary of tensors, at the top level or under state_dict.")
    return {
        name: value.load()
        for name, value in state_dict.items()
        if isinstance(name, str) and isinstance(value, LazyTensor)
    }


def _has_tensors(values: Mapping[Any, Any]) -> bool:
    return any(isinstance(value, LazyTensor) for value in values.values())
