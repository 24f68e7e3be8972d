"""The table of contents of a zip file that ``torch.save`` wrote, and its members, checked against their CRCs.

Members lie in the file as they are: compressed or encrypted ones, which torch does not write, are refused.
"""

from __future__ import annotations

import mmap
import struct
import zlib
from dataclasses import dataclass

from diffusers_ddpm_ext.compvis.reader.unpickle import UnreadableCheckpoint

END, END64, LOCATOR, ENTRY, LOCAL = b"PK\5\6", b"PK\6\6", b"PK\6\7", b"PK\1\2", b"PK\3\4"
MOST_DIRECTORY_BYTES = 8 * 2**20  # some 80,000 members
LONGEST_COMMENT = 65_535
CHUNK = 2**22
FULL32, FULL16 = 0xFFFFFFFF, 0xFFFF


@dataclass(frozen=True, slots=True)
class Member:
    """A file in the archive.

    Attributes:
        name: of it.
        start: its first byte in the file.
        size: in bytes.
        crc: of its bytes.
    """

    name: str
    start: int
    size: int
    crc: int


def read_members(memory: mmap.mmap) -> dict[str, Member]:
    """Read the table of contents.

    Args:
        memory: the whole file.

    Returns:
        The members by name.

    Raises:
        UnreadableCheckpoint: it is cut off, damaged, compressed or encrypted.
    """
    try:
        return _read_members(memory)
    except (struct.error, IndexError):
        raise UnreadableCheckpoint("Its table of contents is damaged.") from None


def _read_members(memory: mmap.mmap) -> dict[str, Member]:
    end = memory.rfind(END, max(0, len(memory) - LONGEST_COMMENT - 22))
    if end < 0:
        raise UnreadableCheckpoint("Its table of contents is missing: the file is incomplete, a download broken off.")
    count, size, offset, comment = struct.unpack_from("<HLLH", memory, end + 10)
    if end + 22 + comment != len(memory):
        raise UnreadableCheckpoint("Its table of contents is damaged, or the file incomplete.")
    if count == FULL16 or FULL32 in (size, offset):
        count, size, offset = _zip64(memory, end)
    if size > MOST_DIRECTORY_BYTES:
        raise UnreadableCheckpoint("Its table of contents is larger than any checkpoint's.")
    if offset + size > end:
        raise UnreadableCheckpoint("Its table of contents is damaged.")
    members: dict[str, Member] = {}
    table, at = memory[offset : offset + size], 0
    for _ in range(count):
        at = _read_entry(memory, table, at, members)
    if at != size:
        raise UnreadableCheckpoint("Its table of contents is damaged.")
    if sum(member.size for member in members.values()) > len(memory):
        raise UnreadableCheckpoint("Its members lie over each other: the file was made to be slow to check.")
    return members


def _zip64(memory: mmap.mmap, end: int) -> tuple[int, int, int]:
    if end < 20 or memory[end - 20 : end - 16] != LOCATOR:
        raise UnreadableCheckpoint("Its table of contents is damaged.")
    (place,) = struct.unpack_from("<Q", memory, end - 12)
    if place + 56 > end or memory[place : place + 4] != END64:
        raise UnreadableCheckpoint("Its table of contents is damaged.")
    count, size, offset = struct.unpack_from("<QQQ", memory, place + 32)
    return count, size, offset


def _read_entry(memory: mmap.mmap, table: bytes, at: int, members: dict[str, Member]) -> int:
    """Read one entry; return where the next one begins."""
    if table[at : at + 4] != ENTRY:
        raise UnreadableCheckpoint("Its table of contents is damaged.")
    flags, method, _, _, crc, packed, size, name_size, extra_size, comment_size = struct.unpack_from(
        "<HHHHLLLHHH", table, at + 8
    )
    (local,) = struct.unpack_from("<L", table, at + 42)
    after = at + 46 + name_size
    if after + extra_size + comment_size > len(table):
        raise UnreadableCheckpoint("Its table of contents is damaged.")
    name = table[at + 46 : after].decode("utf-8", "replace")
    if FULL32 in (packed, size, local):
        packed, size, local = _wide(table[after : after + extra_size], packed, size, local)
    if flags & 1:
        raise UnreadableCheckpoint("It is encrypted.")
    if method != 0 or packed != size:
        raise UnreadableCheckpoint(f"Its member {name[:40]!r} is compressed, which torch.save never does.")
    if name in members:
        raise UnreadableCheckpoint(f"Its member {name[:40]!r} is there twice.")
    members[name] = Member(name, _start(memory, name, local, size), size, crc)
    return after + extra_size + comment_size


def _wide(extra: bytes, packed: int, size: int, local: int) -> tuple[int, int, int]:
    """The sizes of a member too large for 32 bits: they stand in its extra field, in this order, where needed."""
    at = 0
    while at + 4 <= len(extra):
        kind, length = struct.unpack_from("<HH", extra, at)
        if kind == 1:
            body = extra[at + 4 : at + 4 + length]
            values = iter(struct.unpack(f"<{len(body) // 8}Q", body[: len(body) // 8 * 8]))
            try:
                size = next(values) if size == FULL32 else size
                packed = next(values) if packed == FULL32 else packed
                local = next(values) if local == FULL32 else local
            except StopIteration:
                break
            return packed, size, local
        at += 4 + length
    raise UnreadableCheckpoint("Its table of contents is damaged.")


def _start(memory: mmap.mmap, name: str, local: int, size: int) -> int:
    """First byte of a member, behind its local header."""
    if local + 30 > len(memory) or memory[local : local + 4] != LOCAL:
        raise UnreadableCheckpoint(f"The head of its member {name[:40]!r} is damaged.")
    name_size, extra_size = struct.unpack_from("<HH", memory, local + 26)
    start: int = local + 30 + name_size + extra_size
    if start + size > len(memory):
        raise UnreadableCheckpoint(f"Its member {name[:40]!r} is cut off: the file is incomplete.")
    return start


def check_member(memory: mmap.mmap, member: Member) -> memoryview:
    """Compare a member with its CRC.

    Args:
        memory: the whole file.
        member: in it.

    Returns:
        Its bytes, not copied.

    Raises:
        UnreadableCheckpoint: they are not what was written.
    """
    view = memoryview(memory)[member.start : member.start + member.size]
    crc = 0
    for at in range(0, member.size, CHUNK):
        crc = zlib.crc32(view[at : at + CHUNK], crc)
    if crc != member.crc:
        raise UnreadableCheckpoint(f"Its member {member.name[:40]!r} is damaged: its checksum is wrong.")
    return view
