"""Checks that compare options with each other and with the file system, before anything is loaded or written."""

from __future__ import annotations

import math
from collections.abc import Mapping, Set
from pathlib import Path
from typing import Any

from diffusers_ddpm_ext.errors import ConfigError
from diffusers_ddpm_ext.training.config.condition_checks import data_conditions, read_dropout
from diffusers_ddpm_ext.training.config.data_options import as_names
from diffusers_ddpm_ext.training.config.mixture_checks import check_mixture
from diffusers_ddpm_ext.training.config.pixel_checks import check_pixel_options
from diffusers_ddpm_ext.training.config.streaming_checks import (
    check_streaming_data,
    check_streaming_run,
    has_validation_images,
)
from diffusers_ddpm_ext.utils.lr_lambdas import check_lr_schedule
from diffusers_ddpm_ext.utils.network_budget import check_network_config
from diffusers_ddpm_ext.utils.vocabulary import SAMPLE_METRICS

Flat = Mapping[str, Any]

TRACKERS = (
    "tensorboard", "wandb", "comet_ml", "aim", "mlflow", "clearml", "dvclive", "swanlab", "trackio", "all", "none",
)  # fmt: skip

# option -> the option and value without which it has no effect: an error if it is on the command line
DEPENDENCIES: dict[str, tuple[str, Any]] = {
    "random_crop_scale": ("random_crop", "before"),
    "logvar_learning_rate": ("learn_logvar", True),
    "logvar_kind": ("learn_logvar", True),
    "p2_k": ("loss_weighting", "p2"),
    "p2_gamma": ("loss_weighting", "p2"),
    "log_snr_mean": ("timestep_sampler", "log_snr_normal"),
    "log_snr_std": ("timestep_sampler", "log_snr_normal"),
    "vlb_weight": ("loss_type", ("hybrid", "vlb")),
    "perceptual_model": ("loss_type", "perceptual"),
    "perceptual_weight": ("loss_type", "perceptual"),
    "validation_bpd_steps": ("validation_bpd", True),
    "huber_c": ("loss_type", "huber"),
    "cosine_s": ("beta_schedule", "squaredcos_cap_v2"),
    "dynamic_thresholding_ratio": ("thresholding", True),
    "sample_max_value": ("thresholding", True),
    "clip_sample_range": ("clip_sample", True),
    "ema_decay": ("use_ema", True),
    "ema_use_num_updates": ("use_ema", True),
    "ema_every": ("use_ema", True),
    "ema_dtype": ("use_ema", True),
    "offload_ema": ("use_ema", True),
    "reset_ema": ("use_ema", True),
    "reset_num_ema_updates": ("use_ema", True),
    "shuffle_buffer": ("streaming", True),
    "torch_compile_mode": ("torch_compile", True),
}
MODEL_SIZES = (
    "block_out_channels", "layers_per_block", "attention_levels", "attention_head_dim", "norm_num_groups", "dropout",
)  # fmt: skip
INITIAL_WEIGHTS_OPTIONS = (
    "ckpt_config",
    "ignore_keys",
    "load_only_unet",
    "reset_ema",
    "reset_num_ema_updates",
    "make_it_fit",
)


def check_options(flat: Flat, typed: Set[str]) -> None:
    """Check all options, by name, against each other; ``typed`` has the names of those on the command line.

    Raises:
        ConfigError: the first contradiction, with the option, its value and the way out.
    """
    check_dependencies(flat, typed, DEPENDENCIES)
    check_data_options(flat)
    read_dropout(flat["conditioning_dropout"], data_conditions(flat["conditioning_key"], flat))
    _check_schedule(flat, typed)
    _check_objective(flat, typed)
    _check_model(flat)
    _check_initial_weights(flat, typed)
    check_run_length(flat)
    check_resume(flat, typed)
    check_output(flat)


def check_dependencies(flat: Flat, typed: Set[str], dependencies: Mapping[str, tuple[str, Any]]) -> None:
    """Check that no option on the command line needs another one to have an effect; see `check_options`."""
    for name, (parent, required) in dependencies.items():
        allowed = required if isinstance(required, tuple) else (required,)
        if name in typed and flat[parent] not in allowed:
            other = f"--{parent}" if required is True else f"--{parent} {' or '.join(map(str, allowed))}"
            raise ConfigError(f"--{name} {flat[name]} has no effect without {other}: add that, or leave --{name} out")


def _check_initial_weights(flat: Flat, typed: Set[str]) -> None:
    for name in INITIAL_WEIGHTS_OPTIONS:
        if name in typed and flat[name] and flat["ckpt_path"] is None:
            raise ConfigError(f"--{name} has no effect without --ckpt_path: add that, or leave --{name} out")
    if flat["ckpt_config"] is not None and not Path(flat["ckpt_config"]).expanduser().is_file():
        raise ConfigError(f"--ckpt_config {flat['ckpt_config']} does not exist: name the YAML file of --ckpt_path")


def check_data_options(flat: Flat) -> None:
    """Check the options of the section ``data``; see `check_options`."""
    digits = flat["train_data_dir"] is None and flat["dataset_name"] is None
    for name in ("dataset_config_name", "image_column", "validation_split"):
        if flat[name] is not None and flat["dataset_name"] is None:
            raise ConfigError(f"--{name} {flat[name]} needs --dataset_name")
    if digits and flat["cache_images"] == "always":
        raise ConfigError(
            "--cache_images always needs --train_data_dir or --dataset_name: the digits are in memory already"
        )
    if digits and flat["validation_data_dir"] is not None:
        raise ConfigError("--validation_data_dir needs --train_data_dir or --dataset_name: the digits have their own")
    for name in ("data_range", "array_key", "array_layout"):
        if digits and flat[name] is not None:
            raise ConfigError(f"--{name} needs --train_data_dir or --dataset_name: the digits are what they are")
    if flat["data_range"] is not None and not flat["data_range"][0] < flat["data_range"][1]:
        low, high = flat["data_range"]
        raise ConfigError(f"--data_range {low:g} {high:g}: the first number must be smaller than the second")
    for name in ("train_data_dir", "validation_data_dir"):
        for folder in as_names(flat[name]):
            check_image_folder(f"--{name}", folder)
    check_mixture(flat)
    check_pixel_options(flat)
    check_streaming_data(flat)


def check_image_folder(option: str, folder: str) -> Path:
    """Return the path of a folder that is not empty.

    Raises:
        ConfigError: the folder, which ``option`` names, does not exist, is empty or cannot be read.
    """
    path = Path(folder).expanduser()
    if not path.exists():
        raise ConfigError(f"{option} {folder} does not exist: name a folder of images")
    if not path.is_dir():
        raise ConfigError(f"{option} {folder} is a file: name the folder that contains the images")
    try:
        if next(path.iterdir(), None) is None:
            raise ConfigError(f"{option} {folder} has no image (it is empty): name a folder of images")
    except OSError as error:
        raise ConfigError(f"{option} {folder} cannot be read: {error.strerror}") from None
    return path


def _check_schedule(flat: Flat, typed: Set[str]) -> None:
    from diffusers_ddpm_ext.diffusion.schedule import NoiseSchedule  # loads NumPy, which `--help` does not need

    betas = flat["trained_betas"]
    if betas is not None:
        for name in ("beta_schedule", "beta_start", "beta_end", "cosine_s"):
            if name in typed:
                raise ConfigError(f"--{name} has no effect with --trained_betas: give one of them")
        if flat["num_train_timesteps"] != len(betas):
            raise ConfigError(
                f"--num_train_timesteps {flat['num_train_timesteps']} contradicts --trained_betas, which has"
                f" {len(betas)} betas: leave --num_train_timesteps out"
            )
    v = flat["v_posterior"]
    names = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "cosine_s", "rescale_betas_zero_snr")
    try:
        schedule = NoiseSchedule(**{name: flat[name] for name in names}, trained_betas=betas, v_posterior=v or 0.0)
    except ValueError as error:
        raise ConfigError(f"--{error}") from None
    if schedule.zero_terminal_snr and flat["prediction_type"] == "epsilon":
        cause = "--rescale_betas_zero_snr" if flat["rescale_betas_zero_snr"] else "a last beta of 1"
        raise ConfigError(
            f"--prediction_type epsilon cannot be learned at zero terminal SNR ({cause}):"
            " use --prediction_type v_prediction"
        )
    if v is not None and flat["variance_type"] not in ("fixed_small", "fixed_large"):
        raise ConfigError(
            f"--v_posterior {v:g} contradicts --variance_type {flat['variance_type']}: leave one of them out"
        )
    steps = flat["ddpm_num_inference_steps"]
    if steps > len(schedule):
        raise ConfigError(
            f"--ddpm_num_inference_steps {steps} is more than --num_train_timesteps {len(schedule)}: use at most T"
        )
    offset = flat["steps_offset"]
    if flat["timestep_spacing"] == "leading" and (steps - 1) * (len(schedule) // steps) + offset >= len(schedule):
        raise ConfigError(
            f"--steps_offset {offset} exceeds the last of {len(schedule)} timesteps:"
            " use 0, or fewer --ddpm_num_inference_steps"
        )


def _check_objective(flat: Flat, typed: Set[str]) -> None:
    loss, variance = flat["loss_type"], flat["variance_type"]
    learned, bound = variance in ("learned", "learned_range"), loss in ("hybrid", "vlb")
    if learned and not bound:
        raise ConfigError(
            f"--variance_type {variance} is learned from the bound: use --loss_type hybrid, or a fixed variance"
        )
    if loss == "hybrid" and not learned:
        raise ConfigError(
            "--loss_type hybrid learns the variance from the bound: use --variance_type learned_range,"
            " or --loss_type l2"
        )
    if loss == "perceptual" and flat["perceptual_model"] is None:
        raise ConfigError("--loss_type perceptual needs --perceptual_model: a vision model of transformers")
    if loss == "vlb":
        for name in ("learn_logvar", "loss_weighting", "snr_gamma", "l_simple_weight", "original_elbo_weight"):
            if name in typed and flat[name] not in (False, None):
                raise ConfigError(f"--{name} {flat[name]} has no effect with --loss_type vlb: leave it out")
    if flat["validation_bpd"] and not has_validation_images(flat):
        raise ConfigError(f"--validation_bpd needs images that are held out: use {_held_out(flat)}")
    _check_sample_metrics(flat, typed)
    if not bound and not flat["validation_bpd"]:
        for name in ("decoder", "bin_width"):
            if name in typed and flat[name] is not None:
                raise ConfigError(
                    f"--{name} {flat[name]} has no effect without --loss_type hybrid or vlb, or --validation_bpd:"
                    f" add one, or leave --{name} out"
                )
    gamma, weighting = flat["snr_gamma"], flat["loss_weighting"]
    if gamma is not None and weighting not in ("simple", "min_snr", "soft_min_snr"):
        raise ConfigError(f"--snr_gamma {gamma:g} has no effect with --loss_weighting {weighting}: leave one out")
    if flat["l_simple_weight"] == 0 and flat["original_elbo_weight"] == 0 and not bound:
        raise ConfigError(
            "--l_simple_weight 0 with --original_elbo_weight 0 leaves no loss: use a weight above 0 for one of them"
        )


def _held_out(flat: Flat) -> str:
    """The option that holds images out."""
    return "--validation_examples N" if flat["streaming"] else "a --validation_fraction above 0"


def _check_sample_metrics(flat: Flat, typed: Set[str]) -> None:
    names = flat["validation_metrics"]
    if names is None:
        for name in ("validation_samples", "feature_extractor", "trust_feature_extractor"):
            if name in typed and flat[name] not in (None, False):
                raise ConfigError(f"--{name} has no effect without --validation_metrics: leave it out")
        return
    unknown = [name for name in names if name not in SAMPLE_METRICS]
    if unknown or len(set(names)) < len(names):
        raise ConfigError(
            f"--validation_metrics {' '.join(names)} must be some of {', '.join(SAMPLE_METRICS)}, each once"
        )
    if not has_validation_images(flat):
        raise ConfigError(f"--validation_metrics needs images that are held out: use {_held_out(flat)}")


def _check_model(flat: Flat) -> None:
    source = flat["model_config_name_or_path"]
    if source is not None:
        is_path = source.endswith(".json") or source.startswith((".", "/", "~"))
        if is_path and not Path(source).expanduser().exists():
            raise ConfigError(
                f"--model_config_name_or_path {source} does not exist: name the JSON file of a UNet2DModel"
            )
        return
    if flat["model_config"] is not None:
        check_network_config(flat["model_config"], "--model_config")
        return
    missing = [name for name in MODEL_SIZES if flat[name] is None]
    if missing:
        raise ConfigError(f"--{missing[0]} is not set: give it, or --model_config_name_or_path")
    widths, levels = flat["block_out_channels"], flat["attention_levels"]
    if not widths:
        raise ConfigError("--block_out_channels must have at least one width")
    check_network_config({"block_out_channels": widths, "layers_per_block": flat["layers_per_block"]}, "the options")
    groups, head = flat["norm_num_groups"], flat["attention_head_dim"]
    for width in widths:
        if width % groups:
            divisor = math.gcd(*widths, groups)
            raise ConfigError(f"--norm_num_groups {groups} does not divide the width {width}: use {divisor}")
    for level in levels:
        if level >= len(widths):
            raise ConfigError(
                f"--attention_levels {level} does not exist with {len(widths)} widths: use 0 to {len(widths) - 1}"
            )
    for width in {widths[level] for level in levels} | {widths[-1]}:
        if width % head:
            raise ConfigError(
                f"--attention_head_dim {head} does not divide the width {width}: use {math.gcd(width, head)}"
            )
    if flat["vae"] is not None:
        return  # the size of the latents is known once the first stage is loaded
    factor = 2 ** (len(widths) - 1)
    for size in flat["resolution"]:
        if size % factor:
            up = -(-size // factor) * factor
            raise ConfigError(
                f"--resolution {size} cannot be halved {len(widths) - 1} times: use a multiple of {factor} ({up}),"
                " or fewer --block_out_channels"
            )


def check_run_length(flat: Flat) -> None:
    """Check the length of the run and its learning rates; see `check_options`."""
    check_streaming_run(flat)
    if flat["num_epochs"] is None and flat["max_train_steps"] is None:
        raise ConfigError("the run has no end: set --max_train_steps or --num_epochs")
    try:
        check_lr_schedule(flat["lr_scheduler"], flat["lr_warmup_steps"], flat["lr_scheduler_args"] or {})
    except ValueError as error:
        raise ConfigError(f"--{error}") from None


def check_resume(flat: Flat, typed: Set[str]) -> None:
    """Check what the run resumes from; see `check_options`."""
    repository = flat.get("resume_from_hub")  # which a first stage has not
    if repository is not None and flat["overwrite_output_dir"]:
        raise ConfigError(
            f"--overwrite_output_dir deletes the folder's run before that of --resume_from_hub {repository} is there:"
            " leave it out, or name a new --output_dir"
        )
    source = flat["resume_from_checkpoint"]
    if source is None:
        if "allow_config_change" in typed and flat["allow_config_change"]:
            raise ConfigError("--allow_config_change has no effect without --resume_from_checkpoint: leave it out")
        return
    if flat["overwrite_output_dir"]:
        raise ConfigError(
            f"--overwrite_output_dir deletes what --resume_from_checkpoint {source} resumes from: leave one out"
        )
    if flat["output_dir"] is None:
        raise ConfigError(f"--resume_from_checkpoint {source} needs --output_dir: name the folder of the run")
    if source not in ("latest", "auto", "best") and not Path(source).is_dir():
        raise ConfigError(
            f"--resume_from_checkpoint {source} is not a folder: use latest, best, auto, or the path of a checkpoint"
        )


def tracker_names(report_to: str) -> list[str]:
    """Split ``--report_to`` at its commas into Accelerate's names of trackers, without ``none``."""
    names = [name.strip() for name in report_to.split(",")]
    return [{"comet": "comet_ml"}.get(name, name) for name in names if name != "none"]


def check_output(flat: Flat) -> None:
    """Check trackers and output folder; see `check_options`."""
    report_to = flat["report_to"]
    names = tracker_names(report_to)
    if not {*names} <= {*TRACKERS}:
        raise ConfigError(
            f"--report_to {report_to!r} is not one or several, separated by commas, of {', '.join(TRACKERS)}"
        )
    if "," in report_to and ("all" in names or len(names) < len(report_to.split(","))):
        raise ConfigError(f"--report_to {report_to!r}: all and none must be used alone")
    if flat["overwrite_output_dir"] and flat["output_dir"] is None:
        raise ConfigError("--overwrite_output_dir needs --output_dir: without it the run has a new folder")
    if flat["overwrite_output_dir"]:
        folder = Path(flat["output_dir"]).resolve()
        inputs = ("train_data_dir", "validation_data_dir", "ckpt_path", "vae", "model_config_name_or_path")
        for option, path in ((name, path) for name in inputs for path in as_names(flat.get(name))):
            if Path(path).exists() and Path(path).resolve().is_relative_to(folder):
                raise ConfigError(
                    f"--{option} {path} is in the folder that --overwrite_output_dir empties: name another"
                    " --output_dir"
                )
