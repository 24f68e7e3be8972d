"""Pipelines of other data than 8-bit images: values in the data's dtype and range, and the saved record of them."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from diffusers import DDPMPipeline
from helpers.hub_server import LoopbackHub
from helpers.paths import PYTHONPATH
from helpers.tiny import tiny_autoencoder, tiny_unet

from diffusers_ddpm_ext import DDPMExtPipeline, DDPMExtScheduler
from diffusers_ddpm_ext.utils.pixel_format import PixelFormat

FORMATS = {
    1: PixelFormat("uint16", 0, 65535, ".png"),
    2: PixelFormat("int16", -32768, 32767, ".npy", (0, 1, 0)),
    3: PixelFormat("uint16", 0, 4095, ".tif"),
    4: PixelFormat("float16", -2, 2, ".npz"),
    5: PixelFormat("float32", 200, 310.5, ".npy", (4, 2, 0)),
    13: PixelFormat("float64", 0, 1e-3, ".tif"),
}


def build(channels: int, pixels: PixelFormat | dict | None = None, **components) -> DDPMExtPipeline:
    """A pipeline of four steps."""
    pipeline = DDPMExtPipeline(
        tiny_unet(channels), DDPMExtScheduler(num_train_timesteps=4), pixel_format=pixels, **components
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def draw(pipeline: DDPMExtPipeline, output_type: str):
    """Two images, the same for every output type."""
    return pipeline(2, generator=torch.Generator().manual_seed(0), output_type=output_type).images


@pytest.mark.parametrize("channels", FORMATS)
def test_samples_have_the_dtype_range_and_shape_of_the_data(channels):
    """The oracle is the sample in [-1, 1], stretched to the range by NumPy."""
    pixels = FORMATS[channels]
    pipeline = build(channels, pixels)
    values, samples = draw(pipeline, "array"), draw(pipeline, "latent").permute(0, 2, 3, 1).double().numpy()
    assert values.shape == (2, 8, 8, channels)
    assert values.dtype == np.dtype(pixels.dtype)
    assert values.min() == pixels.low
    assert values.max() == pixels.high
    stretched = np.interp(samples, [-1, 1], [pixels.low, pixels.high])
    tolerance = 0.5 + 1e-6 if pixels.is_integer else (pixels.high - pixels.low) * np.finfo(pixels.dtype).eps * 2
    np.testing.assert_allclose(values.astype(np.float64), stretched, rtol=0, atol=tolerance)
    np.testing.assert_allclose(draw(pipeline, "np"), (samples / 2 + 0.5).clip(0, 1), atol=1e-6)


@pytest.mark.parametrize(
    "channels", [pytest.param(count, marks=() if count in (2, 5) else pytest.mark.slow) for count in FORMATS]
)
def test_a_saved_folder_keeps_the_format(channels, tmp_path):
    """Loaded, and taken over by from_pipe, it draws the same values; model_index.json has it as JSON."""
    pipeline = build(channels, FORMATS[channels].to_dict())
    pipeline.save_pretrained(tmp_path / "saved")
    recorded = json.loads((tmp_path / "saved" / "model_index.json").read_text())
    assert recorded["pixel_format"] == FORMATS[channels].to_dict()
    loaded = DDPMExtPipeline.from_pretrained(tmp_path / "saved")
    loaded.set_progress_bar_config(disable=True)
    assert loaded.pixel_format == DDPMExtPipeline.from_pipe(loaded).pixel_format == FORMATS[channels]
    np.testing.assert_array_equal(draw(loaded, "array"), draw(pipeline, "array"))


def test_stock_diffusers_opens_a_folder_with_a_format(tmp_path):
    """It ignores the record, and draws the same images in [0, 1]."""
    pipeline = build(3, FORMATS[3])
    pipeline.save_pretrained(tmp_path)
    stock = DDPMPipeline.from_pretrained(tmp_path)
    stock.set_progress_bar_config(disable=True)
    generators = [torch.Generator().manual_seed(5), torch.Generator().manual_seed(5)]
    images = stock(1, generator=generators[0], output_type="np", num_inference_steps=4).images
    values = pipeline(1, generator=generators[1], output_type="array").images
    np.testing.assert_allclose(images * 4095, values, atol=1)


def test_8_bit_images_leave_the_folder_as_it_was(tmp_path):
    """The record is written for other data only, and goes when 8-bit images are assigned."""
    for pipeline in (build(3), build(3, PixelFormat()), build(3, FORMATS[3])):
        pipeline.pixel_format = PixelFormat()
        pipeline.save_pretrained(tmp_path)
        assert "pixel_format" not in json.loads((tmp_path / "model_index.json").read_text())
        assert draw(pipeline, "array").dtype == np.uint8


def test_a_first_stage_decodes_to_the_data(tmp_path):
    """Of latents with a first stage the decoded images have the format; without one there are no images."""
    pixels = FORMATS[5]
    pipeline = build(4, pixels, vae=tiny_autoencoder("kl", channels=5))
    values = draw(pipeline, "array")
    assert values.shape == (2, 16, 16, 5)
    decoded = pipeline.decode_latents(draw(pipeline, "latent")).permute(0, 2, 3, 1).numpy()
    np.testing.assert_array_equal(values, pixels.from_model(decoded))
    pipeline.vae = None
    with pytest.raises(ValueError, match=r"array.*latents of an autoencoder"):
        draw(pipeline, "array")


def test_pil_images_of_other_channels_name_the_way_out():
    """Refused before a step is computed."""
    with pytest.raises(ValueError, match=r'5 channels.*"array" for the values'):
        draw(build(5, FORMATS[5]), "pil")


@pytest.mark.parametrize(
    ("pixels", "named"),
    [
        (PixelFormat("uint16", 0, 65535, ".png", (0, 1, 3)), "below 3"),
        (PixelFormat("uint16", 0, 65535, ".png", None, ((1, 0), (1, 0), (1, 0))), "of 1 channels"),
        ({"dtype": "uint16"}, "pixel_format has no low"),
        ("uint16", "pixel_format='uint16'"),
    ],
)
def test_formats_that_do_not_fit_are_refused(pixels, named):
    """In the constructor, and where one is assigned."""
    with pytest.raises(ValueError, match=named):
        build(3, pixels)
    pipeline = build(3)
    with pytest.raises(ValueError, match=named):
        pipeline.pixel_format = pixels


def test_a_damaged_record_is_one_sentence(tmp_path):
    """A range from a hand-edited model_index.json."""
    build(3, FORMATS[3]).save_pretrained(tmp_path)
    index = tmp_path / "model_index.json"
    index.write_text(index.read_text().replace("4095", "-1"))
    with pytest.raises(ValueError, match="pixel_format: high=-1 must be an integer"):
        DDPMExtPipeline.from_pretrained(tmp_path)


@pytest.mark.slow
def test_the_hub_keeps_the_format(tmp_path):
    """Pushed and loaded by id through the real client, in a process of its own."""
    script = (
        "import sys; from diffusers_ddpm_ext import DDPMExtPipeline as P\n"
        "P.from_pretrained(sys.argv[1]).push_to_hub('me/bands')\n"
        "print(P.from_pretrained('me/bands').pixel_format.to_dict() == eval(sys.argv[2]))"
    )
    build(5, FORMATS[5]).save_pretrained(tmp_path / "saved")
    with LoopbackHub() as hub:
        environment = os.environ | hub.environment(str(tmp_path / "home")) | {"PYTHONPATH": PYTHONPATH}
        result = subprocess.run(
            [sys.executable, "-c", script, str(tmp_path / "saved"), repr(FORMATS[5].to_dict())],
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
    assert result.stdout.strip().endswith("True"), result.stderr[-2000:]
