"""Options of `ddpm-ext train-vae`: what is there, what is refused, and what is written."""

from __future__ import annotations

import json
import re

import pytest

from diffusers_ddpm_ext.errors import ConfigError
from diffusers_ddpm_ext.training.config.autoencoder_config import AutoencoderConfig, parse_train_vae_args
from diffusers_ddpm_ext.training.config.autoencoder_options import LEFT_OUT, TRAIN_VAE
from diffusers_ddpm_ext.training.config.options import OPTIONS, SECTIONS
from diffusers_ddpm_ext.training.config.train_config import TrainConfig, parse_train_args


@pytest.fixture(autouse=True)
def folder_of_images(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.png").touch()


PHOTOS = ["--train_data_dir", "photos"]


def test_options_of_shared_sections_are_those_of_train():
    """One declaration: only defaults and texts differ, and what a first stage has no use for is left out."""
    shared = {name: option for name, option in TRAIN_VAE.options.items() if option.section != "autoencoder"}
    for name, option in shared.items():
        ours, theirs = option.metadata, OPTIONS[name].metadata
        assert (option.hint, ours["limits"], ours["path"]) == (OPTIONS[name].hint, theirs["limits"], theirs["path"])
    sections = {option.section for option in shared.values()}
    rest = {name for name, option in OPTIONS.items() if option.section in sections} - shared.keys()
    assert rest == {*LEFT_OUT}
    assert {*SECTIONS} - sections >= {"model", "start", "schedule", "objective", "hub"}


@pytest.mark.parametrize(
    ("compression", "widths"),
    [(2, (24, 48)), (4, (24, 48, 96)), (8, (24, 48, 96, 192)), (32, (24, 48, 96, 192, 384, 384))],
)
def test_the_compression_sets_the_levels(compression, widths):
    config = parse_train_vae_args([*PHOTOS, "--compression", str(compression)])
    assert config.autoencoder.block_out_channels == widths


def test_the_digits_need_no_option():
    config = parse_train_vae_args([])
    assert (config.data.resolution, config.autoencoder.compression, config.on_digits) == ((8, 8), 2, True)
    assert parse_train_vae_args(["--max_train_steps", "7"]).loop.max_train_steps == 7


REFUSED = {
    "--compression 3": "--compression '3' is not one of 2, 4, 8, 16, 32",
    "--compression 8 --block_out_channels 32 64": "has 2 widths, and --compression 8 needs 4",
    "--block_out_channels 32 64 90": "--norm_num_groups 8 does not divide the width 90: use 2",
    "--resolution 66": "--resolution 66 is not divisible by --compression 4: use a multiple of it (68)",
    "--resolution 64 30": "--resolution 30 is not divisible",
    "--num_vq_embeddings 9": "has no effect without --first_stage_type vq",
    "--commitment_weight 0.1": "has no effect without --first_stage_type vq",
    "--first_stage_type vq --kl_weight 0.1": "has no effect without --first_stage_type kl",
    "--perceptual_weight 0.1": "has no effect without --perceptual_model",
    "--perceptual_model clip --perceptual_weight 0": "--perceptual_weight 0 leaves --perceptual_model without effect",
    "--reconstruction_loss mse": "use l2",
    "--kl_weight -1": "--kl_weight must be at least 0",
    "--latent_channels 0": "--latent_channels must be at least 1",
    "--no_use_ema --ema_decay 0.9": "has no effect without --use_ema",
    "--block_out_channels 60000 60000 60000": "the options",
    "--class_column folder": "--class_column is an option of `ddpm-ext train`, not of `ddpm-ext train-vae`",
    "--push_to_hub": "--push_to_hub is an option of `ddpm-ext train`, not of",
    "--timesteps 9": "unknown option --timesteps",
    "--batch_size 9": "--batch_size: use --train_batch_size",
    "--config digits": "--config digits does not exist; name a YAML file",
    "--resume_from_checkpoint latest": "needs --output_dir",
    "--lr_scheduler cosine --lr_warmup_steps -1": "--lr_warmup_steps must be at least 0",
    "--report_to nobody": "--report_to 'nobody' is not one",
}


@pytest.mark.parametrize("line", REFUSED)
def test_refused_in_one_sentence(line):
    with pytest.raises(ConfigError) as refusal:
        parse_train_vae_args([*PHOTOS, *line.split()])
    assert REFUSED[line] in str(refusal.value)
    assert "\n" not in str(refusal.value)


@pytest.fixture
def first(tmp_path):
    """The configuration of a VQModel in the folder of a pipeline, and of other autoencoders."""
    config = {"_class_name": "VQModel", "in_channels": 1, "latent_channels": 2, "num_vq_embeddings": 9}
    config |= {"block_out_channels": [8, 12, 16], "norm_num_groups": 4, "mid_block_add_attention": False}
    for name, content in {
        "pipe/vqvae/config": config,
        "pipe/model_index": {"vqvae": ["diffusers", "VQModel"]},
        "other/config": config | {"_class_name": "AutoencoderTiny"},
        "flat/config": config | {"block_out_channels": [8]},
        "bare/model_index": {"unet": ["diffusers", "UNet2DModel"]},
    }.items():
        path = tmp_path / f"{name}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content))


def test_the_autoencoder_to_start_from_decides_the_network(first):
    """A written file repeats all of it, and what it has must not differ from the folder."""
    config = parse_train_vae_args([*PHOTOS, "--ckpt_path", "pipe"])
    network = config.autoencoder
    assert (network.first_stage_type, network.compression, network.latent_channels) == ("vq", 4, 2)
    assert (network.block_out_channels, network.norm_num_groups, network.layers_per_block) == ((8, 12, 16), 4, 1)
    assert (network.num_vq_embeddings, network.mid_block_attention, config.data.channels) == (9, False, 1)
    config.write_resolved("run.yaml")
    assert parse_train_vae_args(["--config", "run.yaml"]) == config


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("pipe --latent_channels 3", "--latent_channels 3: --ckpt_path pipe has 2; leave --latent_channels out"),
        ("pipe --block_out_channels 8 8 8", "--block_out_channels 8 8 8: --ckpt_path pipe has 8 12 16"),
        ("pipe --channels 3", "--channels 3: --ckpt_path pipe has 1"),
        ("pipe --first_stage_type kl", "--first_stage_type kl: --ckpt_path pipe has vq"),
        ("pipe --kl_weight 1", "--kl_weight 1.0 has no effect without --first_stage_type kl"),
        ("pipe --resolution 30", "--resolution 30 is not divisible by --compression 4"),
        ("other", "is of class AutoencoderTiny, and train-vae trains AutoencoderKL and VQModel"),
        ("flat", "compresses by 1; train-vae takes"),
        ("bare", "must be the folder of a Diffusers autoencoder, or of a pipeline with one"),
        ("nowhere", "must be the folder of a Diffusers autoencoder, or of a pipeline with one"),
    ],
)
def test_autoencoders_that_cannot_be_started_from(line, message, first):
    with pytest.raises(ConfigError, match=re.escape(message)):
        parse_train_vae_args([*PHOTOS, "--ckpt_path", *line.split()])


def test_the_written_options_make_the_same_run(tmp_path):
    config = parse_train_vae_args([*PHOTOS, "--compression", "8", "--resolution", "32", "64", "--kl_weight", "1e-4"])
    config.write_resolved(tmp_path / "run.yaml")
    text = (tmp_path / "run.yaml").read_text()
    assert text.startswith("# Every option of this run. To repeat it: ddpm-ext train-vae --config")
    assert parse_train_vae_args(["--config", "run.yaml"]) == config
    with pytest.raises(ConfigError, match="--kl_weight is an option of `ddpm-ext train-vae`"):
        parse_train_args(["--kl_weight", "1"])
    with pytest.raises(ConfigError, match="autoencoder belongs to `ddpm-ext train-vae`"):
        TrainConfig.from_flat({"autoencoder": {"compression": 8}})


def test_options_by_name_from_python():
    config = AutoencoderConfig.from_flat({"train_data_dir": "photos", "compression": 2, "optim": {"adam_beta1": 0.5}})
    assert (config.autoencoder.compression, config.optim.adam_beta1) == (2, 0.5)
    assert config.optim.learning_rate == 1e-3
    assert TrainConfig.from_flat({"train_data_dir": "photos"}).optim.learning_rate == 1e-4
