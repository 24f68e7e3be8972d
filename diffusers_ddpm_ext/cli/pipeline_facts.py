"""What the JSON files of a pipeline say about its model: enough to refuse wrong options before torch is imported."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from diffusers_ddpm_ext.errors import ConfigError, printable
from diffusers_ddpm_ext.pipelines.class_names import read_class_names
from diffusers_ddpm_ext.utils.first_stage_config import (
    FIRST_STAGE_SLOTS,
    FirstStageConfig,
    names_class,
    read_first_stage_config,
)
from diffusers_ddpm_ext.utils.generations import read_one_generation
from diffusers_ddpm_ext.utils.input_files import JsonObject, json_object, read_json_object
from diffusers_ddpm_ext.utils.network_budget import check_network_config, check_network_types
from diffusers_ddpm_ext.utils.pixel_format import PixelFormat
from diffusers_ddpm_ext.utils.text_encoder_config import (
    TEXT_ENCODER_SLOTS,
    TOKENIZER_SLOT,
    TextEncoderConfig,
    read_text_encoder_config,
)
from diffusers_ddpm_ext.utils.vocabulary import CONCAT_THROUGH_VAE, CONDITIONING_KEYS

LEARNED_VARIANCES = ("learned", "learned_range")
MAX_SIZE = 2**20
COMPONENTS = (
    *("unet", "scheduler", *FIRST_STAGE_SLOTS, *TEXT_ENCODER_SLOTS, TOKENIZER_SLOT),
    *("concat_encoder", "image_encoder", "feature_extractor"),
)
"""What a pipeline of ours may consist of."""
SAFETY_CHECKER = "safety_checker"
"""A component of Stable Diffusion, which is left out."""
DEFAULT_CHANNELS, DEFAULT_TIMESTEPS = 3, 1000
"""Of UNet2DModel and DDPMScheduler, where their config leaves the key out."""


@dataclass(frozen=True)
class PipelineFacts:
    """The configurations of a pipeline with a network, a scheduler and perhaps a first stage.

    Attributes:
        source: the folder or Hub id, for messages.
        index: of the pipeline, ``model_index.json``.
        unet: of the network.
        scheduler: of the scheduler.
        has_class_embedder: whether classes become tokens of cross attention.
        first_stage: of the autoencoder that decodes the samples; None for a model of pixels, or of latents alone.
        text_encoder: of the network that makes tokens of prompts; None for a model without one.
        concat_encoder: of the one that makes concatenated inputs of pictures; None for a model without one.
    """

    source: str
    index: JsonObject
    unet: JsonObject
    scheduler: JsonObject
    has_class_embedder: bool
    first_stage: FirstStageConfig | None = None
    text_encoder: TextEncoderConfig | None = None
    concat_encoder: JsonObject | None = None

    @cached_property
    def conditioning_key(self) -> str | None:
        """How conditions reach the network; None for an unconditional model, or where class labels speak for it."""
        key = _present(self.index, "conditioning_key")
        if key is None and (_present(self.index, "unet") or [""])[-1] == "UNet2DConditionModel":
            has_classes = any(
                _present(self.unet, name) is not None for name in ("num_class_embeds", "class_embed_type")
            )
            return "crossattn-adm" if has_classes else "crossattn"
        if key is not None and key not in CONDITIONING_KEYS:
            raise ConfigError(
                f"{self.index.name}: conditioning_key is {key!r}; it must be one of {', '.join(CONDITIONING_KEYS)}"
            )
        return key

    @property
    def has_safety_checker(self) -> bool:
        """Whether the folder has Stable Diffusion's safety checker, which the pipeline leaves out."""
        return names_class(self.index.content.get(SAFETY_CHECKER))

    @property
    def takes_concat_inputs(self) -> bool:
        """Whether images are concatenated to the network's input."""
        return (self.conditioning_key or "").startswith(("concat", "hybrid"))

    @property
    def takes_hidden_states(self) -> bool:
        """Whether the network has cross attention, to embeddings or to classes."""
        return (self.conditioning_key or "").startswith(("crossattn", "hybrid"))

    @property
    def takes_image(self) -> bool:
        """Whether a network of the pipeline makes conditions of pictures."""
        return names_class(self.index.content.get("image_encoder"))

    @property
    def image_is_label(self) -> bool:
        """Whether such a condition takes the place of a class label, and not of tokens of cross attention."""
        return self.takes_image and (self.conditioning_key or "").endswith("adm")

    @property
    def takes_labels(self) -> bool:
        """Whether class labels are an argument."""
        key = self.conditioning_key or ""
        return key.endswith("adm") or self.has_class_embedder or self.num_classes is not None

    @cached_property
    def num_classes(self) -> int | None:
        """Classes of the network's own embedding, the null class included; None where it has none."""
        return _optional_integer(self.unet, "num_class_embeds")

    @cached_property
    def class_names(self) -> dict[int, str]:
        """Names by class number; empty without names."""
        return read_class_names(self.index.content.get("id2label"), f"{self.index.name}: id2label")

    @property
    def lacks_first_stage(self) -> bool:
        """Whether the samples are latents of an autoencoder that is not part of the pipeline."""
        return self.first_stage is None and _present(self.index, "latent_scaling_factor") is not None

    @cached_property
    def concat_through_vae(self) -> str | None:
        """How pictures that are conditions become latents: "mode", "sample", or None where they stay pictures."""
        way = _present(self.index, "concat_through_vae")
        if way is not None and way not in CONCAT_THROUGH_VAE:
            raise ConfigError(
                f"{self.index.name}: concat_through_vae is {printable(repr(way), 60)}; it must be one of "
                f"{', '.join(CONCAT_THROUGH_VAE)}, or left out"
            )
        return way

    @cached_property
    def picture_channels(self) -> int:
        """Channels of a decoded picture; of a sample where there is no first stage."""
        return self.channels if self.first_stage is None else self.first_stage.pixel_channels

    @cached_property
    def pixel_format(self) -> PixelFormat:
        """Dtype and range of the training data; that of 8-bit images where nothing else is recorded."""
        content = _present(self.index, "pixel_format")
        try:
            pixels = PixelFormat() if content is None else PixelFormat.from_dict(content)
            if not self.lacks_first_stage:
                pixels.check_channels(self.picture_channels)
        except ValueError as error:
            raise ConfigError(f"{self.index.name}: {error}") from None
        return pixels

    @cached_property
    def picture_size(self) -> tuple[int, int] | None:
        """Height and width of a decoded picture, or of a sample without a first stage; None where they are open."""
        size, factor = self.image_size, 1 if self.first_stage is None else self.first_stage.factor
        return None if size is None else (size[0] * factor, size[1] * factor)

    @cached_property
    def channels(self) -> int:
        """Channels of a sample."""
        inputs = self.unet.integer("in_channels", 1, MAX_SIZE, DEFAULT_CHANNELS)
        if not (self.takes_concat_inputs or _present(self.index, "use_positional_encodings")):
            return inputs
        outputs = self.unet.integer("out_channels", 1, MAX_SIZE, DEFAULT_CHANNELS)
        return outputs // 2 if _present(self.scheduler, "variance_type") in LEARNED_VARIANCES else outputs

    @cached_property
    def concat_channels(self) -> int:
        """Channels of the concatenated inputs."""
        coordinates = 2 if _present(self.index, "use_positional_encodings") else 0
        return self.unet.integer("in_channels", 1, MAX_SIZE, DEFAULT_CHANNELS) - self.channels - coordinates

    @cached_property
    def image_size(self) -> tuple[int, int] | None:
        """Height and width of a sample; None where the config leaves them open."""
        size = _present(self.unet, "sample_size")
        if size is None:
            return None
        sides = size if isinstance(size, (list, tuple)) else [size, size]
        if len(sides) != 2 or not all(type(side) is int and 1 <= side <= MAX_SIZE for side in sides):
            raise ConfigError(f"{self.unet.name}: sample_size is {size}; it must be one or two integers, 1 or more")
        return sides[0], sides[1]

    @cached_property
    def num_train_timesteps(self) -> int:
        """Steps of the training chain."""
        return self.scheduler.integer("num_train_timesteps", 1, default=DEFAULT_TIMESTEPS)

    @property
    def has_own_variances(self) -> bool:
        """Whether the reverse variances were fitted to the model, or are predicted by it."""
        fitted = isinstance(_present(self.scheduler, "v_decoder"), list)
        return fitted or _present(self.scheduler, "variance_type") in LEARNED_VARIANCES

    @cached_property
    def token_width(self) -> int | None:
        """Width of the embeddings of cross attention; None where the config has no single one."""
        width = _present(self.unet, "cross_attention_dim")
        return width if type(width) is int else None

    @cached_property
    def first_width(self) -> int:
        """Channels of the network's first layer."""
        widths = _present(self.unet, "block_out_channels")
        first = widths[0] if isinstance(widths, (list, tuple)) and widths else 1
        return first if type(first) is int and first > 0 else 1


def read_pipeline_facts(source: str, variant: str | None = None, variant_option: str = "") -> PipelineFacts | None:
    """Read the JSON files of a pipeline's folder; None for a Hub id.

    Args:
        source: the folder or Hub id, checked by `check_pipeline_source`.
        variant: of the weights; its files must exist.
        variant_option: the option that requested it, for a message.

    Raises:
        ConfigError: a file is missing or damaged, or the pipeline has no network ``unet`` and ``scheduler``.
    """
    if not Path(source).is_dir():
        return None
    return read_one_generation(source, lambda folder: _read_facts(source, folder, variant, variant_option))


def _read_facts(source: str, folder: Path, variant: str | None, variant_option: str) -> PipelineFacts:
    index = read_json_object(folder / "model_index.json")
    for part in ("unet", "scheduler"):
        if not isinstance(index.content.get(part), list):
            raise ConfigError(
                f"{index.name} names no {part}: this is no pipeline of a network and a scheduler, such as DDPMPipeline"
            )
    components = [name for name, value in index.content.items() if names_class(value)]
    others = [name for name in components if name not in (*COMPONENTS, SAFETY_CHECKER)]
    if others:
        raise ConfigError(
            f"{index.name} has a component {printable(others[0], 60)!r}, and ddpm-ext runs pipelines of a network, a "
            "scheduler, a first stage and encoders of conditions alone; use the pipeline's own class in Diffusers"
        )
    first_stage = read_first_stage_config(folder, index)
    if first_stage is not None:
        _check_weights(folder / first_stage.slot, None, "")
    facts = PipelineFacts(
        source,
        index,
        read_json_object(folder / "unet" / "config.json"),
        read_json_object(folder / "scheduler" / "scheduler_config.json", allow_infinity=True),
        (folder / "class_embedder" / "config.json").is_file(),
        first_stage,
        read_text_encoder_config(folder, index),
        read_json_object(folder / "concat_encoder" / "config.json") if "concat_encoder" in components else None,
    )
    check_network_types(facts.unet.content, facts.unet.name)
    check_network_config(facts.unet.content, facts.unet.name)
    _check_weights(folder / "unet", variant, variant_option)
    return facts


def facts_of_pipeline(source: str, pipeline: Any) -> PipelineFacts:
    """The facts of a loaded pipeline, for one that came from the Hub."""

    def named(part: str, config: Mapping[str, Any]) -> JsonObject:
        as_saved = json.loads(json.dumps(dict(config), default=str))  # tuples as lists
        return json_object(as_saved, f"{part} of {source}")

    first_stage, rescaler = None, pipeline.concat_encoder
    if pipeline.first_stage is not None:
        first_stage = FirstStageConfig(
            "vae", type(pipeline.vae).__name__, named("vae/config.json", pipeline.vae.config)
        )
    return PipelineFacts(
        source,
        named("model_index.json", pipeline.config),
        named("unet/config.json", pipeline.unet.config),
        named("scheduler_config.json", pipeline.trained_scheduler.config),
        pipeline.class_embedder is not None,
        first_stage,
        _text_encoder_of(source, pipeline),
        None if rescaler is None else named("concat_encoder/config.json", rescaler.config),
    )


def _text_encoder_of(source: str, pipeline: Any) -> TextEncoderConfig | None:
    stage = pipeline.text_encoder_stage
    if stage is None:
        return None
    config = json_object(json.loads(stage.encoder.config.to_json_string(use_diff=False)), f"text_encoder of {source}")
    return TextEncoderConfig("text_encoder", type(stage.encoder).__name__, config, stage.tokenizer is not None)


def _check_weights(folder: Path, variant: str | None, variant_option: str) -> None:
    """Refuse a network without weights of the variant."""
    try:
        names = [name for name in os.listdir(folder) if name.startswith("diffusion_pytorch_model")]
    except OSError as error:
        raise ConfigError(f"{folder} cannot be read: {error.strerror}") from None
    if variant is not None and not any(f".{variant}." in name or f".{variant}-" in name for name in names):
        raise ConfigError(f"{variant_option}: {folder} has no such weights: leave it out for the default ones")
    if not names:
        raise ConfigError(f"{folder} has no weights (diffusion_pytorch_model.safetensors): copy the folder again")


def _present(config: JsonObject, key: str) -> Any:
    """A value, None where the key is missing or null."""
    return config.content.get(key)


def _optional_integer(config: JsonObject, key: str) -> int | None:
    return None if _present(config, key) is None else config.integer(key, 1)
