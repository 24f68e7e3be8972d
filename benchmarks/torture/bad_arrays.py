"""Files that are no image: damaged, of a shape or type that is not one, or with values that no range holds."""

from __future__ import annotations

import io
import struct
import zipfile
import zlib
from collections.abc import Callable

import numpy as np
from PIL import Image

Content = Callable[[], bytes]
GRAY = np.arange(100, dtype=np.uint8).reshape(10, 10)


def npy(array: np.ndarray, **options: bool) -> bytes:
    """An array in NumPy's format."""
    file = io.BytesIO()
    np.save(file, array, **options)
    return file.getvalue()


def npz(**arrays: np.ndarray) -> bytes:
    """Arrays in NumPy's archive."""
    file = io.BytesIO()
    np.savez(file, **arrays)
    return file.getvalue()


def picture(image: Image.Image | np.ndarray, kind: str = "PNG", **options: object) -> bytes:
    """An image in one of Pillow's formats."""
    file = io.BytesIO()
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(file, kind, **options)
    return file.getvalue()


def tiff(array: np.ndarray, **options: object) -> bytes:
    """An array as TIFF."""
    import tifffile

    file = io.BytesIO()
    tifffile.imwrite(file, array, **options)
    return file.getvalue()


def header(text: str, version: tuple[int, int] = (1, 0), data: bytes = b"") -> bytes:
    """A file in NumPy's format with any header."""
    encoded = text.encode() + b"\n"
    length = struct.pack("<H" if version == (1, 0) else "<I", len(encoded))
    return b"\x93NUMPY" + bytes(version) + length + encoded + data


def claim(shape: str, dtype: str = "|u1", order: str = "False") -> str:
    """A header's text."""
    return f"{{'descr': '{dtype}', 'fortran_order': {order}, 'shape': {shape}, }}"


def with_value(value: float, dtype: str = "float32", place: tuple[int, ...] = (9, 9)) -> np.ndarray:
    """Values in [0, 1] and one other."""
    array = np.linspace(0, 1, 100).reshape(10, 10).astype(dtype)
    array[place] = value
    return array


def zip_of(names: dict[str, bytes], method: int = zipfile.ZIP_DEFLATED) -> bytes:
    """An archive with any members."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", method) as archive:
        for name, content in names.items():
            archive.writestr(name, content)
    return file.getvalue()


def png_header(width: int, height: int, depth: int = 8, color: int = 0) -> bytes:
    """A PNG that claims a size and has no pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    start = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, color, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + start + chunk(b"IDAT", zlib.compress(b"\0" * 100)) + chunk(b"IEND", b"")


def _big() -> bytes:
    return zip_of({"image.npy": header(claim("(40000, 40000, 3)"), data=bytes(2**22))})


# name of the file -> its content
ARRAY_FILES: dict[str, Content] = {
    "empty.npy": lambda: b"",
    "magic.npy": lambda: b"\x93NUMPX" + npy(GRAY)[6:],
    "only-magic.npy": lambda: b"\x93NUMPY",
    "version.npy": lambda: header(claim("(10, 10)"), (9, 9), bytes(100)),
    "no-header.npy": lambda: npy(GRAY)[:20],
    "garbage-header.npy": lambda: header("\x00\x01garbage", data=bytes(100)),
    "list-header.npy": lambda: header("[1, 2]", data=bytes(100)),
    "code-header.npy": lambda: header("__import__('os').abort()", data=bytes(100)),
    "no-shape.npy": lambda: header("{'descr': '|u1', 'fortran_order': False}", data=bytes(100)),
    "text-shape.npy": lambda: header(claim("'10'"), data=bytes(100)),
    "float-shape.npy": lambda: header(claim("(10.5, 10)"), data=bytes(100)),
    "negative-shape.npy": lambda: header(claim("(-10, -10)"), data=bytes(100)),
    "truncated.npy": lambda: npy(GRAY)[:-1],
    "half.npy": lambda: npy(GRAY)[:-50],
    "claims-terabytes.npy": lambda: header(claim("(1000000, 1000000)"), data=bytes(100)),
    "claims-beyond-int64.npy": lambda: header(claim("(9999999999, 9999999999)"), data=bytes(100)),
    "long-header.npy": lambda: header(claim("(10, 10)") + " " * 60_000, data=bytes(100))[:100],
    "zero-dim.npy": lambda: npy(np.float32(1.0)),
    "one-dim.npy": lambda: npy(np.zeros(100, np.uint8)),
    "four-dim.npy": lambda: npy(np.zeros((2, 10, 10, 3), np.uint8)),
    "five-dim.npy": lambda: npy(np.zeros((1, 1, 10, 10, 3), np.uint8)),
    "no-rows.npy": lambda: npy(np.zeros((0, 10), np.uint8)),
    "no-columns.npy": lambda: npy(np.zeros((10, 0, 3), np.uint8)),
    "no-channels.npy": lambda: npy(np.zeros((10, 10, 0), np.uint8)),
    "layout.npy": lambda: npy(np.zeros((3, 10, 10), np.uint8)),
    "cube.npy": lambda: npy(np.zeros((10, 10, 10), np.uint8)),
    "complex.npy": lambda: npy(np.zeros((10, 10), np.complex64)),
    "text.npy": lambda: npy(np.full((10, 10), "ab")),
    "bytes.npy": lambda: npy(np.full((10, 10), b"ab")),
    "records.npy": lambda: npy(np.zeros((10, 10), [("r", "u1"), ("g", "u1")])),
    "dates.npy": lambda: npy(np.zeros((10, 10), "datetime64[s]")),
    "spans.npy": lambda: npy(np.zeros((10, 10), "timedelta64[s]")),
    "objects.npy": lambda: npy(np.full((10, 10), None, object), allow_pickle=True),
    "pickle.npy": lambda: header(claim("(10, 10)", "|O"), data=b"cos\nabort\n(tR."),
    "int64.npy": lambda: npy(GRAY.astype(np.int64)),
    "int32.npy": lambda: npy(GRAY.astype(np.int32)),
    "uint64.npy": lambda: npy(GRAY.astype(np.uint64)),
    "bool.npy": lambda: npy(GRAY > 50),
    "nan.npy": lambda: npy(with_value(np.nan)),
    "infinity.npy": lambda: npy(with_value(np.inf)),
    "minus-infinity.npy": lambda: npy(with_value(-np.inf, "float64")),
    "half-nan.npy": lambda: npy(with_value(np.nan, "float16", (0, 0))),
    "above-one.npy": lambda: npy(with_value(1.001)),
    "below-zero.npy": lambda: npy(with_value(-0.001, "float64")),
    "hundreds.npy": lambda: npy(with_value(255.0, "float16")),
    "no-arrays.npz": lambda: zip_of({}),
    "two-arrays.npz": lambda: npz(a=GRAY, b=GRAY),
    "pickled.npz": lambda: zip_of({"a.npy": npy(np.full((10, 10), None, object), allow_pickle=True)}),
    "nan.npz": lambda: npz(a=with_value(np.nan)),
    "shape.npz": lambda: npz(a=np.zeros(7, np.uint8)),
    "no-npy.npz": lambda: zip_of({"image.txt": b"hello"}),
    "truncated.npz": lambda: npz(a=GRAY)[:-40],
    "damaged.npz": lambda: npz(a=GRAY)[:200] + b"\xff" * 20 + npz(a=GRAY)[220:],
    "bomb.npz": _big,
    "text.npz": lambda: b"PK\x03\x04 but no archive",
    "empty.png": lambda: b"",
    "text.png": lambda: b"this is no picture",
    "truncated.png": lambda: picture(np.random.default_rng(0).integers(0, 256, (40, 40), np.uint8))[:-300],
    "huge.png": lambda: png_header(100_000, 100_000),
    "strip.png": lambda: picture(np.zeros((1, 200_000), np.uint8)),
    "deep-truncated.png": lambda: png_header(10, 10, 16, 2),
    "text.tif": lambda: b"II*\0 but no TIFF",
    "no-pages.tif": lambda: b"II*\0\0\0\0\0",
    "loop.tif": lambda: b"II*\0\x08\0\0\0\0\0\x08\0\0\0",
    "truncated.tif": lambda: tiff(with_value(0.5))[:150],
    "complex.tif": lambda: tiff(np.zeros((10, 10), np.complex64)),
    "nan.tif": lambda: tiff(with_value(np.nan)),
    "above-one.tif": lambda: tiff(with_value(1.5)),
    "int64.tif": lambda: tiff(GRAY.astype(np.int64)),
    "four-dim.tif": lambda: tiff(np.zeros((2, 3, 10, 10), np.float32), photometric="minisblack"),
    "damaged.tif": lambda: tiff(GRAY, compression="zlib")[:-30] + bytes(30),
    "truncated.jpg": lambda: picture(GRAY, "JPEG")[:100],
    "html.jpg": lambda: b"<html><body>404 not found</body></html>",
    "truncated.webp": lambda: picture(Image.fromarray(GRAY).convert("RGB"), "WEBP")[:30],
}

# name -> a second image beside a good one of 8 bits and three channels, and why they do not agree
OTHER_KINDS: dict[str, Content] = {
    "gray.png": lambda: picture(GRAY),
    "alpha.png": lambda: picture(Image.new("RGBA", (10, 10), (1, 2, 3, 4))),
    "deep.png": lambda: picture(Image.fromarray(GRAY.astype(np.uint16) * 257)),
    "two-channels.npy": lambda: npy(np.zeros((10, 10, 2), np.uint8)),
    "five-channels.npy": lambda: npy(np.zeros((10, 10, 5), np.uint8)),
    "uint16.npy": lambda: npy(np.zeros((10, 10, 3), np.uint16)),
    "int16.npy": lambda: npy(np.zeros((10, 10, 3), np.int16)),
    "uint32.npy": lambda: npy(np.zeros((10, 10, 3), np.uint32)),
    "float32.npy": lambda: npy(np.zeros((10, 10, 3), np.float32)),
    "float64.npz": lambda: npz(a=np.zeros((10, 10, 3), np.float64)),
    "float.tif": lambda: tiff(np.zeros((10, 10, 3), np.float32), photometric="rgb"),
    "deep.tif": lambda: tiff(np.zeros((10, 10, 3), np.uint16), photometric="rgb"),
    "bands.tif": lambda: tiff(np.zeros((10, 10, 7), np.uint8), photometric="minisblack", planarconfig="contig"),
}
