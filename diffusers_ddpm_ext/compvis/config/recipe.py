"""From a translated configuration to a file that ``ddpm-ext train --config`` takes."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from diffusers_ddpm_ext.compvis.architecture import translate_unet
from diffusers_ddpm_ext.compvis.config.ddpm import CompVisConfig
from diffusers_ddpm_ext.compvis.schema import short
from diffusers_ddpm_ext.utils.files import write_text_atomically

# What the published classes do and our defaults do not: AdamW's own defaults, and no clipping by Lightning's default.
OPTIMIZER = {"adam_beta1": 0.9, "adam_beta2": 0.999, "adam_weight_decay": 0.01}
NO_CLIPPING = 1e12
LATENTS = "The original trains on latents of its first stage; this run trains on the images that it is given."
SECTIONS = {
    "data": ("resolution", "channels", "dataloader_num_workers", "conditioning_dropout"),
    "model": ("model_config", "conditioning_key", "use_positional_encodings"),
    "start": (
        "ckpt_path",
        "ignore_keys",
        "load_only_unet",
        "make_it_fit",
        "reset_ema",
        "reset_num_ema_updates",
    ),
    "schedule": (
        "num_train_timesteps",
        "beta_schedule",
        "beta_start",
        "beta_end",
        "cosine_s",
        "trained_betas",
        "v_posterior",
        "prediction_type",
        "clip_sample",
    ),
    "objective": (
        "loss_type",
        "l_simple_weight",
        "original_elbo_weight",
        "elbo_weights",
        "learn_logvar",
        "logvar_init",
    ),
    "optim": (
        "learning_rate",
        "lr_scaling",
        "lr_scheduler",
        "lr_warmup_steps",
        "lr_scheduler_args",
        *OPTIMIZER,
        "max_grad_norm",
    ),
    "ema": ("use_ema", "ema_decay"),
    "loop": (
        "train_batch_size",
        "gradient_accumulation_steps",
        "num_epochs",
        "max_train_steps",
        "mixed_precision",
    ),
    "checkpoint": ("checkpointing_steps",),
    "monitoring": ("monitor", "save_top_k"),
    "output": ("save_images_steps", "num_preview_images"),
}


def recipe(config: CompVisConfig) -> dict[str, dict[str, Any]]:
    """Write a configuration in our trainer's options.

    Args:
        config: translated.

    Returns:
        Options by section.

    Raises:
        ValueError: no Diffusers network can express the configuration's.
    """
    network = translate_unet(config.unet_params, conditioning_key=config.conditioning_key)
    size = config.image_size
    flat: dict[str, Any] = {
        "resolution": size if isinstance(size, int) else list(size),
        "model_config": {"_class_name": network.kind} | network.config,
        "lr_scheduler": "constant",
        "lr_warmup_steps": 0,
        "max_grad_norm": NO_CLIPPING,
        **OPTIMIZER,
        **config.schedule,
        **config.objective,
        **config.training,
    }
    monitor = flat.get("monitor")
    if monitor and monitor.endswith("_ema") and not config.use_ema:
        flat["monitor"] = monitor.removesuffix("_ema")  # which a run without an average does not log
    if flat.pop("make_it_fit", False):
        flat["make_it_fit"] = "compvis"
    if config.channels in (1, 3, 4):
        flat["channels"] = config.channels
    if config.use_ema:
        flat["ema_decay"] = 0.9999
    if config.conditioning_key is not None:
        flat["conditioning_key"] = config.conditioning_key
    if "trained_betas" in flat:
        for name in ("beta_schedule", "beta_start", "beta_end", "num_train_timesteps"):
            flat.pop(name, None)
    if "num_epochs" in flat and "max_train_steps" in flat:
        flat.pop("num_epochs")
    if not config.use_ema:
        for name in ("reset_ema", "reset_num_ema_updates"):
            flat.pop(name, None)
    if not flat.get("ignore_keys"):
        flat.pop("ignore_keys", None)  # an empty list is no option
    if not flat.get("ckpt_path"):
        for name in SECTIONS["start"]:
            flat.pop(name, None)
    chosen = {section: {name: flat[name] for name in names if name in flat} for section, names in SECTIONS.items()}
    return {
        section: {k: v for k, v in options.items() if v is not None} for section, options in chosen.items() if options
    }


def write_recipe(config: CompVisConfig, path: str | os.PathLike[str], source: str) -> None:
    """Write the file, whole or not at all.

    Args:
        config: translated.
        path: of the file.
        source: name of the configuration it came from, for the first line.

    Raises:
        ValueError: see `recipe`.
        OSError: it cannot be written.
    """
    import yaml

    where = "Name the images with --train_data_dir."
    lines = [f"# From {short(source, 200)}: {config.target}, by `ddpm-ext convert-config`. {where}"]
    if config.latent:
        lines.append(f"# {LATENTS}")
    beside = [row for row in config.rows if row.fate != "translated"]
    lines += [f"# {row.fate}: {short(row.key, 200)}: {short(row.value)}  ({row.note})" for row in beside]
    content = recipe(config)
    text = (
        "\n".join(lines) + "\n" + yaml.safe_dump(_plain(content), sort_keys=False, default_flow_style=None, width=110)
    )
    write_text_atomically(path, text, make_parents=False)


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(inner) for key, inner in value.items()}
    return [_plain(inner) for inner in value] if isinstance(value, list | tuple) else value
