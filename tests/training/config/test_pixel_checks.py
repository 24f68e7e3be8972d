"""Options of size, crop, flips and colors that contradict each other are refused in one sentence with the way out."""

from __future__ import annotations

import pytest

from diffusers_ddpm_ext.errors import ConfigError
from diffusers_ddpm_ext.training.config.autoencoder_config import parse_train_vae_args
from diffusers_ddpm_ext.training.config.train_config import data_options, parse_train_args

REFUSED = {
    "--rotate90 --resolution 16 32": "--rotate90 turns images by 90 degrees, and --resolution 16 32 is not square",
    "--center_crop --resize pad": "--center_crop has no effect with --resize pad",
    "--center_crop --resize stretch": "--center_crop has no effect with --resize stretch",
    "--center_crop --random_crop before": "--center_crop contradicts --random_crop before",
    "--center_crop --random_crop after": "--center_crop contradicts --random_crop after",
    "--random_crop before --resize pad": "--random_crop before contradicts --resize pad",
    "--random_crop after --resize stretch": "--random_crop after has no effect with --resize stretch",
    "--random_crop none": "--random_crop: use --center_crop",
    "--random_crop_scale 0.5 0.9": "--random_crop_scale (0.5, 0.9) has no effect without --random_crop before",
    "--random_crop before --random_crop_scale 0.9 0.5": "--random_crop_scale 0.9 0.5 must be the smaller and then",
    "--random_crop before --random_crop_scale 0 1": "--random_crop_scale must be above 0",
    "--random_crop before --random_crop_scale 0.5 1.5": "at most 1",
    "--random_crop before --random_crop_scale nan 1": "--random_crop_scale",
    "--resize_filter cubic": "did you mean bicubic?",
    "--resize squash": "--resize 'squash' is not one of crop, stretch, pad",
    "--background reddish": "--background reddish must be an opaque color",
    "--background #ff000080": "--background #ff000080 must be an opaque color",
    "--background red --channels 4": "--background red has no effect with --channels 4",
}


@pytest.mark.parametrize("flags", REFUSED)
def test_contradictions_are_refused(flags):
    for parse, own in ((parse_train_args, ["--block_out_channels", "32"]), (parse_train_vae_args, [])):
        with pytest.raises(ConfigError) as caught:
            parse([*own, *flags.split()])
        assert REFUSED[flags] in str(caught.value)
        assert "\n" not in str(caught.value)


def test_what_fits_together_is_accepted():
    accepted = (
        "--resize pad --background #000 --channels 4",
        "--resize stretch --random_crop before --random_crop_scale 0.5 0.5",
        "--random_crop after --rotate90 --vertical_flip --random_flip",
        "--no_center_crop --random_crop before --resize_filter lanczos --background rebeccapurple",
    )
    for flags in accepted:
        assert parse_train_args(["--block_out_channels", "32", *flags.split()]).data.resolution == (8, 8)


def test_a_cache_of_latents_holds_no_random_parts(tmp_path):
    flags = ["--vae", str(tmp_path), "--cache_latents", "cache", "--random_crop", "before"]
    (tmp_path / "config.json").write_text('{"_class_name": "AutoencoderKL"}')
    with pytest.raises(ConfigError, match=r"--cache_latents stores one crop of each image, and --random_crop before"):
        parse_train_args(flags)


def test_measurements_check_the_same():
    with pytest.raises(ConfigError, match="--rotate90 turns images by 90 degrees"):
        data_options(None, {"rotate90": True, "resolution": (8, 16)}, {})
