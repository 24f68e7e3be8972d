"""Checks of the options of the pixels against each other, before anything is loaded."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from diffusers_ddpm_ext.errors import ConfigError, as_config_error, printable
from diffusers_ddpm_ext.utils.pixel_format import checked_preview_channels


def check_pixel_options(flat: Mapping[str, Any]) -> None:
    """Check the options of what is done to the pixels of every image.

    Args:
        flat: the options of section ``data``, by name.

    Raises:
        ConfigError: the first contradiction, with the option, its value and the way out.
    """
    resize, random_crop, center_crop = flat["resize"], flat["random_crop"], flat["center_crop"]
    height, width = flat["resolution"]
    if flat["rotate90"] and height != width:
        raise ConfigError(
            f"--rotate90 turns images by 90 degrees, and --resolution {height} {width} is not square: use one number,"
            " or --random_flip and --vertical_flip instead"
        )
    if resize != "crop" and center_crop:
        raise ConfigError(f"--center_crop has no effect with --resize {resize}, which crops nothing: leave one out")
    if random_crop is not None and center_crop:
        raise ConfigError(f"--center_crop contradicts --random_crop {random_crop}: leave one out")
    if random_crop is not None and resize == "pad":
        raise ConfigError(
            f"--random_crop {random_crop} contradicts --resize pad, which shows the whole image: use --resize crop"
        )
    if random_crop == "after" and resize == "stretch":
        raise ConfigError("--random_crop after has no effect with --resize stretch: use --random_crop before")
    low, high = flat["random_crop_scale"]
    if low > high:
        raise ConfigError(f"--random_crop_scale {low:g} {high:g} must be the smaller and then the larger fraction")
    _check_background(flat)
    if flat["preview_channels"] is not None:
        with as_config_error("--preview_channels"):
            checked_preview_channels(flat["preview_channels"])


def _check_background(flat: Mapping[str, Any]) -> None:
    background = flat["background"]
    if background is None:
        return
    parse_color(background)
    if flat["channels"] == 4 and flat["resize"] != "pad":
        raise ConfigError(
            f"--background {background} has no effect with --channels 4, which keeps transparency: leave one out,"
            " or use --channels 3"
        )


def parse_color(text: str) -> tuple[int, int, int]:
    """Red, green and blue of a color, 0 to 255.

    Args:
        text: a name of CSS (``white``), hexadecimal (``#ff8800``, ``#f80``), or ``rgb(255, 136, 0)``.

    Raises:
        ConfigError: it is none.
    """
    from PIL import ImageColor  # `--help` needs no Pillow

    try:
        red, green, blue, *alpha = ImageColor.getrgb(text.strip())
    except ValueError:
        alpha = [0]
    if alpha:
        raise ConfigError(
            f"--background {printable(text, 60)} must be an opaque color: a name such as white or black, or"
            " hexadecimal, as '#ff8800'"
        )
    return red, green, blue
