"""Reading ``.safetensors`` files without torch: which tensors they hold, and their values as arrays of NumPy.

The header is checked by safetensors itself (lengths, offsets, overlaps); values are mapped, not copied, so that a file
may be larger than the memory.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffusers_ddpm_ext.errors import ConfigError, printable
from diffusers_ddpm_ext.utils.input_files import file_name, open_input

if TYPE_CHECKING:
    import numpy as np

FLOATS = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2"}
"""Types of floating tensors that are read -> NumPy's type of what is stored. BF16 is the upper half of a float32."""
OTHER_FLOATS = ("F8_E4M3", "F8_E5M2", "F8_E8M0", "F6_E2M3", "F6_E3M2", "F4")
BLOCK = 2**22  # values that are checked at a time
EXPONENTS = {
    "F64": (0x7FF0 << 48, "<u8"),
    "F32": (0x7F80 << 16, "<u4"),
    "F16": (0x7C00, "<u2"),
    "BF16": (0x7F80, "<u2"),
}
"""Bits of the exponent, all of them set in NaN and infinity alone, and NumPy's type of the bits."""


@dataclass(frozen=True)
class StoredTensor:
    """A tensor of a file.

    Attributes:
        dtype: as safetensors names it, such as ``F32``.
        shape: of the tensor.
        start: of its bytes in the file.
    """

    dtype: str
    shape: tuple[int, ...]
    start: int

    @property
    def count(self) -> int:
        """Number of values."""
        total = 1
        for length in self.shape:
            total *= length
        return total

    @property
    def is_floating(self) -> bool:
        """Whether it holds floating numbers, of any width."""
        return self.dtype in FLOATS or self.dtype in OTHER_FLOATS


def read_tensor_headers(path: str | os.PathLike[str], what: str = "") -> dict[str, StoredTensor]:
    """The tensors of a file, by name, sorted; no values are read.

    Args:
        path: the file.
        what: its role in messages.

    Raises:
        ConfigError: the file is missing or damaged.
    """
    open_input(path, what).close()
    from safetensors import safe_open  # not at the top: `--help` does not wait for it

    try:
        with safe_open(path, "np") as tensors:
            names = sorted(tensors.keys())
        header, data = _read_header(Path(path))
        return {
            name: StoredTensor(
                header[name]["dtype"], tuple(header[name]["shape"]), data + header[name]["data_offsets"][0]
            )
            for name in names
        }
    except (MemoryError, KeyboardInterrupt):
        raise
    except Exception as error:  # safetensors' own error class differs between its versions
        text = printable(" ".join(str(error).split()), 200)
        raise ConfigError(f"{file_name(path, what)} is not a complete safetensors file: {text}.") from None


def _read_header(path: Path) -> tuple[dict[str, Any], int]:
    """The header of a file that safetensors has accepted, and where the values begin."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        return json.loads(file.read(length)), 8 + length


def read_floats(path: str | os.PathLike[str], tensor: StoredTensor) -> np.ndarray:
    """The values of a floating tensor: float64, float32 or float16 as stored, bfloat16 as float32.

    Args:
        path: the file.
        tensor: from `read_tensor_headers`, of a type of `FLOATS`.
    """
    import numpy as np

    stored = np.fromfile(path, FLOATS[tensor.dtype], tensor.count, offset=tensor.start).reshape(tensor.shape)
    return (stored.astype("<u4") << 16).view("<f4") if tensor.dtype == "BF16" else stored


def first_not_finite(path: str | os.PathLike[str], tensors: Mapping[str, StoredTensor]) -> str | None:
    """The first tensor of a file that holds NaN or infinity; None where all are finite, or of other types.

    Args:
        path: the file.
        tensors: of it, from `read_tensor_headers`.
    """
    import numpy as np

    for name, tensor in tensors.items():
        if tensor.dtype not in EXPONENTS or not tensor.count:
            continue
        mask, dtype = EXPONENTS[tensor.dtype]
        bits = np.memmap(path, dtype, "r", tensor.start, (tensor.count,))
        for first in range(0, tensor.count, BLOCK):
            if ((bits[first : first + BLOCK] & np.array(mask, dtype)) == mask).any():
                return name
    return None
