"""Random changes of training images: flips, quarter turns, and parts that are cut out before they are resized.

Each is determined by its key: the run's seed, the epoch and the number of the image. Flips and turns are the eight
symmetries of a square. A symmetry is a number: 1 if the image is mirrored left to right, plus twice the number of
quarter turns, counterclockwise, that follow. 0 is the image as it is, 1 its mirror image, 5 it is upside down.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from diffusers_ddpm_ext.training.config.pixel_options import ResizeMode
from diffusers_ddpm_ext.training.data.pixel_values import movable
from diffusers_ddpm_ext.training.data.resizing import COVERING, Box, Resizing, Size, Surface, fit, resample
from diffusers_ddpm_ext.utils import random_keys as keys
from diffusers_ddpm_ext.utils.pixel_format import PixelFormat


@dataclass(frozen=True)
class RandomCrop:
    """A part of the whole image, cut out before it is resized, so that objects appear in different sizes.

    Attributes:
        scale: smallest and largest side of the part, as fractions of the largest part that fits.
        resizing: of the part.
        surface: what the values of the images mean.
    """

    scale: tuple[float, float]
    resizing: Resizing = COVERING
    surface: Surface = Surface()  # noqa: RUF009 - frozen

    def cut(self, image: Tensor, size: Size, draws: Sequence[float] | None) -> Tensor:
        """Cut and resize an image.

        Args:
            image: (C, h, w), of any size.
            size: height and width of the result.
            draws: three numbers in [0, 1): scale, and place from the top and from the left. None: the whole image is
                resized and cropped at its center, as without this augmentation.
        """
        values, resizing = image.permute(1, 2, 0).numpy(), self.resizing
        if draws is None:
            pixels = fit(values, size, resizing, True, self.surface)
        else:
            box = random_box((image.shape[1], image.shape[2]), size, resizing.mode, self.scale, draws)
            pixels = resample(values, size, resizing.filter, self.surface, box)
        return torch.from_numpy(np.array(pixels.transpose(2, 0, 1), order="C"))


def surface_of(pixel_format: PixelFormat, channels: int) -> Surface:
    """What stored values of a format mean; four channels of an array are no color with transparency."""
    return Surface((pixel_format.low, pixel_format.high), channels == 4 and pixel_format.suffix == ".png")


def random_box(own: Size, size: Size, mode: ResizeMode, scale: tuple[float, float], draws: Sequence[float]) -> Box:
    """A part of an image: of the proportions of the size, or with ``stretch`` of the image.

    The part is the same of an image and of a smaller copy of it, in proportion. Arguments are as in `RandomCrop`.
    """
    height, width = map(float, own)
    part_height, part_width = height, width
    if mode == "crop":
        part_height, part_width = min(height, width * size[0] / size[1]), min(width, height * size[1] / size[0])
    low, high = scale
    fraction = low + draws[0] * (high - low)
    part_height, part_width = part_height * fraction, part_width * fraction
    top, left = draws[1] * (height - part_height), draws[2] * (width - part_width)
    return left, top, min(left + part_width, width), min(top + part_height, height)


@dataclass(frozen=True)
class Augmentation:
    """What is changed at random in training images.

    Attributes:
        random_flip: mirror half of the images left to right.
        vertical_flip: turn half of the images upside down.
        rotate90: turn images by 0, 1, 2 or 3 quarters.
        random_crop: cut a part out of each image before it is resized; None: they were resized before.
    """

    random_flip: bool = False
    vertical_flip: bool = False
    rotate90: bool = False
    random_crop: RandomCrop | None = None

    def for_validation(self) -> Augmentation:
        """The same without anything random: images are resized as a whole."""
        return Augmentation(random_crop=self.random_crop)

    def for_pictures(self, pixel_format: PixelFormat, channels: int) -> Augmentation:
        """The same for pictures of this format and number of channels that are conditions of the images."""
        if self.random_crop is None:
            return self
        return replace(self, random_crop=replace(self.random_crop, surface=surface_of(pixel_format, channels)))

    @property
    def symmetries(self) -> tuple[int, ...]:
        """The symmetries that images may get, ascending."""
        flips = [(h, v) for h in range(1 + self.random_flip) for v in range(1 + self.vertical_flip)]
        turns = range(4 if self.rotate90 else 1)
        return tuple(sorted({_symmetry(h, v, turn) for h, v in flips for turn in turns}))

    def draw_symmetries(self, indices: Tensor, seed: int, epochs: Sequence[int] | None) -> Tensor:
        """Symmetry of each image in its epoch, (b,), int64; 0 without epochs.

        Args:
            indices: numbers of the images in their set, (b,).
            seed: of the run.
            epochs: of each image, (b,).
        """
        if epochs is None or len(self.symmetries) == 1:
            return torch.zeros(len(indices), dtype=torch.int64)
        drawn = []
        for index, epoch in zip(indices.tolist(), epochs, strict=True):
            mirrored = self.random_flip and keys.key(keys.FLIP, seed, epoch, index) & 1
            upturned = self.vertical_flip and keys.key(keys.VERTICAL_FLIP, seed, epoch, index) & 1
            turns = self.rotate90 and keys.key(keys.ROTATION, seed, epoch, index) & 3
            drawn.append(_symmetry(mirrored, upturned, turns))
        return torch.tensor(drawn, dtype=torch.int64)


NO_AUGMENTATION = Augmentation()


def _symmetry(mirrored: int, upturned: int, turns: int) -> int:
    """The symmetry of a flip left to right, then one upside down, then quarter turns.

    Upside down is mirrored and turned by two quarters.
    """
    return (int(mirrored) ^ int(upturned)) + 2 * ((int(turns) + 2 * int(upturned)) % 4)


def apply_symmetries(images: Tensor, symmetries: Tensor) -> None:
    """Flip and turn images in place.

    Args:
        images: (b, C, H, W), of any dtype, on the CPU; square where a symmetry is a quarter turn.
        symmetries: of each, (b,), int64.
    """
    values, drawn = movable(images).numpy(), symmetries.numpy()  # torch selects bytes ten times as slowly
    for symmetry in set(drawn.tolist()) - {0}:
        chosen = np.flatnonzero(drawn == symmetry)
        part = torch.from_numpy(values[chosen])
        part = part.flip(-1) if symmetry % 2 else part
        values[chosen] = torch.rot90(part, symmetry // 2, (-2, -1)).numpy()
