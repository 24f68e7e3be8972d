"""Options of ``ddpm-ext train`` that reproduce a translated configuration, and the YAML file with them."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from diffusers_ddpm_ext.compvis.architecture import translate_unet
from diffusers_ddpm_ext.compvis.config.ddpm import CompVisConfig
from diffusers_ddpm_ext.compvis.config.text_stage import read_text_stage
from diffusers_ddpm_ext.compvis.schema import COMPVIS_EMA_DECAY, one_line
from diffusers_ddpm_ext.utils.files import write_text_atomically
from diffusers_ddpm_ext.utils.vocabulary import LATENTS_KEY, REQUIRED_CONDITIONS

# Where the published classes differ from our defaults: PyTorch's AdamW, and no gradient clipping in Lightning.
OPTIMIZER_DEFAULTS = {"adam_beta1": 0.9, "adam_beta2": 0.999, "adam_weight_decay": 0.01}
NO_CLIPPING = 1e12
MAX_LEVELS = 10
LATENT_NOTE = (
    "The samples are latents: name their first stage with --vae, a folder that `ddpm-ext convert --from compvis` makes"
    " of its checkpoint, or of that of the whole model."
)
TEXT_NOTE = "It is conditioned on captions: name them and their text encoder with {flags}."
SIZE_NOTE = "The first stage names no ch_mult: give the images' size in pixels with --resolution."
RECIPE_SECTIONS: dict[str, tuple[str, ...]] = {
    "data": ("resolution", "channels", "dataloader_num_workers", "conditioning_dropout"),
    "latents": ("scale_factor", "scale_by_std", "concat_through_vae"),
    "text": ("text_encoder_config", "tokenizer", "train_text_encoder"),
    "model": ("model_config", "conditioning_key", "num_class_embeds", "use_positional_encodings"),
    "start": ("ckpt_path", "ignore_keys", "load_only_unet", "make_it_fit", "reset_ema", "reset_num_ema_updates"),
    "schedule": ("num_train_timesteps", "beta_schedule", "beta_start", "beta_end", "cosine_s", "trained_betas",
                 "v_posterior", "prediction_type", "clip_sample"),
    "objective": ("loss_type", "l_simple_weight", "original_elbo_weight", "elbo_weights", "learn_logvar",
                  "logvar_init"),
    "optim": ("learning_rate", "lr_scaling", "lr_scheduler", "lr_warmup_steps", "lr_scheduler_args",
              *OPTIMIZER_DEFAULTS, "max_grad_norm"),
    "ema": ("use_ema", "ema_decay"),
    "loop": ("train_batch_size", "gradient_accumulation_steps", "num_epochs", "max_train_steps", "mixed_precision"),
    "checkpoint": ("checkpointing_steps",),
    "monitoring": ("monitor", "save_top_k"),
    "output": ("save_images_steps", "num_preview_images"),
}  # fmt: skip


def recipe(config: CompVisConfig) -> dict[str, dict[str, Any]]:
    """Express a configuration in our trainer's options, by section.

    Raises:
        ValueError: no Diffusers network can express the configuration's.
    """
    network = translate_unet(config.unet_params, conditioning_key=config.conditioning_key)
    latents = {LATENTS_KEY: True} if config.samples.latent else {}
    options: dict[str, Any] = {
        "resolution": image_size(config),
        "channels": None if latents else config.samples.channels,
        "model_config": {"_class_name": network.class_name} | network.config | latents,
        "conditioning_key": config.conditioning_key,
        "lr_scheduler": "constant",
        "lr_warmup_steps": 0,
        "max_grad_norm": NO_CLIPPING,
        "ema_decay": COMPVIS_EMA_DECAY if config.use_ema else None,
        **OPTIMIZER_DEFAULTS,
        **config.schedule,
        **config.objective,
        **config.training,
        **_latent_options(config),
        **_text_options(config),
    }
    monitor = options.get("monitor")
    if monitor and not config.use_ema:
        options["monitor"] = monitor.removesuffix("_ema")  # a run without EMA does not log that metric
    options["make_it_fit"] = "compvis" if options.get("make_it_fit") else None
    dropped = _redundant(options, config.use_ema)
    sections = {
        section: {k: options[k] for k in names if k not in dropped and options.get(k) is not None}
        for section, names in RECIPE_SECTIONS.items()
    }
    return {section: chosen for section, chosen in sections.items() if chosen}


def image_size(config: CompVisConfig) -> int | list[int] | None:
    """Size of the images in pixels: that of the latents times the first stage's factor; None where that is unknown."""
    size, factor = config.samples.image_size, 1
    if config.samples.latent:
        levels = _channel_multipliers(config.first_stage)
        if levels is None:
            return None
        factor = 2 ** (len(levels) - 1)
    return factor * size if isinstance(size, int) else [factor * side for side in size]


def _channel_multipliers(first_stage: Mapping[str, Any] | None) -> list[Any] | None:
    """``ch_mult`` of the first stage, one per level, each but the last of which halves the image."""
    section: Any = first_stage
    for name in ("params", "ddconfig", "ch_mult"):
        section = section.get(name) if isinstance(section, Mapping) else None
    return section if isinstance(section, list) and 0 < len(section) <= MAX_LEVELS else None


def _latent_options(config: CompVisConfig) -> dict[str, Any]:
    """Scale and conditions of the latents; nothing for a model of images."""
    if not config.samples.latent:
        return {}
    measured = config.samples.scale_by_std
    return {
        "scale_factor": None if measured else config.samples.scale_factor,
        "scale_by_std": measured or None,
        "concat_through_vae": config.concat_through_vae,
    }


def _text_options(config: CompVisConfig) -> dict[str, Any]:
    """A text encoder that the original trains from random weights; nothing for others, which `train` is told of."""
    stage = read_text_stage(config.section("cond_stage_config"))
    if stage is None or stage.new is None or not config.training.get("train_text_encoder"):
        return {}
    return {"text_encoder_config": stage.new, "tokenizer": stage.tokenizer}


def text_flags(config: CompVisConfig) -> str:
    """What the command line of `train` must name for the captions of a configuration; empty if it has no prompts."""
    stage = read_text_stage(config.section("cond_stage_config"))
    if stage is None or "encoder_hidden_states" not in REQUIRED_CONDITIONS[config.conditioning_key]:
        return ""
    if _text_options(config):
        return "--caption_column COLUMN"
    return f"--text_encoder {stage.source or 'FOLDER'} --caption_column COLUMN"


def recipe_notes(config: CompVisConfig) -> list[str]:
    """What else a run of the recipe needs, or does otherwise than the original; sentences."""
    flags = text_flags(config)
    notes = [TEXT_NOTE.format(flags=flags)] if flags else []
    if not config.samples.latent:
        return notes
    notes.append(LATENT_NOTE)
    if image_size(config) is None:
        notes.append(SIZE_NOTE)
    return notes


def _redundant(options: Mapping[str, Any], use_ema: bool) -> set[str]:
    """Names of options that others replace, or that the trainer would refuse as having no effect."""
    names: set[str] = set()
    if "trained_betas" in options:
        names |= {"beta_schedule", "beta_start", "beta_end", "num_train_timesteps"}
    if "max_train_steps" in options:
        names.add("num_epochs")
    if not use_ema:
        names |= {"reset_ema", "reset_num_ema_updates"}
    if not options.get("ignore_keys"):
        names.add("ignore_keys")
    if not options.get("ckpt_path"):
        names |= set(RECIPE_SECTIONS["start"])
    return names


def write_recipe(config: CompVisConfig, path: str | os.PathLike[str], source: str) -> None:
    """Write the YAML file atomically; its first line names the original configuration, ``source``.

    Raises:
        ValueError: see `recipe`.
        OSError: it cannot be written.
    """
    import yaml

    where = "Name the images with --train_data_dir."
    lines = [f"# From {one_line(source, 200)}: {config.target}, by `ddpm-ext convert-config`. {where}"]
    lines += [f"# {note}" for note in recipe_notes(config)]
    untranslated = [row for row in config.rows if row.fate != "translated"]
    lines += [f"# {row.fate}: {one_line(row.key, 200)}: {one_line(row.value)}  ({row.note})" for row in untranslated]
    options = yaml.safe_dump(_plain(recipe(config)), sort_keys=False, default_flow_style=None, width=110)
    write_text_atomically(path, "\n".join(lines) + "\n" + options, make_parents=False)


def _plain(value: Any) -> Any:
    """Mappings and sequences as dicts and lists, for YAML."""
    if isinstance(value, Mapping):
        return {str(key): _plain(inner) for key, inner in value.items()}
    return [_plain(inner) for inner in value] if isinstance(value, list | tuple) else value
