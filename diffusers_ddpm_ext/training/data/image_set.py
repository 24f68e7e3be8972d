"""Set of images to train or validate on: pixel levels, random crops, flips and turns, conditions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from diffusers_ddpm_ext.errors import RunError
from diffusers_ddpm_ext.models.conditioning import Conditions
from diffusers_ddpm_ext.training.data.augmentation import NO_AUGMENTATION, Augmentation, apply_symmetries
from diffusers_ddpm_ext.training.data.condition_dropout import ConditionDropout
from diffusers_ddpm_ext.training.data.conditions import ConditionColumns
from diffusers_ddpm_ext.training.data.image_store import ImageStore
from diffusers_ddpm_ext.training.data.pixel_values import stored_dtype, to_pixels
from diffusers_ddpm_ext.training.data.posterior import Posterior, PosteriorStore
from diffusers_ddpm_ext.training.data.resizing import Size
from diffusers_ddpm_ext.training.data.weighted_turns import WeightedDraws
from diffusers_ddpm_ext.utils import random_keys as keys


class Levels(NamedTuple):
    """Stored pixels of images, (b, C, H, W); and a sentence per unreadable image that was replaced."""

    values: Tensor
    replacements: list[str]


@dataclass(frozen=True)
class ImageSet:
    """Images to train on, or to validate on.

    Attributes:
        images: all loaded images.
        rows: which of them are in this set, (n,), int64.
        size: height and width in pixels.
        augmentation: what is changed at random during training.
        names: of all loaded images.
        replace_unreadable: replace an image that became unreadable by the next one.
        columns: what the images are conditioned on, by row.
        dropout: of conditions, during training.
        posteriors: of all loaded images under the first stage, where they were computed before.
        concat_latents: the network's concatenated inputs, in place of the pictures, where they were computed before.
        draws: how often each image is drawn in training; None: once per epoch.
        placed_like: images at whose random places these are cropped, in proportion: they are pictures of them.
    """

    images: ImageStore
    rows: Tensor
    size: Size
    augmentation: Augmentation = NO_AUGMENTATION
    names: Sequence[str] = ()
    replace_unreadable: bool = False
    columns: ConditionColumns | None = None
    dropout: ConditionDropout | None = None
    posteriors: PosteriorStore | None = None
    concat_latents: PosteriorStore | None = None
    draws: WeightedDraws | None = None
    placed_like: ImageStore | None = None

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def levels(self) -> int | None:
        """Number of values that a pixel can have: 256, 65536 for 16 bits, 17 for the digits; None for floats."""
        return self.images.pixel_format.num_levels

    @property
    def shape(self) -> tuple[int, int, int]:
        """Channels, height and width of an image."""
        return (self.images.channels, *self.size)

    def name(self, index: int) -> str:
        """Name of an image of the set: its file, or its row's number."""
        row = int(self.rows[index])
        return self.names[row] if self.names else str(row)

    def pixels(self, indices: Sequence[int] | Tensor) -> Tensor:
        """Return center-cropped images without flips, for validation and previews: (b, C, H, W), float32 in [-1, 1].

        Args:
            indices: which images of the set, (b,), each in [0, len).
        """
        return to_pixels(self.load_levels(indices).values, self.images.pixel_format)

    def samples(self, indices: Sequence[int] | Tensor) -> Tensor:
        """Return what a pixel model denoises, as `pixels`."""
        return self.pixels(indices)

    def load_posteriors(
        self, indices: Sequence[int] | Tensor, seed: int = 0, epochs: Sequence[int] | None = None
    ) -> Posterior:
        """Return stored posteriors of the flipped and turned images, on the CPU; arguments as in `load_levels`."""
        assert self.posteriors is not None
        return self._load(self.posteriors, indices, seed, epochs)

    def _load(
        self, store: PosteriorStore, indices: Sequence[int] | Tensor, seed: int, epochs: Sequence[int] | None
    ) -> Posterior:
        requested = torch.as_tensor(indices, dtype=torch.int64)
        return store.load(self.rows[requested], self.augmentation.draw_symmetries(requested, seed, epochs))

    def conditions(
        self, indices: Sequence[int] | Tensor, seed: int = 0, epochs: Sequence[int] | None = None
    ) -> Conditions:
        """Return what images are conditioned on, on the CPU.

        Args:
            indices: which images of the set, (b,).
            seed: of the run.
            epochs: as in `load_levels`: images joined to the input are cropped, flipped and turned like the images,
                and one of several captions is drawn; None takes the first.

        Raises:
            RunError: an image joined to the input became unreadable.
        """
        columns = self.columns
        if columns is None:
            return Conditions()
        requested = torch.as_tensor(indices, dtype=torch.int64)
        rows = self.rows[requested]
        concat = None
        if self.concat_latents is not None:
            concat = self._load(self.concat_latents, indices, seed, epochs).mean
        elif columns.concat is not None:
            augmentation = self.augmentation.for_pictures(columns.concat.pixel_format, columns.concat.channels)
            joined = replace(self, images=columns.concat, columns=None, augmentation=augmentation)
            joined = replace(joined, replace_unreadable=False, placed_like=self.images)
            values = joined.load_levels(indices, seed, epochs).values
            concat = to_pixels(values, columns.concat.pixel_format)
        contexts, captions = columns.contexts, columns.captions
        return Conditions(
            None if columns.labels is None else columns.labels[rows],
            concat,
            None if contexts is None else torch.stack([torch.from_numpy(contexts[row]) for row in rows.tolist()]),
            captions=None if captions is None else captions.draw(rows, requested, seed, epochs),
        )

    def load_levels(
        self, indices: Sequence[int] | Tensor, seed: int = 0, epochs: Sequence[int] | None = None
    ) -> Levels:
        """Load the stored pixels of images.

        Args:
            indices: which images of the set, (b,).
            seed: of the run.
            epochs: epoch of each image, (b,), which with seed and index determines crop, flip and turn; None crops the
                center and turns nothing.

        Raises:
            RunError: an image that was readable before the run no longer is, and may not be replaced.
        """
        requested = torch.as_tensor(indices, dtype=torch.int64)
        replacements: list[str] = []
        stack = self.images.stack
        if stack is not None and tuple(stack.shape[-2:]) == self.size and self.augmentation.random_crop is None:
            values = stack[self.rows[requested]]
        else:
            values = torch.empty(len(requested), *self.shape, dtype=stored_dtype(self.images.pixel_format))
            for position, index in enumerate(requested.tolist()):
                image, errors = self._readable_image(index, seed, None if epochs is None else epochs[position])
                values[position] = image
                replacements += errors
        apply_symmetries(values, self.augmentation.draw_symmetries(requested, seed, epochs))
        return Levels(values, replacements)

    def _readable_image(self, index: int, seed: int, epoch: int | None) -> tuple[Tensor, list[str]]:
        """Crop an image, or the next readable one if it may be replaced; and a sentence per replaced image."""
        replacements: list[str] = []
        for other in range(index, index + len(self)):
            try:
                return self._crop(other % len(self), seed, epoch), replacements
            except RunError as error:
                if not self.replace_unreadable:
                    raise RunError(
                        f"{error}; restore it and resume from the last checkpoint, or --skip_bad_images"
                    ) from None
                replacements.append(f"{error}; the next image takes its place (--skip_bad_images)")
        raise RunError("all images became unreadable")

    def _crop(self, index: int, seed: int, epoch: int | None) -> Tensor:
        """Crop an image at its center, or at a place determined by its key."""
        image = self.images.image(int(self.rows[index]))
        random_crop = self.augmentation.random_crop
        if random_crop is not None:
            draws = None if epoch is None else keys.uniform_numbers(3, keys.CROP_BEFORE, seed, epoch, index)
            return random_crop.cut(image, self.size, draws)
        height, width = self.size
        down, right = image.shape[1] - height, image.shape[2] - width
        top, left = down // 2, right // 2
        if epoch is not None and (down or right):
            # A smaller picture of an image may be resized to a row or column more or less.
            guide = image if self.placed_like is None else self.placed_like.image(int(self.rows[index]))
            most_down, most_right = guide.shape[1] - height, guide.shape[2] - width
            place = keys.key(keys.CROP, seed, epoch, index) % ((most_down + 1) * (most_right + 1))
            guide_top, guide_left = divmod(place, most_right + 1)
            top = round(down * guide_top / most_down) if most_down else top
            left = round(right * guide_left / most_right) if most_right else left
        return image[:, top : top + height, left : left + width]


def levels_to_pixels(values: Tensor, levels: int) -> Tensor:
    """Map pixel levels 0 .. levels - 1 to float32 in [-1, 1], both ends exact, on the tensor's device."""
    top = levels - 1
    return values.to(torch.float32).mul_(2).sub_(top).div_(top)
