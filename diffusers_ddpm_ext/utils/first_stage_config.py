"""What the JSON files of a pipeline say about its first stage, without building it: class, factor, channels, scale."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from diffusers_ddpm_ext.errors import ConfigError, printable
from diffusers_ddpm_ext.utils.input_files import JsonObject, read_json_object

FIRST_STAGE_SLOTS = ("vae", "vqvae")
MAX_CHANNELS, MAX_LEVELS = 2**20, 16
DEFAULT_SCALES = {"AutoencoderTiny": 1.0, "AutoencoderDC": 1.0}
"""Of Diffusers' classes, where their config leaves the scale out; all others have Stable Diffusion's."""


@dataclass(frozen=True)
class FirstStageConfig:
    """The configuration of the autoencoder between pictures and latents.

    Attributes:
        slot: its name in the pipeline, and its folder.
        class_name: as recorded, for messages.
        config: its ``config.json``.
    """

    slot: str
    class_name: str
    config: JsonObject

    @property
    def factor(self) -> int:
        """Pixels per latent, by its levels: every level but the last halves the picture."""
        keys = ("block_out_channels", "encoder_block_out_channels")
        widths = next((self.config.numbers(key) for key in keys if key in self.config), (0.0,))
        if not 1 <= len(widths) <= MAX_LEVELS:
            raise ConfigError(f"{self.config.name}: it has {len(widths)} levels; a first stage has 1 to {MAX_LEVELS}")
        return int(2 ** (len(widths) - 1))

    @property
    def latent_channels(self) -> int:
        """Channels of a latent."""
        is_vq = self.class_name == "VQModel"
        key = "vq_embed_dim" if is_vq and self.config.content.get("vq_embed_dim") is not None else "latent_channels"
        return self.config.integer(key, 1, MAX_CHANNELS, 3 if is_vq else 4)

    @property
    def pixel_channels(self) -> int:
        """Channels of a picture."""
        return self.config.integer("in_channels", 1, MAX_CHANNELS, 3)

    @property
    def scaling_factor(self) -> float:
        """The number that its latents are multiplied with."""
        default = DEFAULT_SCALES.get(self.class_name, 0.18215)
        factor = self.config.number("scaling_factor", default=default)
        if factor <= 0:
            raise ConfigError(f"{self.config.name}: scaling_factor is {factor:g}; it must be above 0")
        return factor

    @property
    def has_channel_statistics(self) -> bool:
        """Whether each channel of its latents has a mean and a standard deviation of its own."""
        return self.config.content.get("latents_std") is not None

    def describe(self) -> str:
        """Class, factor, channels and scale in one phrase; ConfigError if one of them is damaged."""
        side, statistics = self.factor, ", mean and deviation per channel" if self.has_channel_statistics else ""
        latents = f"latents of {self.latent_channels} channels, {side}x{side} pixels each"
        return f"{self.class_name}: {latents}, scale {self.scaling_factor:.6g}{statistics}"


def read_first_stage_config(folder: Path, index: JsonObject) -> FirstStageConfig | None:
    """The first stage in a pipeline's folder; None where its ``model_index.json`` names none.

    Args:
        folder: of the pipeline.
        index: its ``model_index.json``.

    Raises:
        ConfigError: there are two, or its configuration is missing or damaged.
    """
    slots = [slot for slot in FIRST_STAGE_SLOTS if names_class(index.content.get(slot))]
    if len(slots) > 1:
        raise ConfigError(
            f"{index.name} names a vae and a vqvae: a pipeline has one first stage, so remove one of them"
        )
    if not slots:
        return None
    place = folder / slots[0]
    if not place.is_dir():
        raise ConfigError(
            f"{index.name} names a first stage, and {printable(str(place), 300)} is missing: copy the folder again"
        )
    return FirstStageConfig(slots[0], str(index.content[slots[0]][1]), read_json_object(place / "config.json"))


def names_class(value: object) -> bool:
    """Whether a value of ``model_index.json`` names a library and a class."""
    return isinstance(value, list) and len(value) == 2 and all(isinstance(part, str) for part in value)
