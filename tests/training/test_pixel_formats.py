"""Runs on other data than 8-bit images: the recorded format, previews, and samples that are measured in it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import tifffile
import torch
from helpers.runs import tiny_run
from helpers.tiny import tiny_unet
from PIL import Image

from diffusers_ddpm_ext import DDPMExtPipeline, DDPMExtScheduler, cli
from diffusers_ddpm_ext.errors import ConfigError
from diffusers_ddpm_ext.hub.card import make_card
from diffusers_ddpm_ext.metrics.features import FeatureExtractor
from diffusers_ddpm_ext.plotting.sheets import image_grid
from diffusers_ddpm_ext.training.data.dataset import load_data
from diffusers_ddpm_ext.training.data.preview_format import with_preview
from diffusers_ddpm_ext.training.evaluation.channel_features import of_chosen_channels
from diffusers_ddpm_ext.training.evaluation.given_samples import read_samples
from diffusers_ddpm_ext.training.trainer import train
from diffusers_ddpm_ext.utils.pixel_format import PixelFormat


def write_bands(folder: Path, count: int = 24, channels: int = 5) -> np.ndarray:
    """Float images from -6 to 16 as TIFF, each band another gradient."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:8, :8] / 7
    images = []
    for index in range(count):
        slopes = rng.uniform(-1, 1, (2, channels))
        image = y[..., None] * slopes[0] + x[..., None] * slopes[1]
        image = np.interp(image, [-2, 2], [-6, 16]).astype(np.float32)
        tifffile.imwrite(folder / f"{index:02d}.tif", image, photometric="minisblack", planarconfig="contig")
        images.append(image)
    return np.stack(images)


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A finished run on five bands."""
    root = tmp_path_factory.mktemp("bands")
    write_bands(root / "data")
    train(tiny_run(root / "run", train_data_dir=str(root / "data"), data_range=[-6, 16], validation_fraction=0.25))
    return root / "run"


def test_the_format_of_the_data_is_recorded(run):
    """In model_index.json, with the components that the previews show."""
    pixels = DDPMExtPipeline.from_pretrained(run).pixel_format
    assert (pixels.dtype, pixels.low, pixels.high, pixels.suffix) == ("float32", -6, 16, ".tif")
    assert np.array(pixels.preview_components).shape == (3, 6)


def test_previews_show_the_recorded_components(run):
    """inputs.png is the sheet of the training images in the recorded colors, with a line below it."""
    images = np.stack([tifffile.imread(path) for path in sorted((run.parent / "data").iterdir())])
    pixels = DDPMExtPipeline.from_pretrained(run).pixel_format
    signed = pixels.to_model(images).transpose(0, 3, 1, 2)
    with Image.open(run / "samples" / "inputs.png") as picture:
        sheet = np.asarray(picture)
    tiles = {np.asarray(image_grid(image[None], pixels=pixels))[:96, :96].tobytes() for image in signed}
    assert sheet.shape[0] > 96
    assert all(sheet[:96, left : left + 96].tobytes() in tiles for left in range(0, 800, 100))


def test_samples_are_measured_in_the_data(run, tmp_path, monkeypatch, capsys):
    """An array and a folder of the data's dtype and range, and pictures of it, are the same samples."""
    monkeypatch.chdir(tmp_path)
    draw = ["sample", str(run), "--num_images", "6", "--num_inference_steps", "3", "--device", "cpu"]
    for out in (["a.npy"], ["each"], ["depth", "--bit_depth", "16", "--format", "npy"]):
        assert cli.main([*draw, "--out", *out]) == 0
    numbers = []
    for samples in ("a.npy", "each", "depth"):
        line = ["evaluate", str(run), "--metrics", "kid", "--samples", samples, "--out", "out"]
        assert cli.main(line) == 0
        numbers.append(json.loads(Path("out/sample_metrics.json").read_text())["metrics"]["kid"]["value"])
    assert numbers[0] == numbers[1] == pytest.approx(numbers[2], rel=1e-3)
    np.save("wide.npy", np.load("a.npy") * 2)
    capsys.readouterr()
    for samples, answer in (("wide.npy", "values outside [-6, 16]"), ("ints.npy", "holds int32: float32, uint8")):
        np.save("ints.npy", np.load("a.npy").astype(np.int32))
        assert cli.main(["evaluate", str(run), "--metrics", "kid", "--samples", samples, "--out", "out"]) == 2
        assert answer in capsys.readouterr().err
    assert cli.main(["evaluate", str(run), "--data_range", "-10", "20", "--out", "out"]) == 2
    assert "was trained on float32 from -6 to 16" in capsys.readouterr().err


def test_components_or_chosen_channels_are_shown(tmp_path):
    """By the number of channels; a channel that does not exist is named."""
    write_bands(tmp_path / "two", channels=2)
    write_bands(tmp_path / "four", channels=4)
    write_bands(tmp_path / "five")
    cases = (("two", None, None), ("four", None, (3, 5)), ("five", (4, 0, 1), None), ("five", None, (3, 6)))
    for name, chosen, components in cases:
        config = tiny_run(tmp_path / "run", train_data_dir=str(tmp_path / name), data_range=[-6, 16])
        data = load_data(config.data)
        pixels = with_preview(data, chosen)
        assert pixels.preview_channels == chosen
        assert (np.shape(pixels.preview_components) or None) == components
    with pytest.raises(ConfigError, match=r"--preview_channels: preview_channels=\[5\] must be below 5"):
        with_preview(data, (5,))
    with pytest.raises(ConfigError, match=r"--preview_channels.* must be one or three channel numbers"):
        tiny_run(tmp_path / "run", train_data_dir=str(tmp_path / "five"), preview_channels=(0, 1))


def test_vision_models_get_the_chosen_channels():
    """Of five channels those of the preview, and their names are in the report; without them all are passed on."""
    images = torch.rand(2, 5, 4, 4) * 2 - 1
    extractor = FeatureExtractor("model", "resized", "abc", lambda image: image.flatten(1), torch.device("cpu"))
    chosen = of_chosen_channels(extractor, 5, PixelFormat("float32", 0, 1, ".npy", (4, 0, 2)))
    torch.testing.assert_close(chosen(images), images[:, [4, 0, 2]].flatten(1))
    assert chosen.preparation == "channels 4, 0, 2 of 5 as red, green and blue (0 is the first); resized"
    assert chosen.fingerprint != extractor.fingerprint
    assert of_chosen_channels(extractor, 5, PixelFormat()) is extractor
    assert of_chosen_channels(extractor, 3, PixelFormat(preview_channels=(0,))) is extractor


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "int16", "float16", "float64"])
def test_levels_of_samples_are_those_of_the_data(tmp_path, dtype):
    """Values of the data's dtype keep every level."""
    is_float = dtype.startswith("float")
    low, high = (-2, 2) if is_float else (np.iinfo(dtype).min, np.iinfo(dtype).max)
    pixels = PixelFormat(dtype, low, high, ".npy")
    values = np.random.default_rng(0).uniform(low, high, (3, 4, 4, 2)).astype(dtype)
    np.save(tmp_path / "a.npy", values)
    samples = read_samples(tmp_path / "a.npy", (2, 4, 4), pixels.num_levels, pixels)
    stored = samples.values.permute(0, 2, 3, 1).numpy()
    if is_float:
        np.testing.assert_allclose(stored, values / 2, atol=1e-6)
    else:
        np.testing.assert_array_equal(stored, values.astype(np.int64) - low)


@pytest.mark.slow
def test_card_and_report_say_what_the_values_are(run, capsys):
    """Dtype, range and the channels of the pictures; the card's code asks for arrays, which it then draws."""
    card = make_card(run, "me/bands")
    assert "8x8x5 images of float32 from -6 to 16" in card
    assert "The picture shows principal components 1, 2, 3 of 5 channels" in card
    code = card.split("```python\n")[1].split("```")[0].replace('"me/bands"', "place")
    scope: dict = {"place": run}
    exec(code, scope)
    assert scope["images"].dtype == np.float32
    assert scope["images"].shape == (4, 8, 8, 5)
    assert cli.main(["report", str(run)]) == 0
    page = (run / "report.html").read_text()
    assert "<th>values</th><td>float32 from -6 to 16</td>" in page
    assert "Shown: principal components 1, 2, 3 of 5 channels" in page
    index = run / "model_index.json"
    content = index.read_text()
    try:
        index.write_text(content.replace('"float32"', '"complex64"'))
        with pytest.raises(ConfigError, match=r"model_index.json: pixel_format: dtype='complex64' is unknown"):
            make_card(run, "me/bands")
    finally:
        index.write_text(content)


def test_8_bit_pictures_are_described_as_before(tmp_path):
    """No dtype, no line about channels, images as PIL's."""
    DDPMExtPipeline(tiny_unet(), DDPMExtScheduler(4)).save_pretrained(tmp_path)
    card = make_card(tmp_path, "me/photos")
    assert "8x8x3 images (" in card
    assert "output_type" not in card
    assert "The picture shows" not in card
