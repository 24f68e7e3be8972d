"""Features of images: what sample metrics compare."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from diffusers_ddpm_ext.errors import ConfigError, printable
from diffusers_ddpm_ext.metrics.resizing import describe_resizing, resize
from diffusers_ddpm_ext.utils.checks import describe

PIXELS, DIGITS = "pixels", "digits"
FORMAT = 1
"""Of fingerprints: raised where the same extractor gives other features."""


@dataclass(frozen=True)
class FeatureExtractor:
    """Maps images to features, one image at a time: its features never depend on the others of a batch.

    Attributes:
        name: ``pixels``, ``digits``, or a model's folder, id or file.
        preparation: what is done to an image first, and which output is taken, for reports.
        fingerprint: sha256 over all that the features depend on, in hexadecimal.
        function: maps one image, (1, C, H, W), float32 in [-1, 1] on ``device``, to features (1, D).
        device: where it runs.
    """

    name: str
    preparation: str
    fingerprint: str
    function: Callable[[Tensor], Tensor]
    device: torch.device

    @torch.inference_mode()
    def __call__(self, images: Tensor) -> Tensor:
        """Features of images.

        Args:
            images: (N, C, H, W), floating, in [-1, 1].

        Returns:
            (N, D), float32, on the CPU.

        Raises:
            ValueError: not such images, or the features are not finite.
        """
        is_batch = isinstance(images, Tensor) and images.ndim == 4 and images.is_floating_point() and len(images) > 0
        if not is_batch:
            raise ValueError(f"images={describe(images)} must be (N, C, H, W), floating, in [-1, 1].")
        rows = [self.function(image[None].to(self.device, torch.float32)) for image in images]
        features = torch.cat([row.flatten(1) for row in rows]).float().cpu()
        if not bool(torch.isfinite(features).all()):
            raise ValueError(f"images: the features of {self.name} are not finite for some of them.")
        return features


def load_feature_extractor(
    name: str, device: torch.device | str = "cpu", trust_file: bool = False
) -> FeatureExtractor:
    """A feature extractor by name.

    Args:
        name: ``pixels``; ``digits``, a classifier of handwritten digits; a TorchScript file; or the folder or Hub id
            of a vision model of Transformers.
        device: where it runs.
        trust_file: allow a TorchScript file, whose code runs.

    Raises:
        ConfigError: there is no such model, it cannot be read, or it is a file that is not trusted.
    """
    device = torch.device(device)
    is_file = name not in (PIXELS, DIGITS) and os.path.isfile(name)
    if trust_file and not is_file:
        raise ConfigError(f"--trust_feature_extractor is for a TorchScript file; {printable(name)} is none: remove it")
    if name == PIXELS:
        return FeatureExtractor(name, "not resized", fingerprint(name), lambda image: image.flatten(1), device)
    if name == DIGITS:
        return _digit_features(device)
    if is_file:
        from diffusers_ddpm_ext.metrics.torchscript_features import torchscript_features

        if not trust_file:
            raise ConfigError(
                f"--feature_extractor {printable(name)} is a file of TorchScript, whose code would run: if you trust "
                "its author, add --trust_feature_extractor"
            )
        return torchscript_features(name, device)
    from diffusers_ddpm_ext.metrics.vision_models import vision_model_features

    return vision_model_features(name, device)


def fingerprint(*parts: object) -> str:
    """Sha256 of what features depend on, in hexadecimal."""
    return hashlib.sha256(json.dumps([FORMAT, *map(str, parts)]).encode()).hexdigest()


def weights_hash(tensors: dict[str, Tensor]) -> str:
    """Sha256 of weights, by name."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _digit_features(device: torch.device) -> FeatureExtractor:
    from diffusers_ddpm_ext.metrics.digit_features import DIGIT_SIZE, load_digit_classifier

    classifier = load_digit_classifier()
    hidden = classifier[0].to(device)

    def function(image: Tensor) -> Tensor:
        if image.shape[1] != 1:
            raise ValueError(f"--feature_extractor digits takes images of 1 channel, not of {image.shape[1]}.")
        features: Tensor = hidden(resize(image, DIGIT_SIZE))
        return features

    preparation = f"{describe_resizing(DIGIT_SIZE)} where they are not; last hidden layer of the package's classifier"
    return FeatureExtractor(
        DIGITS, preparation, fingerprint(DIGITS, weights_hash(classifier.state_dict())), function, device
    )
