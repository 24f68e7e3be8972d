"""Pictures for the encoders of a pipeline: of `--concat` for its concat_encoder, of `--image` for its image_encoder.

A concat_encoder of 1, 3 or 4 channels takes pictures. One of more takes maps of labels: pictures of one channel whose
levels are the numbers of classes, which become one channel per class, 1 where the class is and 0 elsewhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffusers_ddpm_ext.cli.concat_pictures import OPTION, PICTURE_CHANNELS, PictureFolder, decode_picture
from diffusers_ddpm_ext.cli.pipeline_facts import PipelineFacts
from diffusers_ddpm_ext.errors import ConfigError, printable

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from PIL import Image
    from torch import Tensor

MAP_MODES = ("1", "L", "P", "I;16", "I;16L", "I;16B", "I")
"""Pillow's modes of pictures whose levels are numbers, or colors of a palette."""


@dataclass(frozen=True)
class ConcatImages:
    """The pictures of a folder as a concat_encoder takes them, decoded as they are used.

    Attributes:
        pictures: the folder.
        channels: that the encoder takes.
        size: height and width.
    """

    pictures: PictureFolder
    channels: int
    size: tuple[int, int]

    def __len__(self) -> int:
        return len(self.pictures.names)

    def __getitem__(self, indices: Sequence[int]) -> Tensor:
        """Pictures in [-1, 1], or maps of 0 and 1: (B, channels, height, width), float32.

        Args:
            indices: of the pictures, (B,).

        Raises:
            ConfigError: a picture cannot be read, is no map, or has a label that the encoder does not know.
        """
        import torch

        if self.channels in PICTURE_CHANNELS:
            return torch.cat([decode_picture(self.pictures, index, self.size, self.channels) for index in indices])
        maps = torch.stack([torch.from_numpy(self._labels(index)) for index in indices])
        return torch.nn.functional.one_hot(maps, self.channels).permute(0, 3, 1, 2).float()

    def _labels(self, index: int) -> NDArray[np.int64]:
        """The labels of a map, (height, width), resized without mixing them, and cropped."""
        import numpy as np
        from PIL import Image, ImageOps

        from diffusers_ddpm_ext.training.data.image_files import open_image

        height, width = self.size
        name = f"{OPTION}: {printable(self.pictures.names[index], 200)}"
        try:
            with open_image(self.pictures.folder / self.pictures.names[index]) as (image, _):
                if image.mode not in MAP_MODES:
                    raise ConfigError(
                        f"{name} is a picture in color ({image.mode}); the model takes maps of one channel whose "
                        f"levels are labels, 0 to {self.channels - 1}"
                    )
                upright = ImageOps.exif_transpose(image)
                labels = Image.fromarray(np.asarray(upright).astype(np.int32))
        except ConfigError as error:
            text = str(error)
            raise ConfigError(text if text.startswith(OPTION) else f"{name} cannot be read: {text}") from None
        except Exception as error:  # Pillow's decoders raise OSError, SyntaxError, ValueError, struct.error, ...
            reason = printable(" ".join(str(error).split()), 200)
            raise ConfigError(f"{name} cannot be read: {reason or type(error).__name__}") from None
        values = np.asarray(ImageOps.fit(labels, (width, height), Image.Resampling.NEAREST)).astype(np.int64)
        if values.min() < 0 or values.max() >= self.channels:
            wrong = int(values.max() if values.max() >= self.channels else values.min())
            raise ConfigError(f"{name} has the label {wrong}; the labels of the model are 0 to {self.channels - 1}")
        return values


def concat_images(pictures: PictureFolder, facts: PipelineFacts) -> ConcatImages:
    """The pictures of a folder for the model's concat_encoder.

    Raises:
        ConfigError: its configuration is damaged, or the size of a sample is open.
    """
    encoder = facts.concat_encoder
    assert encoder is not None
    if facts.image_size is None:
        raise ConfigError(f"{facts.source}: sample_size of the network is not set, so the size of an image is unknown")
    scale = encoder.number("multiplier", default=0.5) ** encoder.integer("n_stages", 0, 16, 1)
    if scale <= 0:
        raise ConfigError(f"{encoder.name}: multiplier must be above 0")
    height, width = (max(1, round(side / scale)) for side in facts.image_size)
    return ConcatImages(pictures, encoder.integer("in_channels", 1, default=3), (height, width))


@dataclass(frozen=True)
class ImageConditions:
    """Pictures for an image_encoder, opened as they are used; it resizes them itself."""

    pictures: PictureFolder

    def __len__(self) -> int:
        return len(self.pictures.names)

    def __getitem__(self, indices: Sequence[int]) -> list[Image.Image]:
        """Pictures in color.

        Raises:
            ConfigError: a picture cannot be read.
        """
        return [self._open(self.pictures.folder / self.pictures.names[index]) for index in indices]

    def _open(self, path: Path) -> Any:
        from PIL import ImageOps

        from diffusers_ddpm_ext.training.data.image_files import open_image

        try:
            with open_image(path) as (image, _):
                return ImageOps.exif_transpose(image).convert("RGB")
        except Exception as error:  # Pillow's decoders raise OSError, SyntaxError, ValueError, struct.error, ...
            reason = printable(" ".join(str(error).split()), 200) or type(error).__name__
            raise ConfigError(f"--image {printable(str(path), 300)} cannot be read: {reason}") from None
