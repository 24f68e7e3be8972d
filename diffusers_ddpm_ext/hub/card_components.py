"""Sections of a model card about the networks around the denoising one: its first stage and its text encoder."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from diffusers_ddpm_ext.hub.markdown import code_span, inline_text
from diffusers_ddpm_ext.utils.first_stage_config import FirstStageConfig
from diffusers_ddpm_ext.utils.text_encoder_config import TextEncoderConfig

LICENSE = "The license of the {network}, where it is not yours, applies to its weights here too."


def first_stage_section(stage: FirstStageConfig, latents: str, options: Mapping[Any, Any]) -> str:
    """The section about an autoencoder.

    Args:
        stage: its configuration.
        latents: size of an image's latents, for a reader.
        options: of the run, by name.
    """
    rows = [
        ("class", _class(stage.class_name, stage.slot)),
        ("pixels per latent", f"{stage.factor} x {stage.factor}"),
        ("latents of an image", latents),
        ("scale factor", f"{stage.scaling_factor:.6g}"),
    ]
    if stage.has_channel_statistics:
        rows.append(("mean and standard deviation", "of each channel, in its config.json"))
    text = "The network draws latents, which this autoencoder decodes to images."
    return _section("First stage", text, rows, _origin("vae", options), LICENSE.format(network="autoencoder"))


def text_encoder_section(encoder: TextEncoderConfig, options: Mapping[Any, Any]) -> str:
    """The section about a text encoder.

    Args:
        encoder: its configuration.
        options: of the run, by name.
    """
    rows = [
        ("class", _class(encoder.class_name, encoder.slot)),
        ("tokens of a prompt", "as many as the tokenizer says" if encoder.positions is None else encoder.positions),
        ("width of a token", encoder.width),
        ("tokenizer", "in `tokenizer/`" if encoder.has_tokenizer else "none: the model takes `input_ids`"),
    ]
    trained = "It was trained with the network. " if options.get("train_text_encoder") is True else ""
    source = _origin("text_encoder", options) + trained
    text = "It makes the tokens of cross attention from a prompt."
    return _section("Text encoder", text, rows, source, LICENSE.format(network="text encoder"))


def _class(name: str, slot: str) -> str:
    return f"{inline_text(name.rpartition('.')[2], in_table=True)}, in `{slot}/`"


def _origin(option: str, options: Mapping[Any, Any]) -> str:
    origin = options.get(option)
    return f"The run took it from {code_span(origin)} (`--{option}`). " if isinstance(origin, str) else ""


def _section(title: str, text: str, rows: list[tuple[str, Any]], source: str, license_text: str) -> str:
    table = "\n".join(f"| {name} | {value} |" for name, value in rows)
    return f"## {title}\n\n{text}\n\n| | |\n|---|---|\n{table}\n\n{source}{license_text}"
