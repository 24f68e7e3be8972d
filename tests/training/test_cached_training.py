"""Training from cached latents: the bits of training without a cache, on every path, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.accelerate_state import fresh_accelerate, reset_accelerate  # noqa: F401
from helpers.runs import rows, tiny_flags, tiny_run
from helpers.tiny import tiny_autoencoder
from PIL import Image

from diffusers_ddpm_ext.cli import main
from diffusers_ddpm_ext.errors import ConfigError
from diffusers_ddpm_ext.models.first_stage import FirstStage
from diffusers_ddpm_ext.training import trainer
from diffusers_ddpm_ext.training.config.latent_options import LATENT_CACHE
from diffusers_ddpm_ext.training.config.train_config import TrainConfig, parse_train_args


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """First stages of two kinds, and 14 gray images, each with a gray picture; in `wide` they are wider than high."""
    folder = tmp_path_factory.mktemp("inputs")
    for kind in ("kl", "vq"):
        tiny_autoencoder(kind, channels=1, latent_channels=2).save_pretrained(folder / kind)
    draw = np.random.default_rng(0)
    for name, width in (("images", 8), ("wide", 10)):
        (folder / name / ".pictures").mkdir(parents=True)
        lines = ["file_name,picture"]
        for number in range(14):
            for path in (f"{number}.png", f".pictures/{number}.png"):
                Image.fromarray(draw.integers(0, 256, (8, width), dtype=np.uint8)).save(folder / name / path)
            lines.append(f"{number}.png,.pictures/{number}.png")
        (folder / name / "metadata.csv").write_text("\n".join(lines) + "\n")
    return folder


def options_of(inputs: Path, kind: str = "kl", **options: Any) -> dict[str, Any]:
    data = {
        "train_data_dir": str(inputs / "images"),
        "channels": None,
        "validation_fraction": 0.2,
        "vae": inputs / kind,
    }
    run = {"random_flip": True, "train_batch_size": 4, "checkpointing_steps": 2, "num_preview_images": 1, "seed": 3}
    return data | run | {"vae": str(inputs / kind)} | options


def train(folder: Path, **options: Any) -> None:
    reset_accelerate()
    trainer.train(tiny_run(folder, **options))


def results(folder: Path) -> dict[str, bytes]:
    """The files that a run's numbers determine, previews included."""
    names = ["metrics.jsonl", *(f"checkpoint-6/{name}.safetensors" for name in ("model", "ema", "optimizer"))]
    pictures = [path.relative_to(folder).as_posix() for path in sorted(folder.rglob("*.png"))]
    assert len(pictures) > 1
    return {name: (folder / name).read_bytes() for name in [*names, *pictures]}


CONCAT = {"conditioning_key": "concat", "concat_column": "picture", "concat_through_vae": True}


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({}, marks=pytest.mark.slow),
        pytest.param({"kind": "vq", "gradient_accumulation_steps": 2, "scale_factor": "data"}, marks=pytest.mark.slow),
        pytest.param(CONCAT | {"concat_through_vae": "sample"}, marks=pytest.mark.slow),
        CONCAT | {"conditioning_dropout": {"concat_inputs": 0.3}, "dataloader_num_workers": 1, "latent_stats": True},
    ],
    ids=["kl", "vq", "sampled", "concat"],
)
def test_cached_and_uncached_training_are_equal_to_the_bit(options, inputs, tmp_path, monkeypatch):
    """And the second cached run encodes nothing at all, but pictures whose posteriors are sampled anew each time."""
    options = options_of(inputs, **options)
    train(tmp_path / "plain", **options)
    train(tmp_path / "cached", **options, cache_latents=str(tmp_path / "cache"))

    def posterior(self: FirstStage, pixels: torch.Tensor) -> Any:
        assert not pixels.any(), "encoded again"
        return original(self, pixels)

    original = FirstStage.posterior
    if options.get("concat_through_vae") != "sample":
        monkeypatch.setattr(FirstStage, "posterior", posterior)
    train(tmp_path / "again", **options, cache_latents=str(tmp_path / "cache"))
    expected = results(tmp_path / "plain")
    for name in ("cached", "again"):
        assert results(tmp_path / name) == expected


@pytest.mark.slow
def test_a_run_resumes_with_and_without_a_cache(inputs, tmp_path):
    options = options_of(inputs, lr_scheduler="constant", lr_warmup_steps=0)
    train(tmp_path / "plain", **options)
    options |= {"output_dir": str(tmp_path / "mixed"), "resume_from_checkpoint": "auto"}
    cache = str(tmp_path / "cache")
    train(tmp_path, **options, max_train_steps=2)
    train(tmp_path, **options, max_train_steps=4, cache_latents=cache)
    train(tmp_path, **options)
    for name in ("model", "ema", "optimizer"):
        path = f"checkpoint-6/{name}.safetensors"
        assert (tmp_path / "mixed" / path).read_bytes() == (tmp_path / "plain" / path).read_bytes()
    with pytest.raises(ConfigError, match="--cache_latents_dtype is float16 and was float32"):
        train(tmp_path, **options | {"max_train_steps": 8}, cache_latents=cache, cache_latents_dtype="float16")


@pytest.mark.slow
def test_float16_is_another_run_that_learns_alike(inputs, tmp_path):
    options = options_of(inputs, cache_latents=str(tmp_path / "cache"))
    train(tmp_path / "full", **options)
    train(tmp_path / "half", **options, cache_latents_dtype="float16")
    (full,), (half,) = ([row for row in rows(tmp_path / name) if "val/loss" in row][-1:] for name in ("full", "half"))
    assert full["val/loss"] != half["val/loss"]
    assert half["val/loss"] == pytest.approx(full["val/loss"], rel=1e-3)


def run_command(capsys: pytest.CaptureFixture[str], *argv: str) -> tuple[int, str]:
    reset_accelerate()
    status = main(["train", *argv])
    return status, capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"train_data_dir": "wide"}, "images of 8x10 are cropped to 8x8 at random places: add --center_crop"),
        ({"cache_latents": "file"}, "file is a file: name a folder"),
        ({"cache_latents": "/proc/latents"}, "cannot be written: No such file or directory; name another folder"),
    ],
)
def test_what_cannot_be_cached_is_refused_in_one_line_and_nothing_is_lost(options, message, inputs, tmp_path, capsys):
    """The former run stays, although the new one would overwrite it."""
    (tmp_path / "file").touch()
    run = tmp_path / "run"
    train(run, **options_of(inputs, max_train_steps=1))
    before = sorted(path for path in run.rglob("*") if path.is_file())
    chosen = options_of(inputs, output_dir=str(run), overwrite_output_dir=True, cache_latents=str(tmp_path / "cache"))
    for name, value in options.items():
        chosen[name] = str((inputs if name == "train_data_dir" else tmp_path) / value)
    capsys.readouterr()
    status, error = run_command(capsys, *tiny_flags(**chosen))
    assert status == 2
    (line,) = [line for line in error.splitlines() if not line.startswith("warning:")]
    assert line.startswith("error: --cache_latents")
    assert message in line
    assert sorted(path for path in run.rglob("*") if path.is_file()) == before
    assert not (tmp_path / "cache").exists()


@pytest.mark.slow
def test_wide_images_are_cached_with_their_center(inputs, tmp_path):
    options = options_of(inputs, train_data_dir=str(inputs / "wide"), center_crop=True)
    train(tmp_path / "plain", **options)
    train(tmp_path / "cached", **options, cache_latents=str(tmp_path / "cache"))
    assert results(tmp_path / "cached") == results(tmp_path / "plain")


def test_a_dry_run_writes_no_cache(inputs, tmp_path, capsys):
    train(tmp_path / "run", **options_of(inputs, dry_run=True, cache_latents=str(tmp_path / "cache")))
    assert list(tmp_path.iterdir()) == []
    assert f"latent cache   {tmp_path / 'cache'}\n" in capsys.readouterr().out


def test_the_plan_states_the_size_of_the_cache(inputs, tmp_path, capsys):
    train(tmp_path / "run", **options_of(inputs, max_train_steps=1, cache_latents=str(tmp_path / "cache")))
    size = sum(path.stat().st_size for path in tmp_path.glob("cache/*/*.bin"))
    assert f"latent cache   {tmp_path / 'cache'}, {size / 1000:.3g} kB" in capsys.readouterr().out


# ------------------------------------------------------------------ options


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        ([], None),
        (["--cache_latents"], LATENT_CACHE),
        (["--cache_latents", "true"], LATENT_CACHE),
        (["--cache_latents", "false"], None),
        (["--cache_latents", "some/folder"], "some/folder"),
        (["--cache-latents=some/folder"], "some/folder"),
    ],
)
def test_the_folder_is_optional(argv, expected, inputs):
    config = parse_train_args(["--vae", str(inputs / "kl"), *argv, "--resolution", "8"])
    assert config.latents.cache_latents == expected


@pytest.mark.parametrize(("value", "expected"), [(True, LATENT_CACHE), (False, None), (None, None), ("x", "x")])
def test_a_file_may_say_true(value, expected, inputs):
    config = TrainConfig.from_flat({"vae": str(inputs / "kl"), "resolution": 8, "cache_latents": value})
    assert config.latents.cache_latents == expected


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--cache_latents"], "--cache_latents runs/latents has no effect without --vae"),
        (["--cache_latents_dtype", "float16"], "--cache_latents_dtype float16 has no effect without --vae"),
        (["--vae", "VAE", "--cache_latents_dtype", "float16"], "has no effect without --cache_latents: add that"),
        (["--vae", "VAE", "--cache_latents", "--cache_latents_dtype", "bfloat16"], "one of float32, float16"),
        (["--vae", "VAE", "--cache_latents", ""], "--cache_latents takes text"),
    ],
)
def test_options_without_effect_are_refused(argv, message, inputs):
    with pytest.raises(ConfigError, match=message):
        parse_train_args([str(inputs / "kl") if word == "VAE" else word for word in argv])
