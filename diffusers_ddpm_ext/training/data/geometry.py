"""Size, crop, flips and turns of a run's images, as the options of section ``data`` request them."""

from __future__ import annotations

from diffusers_ddpm_ext.training.config.data_options import DataOptions
from diffusers_ddpm_ext.training.data.array_images import ArrayReading
from diffusers_ddpm_ext.training.data.augmentation import Augmentation, RandomCrop, surface_of
from diffusers_ddpm_ext.training.data.decoding import Preprocessing
from diffusers_ddpm_ext.training.data.resizing import Resizing
from diffusers_ddpm_ext.utils.pixel_format import PixelFormat


def preprocessing_of(options: DataOptions) -> Preprocessing:
    """What is done once to every image."""
    resizing = Resizing(options.resize, options.resize_filter, options.background)
    keeps_size = options.random_crop == "before"
    reading = ArrayReading(options.array_key, options.array_layout, options.data_range)
    return Preprocessing(options.resolution, options.channels, options.center_crop, resizing, keeps_size, reading)


def augmentation_of(options: DataOptions, pixel_format: PixelFormat, channels: int) -> Augmentation:
    """What is changed at random in every training image, of this format and number of channels."""
    random_crop = None
    if options.random_crop == "before":
        surface = surface_of(pixel_format, channels)
        random_crop = RandomCrop(options.random_crop_scale, preprocessing_of(options).resizing, surface)
    return Augmentation(options.random_flip, options.vertical_flip, options.rotate90, random_crop)


def describe_geometry(options: DataOptions, is_cropped: bool = True) -> list[str]:
    """What is done to the images, for the printed plan.

    Args:
        options: of the run.
        is_cropped: whether images have other proportions than the run's, as photographs do.
    """
    if options.random_crop == "before":
        low, high = options.random_crop_scale
        parts = [f"random crop of {low:g} to {high:g} of each image before resizing"]
    elif options.resize == "crop" and is_cropped:
        parts = ["center crop" if options.center_crop else "random crop"]
    else:
        parts = []
    if options.resize != "crop":
        parts.append({"stretch": "stretched", "pad": "padded"}[options.resize])
    if options.resize_filter != "bilinear":
        parts.append(f"resized with {options.resize_filter}")
    names = {"random_flip": "random flip", "vertical_flip": "vertical flip", "rotate90": "quarter turns"}
    return parts + [text for name, text in names.items() if getattr(options, name)]
