"""Zip files of ``torch.save``: their central directory, and members checked against their CRCs.

Members must be stored: compressed or encrypted ones, which torch does not write, are refused.
"""

from __future__ import annotations

import mmap
import struct
import zlib
from dataclasses import dataclass

from diffusers_ddpm_ext.compvis.reader.pickle_machine import UnreadableCheckpoint

END_RECORD, END64_RECORD, LOCATOR64, DIRECTORY_ENTRY, LOCAL_HEADER = (
    b"PK\5\6",
    b"PK\6\6",
    b"PK\6\7",
    b"PK\1\2",
    b"PK\3\4",
)
MAX_DIRECTORY_BYTES = 8 * 2**20  # some 80,000 members
MAX_COMMENT_BYTES = 65_535
CHUNK_BYTES = 2**22
MAX_UINT32, MAX_UINT16 = 0xFFFFFFFF, 0xFFFF


@dataclass(frozen=True, slots=True)
class ZipMember:
    """A member of the archive: its name, offset of its first byte, size in bytes, and CRC-32."""

    name: str
    start: int
    size: int
    crc: int


def read_members(memory: mmap.mmap) -> dict[str, ZipMember]:
    """Read the central directory of a file: the members by name.

    Raises:
        UnreadableCheckpoint: it is truncated, damaged, compressed or encrypted.
    """
    try:
        return _read_members(memory)
    except (struct.error, IndexError):
        raise UnreadableCheckpoint("Its zip directory is damaged.") from None


def _read_members(memory: mmap.mmap) -> dict[str, ZipMember]:
    end = memory.rfind(END_RECORD, max(0, len(memory) - MAX_COMMENT_BYTES - 22))
    if end < 0:
        raise UnreadableCheckpoint(
            "Its zip directory is missing: the file is incomplete, such as an interrupted download."
        )
    count, size, offset, comment = struct.unpack_from("<HLLH", memory, end + 10)
    if end + 22 + comment != len(memory):
        raise UnreadableCheckpoint("Its zip directory is damaged, or the file is incomplete.")
    if count == MAX_UINT16 or MAX_UINT32 in (size, offset):
        count, size, offset = _zip64(memory, end)
    if size > MAX_DIRECTORY_BYTES:
        raise UnreadableCheckpoint("Its zip directory is larger than any checkpoint's.")
    if offset + size > end:
        raise UnreadableCheckpoint("Its zip directory is damaged.")
    members: dict[str, ZipMember] = {}
    directory, at = memory[offset : offset + size], 0
    for _ in range(count):
        member, at = _read_entry(memory, directory, at)
        if member.name in members:
            raise UnreadableCheckpoint(f"Its member {member.name[:40]!r} exists twice.")
        members[member.name] = member
    if at != size:
        raise UnreadableCheckpoint("Its zip directory is damaged.")
    if sum(member.size for member in members.values()) > len(memory):
        raise UnreadableCheckpoint("Its members overlap each other: the file was made to be slow to check.")
    return members


def _zip64(memory: mmap.mmap, end: int) -> tuple[int, int, int]:
    if end < 20 or memory[end - 20 : end - 16] != LOCATOR64:
        raise UnreadableCheckpoint("Its zip directory is damaged.")
    (place,) = struct.unpack_from("<Q", memory, end - 12)
    if place + 56 > end or memory[place : place + 4] != END64_RECORD:
        raise UnreadableCheckpoint("Its zip directory is damaged.")
    count, size, offset = struct.unpack_from("<QQQ", memory, place + 32)
    return count, size, offset


def _read_entry(memory: mmap.mmap, directory: bytes, at: int) -> tuple[ZipMember, int]:
    """Read one entry of the directory; return it and the offset of the next one."""
    if directory[at : at + 4] != DIRECTORY_ENTRY:
        raise UnreadableCheckpoint("Its zip directory is damaged.")
    flags, method, _, _, crc, packed, size, name_size, extra_size, comment_size = struct.unpack_from(
        "<HHHHLLLHHH", directory, at + 8
    )
    (local,) = struct.unpack_from("<L", directory, at + 42)
    after = at + 46 + name_size
    if after + extra_size + comment_size > len(directory):
        raise UnreadableCheckpoint("Its zip directory is damaged.")
    name = directory[at + 46 : after].decode("utf-8", "replace")
    if MAX_UINT32 in (packed, size, local):
        packed, size, local = _read_zip64_sizes(directory[after : after + extra_size], packed, size, local)
    if flags & 1:
        raise UnreadableCheckpoint("It is encrypted.")
    if method != 0 or packed != size:
        raise UnreadableCheckpoint(f"Its member {name[:40]!r} is compressed, which torch.save never does.")
    return ZipMember(name, _data_offset(memory, name, local, size), size, crc), after + extra_size + comment_size


def _read_zip64_sizes(extra: bytes, packed: int, size: int, local: int) -> tuple[int, int, int]:
    """The sizes of a member too large for 32 bits, from its extra field, which has the needed ones in this order."""
    at = 0
    while at + 4 <= len(extra):
        kind, length = struct.unpack_from("<HH", extra, at)
        if kind == 1:
            body = extra[at + 4 : at + 4 + length]
            values = iter(struct.unpack(f"<{len(body) // 8}Q", body[: len(body) // 8 * 8]))
            try:
                size = next(values) if size == MAX_UINT32 else size
                packed = next(values) if packed == MAX_UINT32 else packed
                local = next(values) if local == MAX_UINT32 else local
            except StopIteration:
                break
            return packed, size, local
        at += 4 + length
    raise UnreadableCheckpoint("Its zip directory is damaged.")


def _data_offset(memory: mmap.mmap, name: str, local: int, size: int) -> int:
    """Offset of a member's first byte, after its local header."""
    if local + 30 > len(memory) or memory[local : local + 4] != LOCAL_HEADER:
        raise UnreadableCheckpoint(f"The header of its member {name[:40]!r} is damaged.")
    name_size, extra_size = struct.unpack_from("<HH", memory, local + 26)
    start: int = local + 30 + name_size + extra_size
    if start + size > len(memory):
        raise UnreadableCheckpoint(f"Its member {name[:40]!r} is truncated: the file is incomplete.")
    return start


def check_member(memory: mmap.mmap, member: ZipMember) -> memoryview:
    """Compare a member with its CRC, and return its bytes without a copy.

    Raises:
        UnreadableCheckpoint: the bytes are damaged.
    """
    view = memoryview(memory)[member.start : member.start + member.size]
    crc = 0
    for at in range(0, member.size, CHUNK_BYTES):
        crc = zlib.crc32(view[at : at + CHUNK_BYTES], crc)
    if crc != member.crc:
        raise UnreadableCheckpoint(f"Its member {member.name[:40]!r} is damaged: its checksum is wrong.")
    return view
