"""Names in original configurations (classes, parameters, keys of a run) and their counterparts here.

Classes are listed by the last part of their path; nothing is imported.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable
from typing import Any

# Model class -> whether it works on latents, with LatentDiffusion's rules.
IS_LATENT: dict[str, bool] = {"DDPM": False} | dict.fromkeys(
    ("LatentDiffusion", "LatentFinetuneDiffusion", "LatentInpaintDiffusion", "LatentDepth2ImageDiffusion",
     "LatentUpscaleDiffusion", "LatentUpscaleFinetuneDiffusion", "ImageEmbeddingConditionedLatentDiffusion",
     "Layout2ImgDiffusion", "LatentDiffusionSRTextWT", "LatentDiffusionSRTextWTFFHQ"), True,
)  # fmt: skip
IDENTITY_FIRST_STAGE = "IdentityFirstStage"
AUTOENCODERS = ("AutoencoderKL", "AutoencoderKLResi", "VQModel", "VQModelInterface", IDENTITY_FIRST_STAGE)
OTHER_NETWORKS = {
    "UNetModelDualcondV2": "UNetModelDualcondV2 takes features of StableSR's structure encoder (semb_channels), which "
    "no Diffusers network does.",
    "EncoderUNetModel": "EncoderUNetModel is the encoder half of a network, for a classifier.",
    "EncoderUNetModelWT": "EncoderUNetModelWT is the structure encoder of StableSR.",
}
# Conditioning stages that are converted -> their counterparts here.
TEXT_ENCODER = "pipeline.text_encoder; --text_encoder"
CONDITIONERS = {
    **dict.fromkeys(
        ("FrozenCLIPEmbedder", "FrozenOpenCLIPEmbedder", "BERTEmbedder", "TransformerEmbedder", "FrozenT5Embedder"),
        TEXT_ENCODER,
    ),
    "SpatialRescaler": "pipeline.concat_encoder; concat_images are its input",
    **dict.fromkeys(
        ("FrozenClipImageEmbedder", "ClipImageEmbedder", "FrozenCLIPImageEmbedder", "FrozenOpenCLIPImageEmbedder"),
        "pipeline.image_encoder; image is its input",
    ),
}
# Parameters of LatentDiffusion's subclasses, which these need where they are built.
SUBCLASS_PARAMS = (
    "concat_keys", "masked_image_key", "depth_stage_config", "low_scale_config", "low_scale_key", "noise_level_key",
    "reshuffle_patch_size", "embedder_config", "embedding_key", "embedding_dropout", "freeze_embedder",
    "noise_aug_config",
)  # fmt: skip
FINETUNED = ("LatentFinetuneDiffusion", "LatentInpaintDiffusion", "LatentDepth2ImageDiffusion",
             "LatentUpscaleFinetuneDiffusion")  # fmt: skip
LR_LAMBDAS = ("LambdaWarmUpCosineScheduler", "LambdaWarmUpCosineScheduler2", "LambdaLinearScheduler")
# Parameters that are options of the same names here.
NEEDS_CKPT_PATH = ("ignore_keys", "load_only_unet", "make_it_fit", "reset_ema", "reset_num_ema_updates")
START_PARAMS = ("ckpt_path", *NEEDS_CKPT_PATH, "use_positional_encodings")
PARAMS_WITHOUT_EFFECT = {
    "load_ema": "the EMA of a file is loaded, unless --reset_ema",
    "first_stage_key": "name the images' column with --image_column",
    "cond_stage_key": "name its column by --class_column, --caption_column, --concat_column or --context_column",
    "log_every_t": "pipe(log_every_t=...)",
    "cond_stage_forward": "the method of the conditioning stage: encode and forward are the same",
    "depth_stage_config": "pass the depth as concat_inputs, such as that of transformers' DPTForDepthEstimation",
    "low_scale_config": "pass the noised low-resolution input as concat_inputs, its noise level as class_labels",
    "low_scale_key": "pass the low-resolution input as concat_inputs",
    "embedder_config": "pass the embedding as class_labels",
    "noise_aug_config": "pass the noised embedding, and that of its noise level, as class_labels",
    "embedding_dropout": "--conditioning_dropout",
    "embedding_key": "name the column with --class_column",
    "concat_keys": "name the column with --concat_column",
    "masked_image_key": "name the column with --concat_column",
    "c_concat_log_start": "preview images of a run show the condition",
    "c_concat_log_end": "preview images of a run show the condition",
    "structcond_stage_config": "StableSR's structure encoder is not part of the network",
    "time_replace": "fewer steps: num_inference_steps",
    "mix_ratio": "the published code ignores it",
    "use_usm": "prepare the images before training",
    "usm_prob": "prepare the images before training",
    "random_size": "prepare the images before training",
    "unfrozen_diff": "selects the trained part of StableSR",
    "init_sft": "selects the trained part of StableSR",
    "noise_level_key": "pass the noise level as class_labels",
    "freeze_embedder": "image encoders are not trained here",
    "reshuffle_patch_size": "reshuffle the low-resolution input before passing it as concat_inputs",
    "low_scale_class": "pass the low-resolution input as concat_inputs",
}
PARAMS_REFUSED_UNLESS_EMPTY = {
    "finetune_keys": "widens an input layer while loading: use --make_it_fit",
    "keep_finetune_dims": "widens an input layer while loading: use --make_it_fit",
    "p2_gamma": "forks apply P2 to different errors: leave it out, and use --loss_weighting p2 in the run",
    "p2_k": "forks apply P2 to different errors: leave it out, and use --loss_weighting p2 in the run",
}
KNOWN_PARAMS = (
    "unet_config", "timesteps", "beta_schedule", "loss_type", "monitor", "use_ema", "image_size", "channels",
    "clip_denoised", "linear_start", "linear_end", "cosine_s", "given_betas", "original_elbo_weight", "v_posterior",
    "l_simple_weight", "conditioning_key", "parameterization", "scheduler_config", "learn_logvar", "logvar_init",
    "ucg_training", "first_stage_config", "cond_stage_config", "cond_stage_trainable", "concat_mode", "scale_factor",
    "scale_by_std", "force_null_conditioning", "num_timesteps_cond", *START_PARAMS, *PARAMS_WITHOUT_EFFECT,
    *PARAMS_REFUSED_UNLESS_EMPTY,
)  # fmt: skip

PRECISIONS = {16: "fp16", "16": "fp16", "16-mixed": "fp16", "bf16": "bf16", "bf16-mixed": "bf16", 32: "no", "32": "no"}


def _integer(low: int) -> Callable[[Any], Any]:
    return lambda value: value if isinstance(value, int) and not isinstance(value, bool) and value >= low else None


def _grad_norm(value: Any) -> Any:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return value if is_number and 0 < value < float("inf") else None


def _precision(value: Any) -> str | None:
    return PRECISIONS.get(value) if isinstance(value, int | str) else None


# Key of a run -> our trainer's option, and the conversion of its value, which is None for an unsupported value.
OPTION_OF_KEY: dict[str, tuple[str, Callable[[Any], Any]]] = {
    "data.params.batch_size": ("train_batch_size", _integer(1)),
    "data.params.num_workers": ("dataloader_num_workers", _integer(0)),
    "lightning.trainer.accumulate_grad_batches": ("gradient_accumulation_steps", _integer(1)),
    "lightning.trainer.max_epochs": ("num_epochs", _integer(1)),
    "lightning.trainer.max_steps": ("max_train_steps", _integer(1)),
    "lightning.trainer.gradient_clip_val": ("max_grad_norm", _grad_norm),
    "lightning.trainer.precision": ("mixed_precision", _precision),
    "lightning.modelcheckpoint.params.every_n_train_steps": ("checkpointing_steps", _integer(1)),
    "lightning.modelcheckpoint.params.save_top_k": ("save_top_k", _integer(0)),
    "lightning.callbacks.image_logger.params.batch_frequency": ("save_images_steps", _integer(1)),
    "lightning.callbacks.image_logger.params.max_images": ("num_preview_images", _integer(1)),
}
# Prefix of a key of a run without effect -> the reason.
KEYS_WITHOUT_EFFECT = {
    "data.params.train": "name the images with --train_data_dir or --dataset_name",
    "data.params.validation": "name the held-out images with --validation_data_dir or --validation_split",
    "data.params.test": "a run has no test set",
    "data.params.wrap": "images are repeated to fill a batch",
    "data": "name the images with --train_data_dir or --dataset_name",
    "lightning.callbacks": "previews and checkpoints have their own options: see --help",
    "lightning.modelcheckpoint": "checkpoints have their own options: see --help",
    "lightning.strategy": "accelerate launch chooses the backend",
    "lightning.find_unused_parameters": "every parameter is used",
    "lightning.logger": "--report_to",
    "lightning.trainer.benchmark": "torch's own setting",
    "lightning.trainer.num_sanity_val_steps": "a run checks its network before it starts",
    "lightning.trainer.val_check_interval": "--validation_steps",
    "lightning.trainer": "accelerate launch, or an option: see --help",
}


def why_without_effect(key: str) -> str:
    """The reason why a key of a run has no effect."""
    reasons = (why for prefix, why in KEYS_WITHOUT_EFFECT.items() if key.startswith(prefix))
    return next(reasons, "there is no counterpart here")


def unknown_model(target: str, name: str) -> str:
    """The error message for an unknown ``model.target``."""
    if name in AUTOENCODERS:
        return f"model.target {target} is an autoencoder, not a diffusion model: ddpm-ext convert makes a --vae of it."
    near = difflib.get_close_matches(name, IS_LATENT, n=1)
    hint = f"did you mean {near[0]}?" if near else f"known are {', '.join(IS_LATENT)}."
    return f"model.target {target} is not a known class: {hint} Nothing is imported."
