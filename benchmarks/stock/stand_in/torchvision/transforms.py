"""The transforms of `train_unconditional.py` for PIL images, with torchvision's numbers and about its cost.

Only what that script names. Written from torchvision's documentation: sizes are rounded down, a center crop is
rounded to the nearest pixel, tensors are (channels, height, width) in [0, 1].
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from enum import Enum
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor


class InterpolationMode(Enum):
    """Filters by torchvision's names; bilinear is the only one that the script uses."""

    BILINEAR = "bilinear"


class Compose:
    """Transforms in order."""

    def __init__(self, transforms: Sequence[Callable[[Any], Any]]) -> None:
        self.transforms = transforms

    def __call__(self, value: Any) -> Any:
        """The value after all transforms."""
        for transform in self.transforms:
            value = transform(value)
        return value


class Lambda:
    """A function as a transform."""

    def __init__(self, function: Callable[[Any], Any]) -> None:
        self.function = function

    def __call__(self, value: Any) -> Any:
        """The function's result."""
        return self.function(value)


class Resize:
    """Resize the short side of a PIL image to ``size``; the same image where it has that size."""

    def __init__(self, size: int, interpolation: InterpolationMode) -> None:
        self.size, self.interpolation = size, interpolation

    def __call__(self, image: Image.Image) -> Image.Image:
        """The resized image."""
        width, height = image.size
        short = min(width, height)
        if short == self.size:
            return image
        size = (self.size * width // short, self.size * height // short)
        return image.resize(size, Image.Resampling.BILINEAR)


class CenterCrop:
    """Crop the center of a PIL image to ``size``."""

    def __init__(self, size: int) -> None:
        self.size = size

    def __call__(self, image: Image.Image) -> Image.Image:
        """The cropped image."""
        left, top = (round((side - self.size) / 2) for side in image.size)
        return image.crop((left, top, left + self.size, top + self.size))


class RandomCrop:
    """Crop a PIL image to ``size`` at a random position."""

    def __init__(self, size: int) -> None:
        self.size = size

    def __call__(self, image: Image.Image) -> Image.Image:
        """The cropped image; the same where it has that size."""
        if image.size == (self.size, self.size):
            return image
        left, top = (int(torch.randint(0, side - self.size + 1, (1,))) for side in image.size)
        return image.crop((left, top, left + self.size, top + self.size))


class RandomHorizontalFlip:
    """Flip a PIL image with probability 0.5."""

    def __call__(self, image: Image.Image) -> Image.Image:
        """The image, flipped or not."""
        return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if torch.rand(1) < 0.5 else image


class PILToTensor:
    """A PIL image as a uint8 tensor (channels, height, width)."""

    def __call__(self, image: Image.Image) -> Tensor:
        """The tensor, a copy."""
        values = torch.from_numpy(np.array(image, np.uint8, copy=True))
        return values.view(image.size[1], image.size[0], len(image.getbands())).permute(2, 0, 1).contiguous()


class ToTensor(PILToTensor):
    """A PIL image as a float tensor in [0, 1]."""

    def __call__(self, image: Image.Image) -> Tensor:
        """The tensor."""
        return super().__call__(image).to(torch.get_default_dtype()).div(255)


class ConvertImageDtype:
    """A uint8 tensor as a float tensor in [0, 1]."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype

    def __call__(self, values: Tensor) -> Tensor:
        """The converted tensor."""
        if values.dtype != torch.uint8:
            raise ValueError(f"the stand-in for torchvision converts uint8 only, not {values.dtype}")
        return values.to(self.dtype).div(255)


class Normalize:
    """Subtract a mean and divide by a deviation, per channel."""

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        self.mean, self.std = mean, std

    def __call__(self, values: Tensor) -> Tensor:
        """The normalized tensor, a copy."""
        mean, std = (torch.as_tensor(each, dtype=values.dtype).view(-1, 1, 1) for each in (self.mean, self.std))
        return values.clone().sub_(mean).div_(std)
