"""Output of `ddpm-ext sample`: written image by image, so that an interrupted command can resume.

A folder receives each image as a PNG file at once, and records in ``samples.json`` how they were drawn. Every other
file is made from all images together: until the last is drawn, each is stored in a folder next to it, ``.NAME.part``.
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
SETTINGS_NAME = "samples.json"
VIDEO_SUFFIX = ".gif"
NUM_FRAMES, FRAME_MILLISECONDS, LAST_FRAME_MILLISECONDS = 48, 60, 2000


def save_png(path: Path, image: Pixels, bit_depth: int = 8) -> None:
    """Write one image at its own size.

    Args:
        path: the file.
        image: (height, width, C) in [0, 1].
        bit_depth: 8, or 16 for an image of one channel.
    """
    if bit_depth == 8:
        save_grid(image.transpose(2, 0, 1)[None] * 2 - 1, path, enlarge=1)
        return
    pil_image = Image.fromarray(_to_unsigned(image[..., 0], bit_depth))
    write_atomically(path, lambda file: pil_image.save(file, "PNG"))


def _to_unsigned(images: Pixels, bit_depth: int) -> NDArray[np.unsignedinteger[Any]]:
    """Values in [0, 1] as unsigned integers of 8 or 16 bits."""
    return (images * (2**bit_depth - 1)).round().astype(np.uint8 if bit_depth == 8 else np.uint16)


@dataclass(frozen=True)
class PngFolder:
    """A folder of PNG files: ``00000.png``, ``00001.png``, ...

    Attributes:
        path: the folder; created with its first file.
        settings: what the images depend on.
        bit_depth: of the files.
    """

    path: Path
    settings: Mapping[str, Any]
    bit_depth: int = 8

    def open(self) -> None:
        """Check the existing images, and record in the folder how its images are drawn.

        Raises:
            ConfigError: the folder holds other files, or images that were drawn in another way.
        """
        recorded = self.path / SETTINGS_NAME
        settings = {**self.settings, "bit_depth": self.bit_depth}
        if recorded.is_file():
            other = {"bit_depth": 8, **json.loads(recorded.read_text(encoding="utf-8"))}
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
            write_text_atomically(recorded, json.dumps(settings, indent=2) + "\n")

    def has(self, index: int) -> bool:
        """Whether an image exists and is intact."""
        try:
            with Image.open(self.path / f"{index:05d}.png") as image:
                image.load()
        except (OSError, UnidentifiedImageError):
            return False
        return True

    def put(self, index: int, image: Pixels, frames: NDArray[np.uint8] | None) -> None:
        """Write an image, (height, width, C) in [0, 1]."""
        save_png(self.path / f"{index:05d}.png", image, self.bit_depth)

    def finish(self, count: int) -> None:
        """Do nothing: every image is already written."""


@dataclass(frozen=True)
class OneFile:
    """A grid, an array or a video of all images.

    Attributes:
        path: the file.
        settings: what the images depend on.
        individual: a folder that also receives every image, or None.
        bit_depth: of .npz arrays, and of the files in that folder.
    """

    path: Path
    settings: Mapping[str, Any]
    individual: Path | None
    bit_depth: int = 8

    @property
    def parts_folder(self) -> Path:
        """The folder that holds the images drawn so far."""
        return self.path.with_name(f".{self.path.name}.part")

    def open(self) -> None:
        """Delete images that an interrupted command with other settings left."""
        recorded = self.parts_folder / SETTINGS_NAME
        text = json.dumps(self.settings, indent=2) + "\n"
        if recorded.is_file() and recorded.read_text(encoding="utf-8") == text:
            return
        if self.parts_folder.is_dir():
            shutil.rmtree(self.parts_folder)
        write_text_atomically(recorded, text)

    def has(self, index: int) -> bool:
        """Whether an image has been drawn."""
        return self._part(index).is_file()

    def put(self, index: int, image: Pixels, frames: NDArray[np.uint8] | None) -> None:
        """Store an image, (height, width, C) in [0, 1], and for a video its frames, (F, height, width, C)."""
        arrays: dict[str, Any] = {"image": image} if frames is None else {"image": image, "frames": frames}
        write_atomically(self._part(index), lambda file: np.savez(file, **arrays))

    def finish(self, count: int) -> None:
        """Write the file from all images."""
        suffix = self.path.suffix.lower()
        images = np.stack([self._load(index, "image") for index in range(count)]).astype(np.float32)
        if self.individual is not None:
            for index, image in enumerate(images):
                save_png(self.individual / f"{index:05d}.png", image, self.bit_depth)
        if suffix == ".npy":
            write_atomically(self.path, lambda file: np.save(file, images))
        elif suffix == ".npz":
            unsigned = _to_unsigned(images, self.bit_depth)
            write_atomically(self.path, lambda file: np.savez_compressed(file, arr_0=unsigned))
        elif suffix == VIDEO_SUFFIX:
            save_video(np.stack([self._load(index, "frames") for index in range(count)]), self.path)
        else:
            save_grid(images.transpose(0, 3, 1, 2) * 2 - 1, self.path)
        shutil.rmtree(self.parts_folder)

    def _part(self, index: int) -> Path:
        return self.parts_folder / f"{index:06d}.npz"

    def _load(self, index: int, name: str) -> NDArray[Any]:
        with np.load(self._part(index), allow_pickle=False) as file:
            array: NDArray[Any] = file[name]
            return array


def save_video(frames: NDArray[np.uint8], path: Path) -> None:
    """Write an animated GIF of a grid; it loops, and pauses on the last frame.

    Args:
        frames: (N, F, height, width, C), 0 to 255.
        path: the file.
    """
    signed = frames.astype(np.float32) / 127.5 - 1
    sheets = [image_grid(signed[:, index].transpose(0, 3, 1, 2)) for index in range(signed.shape[1])]
    sheets = [sheet.convert("RGB") if sheet.mode == "RGBA" else sheet for sheet in sheets]
    durations = [FRAME_MILLISECONDS] * (len(sheets) - 1) + [LAST_FRAME_MILLISECONDS]

    def write(file: Any) -> None:
        sheets[0].save(file, "GIF", save_all=True, append_images=sheets[1:], duration=durations, loop=0)

    write_atomically(path, write)
