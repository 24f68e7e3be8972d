"""Tensors and storages that a checkpoint's pickle describes: checked, and mapped from the file on request."""

from __future__ import annotations

import math
import mmap
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from diffusers_ddpm_ext.compvis.reader.pickle_machine import Constructors, GlobalName, UnreadableCheckpoint

STORAGE_DTYPES = {
    "DoubleStorage": torch.float64, "FloatStorage": torch.float32, "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16, "LongStorage": torch.int64, "IntStorage": torch.int32,
    "ShortStorage": torch.int16, "CharStorage": torch.int8, "ByteStorage": torch.uint8, "BoolStorage": torch.bool,
    "ComplexFloatStorage": torch.complex64, "ComplexDoubleStorage": torch.complex128, "UntypedStorage": torch.uint8,
}  # fmt: skip
MAX_NDIM = 64


@dataclass
class Storage:
    """A flat array in a file.

    Attributes:
        dtype: of each element.
        numel: number of elements according to the pickle.
        key: its name in the file.
        locate: gives the file's memory and the offset of the first byte; raises if the file has fewer elements.
    """

    dtype: torch.dtype
    numel: int
    key: str
    locate: Callable[[Storage], tuple[mmap.mmap, int]]


@dataclass(frozen=True)
class LazyTensor:
    """A view of a storage that is not loaded; offset and strides count elements."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    def load(self) -> Tensor:
        """Map the tensor from the file, copy-on-write, on the CPU.

        Raises:
            UnreadableCheckpoint: the file does not contain its elements.
        """
        memory, start = self.storage.locate(self.storage)
        if self.numel == 0:
            return torch.empty(self.shape, dtype=self.dtype)
        itemsize = self.dtype.itemsize
        count = self.storage.numel * self.storage.dtype.itemsize // itemsize
        buffer: Any = memory
        if start % itemsize:  # in the legacy format; torch needs aligned memory
            buffer, start = bytearray(memory[start : start + count * itemsize]), 0
        flat = torch.frombuffer(buffer, dtype=self.dtype, count=count, offset=start)
        return flat.as_strided(self.shape, self.stride, self.offset)


def storage_dtype(storage_class: Any) -> torch.dtype:
    """The dtype of a storage class that a file names."""
    is_torch = isinstance(storage_class, GlobalName) and storage_class.module.partition(".")[0] == "torch"
    dtype = STORAGE_DTYPES.get(storage_class.name) if is_torch else None
    if dtype is None:
        raise UnreadableCheckpoint(f"It has a storage of an unknown type ({str(storage_class)[:40]}).")
    return dtype


def check_count(value: Any, what: str) -> int:
    """Return a size, offset or stride; refuse anything but an integer of 0 or more."""
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 2**62:
        raise UnreadableCheckpoint(f"It describes a tensor with an impossible {what}.")
    return value


def make_tensor(storage: Any, offset: Any, shape: Any, stride: Any, dtype: torch.dtype | None = None) -> LazyTensor:
    """Make a tensor that is a view of a storage, whose dtype is the default, from unchecked arguments.

    Raises:
        UnreadableCheckpoint: it exceeds its storage, or has more elements.
    """
    if not isinstance(storage, Storage):
        raise UnreadableCheckpoint("It describes a tensor without a storage.")
    if not (isinstance(shape, tuple) and isinstance(stride, tuple) and len(shape) == len(stride) <= MAX_NDIM):
        raise UnreadableCheckpoint("It describes a tensor whose shape and strides do not match.")
    tensor = LazyTensor(
        storage,
        check_count(offset, "offset"),
        tuple(check_count(size, "size") for size in shape),
        tuple(check_count(step, "stride") for step in stride),
        storage.dtype if dtype is None else dtype,
    )
    available = storage.numel * storage.dtype.itemsize // tensor.dtype.itemsize
    last = tensor.offset + sum((size - 1) * step for size, step in zip(tensor.shape, tensor.stride, strict=True))
    if tensor.numel and (last >= available or tensor.numel > available):
        raise UnreadableCheckpoint(
            f"It describes a tensor of {tensor.numel:,} elements in a storage of {available:,}: larger than its "
            "storage."
        )
    return tensor


def _first(arguments: tuple[Any, ...], count: int) -> tuple[Any, ...]:
    if len(arguments) < count:
        raise UnreadableCheckpoint("It describes a tensor with missing arguments.")
    return arguments[:count]


def _rebuild_tensor(arguments: tuple[Any, ...]) -> LazyTensor:
    return make_tensor(*_first(arguments, 4))


def _rebuild_tensor_v3(arguments: tuple[Any, ...]) -> LazyTensor:
    storage, offset, shape, stride, _, _, dtype = _first(arguments, 7)
    name = dtype.name if isinstance(dtype, GlobalName) and dtype.module == "torch" else ""
    known = getattr(torch, name, None) if name.startswith(("float", "uint", "int", "bfloat", "bool")) else None
    if not isinstance(known, torch.dtype):
        raise UnreadableCheckpoint(f"It has a tensor of an unknown dtype ({name[:40]}).")
    return make_tensor(storage, offset, shape, stride, known)


def _rebuild_parameter(arguments: tuple[Any, ...]) -> Any:
    return _first(arguments, 1)[0]


def _rebuild_from_type(arguments: tuple[Any, ...]) -> Any:
    """A tensor of another class, such as a buffer, from the arguments of the function that it names."""
    function, _, inner = _first(arguments, 3)
    is_name = isinstance(function, GlobalName)
    rebuild = TENSOR_CONSTRUCTORS.get((function.module, function.name)) if is_name else None
    if rebuild is None or rebuild is _rebuild_from_type or not isinstance(inner, tuple):
        raise UnreadableCheckpoint("It has a tensor of an unknown class.")
    return rebuild(inner)


def _size(arguments: tuple[Any, ...]) -> Any:
    return tuple(arguments[0]) if arguments and isinstance(arguments[0], list | tuple) else ()


TENSOR_CONSTRUCTORS: Constructors = {
    ("torch._utils", "_rebuild_tensor"): _rebuild_tensor,
    ("torch._utils", "_rebuild_tensor_v2"): _rebuild_tensor,
    ("torch._utils", "_rebuild_tensor_v3"): _rebuild_tensor_v3,
    ("torch._utils", "_rebuild_parameter"): _rebuild_parameter,
    ("torch._utils", "_rebuild_parameter_with_state"): _rebuild_parameter,
    ("torch._tensor", "_rebuild_from_type_v2"): _rebuild_from_type,
    ("torch", "Size"): _size,
}
