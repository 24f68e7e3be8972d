"""Declarations of the training options: each is a field whose help text is its documentation and its ``--help``.

A field's name is its flag (``--learning_rate``) and its key in a YAML file. Names are those of Diffusers' example
scripts where they have one, and CompVis' where only CompVis has one. Defaults are those of Diffusers'
``train_unconditional.py``, but EMA is on. This module imports nothing heavy.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from diffusers_ddpm_ext.training.config.data_options import DataOptions
from diffusers_ddpm_ext.training.config.latent_options import LatentOptions
from diffusers_ddpm_ext.training.config.text_options import TextOptions
from diffusers_ddpm_ext.utils.option import option, options_of
from diffusers_ddpm_ext.utils.vocabulary import (
    FROM_COMPVIS_PREDICTION_TYPE,
    BetaSchedule,
    ConditioningKey,
    PredictionType,
    VarianceType,
)


@dataclass(frozen=True)
class ModelOptions:
    """The network: its JSON configuration, or its sizes; and how conditions enter it."""

    model_config_name_or_path: str | None = option(
        None,
        "JSON configuration of a UNet2DModel: a file, a folder, or a Hub id. Replaces the sizes below.",
        path=True,
    )
    model_config: dict[str, Any] | None = option(
        None, "The same as a JSON object; its _class_name may also be UNet2DConditionModel.", unset="the sizes"
    )
    conditioning_key: ConditioningKey | None = option(
        None,
        "How conditions enter the network: concatenated to its input (concat), as cross-attention tokens (crossattn),"
        " as class labels (adm), or combined. For the digits, adm is enough, and so is crossattn: a trained token per"
        " class.",
        unset="unconditional",
        answers={"none": "leave it out for an unconditional network"},
    )
    num_class_embeds: int | None = option(
        None,
        "Number of classes of the network.",
        low=1,
        high=1_000_000,
        unset="those of the data, and a null class where one is needed",
    )
    use_positional_encodings: bool = option(
        False, "Give the network two more input channels, with the column and row of each pixel from -1 to 1."
    )
    block_out_channels: tuple[int, ...] | None = option(
        (128, 128, 256, 256, 512, 512),
        "Width of each level. Every level but the last halves the image.",
        low=1,
        high=65_536,
    )
    layers_per_block: int | None = option(2, "Residual blocks per level.", low=1, high=64)
    attention_levels: tuple[int, ...] | None = option(
        None,
        "Levels with self-attention: 0 is the full resolution, 1 half of it, ... `none`: only the middle block.",
        low=0,
        high=31,
        unset="the last but one",
    )
    attention_head_dim: int | None = option(8, "Channels per attention head.", low=1, high=65_536)
    norm_num_groups: int | None = option(
        32, "Groups of the group normalization. Must divide every width.", low=1, high=65_536
    )
    dropout: float | None = option(0.0, "Dropout in the residual blocks.", low=0, below=1)


@dataclass(frozen=True)
class StartOptions:
    """Initial weights: a CompVis checkpoint, or the folder of a pipeline. The run logs what was loaded."""

    ckpt_path: str | None = option(
        None,
        "A CompVis checkpoint (.ckpt, .pt, .safetensors), or the folder of a pipeline or network. Read at the"
        " start of a run; a resumed run loads its own checkpoint instead.",
        unset="random weights",
        path=True,
    )
    ckpt_config: str | None = option(
        None, "YAML file of a CompVis --ckpt_path; needed if the checkpoint uses the new attention order.", path=True
    )
    ignore_keys: tuple[str, ...] | None = option(
        None, "Prefixes of parameter names in the checkpoint that are skipped.", unset="none"
    )
    load_only_unet: bool = option(False, "Load only the network, without log-variances.")
    reset_ema: bool = option(
        False, "Re-initialize the EMA from the loaded weights, ignoring an EMA in the checkpoint."
    )
    reset_num_ema_updates: bool = option(False, "Restart the warm-up of the EMA decay.")
    make_it_fit: Literal["correct", "compvis"] | None = option(
        None,
        "Load weights of another width by repeating channels. correct: input weights are divided by their number of"
        " repetitions; compvis: by one more, as in the published code. Never applied to the schedule.",
        unset="error on other shapes",
    )


BETA_SCHEDULE_HINTS = {
    "cosine": "'cosine' is CompVis' name: use squaredcos_cap_v2 (and --cosine_s)",
    "sqrt_linear": "'sqrt_linear' is CompVis' name: use linear (CompVis' linear is scaled_linear here)",
}
PREDICTION_TYPE_HINTS = {
    theirs: f"'{theirs}' is CompVis' name: use {ours}" for theirs, ours in FROM_COMPVIS_PREDICTION_TYPE.items()
}


@dataclass(frozen=True)
class ScheduleOptions:
    """The noise schedule, and the sampling settings of the saved pipeline, with Diffusers' names."""

    num_train_timesteps: int = option(
        1000, "T, the number of noise steps.", alias=("ddpm_num_steps",), low=1, high=1_000_000
    )
    beta_schedule: BetaSchedule = option(
        "linear",
        "Shape of the betas. CompVis' `linear` is scaled_linear here, its `sqrt_linear` is linear, its `cosine` is"
        " squaredcos_cap_v2.",
        alias=("ddpm_beta_schedule",),
        answers=BETA_SCHEDULE_HINTS,
    )
    beta_start: float = option(1e-4, "First beta.", above=0, below=1)
    beta_end: float = option(0.02, "Last beta.", above=0, below=1)
    cosine_s: float = option(0.008, "Offset of squaredcos_cap_v2.", above=0)
    trained_betas: tuple[float, ...] | None = option(
        None, "Explicit betas: a JSON list, or a .json or .npy file. Replaces the four options above."
    )
    rescale_betas_zero_snr: bool = option(
        False, "Rescale the betas to zero terminal SNR: the last step is pure noise. Needs v_prediction or sample."
    )
    prediction_type: PredictionType = option(
        "epsilon",
        "What the network predicts: the noise, the clean image, or the velocity.",
        answers=PREDICTION_TYPE_HINTS,
    )
    variance_type: VarianceType = option(
        "fixed_small",
        "Variance of the reverse step: that of the posterior (small), beta (large), or predicted per pixel"
        " (learned_range: between the two; learned: its logarithm); the last two need --loss_type hybrid or vlb.",
    )
    v_posterior: float | None = option(
        None,
        "CompVis' interpolation weight between the two variances: 0 is fixed_small, 1 is fixed_large.",
        low=0,
        high=1,
        unset="--variance_type decides",
    )
    clip_sample: bool = option(True, "Clip the predicted clean image while sampling.")
    clip_sample_range: float = option(1.0, "Clip to [-x, x], in data units: images are in [-1, 1].", above=0)
    thresholding: bool = option(False, "Dynamic thresholding of the predicted clean image, instead of clipping.")
    dynamic_thresholding_ratio: float = option(0.995, "Quantile of dynamic thresholding.", low=0, high=1)
    sample_max_value: float = option(1.0, "Upper limit of the threshold in dynamic thresholding.", low=1)
    timestep_spacing: Literal["leading", "trailing", "linspace"] = option(
        "leading", "How the timesteps are spaced when sampling takes fewer than T steps."
    )
    steps_offset: int = option(0, "Offset added to the timesteps with `leading`.", low=0, high=1_000_000)


@dataclass(frozen=True)
class ObjectiveOptions:
    """The loss. The logged `loss_simple` is never weighted, so it is comparable across these settings."""

    loss_type: Literal["l2", "l1", "huber", "perceptual", "hybrid", "vlb"] = option(
        "l2",
        "Loss between prediction and target. perceptual: l2 plus a feature distance of the predicted image; hybrid: l2"
        " plus the variational bound for a learned variance; vlb: the bound alone.",
        answers={"mse": "use l2", "mae": "use l1"},
    )
    huber_c: float = option(0.1, "Where the Huber loss changes from quadratic to linear, in data units.", above=0)
    l_simple_weight: float = option(1.0, "Weight of the simple loss.", low=0)
    original_elbo_weight: float = option(0.0, "Weight of the variational bound (ELBO) term.", low=0)
    elbo_weights: Literal["exact", "compvis"] = option(
        "exact",
        "exact: the coefficients of the variational bound. compvis: the table of the published code, for parity runs.",
    )
    learn_logvar: bool = option(False, "Learn a log-variance per timestep that weights the loss.")
    logvar_kind: Literal["table", "continuous"] = option(
        "table",
        "What --learn_logvar learns: one value per timestep (table), or a function of the log-SNR (continuous).",
    )
    logvar_init: float = option(0.0, "Initial log-variance; constant without --learn_logvar.")
    logvar_learning_rate: float = option(2e-2, "Learning rate of the log-variance. Follows --lr_scheduler.", above=0)
    loss_weighting: Literal["simple", "min_snr", "soft_min_snr", "p2", "debiased", "elbo", "compvis_elbo"] = option(
        "simple",
        "Loss weight of each timestep. simple: 1 for every prediction type; all others except compvis_elbo are a"
        " function of the SNR that is the same for every prediction type.",
    )
    snr_gamma: float | None = option(
        None, "Gamma of min_snr and soft_min_snr. Without --loss_weighting it selects min_snr.", above=0, unset="5"
    )
    p2_k: float = option(1.0, "k of p2.", above=0)
    p2_gamma: float = option(1.0, "Gamma of p2; 0 weights the error of the noise uniformly.", low=0)
    timestep_sampler: Literal["uniform", "stratified", "loss_second_moment", "log_snr_normal", "log_snr_uniform"] = (
        option(
            "uniform",
            "How timesteps are drawn; importance weights keep the loss unbiased. stratified: spread over [0, T);"
            " loss_second_moment: in proportion to recent losses; log_snr_*: by a density of the log-SNR.",
        )
    )
    log_snr_mean: float = option(0.0, "Mean of log_snr_normal.")
    log_snr_std: float = option(2.0, "Standard deviation of log_snr_normal.", above=0)
    vlb_weight: float = option(1.0, "Weight of the bound in hybrid and vlb.", low=0)
    decoder: Literal["exact", "improved_diffusion", "continuous"] = option(
        "exact",
        "Likelihood of the data in the bound: probability of a discrete level, exact or with improved-diffusion's"
        " approximation, or a density for continuous data.",
    )
    bin_width: float | None = option(
        None,
        "Distance between two neighboring levels of the data, in data units.",
        above=0,
        high=2,
        unset="that of the images",
    )
    perceptual_model: str | None = option(
        None, "Backbone of the perceptual loss: folder or Hub id of a `transformers` vision model.", path=True
    )
    perceptual_weight: float = option(
        0.5, "Weight of the feature distance in the perceptual loss; l2 has the remaining weight.", low=0, high=1
    )


@dataclass(frozen=True)
class OptimOptions:
    """AdamW and its learning rate. All steps are optimizer steps."""

    learning_rate: float = option(1e-4, "Learning rate after warm-up.", above=0)
    lr_scaling: Literal["none", "linear", "sqrt"] = option(
        "none",
        "Scale --learning_rate by the effective batch size (linear: CompVis' `scale_lr`) or its square root (sqrt).",
        answers={"true": "use linear", "false": "use none"},
    )
    lr_scheduler: Literal[
        "linear",
        "cosine",
        "cosine_with_restarts",
        "polynomial",
        "constant",
        "constant_with_warmup",
        "piecewise_constant",
        "LambdaWarmUpCosineScheduler",
        "LambdaWarmUpCosineScheduler2",
        "LambdaLinearScheduler",
    ] = option("cosine", "Learning-rate schedule: Diffusers' names, and CompVis' three lambdas.")
    lr_warmup_steps: int = option(500, "Warm-up steps from 0 to --learning_rate.", low=0)
    lr_scheduler_args: dict[str, Any] | None = option(
        None,
        "Arguments of --lr_scheduler, a JSON object: '{\"power\": 2.0}' for polynomial,"
        ' \'{"warm_up_steps": [100], "f_min": [0.1], ...}\' for LambdaLinearScheduler.',
    )
    adam_beta1: float = option(0.95, "Decay of AdamW's first moment.", low=0, below=1)
    adam_beta2: float = option(0.999, "Decay of AdamW's second moment.", low=0, below=1)
    adam_weight_decay: float = option(1e-6, "Weight decay of the network; the log-variance has none.", low=0)
    adam_epsilon: float = option(1e-8, "AdamW's epsilon.", above=0)
    max_grad_norm: float = option(1.0, "Maximum norm of the network's gradient (gradient clipping).", above=0)
    use_8bit_adam: bool = option(False, "Use AdamW with 8-bit state from bitsandbytes, which must be installed.")


@dataclass(frozen=True)
class EmaOptions:
    """Exponential moving average (EMA) of the weights, with which the saved pipeline samples."""

    use_ema: bool = option(True, "Track the EMA. Without it the saved pipeline has the raw weights.")
    ema_decay: float = option(
        0.9999, "Decay per update. Averages about 1 / (1 - decay) updates.", alias=("ema_max_decay",), low=0, below=1
    )
    ema_use_num_updates: bool = option(True, "Warm the decay up: (1 + n) / (10 + n) at the n-th step, as LitEma does.")
    ema_every: Literal["step", "micro_batch"] = option(
        "step",
        "Update after every optimizer step, or after every micro-batch, as Lightning and CompVis do with"
        " --gradient_accumulation_steps.",
    )
    ema_dtype: Literal["float32", "bfloat16"] = option(
        "float32",
        "Precision of the EMA. bfloat16 takes half the memory, and rounds stochastically, so that small updates are"
        " not lost.",
        answers={"bf16": "use bfloat16", "fp32": "use float32", "float16": "use bfloat16"},
    )
    offload_ema: bool = option(
        False, "Keep the EMA in main memory, and copy it to the device for each update: the same results."
    )


@dataclass(frozen=True)
class LoopOptions:
    """Length of the run, batch size, precision, and random seed."""

    train_batch_size: int = option(16, "Images per device and micro-batch.", low=1, high=1_000_000)
    num_epochs: int | None = option(
        100, "Epochs: passes over the training images. Replaced by --max_train_steps.", low=1, high=10**9
    )
    max_train_steps: int | None = option(
        None, "Total optimizer steps of the run.", low=1, high=10**12, unset="--num_epochs decides"
    )
    gradient_accumulation_steps: int = option(1, "Micro-batches per optimizer step.", low=1, high=1_000_000)
    mixed_precision: Literal["no", "fp16", "bf16"] | None = option(
        None,
        "Precision of the network; noise and loss stay float32.",
        unset="that of `accelerate launch`, else bf16 on an NVIDIA GPU that computes in it, else no",
    )
    channels_last: Literal["auto", "always", "never"] = option(
        "auto",
        "Keep the network's weights and activations in memory with the channels last, the order of tensor cores. auto:"
        " on an NVIDIA GPU in fp16 or bf16, unless FSDP shards the weights.",
    )
    fast_attention: Literal["auto", "never"] = option(
        "auto",
        "Compute attention on an x86 CPU by oneDNN and, with heads of 8 channels, a few heads at a time. `never` keeps"
        " PyTorch's kernel and its rounding. auto: in new runs, and in resumed ones whose checkpoint has it.",
    )
    gradient_checkpointing: bool = option(
        False,
        "Recompute activations in the backward pass, also of a text encoder that is trained: less memory, more time,"
        " the same results.",
    )
    torch_compile: bool = option(
        False, "Compile the network with `torch.compile`. Saved files are the same; the first steps take minutes."
    )
    torch_compile_mode: Literal["default", "reduce-overhead", "max-autotune"] = option(
        "default",
        "Mode of --torch_compile. reduce-overhead uses CUDA graphs, for small networks whose kernels take less time"
        " than their launches; max-autotune also tries several kernels for each operation.",
    )
    num_threads: int | Literal["auto"] = option(
        "auto",
        "CPU threads of each process. auto: OMP_NUM_THREADS if you have set it, else the fastest number in a short"
        " measurement at the start of a run on a CPU; a resumed run uses that of its checkpoint.",
        low=1,
        high=1024,
    )
    on_nonfinite: Literal["stop", "skip", "rollback"] = option(
        "stop",
        "For a non-finite loss or gradient: stop; skip the step; or roll back to the weights of the newest checkpoint"
        " and continue with the next batch. The folder crash/ has a report. An accelerator decides by itself; the"
        " report comes with the next --logging_steps.",
    )
    seed: int = option(0, "Random seed of the run.", low=0)
    dry_run: bool = option(False, "Print the plan of the run and exit. Nothing is written but the cache of images.")


@dataclass(frozen=True)
class ValidationOptions:
    """Validation loss on the held-out images, for raw and EMA weights with the same noise."""

    validation_steps: int = option(500, "Validate every N optimizer steps. 0: only at the end.", low=0)
    validation_bpd: bool = option(
        False,
        "Also measure val/bpd, the variational bound in bits per dimension, which --monitor can follow. It is"
        " estimated from --validation_bpd_steps timesteps per image, since all T cost T evaluations of the network.",
    )
    validation_bpd_steps: int = option(10, "Timesteps per image that --validation_bpd evaluates; at most T.", low=2)
    validation_max_images: int | None = option(1000, "Maximum number of validation images.", low=1)
    eval_batch_size: int = option(16, "Batch size of validation and previews.", low=1, high=1_000_000)
    validation_metrics: tuple[str, ...] | None = option(
        None,
        "Also measure samples against the validation images: fd (Frechet distance), kid (kernel distance), prdc"
        " (precision, recall, density, coverage), which --monitor can follow. They are drawn with"
        " --ddpm_num_inference_steps.",
        metavar="NAME",
    )
    validation_samples: int = option(500, "Samples that --validation_metrics draws.", low=12, high=10_000_000)
    feature_extractor: str | None = option(
        None,
        "What --validation_metrics compares: pixels; digits; the folder or Hub id of a vision model of `transformers`,"
        " e.g. facebook/dinov2-base; or a TorchScript file.",
        unset="digits for the digits, else pixels",
        path=True,
    )
    trust_feature_extractor: bool = option(False, "Run a TorchScript file as --feature_extractor.")


@dataclass(frozen=True)
class OutputOptions:
    """Output folder, trackers, logging, and previews."""

    output_dir: str | None = option(
        None,
        "Folder of the run and of the trained pipeline.",
        unset="a new one: runs/digits, runs/digits-2, ...",
        path=True,
    )
    overwrite_output_dir: bool = option(
        False, "Use a folder that is not empty; files of an earlier run in it are deleted."
    )
    report_to: str = option(
        "tensorboard",
        "Trackers of Accelerate, separated by commas: tensorboard, wandb, trackio, mlflow, comet_ml, ...; all (that"
        " are installed), or none. Images and histograms are logged, too. metrics.jsonl is always written.",
        alias=("logger",),
    )
    logging_dir: str = option("logs", "Folder of the tracker, inside --output_dir.", path=True)
    logging_steps: int = option(
        10, "Log the losses every N optimizer steps; metrics.jsonl has a row for each step.", low=1
    )
    save_images_epochs: int | None = option(10, "Sample a grid of preview images every N epochs.", low=1)
    save_images_steps: int | None = option(None, "The same, every N optimizer steps.", low=1)
    num_preview_images: int = option(16, "Images per preview grid.", low=1, high=10_000)
    ddpm_num_inference_steps: int = option(
        1000, "Sampling steps of the preview grids, at most T.", low=1, high=1_000_000
    )
    preview_guidance_scale: float = option(1.0, "Classifier-free guidance scale of the preview grids; 1: none.")
    save_model_epochs: int | None = option(10, "Save the pipeline every N epochs, and at the end.", low=1)


@dataclass(frozen=True)
class CheckpointOptions:
    """Checkpoints and bit-exact resuming."""

    checkpointing_steps: int | None = option(
        500, "Save a checkpoint every N optimizer steps, and after the last.", low=1
    )
    checkpointing_minutes: float | None = option(None, "Also save a checkpoint every N minutes.", above=0)
    checkpoints_total_limit: int | None = option(
        None, "Number of newest checkpoints to keep, in addition to the best ones.", low=1, unset="all"
    )
    resume_from_checkpoint: str | None = option(
        None,
        "Resume from a checkpoint: latest or best in --output_dir, or a path. auto: the latest if there is one, else"
        " start from scratch; for job queues and restarts.",
        unset="start from scratch",
        path=True,
    )
    allow_config_change: bool = option(False, "Resume although options differ that change the results.")
    max_train_minutes: float | None = option(
        None, "Save a checkpoint and exit with status 0 after N minutes.", above=0, unset="no limit"
    )


@dataclass(frozen=True)
class MonitorOptions:
    """Selection of the best checkpoints, and early stopping."""

    monitor: str | None = option(
        None,
        "Metric that selects the best checkpoints, by its logged name.",
        unset="val/loss_simple_ema, or val/loss_simple without EMA",
    )
    monitor_mode: Literal["auto", "min", "max"] = option("auto", "Whether smaller or larger is better.")
    save_top_k: int = option(
        1, "Keep the k best checkpoints, and the best one as the folder `best`.", low=0, high=1_000_000
    )
    early_stopping_patience: int | None = option(
        None, "Stop after N validations in a row without an improvement.", low=1, unset="never"
    )
    early_stopping_min_delta: float = option(
        0.0, "Smallest change that counts as an improvement, in units of the metric.", low=0
    )


@dataclass(frozen=True)
class HubOptions:
    """Pushing the run to the Hugging Face Hub, and resuming from it."""

    push_to_hub: bool = option(False, "Push the pipeline with a model card; `ddpm-ext push` does so after a run.")
    hub_model_id: str | None = option(None, "Name of the repository, or user/name.", unset="the name of --output_dir")
    hub_token: str | None = option(
        None,
        "Token of the Hub; never saved, and not allowed in a file.",
        unset="HF_TOKEN, or the token of `hf auth login`",
    )
    hub_private_repo: bool = option(False, "Create a new repository as private.")
    hub_strategy: Literal["end", "every_save", "checkpoint"] = option(
        "end",
        "end: push once, at the end. every_save: also whenever the pipeline is saved, in the background. checkpoint:"
        " include the newest checkpoint, for --resume_from_hub.",
    )
    resume_from_hub: str | None = option(
        None,
        "Resume from the last checkpoint that a run with --hub_strategy checkpoint has pushed, for example on another"
        " machine: user/name.",
        unset="start from scratch",
    )


SECTIONS: dict[str, type] = {
    "data": DataOptions,
    "latents": LatentOptions,
    "text": TextOptions,
    "model": ModelOptions,
    "start": StartOptions,
    "schedule": ScheduleOptions,
    "objective": ObjectiveOptions,
    "optim": OptimOptions,
    "ema": EmaOptions,
    "loop": LoopOptions,
    "validation": ValidationOptions,
    "checkpoint": CheckpointOptions,
    "monitoring": MonitorOptions,
    "output": OutputOptions,
    "hub": HubOptions,
}
OPTIONS = {name: each for section, cls in SECTIONS.items() for name, each in options_of(cls, section).items()}
"""Every option of a training run by name."""
CANONICAL_NAMES = {a: o.name for o in OPTIONS.values() for a in (o.name, *o.metadata["alias"])}
"""Flag or key, including aliases -> name of the option."""
