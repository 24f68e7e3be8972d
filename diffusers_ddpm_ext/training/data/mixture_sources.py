"""Several sources as one: their images one after the other, and their columns, which must agree.

Each source is opened and decoded on its own, so that messages name it and its cached images serve other runs, too.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from torch import Tensor

from diffusers_ddpm_ext.errors import ConfigError, printable
from diffusers_ddpm_ext.training.data.class_labels import ClassLabels, Column, read_class_labels
from diffusers_ddpm_ext.training.data.image_store import ImageStore, LoadedImages, check_same_kind
from diffusers_ddpm_ext.training.data.resizing import Size
from diffusers_ddpm_ext.training.data.sources import Source
from diffusers_ddpm_ext.utils.pixel_format import PixelFormat


@dataclass(frozen=True)
class JoinedImages:
    """The images of several stores, one store after the other."""

    parts: Sequence[ImageStore]
    starts: Sequence[int]
    fingerprint: str
    stack: None = None

    def __len__(self) -> int:
        return self.starts[-1]

    @property
    def channels(self) -> int:
        """Channels of every image."""
        return self.parts[0].channels

    @property
    def pixel_format(self) -> PixelFormat:
        """Dtype and range of every image."""
        return self.parts[0].pixel_format

    @property
    def sizes(self) -> set[Size]:
        """Heights and widths that the images have."""
        return {size for part in self.parts for size in part.sizes}

    def image(self, index: int) -> Tensor:
        """Return an image, (C, h, w), in the type of its store."""
        part = int(np.searchsorted(self.starts, index, side="right")) - 1
        return self.parts[part].image(index - self.starts[part])


def join_images(names: Sequence[str], loaded: Sequence[LoadedImages]) -> LoadedImages:
    """Join the loaded images of several sources; an image is then called by its source's name and its own.

    Args:
        names: of the sources.
        loaded: their images.

    Raises:
        ConfigError: channels or depths of two sources differ.
    """
    for other in loaded[1:]:
        check_same_kind(loaded[0], other)
    starts = np.cumsum([0, *(len(each.names) for each in loaded)]).tolist()
    fingerprint = hashlib.sha256(" ".join(each.fingerprint for each in loaded).encode()).hexdigest()
    return replace(
        loaded[0],
        images=JoinedImages([each.images for each in loaded], starts, fingerprint),
        names=[_full_name(name, image) for name, each in zip(names, loaded, strict=True) for image in each.names],
        skipped=sum(each.skipped for each in loaded),
        enlarged=sum(each.enlarged for each in loaded),
        fingerprint=fingerprint,
        highest=max(each.highest for each in loaded),
        num_animated=sum(each.num_animated for each in loaded),
    )


@dataclass(frozen=True)
class MixtureSource:
    """The columns of several sources, by the names of `join_images`; arguments and errors are those of `Source`.

    Attributes:
        names: of the sources.
        parts: the sources.
    """

    names: Sequence[str]
    parts: Sequence[Source]

    @property
    def other_images(self) -> Mapping[str, int]:
        """Images of types that are not read, by extension: their number."""
        return sum((Counter(part.other_images) for part in self.parts), Counter())

    def read_labels(self, column: str) -> Column:
        """Return the values of a column; classes with names are the same class where the names are the same.

        Raises:
            ConfigError: of one source the classes are names, of another numbers or vectors.
        """
        read = []
        for part in self.parts:
            label = f"--class_column {printable(column, 60)} of {part.option}"
            labels = part.read_labels(column)
            read.append((labels, read_class_labels(label, labels, part.names)))
        kinds = [_kind_of(classes) for _, classes in read]
        for part, kind in zip(self.parts[1:], kinds[1:], strict=True):
            if kind != kinds[0]:
                raise ConfigError(
                    f"--class_column {printable(column, 60)}: the classes of {self.parts[0].option} are {kinds[0]},"
                    f" those of {part.option} {kind}: give all data sets the same kind"
                )
        declared = read[0][0].class_names
        if all(labels.class_names == declared for labels, _ in read):
            return Column(
                self._merge([labels.values for labels, _ in read]),
                declared,
                any(labels.holds_names for labels, _ in read),
            )
        named = [
            {name: classes.names[int(number)] for name, number in zip(part.names, classes.labels, strict=True)}
            for part, (_, classes) in zip(self.parts, read, strict=True)
        ]
        return Column(self._merge(named), holds_names=True)

    def read_captions(self, column: str) -> Mapping[str, Any]:
        """Return the captions of the images."""
        return self._merge([part.read_captions(column) for part in self.parts])

    def read_files(self, column: str) -> dict[str, Any]:
        """Return the values of a column, with paths as `image_files.locate` returns them."""
        return self._merge([part.read_files(column) for part in self.parts])

    def _merge(self, columns: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        named = zip(self.names, columns, strict=True)
        return {_full_name(name, image): value for name, column in named for image, value in column.items()}


def stores_of(images: ImageStore) -> Sequence[ImageStore]:
    """The stores of joined images, or the one of others."""
    return images.parts if isinstance(images, JoinedImages) else [images]


def _full_name(source: str, image: str) -> str:
    return f"{source.rstrip('/')}/{image}"


def _kind_of(classes: ClassLabels) -> str:
    if not classes.names:
        return "vectors"
    return "names" if classes.are_named else "numbers"
