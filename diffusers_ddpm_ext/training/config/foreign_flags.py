"""Flags of CompVis and of Diffusers' scripts that have another name here, and the hints of their error messages.

An unknown flag is always an error. Where an equivalent exists, the message names it.
"""

from __future__ import annotations

# theirs -> ours, same meaning
RENAMED = {
    # CompVis' DDPM and its main.py
    "timesteps": "num_train_timesteps",
    "linear_start": "beta_start",
    "linear_end": "beta_end",
    "given_betas": "trained_betas",
    "image_size": "resolution",
    "clip_denoised": "clip_sample",
    "first_stage_key": "image_column",
    "base": "config",
    "logdir": "output_dir",
    "max_epochs": "num_epochs",
    "max_steps": "max_train_steps",
    "accumulate_grad_batches": "gradient_accumulation_steps",
    "base_learning_rate": "learning_rate",
    "batch_size": "train_batch_size",
    "num_workers": "dataloader_num_workers",
    "model_channels": "block_out_channels",
    "num_res_blocks": "layers_per_block",
    "num_head_channels": "attention_head_dim",
    # Diffusers' other scripts, transformers, improved-diffusion
    "num_train_epochs": "num_epochs",
    "epochs": "num_epochs",
    "steps": "max_train_steps",
    "per_device_train_batch_size": "train_batch_size",
    "per_device_eval_batch_size": "eval_batch_size",
    "lr": "learning_rate",
    "warmup_steps": "lr_warmup_steps",
    "weight_decay": "adam_weight_decay",
    "min_snr_gamma": "snr_gamma",
    "schedule_sampler": "timestep_sampler",
    "rescale_zero_terminal_snr": "rescale_betas_zero_snr",
    "zero_terminal_snr": "rescale_betas_zero_snr",
    "instance_data_dir": "train_data_dir",
    "data_dir": "train_data_dir",
    "dataset": "dataset_name",
    "noise_schedule": "beta_schedule",
    "diffusion_steps": "num_train_timesteps",
    "ema_rate": "ema_decay",
    "ema_max_decay_rate": "ema_decay",
    "no_ema": "no_use_ema",
    "num_inference_steps": "ddpm_num_inference_steps",
    "validation_batch_size": "eval_batch_size",
    "log_every_n_steps": "logging_steps",
    "val_check_interval": "validation_steps",
    "gradient_clip_val": "max_grad_norm",
    "precision": "mixed_precision",
}

# theirs -> hint
HINTS = {
    "parameterization": "use --prediction_type (eps is epsilon, x0 is sample, v is v_prediction)",
    "unet_config": "use --model_config_name_or_path with a UNet2DModel JSON, or sizes such as --block_out_channels",
    "scheduler_config": "use --lr_scheduler and --lr_scheduler_args",
    "attention_resolutions": "use --attention_levels (0 is the full resolution, 1 half of it, ...)",
    "channel_mult": "use --block_out_channels with the widths themselves",
    "log_every_t": "it is an argument of DDPMExtPipeline's call; a training run logs its own denoising rows",
    "gpus": "choose devices with `accelerate launch`",
    "devices": "choose devices with `accelerate launch`",
    "local_rank": "start processes with `accelerate launch` or `torchrun`, which set LOCAL_RANK",
    "ema_inv_gamma": "use --ema_decay and --ema_use_num_updates (warm-up (1 + n) / (10 + n))",
    "ema_power": "use --ema_decay and --ema_use_num_updates (warm-up (1 + n) / (10 + n))",
    "enable_xformers_memory_efficient_attention": "leave it out: PyTorch's own memory-efficient attention is in use",
    "preserve_input_precision": "leave it out: images of any depth and number of channels keep their values",
    "scale_lr": "use --lr_scaling linear",
    "validation_epochs": "use --validation_steps, in optimizer steps",
    "predict_xstart": "use --prediction_type sample",
    "use_fp16": "use --mixed_precision fp16",
    "fp16": "use --mixed_precision fp16",
    "bf16": "use --mixed_precision bf16",
    "learn_sigma": "use --variance_type learned_range with --loss_type hybrid",
    "use_kl": "use --loss_type vlb",
    "rescale_learned_sigmas": "use --loss_type hybrid, whose bound has that factor; --vlb_weight changes it",
    "sigma_small": "use --variance_type fixed_small",
    "pretrained_model_name_or_path": "use --ckpt_path for the weights of a checkpoint or a pipeline's folder",
    "ucg_training": "use --conditioning_dropout '{\"class_labels\": 0.1}'",
    "class_conditional": "use --conditioning_key adm, and --class_column",
    "seed_everything": "use --seed",
    "resume": "use --resume_from_checkpoint latest, or auto",
    "scheduler": "use --lr_scheduler for the learning rate, --beta_schedule for the noise",
}

UNSUPPORTED = {
    # precision
    "allow_tf32",
    # original checkpoints, conditioning, other objectives
    "noise_offset", "input_perturbation",
}  # fmt: skip


def explain_foreign_flag(name: str) -> str | None:
    """Return the error message for a flag of another program (without dashes), or None if it is not known."""
    if name in RENAMED:
        return f"--{name}: use --{RENAMED[name]}"
    if name in HINTS:
        return f"--{name}: {HINTS[name]}"
    if name in UNSUPPORTED or name.removeprefix("no_") in UNSUPPORTED or name.startswith("hub_"):
        return f"--{name} is not supported yet: leave it out"
    return None
