"""Checks of `ddpm-ext doctor --open`: the networks of a folder are loaded, and its encoders run once."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from diffusers_ddpm_ext.cli.doctor_findings import Finding, Mark


def open_pipeline(folder: Path) -> Iterator[Finding]:
    """Load a pipeline; decode a latent and encode a prompt where it can. ConfigError if it cannot be loaded."""
    from diffusers_ddpm_ext.pipelines.loading import load_pipeline

    pipeline = load_pipeline(str(folder), None, "cpu", "float32")
    size = sum(weight.numel() for weight in pipeline.unet.parameters()) / 1e6
    scheduler = type(pipeline.scheduler).__name__
    yield Finding(Mark.FINE, f"its pipeline can be opened: {size:.1f} M parameters, {scheduler}")
    yield from _check_first_stage(pipeline)
    yield from _check_text_encoder(pipeline)


def open_first_stage(folder: Path) -> Iterator[Finding]:
    """Load a first stage and decode a latent; ValueError if it cannot be loaded."""
    from diffusers_ddpm_ext.models.first_stage import FirstStage
    from diffusers_ddpm_ext.models.first_stage_loading import load_first_stage

    yield from _check_stage(FirstStage(load_first_stage(folder)))


def _check_first_stage(pipeline: Any) -> Iterator[Finding]:
    """Whether a pipeline of latents has its first stage, and whether that decodes."""
    stage = pipeline.first_stage
    if stage is None:
        if pipeline.config.get("latent_scaling_factor") is not None:
            text = "its samples are latents of an autoencoder that is not in the folder"
            yield Finding(Mark.ADVICE, f"{text}: sample with --out FILE.npy, or add the autoencoder as its vae")
        return
    yield from _check_stage(stage)


def _check_stage(stage: Any) -> Iterator[Finding]:
    import torch

    size, name = (
        sum(weight.numel() for weight in stage.autoencoder.parameters()) / 1e6,
        type(stage.autoencoder).__name__,
    )
    side, scale = stage.factor, " to ".join(f"{value:g}" for value in _extremes((1 / stage.scale).flatten().tolist()))
    latents = f"latents of {stage.latent_channels} channels, {side}x{side} pixels each, scale {scale}"
    yield Finding(Mark.FINE, f"its first stage can be opened: {name}, {size:.1f} M parameters, {latents}")
    with torch.no_grad():
        decoded = stage.decode(torch.zeros(1, stage.latent_channels, 2, 2))
    if not bool(torch.isfinite(decoded).all()):
        yield Finding(Mark.WRONG, "its first stage decodes to NaN or infinity: copy its folder again")


def _check_text_encoder(pipeline: Any) -> Iterator[Finding]:
    """Whether the text encoder of a pipeline has its tokenizer, and whether it encodes the empty prompt."""
    stage = pipeline.text_encoder_stage
    if stage is None:
        if "encoder_hidden_states" in pipeline.conditioning.required and pipeline.class_embedder is None:
            text = "it takes embeddings, and no prompts: if it is a model of text"
            yield Finding(Mark.ADVICE, f"{text}, sample with --text_encoder and --tokenizer")
        return
    size, name = sum(weight.numel() for weight in stage.encoder.parameters()) / 1e6, type(stage.encoder).__name__
    tokens = f"{stage.max_length} tokens of {stage.width} values"
    yield Finding(Mark.FINE, f"its text encoder can be opened: {name}, {size:.1f} M parameters, {tokens}")
    if stage.tokenizer is None:
        text = "its text encoder has no tokenizer: sample with --tokenizer FOLDER_OR_ID or --input_ids FILE.npy"
        yield Finding(Mark.ADVICE, text)
        return
    try:
        stage.encode_prompts([""])
    except ValueError as error:
        yield Finding(Mark.WRONG, f"its text encoder fails: {' '.join(str(error).split())[:300]}")


def _extremes(values: list[float]) -> list[float]:
    return sorted({min(values), max(values)})
