"""Arrays of any depth and number of channels from the command line: trained, resumed, sampled to files, evaluated."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import imagecodecs
import numpy as np
import pytest
import tifffile
import torch
from datasets import Array3D, Dataset, Features
from helpers.runs import tiny_flags
from helpers.tiny import tiny_unet
from PIL import Image

from diffusers_ddpm_ext import DDPMExtPipeline, DDPMExtScheduler, cli
from diffusers_ddpm_ext.training.config.train_config import data_options
from diffusers_ddpm_ext.training.data.dataset import load_data

COUNT, STEPS = 24, 200


@dataclass(frozen=True)
class Kind:
    """A kind of data: dtype, channels, range, file type, and further flags."""

    dtype: str
    channels: int
    low: float
    high: float
    suffix: str
    flags: tuple[str, ...] = ()


KINDS = {
    "bands": Kind("float32", 5, -6, 16, ".npy", ("--data_range", "-6", "16")),
    "two": Kind("int16", 2, -32768, 32767, ".npy"),
    "color": Kind("uint16", 3, 0, 65535, ".png"),
    "gray": Kind("float32", 1, 0, 1, ".tif"),
    "alpha": Kind("uint8", 4, 0, 255, ".png"),
    "parquet": Kind("uint16", 13, 0, 4095, ".npy", ("--data_range", "0", "4095", "--array_layout", "channels_last")),
}


def make_images(kind: Kind) -> np.ndarray:
    """Gradients that fill the range, (N, 8, 8, C)."""
    slopes = np.random.default_rng(0).uniform(-1, 1, (COUNT, 3, kind.channels))
    y, x = np.mgrid[:8, :8] / 7
    mixed = slopes[:, None, None, 0] * y[..., None] + slopes[:, None, None, 1] * x[..., None]
    values = np.interp(np.tanh(2 * mixed), [-1, 1], [kind.low, kind.high])
    values[0, 0, 0], values[0, 0, 1] = kind.low, kind.high
    return (values if kind.dtype.startswith("float") else values.round()).astype(kind.dtype)


def write(folder: Path, kind: Kind, images: np.ndarray) -> list[str]:
    """Write the images as files, or as a column of a parquet file; the flags that name them."""
    folder.mkdir()
    if kind is KINDS["parquet"]:
        features = Features({"image": Array3D((8, 8, kind.channels), kind.dtype)})
        Dataset.from_dict({"image": list(images)}, features=features).to_parquet(folder / "data.parquet")
        return ["--dataset_name", str(folder / "data.parquet")]
    for index, image in enumerate(images):
        path = folder / f"{index:02d}{kind.suffix}"
        if kind.suffix == ".npy":
            np.save(path, image)
        elif kind.suffix == ".tif":
            tifffile.imwrite(path, image[..., 0])
        elif kind.dtype == "uint8":
            Image.fromarray(image).save(path)
        else:
            path.write_bytes(imagecodecs.png_encode(image))
    return ["--train_data_dir", str(folder)]


def read(path: Path) -> np.ndarray:
    """One image, (8, 8, C), by NumPy, tifffile or imagecodecs."""
    if path.suffix == ".npy":
        return np.load(path)
    values = tifffile.imread(path) if path.suffix == ".tif" else imagecodecs.png_decode(path.read_bytes())
    return values.reshape(8, 8, -1)


@pytest.mark.parametrize(
    ("name", "steps"), [("bands", 4), *(pytest.param(name, STEPS, marks=pytest.mark.slow) for name in KINDS)]
)
def test_arrays_are_trained_resumed_sampled_and_evaluated(name, steps, tmp_path, monkeypatch):
    """What comes back has the dtype, range and shape of the data, and the bound counts its levels."""
    monkeypatch.chdir(tmp_path)
    kind = KINDS[name]
    images = make_images(kind)
    source = [*write(tmp_path / "data", kind, images), *kind.flags]
    flags = tiny_flags(output_dir="run", lr_scheduler="constant", lr_warmup_steps=0, validation_fraction=0.25,
                       validation_steps=steps // 2, max_train_steps=steps // 2, cache_images="never")  # fmt: skip
    assert cli.main(["train", *flags, *source]) == 0
    more = ["--max_train_steps", str(steps)]
    assert cli.main(["train", *flags, *source, *more, "--resume_from_checkpoint", "latest"]) == 0
    assert cli.main(["train", *flags, *source, *more, "--output_dir", "straight"]) == 0
    weights = "unet/diffusion_pytorch_model.safetensors"
    assert Path("run", weights).read_bytes() == Path("straight", weights).read_bytes()

    pixels = DDPMExtPipeline.from_pretrained("run").pixel_format
    assert (pixels.dtype, pixels.low, pixels.high, pixels.suffix) == (kind.dtype, kind.low, kind.high, kind.suffix)
    data = load_data(data_options(Path("run/config.yaml"), {}, {}))
    stored = {pixels.from_model(image).tobytes() for image in data.train.pixels(range(len(data.train)))}
    wanted = {np.moveaxis(image, -1, 0).tobytes() for image in images}
    if pixels.is_integer:
        assert stored <= wanted
    else:
        first = np.array([np.frombuffer(each, kind.dtype) for each in stored])
        second = np.array([np.frombuffer(each, kind.dtype) for each in wanted])
        distance = np.abs(first[:, None] - second[None]).max(axis=-1).min(axis=1)
        assert distance.max() < 1e-6 * (kind.high - kind.low)

    draw = ["sample", "run", "--num_images", "4", "--num_inference_steps", "5", "--device", "cpu"]
    assert cli.main([*draw, "--out", "drawn"]) == 0
    assert cli.main([*draw, "--out", "drawn.tif"]) == 0
    files = [read(path) for path in sorted(Path("drawn").glob(f"*{kind.suffix}"))]
    pages = tifffile.imread("drawn.tif").reshape(4, 8, 8, -1)
    for file, page in zip(files, pages, strict=True):
        assert file.dtype == images.dtype
        assert file.shape == images.shape[1:]
        assert kind.low <= file.min() < file.max() <= kind.high
        np.testing.assert_array_equal(file, page)

    assert cli.main(["evaluate", "run", "--device", "cpu"]) == 0
    result = json.loads(Path("run/evaluation/evaluation.json").read_text())
    assert np.isfinite(result["bits_per_dim"])
    if pixels.is_integer:
        assert result["bin_width"] == pytest.approx(2 / (kind.high - kind.low))
    else:
        assert result["decoder_kind"] == "continuous"
    measure = ["--metrics", "kid", "--samples", "drawn", "--out", "measured"]
    assert cli.main(["evaluate", "run", *measure]) == 0
    assert cli.main(["report", "run"]) == 0


@pytest.mark.slow
def test_16_bit_levels_that_are_8_bit_levels_have_their_bits(tmp_path, monkeypatch):
    """Level v of 8 bits is level 257 v of 16: the same network, the same pictures, and with one width of bins the same
    bits; by default the bins are those of each depth, 257 times as narrow, which costs 8 bits more at most."""
    monkeypatch.chdir(tmp_path)
    levels = np.random.default_rng(0).integers(0, 256, (6, 8, 8, 3)).astype(np.uint8)
    for name, factor, dtype in (("eight", 1, np.uint8), ("sixteen", 257, np.uint16)):
        Path(name).mkdir()
        for index, image in enumerate(levels):
            Path(name, f"{index}.png").write_bytes(imagecodecs.png_encode(image.astype(dtype) * dtype(factor)))
    with torch.random.fork_rng():
        DDPMExtPipeline(tiny_unet(), DDPMExtScheduler(10)).save_pretrained("model")
    bits = {}
    for name, flags in (("eight", []), ("sixteen", ["--bin_width", str(2 / 255)]), ("sixteen", [])):
        line = ["evaluate", "model", "--train_data_dir", name, "--split", "train", "--validation_fraction", "0"]
        assert cli.main([*line, *flags, "--json", "result.json", "--out", "out", "--device", "cpu"]) == 0
        result = json.loads(Path("result.json").read_text())
        bits[name, bool(flags)] = result
    assert bits["sixteen", True]["bits_per_dim"] == pytest.approx(bits["eight", False]["bits_per_dim"], rel=1e-6)
    assert bits["sixteen", False]["bin_width"] == pytest.approx(2 / 65535)
    wider = bits["sixteen", False]["decoder"] - bits["eight", False]["decoder"]
    assert 0 < wider <= np.log2(257) + 1e-3
