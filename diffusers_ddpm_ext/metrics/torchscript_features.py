"""Features by a TorchScript file, such as the Inception network of StyleGAN's metrics. Its code runs."""

from __future__ import annotations

import hashlib
import warnings
from typing import Any

import torch
from torch import Tensor
from torch.jit._fuser import optimized_execution

from diffusers_ddpm_ext.errors import ConfigError, printable
from diffusers_ddpm_ext.metrics.features import FeatureExtractor, fingerprint
from diffusers_ddpm_ext.utils.input_files import open_input

OPTION = "--feature_extractor"
STYLEGAN_ARGUMENT = "return_features"
"""Of the forward method of the files that StyleGAN's authors publish: they take uint8 and resize by themselves."""


def torchscript_features(path: str, device: torch.device) -> FeatureExtractor:
    """The features of a TorchScript file, which the caller trusts.

    A file whose forward takes ``return_features`` gets color pixels as uint8 in 0..255, as StyleGAN's networks do; any
    other gets float32 in [-1, 1], with the channels that the images have. Neither is resized here.

    Args:
        path: the file.
        device: where it runs.

    Raises:
        ConfigError: it is no TorchScript file.
    """
    with open_input(path, OPTION) as file:
        digest = hashlib.sha256()
        while block := file.read(2**20):
            digest.update(block)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # of TorchScript as a whole; such files exist
            network: Any = torch.jit.load(path, map_location=device).eval()
    except (RuntimeError, ValueError, OSError) as error:
        text = printable(" ".join(str(error).split()), 200)
        raise ConfigError(f"{OPTION} {printable(path)} is not a file of TorchScript: {text}") from None
    names = [argument.name for argument in network.forward.schema.arguments]
    is_stylegan = STYLEGAN_ARGUMENT in names

    def function(image: Tensor) -> Tensor:
        try:
            with optimized_execution(False):  # fused code of later calls would round differently
                output = network(_levels(image), return_features=True) if is_stylegan else network(image)
        except RuntimeError as error:
            text = printable(" ".join(str(error).split()), 200)
            raise ValueError(
                f"{OPTION} {printable(path)} cannot take images of {tuple(image.shape)}: {text}"
            ) from None
        if not isinstance(output, Tensor) or output.shape[:1] != (1,):
            raise ValueError(
                f"{OPTION} {printable(path)} must return one tensor (B, ...): it is {type(output).__name__}"
            )
        return output

    kind = "uint8 pixels, resized by the file itself" if is_stylegan else "pixels in [-1, 1], not resized"
    return FeatureExtractor(path, kind, fingerprint("torchscript", digest.hexdigest()), function, device)


def _levels(image: Tensor) -> Tensor:
    """Color pixels 0..255, uint8."""
    if image.shape[1] not in (1, 3):
        raise ValueError(
            f"{OPTION}: the file takes images of 1 or 3 channels, not of {image.shape[1]}: see --preview_channels."
        )
    return ((image + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).expand(-1, 3, -1, -1)
