"""Features by a vision model of Transformers, from a folder or the Hub."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from torch import Tensor

from diffusers_ddpm_ext.errors import ConfigError, printable
from diffusers_ddpm_ext.metrics.features import FeatureExtractor, fingerprint, weights_hash
from diffusers_ddpm_ext.metrics.resizing import describe_resizing, resize
from diffusers_ddpm_ext.utils.input_files import JsonObject, file_name, read_json_object
from diffusers_ddpm_ext.utils.network_folder import as_folder_error

OPTION = "--feature_extractor"
PREPROCESSOR = "preprocessor_config.json"
FILES = ("config.json", PREPROCESSOR, "*.safetensors", "*.safetensors.index.json")
CLASS_TOKENS = ("cls_token", "class_embedding")
MAX_SIDE = 4096
PROBE_SIZE = (64, 64)


@dataclass(frozen=True)
class Preparation:
    """What is done to an image before a vision model sees it.

    Attributes:
        size: height and width that images are resized to; None where the model takes any.
        mean: subtracted from pixels in [0, 1], per channel.
        std: what they are then divided by, per channel.
        channels: that the model takes.
    """

    size: tuple[int, int] | None
    mean: tuple[float, ...]
    std: tuple[float, ...]
    channels: int

    def __call__(self, image: Tensor) -> Tensor:
        """Prepare an image, (1, C, H, W) in [-1, 1].

        Raises:
            ValueError: it has other channels than the model takes, and is not grayscale.
        """
        if image.shape[1] not in (1, self.channels):
            raise ValueError(
                f"{OPTION}: the model takes images of {self.channels} channels, not of {image.shape[1]}: see "
                f"--channels and --preview_channels, or take {OPTION} pixels"
            )
        image = image.expand(-1, self.channels, -1, -1)
        if self.size is not None:
            image = resize(image, self.size)
        mean, std = (torch.tensor(row, device=image.device).view(1, -1, 1, 1) for row in (self.mean, self.std))
        return ((image + 1) / 2 - mean) / std

    def describe(self) -> str:
        """One phrase for reports."""
        resizing = "not resized" if self.size is None else describe_resizing(self.size)
        mean, std = (", ".join(f"{value:g}" for value in dict.fromkeys(row)) for row in (self.mean, self.std))
        return f"{resizing}, normalized to mean {mean} and deviation {std}"


def vision_model_features(path_or_id: str, device: torch.device) -> FeatureExtractor:
    """The pooled output of a vision model of Transformers, in float32.

    It is the image embedding of a model of images and text, else the model's pooled output; where a model has none (or
    its weights have none), the class token of the last layer, else the mean over all places.

    Args:
        path_or_id: a folder or Hub id.
        device: where it runs.

    Raises:
        ConfigError: it does not exist, cannot be read, lacks weights, or is no vision model.
    """
    folder = _local_folder(path_or_id)
    preparation = read_preparation(folder)
    model, has_pooler = _load(folder)
    model.to(device)
    side = preparation.size or PROBE_SIZE
    probe = torch.linspace(-1, 1, side[0] * side[1], device=device).view(1, 1, *side)
    with torch.inference_mode(), _as_unusable(folder):
        output, function = _output_of(model, has_pooler, preparation(probe))
        first, second = (function(preparation(probe)) for _ in range(2))
    if not torch.equal(first, second):
        raise ConfigError(
            f"{OPTION} {file_name(folder)} draws at random: its features are not those of the image alone"
        )
    parts = (type(model).__name__, model.config.to_json_string(), weights_hash(model.state_dict()), output)
    return FeatureExtractor(
        path_or_id,
        f"{preparation.describe()}; {output} of {type(model).__name__}",
        fingerprint(*parts, preparation),
        lambda image: function(preparation(image)),
        device,
    )


@contextmanager
def _as_unusable(folder: Path) -> Iterator[None]:
    """Re-raise what a model raises that is no vision model."""
    try:
        yield
    except (ValueError, RuntimeError, AttributeError, TypeError) as error:
        text = printable(" ".join(str(error).split()), 200)
        raise ConfigError(f"{OPTION} {file_name(folder)} gives no features of an image: {text}") from None


def read_preparation(folder: Path) -> Preparation:
    """How a model's images are prepared, by its ``preprocessor_config.json``; without one, as ViT's are.

    Raises:
        ConfigError: a file is damaged, or names a size or numbers that cannot be.
    """
    if not (folder / "config.json").is_file():
        raise ConfigError(f"{OPTION} {file_name(folder)} has no config.json: name a vision model of Transformers")
    config = read_json_object(folder / "config.json")
    vision = config.object("vision_config", {}) if "vision_config" in config else config
    channels = vision.integer("num_channels", low=1, high=64, default=3)
    content = (
        read_json_object(folder / PREPROCESSOR) if (folder / PREPROCESSOR).is_file() else JsonObject(PREPROCESSOR, {})
    )
    size = next(
        (side for side in (_side(content, "crop_size"), _side(content, "size"), _side(vision, "image_size")) if side),
        None,
    )
    if content.content.get("do_normalize") is False:
        mean, std = (0.0,) * channels, (1.0,) * channels
    else:
        mean, std = (_numbers(content, key, channels) for key in ("image_mean", "image_std"))
    if not all(value > 0 for value in std):
        raise ConfigError(f"{content.name}: image_std must be positive")
    return Preparation(size, mean, std, channels)


def _side(content: JsonObject, key: str) -> tuple[int, int] | None:
    """Height and width; None where the key is not there."""
    value = content.content.get(key)
    if isinstance(value, dict):
        value = value.get("shortest_edge", [value.get("height"), value.get("width")])
    if value is None:
        return None
    sides = value if isinstance(value, list) else [value, value]
    if len(sides) != 2 or not all(type(side) is int and 1 <= side <= MAX_SIDE for side in sides):
        shown = printable(repr(content.content[key]), 80)
        raise ConfigError(
            f"{content.name}: {key} is {shown}; it must be a side, or height and width, at most {MAX_SIDE}"
        )
    return sides[0], sides[1]


def _numbers(content: JsonObject, key: str, channels: int) -> tuple[float, ...]:
    value = content.content.get(key, 0.5)
    numbers: Sequence[Any] = value if isinstance(value, list) else [value] * channels
    if len(numbers) != channels or not all(type(number) in (int, float) for number in numbers):
        raise ConfigError(f"{content.name}: {key} must be {channels} numbers, one per channel")
    return tuple(float(number) for number in numbers)


def _local_folder(path_or_id: str) -> Path:
    if os.path.isdir(path_or_id):
        return Path(path_or_id)
    try:
        return Path(snapshot_download(path_or_id, allow_patterns=list(FILES)))
    except (OSError, ValueError) as error:
        reason = printable(" ".join(str(error).split()).split(". ")[0], 300)
        raise ConfigError(
            f"{OPTION} {printable(path_or_id)} is neither pixels, digits, a file nor a folder on this machine, and "
            f"cannot be loaded from the Hub ({reason})"
        ) from None


def _load(folder: Path) -> tuple[Any, bool]:
    """The model in evaluation mode, and whether its weights have what its pooled output needs."""
    try:
        from transformers import AutoModel
        from transformers.utils import logging
    except ImportError:
        raise ConfigError(f"{OPTION} needs Transformers: pip install 'diffusers-ddpm-ext[perceptual]'") from None
    level, had_bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with as_folder_error(folder):
            model, info = AutoModel.from_pretrained(
                os.fspath(folder),
                torch_dtype=torch.float32,
                local_files_only=True,
                use_safetensors=True,
                trust_remote_code=False,
                output_loading_info=True,
            )
    finally:
        logging.set_verbosity(level)
        if had_bars:
            logging.enable_progress_bar()
    missing = [name for name in info["missing_keys"] if not name.endswith(("position_ids", "mask_token"))]
    pooler = [name for name in missing if "pooler" in name]
    others = sorted(set(missing) - set(pooler)) + sorted(map(str, info["mismatched_keys"]))
    if others:
        raise ConfigError(
            f"{OPTION}: the weights of {file_name(folder)} lack {len(others)} tensors of the model, e.g. "
            f"{printable(others[0], 100)}: they are damaged, or of another model"
        )
    if not hasattr(model, "get_image_features") and getattr(model, "main_input_name", "") != "pixel_values":
        raise ConfigError(f"{OPTION} {file_name(folder)} is a {type(model).__name__}, which takes no images")
    if not all(bool(torch.isfinite(weight).all()) for name, weight in model.named_parameters() if name not in pooler):
        raise ConfigError(f"{OPTION} {file_name(folder)}: the weights are not finite (NaN or infinity)")
    return model.eval().requires_grad_(False), not pooler


def _output_of(model: Any, has_pooler: bool, probe: Tensor) -> tuple[str, Callable[[Tensor], Tensor]]:
    """What of the model's output is taken, in words and as a function of prepared images; ``probe`` is one."""
    if hasattr(model, "get_image_features"):
        return "image embedding", lambda image: _pooled(model.get_image_features(pixel_values=image))
    if has_pooler and getattr(model(pixel_values=probe), "pooler_output", None) is not None:
        return "pooled output", lambda image: _pooled(model(pixel_values=image))
    names = {name.rsplit(".", 1)[-1] for name, _ in model.named_parameters()}
    if names & set(CLASS_TOKENS):
        return "class token of the last layer", lambda image: model(pixel_values=image).last_hidden_state[:, 0]
    return "mean of the last layer", lambda image: _mean(model(pixel_values=image).last_hidden_state)


def _pooled(output: Any) -> Tensor:
    pooled: Tensor = output if isinstance(output, Tensor) else output.pooler_output
    return pooled.flatten(1)


def _mean(states: Tensor) -> Tensor:
    """Over tokens (B, T, D) or places (B, D, h, w)."""
    return states.mean(dim=1) if states.ndim == 3 else states.flatten(2).mean(dim=2)
