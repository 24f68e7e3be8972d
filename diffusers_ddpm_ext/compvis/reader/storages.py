"""Tensors of a checkpoint as its pickle describes them: a place in the file, checked, and read only when asked for."""

from __future__ import annotations

import mmap
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from diffusers_ddpm_ext.compvis.reader.unpickle import Makers, Name, UnreadableCheckpoint

DTYPES = {
    "DoubleStorage": torch.float64, "FloatStorage": torch.float32, "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16, "LongStorage": torch.int64, "IntStorage": torch.int32,
    "ShortStorage": torch.int16, "CharStorage": torch.int8, "ByteStorage": torch.uint8, "BoolStorage": torch.bool,
    "ComplexFloatStorage": torch.complex64, "ComplexDoubleStorage": torch.complex128, "UntypedStorage": torch.uint8,
}  # fmt: skip
MOST_AXES = 64


@dataclass
class Storage:
    """Numbers in a row.

    Attributes:
        dtype: of each.
        numel: how many the pickle says there are.
        key: under which the file keeps them.
        locate: gives the file's memory and the first byte; raises where the file does not hold so many.
    """

    dtype: torch.dtype
    numel: int
    key: str
    locate: Callable[[Storage], tuple[mmap.mmap, int]]


@dataclass(frozen=True)
class LazyTensor:
    """A tensor that is still in its file.

    Attributes:
        storage: that holds its numbers.
        offset: of the first one.
        shape: of the tensor.
        stride: of each axis, in numbers.
        dtype: of the tensor.
    """

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype

    @property
    def numel(self) -> int:
        """Number of entries."""
        count = 1
        for size in self.shape:
            count *= size
        return count

    def load(self) -> Tensor:
        """Map the tensor's memory.

        Returns:
            The tensor, on the CPU; it shares the file's pages until it is written to, which the file never is.

        Raises:
            UnreadableCheckpoint: the file does not hold its numbers.
        """
        memory, first = self.storage.locate(self.storage)
        if self.numel == 0:
            return torch.empty(self.shape, dtype=self.dtype)
        size = self.dtype.itemsize
        count = self.storage.numel * self.storage.dtype.itemsize // size
        buffer: Any = memory
        if first % size:  # of old files; a tensor must lie on a multiple of its numbers' size
            buffer, first = bytearray(memory[first : first + count * size]), 0
        flat = torch.frombuffer(buffer, dtype=self.dtype, count=count, offset=first)
        return flat.as_strided(self.shape, self.stride, self.offset)


def storage_type(name: Any) -> torch.dtype:
    """The type of the numbers in a storage of a class that a file names."""
    dtype = DTYPES.get(name.name) if isinstance(name, Name) and name.module.partition(".")[0] == "torch" else None
    if dtype is None:
        raise UnreadableCheckpoint(f"It holds a storage of an unknown kind ({str(name)[:40]}).")
    return dtype


def whole(value: Any, what: str) -> int:
    """A number of things."""
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 2**62:
        raise UnreadableCheckpoint(f"It describes a tensor whose {what} is no number that can be.")
    return value


def tensor_of(storage: Any, offset: Any, shape: Any, stride: Any, dtype: Any = None) -> LazyTensor:
    """A tensor of a storage, if it lies in it.

    Args:
        storage: from the file's persistent id.
        offset: of its first number.
        shape: a tuple.
        stride: a tuple.
        dtype: where it is not the storage's.

    Returns:
        The tensor, unread.

    Raises:
        UnreadableCheckpoint: it reaches beyond its storage, or has more entries than that.
    """
    if not isinstance(storage, Storage):
        raise UnreadableCheckpoint("It describes a tensor without a storage.")
    if not (isinstance(shape, tuple) and isinstance(stride, tuple) and len(shape) == len(stride) <= MOST_AXES):
        raise UnreadableCheckpoint("It describes a tensor whose shape and strides do not belong together.")
    made = LazyTensor(
        storage,
        whole(offset, "offset"),
        tuple(whole(size, "size") for size in shape),
        tuple(whole(step, "stride") for step in stride),
        storage.dtype if dtype is None else dtype,
    )
    size = made.dtype.itemsize
    room = storage.numel * storage.dtype.itemsize // size
    last = made.offset + sum((size - 1) * step for size, step in zip(made.shape, made.stride, strict=True))
    if made.numel and (last >= room or made.numel > room):
        raise UnreadableCheckpoint(
            f"It describes a tensor of {made.numel:,} entries in a storage of {room:,}: larger than its storage."
        )
    return made


def _rebuild(arguments: tuple[Any, ...]) -> LazyTensor:
    return tensor_of(*_first(arguments, 4))


def _rebuild_v3(arguments: tuple[Any, ...]) -> LazyTensor:
    storage, offset, shape, stride, _, _, dtype = _first(arguments, 7)
    name = dtype.name if isinstance(dtype, Name) and dtype.module == "torch" else ""
    known = getattr(torch, name, None) if name.startswith(("float", "uint", "int", "bfloat", "bool")) else None
    if not isinstance(known, torch.dtype):
        raise UnreadableCheckpoint(f"It holds a tensor of an unknown type ({name[:40]}).")
    return tensor_of(storage, offset, shape, stride, known)


def _parameter(arguments: tuple[Any, ...]) -> Any:
    return _first(arguments, 1)[0]


def _of_type(arguments: tuple[Any, ...]) -> Any:
    """A tensor of another class, such as a buffer: what it is made of, by the function that is named."""
    function, _, inner = _first(arguments, 3)
    maker = MAKERS.get((function.module, function.name)) if isinstance(function, Name) else None
    if maker is None or maker is _of_type or not isinstance(inner, tuple):
        raise UnreadableCheckpoint("It holds a tensor of a class that is not known.")
    return maker(inner)


def _first(arguments: tuple[Any, ...], count: int) -> tuple[Any, ...]:
    if len(arguments) < count:
        raise UnreadableCheckpoint("It describes a tensor with parts missing.")
    return arguments[:count]


def _size(arguments: tuple[Any, ...]) -> Any:
    return tuple(arguments[0]) if arguments and isinstance(arguments[0], list | tuple) else ()


MAKERS: Makers = {
    ("torch._utils", "_rebuild_tensor"): _rebuild,
    ("torch._utils", "_rebuild_tensor_v2"): _rebuild,
    ("torch._utils", "_rebuild_tensor_v3"): _rebuild_v3,
    ("torch._utils", "_rebuild_parameter"): _parameter,
    ("torch._utils", "_rebuild_parameter_with_state"): _parameter,
    ("torch._tensor", "_rebuild_from_type_v2"): _of_type,
    ("torch", "Size"): _size,
}
