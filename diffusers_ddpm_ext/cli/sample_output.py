"""Output of `ddpm-ext sample`: written image by image, so that an interrupted command can resume.

A folder receives each image as a file at once, and records in ``samples.json`` how they were drawn. Every other
file is made from all images together: until the last is drawn, each is stored in a folder next to it, ``.NAME.part``.
Both are locked while they are written: a second command with the same output is refused.
"""

from __future__ import annotations

import json
import math
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from diffusers_ddpm_ext.cli.arguments import lock_output, lock_output_folder
from diffusers_ddpm_ext.cli.sample_files import TIFF_SUFFIXES, SampleFormat, save_array
from diffusers_ddpm_ext.errors import ConfigError, printable
from diffusers_ddpm_ext.plotting.channels import channel_view
from diffusers_ddpm_ext.plotting.sheets import grid_size, image_grid, save_grid
from diffusers_ddpm_ext.utils.array_files import read_array
from diffusers_ddpm_ext.utils.files import write_atomically, write_text_atomically
from diffusers_ddpm_ext.utils.folder_lock import LOCK, FolderLock
from diffusers_ddpm_ext.utils.input_files import read_json_object, read_text
from diffusers_ddpm_ext.utils.memory import memory_bytes
from diffusers_ddpm_ext.utils.pixel_format import PixelFormat

SETTINGS_NAME = "samples.json"
VIDEO_SUFFIX = ".gif"
NUM_FRAMES, FRAME_MILLISECONDS, LAST_FRAME_MILLISECONDS = 48, 60, 2000
SMALLEST_FILE_BYTES = 67  # a PNG of one pixel
ARRAY_SUFFIXES = (".npy", ".npz", *TIFF_SUFFIXES)
LARGEST_SIDE = {".jpg": 65_500, ".jpeg": 65_500, ".webp": 16_383, ".gif": 65_535}
"""Pixels per side that a format can have."""
TYPES = r"(png|npy|npz|tif)"
PARTIAL = re.compile(rf"\.({re.escape(SETTINGS_NAME)}|\d+\.{TYPES})\.\d+\.part")
"""Temporary files of a sampler that was killed while it wrote."""
NAMED_PARTIAL = re.compile(rf"\..+\.{TYPES}\.\d+\.part", re.DOTALL)
"""The same of images that are named after others."""
PART = re.compile(rf"{re.escape(SETTINGS_NAME)}|\d{{6,}}\.npz|{PARTIAL.pattern}")
"""What a parts folder holds."""
INDIVIDUAL = re.compile(rf"\d{{5,}}\.{TYPES}|{PARTIAL.pattern}")
"""What the folder of --individual holds while it is written."""
NAMED = re.compile(rf".+\.{TYPES}|(.+/)?{NAMED_PARTIAL.pattern}", re.DOTALL)
"""The same of images that are named after others."""


def number_of(index: int) -> str:
    """Name of an image in a folder, without its ending."""
    return f"{index:05d}"


@dataclass(frozen=True)
class SampleFolder:
    """A folder of one file per image: ``00000.png``, ``00001.png``, ..., or with names of their own.

    Attributes:
        path: the folder; created when it is locked.
        settings: what the images depend on.
        shape: of an image: (height, width, C).
        form: of the files.
        stem: name of an image by its index, without its suffix; slashes are folders.
    """

    path: Path
    settings: Mapping[str, Any]
    shape: tuple[int, int, int]
    form: SampleFormat
    stem: Callable[[int], str] = number_of

    def check_room(self, count: int) -> None:
        """Raise ConfigError if the disk cannot hold that many files, however small."""
        disk = os.statvfs(self.path if self.path.is_dir() else self.path.absolute().parent)
        room = disk.f_bavail * disk.f_frsize // SMALLEST_FILE_BYTES
        room = min(room, disk.f_favail) if disk.f_files else room
        if count > room:
            raise ConfigError(
                f"--num_images {count}: the disk of --out {self.path} has room for {room:,} files at most"
            )

    def locked(self) -> AbstractContextManager[None]:
        """Keep other runs out of the folder; see `lock_output_folder`."""
        return lock_output_folder("--out", self.path)

    def check(self) -> None:
        """Check what exists in the folder; writes nothing.

        Raises:
            ConfigError: the folder holds other files, or images that were drawn in another way.
        """
        check_unused(self.path)
        recorded = self.path / SETTINGS_NAME
        if recorded.exists():
            settings = self._settings
            other = {"bit_depth": 8, **read_json_object(recorded, "--out:").content}
            names = {*other, *settings} - {"folder"}  # by another path, it is the same model
            differing = [name for name in names if other.get(name) != settings.get(name)]
            if differing:
                name = sorted(differing, key=lambda each: (each == "model", each))[0]
                raise ConfigError(
                    f"--out {self.path} holds images with {printable(name, 60)} {_shown(other.get(name))}, "
                    f"not {_shown(settings.get(name))}: name another folder"
                )

    @property
    def _settings(self) -> dict[str, Any]:
        return {**self.settings, **self.form.settings}

    def start(self) -> None:
        """Record in the folder how its images are drawn; called before the first image is written."""
        for name in os.listdir(self.path):
            if PARTIAL.fullmatch(name):
                (self.path / name).unlink()
        if self.stem is not number_of:
            for path in self.path.rglob(".*.part"):
                if NAMED_PARTIAL.fullmatch(path.name):
                    path.unlink()
        if not (self.path / SETTINGS_NAME).exists():
            write_text_atomically(self.path / SETTINGS_NAME, json.dumps(self._settings, indent=2) + "\n")

    def existing(self, count: int) -> set[int]:
        """Indices below ``count`` of the images that exist and are intact."""
        named = self.stem is not number_of
        indices = range(count) if named else _indices(self.path, self.form.suffix, "05d", count)
        return {index for index in indices if self.form.is_intact(self._file(index), self.shape[:2])}

    def _file(self, index: int) -> Path:
        return self.path / f"{self.stem(index)}{self.form.suffix}"

    def put(self, index: int, image: NDArray[Any], frames: NDArray[np.uint8] | None) -> None:
        """Write an image as it was drawn, (height, width, C)."""
        self.form.save(self._file(index), image)

    def finish(self, count: int) -> None:
        """Do nothing: every image is already written."""


@dataclass(frozen=True)
class OneFile:
    """A grid, an array or a video of all images.

    Attributes:
        path: the file.
        settings: what the images depend on.
        shape: of an image: (height, width, C).
        form: of the values, and of the files in the folder of individual images.
        num_frames: of a video; None for other files.
        individual: a folder that also receives every image, or None.
        captions: the texts under the images of the grid, in turn; none where it is empty.
        latents: whether the images are latents, float32 in .npz files too.
        stem: as that of `SampleFolder`, for the files in the folder of individual images.
    """

    path: Path
    settings: Mapping[str, Any]
    shape: tuple[int, int, int]
    form: SampleFormat
    num_frames: int | None
    individual: Path | None
    captions: Sequence[str] = ()
    latents: bool = False
    stem: Callable[[int], str] = number_of

    @property
    def parts_folder(self) -> Path:
        """The folder that holds the images drawn so far."""
        return self.path.with_name(f".{self.path.name}.part")

    def check_room(self, count: int) -> None:
        """Raise ConfigError if the images cannot be in memory together, as they must be for one file.

        Also if the file's format has no images of that size.
        """
        height, width, channels = self.shape
        needed, limit = 4 * count * math.prod(self.shape) * (self.num_frames or 1), memory_bytes()
        suffix = self.path.suffix.lower()
        if suffix not in ARRAY_SUFFIXES:
            note = channel_view(channels, self.form.preview).caption
            size = grid_size(count, height, width, self.captions[:count], note)
            needed += math.prod(size)
            if max(size) > LARGEST_SIDE.get(suffix, max(size)):
                raise ConfigError(
                    f"--num_images {count}: a grid of {size[0]}x{size[1]} pixels is too large for {suffix}, which has "
                    f"at most {LARGEST_SIDE[suffix]} per side: use .png, .npz or a folder"
                )
        if limit is not None and needed > limit:
            raise ConfigError(
                f"--num_images {count}: --out {self.path} is made of all images in memory, which takes over "
                f"{needed / 1e9:.0f} GB, and this machine has {limit / 1e9:.0f}: name a folder (no suffix)"
            )

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keep other runs from writing the file and the folder of individual images.

        Raises:
            ConfigError: another run writes one of them.
        """
        with ExitStack() as stack:
            stack.enter_context(lock_output("--out", FolderLock(self.path.parent, self.path.name)))
            if self.individual is not None:
                folder = self.individual.resolve()
                folder.parent.mkdir(parents=True, exist_ok=True)
                stack.enter_context(lock_output("--individual", FolderLock(folder.parent, folder.name)))
            yield

    def check(self) -> None:
        """Check what an interrupted command left; writes nothing.

        Raises:
            ConfigError: in its place is something that this command did not write.
        """
        _check_ours(self.parts_folder, PART)
        if self.individual is not None:
            _check_ours(_draft(self.individual.resolve()), INDIVIDUAL if self.stem is number_of else NAMED)

    @property
    def _settings_text(self) -> str:
        values = {} if self.form.own is None else self.form.settings
        return json.dumps({**self.settings, **values}, indent=2) + "\n"

    def _resumes(self) -> bool:
        """Whether the images in the parts folder were drawn in the same way."""
        try:
            return read_text(self.parts_folder / SETTINGS_NAME) == self._settings_text
        except ConfigError:  # missing, or damaged
            return False

    def start(self) -> None:
        """Delete the images of other settings, and record these; called before the first image is written."""
        if not self._resumes():
            self._delete_parts()
            write_text_atomically(self.parts_folder / SETTINGS_NAME, self._settings_text)

    def existing(self, count: int) -> set[int]:
        """Indices below ``count`` of the images that have been drawn and can be read."""
        if not self._resumes():
            return set()
        return {index for index in _indices(self.parts_folder, ".npz", "06d", count) if self._is_intact(index)}

    def _is_intact(self, index: int) -> bool:
        try:
            self._load(index, "image")
            if self.num_frames is not None:
                self._load(index, "frames")
        except ConfigError:
            return False
        return True

    def put(self, index: int, image: NDArray[Any], frames: NDArray[np.uint8] | None) -> None:
        """Store an image as it was drawn, (height, width, C), and for a video its frames, (F, height, width, C)."""
        arrays: dict[str, Any] = {"image": image} if frames is None else {"image": image, "frames": frames}
        write_atomically(self._part(index), lambda file: np.savez(file, **arrays))

    def finish(self, count: int) -> None:
        """Write the file from all images."""
        suffix, form = self.path.suffix.lower(), self.form
        images = np.stack([self._load(index, "image") for index in range(count)])
        if self.individual is not None:
            self._write_individual(images, self.individual.resolve())
        captions = [self.captions[index % len(self.captions)] for index in range(count)] if self.captions else None
        if suffix in TIFF_SUFFIXES:
            form.save_pages(self.path, images)
        elif suffix in ARRAY_SUFFIXES:
            as_drawn = suffix == ".npy" or self.latents
            save_array(self.path, images if as_drawn else form.values(images))
        elif suffix == VIDEO_SUFFIX:
            frames = np.stack([self._load(index, "frames") for index in range(count)])
            save_video(frames, self.path, captions, form.preview)
        elif self._is_one_png(count):
            form.save(self.path, images[0])
        else:
            save_grid(form.pictures(images), self.path, captions=captions, pixels=form.preview)
        self._delete_parts()

    def _is_one_png(self, count: int) -> bool:
        """Whether the file is one image with the data's own values, not a picture of them."""
        return self.path.suffix.lower() == ".png" and count == 1 and self.form.own is not None and self.form.fits_png()

    def _write_individual(self, images: NDArray[Any], folder: Path) -> None:
        """Write the images beside the folder, and rename: a folder with its name is complete."""
        draft = _draft(folder)
        if draft.is_dir():
            shutil.rmtree(draft)
        for index, image in enumerate(images):
            self.form.save(draft / f"{self.stem(index)}{self.form.suffix}", image)
        os.rename(draft, folder)  # also over an empty one

    def _delete_parts(self) -> None:
        _check_ours(self.parts_folder, PART)
        if self.parts_folder.is_dir():
            shutil.rmtree(self.parts_folder)

    def _part(self, index: int) -> Path:
        return self.parts_folder / f"{index:06d}.npz"

    def _load(self, index: int, name: str) -> NDArray[Any]:
        """An array of a part; ConfigError if it cannot be read, or is not one of these images."""
        array = read_array(self._part(index), key=name)
        frames = () if name == "image" else (self.num_frames,)
        if array.shape != (*frames, *self.shape) or not np.isfinite(array).all():
            raise ConfigError(f"{self._part(index)} does not hold an image of this command: delete it")
        return array


def _indices(folder: Path, suffix: str, digits: str, count: int) -> list[int]:
    """The numbers of the files in a folder that are named by an index below ``count``."""
    names = set(os.listdir(folder)) if folder.is_dir() else set()
    stems = [name.removesuffix(suffix) for name in names]
    numbers = [int(stem) for stem in stems if stem.isascii() and stem.isdigit() and len(stem) < 20]
    return [number for number in numbers if number < count and f"{number:{digits}}{suffix}" in names]


def _draft(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.part")


def _check_ours(folder: Path, pattern: re.Pattern[str]) -> None:
    """Raise ConfigError if a folder that is to be deleted holds a file that this command did not write."""
    if not os.path.lexists(folder):
        return
    is_folder = folder.is_dir() and not folder.is_symlink()
    paths = [path for path in folder.rglob("*") if path.is_symlink() or not path.is_dir()] if is_folder else [folder]
    names = [path.relative_to(folder if is_folder else folder.parent).as_posix() for path in paths]
    foreign = [name for name in names if not pattern.fullmatch(name)]
    if foreign:
        raise ConfigError(
            f"{folder} holds {printable(foreign[0], 60)}, which ddpm-ext sample did not write: move it away, or name "
            "another output"
        )


def check_unused(folder: Path) -> None:
    """Raise ConfigError if a folder without a record holds more than a killed command leaves at its start."""
    if not (folder / SETTINGS_NAME).exists():
        for name in os.listdir(folder) if folder.is_dir() else ():
            if name != LOCK and not PARTIAL.fullmatch(name):
                raise ConfigError(f"--out {folder} is not empty: name another folder")


def _shown(value: Any) -> str:
    return printable(str(value), 120)


def save_video(
    frames: NDArray[np.uint8], path: Path, captions: Sequence[str] | None = None, pixels: PixelFormat | None = None
) -> None:
    """Write an animated GIF of a grid; it loops, and pauses on the last frame.

    Args:
        frames: (N, F, height, width, C), 0 to 255.
        path: the file.
        captions: a text under each image.
        pixels: its channels or components for previews are shown.
    """
    signed = frames.astype(np.float32) / 127.5 - 1
    sheets = [
        image_grid(signed[:, index].transpose(0, 3, 1, 2), captions=captions, pixels=pixels)
        for index in range(signed.shape[1])
    ]
    sheets = [sheet.convert("RGB") if sheet.mode == "RGBA" else sheet for sheet in sheets]
    durations = [FRAME_MILLISECONDS] * (len(sheets) - 1) + [LAST_FRAME_MILLISECONDS]

    def write(file: Any) -> None:
        sheets[0].save(file, "GIF", save_all=True, append_images=sheets[1:], duration=durations, loop=0)

    write_atomically(path, write)
