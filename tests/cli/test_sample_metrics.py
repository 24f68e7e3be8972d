"""`ddpm-ext evaluate --metrics` on a tiny run, as a user types it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.tiny import tiny_unet
from PIL import Image
from sklearn.datasets import load_digits

from diffusers_ddpm_ext import DDPMExtPipeline, DDPMExtScheduler, cli
from diffusers_ddpm_ext.metrics.features import load_feature_extractor
from diffusers_ddpm_ext.metrics.kernel_distance import kernel_distance

ALL = ["fd", "fd_extrapolated", "kid", "precision", "recall", "density", "coverage"]
TRAINED = 1617


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """An untrained model of the digits."""
    path = tmp_path_factory.mktemp("model") / "model"
    DDPMExtPipeline(tiny_unet(1), DDPMExtScheduler(50)).save_pretrained(path)
    return path


def measure(folder: Path, out: Path, *flags: str) -> dict:
    """The JSON of a measurement."""
    assert cli.main(["evaluate", str(folder), "--device", "cpu", "--out", str(out), *flags]) == 0
    return json.loads((out / "sample_metrics.json").read_text())


def error_line(capsys, *argv: str) -> str:
    assert cli.main(["evaluate", *map(str, argv)]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    return line


def held_out() -> np.ndarray:
    """The digits that a run holds out, (180, 8, 8, 1) in [0, 1]."""
    return (load_digits().images[TRAINED:, ..., None] / 16).astype(np.float32)


def test_samples_are_drawn_and_measured(folder, tmp_path, capsys):
    """The number is the metric of the samples that `ddpm-ext sample` draws; N and the interval are beside it."""
    draw = ["--num_inference_steps", "5", "--batch_size", "16", "--device", "cpu"]
    result = measure(folder, tmp_path / "out", "--metrics", "fd", "kid", "prdc", "--num_samples", "40", *draw[:4])
    printed = capsys.readouterr().out
    assert list(result["metrics"]) == ALL
    assert (result["num_samples"], result["num_reference"]) == (40, 180)
    for name in ALL:
        each = result["metrics"][name]
        assert each["low"] <= each["value"] <= each["high"]
    assert printed.count("95 % interval") == printed.count("N = 40 samples, 180 images") == len(ALL)
    assert "digits (resized to 8x8 (bicubic, antialiased) where they are not" in printed

    file = tmp_path / "samples.npy"
    assert cli.main(["sample", str(folder), "--num_images", "40", "--out", str(file), *draw]) == 0
    extractor = load_feature_extractor("digits")
    levels = np.round(np.load(file) * 16) / 8 - 1
    samples, images = (
        extractor(torch.from_numpy(each.astype(np.float32)).permute(0, 3, 1, 2))
        for each in (levels, held_out() * 2 - 1)
    )
    assert result["metrics"]["kid"]["value"] == pytest.approx(kernel_distance(samples, images), rel=1e-6)

    again = measure(folder, tmp_path / "again", "--metrics", "kid", "--samples", str(file))
    assert again["metrics"]["kid"] == result["metrics"]["kid"]


def test_the_number_does_not_depend_on_the_batch_size(folder, tmp_path):
    flags = ["--metrics", "kid", "--num_samples", "10", "--num_inference_steps", "3", "--feature_extractor", "pixels"]
    one, other = (measure(folder, tmp_path / size, *flags, "--batch_size", size) for size in ("10", "3"))
    assert one["metrics"]["kid"]["value"] == pytest.approx(other["metrics"]["kid"]["value"], rel=1e-3)


def test_another_scheduler_is_named(folder, tmp_path, capsys):
    flags = ["--metrics", "kid", "--num_samples", "8", "--scheduler", "DDIMScheduler", "--num_inference_steps", "4"]
    result = measure(folder, tmp_path / "out", *flags, "--scheduler_args", "timestep_spacing=trailing")
    assert result["samples"]["scheduler"] == "DDIMScheduler"
    assert result["samples"]["num_inference_steps"] == 4
    assert "DDIMScheduler, 4 steps" in capsys.readouterr().out


def write_samples(path: Path, images: np.ndarray) -> Path:
    """Images (N, 8, 8, 1) in [0, 1] as a file, or as a folder of PNG files."""
    if path.suffix == ".npz":
        np.savez(path, arr_0=np.round(images * 255).astype(np.uint8))
    elif path.suffix == ".npy":
        np.save(path, images[..., 0])
    else:
        path.mkdir()
        for number, image in enumerate(images):
            Image.fromarray(np.round(image[..., 0] * 255).astype(np.uint8)).save(path / f"{number:03}.png")
    return path


@pytest.mark.parametrize("name", ["folder", "file.npz", "file.npy"])
def test_the_held_out_images_themselves_are_perfect_samples(name, folder, tmp_path):
    """Of every form: rounding to 8 bits and back changes no level of the data."""
    samples = write_samples(tmp_path / name, held_out())
    result = measure(folder, tmp_path / "out", "--metrics", "fd", "prdc", "--samples", str(samples))
    values = {metric: each["value"] for metric, each in result["metrics"].items()}
    assert values["fd"] == pytest.approx(0, abs=1e-6)
    assert values["precision"] == values["recall"] == values["coverage"] == 1


def test_features_of_the_images_are_computed_once(folder, tmp_path, monkeypatch):
    """The second time they come from the cache; a damaged cache is made again; other images have their own."""
    samples = write_samples(tmp_path / "file.npy", held_out()[:30])
    flags = ["--metrics", "kid", "--samples", str(samples), "--feature_cache", str(tmp_path / "cache")]
    first = measure(folder, tmp_path / "out", *flags)
    (file,) = (tmp_path / "cache").iterdir()
    content = file.read_bytes()

    from diffusers_ddpm_ext.cli.sample_metrics import Measurement

    extracted = []
    real = Measurement.features
    monkeypatch.setattr(Measurement, "features", lambda self, *args: extracted.append(args[2:]) or real(self, *args))
    assert measure(folder, tmp_path / "out", *flags)["metrics"] == first["metrics"]
    assert extracted == [()]  # of the samples alone
    file.write_bytes(content[:-1])
    assert measure(folder, tmp_path / "out", *flags)["metrics"] == first["metrics"]
    assert file.read_bytes() == content
    measure(folder, tmp_path / "out", *flags, "--split", "train", "--max_images", "50")
    assert len(list((tmp_path / "cache").iterdir())) == 2


def test_the_result_goes_to_json_and_back(folder, tmp_path, capsys):
    samples = write_samples(tmp_path / "file.npy", held_out()[:30])
    flags = ["--metrics", "kid", "--samples", str(samples), "--json", str(tmp_path / "result.json")]
    result = measure(folder, tmp_path / "out", *flags)
    assert json.loads((tmp_path / "result.json").read_text()) == result
    measure(folder, tmp_path / "out", *flags)  # its own result may be replaced
    (tmp_path / "result.json").write_text('{"mine": 1}')
    line = error_line(capsys, folder, *flags)
    assert "exists and is not a result of this command" in line


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--metrics", "fid"], "--metrics fid must be one of fd, kid, prdc"),
        (["--metrics", "kid", "kid"], "names one twice"),
        (["--num_samples", "10"], "--num_samples has no effect on the bound: add --metrics"),
        (["--metrics", "kid", "--num_samples", "3"], "--num_samples"),
        (["--metrics", "kid", "--num_timesteps", "4"], "--num_timesteps has no effect on --metrics"),
        (["--metrics", "kid", "--nearest", "4"], "--nearest has no effect without --metrics prdc"),
        (["--metrics", "kid", "--samples", "missing"], "--samples missing does not exist"),
        (["--metrics", "kid", "--samples", "ok.npy", "--num_samples", "9"], "--num_samples has no effect on --sam"),
        (["--metrics", "kid", "--samples", "ok.npy", "--weights", "raw"], "--weights has no effect on --samples"),
        (["--metrics", "kid", "--samples", "wide.npy"], "(N, 8, 8, 1) is expected"),
        (["--metrics", "kid", "--samples", "large.npy"], "values outside [0, 1]"),
        (["--metrics", "kid", "--samples", "text.npy"], "is not a complete .npy or .npz file"),
        (["--metrics", "kid", "--samples", "integers.npy"], "int64"),
        (["--metrics", "kid", "--samples", "few.npy"], "at least 4 are needed"),
        (["--metrics", "prdc", "--samples", "ok.npy", "--nearest", "20"], "at least 42 are needed"),
        (["--metrics", "kid", "--feature_extractor", "text.npy"], "add --trust_feature_extractor"),
        (["--metrics", "kid", "--feature_extractor", "digits", "--trust_feature_extractor"], "digits is none"),
        (["--metrics", "kid", "--scheduler", "NoScheduler"], "is not a scheduler of Diffusers"),
        (["--metrics", "kid", "--num_inference_steps", "500"], "500"),
        (["--metrics", "kid", "--guidance_scale", "3"], "guidance"),
    ],
)  # fmt: skip
def test_bad_input_is_one_line(flags, message, folder, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    np.save("ok.npy", held_out()[:30])
    np.save("few.npy", held_out()[:3])
    np.save("wide.npy", np.zeros((9, 8, 9, 1), np.float32))
    np.save("large.npy", held_out()[:9] * 16)
    np.save("integers.npy", np.zeros((9, 8, 8, 1), np.int64))
    Path("text.npy").write_text("no array")
    drawing = [] if "--samples" in flags or "--num_samples" in flags else ["--num_samples", "8"]
    drawing = [] if "--metrics" not in flags else drawing
    line = error_line(capsys, folder, "--device", "cpu", "--out", "out", *flags, *drawing)
    assert message in line
    assert not list(Path("out").glob("sample*"))
