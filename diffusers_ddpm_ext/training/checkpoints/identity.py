"""Options that identify a run, and their comparison with a checkpoint's. Importing this loads no torch.

A checkpoint stores every option that determines the weights. A run that resumes must have the same ones, unless
`--allow_config_change` is given.
"""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from diffusers_ddpm_ext.errors import ConfigError, printable
from diffusers_ddpm_ext.training.checkpoints.folders import list_checkpoints
from diffusers_ddpm_ext.training.checkpoints.manifest import Checkpoint, read_manifest
from diffusers_ddpm_ext.training.checkpoints.state_file import read_state
from diffusers_ddpm_ext.training.config.options import OPTIONS
from diffusers_ddpm_ext.training.config.train_config import TrainConfig
from diffusers_ddpm_ext.utils.files import CONFIG

# Sections and options that determine the weights. The others determine when something is written, drawn or read.
MODEL_SECTIONS = ("autoencoder", "model", "start", "schedule", "objective", "optim", "ema")
MODEL_OPTIONS = (
    "resolution", "resize", "resize_filter", "center_crop", "random_crop", "random_crop_scale", "random_flip",
    "vertical_flip", "rotate90", "background", "channels", "data_range", "array_key", "array_layout",
    "mixed_precision", "seed",
    "class_column", "concat_column", "context_column", "caption_column", "conditioning_dropout",
    "dataset_weights", "class_balance",
)  # fmt: skip
SAME_RESULTS = ("offload_ema",)
"""Options of these sections that only determine where something is computed or kept."""
STREAM_OPTIONS = ("streaming", "shuffle_buffer")
"""Options that a stream's order follows from; a run that is not a stream has none of them in its checkpoints."""
FIRST_STAGE, TEXT_ENCODER = "vae", "text_encoder"
HASHED = {FIRST_STAGE: "first stage", TEXT_ENCODER: "text encoder, or has another tokenizer"}
"""What may be anywhere, and is known by its content."""
SCALE_IDENTITY = (FIRST_STAGE, "scale_factor", "latent_stats")
"""What the scale of latents follows from, besides the images."""
LATENT_OPTIONS = ("scale_factor", "latent_stats", "latent_mode", "concat_through_vae")
SCHEDULES_WITHOUT_END = (
    "constant",
    "constant_with_warmup",
    "piecewise_constant",
    "LambdaWarmUpCosineScheduler",
    "LambdaWarmUpCosineScheduler2",
    "LambdaLinearScheduler",
)
STEPS = "max_train_steps"
FIRST_STAGE_TYPE = "first_stage_type"
"""An option that every run of train-vae has, and no other."""


def run_identity(
    config: TrainConfig,
    effective_batch: int,
    steps: int | None,
    first_stage: str | None,
    text_encoder: str | None = None,
) -> dict[str, Any]:
    """Every option that determines a run's results, as JSON: stored in a checkpoint, and compared with it.

    Args:
        config: of the run.
        effective_batch: samples per optimizer step, over all processes.
        steps: length of the run; None if it depends on the images, which were not read yet.
        first_stage: hash of the first stage, which may be anywhere; None for a run on pixels.
        text_encoder: hash of the text encoder with its tokenizer; None for a run without captions.
    """
    sections = [section for section in MODEL_SECTIONS if section in config.table.sections]
    chosen = {name: value for section in sections for name, value in vars(getattr(config, section)).items()}
    chosen = {name: value for name, value in chosen.items() if name not in SAME_RESULTS}
    chosen |= {name: value for name, value in config.to_flat_dict().items() if name in MODEL_OPTIONS}
    if config.data.streaming:
        chosen |= {name: getattr(config.data, name) for name in STREAM_OPTIONS}
    chosen["effective_batch"] = effective_batch
    if first_stage is not None:
        latents = config.latents
        chosen |= {name: getattr(latents, name) for name in LATENT_OPTIONS} | {FIRST_STAGE: first_stage}
        # Latents cached in float32 are those that are encoded each time.
        chosen["cache_latents_dtype"] = "float32" if latents.cache_latents is None else latents.cache_latents_dtype
    if text_encoder is not None:
        chosen |= {TEXT_ENCODER: text_encoder, "train_text_encoder": config.text.train_text_encoder}
    if config.optim.lr_scheduler not in SCHEDULES_WITHOUT_END:
        chosen[STEPS] = steps
    plain: dict[str, Any] = json.loads(json.dumps(chosen))
    return plain


def changed_options(own: Mapping[str, Any], saved: Mapping[str, Any], ignored: Collection[str] = ()) -> list[str]:
    """One phrase per option that differs between this run and a checkpoint."""
    if (FIRST_STAGE_TYPE in own) != (FIRST_STAGE_TYPE in saved):
        return [f"it is a run of ddpm-ext {'train-vae' if FIRST_STAGE_TYPE in saved else 'train'}"]
    if STEPS not in own or STEPS not in saved:  # only one of the two learning rates depends on the length of the run
        ignored = {STEPS, *ignored}
    names = [*own, *(name for name in saved if name not in own)]
    # A checkpoint of an older version lacks an option that is new; its run used the default.
    was = {name: saved[name] if name in saved else _default(name) for name in names if name not in ignored}
    return [
        _changed(name, own.get(name), was[name]) for name in was if _expanded(own.get(name)) != _expanded(was[name])
    ]


def _changed(name: str, value: Any, was: Any) -> str:
    """What has changed, in a phrase; of a first stage or text encoder the hash."""
    if name in HASHED and isinstance(value, str) and isinstance(was, str):
        return f"--{name} is another {HASHED[name]} (sha256 {value[:12]}, was {_shown(was)[:12]})"
    return f"--{printable(name, 60)} is {_shown(value)} and was {_shown(was)}"


def _expanded(value: Any) -> Any:
    """A value to compare: a path with its home folder in full, as older versions stored ``~``; true is not 1."""
    if isinstance(value, bool):
        return bool, value
    return os.path.expanduser(value) if isinstance(value, str) and value.startswith("~") else value


def _shown(value: Any) -> str:
    return printable(str(value), 200)


def _default(name: str) -> Any:
    value = OPTIONS[name].default if name in OPTIONS else None
    return list(value) if isinstance(value, tuple) else value


def refuse_changes(changed: list[str], folder: Path) -> None:
    """Refuse to resume with other options or images; a ConfigError with the phrases of `changed_options`."""
    if changed:
        raise ConfigError(
            f"--resume_from_checkpoint: {'; '.join(changed)}. Repeat the run's options (--config {folder / CONFIG}),"
            " or add --allow_config_change"
        )


def check_resume(config: TrainConfig) -> None:
    """Refuse to resume what the files alone show to be impossible, before anything else is imported or read.

    Only manifest and ``state.json`` are read; what is wrong with other files is found when the run resumes.

    Raises:
        ConfigError: there is no checkpoint, or it belongs to a run with other options.
    """
    requested, folder = config.checkpoint.resume_from_checkpoint, Path(config.output.output_dir or ".")
    if requested is None:
        return
    if requested in ("latest", "auto"):
        checkpoint = _newest_readable(folder)
        if checkpoint is None and requested == "latest" and not list_checkpoints(folder):
            raise ConfigError(
                f"--resume_from_checkpoint latest: {printable(str(folder))} holds no checkpoint; use auto to start a"
                " new run then"
            )
    else:
        checkpoint = None if requested == "best" else _readable(Path(requested))
    if checkpoint is None or config.checkpoint.allow_config_change:
        return
    try:
        saved = read_state(checkpoint.path).progress.config
    except (ValueError, OSError):
        return
    loop, processes = config.loop, _processes()
    # The option that a run has a text encoder for stands for either option that names it.
    stages = {FIRST_STAGE: config.latents.vae, TEXT_ENCODER: config.data.caption_column}
    effective_batch = loop.train_batch_size * loop.gradient_accumulation_steps * processes
    own = run_identity(config, effective_batch, loop.max_train_steps, *stages.values())
    ignored = {STEPS} if loop.max_train_steps is None else set()
    # Their hashes are compared once they are loaded.
    ignored |= {name for name, path in stages.items() if path is not None and saved.get(name) is not None}
    refuse_changes(changed_options(own, saved, ignored), folder)


def _processes() -> int:
    """Number of processes that the launcher has started."""
    count = os.environ.get("WORLD_SIZE", "1")
    return int(count) if count.isascii() and count.isdecimal() else 1


def _newest_readable(folder: Path) -> Checkpoint | None:
    for path in reversed(list_checkpoints(folder)):
        checkpoint = _readable(path)
        if checkpoint is not None:
            return checkpoint
    return None


def _readable(path: Path) -> Checkpoint | None:
    """A checkpoint whose manifest is valid; None if it is not, or cannot be read."""
    try:
        return read_manifest(path)
    except (ValueError, OSError):
        return None
