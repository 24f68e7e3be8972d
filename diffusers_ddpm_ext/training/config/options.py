"""Every option of a training run: one field, whose one sentence is its documentation and its ``--help``.

A field's name is its flag (``--learning_rate``) and its key in a YAML file. Names are those of Diffusers' example
scripts where they have one, and CompVis' where only CompVis has one. Defaults are those of Diffusers'
``train_unconditional.py``, but EMA is on. This module imports nothing heavy.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from diffusers_ddpm_ext.utils.option import option, options_of
from diffusers_ddpm_ext.utils.vocabulary import (
    FROM_COMPVIS_PREDICTION_TYPE,
    BetaSchedule,
    ConditioningKey,
    PredictionType,
    VarianceType,
)


@dataclass(frozen=True)
class DataOptions:
    """Images. With neither --train_data_dir nor --dataset_name: the digits that ship with scikit-learn."""

    train_data_dir: str | None = option(None, "Folder of images, nested folders too, any image type.", unset="digits")
    dataset_name: str | None = option(None, "Dataset of the Hub, or the path of a local one, read by `datasets`.")
    dataset_config_name: str | None = option(None, "Configuration of --dataset_name, if it has several.")
    image_column: str | None = option(None, "Column of --dataset_name that holds the images.", unset="the only one")
    cache_dir: str | None = option(None, "Where downloaded datasets are kept.", unset="that of `datasets`")
    validation_fraction: float | None = option(
        0.1, "Part of the images held out for validation. 0: no validation.", low=0, below=1
    )
    validation_split: str | None = option(None, "Split of --dataset_name to validate on, instead of a fraction.")
    validation_data_dir: str | None = option(None, "Folder of images to validate on, instead of a fraction.")
    resolution: tuple[int, int] = option(
        (64, 64), "Size of the images in pixels: one number, or height and width.", low=1
    )
    center_crop: bool = option(False, "Crop the middle of each resized image, not a random place.")
    random_flip: bool = option(False, "Mirror each image left to right half of the time.")
    channels: int | None = option(
        None, "Channels of the images: 1 grey, 3 colour, 4 with transparency.", low=1, unset="those of the data"
    )
    skip_bad_images: bool = option(False, "Leave out files that cannot be read, instead of stopping before the run.")
    class_column: str | None = option(
        None,
        "Column with the class of each image: of --dataset_name, or of metadata.csv or metadata.jsonl in the folder;"
        " `folder`: the name of the folder that an image lies in.",
        unset="with --conditioning_key adm: the digit, or `folder`",
    )
    concat_column: str | None = option(None, "Column with images, or paths of images, that are joined to the input.")
    context_column: str | None = option(
        None, "Column with stored embeddings (tokens, width) for cross attention: .npy, .safetensors or lists."
    )
    conditioning_dropout: dict[str, Any] | None = option(
        None,
        "Leave a condition out with a probability, for guidance later (CompVis' `ucg_training`): a JSON object such as"
        ' \'{"class_labels": 0.1}\', or \'{"concat_inputs": {"p": 0.1, "val": 0}}\'. Classes get a null class.',
        unset="never",
    )
    dataloader_num_workers: int = option(0, "Processes that read images. 0: the main process does.", low=0)


@dataclass(frozen=True)
class ModelOptions:
    """The network: its JSON configuration, or its sizes; and how conditions reach it."""

    model_config_name_or_path: str | None = option(
        None, "JSON configuration of a UNet2DModel: a file, a folder, or a Hub id. Replaces the sizes below."
    )
    model_config: dict[str, Any] | None = option(
        None, "The same, in place: a JSON object; its _class_name may be UNet2DConditionModel, too.", unset="the sizes"
    )
    conditioning_key: ConditioningKey | None = option(
        None,
        "How conditions reach the network: joined to its input (concat), as tokens of cross attention (crossattn), as"
        " class labels (adm), or together. The digits need nothing else: --conditioning_key adm.",
        unset="unconditional",
        answers={"none": "leave it out for an unconditional network"},
    )
    num_class_embeds: int | None = option(
        None, "Classes that the network knows.", low=1, unset="those of the data, and a null class where one is needed"
    )
    use_positional_encodings: bool = option(
        False, "Give the network two more input channels, with the column and row of each pixel from -1 to 1."
    )
    block_out_channels: tuple[int, ...] | None = option(
        (128, 128, 256, 256, 512, 512), "Width of each level. Every level but the last halves the image.", low=1
    )
    layers_per_block: int | None = option(2, "Residual blocks a level.", low=1)
    attention_levels: tuple[int, ...] | None = option(
        None,
        "Levels with self-attention: 0 is the full resolution, 1 half of it, ... `none`: only the middle block.",
        low=0,
        unset="the last but one",
    )
    attention_head_dim: int | None = option(8, "Channels of an attention head.", low=1)
    norm_num_groups: int | None = option(32, "Groups of the group norms. Must divide every width.", low=1)
    dropout: float | None = option(0.0, "Dropout in the residual blocks.", low=0, below=1)


@dataclass(frozen=True)
class StartOptions:
    """Starting from weights that exist: of a CompVis checkpoint, or a pipeline's folder. A run says what it took."""

    ckpt_path: str | None = option(
        None,
        "A CompVis checkpoint (.ckpt, .pt, .safetensors), or the folder of a pipeline or network. Read when a run"
        " begins; one that goes on from its own checkpoint has its weights there.",
        unset="random weights",
    )
    ckpt_config: str | None = option(
        None, "YAML file that belongs to a CompVis --ckpt_path: needed where its attention has the new order of heads."
    )
    ignore_keys: tuple[str, ...] | None = option(
        None, "Prefixes of names in the file that are left out.", unset="none"
    )
    load_only_unet: bool = option(False, "Take the network alone: no log-variances.")
    reset_ema: bool = option(False, "Begin the average anew from the loaded weights, whatever the file holds.")
    reset_num_ema_updates: bool = option(False, "Begin the warm-up of the average's decay again.")
    make_it_fit: Literal["correct", "compvis"] | None = option(
        None,
        "Fill layers of another width by repeating channels. correct: inputs are divided by how often they are used;"
        " compvis: by one more than that, as the published code does. Never applied to the schedule.",
        unset="refuse other shapes",
    )


BETA_SCHEDULE_HINTS = {
    "cosine": "'cosine' is CompVis' word: say squaredcos_cap_v2 (and --cosine_s)",
    "sqrt_linear": "'sqrt_linear' is CompVis' word: say linear (CompVis' linear is scaled_linear here)",
}
PREDICTION_TYPE_HINTS = {
    theirs: f"'{theirs}' is CompVis' word: say {ours}" for theirs, ours in FROM_COMPVIS_PREDICTION_TYPE.items()
}


@dataclass(frozen=True)
class ScheduleOptions:
    """The noise schedule, and how the saved pipeline samples. Diffusers' words."""

    num_train_timesteps: int = option(1000, "T, the number of noise steps.", alias=("ddpm_num_steps",), low=1)
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
        None, "The betas themselves: a JSON list, or a .json or .npy file. Replaces the four options above."
    )
    rescale_betas_zero_snr: bool = option(
        False, "Make the last step pure noise (zero terminal SNR). Needs v_prediction or sample."
    )
    prediction_type: PredictionType = option(
        "epsilon",
        "What the network predicts: the noise, the clean image, or the velocity.",
        answers=PREDICTION_TYPE_HINTS,
    )
    variance_type: VarianceType = option(
        "fixed_small",
        "Variance of a step back: the posterior's (small), beta (large), or what the network says, for each pixel"
        " (learned_range: where between the two; learned: its logarithm), which needs --loss_type hybrid or vlb.",
    )
    v_posterior: float | None = option(
        None,
        "CompVis' dial between the two variances: 0 is fixed_small, 1 is fixed_large.",
        low=0,
        high=1,
        unset="--variance_type decides",
    )
    clip_sample: bool = option(True, "Clip the predicted clean image while sampling.")
    clip_sample_range: float = option(1.0, "Clip to this range, in data units: images lie in [-1, 1].", above=0)
    thresholding: bool = option(False, "Dynamic thresholding of the predicted clean image, instead of clipping.")
    dynamic_thresholding_ratio: float = option(0.995, "Quantile of dynamic thresholding.", low=0, high=1)
    sample_max_value: float = option(1.0, "Largest threshold of dynamic thresholding.", low=1)
    timestep_spacing: Literal["leading", "trailing", "linspace"] = option(
        "leading", "Which steps are kept when sampling takes fewer than T."
    )
    steps_offset: int = option(0, "Added to the kept steps under `leading`.", low=0)


@dataclass(frozen=True)
class ObjectiveOptions:
    """The loss. The logged `loss_simple` is never weighted, so it can be compared across these settings."""

    loss_type: Literal["l2", "l1", "huber", "perceptual", "hybrid", "vlb"] = option(
        "l2",
        "Distance between prediction and target; perceptual: l2, and a distance of features of the predicted image;"
        " hybrid: l2, and the variational bound for a learned variance; vlb: the bound alone.",
        answers={"mse": "say l2", "mae": "say l1"},
    )
    huber_c: float = option(0.1, "Where the huber distance turns from a square into a line, in data units.", above=0)
    l_simple_weight: float = option(1.0, "Weight of the simple loss.", low=0)
    original_elbo_weight: float = option(0.0, "Weight of the variational bound's loss.", low=0)
    elbo_weights: Literal["exact", "compvis"] = option(
        "exact",
        "exact: the coefficients of the variational bound. compvis: the published code's table, for parity runs.",
    )
    learn_logvar: bool = option(False, "Learn the log of the loss at each step, and weigh each step by it.")
    logvar_kind: Literal["table", "continuous"] = option(
        "table",
        "What --learn_logvar learns: a number for each step, or a smooth function of the log-SNR for all steps.",
    )
    logvar_init: float = option(0.0, "Log-variance at the start, and for good without --learn_logvar.")
    logvar_learning_rate: float = option(2e-2, "Learning rate of the log-variance. Follows --lr_scheduler.", above=0)
    loss_weighting: Literal["simple", "min_snr", "soft_min_snr", "p2", "debiased", "elbo", "compvis_elbo"] = option(
        "simple",
        "Weight of each step. simple: 1, whatever is predicted; the others, but compvis_elbo, are one function of the"
        " SNR, the same in every prediction type.",
    )
    snr_gamma: float | None = option(
        None, "Gamma of min_snr and soft_min_snr. Given alone it means min_snr.", above=0, unset="5"
    )
    p2_k: float = option(1.0, "k of p2.", above=0)
    p2_gamma: float = option(1.0, "Gamma of p2; 0 is even weights of the noise's error.", low=0)
    timestep_sampler: Literal["uniform", "stratified", "loss_second_moment", "log_snr_normal", "log_snr_uniform"] = (
        option(
            "uniform",
            "Which steps a batch trains on; weights keep each choice unbiased. stratified: spread over the chain;"
            " loss_second_moment: in proportion to their last losses; log_snr_*: by a density of the log-SNR.",
        )
    )
    log_snr_mean: float = option(0.0, "Mean of log_snr_normal.")
    log_snr_std: float = option(2.0, "Standard deviation of log_snr_normal.", above=0)
    vlb_weight: float = option(1.0, "Weight of the bound in hybrid and vlb.", low=0)
    decoder: Literal["exact", "improved_diffusion", "continuous"] = option(
        "exact",
        "How the bound counts the first step: the mass of a level's bin, exactly or by improved-diffusion's"
        " approximation, or the density of continuous data.",
    )
    bin_width: float | None = option(
        None, "Distance of two levels of the data, in data units.", above=0, high=2, unset="that of the images"
    )
    perceptual_model: str | None = option(
        None, "Backbone of the perceptual loss: folder or Hub id of a vision model of `transformers`."
    )
    perceptual_weight: float = option(
        0.5, "Share of the features in the perceptual loss; the rest is l2.", low=0, high=1
    )


@dataclass(frozen=True)
class OptimOptions:
    """AdamW and its learning rate. All steps are optimizer steps."""

    learning_rate: float = option(1e-4, "Learning rate after the warm-up.", above=0)
    lr_scaling: Literal["none", "linear", "sqrt"] = option(
        "none",
        "Multiply --learning_rate by the effective batch (linear: CompVis' `scale_lr`), or by its root (sqrt).",
        answers={"true": "say linear", "false": "say none"},
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
    ] = option("cosine", "Course of the learning rate: Diffusers' names, and CompVis' three lambdas.")
    lr_warmup_steps: int = option(500, "Steps from zero to --learning_rate.", low=0)
    lr_scheduler_args: dict[str, Any] | None = option(
        None,
        "Arguments of the course, a JSON object: '{\"power\": 2.0}' for polynomial,"
        ' \'{"warm_up_steps": [100], "f_min": [0.1], ...}\' for LambdaLinearScheduler.',
    )
    adam_beta1: float = option(0.95, "Decay of AdamW's first moment.", low=0, below=1)
    adam_beta2: float = option(0.999, "Decay of AdamW's second moment.", low=0, below=1)
    adam_weight_decay: float = option(1e-6, "Weight decay of the network (the log-variance has none).", low=0)
    adam_epsilon: float = option(1e-8, "AdamW's epsilon.", above=0)
    max_grad_norm: float = option(1.0, "Clip the network's gradient to this norm.", above=0)
    use_8bit_adam: bool = option(False, "AdamW with 8-bit state, of bitsandbytes, which must be installed.")


@dataclass(frozen=True)
class EmaOptions:
    """The moving average of the weights, which is what the saved pipeline samples with."""

    use_ema: bool = option(True, "Keep the average. Without it the raw weights are the default files.")
    ema_decay: float = option(
        0.9999, "Decay a step. Averages about 1 / (1 - decay) steps.", alias=("ema_max_decay",), low=0, below=1
    )
    ema_use_num_updates: bool = option(True, "Warm the decay up: (1 + n) / (10 + n) at the n-th step, as LitEma does.")
    ema_every: Literal["step", "micro_batch"] = option(
        "step",
        "Update once an optimizer step, or once a forward pass: the count of Lightning, and so of CompVis' runs, under"
        " --gradient_accumulation_steps.",
    )


@dataclass(frozen=True)
class LoopOptions:
    """How long, how many at a time, and with which random numbers."""

    train_batch_size: int = option(16, "Images a device and forward pass.", low=1)
    num_epochs: int | None = option(100, "Passes over the images. Replaced by --max_train_steps.", low=1)
    max_train_steps: int | None = option(None, "Optimizer steps of the run.", low=1, unset="--num_epochs decides")
    gradient_accumulation_steps: int = option(1, "Forward passes an optimizer step.", low=1)
    mixed_precision: Literal["no", "fp16", "bf16"] | None = option(
        None, "Precision of the network; noise and loss stay float32.", unset="that of `accelerate launch`, else no"
    )
    gradient_checkpointing: bool = option(
        False, "Compute activations again on the way back: less memory, more time, the same numbers."
    )
    torch_compile: bool = option(
        False, "Compile the network with `torch.compile`. What is saved is the same; the first steps take minutes."
    )
    on_nonfinite: Literal["stop", "skip", "rollback"] = option(
        "stop",
        "When a loss or gradient is not finite: stop; skip the step; or go back to the weights of the newest"
        " checkpoint and on with the next batch. The folder crash/ says what happened. skip and rollback look at every"
        " step, which makes an accelerator wait.",
    )
    seed: int = option(0, "Every random number of the run follows from it.", low=0)
    dry_run: bool = option(False, "Print the plan and stop. Nothing is written.")


@dataclass(frozen=True)
class ValidationOptions:
    """Loss on the held-out images, raw and EMA weights on the same noise."""

    validation_steps: int = option(500, "Validate every so many optimizer steps. 0: only at the end.", low=0)
    validation_bpd: bool = option(
        False,
        "Measure val/bpd too, the variational bound in bits per dimension, which can be monitored. All T steps of an"
        " image cost T calls of the network; each image draws --validation_bpd_steps of them.",
    )
    validation_bpd_steps: int = option(10, "Steps of each image that --validation_bpd looks at; at most T.", low=2)
    validation_max_images: int | None = option(1000, "Validate on at most so many images.", low=1)
    eval_batch_size: int = option(16, "Images at a time in validation and previews.", low=1)


@dataclass(frozen=True)
class OutputOptions:
    """Where the run goes, and what it shows on the way."""

    output_dir: str | None = option(
        None, "Folder of the run and of the trained pipeline.", unset="a fresh one: runs/digits, runs/digits-2, ..."
    )
    overwrite_output_dir: bool = option(False, "Take a folder that is not empty; an earlier run's files in it go.")
    report_to: str = option(
        "tensorboard",
        "Trackers of Accelerate, with commas between: tensorboard, wandb, trackio, mlflow, comet_ml, ...; all that are"
        " installed, or none. They get pictures and histograms, too. metrics.jsonl is always written.",
        alias=("logger",),
    )
    logging_dir: str = option("logs", "Folder of the tracker, inside --output_dir.")
    logging_steps: int = option(
        10,
        "Read the losses back and log them every so many optimizer steps; metrics.jsonl has a row for each step.",
        low=1,
    )
    save_images_epochs: int | None = option(10, "Draw a grid of samples every so many epochs.", low=1)
    save_images_steps: int | None = option(None, "The same, counted in optimizer steps.", low=1)
    num_preview_images: int = option(16, "Images of a grid.", low=1)
    ddpm_num_inference_steps: int = option(1000, "Sampling steps of the grids, at most T.", low=1)
    preview_guidance_scale: float = option(1.0, "Classifier-free guidance of the grids; 1: none.")
    save_model_epochs: int | None = option(10, "Save the pipeline every so many epochs, and at the end.", low=1)


@dataclass(frozen=True)
class CheckpointOptions:
    """Checkpoints, from which a run that died goes on to the bit."""

    checkpointing_steps: int | None = option(
        500, "Write a checkpoint every so many optimizer steps, and after the last.", low=1
    )
    checkpointing_minutes: float | None = option(None, "Write one every so many minutes, too.", above=0)
    checkpoints_total_limit: int | None = option(
        None, "Keep so many of them, the newest, beside the best ones.", low=1, unset="all"
    )
    resume_from_checkpoint: str | None = option(
        None,
        "Go on from a checkpoint in --output_dir: latest, best, or its path. auto: from the latest, or afresh where"
        " there is none; the line for queues and restarts.",
        unset="start afresh",
    )
    allow_config_change: bool = option(False, "Go on though options differ that change the mathematics.")
    max_train_minutes: float | None = option(
        None, "After so many minutes write a checkpoint and end, with status 0.", above=0, unset="no limit"
    )


@dataclass(frozen=True)
class MonitorOptions:
    """Which validation was the best, and when to stop early."""

    monitor: str | None = option(
        None, "Metric to follow, as logged.", unset="val/loss_simple_ema, or val/loss_simple without EMA"
    )
    monitor_mode: Literal["auto", "min", "max"] = option("auto", "Whether smaller or larger is better.")
    save_top_k: int = option(
        1, "Keep the checkpoints of the k best validations, and the best as the folder `best`.", low=0
    )
    early_stopping_patience: int | None = option(
        None, "Stop after so many validations in a row without an improvement.", low=1, unset="never"
    )
    early_stopping_min_delta: float = option(0.0, "What an improvement must gain, in units of the metric.", low=0)


@dataclass(frozen=True)
class HubOptions:
    """The run on the Hugging Face Hub."""

    push_to_hub: bool = option(False, "Push the pipeline with a model card; `ddpm-ext push` does it afterwards.")
    hub_model_id: str | None = option(None, "Name of the repository, or user/name.", unset="the name of --output_dir")
    hub_token: str | None = option(
        None,
        "Of the Hub; never written anywhere, and refused in a file.",
        unset="HF_TOKEN, or what `hf auth login` has left",
    )
    hub_private_repo: bool = option(False, "A repository that is made new is private.")
    hub_strategy: Literal["end", "every_save", "checkpoint"] = option(
        "end",
        "end: push once, at the end. every_save: whenever the pipeline is saved, in the background, too. checkpoint:"
        " with the newest checkpoint besides, for --resume_from_hub.",
    )
    resume_from_hub: str | None = option(
        None,
        "Go on from the checkpoint that a run with --hub_strategy checkpoint has pushed last, on a new machine, too:"
        " user/name.",
        unset="start afresh",
    )


SECTIONS: dict[str, type] = {
    "data": DataOptions,
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
"""Flag or key, aliases included -> name of the option."""
