"""Pictures of a folder as conditions of `ddpm-ext sample --concat`: found, named, decoded, and made into inputs.

A picture is resized and cropped to what the model draws, as in training. Where the model was trained so, it goes
through the first stage: its latents, not its pixels, are concatenated to the network's input.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from diffusers_ddpm_ext.cli.pipeline_facts import PipelineFacts
from diffusers_ddpm_ext.errors import ConfigError, printable
from diffusers_ddpm_ext.utils.files import CONFIG

if TYPE_CHECKING:
    from torch import Tensor

    from diffusers_ddpm_ext.training.config.pixel_options import ResizeMode
    from diffusers_ddpm_ext.training.data.resizing import Resizing

OPTION = "--concat"
PICTURE_CHANNELS = (1, 3, 4)


@dataclass(frozen=True)
class PictureFolder:
    """The pictures of a folder, one condition each.

    Attributes:
        folder: their folder.
        names: of the files, paths inside the folder with forward slashes, sorted.
        stems: of the outputs, in the same order: the names without their endings.
        resizing: how they get the size; None is the default.
    """

    folder: Path
    names: tuple[str, ...]
    stems: tuple[str, ...]
    resizing: Resizing | None = None

    def stem(self, index: int) -> str:
        """Name of the image with an index, without its ending; a number is added once every picture was used."""
        turn, position = divmod(index, len(self.stems))
        return self.stems[position] if turn == 0 else f"{self.stems[position]}-{turn + 1}"

    def fingerprint(self) -> str:
        """The sha256 of all names and contents, and of how they are resized."""
        digest = hashlib.sha256(b"" if self.resizing is None else repr(self.resizing).encode())
        for name in self.names:
            digest.update(name.encode("utf-8", "surrogateescape") + b"\0")
            digest.update(hashlib.sha256((self.folder / name).read_bytes()).digest())
        return digest.hexdigest()


def find_pictures(folder: Path, option: str = OPTION) -> PictureFolder:
    """The pictures of a folder and its subfolders. Imports no torch.

    Args:
        folder: where they are.
        option: that named it, for messages.

    Raises:
        ConfigError: the folder cannot be read or has none, or two pictures would have one output.
    """
    from diffusers_ddpm_ext.training.config.checks import check_image_folder
    from diffusers_ddpm_ext.training.data.image_files import find_files

    names = find_files(check_image_folder(option, str(folder)), ()).images
    if not names:
        raise ConfigError(f"{option} {printable(str(folder), 300)} has no picture that Pillow reads (.png, .jpg, ...)")
    stems = [str(PurePosixPath(name).with_suffix("")) for name in names]
    taken: dict[str, str] = {}
    for name, stem in zip(names, stems, strict=True):
        if stem in taken:
            both = f"{printable(taken[stem], 120)} and {printable(name, 120)}"
            raise ConfigError(f"{option}: {both} would both become {printable(stem, 120)}.png: rename one of them")
        taken[stem] = name
    return PictureFolder(folder, tuple(names), tuple(stems))


def resizing_of_run(folder: Path, mode: ResizeMode | None) -> Resizing | None:
    """How the pictures of a training run were resized; None if by default.

    Args:
        folder: of its pipeline, perhaps with its config.yaml.
        mode: that replaces the run's.

    Raises:
        ConfigError: the file is damaged.
    """
    from diffusers_ddpm_ext.training.config.layers import read_config
    from diffusers_ddpm_ext.training.data.resizing import COVERING, Resizing

    options = read_config(str(folder / CONFIG)).options if (folder / CONFIG).is_file() else {}
    own_mode = options.get("resize", COVERING.mode)
    resize_filter = options.get("resize_filter", COVERING.filter)
    resizing = Resizing(own_mode if mode is None else mode, resize_filter, options.get("background"))
    return None if resizing == COVERING else resizing


def check_turns(pictures: PictureFolder, num_images: int, option: str = OPTION) -> None:
    """Refuse a number of images whose numbered outputs would have the name of another picture's.

    Args:
        pictures: that the outputs are named after.
        num_images: to draw.
        option: that named their folder, for messages.

    Raises:
        ConfigError: two outputs would have one name.
    """
    turns = -(-num_images // len(pictures.stems))
    known = set(pictures.stems)
    for stem in pictures.stems:
        base, _, number = stem.rpartition("-")
        if base in known and number.isascii() and number.isdigit() and 2 <= int(number[:18]) <= turns:
            raise ConfigError(
                f"{option}: with --num_images {num_images}, the {number}. image of {printable(base, 120)} would be "
                f"called {printable(stem, 120)}, as another picture is: rename it, or draw {len(known)}"
            )


def check_channels(facts: PipelineFacts) -> None:
    """Refuse a model whose concatenated inputs are no pictures; raised before torch is imported.

    Raises:
        ConfigError: the network takes another number of channels than a picture, or its latents, have.
    """
    channels = facts.concat_channels
    if facts.concat_encoder is not None or facts.concat_through_vae is None:
        return
    if facts.first_stage is None:
        raise ConfigError(
            f"{OPTION}: pictures go through the first stage of {facts.source}, which is not in its folder: encode "
            "them and use --concat_inputs FILE.npy"
        )
    stage = facts.first_stage
    has_mask = channels == facts.channels + 1 and stage.pixel_channels + 1 in PICTURE_CHANNELS
    if channels != facts.channels and not has_mask:
        raise ConfigError(
            f"{OPTION}: {facts.source} takes {channels} channels, and the latents of a picture have {facts.channels} "
            f"({facts.channels + 1} with a mask): use --concat_inputs FILE.npy"
        )


@dataclass(frozen=True)
class ConcatInputs:
    """The conditions of a folder's pictures, decoded and encoded as they are used.

    Attributes:
        pictures: the folder.
        pipeline: the loaded pipeline.
        channels: that the network takes.
        size: height and width of a sample.
        seed: of the samples of the posterior.
    """

    pictures: PictureFolder
    pipeline: Any
    channels: int
    size: tuple[int, int]
    seed: int

    def __len__(self) -> int:
        return len(self.pictures.names)

    def __getitem__(self, indices: Sequence[int]) -> Tensor:
        """Concatenated inputs of pictures, (B, c, height, width), float32.

        Args:
            indices: of the pictures, (B,).

        Raises:
            ConfigError: a picture cannot be read.
        """
        import torch

        return torch.cat([self._condition(index) for index in indices])

    def _condition(self, index: int) -> Tensor:
        from diffusers_ddpm_ext.models.concat_condition import concat_condition
        from diffusers_ddpm_ext.utils.random_keys import generator

        stage, through = self.pipeline.first_stage, self.pipeline.config.get("concat_through_vae")
        if stage is None or (through is None and self._size_of(index) == self.size):
            return decode_picture(self.pictures, index, self.size, self.channels)
        height, width = self.size
        channels = self.channels if through is None else stage.pixel_channels + self.channels - stage.latent_channels
        picture = decode_picture(self.pictures, index, (height * stage.factor, width * stage.factor), channels)
        if channels > stage.pixel_channels and through is not None and not bool((picture[:, -1] < 0).any()):
            name = printable(self.pictures.names[index], 200)
            raise ConfigError(
                f"{OPTION}: {name} has no transparent part, and that is what the model paints: erase it there"
            )
        noise = generator("sample/concat", self.seed, index)
        return concat_condition(stage, picture.to(self.pipeline.device), through, noise).cpu()

    def _size_of(self, index: int) -> tuple[int, int] | None:
        """Height and width of a picture's file; None if it is no picture."""
        from diffusers_ddpm_ext.training.data.image_files import open_image

        try:
            with open_image(self.pictures.folder / self.pictures.names[index]) as (image, _):
                return image.height, image.width
        except (ConfigError, OSError, SyntaxError, ValueError):
            return None


def decode_picture(pictures: PictureFolder, index: int, size: tuple[int, int], channels: int) -> Tensor:
    """A picture of a folder, resized and cropped: (1, channels, height, width), in [-1, 1].

    Raises:
        ConfigError: it cannot be read, or has other channels.
    """
    import torch

    from diffusers_ddpm_ext.training.data.array_images import UnreadableImage
    from diffusers_ddpm_ext.training.data.decoding import Preprocessing, decode_image
    from diffusers_ddpm_ext.training.data.pixel_values import full_range, to_pixels
    from diffusers_ddpm_ext.training.data.resizing import COVERING

    name = printable(pictures.names[index], 200)
    preprocessing = Preprocessing(size, channels, True, pictures.resizing or COVERING)
    try:
        decoded = decode_image(pictures.folder / pictures.names[index], preprocessing)
    except (UnreadableImage, ConfigError) as error:
        raise ConfigError(f"{OPTION}: {name} cannot be read: {error}") from None
    pixels, pixel_format = decoded.pixels, full_range(decoded.pixels.dtype.name)
    if len(pixels) != channels:
        raise ConfigError(f"{OPTION}: {name} has {len(pixels)} channels; the model takes {channels}")
    if decoded.low < pixel_format.low or decoded.high > pixel_format.high:
        raise ConfigError(
            f"{OPTION}: {name} has values from {decoded.low:g} to {decoded.high:g}: floats must be in [0, 1]"
        )
    return to_pixels(torch.from_numpy(pixels)[None], pixel_format)
