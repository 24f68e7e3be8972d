"""What options must hold together, found before anything is read, imported or written."""

from __future__ import annotations

import math
from collections.abc import Mapping, Set
from pathlib import Path
from typing import Any

from diffusers_ddpm_ext.errors import ConfigError
from diffusers_ddpm_ext.utils.lr_lambdas import check_lr_schedule

Flat = Mapping[str, Any]

TRACKERS = (
    "tensorboard", "wandb", "comet_ml", "aim", "mlflow", "clearml", "dvclive", "swanlab", "trackio", "all", "none",
)  # fmt: skip

# typed on the command line, an option is refused while the one it depends on is off
NEEDS: dict[str, tuple[str, Any]] = {
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
    "reset_ema": ("use_ema", True),
    "reset_num_ema_updates": ("use_ema", True),
}
SIZES = (
    "block_out_channels", "layers_per_block", "attention_levels", "attention_head_dim", "norm_num_groups", "dropout",
)  # fmt: skip
START = ("ckpt_config", "ignore_keys", "load_only_unet", "reset_ema", "reset_num_ema_updates", "make_it_fit")


def check(flat: Flat, typed: Set[str]) -> None:
    """Refuse options that are out of range or contradict each other.

    Args:
        flat: every option by name, resolved.
        typed: names that stood on the command line.

    Raises:
        ConfigError: the first fault found; it names the option, its value and the way out.
    """
    _check_needs(flat, typed)
    check_data(flat)
    _check_schedule(flat, typed)
    _check_objective(flat, typed)
    _check_model(flat)
    _check_start(flat, typed)
    _check_run_length(flat)
    _check_resume(flat, typed)
    _check_output(flat)


def _check_needs(flat: Flat, typed: Set[str]) -> None:
    for name, (parent, wanted) in NEEDS.items():
        allowed = wanted if isinstance(wanted, tuple) else (wanted,)
        if name in typed and flat[parent] not in allowed:
            say = f"--{parent}" if wanted is True else f"--{parent} {' or '.join(map(str, allowed))}"
            raise ConfigError(f"--{name} {flat[name]} has no effect without {say}: add that, or leave --{name} out")


def _check_start(flat: Flat, typed: Set[str]) -> None:
    for name in START:
        if name in typed and flat[name] and flat["ckpt_path"] is None:
            raise ConfigError(f"--{name} has no effect without --ckpt_path: add that, or leave --{name} out")
    if flat["ckpt_config"] is not None and not Path(flat["ckpt_config"]).expanduser().is_file():
        raise ConfigError(f"--ckpt_config {flat['ckpt_config']} does not exist: give the YAML file of --ckpt_path")


def check_data(flat: Flat) -> None:
    """Refuse images that cannot be meant; see `check`."""
    digits = flat["train_data_dir"] is None and flat["dataset_name"] is None
    for name in ("dataset_config_name", "image_column", "validation_split"):
        if flat[name] is not None and flat["dataset_name"] is None:
            raise ConfigError(f"--{name} {flat[name]} needs --dataset_name")
    if digits and flat["validation_data_dir"] is not None:
        raise ConfigError("--validation_data_dir needs --train_data_dir or --dataset_name: the digits have their own")
    for name in ("train_data_dir", "validation_data_dir"):
        if flat[name] is not None:
            _check_folder(name, flat[name])


def _check_folder(name: str, value: str) -> None:
    folder = Path(value)
    if not folder.exists():
        raise ConfigError(f"--{name} {value} does not exist: give a folder of images")
    if not folder.is_dir():
        raise ConfigError(f"--{name} {value} is a file: give the folder that holds the images")
    try:
        if next(folder.iterdir(), None) is None:
            raise ConfigError(f"--{name} {value} is empty: give a folder of images")
    except OSError as error:
        raise ConfigError(f"--{name} {value} cannot be read: {error.strerror}") from None


def _check_schedule(flat: Flat, typed: Set[str]) -> None:
    from diffusers_ddpm_ext.diffusion.schedule import NoiseSchedule  # brings NumPy, which `--help` does not wait for

    betas = flat["trained_betas"]
    if betas is not None:
        for name in ("beta_schedule", "beta_start", "beta_end", "cosine_s"):
            if name in typed:
                raise ConfigError(f"--{name} has no effect with --trained_betas: give one of them")
        if flat["num_train_timesteps"] != len(betas):
            raise ConfigError(
                f"--num_train_timesteps {flat['num_train_timesteps']} contradicts --trained_betas, which holds"
                f" {len(betas)} betas: leave the number out"
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
            f"--prediction_type epsilon cannot be learned where no signal is left ({cause}):"
            " use --prediction_type v_prediction"
        )
    if v is not None and flat["variance_type"] not in ("fixed_small", "fixed_large"):
        raise ConfigError(
            f"--v_posterior {v:g} contradicts --variance_type {flat['variance_type']}: leave one of them out"
        )
    steps = flat["ddpm_num_inference_steps"]
    if steps > len(schedule):
        raise ConfigError(
            f"--ddpm_num_inference_steps {steps} is more than --num_train_timesteps {len(schedule)}: take at most T"
        )
    offset = flat["steps_offset"]
    if flat["timestep_spacing"] == "leading" and (steps - 1) * (len(schedule) // steps) + offset >= len(schedule):
        raise ConfigError(
            f"--steps_offset {offset} leads beyond the last of {len(schedule)} steps:"
            " use 0, or fewer --ddpm_num_inference_steps"
        )


def _check_objective(flat: Flat, typed: Set[str]) -> None:
    loss, variance = flat["loss_type"], flat["variance_type"]
    learned, bound = variance in ("learned", "learned_range"), loss in ("hybrid", "vlb")
    if learned and not bound:
        raise ConfigError(
            f"--variance_type {variance} is learned from the bound: say --loss_type hybrid, or a fixed variance"
        )
    if loss == "hybrid" and not learned:
        raise ConfigError(
            "--loss_type hybrid learns the variance from the bound: say --variance_type learned_range, or"
            " --loss_type l2"
        )
    if loss == "perceptual" and flat["perceptual_model"] is None:
        raise ConfigError("--loss_type perceptual needs --perceptual_model: a vision model of transformers")
    if loss == "vlb":
        for name in ("learn_logvar", "loss_weighting", "snr_gamma", "l_simple_weight", "original_elbo_weight"):
            if name in typed and flat[name] not in (False, None):
                raise ConfigError(f"--{name} {flat[name]} has no effect with --loss_type vlb: leave it out")
    elsewhere = flat["validation_split"] is not None or flat["validation_data_dir"] is not None
    if flat["validation_bpd"] and not flat["validation_fraction"] and not elsewhere:
        raise ConfigError("--validation_bpd needs images that are held out: leave --validation_fraction above 0")
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
            "--l_simple_weight 0 with --original_elbo_weight 0 leaves no loss: give one of them a weight"
        )


def _check_model(flat: Flat) -> None:
    named = flat["model_config_name_or_path"]
    if named is not None:
        is_path = named.endswith(".json") or named.startswith((".", "/", "~"))
        if is_path and not Path(named).expanduser().exists():
            raise ConfigError(f"--model_config_name_or_path {named} does not exist: give a UNet2DModel's JSON file")
        return
    if flat["model_config"] is not None:
        return
    missing = [name for name in SIZES if flat[name] is None]
    if missing:
        raise ConfigError(f"--{missing[0]} is not set: give it, or --model_config_name_or_path")
    widths, levels = flat["block_out_channels"], flat["attention_levels"]
    if not widths:
        raise ConfigError("--block_out_channels must name at least one width")
    groups, head = flat["norm_num_groups"], flat["attention_head_dim"]
    for width in widths:
        if width % groups:
            way = math.gcd(*widths, groups)
            raise ConfigError(f"--norm_num_groups {groups} does not divide the width {width}: use {way}")
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
    factor = 2 ** (len(widths) - 1)
    for size in flat["resolution"]:
        if size % factor:
            up = -(-size // factor) * factor
            raise ConfigError(
                f"--resolution {size} cannot be halved {len(widths) - 1} times: use a multiple of {factor} ({up}),"
                " or fewer --block_out_channels"
            )


def _check_run_length(flat: Flat) -> None:
    if flat["num_epochs"] is None and flat["max_train_steps"] is None:
        raise ConfigError("the run has no end: give --max_train_steps or --num_epochs")
    try:
        check_lr_schedule(flat["lr_scheduler"], flat["lr_warmup_steps"], flat["lr_scheduler_args"] or {})
    except ValueError as error:
        raise ConfigError(f"--{error}") from None


def _check_resume(flat: Flat, typed: Set[str]) -> None:
    wanted = flat["resume_from_checkpoint"]
    if wanted is None:
        if "allow_config_change" in typed and flat["allow_config_change"]:
            raise ConfigError("--allow_config_change has no effect without --resume_from_checkpoint: leave it out")
        return
    if flat["overwrite_output_dir"]:
        raise ConfigError(
            f"--overwrite_output_dir removes what --resume_from_checkpoint {wanted} is to go on from: give one of them"
        )
    if flat["output_dir"] is None:
        raise ConfigError(f"--resume_from_checkpoint {wanted} needs --output_dir: name the folder of the run")
    if wanted not in ("latest", "auto", "best") and not Path(wanted).is_dir():
        raise ConfigError(
            f"--resume_from_checkpoint {wanted} is no folder: say latest, best, auto, or the path of a checkpoint"
        )


def tracker_names(told: str) -> list[str]:
    """Trackers as Accelerate calls them.

    Args:
        told: of ``--report_to``, several of them with commas between.

    Returns:
        Their names; none of ``none``.
    """
    names = [name.strip() for name in told.split(",")]
    return [{"comet": "comet_ml"}.get(name, name) for name in names if name != "none"]


def _check_output(flat: Flat) -> None:
    told = flat["report_to"]
    names = tracker_names(told)
    if not {*names} <= {*TRACKERS}:
        raise ConfigError(f"--report_to {told!r} is not one, or several by commas, of {', '.join(TRACKERS)}")
    if "," in told and ("all" in names or len(names) < len(told.split(","))):
        raise ConfigError(f"--report_to {told!r}: all and none stand alone")
    if flat["overwrite_output_dir"] and flat["output_dir"] is None:
        raise ConfigError("--overwrite_output_dir needs --output_dir: without a name a fresh folder is taken")
