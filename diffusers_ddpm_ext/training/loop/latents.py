"""First stage of a run: the scale of its latents, and its part of the printed plan."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from diffusers_ddpm_ext.errors import as_config_error, printable, warn
from diffusers_ddpm_ext.models.first_stage import FirstStage, load_first_stage
from diffusers_ddpm_ext.training.config.latent_options import has_first_stage
from diffusers_ddpm_ext.training.data.latent_cache import cache_latents
from diffusers_ddpm_ext.training.data.latent_scale import (
    IMAGES_FOR_SCALE,
    IMAGES_FOR_WARNING,
    is_measured,
    measure_latents,
    restored_stage,
    scale_settings,
    scale_warning,
    scaled_stage,
)
from diffusers_ddpm_ext.training.data.posterior_files import StoredPosteriors
from diffusers_ddpm_ext.training.loop.setup import Setup
from diffusers_ddpm_ext.training.tracking.plan import format_bytes

SAME_LATENTS = 0.1
"""Relative difference up to which two first stages make the same latents, whose scales may be measured ones."""


def settle_scale(setup: Setup, saved: Mapping[str, Any] | None) -> None:
    """Give the run's first stage its scale: that of the checkpoint, or a new one. Collective call.

    Args:
        setup: of the run; without a first stage nothing is done.
        saved: the scale in the checkpoint that the run resumes from; None at its start.

    Raises:
        ConfigError: the images have latents that no scale fits.
    """
    encoder, options = setup.latents, setup.config.latents
    if encoder is None:
        return
    if saved is not None:
        with as_config_error("--resume_from_checkpoint"):
            encoder.stage = restored_stage(encoder.stage, saved)
        return
    limit = IMAGES_FOR_SCALE if is_measured(options) else IMAGES_FOR_WARNING
    with as_config_error("--vae"):
        statistics = measure_latents(setup.data.train, encoder, setup.accelerator, limit)
    encoder.stage = scaled_stage(encoder.stage, options, statistics)
    encoder.measured_std = statistics.scaled_std(encoder.stage)
    if setup.accelerator.is_main_process:
        for warning in (scale_warning(encoder.measured_std), _initial_weights_warning(setup)):
            if warning is not None:
                warn(warning)


def _initial_weights_warning(setup: Setup) -> str | None:
    """Warn of initial weights that were trained on other latents of the same images than the run's."""
    encoder, path = setup.latents, setup.config.start.ckpt_path
    if encoder is None or path is None or not has_first_stage(Path(path)):
        return None
    with as_config_error("--ckpt_path"):
        stage = FirstStage(load_first_stage(path))
        stage.autoencoder.to(encoder.device)
    pixels = setup.data.train.pixels([0]).to(encoder.device)
    if stage.pixel_channels == encoder.stage.pixel_channels and pixels.shape[-1] % stage.factor == 0:
        own, theirs = encoder.stage.encode(pixels, mode=True), stage.encode(pixels, mode=True)
        if own.shape == theirs.shape and float((own - theirs).norm()) <= SAME_LATENTS * float(own.norm()):
            return None
    return (
        f"--ckpt_path {printable(path, 200)} was trained on latents of another first stage or scale, so that little of"
        " what it has learned fits: leave --vae and --scale_factor out to use its own"
    )


def open_latent_cache(setup: Setup) -> Setup:
    """The run with the cache of its latents, which is completed first; the same run without one. Collective call."""
    options, encoder = setup.config.latents, setup.latents
    if options.cache_latents is None or encoder is None:
        return setup
    data = cache_latents(options.cache_latents, options.cache_latents_dtype, setup.data, encoder, setup.accelerator)
    return replace(setup, data=data)


def describe_first_stage(setup: Setup) -> list[tuple[str, str]]:
    """Rows of the printed plan on the first stage; none for a run on pixels."""
    encoder, options = setup.latents, setup.config.latents
    if encoder is None:
        return []
    stage = encoder.stage
    weights = list(stage.autoencoder.parameters())
    count, size = sum(w.numel() for w in weights), sum(w.numel() * w.element_size() for w in weights)
    channels, height, width = encoder.shape(*setup.data.size)
    source = printable(str(options.vae), 200) + (f"/{options.vae_subfolder}" if options.vae_subfolder else "")
    name = type(stage.autoencoder).__name__
    draws = "sampled" if stage.is_stochastic and not options.latent_mode else "mode" if stage.is_stochastic else ""
    latents = [f"{channels} x {height} x {width}, 1/{stage.factor} of the images", draws, _describe_scale(setup)]
    rows = [
        ("first stage", f"{name} of {source}, {count:,} parameters ({format_bytes(size)}), frozen"),
        ("latents", ", ".join(part for part in latents if part)),
    ]
    if options.cache_latents is not None:
        store = setup.data.train.posteriors
        size_text = f", {format_bytes(store.nbytes)}" if isinstance(store, StoredPosteriors) else ""
        rows.append(("latent cache", printable(options.cache_latents, 200) + size_text))
    return rows


def _describe_scale(setup: Setup) -> str:
    """The scale of the latents, where it is from, and the standard deviation that it makes."""
    assert setup.latents is not None
    options, settings = setup.config.latents, scale_settings(setup.latents.stage)
    origin = "measured" if options.scale_factor == "data" else "the autoencoder's"
    if not isinstance(options.scale_factor, str) or options.latent_stats:
        origin = ""
    text = f"scaling factor {settings['scaling_factor']:.5g}" + (f" ({origin})" if origin else "")
    if settings.get("latents_std") is not None:
        text += ", each channel by its mean and standard deviation"
    std = setup.latents.measured_std
    return text + (", as in the checkpoint" if std is None else f", standard deviation {std:.3g}")
