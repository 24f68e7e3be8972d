"""Names that stand in original configurations, by their last part, and what they are here. Nothing is imported."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from typing import Any

# Class -> whether it works on latents, with LatentDiffusion's rules.
MODELS: dict[str, bool] = {
    "DDPM": False,
    "LatentDiffusion": True,
    "LatentFinetuneDiffusion": True,
    "LatentInpaintDiffusion": True,
    "LatentDepth2ImageDiffusion": True,
    "LatentUpscaleDiffusion": True,
    "LatentUpscaleFinetuneDiffusion": True,
    "ImageEmbeddingConditionedLatentDiffusion": True,
    "Layout2ImgDiffusion": True,
    "LatentDiffusionSRTextWT": True,
    "LatentDiffusionSRTextWTFFHQ": True,
}
AUTOENCODERS = ("AutoencoderKL", "AutoencoderKLResi", "VQModel", "VQModelInterface", "IdentityFirstStage")
OTHER_NETWORKS = {
    "UNetModelDualcondV2": "UNetModelDualcondV2 takes features of StableSR's structure encoder (semb_channels), which "
    "no Diffusers network does.",
    "EncoderUNetModel": "EncoderUNetModel is half a network, of a classifier.",
    "EncoderUNetModelWT": "EncoderUNetModelWT is the structure encoder of StableSR.",
}
COURSES = ("LambdaWarmUpCosineScheduler", "LambdaWarmUpCosineScheduler2", "LambdaLinearScheduler")
# Parameters that are flags of the same names.
START = ("ckpt_path", "ignore_keys", "load_only_unet", "make_it_fit", "reset_ema", "reset_num_ema_updates",
         "use_positional_encodings")  # fmt: skip
OF_A_START = ("ignore_keys", "load_only_unet", "make_it_fit", "reset_ema", "reset_num_ema_updates")
NO_EFFECT = {
    "load_ema": "a file's average is loaded, unless --reset_ema",
    "first_stage_key": "name the images' column with --image_column",
    "cond_stage_key": "name the condition's column with --class_column, --concat_column or --context_column",
    "log_every_t": "pipe(log_every_t=...)",
    "cond_stage_trainable": "conditioning stages are not trained here: their outputs are stored",
    "cond_stage_forward": "conditioning stages are no part of the pipeline",
    "num_timesteps_cond": "1 is all that the published classes use",
    "scale_by_std": "the factor that came of it is scale_factor of the checkpoint",
    "depth_stage_config": "give the depth as concat_inputs",
    "low_scale_config": "give the low-resolution input as concat_inputs, its noise level as class_labels",
    "low_scale_key": "give the low-resolution input as concat_inputs",
    "embedder_config": "give the embedding as class_labels",
    "noise_aug_config": "augment the embedding before it is given",
    "embedding_dropout": "--conditioning_dropout",
    "embedding_key": "name the column with --class_column",
    "concat_keys": "name the column with --concat_column",
    "masked_image_key": "name the column with --concat_column",
    "c_concat_log_start": "pictures of a run show the condition",
    "c_concat_log_end": "pictures of a run show the condition",
    "structcond_stage_config": "StableSR's structure encoder is no part of the network",
    "time_replace": "fewer steps: num_inference_steps",
    "mix_ratio": "the published code does nothing with it",
    "use_usm": "preparation of the images, to be done before",
    "usm_prob": "preparation of the images, to be done before",
    "random_size": "preparation of the images, to be done before",
    "unfrozen_diff": "which part of StableSR is trained",
    "init_sft": "which part of StableSR is trained",
    "noise_level_key": "give the noise level as class_labels",
    "low_scale_class": "give the low-resolution input as concat_inputs",
}
REFUSED_UNLESS_NONE = {
    "finetune_keys": "growing an input layer while loading: --make_it_fit does that",
    "keep_finetune_dims": "growing an input layer while loading: --make_it_fit does that",
    "p2_gamma": "forks weigh different errors by P2: leave it out, and say --loss_weighting p2 in the run",
    "p2_k": "forks weigh different errors by P2: leave it out, and say --loss_weighting p2 in the run",
}
KNOWN_PARAMS = (
    "unet_config", "timesteps", "beta_schedule", "loss_type", "monitor", "use_ema", "image_size", "channels",
    "clip_denoised", "linear_start", "linear_end", "cosine_s", "given_betas", "original_elbo_weight", "v_posterior",
    "l_simple_weight", "conditioning_key", "parameterization", "scheduler_config", "learn_logvar", "logvar_init",
    "ucg_training", "first_stage_config", "cond_stage_config", "concat_mode", "scale_factor",
    "force_null_conditioning", *START, *NO_EFFECT, *REFUSED_UNLESS_NONE,
)  # fmt: skip

# Keys outside of the model that our trainer has a flag for.
LEAVES = {
    "data.params.batch_size": "train_batch_size",
    "data.params.num_workers": "dataloader_num_workers",
    "lightning.trainer.accumulate_grad_batches": "gradient_accumulation_steps",
    "lightning.trainer.max_epochs": "num_epochs",
    "lightning.trainer.max_steps": "max_train_steps",
    "lightning.trainer.gradient_clip_val": "max_grad_norm",
    "lightning.trainer.precision": "mixed_precision",
    "lightning.modelcheckpoint.params.every_n_train_steps": "checkpointing_steps",
    "lightning.modelcheckpoint.params.save_top_k": "save_top_k",
    "lightning.callbacks.image_logger.params.batch_frequency": "save_images_steps",
    "lightning.callbacks.image_logger.params.max_images": "num_preview_images",
}
PRECISIONS = {16: "fp16", "16": "fp16", "16-mixed": "fp16", "bf16": "bf16", "bf16-mixed": "bf16", 32: "no", "32": "no"}


def _from(low: int) -> Callable[[Any], Any]:
    return lambda value: value if isinstance(value, int) and not isinstance(value, bool) and value >= low else None


def _norm(value: Any) -> Any:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return value if number and 0 < value < float("inf") else None


LEAF_VALUES: dict[str, Callable[[Any], Any]] = dict.fromkeys(LEAVES, _from(1)) | {
    "data.params.num_workers": _from(0),
    "lightning.modelcheckpoint.params.save_top_k": _from(0),
    "lightning.trainer.gradient_clip_val": _norm,
    "lightning.trainer.precision": lambda value: PRECISIONS.get(value) if isinstance(value, int | str) else None,
}
# Beginnings of the keys that have no effect, and why.
AROUND = {
    "data.params.train": "name the images with --train_data_dir or --dataset_name",
    "data.params.validation": "name the held-out images with --validation_data_dir or --validation_split",
    "data.params.test": "there is no test set in a run",
    "data.params.wrap": "images are repeated as a batch needs them",
    "data": "name the images with --train_data_dir or --dataset_name",
    "lightning.callbacks": "pictures and checkpoints have flags of their own: see --help",
    "lightning.modelcheckpoint": "checkpoints have flags of their own: see --help",
    "lightning.strategy": "accelerate launch chooses the engine",
    "lightning.find_unused_parameters": "every parameter is used",
    "lightning.logger": "--report_to",
    "lightning.trainer.benchmark": "torch's own setting",
    "lightning.trainer.num_sanity_val_steps": "a run tries its network before it begins",
    "lightning.trainer.val_check_interval": "--validation_steps",
    "lightning.trainer": "accelerate launch, or a flag: see --help",
}
ELSE = "nothing here corresponds to it"


def unknown_model(target: str, name: str) -> str:
    """The sentence for a model's target that is not known."""
    if name in AUTOENCODERS:
        return f"model.target {target} is an autoencoder, no diffusion model: there is nothing here to convert it to."
    near = difflib.get_close_matches(name, MODELS, n=1)
    hint = f"did you mean {near[0]}?" if near else f"known are {', '.join(MODELS)}."
    return f"model.target {target} is not known here: {hint} Nothing that it names is imported."
