"""Images and conditions of some rows of a stream, decoded; in a data worker, or for the images of a run's plan."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from diffusers_ddpm_ext.errors import ConfigError, RunError, printable
from diffusers_ddpm_ext.training.data.array_images import UnreadableImage
from diffusers_ddpm_ext.training.data.class_labels import Column
from diffusers_ddpm_ext.training.data.conditions import load_conditions
from diffusers_ddpm_ext.training.data.decoding import DecodedImage, Preprocessing, decode_image
from diffusers_ddpm_ext.training.data.image_files import Payload, locate
from diffusers_ddpm_ext.training.data.image_scan import describe_kind
from diffusers_ddpm_ext.training.data.image_set import ImageSet
from diffusers_ddpm_ext.training.data.image_store import PackedImages, kind_of
from diffusers_ddpm_ext.training.data.sources import payload_of_cell
from diffusers_ddpm_ext.training.data.streaming.opening import OpenedRows
from diffusers_ddpm_ext.training.data.streaming.rows import Row


@dataclass(frozen=True)
class RowSource:
    """Some rows of a stream as a source of images; see `sources.Source`."""

    opened: OpenedRows
    rows: Sequence[Row]
    names: Sequence[str]
    other_images: ClassVar[Mapping[str, int]] = {}

    @property
    def option(self) -> str:
        """The option that names the stream's source."""
        return self.opened.option

    def payload(self, index: int) -> Payload:
        """Return the bytes of an image, or where its file is."""
        return payload_of_cell(self.rows[index].cells[self.opened.image_column])

    def read_labels(self, column: str) -> Column:
        """Return the labels by name of the row."""
        return Column(self.read_files(column), self.opened.class_names, self.opened.labels_are_names)

    def read_captions(self, column: str) -> Mapping[str, Any]:
        """Refuse captions, whose table has to be known before a run."""
        raise ConfigError(f"--caption_column {printable(column, 60)} cannot be streamed")

    def read_files(self, column: str) -> dict[str, Any]:
        """Return the cells of a column by name of the row."""
        cells = (row.cells[column] for row in self.rows)
        values = [
            locate(cell) if isinstance(cell, str) and column != self.opened.class_column else cell for cell in cells
        ]
        return dict(zip(self.names, values, strict=True))


def row_name(opened: OpenedRows, row: Row) -> str:
    """Name of a row for messages: its place in the source, and the name of its image if that has one."""
    name, cell = opened.rows.name(row.number), row.cells[opened.image_column]
    path = cell.get("path") if isinstance(cell, Mapping) else None
    return f"{name} ({printable(str(path), 100)})" if path else name


def row_source(opened: OpenedRows, rows: Sequence[Row]) -> RowSource:
    """Rows as a source of images."""
    return RowSource(opened, rows, [row_name(opened, row) for row in rows])


@dataclass(frozen=True)
class RowDecoder:
    """Decodes rows of a stream to a small set of images.

    Attributes:
        opened: the stream's source.
        preprocessing: of each image.
        columns: of the conditions.
        sample: images of the stream that were decoded before the run: all others are of their kind.
    """

    opened: OpenedRows
    preprocessing: Preprocessing
    columns: Mapping[str, str]
    sample: ImageSet

    def failures(self, decoded: Sequence[DecodedImage | UnreadableImage]) -> list[tuple[int, str]]:
        """Places of unreadable images, and the reasons."""
        return [(place, str(image)) for place, image in enumerate(decoded) if isinstance(image, UnreadableImage)]

    def decode(self, row: Row) -> DecodedImage | UnreadableImage:
        """Decode the image of a row; what makes it unreadable is returned.

        Raises:
            RunError: its values are not supported, or it is of another kind than the images before the run.
        """
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # Pillow warns about large images and unusual metadata
                decoded = decode_image(payload_of_cell(row.cells[self.opened.image_column]), self.preprocessing)
        except UnreadableImage as reason:
            return reason
        except ConfigError as error:
            raise RunError(f"{row_name(self.opened, row)} of {self.opened.option}: {error}") from None
        name, expected = row_name(self.opened, row), kind_of(self.sample.images)
        if decoded.kind != expected:
            advice = "convert it"
            if decoded.kind[1] == expected[1]:
                advice += ", or begin a run with --channels, which converts them all"
            raise RunError(
                f"{name} of {self.opened.option} is {describe_kind(*decoded.kind)}, and the first images are"
                f" {describe_kind(*expected)}: {advice}"
            )
        values = self.sample.images.pixel_format
        if decoded.low < values.low or decoded.high > values.high:
            raise RunError(
                f"{name} of {self.opened.option} has values from {decoded.low:g} to {decoded.high:g}, outside of"
                f" {values.low:g} to {values.high:g}: begin a run with the --data_range of all images"
            )
        return decoded

    def image_set(self, rows: Sequence[Row], decoded: Sequence[DecodedImage], positions: Tensor) -> ImageSet:
        """The images at these positions of the effective batch, with their conditions; see `ImageSet`.

        Raises:
            RunError: a condition cannot be used.
        """
        source = row_source(self.opened, rows)
        row_of_position = torch.zeros(int(positions.max()) + 1, dtype=torch.int64)
        row_of_position[positions] = torch.arange(len(rows))
        try:
            columns = load_conditions(source, source.names, self.columns, self.preprocessing, self.sample.columns)
        except ConfigError as error:
            raise RunError(str(error)) from None
        pixels = [torch.from_numpy(image.pixels) for image in decoded]
        images = PackedImages(pixels, pixel_format=self.sample.images.pixel_format)
        return replace(self.sample, images=images, rows=row_of_position, names=source.names, columns=columns)
