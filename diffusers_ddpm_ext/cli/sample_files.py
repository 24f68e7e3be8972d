"""Files that hold one sample, or all of them as an array: PNG, TIFF, .npy and .npz, in the dtype of the data."""

from __future__ import annotations

import struct
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from diffusers_ddpm_ext.cli.extras import require_modules
from diffusers_ddpm_ext.errors import ConfigError
from diffusers_ddpm_ext.plotting.channels import is_picture
from diffusers_ddpm_ext.plotting.sheets import save_grid
from diffusers_ddpm_ext.utils.array_files import read_array
from diffusers_ddpm_ext.utils.files import write_atomically
from diffusers_ddpm_ext.utils.pixel_format import PNG_DTYPES, PixelFormat

PNG_COLORS = {1: 0, 3: 2, 4: 6}
"""Channels of an image -> PNG's type of color: gray, color, color with alpha."""
TIFF_SUFFIXES = (".tif", ".tiff")


@dataclass(frozen=True)
class SampleFormat:
    """The values of samples, and the files of single ones.

    Attributes:
        channels: of an image.
        own: dtype and range of the data, in which images are drawn and written; None: images are drawn as float32 in
            [0, 1] and written as unsigned integers.
        bit_depth: of those integers, 8 or 16; without effect on the data's own values.
        suffix: of the files of single images: .png, .npy, .npz or .tif.
        preview: the channels that grids and videos show.
    """

    channels: int
    own: PixelFormat | None = None
    bit_depth: int = 8
    suffix: str = ".png"
    preview: PixelFormat | None = None

    @property
    def dtype(self) -> str:
        """NumPy's name of the dtype that is written."""
        return f"uint{self.bit_depth}" if self.own is None else self.own.dtype

    @property
    def settings(self) -> dict[str, Any]:
        """What the files of a folder depend on, as JSON."""
        settings: dict[str, Any] = {"bit_depth": self.bit_depth}
        if self.own is not None:
            settings |= {"bit_depth": None, "values": [self.own.dtype, self.own.low, self.own.high]}
        return settings | ({} if self.suffix == ".png" else {"format": self.suffix})

    def fits_png(self) -> bool:
        """Whether a PNG file can hold an image."""
        return self.channels in PNG_COLORS and self.dtype in PNG_DTYPES

    def values(self, images: NDArray[Any]) -> NDArray[Any]:
        """Images as they were drawn, in the dtype that is written."""
        if self.own is not None:
            return images
        return (images * (2**self.bit_depth - 1)).round().astype(self.dtype)

    def pictures(self, images: NDArray[Any]) -> NDArray[np.float32]:
        """Images (N, height, width, C) as they were drawn, for a grid: (N, C, height, width) in [-1, 1]."""
        signed = images * 2 - 1 if self.own is None else self.own.to_model(images)
        return np.asarray(signed, np.float32).transpose(0, 3, 1, 2)

    def save(self, path: Path, image: NDArray[Any]) -> None:
        """Write one image as it was drawn, (height, width, C), at its own size; the path's suffix is the file's type.

        Gray images in TIFF and PNG are (height, width).
        """
        suffix = path.suffix.lower()
        if suffix == ".png" and self.own is None and self.bit_depth == 8:
            save_grid(self.pictures(image[None]), path, enlarge=1)
            return
        values = self.values(image)
        if suffix == ".png":
            content = png_bytes(values)
            write_atomically(path, lambda file: file.write(content))
        elif suffix in TIFF_SUFFIXES:
            self.save_pages(path, image[None])
        else:
            save_array(path, values)

    def save_pages(self, path: Path, images: NDArray[Any]) -> None:
        """Write images as they were drawn, (N, height, width, C), as the pages of a TIFF file."""
        has_alpha = self.channels == 4 and (self.own is None or is_picture(4, self.own))
        save_tiff(path, self.values(images), has_alpha)

    def is_intact(self, path: Path, size: tuple[int, int]) -> bool:
        """Whether a file of one image exists, can be read and has this height and width."""
        if not path.is_file():
            return False
        try:
            if self.suffix == ".png":
                with Image.open(path) as image:
                    image.load()
                    return image.size == size[::-1]
            if self.suffix == ".tif":
                return _read_tiff(path).shape == (*size, self.channels)[: 2 + (self.channels > 1)]
            return read_array(path).shape == (*size, self.channels)
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
            return False


def check_format(option: str, form: SampleFormat) -> None:
    """Raise ConfigError if files of single images cannot hold the samples, or need a package that is missing."""
    if form.suffix == ".png" and not form.fits_png():
        raise ConfigError(
            f"{option}: PNG files hold 1, 3 or 4 channels of 8 or 16 bits, and the samples have {form.channels} of "
            f"{form.dtype}: add --format npy, npz or tif"
        )
    if form.suffix == ".tif":
        require_tifffile()


def require_tifffile() -> None:
    """Raise ConfigError with the way to install it unless ``tifffile``, which writes TIFF, is there."""
    require_modules({"tifffile": "tifffile"}, "arrays")


def png_bytes(values: NDArray[Any]) -> bytes:
    """An image as a PNG file, which Pillow does not write with 16 bits per color.

    Args:
        values: (height, width, 1 | 3 | 4), uint8 or uint16.
    """
    height, width, channels = values.shape
    depth = 8 * values.itemsize
    rows = np.ascontiguousarray(values.astype(f">u{values.itemsize}")).view(np.uint8).reshape(height, -1)
    above = np.vstack([np.zeros_like(rows[:1]), rows[:-1]])
    filtered = np.hstack([np.full((height, 1), 2, np.uint8), rows - above])  # PNG's filter 2: minus the row above

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", width, height, depth, PNG_COLORS[channels], 0, 0, 0)
    data = zlib.compress(filtered.tobytes())
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def save_tiff(path: Path, images: NDArray[Any], has_alpha: bool) -> None:
    """Write images (N, height, width, C) as the pages of a TIFF file; a page of one channel is (height, width).

    ``has_alpha`` is whether the last of four channels is transparency.
    """
    import tifffile

    channels = images.shape[-1]
    is_color = images.dtype.name in PNG_DTYPES and (channels == 3 or has_alpha)
    options: dict[str, Any] = {"photometric": "rgb" if is_color else "minisblack", "metadata": None}
    if channels > 1:
        options["planarconfig"] = "contig"
    if is_color and has_alpha:
        options["extrasamples"] = ["unassalpha"]

    def write(file: Any) -> None:
        with tifffile.TiffWriter(file) as writer:
            for image in images:
                writer.write(image[..., 0] if channels == 1 else image, **options)

    write_atomically(path, write)


def _read_tiff(path: Path) -> NDArray[Any]:
    import tifffile

    try:
        with tifffile.TiffFile(path) as file:
            return np.asarray(file.pages[0].asarray())
    except (tifffile.TiffFileError, IndexError, struct.error) as error:
        raise ValueError(str(error)) from None


def save_array(path: Path, values: NDArray[Any]) -> None:
    """Write an array as .npy, or compressed as .npz, where its name is ``arr_0``."""
    if path.suffix.lower() == ".npy":
        write_atomically(path, lambda file: np.save(file, values))
    else:
        write_atomically(path, lambda file: np.savez_compressed(file, arr_0=values))
