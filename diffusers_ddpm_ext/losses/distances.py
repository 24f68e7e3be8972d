"""Distances between a prediction and its target, one value per sample: l1, l2, pseudo-Huber, perceptual.

``d`` is ``prediction - target``; the first three are means over all axes but the first. The perceptual one scales the
features of every layer of a pretrained network to length 1 over their channels, sums their squared differences over
channels, and averages over positions and layers: [LPIPS] without its fitted weights.

Sources: [iCT] Song & Dhariwal 2023 (pseudo-Huber), in the scaling of Diffusers' training scripts; [LPIPS] Zhang et al.
2018, eq. 1.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from diffusers_ddpm_ext.utils.checks import checked_number, describe

Distance = Callable[[Tensor, Tensor], Tensor]

DISTANCES = ("l2", "l1", "huber")
HALF = (0.5, 0.5, 0.5)


def _mean_per_sample(values: Tensor) -> Tensor:
    return values.reshape(len(values), -1).mean(dim=1)


def l1(prediction: Tensor, target: Tensor) -> Tensor:
    """Mean of ``|d|``: (B, ...) and (B, ...) to (B,)."""
    return _mean_per_sample((prediction - target).abs())


def l2(prediction: Tensor, target: Tensor) -> Tensor:
    """Mean of ``d^2``: (B, ...) and (B, ...) to (B,)."""
    return _mean_per_sample((prediction - target).square())


def huber(prediction: Tensor, target: Tensor, c: float = 0.1) -> Tensor:
    """Mean of the pseudo-Huber distance ``2 c (sqrt(d^2 + c^2) - c)``: ``d^2`` for small d, ``2 c |d|`` for large.

    ``c``, above 0, in the unit of d, is where the square becomes linear. (B, ...) and (B, ...) to (B,).
    """
    square = (prediction - target).square()
    # d^2 / (sqrt(d^2 + c^2) + c) instead of the difference, which cancels for small d.
    return _mean_per_sample(2 * c * square / ((square + c**2).sqrt() + c))


def get_distance(loss_type: str | Distance, huber_c: float = 0.1, names: Sequence[str] = DISTANCES) -> Distance:
    """Get ``distance(prediction, target) -> (B,)`` by name.

    Args:
        loss_type: ``l2``, ``l1``, ``huber``, or a callable, which is returned as is.
        huber_c: the ``c`` of ``huber``, above 0.
        names: choices for the error message.

    Raises:
        ValueError: the name is unknown, or ``huber_c`` is out of its range.
    """
    _check_huber_c(huber_c)
    if callable(loss_type):
        return loss_type
    if loss_type == "l2":
        return l2
    if loss_type == "l1":
        return l1
    if loss_type == "huber":
        return partial(huber, c=float(huber_c))
    way_out = f"choose one of {', '.join(names)}, or pass a callable distance(prediction, target) -> (B,)."
    raise ValueError(f"loss_type={describe(loss_type)} is unknown: {way_out}")


def _check_huber_c(huber_c: Any) -> None:
    allowed = "a finite number above 0; the usual value is 0.1"
    checked_number("huber_c", huber_c, allowed, lambda c: 0 < c < math.inf)


def check_perceptual_channels(channels: int) -> None:
    """Raise ValueError unless images of so many channels have perceptual features, which 1, 3 and 4 have."""
    if channels not in (1, 3, 4):
        raise ValueError(
            f"perceptual_model: its features need images of 1, 3 or 4 channels, not {channels}: leave it out."
        )


class PerceptualDistance:
    """Called as ``distance(prediction, image) -> (B,)``, on images (B, 1, 3 or 4, H, W) in [-1, 1].

    The backbone is frozen and moved to the device of the images. Grayscale images are repeated to three channels,
    alpha channels are dropped, and images are resized to the backbone's input size.

    Args:
        backbone: a vision model of `transformers`.
        mean: of its inputs, for three channels in [0, 1].
        std: of its inputs.
    """

    def __init__(self, backbone: nn.Module, mean: tuple[float, ...] = HALF, std: tuple[float, ...] = HALF) -> None:
        self.backbone = backbone.eval().requires_grad_(False)
        self.mean, self.std = torch.tensor(mean).view(1, 3, 1, 1), torch.tensor(std).view(1, 3, 1, 1)
        size = getattr(getattr(backbone, "config", None), "image_size", None)
        self.size: tuple[int, int] | None = (size, size) if isinstance(size, int) else tuple(size) if size else None

    @classmethod
    def from_pretrained(cls, name_or_path: str | os.PathLike[str]) -> PerceptualDistance:
        """Load a backbone from a folder or Hub id, with safetensors weights; pickles and remote code are never loaded.

        ValueError if it cannot be loaded.
        """
        try:
            from transformers import AutoModel
            from transformers.models.auto.image_processing_auto import get_image_processor_config

            backbone = AutoModel.from_pretrained(name_or_path, use_safetensors=True, trust_remote_code=False)
            processor: dict[str, Any] = get_image_processor_config(name_or_path)
        except ImportError as error:
            raise ValueError(
                f"perceptual_model needs `transformers` ({error}): pip install diffusers-ddpm-ext[perceptual]"
            ) from error
        except Exception as error:  # transformers raises many types
            text = " ".join(f"{type(error).__name__} {error}".split())
            raise ValueError(
                f"perceptual_model={os.fspath(name_or_path)!r} cannot be loaded as a vision model of transformers "
                f"with safetensors weights: {text}"
            ) from error
        return cls(backbone, tuple(processor.get("image_mean") or HALF), tuple(processor.get("image_std") or HALF))

    def features(self, images: Tensor) -> list[Tensor]:
        """Features of every layer, each (B, positions, channels), of length 1 over the channels."""
        channels = images.shape[1]
        if images.ndim != 4:
            raise ValueError(f"perceptual features need images (B, 1, 3 or 4, H, W), got {tuple(images.shape)}.")
        check_perceptual_channels(channels)
        x = images.expand(-1, 3, -1, -1) if channels == 1 else images[:, :3]
        if self.size is not None and tuple(x.shape[2:]) != self.size:
            x = nn.functional.interpolate(x, self.size, mode="bilinear", antialias=True, align_corners=False)
        mean, std = (values.to(x, non_blocking=True) for values in (self.mean, self.std))
        x = ((x + 1) / 2 - mean) / std
        hidden = self.backbone.to(x.device)(pixel_values=x, output_hidden_states=True).hidden_states
        flat = [h.flatten(2).transpose(1, 2) if h.ndim == 4 else h for h in hidden]
        return [h / (h.norm(dim=2, keepdim=True) + 1e-10) for h in flat]

    def __call__(self, prediction: Tensor, image: Tensor) -> Tensor:
        """See the class."""
        with torch.no_grad():
            target = self.features(image.float())
        predicted = self.features(prediction.float())
        layers = [(a - b).square().sum(2).mean(1) for a, b in zip(predicted, target, strict=True)]
        return torch.stack(layers).mean(0)
