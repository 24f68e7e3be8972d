"""Options as a user meets them: names, defaults, and how text becomes a value."""

from __future__ import annotations

import json

import numpy as np
import pytest

from diffusers_ddpm_ext.errors import ConfigError
from diffusers_ddpm_ext.training.config.options import OPTIONS
from diffusers_ddpm_ext.training.config.train_config import TrainConfig, parse_train_args

FLAGS = """
vae vae_subfolder scale_factor scale_by_std latent_stats latent_mode concat_through_vae
cache_latents cache_latents_dtype
dataset_weights class_balance cache_images class_names
streaming shuffle_buffer validation_examples array_key array_layout data_range preview_channels
train_data_dir dataset_name dataset_config_name image_column cache_dir validation_fraction validation_split
validation_data_dir resolution center_crop random_flip
resize resize_filter random_crop random_crop_scale vertical_flip rotate90 background
channels skip_bad_images dataloader_num_workers
model_config_name_or_path block_out_channels layers_per_block attention_levels attention_head_dim norm_num_groups
dropout num_train_timesteps beta_schedule beta_start beta_end cosine_s trained_betas rescale_betas_zero_snr
prediction_type
variance_type v_posterior clip_sample clip_sample_range thresholding dynamic_thresholding_ratio sample_max_value
timestep_spacing steps_offset
loss_type huber_c l_simple_weight original_elbo_weight elbo_weights learn_logvar logvar_init logvar_learning_rate
logvar_kind loss_weighting p2_k p2_gamma timestep_sampler log_snr_mean log_snr_std vlb_weight decoder bin_width
perceptual_model perceptual_weight validation_bpd validation_bpd_steps
snr_gamma learning_rate lr_scheduler lr_warmup_steps lr_scheduler_args adam_beta1 adam_beta2 adam_weight_decay
adam_epsilon
max_grad_norm
use_ema ema_decay ema_use_num_updates ema_every ema_dtype offload_ema lr_scaling use_8bit_adam
fast_attention gradient_checkpointing torch_compile torch_compile_mode channels_last num_threads on_nonfinite
train_batch_size num_epochs max_train_steps gradient_accumulation_steps mixed_precision seed dry_run
validation_steps validation_max_images eval_batch_size
validation_metrics validation_samples feature_extractor trust_feature_extractor
checkpointing_steps checkpointing_minutes checkpoints_total_limit resume_from_checkpoint allow_config_change
max_train_minutes monitor monitor_mode save_top_k early_stopping_patience early_stopping_min_delta
output_dir overwrite_output_dir report_to logging_dir logging_steps save_images_epochs save_images_steps
num_preview_images ddpm_num_inference_steps save_model_epochs
text_encoder text_encoder_subfolder text_encoder_config tokenizer train_text_encoder cache_text_embeddings
preview_prompts class_column concat_column context_column caption_column conditioning_dropout model_config
conditioning_key num_class_embeds use_positional_encodings preview_guidance_scale
ckpt_path ckpt_config ignore_keys load_only_unet reset_ema reset_num_ema_updates make_it_fit
push_to_hub hub_model_id hub_token hub_private_repo hub_strategy resume_from_hub
"""  # a frozen surface: a name that goes is a user's broken script

# what train_unconditional.py of Diffusers 0.42 says, where it has the option (its EMA is off, ours on)
STOCK_DEFAULTS = {
    "resolution": 64,
    "center_crop": False,
    "random_flip": False,
    "train_batch_size": 16,
    "eval_batch_size": 16,
    "dataloader_num_workers": 0,
    "num_epochs": 100,
    "save_images_epochs": 10,
    "save_model_epochs": 10,
    "checkpointing_steps": 500,
    "gradient_accumulation_steps": 1,
    "learning_rate": 1e-4,
    "lr_scheduler": "cosine",
    "lr_warmup_steps": 500,
    "adam_beta1": 0.95,
    "adam_beta2": 0.999,
    "adam_weight_decay": 1e-6,
    "adam_epsilon": 1e-8,
    "ema_max_decay": 0.9999,
    "logger": "tensorboard",
    "logging_dir": "logs",
    "prediction_type": "epsilon",
    "ddpm_num_steps": 1000,
    "ddpm_num_inference_steps": 1000,
    "ddpm_beta_schedule": "linear",
}
STOCK_UNET = {"block_out_channels": (128, 128, 256, 256, 512, 512), "attention_levels": (4,), "layers_per_block": 2}
# flags of that script that mean something else here, or nothing yet
STOCK_REFUSED = {
    "ema_inv_gamma": "--ema_decay",
    "ema_power": "--ema_decay",
    "local_rank": "torchrun",
    "enable_xformers_memory_efficient_attention": "PyTorch",
    "preserve_input_precision": "keep their values",
}
STOCK_OTHERS = (
    "dataset_name dataset_config_name model_config_name_or_path train_data_dir output_dir overwrite_output_dir"
    " cache_dir use_ema mixed_precision checkpoints_total_limit resume_from_checkpoint"
)
# parameters of CompVis' DDPM.__init__ (with those of Stability-AI/stablediffusion)
COMPVIS = {
    "unet_config": "--model_config_name_or_path",
    "timesteps": "--num_train_timesteps",
    "first_stage_key": "--image_column",
    "image_size": "--resolution",
    "log_every_t": "DDPMExtPipeline",
    "clip_denoised": "--clip_sample",
    "linear_start": "--beta_start",
    "linear_end": "--beta_end",
    "given_betas": "--trained_betas",
    "parameterization": "--prediction_type",
    "scheduler_config": "--lr_scheduler",
    "ucg_training": "--conditioning_dropout",
}
COMPVIS_SAME = (
    "monitor beta_schedule loss_type use_ema channels cosine_s original_elbo_weight l_simple_weight v_posterior"
    " learn_logvar logvar_init ckpt_path ignore_keys load_only_unet make_it_fit reset_ema reset_num_ema_updates"
    " conditioning_key use_positional_encodings"
)


@pytest.fixture(autouse=True)
def _photos(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.png").touch()


def parsed(*flags: str) -> dict:
    config = parse_train_args(["--train_data_dir", "photos", *flags])
    return {name: getattr(getattr(config, option.section), name) for name, option in OPTIONS.items()}


def refusal(*flags: str) -> str:
    with pytest.raises(ConfigError) as caught:
        parse_train_args(flags)
    return str(caught.value)


def test_names_are_frozen():
    assert set(OPTIONS) == set(FLAGS.split())


def test_every_option_teaches():
    for option in OPTIONS.values():
        assert option.metadata["help"].endswith("."), option.name


def test_defaults_are_those_of_train_unconditional():
    aliases = {alias: o.name for o in OPTIONS.values() for alias in o.metadata["alias"]}
    ours = parsed()
    assert ours.pop("resolution") == (64, 64)
    for name, value in STOCK_DEFAULTS.items():
        if name != "resolution":
            assert ours[aliases.get(name, name)] == value, name
    assert {name: ours[name] for name in STOCK_UNET} == STOCK_UNET
    assert ours["use_ema"]


@pytest.mark.parametrize(("name", "told"), [*STOCK_REFUSED.items(), *COMPVIS.items()])
def test_other_words_are_answered(name, told):
    message = refusal(f"--{name}", "1")
    assert message.startswith(f"--{name}")
    assert told in message


@pytest.mark.parametrize("name", [*STOCK_DEFAULTS, *STOCK_OTHERS.split(), *COMPVIS_SAME.split()])
def test_shared_words_are_accepted(name):
    aliases = {alias for option in OPTIONS.values() for alias in option.metadata["alias"]}
    assert name in {*OPTIONS, *aliases}


@pytest.mark.parametrize(
    ("flags", "name", "value"),
    [
        (["--learning_rate", "1e-3"], "learning_rate", 1e-3),
        (["--learning_rate=1e-3"], "learning_rate", 1e-3),
        (["--learning-rate", "1e-3"], "learning_rate", 1e-3),
        (["--logvar_init", "-1.5"], "logvar_init", -1.5),
        (["--ddpm_num_steps", "50"], "num_train_timesteps", 50),
        (["--logger", "none"], "report_to", "none"),
        (["--ema_max_decay", "0.99"], "ema_decay", 0.99),
        (["--use_ema"], "use_ema", True),
        (["--use_ema", "true"], "use_ema", True),
        (["--use_ema", "False"], "use_ema", False),
        (["--use_ema=no"], "use_ema", False),
        (["--no_use_ema"], "use_ema", False),
        (["--no-use-ema"], "use_ema", False),
        (["--center_crop"], "center_crop", True),
        (["--no_center_crop"], "center_crop", False),
        (["--seed", "1", "--seed", "2"], "seed", 2),
        (["--resolution", "32"], "resolution", (32, 32)),
        (["--resolution", "32", "64"], "resolution", (32, 64)),
        (["--resolution", "32x64"], "resolution", (32, 64)),
        (["--block_out_channels", "32", "64"], "block_out_channels", (32, 64)),
        (["--block_out_channels", "32,64"], "block_out_channels", (32, 64)),
        (["--attention_levels", "none"], "attention_levels", ()),
        (["--validation_max_images", "none"], "validation_max_images", None),
        (["--trained_betas", "[0.1, 0.2, 1]"], "trained_betas", (0.1, 0.2, 1.0)),
        (["--mixed_precision", "no"], "mixed_precision", "no"),
        (
            ["--lr_scheduler", "polynomial", "--lr_scheduler_args", '{"power": 2.0}'],
            "lr_scheduler_args",
            {"power": 2.0},
        ),
    ],
)
def test_text_becomes_a_value(flags, name, value):
    prediction = ["--prediction_type", "v_prediction"]  # the betas above end in zero terminal SNR
    assert parsed(*flags, *prediction)[name] == value


@pytest.mark.parametrize("suffix", [".json", ".npy"])
def test_betas_from_a_file(tmp_path, suffix):
    betas = np.linspace(0.01, 0.3, 200)
    path = tmp_path / f"betas{suffix}"
    np.save(path, betas) if suffix == ".npy" else path.write_text(json.dumps(betas.tolist()))
    ours = parsed("--trained_betas", str(path))
    assert ours["trained_betas"] == tuple(betas.tolist())
    assert ours["num_train_timesteps"] == ours["ddpm_num_inference_steps"] == 200


def test_no_abbreviations():
    assert "--learning_rate" in refusal("--learning_rat", "1")
    assert "--max_train_steps" in refusal("--max_train_step", "1")


def test_last_word_counts_but_spellings_must_agree():
    assert "contradicts" in refusal("--use_ema", "--no_use_ema")
    assert "contradicts" in refusal("--ddpm_num_steps", "10", "--num_train_timesteps", "20")
    assert parsed("--ddpm_num_steps", "10", "--num_train_timesteps", "10")["num_train_timesteps"] == 10


def test_options_are_not_mutable():
    config = TrainConfig.from_flat({})
    with pytest.raises(AttributeError):
        config.loop.seed = 5  # type: ignore[misc]
