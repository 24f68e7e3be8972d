"""Arrays from files to samples in files: trained, resumed, sampled and evaluated in their own dtype and range."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import datasets
import imagecodecs
import numpy as np
import pytest
import tifffile
from helpers.runs import tiny_run
from PIL import Image
from safetensors.numpy import load_file

from diffusers_ddpm_ext import cli
from diffusers_ddpm_ext.training.config.data_options import DataOptions
from diffusers_ddpm_ext.training.data.dataset import load_data
from diffusers_ddpm_ext.training.trainer import train

SIZE, COUNT = 8, 24


@dataclass(frozen=True)
class Kind:
    """A kind of data set: its dtype, channels, range, and the files of its images and samples."""

    dtype: str
    channels: int
    low: float
    high: float
    suffix: str
    out: str
    options: tuple[tuple[str, object], ...] = ()


KINDS = {
    "five bands of float32": Kind("float32", 5, 0, 1, ".npy", "out.npy"),
    "two channels of int16": Kind("int16", 2, -32768, 32767, ".npy", "out.npz"),
    "16-bit color PNG": Kind("uint16", 3, 0, 65535, ".png", "out"),
    "float TIFF": Kind("float32", 1, -200, 800, ".tif", "out.tif", (("data_range", [-200, 800]),)),
    "color with transparency": Kind("uint8", 4, 0, 255, ".png", "out"),
    "Array3D in parquet": Kind("uint8", 3, 0, 255, ".parquet", "out.npy"),
}


def smooth_images(kind: Kind) -> np.ndarray:
    """Random gradients over the whole range, (N, H, W, C), in the kind's dtype."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:SIZE, :SIZE] / (SIZE - 1)
    slopes = rng.uniform(-0.5, 0.5, (2, COUNT, 1, 1, kind.channels))
    unit = (0.5 + slopes[0] * y[..., None] + slopes[1] * x[..., None]).clip(0, 1)
    values = kind.low + unit * (kind.high - kind.low)
    return (values.round() if np.dtype(kind.dtype).kind in "iu" else values).astype(kind.dtype)


def write_images(folder: Path, kind: Kind, images: np.ndarray) -> dict[str, str]:
    """Write the images; return the option that names them."""
    folder.mkdir()
    if kind.suffix == ".parquet":
        features = datasets.Features({"pixels": datasets.Array3D(images.shape[1:], kind.dtype)})
        table = datasets.Dataset.from_dict({"pixels": list(images)}, features=features)
        table.to_parquet(str(folder / "train.parquet"))
        return {"dataset_name": str(folder), "cache_dir": str(folder.parent / "cache")}
    for index, image in enumerate(images):
        path = folder / f"{index:02d}{kind.suffix}"
        if kind.suffix == ".npy":
            np.save(path, image)
        elif kind.suffix == ".tif":
            tifffile.imwrite(path, image[..., 0])
        elif kind.dtype == "uint16":
            path.write_bytes(imagecodecs.png_encode(image))
        else:
            Image.fromarray(image).save(path)
    return {"train_data_dir": str(folder)}


def read_samples(path: Path) -> np.ndarray:
    """The written samples, (N, H, W, C), by the libraries of their formats."""
    if path.suffix == ".npy":
        return np.load(path)
    if path.suffix == ".npz":
        with np.load(path) as arrays:
            (name,) = arrays.files
            return arrays[name]
    if path.suffix == ".tif":
        return np.stack([page.asarray().reshape(SIZE, SIZE, -1) for page in tifffile.TiffFile(path).pages])
    return np.stack([imagecodecs.imread(each) for each in sorted(path.glob("*.png"))])


def round_trip(folder: Path, kind: Kind, steps: int) -> None:
    """Read, train, resume, sample and evaluate."""
    images = smooth_images(kind)
    source = write_images(folder / "data", kind, images)
    options = source | dict(kind.options) | {"validation_fraction": 0.25, "max_train_steps": steps}
    options |= {"checkpointing_steps": steps // 2, "validation_bpd": True, "validation_bpd_steps": 2}

    data = load_data(
        DataOptions(**source, data_range=dict(kind.options).get("data_range"), resolution=(SIZE, SIZE))  # type: ignore[arg-type]
    )
    whole = data.train.images
    stored = np.stack([whole.image(index).numpy() for index in range(COUNT)]).transpose(0, 2, 3, 1)
    np.testing.assert_array_equal(stored, images)
    pixels = data.pixel_format
    assert (pixels.dtype, pixels.low, pixels.high) == (kind.dtype, kind.low, kind.high)

    train(tiny_run(folder / "run", **options))
    weights = load_file(folder / "run/unet/diffusion_pytorch_model.safetensors")
    for name in (f"checkpoint-{steps}", "finished.json"):
        path = folder / "run" / name
        path.rename(folder / name)
    train(tiny_run(folder / "run", resume_from_checkpoint="latest", **options))
    resumed = load_file(folder / "run/unet/diffusion_pytorch_model.safetensors")
    assert all(np.array_equal(resumed[name], weights[name]) for name in weights)

    out = folder / kind.out
    assert cli.main(["sample", str(folder / "run"), "--num_images", "3", "--out", str(out), "--device", "cpu"]) == 0
    samples = read_samples(out)
    assert samples.shape == (3, SIZE, SIZE, kind.channels)
    assert samples.dtype == np.dtype(kind.dtype)
    assert samples.min() >= kind.low
    assert samples.max() <= kind.high
    assert len(np.unique(samples)) > 10

    arguments = ["evaluate", str(folder / "run"), "--num_timesteps", "2", "--device", "cpu"]
    assert cli.main(arguments) == 0
    result = json.loads((folder / "run/evaluation/evaluation.json").read_text())
    if np.dtype(kind.dtype).kind == "f":
        assert result["decoder_kind"] == "continuous"
    else:
        assert result["bin_width"] == pytest.approx(2 / (kind.high - kind.low))


def test_arrays_are_trained_and_sampled_in_their_dtype(tmp_path, capsys):
    round_trip(tmp_path, KINDS["five bands of float32"], steps=2)


@pytest.mark.slow
@pytest.mark.parametrize("name", KINDS)
def test_every_kind_of_array_comes_back(tmp_path, capsys, name):
    round_trip(tmp_path, KINDS[name], steps=200)
