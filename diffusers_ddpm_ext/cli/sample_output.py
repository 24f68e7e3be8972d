"""Where samples go, image by image, so that a command that was cut off goes on where it was.

A folder takes each image as a PNG of its own, at once, and says in ``samples.json`` how they were drawn. Every other
kind of file is made of all images together: until they are there, each waits in a folder beside it, ``.NAME.part``.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from diffusers_ddpm_ext.errors import ConfigError
from diffusers_ddpm_ext.plotting.sheets import image_grid, save_grid
from diffusers_ddpm_ext.utils.files import write_atomically, write_text_atomically

Pixels = NDArray[np.float32]
SETTINGS = "samples.json"
PICTURES = (".png", ".jpg", ".jpeg", ".webp")
ARRAYS = (".npy", ".npz")
VIDEO = ".gif"
FRAMES, FRAME_MS, LAST_MS = 48, 60, 2000


def save_png(path: Path, image: Pixels, bit_depth: int = 8) -> None:
    """Write one image, (height, width, C) in [0, 1], at its own size.

    Args:
        path: of the file.
        image: its pixels.
        bit_depth: 8, or 16 for an image of one channel.
    """
    if bit_depth == 8:
        save_grid(image.transpose(2, 0, 1)[None] * 2 - 1, path, enlarge=1)
        return
    picture = Image.fromarray(_levels(image[..., 0], bit_depth))
    write_atomically(path, lambda file: picture.save(file, "PNG"))


def _levels(images: Pixels, bit_depth: int) -> NDArray[np.unsignedinteger[Any]]:
    """Values in [0, 1] as levels of so many bits."""
    top = 2**bit_depth - 1
    return (images * top).round().astype(np.uint8 if bit_depth == 8 else np.uint16)


@dataclass(frozen=True)
class PngFolder:
    """A folder of PNG files, ``00000.png`` and on.

    Attributes:
        path: the folder; made with its first file.
        settings: what the images follow from.
        bit_depth: of the files.
    """

    path: Path
    settings: Mapping[str, Any]
    bit_depth: int = 8

    def open(self) -> None:
        """Look at what is there, and say in the folder how its images are drawn.

        Raises:
            ConfigError: it holds other files, or images that were drawn in another way.
        """
        kept = self.path / SETTINGS
        settings = {**self.settings, "bit_depth": self.bit_depth}
        if kept.is_file():
            other = {"bit_depth": 8, **json.loads(kept.read_text(encoding="utf-8"))}
            differing = [name for name in {*other, *settings} if other.get(name) != settings.get(name)]
            if differing:
                name = sorted(differing, key=lambda each: (each == "model", each))[0]
                raise ConfigError(
                    f"--out {self.path} holds images with {name} {other.get(name)}, not {settings.get(name)}: "
                    "name another folder"
                )
        elif self.path.is_dir() and any(self.path.iterdir()):
            raise ConfigError(f"--out {self.path} is not empty: name another folder")
        else:
            text = json.dumps(settings, indent=2) + "\n"
            write_text_atomically(kept, text)

    def has(self, index: int) -> bool:
        """Whether an image is there, whole."""
        try:
            with Image.open(self.path / f"{index:05d}.png") as picture:
                picture.load()
        except (OSError, UnidentifiedImageError):
            return False
        return True

    def put(self, index: int, image: Pixels, frames: NDArray[np.uint8] | None) -> None:
        """Keep an image, (height, width, C) in [0, 1]."""
        save_png(self.path / f"{index:05d}.png", image, self.bit_depth)

    def finish(self, count: int) -> None:
        """Nothing is left to be done."""


@dataclass(frozen=True)
class OneFile:
    """A grid, an array or a video of all images.

    Attributes:
        path: the file.
        settings: what the images follow from.
        individual: a folder for each image beside, or None.
        bit_depth: of arrays of levels, and of the files in that folder.
    """

    path: Path
    settings: Mapping[str, Any]
    individual: Path | None
    bit_depth: int = 8

    @property
    def waiting(self) -> Path:
        """The folder where images wait for each other."""
        return self.path.with_name(f".{self.path.name}.part")

    def open(self) -> None:
        """Throw away what waits since a run with other settings."""
        kept = self.waiting / SETTINGS
        text = json.dumps(self.settings, indent=2) + "\n"
        if kept.is_file() and kept.read_text(encoding="utf-8") == text:
            return
        if self.waiting.is_dir():
            shutil.rmtree(self.waiting)
        write_text_atomically(kept, text)

    def has(self, index: int) -> bool:
        """Whether an image waits."""
        return self._file(index).is_file()

    def put(self, index: int, image: Pixels, frames: NDArray[np.uint8] | None) -> None:
        """Keep an image, (height, width, C) in [0, 1], and its frames, (F, height, width, C), of a video."""
        kept: dict[str, Any] = {"image": image} if frames is None else {"image": image, "frames": frames}
        write_atomically(self._file(index), lambda file: np.savez(file, **kept))

    def finish(self, count: int) -> None:
        """Make the file of all images."""
        suffix = self.path.suffix.lower()
        images = np.stack([self._kept(index, "image") for index in range(count)]).astype(np.float32)
        if self.individual is not None:
            for index, image in enumerate(images):
                save_png(self.individual / f"{index:05d}.png", image, self.bit_depth)
        if suffix == ".npy":
            write_atomically(self.path, lambda file: np.save(file, images))
        elif suffix == ".npz":
            levels = _levels(images, self.bit_depth)
            write_atomically(self.path, lambda file: np.savez_compressed(file, arr_0=levels))
        elif suffix == VIDEO:
            save_video(np.stack([self._kept(index, "frames") for index in range(count)]), self.path)
        else:
            save_grid(images.transpose(0, 3, 1, 2) * 2 - 1, self.path)
        shutil.rmtree(self.waiting)

    def _file(self, index: int) -> Path:
        return self.waiting / f"{index:06d}.npz"

    def _kept(self, index: int, name: str) -> NDArray[Any]:
        with np.load(self._file(index), allow_pickle=False) as file:
            found: NDArray[Any] = file[name]
            return found


def save_video(frames: NDArray[np.uint8], path: Path) -> None:
    """Write an animation of a grid.

    Args:
        frames: (N, F, height, width, C), 0 to 255.
        path: of the GIF; it plays for ever, and rests on the last frame.
    """
    signed = frames.astype(np.float32) / 127.5 - 1
    sheets = [image_grid(signed[:, index].transpose(0, 3, 1, 2)) for index in range(signed.shape[1])]
    sheets = [sheet.convert("RGB") if sheet.mode == "RGBA" else sheet for sheet in sheets]
    durations = [FRAME_MS] * (len(sheets) - 1) + [LAST_MS]

    def write(file: Any) -> None:
        sheets[0].save(file, "GIF", save_all=True, append_images=sheets[1:], duration=durations, loop=0)

    write_atomically(path, write)
