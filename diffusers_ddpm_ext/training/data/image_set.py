"""The images of a run: what is trained on, and what is held out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from diffusers_ddpm_ext.errors import RunError
from diffusers_ddpm_ext.models.conditioning import Conditions
from diffusers_ddpm_ext.training.data.bit_depth import SHALLOW
from diffusers_ddpm_ext.training.data.condition_dropout import ConditionDropout
from diffusers_ddpm_ext.training.data.conditions import ConditionColumns
from diffusers_ddpm_ext.training.data.decoding import Size
from diffusers_ddpm_ext.training.data.image_store import Images
from diffusers_ddpm_ext.utils import random_keys as keys

MEMORY_LIMIT = 2 * 1024**3  # bytes of resized pixels; while they are packed there are twice as many for a moment
DIGITS = "digits of scikit-learn"
DIGITS_SIZE = (8, 8)
DIGITS_LEVELS = 17


@dataclass(frozen=True)
class ImageSet:
    """Images to train on, or to validate on.

    Attributes:
        images: all images that were read.
        rows: which of them are in this set, (n,), int64.
        size: height and width in pixels.
        levels: values that a pixel can take: 256, 65536 of 16 bits, or 17 for the digits. Level k stands for
            2 k / (levels - 1) - 1.
        random_flip: mirror half of the images while training.
        names: of all images that were read.
        replace_unreadable: let the next image take the place of one that became unreadable.
        columns: what the images are conditioned on, by row.
        dropout: of conditions, while training.
    """

    images: Images
    rows: Tensor
    size: Size
    levels: int = 256
    random_flip: bool = False
    names: Sequence[str] = ()
    replace_unreadable: bool = False
    columns: ConditionColumns | None = None
    dropout: ConditionDropout | None = None

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def shape(self) -> tuple[int, int, int]:
        """Channels, height and width of one image."""
        return (self.images.channels, *self.size)

    def name(self, index: int) -> str:
        """Name of an image: its file, or its row; a number where it has none.

        Args:
            index: which image of the set.
        """
        row = int(self.rows[index])
        return self.names[row] if self.names else str(row)

    def pixels(self, indices: Sequence[int] | Tensor) -> Tensor:
        """Return images as they are for validation and previews: the middle of each, never mirrored.

        Args:
            indices: which images of the set, (b,), each in [0, len).

        Returns:
            (b, C, H, W), float32 in [-1, 1].
        """
        return unit_range(self.level_values(indices), self.levels)

    def conditions(
        self, indices: Sequence[int] | Tensor, seed: int = 0, epochs: Sequence[int] | None = None
    ) -> Conditions:
        """Return what images are conditioned on, on the CPU.

        Args:
            indices: which images of the set, (b,).
            seed: the run's seed.
            epochs: as in `level_values`: images that are joined to the input are cut and mirrored with it.

        Returns:
            The conditions; none where the run has none.

        Raises:
            RunError: an image that is joined to the input cannot be read any more.
        """
        columns = self.columns
        if columns is None:
            return Conditions()
        rows = self.rows[torch.as_tensor(indices, dtype=torch.int64)]
        concat = None
        if columns.concat is not None:
            beside = replace(self, images=columns.concat, columns=None, replace_unreadable=False)
            concat = unit_range(beside.level_values(indices, seed, epochs), columns.concat.levels)
        contexts = columns.contexts
        return Conditions(
            None if columns.labels is None else columns.labels[rows],
            concat,
            None if contexts is None else torch.stack([torch.from_numpy(contexts[row]) for row in rows.tolist()]),
        )

    def level_values(
        self,
        indices: Sequence[int] | Tensor,
        seed: int = 0,
        epochs: Sequence[int] | None = None,
        replaced: list[str] | None = None,
    ) -> Tensor:
        """Return images as levels, (b, C, H, W), uint8, or uint16 of 16-bit images.

        Args:
            indices: which images of the set, (b,).
            seed: the run's seed.
            epochs: epoch of each image, (b,), which with the seed and the index decides on place and mirroring; None
                takes the middle of each image as it is.
            replaced: gets a sentence for each image that became unreadable, where the set may replace it.

        Raises:
            RunError: an image could be read before the run and cannot any more, and must not be replaced.
        """
        wanted = torch.as_tensor(indices, dtype=torch.int64)
        stack = self.images.stack
        if stack is not None and tuple(stack.shape[-2:]) == self.size:
            out = stack[self.rows[wanted]]
        else:
            kind = torch.uint8 if self.images.levels == SHALLOW else torch.uint16
            out = torch.empty(len(wanted), *self.shape, dtype=kind)
            for place, index in enumerate(wanted.tolist()):
                out[place] = self._readable(index, seed, None if epochs is None else epochs[place], replaced)
        if self.random_flip and epochs is not None:
            mirrored = [
                place
                for place, (index, epoch) in enumerate(zip(wanted.tolist(), epochs, strict=True))
                if keys.key(keys.FLIP, seed, epoch, index) & 1
            ]
            moved = out.view(torch.int16) if out.dtype == torch.uint16 else out  # torch cannot flip uint16
            moved[mirrored] = moved[mirrored].flip(-1)
        return out

    def _readable(self, index: int, seed: int, epoch: int | None, replaced: list[str] | None) -> Tensor:
        """Cut an image to size, or the next one that can be read where it may take its place."""
        for other in range(index, index + len(self)):
            try:
                return self._crop(other % len(self), seed, epoch)
            except RunError as error:
                if not self.replace_unreadable:
                    raise RunError(
                        f"{error}; put it back and go on from the last checkpoint, or --skip_bad_images"
                    ) from None
                if replaced is not None:
                    replaced.append(f"{error}; the next image takes its place (--skip_bad_images)")
        raise RunError("not a single image can be read any more")

    def _crop(self, index: int, seed: int, epoch: int | None) -> Tensor:
        """Cut an image to size, at its middle or at a keyed place."""
        image = self.images.image(int(self.rows[index]))
        height, width = self.size
        down, right = image.shape[1] - height, image.shape[2] - width
        if epoch is None:
            top, left = down // 2, right // 2
        else:
            place = keys.key(keys.CROP, seed, epoch, index) % ((down + 1) * (right + 1))
            top, left = divmod(place, right + 1)
        return image[:, top : top + height, left : left + width]


def unit_range(levels_of_pixels: Tensor, levels: int) -> Tensor:
    """Map pixel levels 0 .. levels - 1 to float32 in [-1, 1], both ends exact, on the tensor's device."""
    top = levels - 1
    return levels_of_pixels.to(torch.float32).mul_(2).sub_(top).div_(top)
