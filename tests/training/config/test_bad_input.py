"""A mistake is one `error:` line that names the option, its value and the way out; status 2; nothing is written."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.paths import ROOT
from PIL import Image

from diffusers_ddpm_ext.cli import main

TRAIN = ROOT / "training" / "train.py"
PHOTOS = ["--train_data_dir", "photos", "--resolution", "16", "--block_out_channels", "32", "32"]
UNET = {
    "sample_size": 8,
    "in_channels": 1,
    "out_channels": 1,
    "layers_per_block": 1,
    "block_out_channels": [8, 8],
    "norm_num_groups": 4,
    "attention_head_dim": 8,
    "down_block_types": ["DownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "UpBlock2D"],
}

# command line -> what the line must say, beside being one line
TYPED: dict[str, tuple[list[str], list[str]]] = {
    "unknown flag": (["--learnin_rate", "1"], ["--learnin_rate", "--learning_rate"]),
    "flag that nobody has": (["--zzz"], ["--zzz", "--help"]),
    "abbreviation": (["--max_train", "5"], ["--max_train"]),
    "a word without dashes": (["photos"], ["photos", "dashes"]),
    "CompVis' word": (["--parameterization", "eps"], ["--parameterization", "--prediction_type"]),
    "CompVis' other word": (["--linear_start", "1e-4"], ["--linear_start", "--beta_start"]),
    "resume nothing": (["--resume_from_checkpoint", "latest"], ["--resume_from_checkpoint latest", "--output_dir"]),
    "resume nowhere": (
        ["--resume_from_checkpoint", "gone", "--output_dir", "out"],
        ["--resume_from_checkpoint gone", "latest, best, auto"],
    ),
    "resume and overwrite": (
        ["--resume_from_checkpoint", "auto", "--output_dir", "out", "--overwrite_output_dir"],
        ["--overwrite_output_dir", "--resume_from_checkpoint auto"],
    ),
    "change of nothing": (["--allow_config_change"], ["--allow_config_change", "--resume_from_checkpoint"]),
    "no checkpoint interval": (["--checkpointing_steps", "0"], ["--checkpointing_steps", "at least 1"]),
    "no checkpoint stays": (["--checkpoints_total_limit", "0"], ["--checkpoints_total_limit", "at least 1"]),
    "unknown metric": (["--monitor", "val/fid"], ["--monitor val/fid", "val/loss_simple_ema"]),
    "no patience": (["--early_stopping_patience", "0"], ["--early_stopping_patience", "at least 1"]),
    "how to publish": (["--hub_strategy", "all"], ["--hub_strategy", "every_save", "checkpoint"]),
    "two places to go on from": (
        ["--resume_from_hub", "a/b", "--resume_from_checkpoint", "latest"],
        ["--resume_from_checkpoint", "--resume_from_hub", "contradict"],
    ),
    "a run deleted for one that may not come": (
        ["--resume_from_hub", "a/b", "--output_dir", "run", "--overwrite_output_dir"],
        ["--overwrite_output_dir", "--resume_from_hub a/b", "new --output_dir"],
    ),
    "stock's other average": (["--ema_power", "0.75"], ["--ema_power", "--ema_decay"]),
    "no value": (["--learning_rate"], ["--learning_rate", "argument"]),
    "text for a number": (["--learning_rate", "fast"], ["--learning_rate", "'fast'", "a number"]),
    "fraction for a count": (["--max_train_steps", "1.5"], ["--max_train_steps", "'1.5'", "whole number"]),
    "not a number": (["--learning_rate", "nan"], ["--learning_rate", "nan"]),
    "infinite": (["--logvar_init", "inf"], ["--logvar_init", "inf"]),
    "negative rate": (["--learning_rate", "-1"], ["--learning_rate", "above 0", "-1"]),
    "no images a batch": (["--train_batch_size", "0"], ["--train_batch_size", "at least 1", "0"]),
    "no steps": (["--max_train_steps", "0"], ["--max_train_steps", "at least 1"]),
    "no accumulation": (["--gradient_accumulation_steps", "0"], ["--gradient_accumulation_steps", "at least 1"]),
    "negative workers": (["--dataloader_num_workers", "-1"], ["--dataloader_num_workers", "at least 0"]),
    "neither true nor false": (["--use_ema", "maybe"], ["--use_ema", "'maybe'", "true or false"]),
    "switch with a value": (["--no_use_ema=1"], ["--no_use_ema"]),
    "three sizes": (["--resolution", "8", "8", "8"], ["--resolution", "one or two"]),
    "JSON": (["--lr_scheduler_args", "{"], ["--lr_scheduler_args", "JSON"]),
    "prediction type": (["--prediction_type", "noise"], ["--prediction_type", "'noise'", "epsilon, sample, v_pred"]),
    "CompVis' prediction type": (["--prediction_type", "eps"], ["--prediction_type", "'eps'", "epsilon"]),
    "schedule": (["--beta_schedule", "cosine"], ["--beta_schedule", "'cosine'", "squaredcos_cap_v2"]),
    "features of nothing": (["--loss_type", "perceptual"], ["--loss_type perceptual", "--perceptual_model"]),
    "features for nothing": (["--perceptual_weight", "0.3"], ["--perceptual_weight", "--loss_type perceptual"]),
    "no such backbone": (
        ["--loss_type", "perceptual", "--perceptual_model", "nowhere/here"],
        ["perceptual_model", "vision model"],
    ),
    "hybrid, fixed": (["--loss_type", "hybrid"], ["--loss_type hybrid", "--variance_type learned_range"]),
    "learned variance": (["--variance_type", "learned"], ["--variance_type learned", "--loss_type hybrid"]),
    "learned range": (["--variance_type", "learned_range"], ["--variance_type learned_range", "--loss_type hybrid"]),
    "learned and dialled": (
        ["--variance_type", "learned_range", "--loss_type", "hybrid", "--v_posterior", "0.5"],
        ["--v_posterior 0.5", "--variance_type learned_range"],
    ),
    "weights of the bound": (["--loss_type", "vlb", "--snr_gamma", "5"], ["--snr_gamma", "--loss_type vlb"]),
    "logvar of the bound": (["--loss_type", "vlb", "--learn_logvar"], ["--learn_logvar", "--loss_type vlb"]),
    "gamma elsewhere": (["--loss_weighting", "p2", "--snr_gamma", "5"], ["--snr_gamma", "--loss_weighting p2"]),
    "p2 without p2": (["--p2_k", "2"], ["--p2_k", "--loss_weighting p2"]),
    "no weighting": (["--loss_weighting", "snr"], ["--loss_weighting", "soft_min_snr"]),
    "no sampler": (["--timestep_sampler", "gaussian"], ["--timestep_sampler", "log_snr_normal"]),
    "mean of nothing": (["--log_snr_mean", "1"], ["--log_snr_mean", "--timestep_sampler log_snr_normal"]),
    "mean outside": (
        ["--timestep_sampler", "log_snr_normal", "--log_snr_mean", "500"],
        ["log_snr_mean", "outside the chain's log-SNR"],
    ),
    "kind of nothing": (["--no_learn_logvar", "--logvar_kind", "continuous"], ["--logvar_kind", "--learn_logvar"]),
    "bins of nothing": (["--bin_width", "0.1"], ["--bin_width", "--validation_bpd"]),
    "bound not measured": (["--monitor", "val/bpd"], ["--monitor val/bpd", "val/loss_simple"]),
    "a bound of no images": (["--validation_bpd", "--validation_fraction", "0"], ["--validation_bpd", "held out"]),
    "one step of a bound": (["--validation_bpd", "--validation_bpd_steps", "1"], ["--validation_bpd_steps", "2"]),
    "steps of no bound": (["--validation_bpd_steps", "5"], ["--validation_bpd_steps", "--validation_bpd"]),
    "precision": (["--mixed_precision", "fp8"], ["--mixed_precision", "'fp8'", "bf16"]),
    "tracker among several": (["--report_to", "tensorboard,paper"], ["'tensorboard,paper'", "wandb"]),
    "no tracker and one": (["--report_to", "none,tensorboard"], ["'none,tensorboard'", "alone"]),
    "tracker": (["--report_to", "paper"], ["--report_to", "'paper'", "tensorboard"]),
    "no noise steps": (["--num_train_timesteps", "0"], ["--num_train_timesteps", "at least 1", "0"]),
    "beta of 0": (["--beta_start", "0"], ["--beta_start", "above 0"]),
    "beta of 2": (["--beta_end", "2"], ["--beta_end", "below 1", "2"]),
    "given beta of 2": (["--trained_betas", "[0.1, 2, 0.3]"], ["--trained_betas", "2.0", "between 1e-12 and 1"]),
    "no betas": (["--trained_betas", "[]"], ["--trained_betas"]),
    "betas from nowhere": (["--trained_betas", "no.json"], ["--trained_betas", "no.json"]),
    "betas and their number": (
        ["--trained_betas", "[0.1, 0.2]", "--num_train_timesteps", "3"],
        ["--num_train_timesteps 3", "2 betas"],
    ),
    "betas and a shape": (["--trained_betas", "[0.1]", "--beta_start", "0.1"], ["--beta_start", "--trained_betas"]),
    "zero terminal SNR with epsilon": (
        ["--rescale_betas_zero_snr", "--prediction_type", "epsilon"],
        ["--prediction_type epsilon", "v_prediction"],
    ),
    "last beta of 1 with epsilon": (
        ["--trained_betas", "[0.1, 1]", "--prediction_type", "epsilon"],
        ["--prediction_type epsilon", "last beta of 1"],
    ),
    "v_posterior above 1": (["--v_posterior", "1.5"], ["--v_posterior", "at most 1", "1.5"]),
    "v_posterior below 0": (["--v_posterior", "-0.1"], ["--v_posterior", "at least 0", "-0.1"]),
    "v_posterior and a log variance": (
        ["--v_posterior", "0.5", "--variance_type", "fixed_small_log"],
        ["--v_posterior 0.5", "fixed_small_log"],
    ),
    "more sampling steps than T": (
        ["--num_train_timesteps", "10", "--ddpm_num_inference_steps", "11"],
        ["--ddpm_num_inference_steps 11", "10"],
    ),
    "offset beyond T": (["--steps_offset", "1", "--ddpm_num_inference_steps", "1000"], ["--steps_offset 1", "1000"]),
    "no loss left": (["--l_simple_weight", "0"], ["--l_simple_weight 0", "--original_elbo_weight 0"]),
    "gamma of 0": (["--snr_gamma", "0"], ["--snr_gamma", "above 0"]),
    "rate of nothing": (
        ["--no_learn_logvar", "--logvar_learning_rate", "0.1"],
        ["--logvar_learning_rate 0.1", "--learn_logvar"],
    ),
    "decay of nothing": (["--no_use_ema", "--ema_decay", "0.9"], ["--ema_decay 0.9", "--use_ema"]),
    "decay of 1": (["--ema_decay", "1"], ["--ema_decay", "below 1"]),
    "huber's c without huber": (["--huber_c", "0.2"], ["--huber_c 0.2", "--loss_type huber"]),
    "two spellings": (["--use_ema", "--no_use_ema"], ["--no_use_ema", "--use_ema"]),
    "two ends": (["--num_epochs", "1", "--max_train_steps", "5"], ["--num_epochs", "--max_train_steps"]),
    "two kinds of pictures' times": (
        ["--save_images_epochs", "1", "--save_images_steps", "5"],
        ["--save_images_epochs", "--save_images_steps"],
    ),
    "two sources": (["--train_data_dir", "photos", "--dataset_name", "a/b"], ["--train_data_dir", "--dataset_name"]),
    "two validations": (
        [*PHOTOS, "--validation_fraction", "0.1", "--validation_data_dir", "photos"],
        ["--validation_fraction", "--validation_data_dir"],
    ),
    "validation folder for the digits": (["--validation_data_dir", "photos"], ["--validation_data_dir", "digits"]),
    "split of a folder": ([*PHOTOS, "--validation_split", "test"], ["--validation_split test", "--dataset_name"]),
    "column of a folder": ([*PHOTOS, "--image_column", "img"], ["--image_column img", "--dataset_name"]),
    "everything held out": (["--validation_fraction", "1"], ["--validation_fraction", "below 1"]),
    "two models": (
        ["--model_config_name_or_path", "unet.json", "--layers_per_block", "1"],
        ["--model_config_name_or_path", "--layers_per_block"],
    ),
    "course without arguments": (
        ["--lr_scheduler", "cosine", "--lr_scheduler_args", '{"power": 1}'],
        ["--lr_scheduler_args 'power'", "cosine takes no arguments"],
    ),
    "course with the wrong ones": (
        ["--lr_scheduler", "polynomial", "--lr_scheduler_args", '{"pwer": 1}'],
        ["'pwer'", "power"],
    ),
    "lambda without its arguments": (
        ["--lr_scheduler", "LambdaLinearScheduler"],
        ["LambdaLinearScheduler", "--lr_scheduler_args", "cycle_lengths"],
    ),
    "lambda with wrong values": (
        [
            "--lr_scheduler",
            "LambdaWarmUpCosineScheduler",
            "--lr_scheduler_args",
            '{"warm_up_steps": 9, "lr_min": 0, "lr_max": 1, "lr_start": 0, "max_decay_steps": 5}',
        ],
        ["--lr_scheduler_args", "max_decay_steps=5"],
    ),
    "warm-up that has no effect": (
        ["--lr_scheduler", "constant", "--lr_warmup_steps", "5"],
        ["--lr_warmup_steps 5", "constant_with_warmup"],
    ),
    "groups": (
        ["--block_out_channels", "24", "48", "--norm_num_groups", "32"],
        ["--norm_num_groups 32", "24", "use 8"],
    ),
    "level that is not there": (["--attention_levels", "2"], ["--attention_levels 2", "0 to 1"]),
    "heads": (["--attention_head_dim", "24"], ["--attention_head_dim 24", "64", "use 8"]),
    "digits that cannot be halved": (
        ["--block_out_channels", "8", "8", "8", "8", "8"],
        ["--resolution 8", "multiple of 16"],
    ),
    "size that cannot be halved": ([*PHOTOS, "--resolution", "15"], ["--resolution 15", "multiple of 2"]),
    "second size that cannot be halved": ([*PHOTOS, "--resolution", "16", "15"], ["--resolution 15"]),
    "missing folder": (["--train_data_dir", "no_such"], ["--train_data_dir no_such", "does not exist"]),
    "file for a folder": (["--train_data_dir", "notes.txt"], ["--train_data_dir notes.txt", "is a file"]),
    "empty folder": (["--train_data_dir", "empty"], ["--train_data_dir empty", "empty"]),
    "missing validation folder": (
        [*PHOTOS, "--validation_data_dir", "no_such"],
        ["--validation_data_dir no_such", "does not exist"],
    ),
    "output folder in use": (
        ["--output_dir", "photos"],
        ["--output_dir photos", "not empty", "--overwrite_output_dir"],
    ),
    "output folder is a file": (["--output_dir", "notes.txt"], ["--output_dir notes.txt", "is a file"]),
    "output folder below a file": (["--output_dir", "notes.txt/a/b"], ["--output_dir notes.txt/a/b", "is a file"]),
    "overwrite nothing": (["--overwrite_output_dir"], ["--overwrite_output_dir", "--output_dir"]),
    "missing file of options": (["--config", "no.yaml"], ["--config no.yaml", "recipe"]),
    "folder for a file of options": (["--config", "photos"], ["--config photos"]),
    "picture for a file of options": (["--config", "photos/0.png"], ["--config photos/0.png", "not text"]),
    "unknown key": (["--config", "unknown.yaml"], ["unknown.yaml", "learnin_rate", "learning_rate"]),
    "key twice": (["--config", "twice.yaml"], ["twice.yaml", "seed", "twice"]),
    "wrong type in a file": (["--config", "type.yaml"], ["type.yaml", "seed", "'a lot'"]),
    "list for options": (["--config", "list.yaml"], ["list.yaml", "name: value"]),
}
# these are found by looking at the images or the model: it takes the whole program
LOOKED_AT: dict[str, tuple[list[str], list[str]]] = {
    "folder without images": (["--train_data_dir", "texts"], ["--train_data_dir", "texts"]),
    "broken image": (["--train_data_dir", "broken"], ["broken.png", "--skip_bad_images"]),
    "truncated image": (["--train_data_dir", "truncated"], ["cut.png", "--skip_bad_images"]),
    "mixed channels": (["--train_data_dir", "mixed"], ["--channels"]),
    "16-bit and 8-bit images": (["--train_data_dir", "deep"], ["'deep.png' is uint16", "'shallow.png' is uint8"]),
    "32-bit image": (["--train_data_dir", "wide"], ["wide.tiff", "int32", "--data_range"]),
    "float image": (["--train_data_dir", "floating"], ["float.tiff", "from 0 to 1", "--data_range"]),
    "two channels": ([*PHOTOS, "--channels", "2"], ["--channels 2", "color (3)"]),
    "no such dataset": (["--dataset_name", "./no_such_dataset"], ["--dataset_name", "no_such_dataset"]),
    "no such model": (["--model_config_name_or_path", "no.json"], ["--model_config_name_or_path", "no.json"]),
    "not a model": (["--model_config_name_or_path", "list.yaml"], ["--model_config_name_or_path", "list.yaml"]),
    "model with other channels": (["--model_config_name_or_path", "rgb.json"], ["in_channels", "3", "1"]),
    "model that reads no such size": (
        ["--train_data_dir", "photos", "--resolution", "15", "--model_config_name_or_path", "rgb.json"],
        ["--resolution", "15"],
    ),
    "empty options": (["--config", "empty.yaml"], ["empty.yaml", "no options"]),
    "options of blanks": (["--config", "blank.yaml"], ["blank.yaml", "no options"]),
    "options of comments": (["--config", "comment.yaml"], ["comment.yaml", "no options"]),
    "options of no entries": (["--config", "braces.yaml"], ["braces.yaml", "no options"]),
    "empty model": (["--model_config_name_or_path", "empty.json"], ["empty.json", "block_out_channels"]),
    "model of comments": (["--model_config_name_or_path", "version.json"], ["version.json", "block_out_channels"]),
    "model with a learned variance": (
        ["--model_config_name_or_path", "two.json"],
        ["out_channels", "--variance_type learned_range"],
    ),
}
SAMPLE: dict[str, tuple[list[str], list[str]]] = {
    "bits": (["pipe", "--bit_depth", "12", "--out", "a.npz"], ["--bit_depth", "8, 16"]),
    "bits of a grid": (["pipe", "--bit_depth", "16", "--out", "a.png"], ["--bit_depth 16", "a.png", ".npz"]),
    "no folder": ([], ["FOLDER"]),
    "unknown flag": (["pipe", "--num_image", "3"], ["--num_image", "--num_images"]),
    "no images": (["pipe", "--num_images", "0"], ["--num_images", "at least 1", "0"]),
    "text for a number": (["pipe", "--num_images", "few"], ["--num_images", "few"]),
    "no batch": (["pipe", "--batch_size", "0"], ["--batch_size", "at least 1"]),
    "no steps": (["pipe", "--num_inference_steps", "0"], ["--num_inference_steps", "at least 1"]),
    "too many steps": (["pipe", "--num_inference_steps", "11"], ["11", "10"]),
    "negative seed": (["pipe", "--seed", "-1"], ["--seed", "at least 0"]),
    "negative temperature": (["pipe", "--temperature", "-1"], ["--temperature", "at least 0"]),
    "type of numbers": (["pipe", "--dtype", "int8"], ["--dtype", "int8", "bfloat16"]),
    "device": (["pipe", "--device", "abacus"], ["--device abacus", "cpu"]),
    "missing folder": (["./no_such"], ["./no_such", "does not exist"]),
    "file": (["notes.txt"], ["notes.txt", "is a file"]),
    "no pipeline": (["photos"], ["photos", "model_index.json"]),
    "broken pipeline": (["half"], ["half"]),
    "no such weights": (["pipe", "--variant", "best"], ["--variant best"]),
    "NaN weights": (["nan", "--device", "cpu"], ["nan", "finite"]),
    "kind of picture": (["pipe", "--out", "grid.xyz"], ["--out grid.xyz", ".png"]),
    "picture in no folder": (["pipe", "--out", "no_such/grid.png"], ["--out no_such/grid.png", "does not exist"]),
    "folder for a picture": (["pipe", "--out", "folder.png"], ["--out folder.png", "is a folder"]),
    "pictures among others": (["pipe", "--individual", "photos"], ["--individual photos", "not empty"]),
    "folder among others": (["pipe", "--out", "photos"], ["--out photos", "not empty"]),
    "file for a folder": (["pipe", "--out", "plain"], ["--out plain", "is a file"]),
    "twice one by one": (["pipe", "--out", "new", "--individual", "other"], ["--individual", "no effect"]),
    "no scheduler": (["pipe", "--scheduler", "DDIMSchedulr"], ["--scheduler DDIMSchedulr", "DDIMScheduler?"]),
    "a model for a scheduler": (["pipe", "--scheduler", "UNet2DModel"], ["--scheduler UNet2DModel", "DDIMScheduler"]),
    "scheduler of other models": (["pipe", "--scheduler", "FlowMatchEulerDiscreteScheduler"], ["flow matching"]),
    "consistency sampler": (["pipe", "--scheduler", "LCMScheduler"], ["LCMScheduler cannot sample"]),
    "argument of no scheduler": (
        ["pipe", "--scheduler", "DDIMScheduler", "--scheduler_args", "use_karras_sigmas=true"],
        ["--scheduler_args use_karras_sigmas", "timestep_spacing"],
    ),
    "no pair": (["pipe", "--scheduler_args", "trailing"], ["--scheduler_args 'trailing'", "KEY=VALUE"]),
    "spacing": (["pipe", "--scheduler_args", "timestep_spacing=wide"], ["timestep_spacing='wide'", "leading"]),
    "eta of ours": (["pipe", "--eta", "0.5"], ["takes no eta"]),
    "negative eta": (["pipe", "--eta", "-1"], ["--eta", "at least 0"]),
    "argument of no step": (["pipe", "--step_args", "order=2"], ["takes no order"]),
    "best steps of how many": (["pipe", "--optimal_timesteps"], ["--optimal_timesteps", "--num_inference_steps"]),
    "best steps unknown": (["pipe", "--optimal_timesteps", "--num_inference_steps", "4"], ["none are known"]),
    "best steps of another": (
        ["pipe", "--scheduler", "DDIMScheduler", "--optimal_timesteps", "--num_inference_steps", "4"],
        ["--optimal_timesteps needs DDPMExtScheduler", "DDIMScheduler"],
    ),
}
COMMANDS: dict[str, tuple[list[str], list[str]]] = {"unknown command": (["trian"], ["trian", "train"])}
CASES = [
    pytest.param([*command, *argv], told, id=f"{' '.join(command) or 'ddpm-ext'}: {title}")
    for command, table in ((["train"], TYPED), (["train"], LOOKED_AT), (["sample"], SAMPLE), ([], COMMANDS))
    for title, (argv, told) in table.items()
]


def picture(path: Path, mode: str = "RGB", size: int = 16) -> None:
    path.parent.mkdir(exist_ok=True)
    Image.new(mode, (size, size)).save(path)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with everything that the command lines above name."""
    root = tmp_path_factory.mktemp("place")
    for index in range(3):
        picture(root / "photos" / f"{index}.png")
        picture(root / "broken" / f"{index}.png")
    (root / "broken" / "broken.png").write_bytes(b"this is no picture")
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    (root / "truncated").mkdir()
    Image.fromarray(noise).save(root / "truncated" / "cut.png")
    whole = (root / "truncated" / "cut.png").read_bytes()
    (root / "truncated" / "cut.png").write_bytes(whole[: len(whole) // 2])
    picture(root / "mixed" / "colour.png")
    picture(root / "mixed" / "grey.png", "L")
    picture(root / "deep" / "deep.png", "I;16")
    picture(root / "deep" / "shallow.png", "L")
    picture(root / "wide" / "wide.tiff", "I")
    (root / "floating").mkdir()
    Image.new("F", (64, 64), 255.0).save(root / "floating" / "float.tiff")
    for folder in ("empty", "texts", "folder.png", "half"):
        (root / folder).mkdir()
    (root / "texts" / "a.txt").touch()
    (root / "notes.txt").touch()
    (root / "plain").touch()
    (root / "unet.json").write_text(json.dumps(UNET))
    (root / "rgb.json").write_text(json.dumps({**UNET, "in_channels": 3, "out_channels": 3}))
    (root / "empty.json").write_text("{}")
    for name, text in {"empty": "", "blank": " \n\n", "comment": "# seed: 1\n", "braces": "{}\n"}.items():
        (root / f"{name}.yaml").write_text(text)
    (root / "version.json").write_text(json.dumps({"_class_name": "UNet2DModel", "_diffusers_version": "0.38.0"}))
    (root / "two.json").write_text(json.dumps({**UNET, "out_channels": 2}))
    (root / "unknown.yaml").write_text("learnin_rate: 1\n")
    (root / "twice.yaml").write_text("seed: 1\nseed: 2\n")
    (root / "type.yaml").write_text("seed: a lot\n")
    (root / "list.yaml").write_text("- 1\n")
    (root / "half" / "model_index.json").write_text('{"_class_name": "DDPMPipeline"')
    return root


@pytest.fixture(scope="module")
def pipelines(place):
    """Two saved pipelines, one of them spoilt."""
    from diffusers import UNet2DModel

    from diffusers_ddpm_ext import DDPMExtPipeline, DDPMExtScheduler

    for name in ("pipe", "nan"):
        pipeline = DDPMExtPipeline(UNet2DModel(**UNET), DDPMExtScheduler(10))
        if name == "nan":
            with torch.no_grad():
                next(pipeline.unet.parameters()).fill_(torch.nan)
        pipeline.save_pretrained(place / name)


def listing(root: Path) -> dict[str, tuple[int, int]]:
    found = {}
    for path in root.rglob("*"):
        stat = path.stat()
        found[str(path.relative_to(root))] = (stat.st_mtime_ns, stat.st_size)
    return found


def check_line(line: str, told: list[str]) -> None:
    assert line.endswith("\n")
    assert line.count("\n") == 1, line
    assert line.startswith("error: "), line
    for words in told:
        assert words in line, line


@pytest.mark.usefixtures("pipelines")
@pytest.mark.parametrize(("argv", "told"), CASES)
def test_bad_input(argv, told, place, monkeypatch, capfd):
    monkeypatch.chdir(place)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    before = listing(place)
    status = main(argv)
    line = capfd.readouterr().err
    check_line(line, told)
    assert status == 2
    assert listing(place) == before


def test_forty_of_them():
    assert len(CASES) >= 40


def child(argv: list[str], cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        argv, cwd=cwd, capture_output=True, text=True, timeout=300, env=os.environ | environment, check=False
    )


@pytest.mark.parametrize(
    ("argv", "told"),
    [
        (["--learnin_rate", "1"], ["--learning_rate"]),
        (["--train_data_dir", "broken"], ["broken.png"]),
        (["--output_dir", "photos"], ["not empty"]),
    ],
)
def test_the_real_program(argv, told, place):
    before = listing(place)
    done = child([sys.executable, str(TRAIN), *argv], place)
    check_line(done.stderr, told)
    assert done.returncode == 2
    assert done.stdout == ""
    assert listing(place) == before


@pytest.mark.parametrize(
    ("module", "argv", "told"),
    [
        ("accelerate", [], ["accelerate", "pip install diffusers-ddpm-ext[train]"]),
        ("yaml", [], ["PyYAML", "pip install diffusers-ddpm-ext[train]"]),
        ("sklearn", [], ["scikit-learn", "pip install diffusers-ddpm-ext[train]"]),
        ("datasets", ["--dataset_name", "a/b"], ["datasets", "pip install diffusers-ddpm-ext[hub-datasets]"]),
        (
            "transformers",
            ["--loss_type", "perceptual", "--perceptual_model", "a/b"],
            ["transformers", "pip install diffusers-ddpm-ext[perceptual]"],
        ),
        ("wandb", ["--report_to", "wandb"], ["--report_to wandb", "not installed", "none"]),
        ("comet_ml", ["--report_to", "tensorboard,comet"], ["tensorboard,comet: comet_ml is not installed"]),
    ],
)
def test_missing_extra(module, argv, told, place, monkeypatch, capfd):
    monkeypatch.chdir(place)
    monkeypatch.setitem(sys.modules, module, None)
    before = listing(place)
    assert main(["train", *argv]) == 2
    check_line(capfd.readouterr().err, told)
    assert listing(place) == before


def test_a_folder_that_cannot_be_written(place, monkeypatch, capfd):
    """Root may write anywhere, so that the system's refusal is played."""
    monkeypatch.chdir(place)
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    before = listing(place)
    assert main(["train", "--output_dir", "new"]) == 2
    check_line(capfd.readouterr().err, ["--output_dir new", "not writable"])
    assert main(["train"]) == 2
    check_line(capfd.readouterr().err, ["--output_dir"])
    assert listing(place) == before


@pytest.mark.skipif(not Path("/proc/self").is_dir(), reason="needs a folder that nobody may write")
def test_a_folder_that_the_system_refuses(place, monkeypatch, capfd):
    monkeypatch.chdir(place)
    before = listing(place)
    assert main(["train", "--output_dir", "/proc/run", "--max_train_steps", "1"]) == 2
    check_line(capfd.readouterr().err, ["--output_dir /proc/run", "cannot be written"])
    assert listing(place) == before


def test_the_other_processes_keep_quiet(place):
    """Each process of a launch finds the mistake; the first one tells."""
    done = child([sys.executable, str(TRAIN), "--zzz"], place, RANK="1")
    assert done.stderr == ""
    assert done.returncode == 2


def test_skip_bad_images_is_a_way_out(place, tmp_path, monkeypatch):
    """What the line proposes works: the plan of a run without the broken file."""
    shutil.copytree(place / "broken", tmp_path / "broken")
    monkeypatch.chdir(tmp_path)
    sizes = ["--resolution", "16", "--block_out_channels", "32", "32", "--report_to", "none"]
    assert main(["train", "--train_data_dir", "broken", "--skip_bad_images", "--dry_run", *sizes]) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["broken"]
