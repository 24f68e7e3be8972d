"""Reading arrays and tensors from files that may be wrong, damaged or hostile: npy, npz, safetensors.

A header that promises more than the file holds, a compressed file that expands without end, a pickle and anything else
that is wrong becomes a ConfigError that names the file, before memory is spent on it.
"""

from __future__ import annotations

import math
import os
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO, TYPE_CHECKING, Any

from diffusers_ddpm_ext.errors import ConfigError, printable
from diffusers_ddpm_ext.utils.input_files import file_name, open_input

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

MAX_EXPANDED_BYTES = 256 * 2**20
MAX_EXPANSION = 100  # larger arrays may be at most this many times their compressed size
MAX_MEMBERS = 10_000


class NoSuchArray(ConfigError):
    """An archive holds several arrays, or others than the one that is asked for."""


def read_array(path: str | os.PathLike[str], what: str = "", key: str | None = None) -> np.ndarray:
    """An array of numbers or booleans from a ``.npy`` file, or from a ``.npz`` file.

    Args:
        path: the file.
        what: its role in messages.
        key: the array's name in a ``.npz`` file; not needed where there is only one.

    Raises:
        ConfigError: the file is missing, damaged, holds no such array, or an array of anything but real numbers or
            booleans (objects, complex numbers, dates, text), or it expands to over 256 MiB and 100 times its size.
    """
    with open_input(path, what) as file:
        return read_open_array(file, os.fstat(file.fileno()).st_size, file_name(path, what), key)


def read_open_array(file: IO[bytes], size: int, name: str, key: str | None = None, choice: str = "") -> np.ndarray:
    """`read_array` from an open file.

    Args:
        file: at its start.
        size: its bytes.
        name: of the file in messages.
        key: as in `read_array`.
        choice: how messages say to choose one of several arrays.

    Raises:
        NoSuchArray: it holds several arrays or no array of that name.
        ConfigError: as `read_array`.
    """
    with _array_errors(name):
        if file.read(2) == b"PK":
            arrays = _read_npz(file, name, None if key is None else {key})
            if key is None and len(arrays) != 1:
                raise NoSuchArray(
                    f"{name} holds {len(arrays)} arrays: {_names(arrays)}; {choice or 'one is expected'}."
                )
            return next(iter(arrays.values()))
        file.seek(0)
        return _read_npy(file, size, name)


def read_arrays(path: str | os.PathLike[str], what: str = "") -> dict[str, np.ndarray]:
    """Every array of a ``.npz`` file, by name.

    Raises:
        ConfigError: as `read_array`.
    """
    name = file_name(path, what)
    with open_input(path, what) as file, _array_errors(name):
        return _read_npz(file, name, None)


def read_tensors(path: str | os.PathLike[str], what: str = "") -> dict[str, Tensor]:
    """Every tensor of a ``.safetensors`` file, on the CPU, by name.

    Raises:
        ConfigError: the file is missing or damaged.
    """
    open_input(path, what).close()
    from safetensors.torch import load_file  # not at the top: it loads torch

    try:
        return load_file(path)
    except (MemoryError, KeyboardInterrupt):
        raise
    except Exception as error:  # safetensors' own error class differs between its versions
        text = printable(" ".join(str(error).split()), 200)
        raise ConfigError(f"{file_name(path, what)} is not a complete safetensors file: {text}.") from None


def _read_npz(file: IO[bytes], name: str, keys: set[str] | None) -> dict[str, np.ndarray]:
    """Some arrays of a zip archive; all of them for None."""
    with zipfile.ZipFile(file) as archive:
        members = {info.filename.removesuffix(".npy"): info for info in archive.infolist()}
        if len(members) < len(archive.infolist()) or len(members) > MAX_MEMBERS:
            raise ConfigError(f"{name} has an array twice, or over {MAX_MEMBERS:,} of them.")
        for key in keys or ():
            if key not in members:
                raise NoSuchArray(f"{name} has no array {printable(key)!r}: it has {_names(members)}.")
        wanted = {key: info for key, info in members.items() if keys is None or key in keys}
        expanded = sum(info.file_size for info in wanted.values())
        packed = sum(info.compress_size for info in wanted.values())
        if expanded > max(MAX_EXPANDED_BYTES, MAX_EXPANSION * packed):
            raise ConfigError(
                f"{name} expands from {packed:,} to {expanded:,} bytes: store it uncompressed if that is meant."
            )
        arrays = {}
        for key, info in wanted.items():
            with archive.open(info) as member:
                arrays[key] = _read_npy(member, info.file_size, f"{name}: {printable(key, 60)}")
        return arrays


def _read_npy(file: IO[bytes], size: int, name: str) -> np.ndarray:
    """An array in NumPy's format, of a file or member of ``size`` bytes."""
    import numpy as np

    version = np.lib.format.read_magic(file)
    readers = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    if version not in readers:
        raise ConfigError(f"{name} is in version {version} of NumPy's format; 1.0 and 2.0 are read.")
    shape, fortran_order, dtype = readers[version](file)
    if dtype.kind not in "biuf":
        raise ConfigError(f"{name} holds values of type {dtype}, not real numbers: save it as float32.")
    count = math.prod(shape)
    rest = size - file.tell()
    if any(length < 0 for length in shape) or count * dtype.itemsize != rest:
        promised = f"{count * dtype.itemsize:,}" if count < 2**63 else "more than any memory's"
        raise ConfigError(f"{name} promises {promised} bytes of values (shape {shape}) and holds {rest:,}.")
    content = file.read(rest + 1)  # beyond the end, where zip files check the checksum
    array = np.frombuffer(content, dtype=dtype, count=count)
    return array.reshape(shape, order="F" if fortran_order else "C").copy()


@contextmanager
def _array_errors(name: str) -> Iterator[None]:
    """Any fault of NumPy's or zip's readers as one sentence."""
    try:
        yield
    except (ConfigError, MemoryError):
        raise
    except (
        Exception
    ) as error:  # ValueError, BadZipFile, zlib.error, EOFError, RuntimeError (encrypted), SyntaxError...
        text = printable(" ".join(str(error).split()), 200)
        raise ConfigError(f"{name} is not a complete .npy or .npz file: {text or type(error).__name__}.") from None


def _names(members: dict[str, Any]) -> str:
    names = [printable(member, 60) for member in members]
    return ", ".join(names[:8]) + (", ..." if len(names) > 8 else "") if names else "none"
