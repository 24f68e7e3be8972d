"""Image files that people have in their folders, and files that would hang, execute or fill the memory."""

from __future__ import annotations

import io
import os
import socket
import struct
import subprocess
import sys
import textwrap
import zipfile
import zlib
from pathlib import Path

import datasets
import fsspec
import numpy as np
import pytest
from PIL import Image

from diffusers_ddpm_ext.errors import ConfigError
from diffusers_ddpm_ext.training.config.data_options import DataOptions
from diffusers_ddpm_ext.training.data.dataset import load_data
from diffusers_ddpm_ext.training.data.image_files import image_extensions
from diffusers_ddpm_ext.training.data.sources import scan_folder


def png(size=(16, 16), level=7) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", size, (level,) * 3).save(file, "PNG")
    return file.getvalue()


def chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png_of_zeros(width: int, height: int) -> bytes:
    """A valid 8-bit RGB PNG of one color, which compresses a thousandfold."""
    compress = zlib.compressobj(9)
    rows = [compress.compress(bytes(1 + 3 * width)) for _ in range(height)]
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", b"".join(rows) + compress.flush())
        + chunk(b"IEND", b"")
    )


def options(folder: Path, **more) -> DataOptions:
    return DataOptions(train_data_dir=str(folder), resolution=(8, 8), validation_fraction=0, **more)


def test_every_extension_of_pillow_is_found(tmp_path):
    for extension in (".png", ".mpo", ".jfif", ".jpe", ".apng", ".tif", ".qoi", ".pnm", ".ico", ".webp"):
        (tmp_path / f"a{extension}").write_bytes(png())
        assert extension in image_extensions()
    assert len(scan_folder("x", str(tmp_path)).names) == 10
    assert not {".eps", ".ps", ".pdf", ".wmf", ".mpg", ".h5"} & image_extensions()


def test_other_types_are_counted_and_system_folders_left_out(tmp_path):
    (tmp_path / "a.png").write_bytes(png())
    for name in ("b.heic", "c.HEIC", "d.CR2", "e.svg", "notes.txt", ".f.heic"):
        (tmp_path / name).write_bytes(b"x")
    for folder in ("@eaDir", "__MACOSX", ".thumbnails", "#recycle", "$RECYCLE.BIN", "sub/@eaDir"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "b.png").write_bytes(png())
    source = scan_folder("x", str(tmp_path))
    assert source.names == ["a.png"]
    assert source.other_images == {".heic": 2, ".cr2": 1, ".svg": 1}
    assert "2 .heic, 1 .cr2 and 1 .svg" in load_data(options(tmp_path)).description


def test_a_folder_of_other_types_alone_names_them(tmp_path):
    (tmp_path / "a.heic").write_bytes(b"x")
    with pytest.raises(ConfigError, match=r"1 .heic not read by Pillow: convert"):
        scan_folder("--train_data_dir", str(tmp_path))


def special(folder: Path, kind: str) -> None:
    path = folder / "b.png"
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "socket":
        socket.socket(socket.AF_UNIX).bind(str(path))
    elif kind == "link to a device":
        path.symlink_to("/dev/zero")
    elif kind == "link to a pipe":
        os.mkfifo(folder / "pipe")
        path.symlink_to("pipe")
    elif kind == "loop of links":
        path.symlink_to("b.png")
    elif kind == "broken link":
        path.symlink_to("nowhere.png")
    else:
        path.write_bytes({
            "empty": b"",
            "text": b"hello",
            "PostScript": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n%%EOF\n",
            "SVG": b'<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"/>',
            "strip": png_of_zeros(1, 1_000_000),
            "lying strip": png_of_zeros(500_000, 2),
            "bomb": png_of_zeros(9_000, 9_000),
            "header": b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", 90_000, 90_000, 8, 2, 0, 0, 0)),
        }[kind])  # fmt: skip


@pytest.mark.filterwarnings("ignore::ResourceWarning")
@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("pipe", "named pipe"),
        ("socket", "socket"),
        ("link to a device", "device"),
        ("link to a pipe", "named pipe"),
        ("loop of links", "symbolic links"),
        ("broken link", "No such file"),
        ("empty", "0 bytes"),
        ("text", "not an image"),
        ("PostScript", "not an image"),
        ("SVG", "not an image"),
        ("strip", "1 x 1,000,000 pixels are a strip"),
        ("lying strip", "500,000 x 2 pixels are a strip"),
        ("bomb", "9,000 x 9,000 pixels in a file of"),
        ("header", "not an image|pixels"),
    ],
)
def test_what_is_no_image_is_named_and_can_be_skipped(kind, message, tmp_path):
    (tmp_path / "a.png").write_bytes(png())
    special(tmp_path, kind)
    with pytest.raises(ConfigError, match=rf"1 of 2 images cannot be read: 'b.png' \(.*({message})"):
        load_data(options(tmp_path))
    data = load_data(options(tmp_path, skip_bad_images=True))
    assert (len(data.train), data.skipped) == (1, 1)


def test_large_photographs_and_panoramas_are_read(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (6000, 6000), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "large.tiff")
    Image.fromarray(noise[:40, :3000]).save(tmp_path / "panorama.png")
    assert len(load_data(options(tmp_path)).train) == 2


@pytest.mark.slow
@pytest.mark.parametrize("size", [(1, 1_000_000), (5_700, 5_700), (12_000, 12_000), (60_000, 30)])
def test_no_file_of_1_mib_takes_a_gigabyte(size, tmp_path):
    (tmp_path / "a.png").write_bytes(png_of_zeros(*size))
    code = textwrap.dedent(f"""
        import resource
        from diffusers_ddpm_ext.training.data.dataset import load_data
        from diffusers_ddpm_ext.training.config.data_options import DataOptions
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        try:
            load_data(DataOptions(train_data_dir={str(tmp_path)!r}, resolution=(64, 64), channels=1))
        except ValueError as error:
            print(error)
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
    """)
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert int(result.stdout.splitlines()[-1]) < 2**20, "kB"


# ---------------------------------------------------------------- other file systems


@pytest.fixture
def archive(tmp_path) -> Path:
    with zipfile.ZipFile(tmp_path / "images.zip", "w") as file:
        for number in range(3):
            file.writestr(f"in/{number}.png", png(level=number))
            content = io.BytesIO()
            np.save(content, np.full((2, 4), number, np.float32))
            file.writestr(f"in/{number}.npy", content.getvalue())
    return tmp_path / "images.zip"


@pytest.mark.parametrize("system", ["zip", "memory", "file", "plain"])
def test_images_and_conditions_of_other_file_systems(system, archive, tmp_path):
    def place(name: str) -> str:
        if system == "zip":
            return f"zip://in/{name}::{archive}"
        path = tmp_path / "files" / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(zipfile.ZipFile(archive).read(f"in/{name}"))
        if system == "memory":
            fsspec.filesystem("memory").pipe(f"/test/{name}", path.read_bytes())
            path.unlink()
            return f"memory://test/{name}"
        return f"file://{path}" if system == "file" else str(path)

    paths, embeddings = ([place(f"{number}.{kind}") for number in range(3)] for kind in ("png", "npy"))
    data = {"image": paths, "hint": paths, "words": embeddings}
    datasets.Dataset.from_dict(data).save_to_disk(str(tmp_path / "d"))
    loaded = load_data(
        DataOptions(dataset_name=str(tmp_path / "d"), resolution=(8, 8), validation_fraction=0, concat_column="hint",
                    context_column="words", image_column="image"),
        "hybrid",
    ).train  # fmt: skip
    assert loaded.load_levels(range(3)).values[:, 0, 0, 0].tolist() == [0, 1, 2]
    conditions = loaded.conditions(range(3))
    assert ((conditions.concat_inputs[:, 0, 0, 0] + 1) * 127.5).round().tolist() == [0, 1, 2]
    assert conditions.encoder_hidden_states[:, 0, 0].tolist() == [0, 1, 2]


@pytest.mark.parametrize(
    "path", ["zip://missing.png::{archive}", "zip://in/0.png::nowhere.zip", "memory://nothing.png", "typo://a.png"]
)
def test_a_missing_file_of_another_file_system_is_named(path, archive, tmp_path):
    data = {"image": [f"zip://in/0.png::{archive}", path.format(archive=archive)]}
    datasets.Dataset.from_dict(data).save_to_disk(str(tmp_path / "d"))
    with pytest.raises(ConfigError, match=r"1 of 2 images cannot be read: 'row 1' \(.*cannot be read"):
        load_data(DataOptions(dataset_name=str(tmp_path / "d"), resolution=(8, 8), image_column="image"))
