"""Reading of one image as training does, in its own size and depth, and what its file's header tells."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import UnidentifiedImageError

from diffusers_ddpm_ext.training.data.decoding import Preprocessing, UnreadableImage, decode_image
from diffusers_ddpm_ext.training.data.image_files import Payload, open_image

ORIENTATION = 0x0112  # EXIF's tag; 1 is upright
TURNED, ANIMATED, ALPHA = "turned by EXIF", "animated", "alpha channel"
ARRAY = "array"
UNCHANGED = Preprocessing((1, 1), keeps_size=True)


@dataclass(frozen=True)
class RawImage:
    """An image as its file has it.

    Attributes:
        values: (H, W, C), upright, in the dtype of the file.
        mode: Pillow's name of the file's pixels, such as RGB or P; `ARRAY` for an array.
        format: of the file: PNG, JPEG, ...; `ARRAY` for an array.
        traits: `TURNED`, `ANIMATED`, `ALPHA`, those that it has.
    """

    values: NDArray[np.generic]
    mode: str
    format: str
    traits: frozenset[str]


def read_image(payload: Payload, preprocessing: Preprocessing = UNCHANGED) -> RawImage:
    """Decode an image, passed as its file or the file's bytes, by the reader of training.

    Args:
        payload: the image.
        preprocessing: what is needed to read it; it must keep the image's size.

    Raises:
        UnreadableImage: it cannot be decoded; the text is the reason.
        ConfigError: it is of a kind that training refuses.
    """
    decoded = decode_image(payload, preprocessing)
    mode, file_format, is_turned = _header(payload)
    traits = {TURNED} if is_turned else set()
    if decoded.is_animated:
        traits.add(ANIMATED)
    if decoded.pixels.shape[0] == 4 and mode != ARRAY:
        traits.add(ALPHA)
    return RawImage(np.ascontiguousarray(decoded.pixels.transpose(1, 2, 0)), mode, file_format, frozenset(traits))


def _header(payload: Payload) -> tuple[str, str, bool]:
    """Mode and format of a file, and whether its EXIF data turns it."""
    if payload is None:
        raise UnreadableImage("it is empty")
    try:
        with open_image(payload) as (image, _):
            is_turned = False
            if image.format != "PNG" or "exif" in image.info:  # Pillow would decode a PNG to look for it at its end
                with suppress(Exception):  # damaged EXIF data of a readable image
                    is_turned = image.getexif().get(ORIENTATION, 1) != 1
            return image.mode, image.format or "image", is_turned
    except UnidentifiedImageError:
        return ARRAY, ARRAY, False
