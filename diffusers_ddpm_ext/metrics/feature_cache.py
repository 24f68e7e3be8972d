"""Features of reference images in files: computed once for the same images, extractor and preparation."""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch
from torch import Tensor

from diffusers_ddpm_ext.errors import ConfigError
from diffusers_ddpm_ext.utils.array_files import read_tensors
from diffusers_ddpm_ext.utils.files import write_atomically

NAME = "features-{key}.safetensors"


def cached_features(folder: Path, key: str, count: int) -> Tensor | None:
    """Features of a cache, (count, D), float32; None where it has none, or damaged ones.

    Args:
        folder: of the cache.
        key: sha256 of what they depend on: the images, by their data's fingerprint, and the extractor's fingerprint.
        count: number of images.
    """
    path = folder / NAME.format(key=key)
    if not path.exists():
        return None
    try:
        tensors = read_tensors(path)
    except ConfigError:
        return None
    features, digest = tensors.get("features"), tensors.get("sha256")
    if features is None or digest is None or features.ndim != 2 or len(features) != count:
        return None
    return features if torch.equal(digest, _digest(key, features)) else None


def cache_features(folder: Path, key: str, features: Tensor) -> None:
    """Write features into a cache, atomically; arguments as in `cached_features`.

    Raises:
        OSError: the folder cannot be written.
    """
    from safetensors.torch import save

    features = features.detach().cpu().float().contiguous()
    content = save({"features": features, "sha256": _digest(key, features)})
    write_atomically(folder / NAME.format(key=key), lambda file: file.write(content))


def _digest(key: str, features: Tensor) -> Tensor:
    """Checksum of features and of what they are of, (32,), uint8."""
    digest = hashlib.sha256(f"{key} {tuple(features.shape)} {features.dtype}".encode())
    digest.update(features.contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return torch.frombuffer(bytearray(digest.digest()), dtype=torch.uint8)
