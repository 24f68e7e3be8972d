"""Training a first stage: its folder, its metrics, and a run that is killed and resumed to the same bytes."""

from __future__ import annotations

import itertools
import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, VQModel
from helpers.accelerate_state import fresh_accelerate, reset_accelerate  # noqa: F401
from helpers.paths import PYTHONPATH
from helpers.runs import TINY_VAE, losses, rows, tiny_vae_run
from helpers.tiny import tiny_autoencoder
from PIL import Image

from diffusers_ddpm_ext.errors import ConfigError, RunError
from diffusers_ddpm_ext.models.ema_metadata import load_ema_metadata
from diffusers_ddpm_ext.models.first_stage import FirstStage
from diffusers_ddpm_ext.models.first_stage_loading import load_first_stage
from diffusers_ddpm_ext.plotting.sheets import image_grid
from diffusers_ddpm_ext.training import trainer
from diffusers_ddpm_ext.training.config.autoencoder_config import AutoencoderConfig
from diffusers_ddpm_ext.training.data.dataset import load_data
from diffusers_ddpm_ext.training.loop import reconstruction, saving, workload
from diffusers_ddpm_ext.training.loop.batches import open_batches
from diffusers_ddpm_ext.training.loop.setup import build_setup
from diffusers_ddpm_ext.training.loop.step import train_step

EVERY = {"checkpointing_steps": 2, "max_train_steps": 7, "validation_steps": 3, "save_images_steps": 4, "seed": 5}


def run(folder: Path, **options: Any) -> Path:
    reset_accelerate()
    made = trainer.train(tiny_vae_run(folder, **(EVERY | options)))
    assert made is not None
    return made


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was never interrupted."""
    return run(tmp_path_factory.mktemp("straight") / "run")


@pytest.fixture(scope="module")
def digits() -> Any:
    return load_data(tiny_vae_run(Path("x")).data)


# ------------------------------------------------------------------ what a run leaves


def test_the_folder_is_a_first_stage(straight, digits):
    """Stock Diffusers loads it; the scale is 1 / std of the training images' latents."""
    stage = FirstStage(load_first_stage(straight))
    assert (stage.kind, stage.factor, stage.latent_channels, stage.pixel_channels) == ("kl", 2, 2, 1)
    everything = digits.train.pixels(range(len(digits.train)))
    latents = stage.encode(everything, torch.Generator().manual_seed(0))
    assert latents.std().item() == pytest.approx(1, rel=0.03)  # the run measured 512 of the 1,617 images
    raw = AutoencoderKL.from_pretrained(straight, variant="raw")
    assert raw.config.scaling_factor == stage.autoencoder.config.scaling_factor
    assert not torch.equal(raw.encoder.conv_in.weight, stage.autoencoder.encoder.conv_in.weight), "the default is EMA"
    assert load_ema_metadata(straight).num_updates == 7
    assert json.loads((straight / "finished.json").read_text())["step"] == 7
    best = json.loads((straight / "best" / "monitor.json").read_text())
    assert (best["monitor"], best["mode"]) == ("val/psnr_ema", "max")
    AutoencoderKL.from_pretrained(straight / "best")


def test_validation_is_that_of_the_saved_first_stage(straight, digits):
    """PSNR and distance of held-out images, computed from the folder alone."""
    stage = load_first_stage(straight)
    count = len(digits.validation)
    images = digits.validation.pixels([index * count // 20 for index in range(20)])
    with torch.no_grad():
        posterior = stage.encode(images).latent_dist
        decoded = stage.decode(posterior.mean).sample
    last = rows(straight)[-1]
    assert last["val/loss_simple_ema"] == pytest.approx((decoded - images).abs().mean().item(), rel=1e-5)
    assert last["val/kl_ema"] == pytest.approx(posterior.kl().mean().item(), rel=1e-5)
    error = (decoded.clamp(-1, 1) - images).square().mean((1, 2, 3))
    decibels = [10 * math.log10(4 / each) for each in error.tolist()]
    assert last["val/psnr_ema"] == pytest.approx(sum(decibels) / 20, rel=1e-5)


def test_originals_are_above_their_reconstructions(straight, digits):
    """Twelve held-out images in rows of eight: originals, reconstructions, four originals, four reconstructions."""
    chosen = digits.validation.pixels(torch.linspace(0, len(digits.validation) - 1, 12).long())
    stage = FirstStage(load_first_stage(straight))
    decoded, blank = stage.decode(stage.encode(chosen, mode=True)), torch.ones(4, 1, 8, 8)
    expected = image_grid(torch.cat([chosen[:8], decoded[:8], chosen[8:], blank, decoded[8:], blank]), columns=8)
    sheet = Image.open(straight / "reconstructions.png")
    difference = np.asarray(sheet, dtype=float) - np.asarray(expected, dtype=float)
    assert np.abs(difference).max() <= 1
    last = straight / "samples" / "reconstructions-7.png"
    assert last.read_bytes() == (straight / "reconstructions.png").read_bytes()


def test_metrics_and_curves(straight):
    steps = [row["step"] for row in rows(straight) if "train/loss" in row]
    assert steps == list(range(1, 8))
    names = {name for row in rows(straight) for name in row}
    kinds = ("psnr", "loss_simple", "loss", "kl")
    assert names == {"step", "lr", "train/grad_norm"} | {
        name for kind in kinds for name in (f"train/{kind}", f"val/{kind}", f"val/{kind}_ema")
    }
    assert {path.name for path in (straight / "samples").iterdir()} == {
        "inputs.png", "loss.png", "reconstructions-4.png", "reconstructions-7.png",
    }  # fmt: skip


def test_a_first_stage_learns(tmp_path, digits):
    """After a hundred steps the held-out images are reconstructed better than by the mean image."""
    folder = run(
        tmp_path / "run", max_train_steps=100, train_batch_size=16, learning_rate=5e-3, validation_steps=50,
        checkpointing_steps=100, save_images_steps=100, ema_decay=0.9,
    )  # fmt: skip
    first, last = (row["val/psnr_ema"] for row in rows(folder) if "val/psnr_ema" in row and row["step"] in (50, 100))
    assert last > first
    images, mean = digits.validation.pixels(range(180)), digits.train.pixels(range(1617)).mean(0, keepdim=True)
    assert last > 1 + (10 * (4 / (images - mean).square().mean((1, 2, 3))).log10()).mean().item()


def test_codes(tmp_path):
    folder = run(tmp_path / "run", first_stage_type="vq", num_vq_embeddings=16, max_train_steps=4)
    stage = FirstStage(load_first_stage(folder))
    assert (stage.kind, stage.factor, stage.autoencoder.config.num_vq_embeddings) == ("vq", 2, 16)
    assert VQModel.from_pretrained(folder).config.scaling_factor == stage.autoencoder.config.scaling_factor != 0.18215
    assert {"train/loss_codebook", "train/codes_per_batch"} <= rows(folder)[0].keys()


@pytest.mark.parametrize("kind", ["kl", "vq"])
def test_a_run_starts_from_an_autoencoder(kind, tmp_path):
    """Whatever its sizes and scale: at a learning rate of almost 0 its weights stay, and its scale is measured."""
    config = {"shift_factor": 2.0, "use_quant_conv": False} if kind == "kl" else {"vq_embed_dim": 5}
    first = tiny_autoencoder(kind, channels=1, latent_channels=3, layers_per_block=2, **config)
    first.save_pretrained(tmp_path / "first")
    sizes = {"compression", "latent_channels", "block_out_channels", "norm_num_groups"}
    options = {name: value for name, value in TINY_VAE.items() if name not in sizes} | EVERY
    options |= {"ckpt_path": str(tmp_path / "first"), "output_dir": str(tmp_path / "run"), "learning_rate": 1e-9}
    trainer.train(AutoencoderConfig.from_flat(options | {"max_train_steps": 1}))
    stage = FirstStage(load_first_stage(tmp_path / "run"))
    assert type(stage.autoencoder) is type(first)
    assert stage.autoencoder.state_dict().keys() == first.state_dict().keys()
    for name, tensor in stage.autoencoder.state_dict().items():
        torch.testing.assert_close(tensor, first.state_dict()[name], rtol=0, atol=1e-7)
    images = load_data(tiny_vae_run(Path("x")).data).train.pixels(range(512))
    assert stage.encode(images, torch.Generator().manual_seed(0)).std().item() == pytest.approx(1, rel=0.05)
    assert not stage.shift.any()


def test_without_average_and_validation(tmp_path):
    folder = run(tmp_path / "run", use_ema=False, validation_fraction=0.0, max_train_steps=3)
    assert not list(folder.glob("*.raw.safetensors"))
    assert not (folder / "best").exists()
    assert [row for row in rows(folder) if "val/psnr" in row] == []
    AutoencoderKL.from_pretrained(folder)


def test_a_loss_that_is_not_finite_ends_the_run(tmp_path):
    """The report names images and layers, and no timesteps, of which there are none."""
    with pytest.raises(RunError) as stop:
        run(tmp_path / "run", learning_rate=1e30, lr_warmup_steps=0)
    assert "the loss was nan (every sample), see" in str(stop.value)
    (folder,) = (tmp_path / "run" / "crash").iterdir()
    assert "encoder.conv_in" in (folder / "gradients.csv").read_text()
    assert not (tmp_path / "run" / "config.json").exists()


def test_a_dry_run_writes_nothing(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert trainer.train(tiny_vae_run(tmp_path / "run", dry_run=True)) is None
    text = capsys.readouterr().out
    assert "latents        4x4, 2 channels, AutoencoderKL" in text
    assert "l1, 1e-06 x KL" in text
    assert "schedule" not in text
    assert list(tmp_path.iterdir()) == []


# ------------------------------------------------------------------ killed and resumed


SLOW = pytest.mark.slow


class Killed(BaseException):
    """Stands for `kill -9`."""


def contents(folder: Path) -> dict[str, bytes]:
    names = ["metrics.jsonl", "finished.json", "config.json", "ema.json", "reconstructions.png"]
    paths = [*(folder / name for name in names), *folder.rglob("*.safetensors"), *folder.glob("samples/*.png")]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


def assert_same(ours: Path, theirs: Path) -> None:
    one, other = contents(ours), contents(theirs)
    assert one.keys() == other.keys()
    assert [name for name in one if one[name] != other[name]] == []


MOMENTS = {
    "between checkpoints": (trainer, "train_step", 6),
    "while a checkpoint is written": (saving.snapshots, "write_snapshot", 2),
    "in a validation": (workload, "reconstruction_metrics", 2),
    "while images are drawn": (reconstruction, "export_autoencoder", 1),
    "while the best is written": (saving, "_write_best", 2),
    "at the end, before the first stage": (workload, "save_autoencoder", 4),
    "just before the end is noted": (trainer, "mark_finished", 1),
}


OFTEN = ("between checkpoints", "at the end, before the first stage")


@pytest.mark.parametrize("moment", [name if name in OFTEN else pytest.param(name, marks=SLOW) for name in MOMENTS])
def test_killed_at(moment, straight, tmp_path):
    owner, name, call = MOMENTS[moment]
    real, count = getattr(owner, name), itertools.count(1)

    def last(*arguments: Any, **named: Any) -> Any:
        if next(count) < call:
            return real(*arguments, **named)
        raise Killed

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(owner, name, last)
        with pytest.raises(Killed):
            run(tmp_path / "run")
    run(tmp_path / "run", resume_from_checkpoint="auto")
    assert_same(tmp_path / "run", straight)


def test_another_first_stage_does_not_resume(straight, tmp_path):
    with pytest.raises(ConfigError, match=r"--kl_weight is 0\.5 and was 1e-06"):
        run(straight, resume_from_checkpoint="latest", kl_weight=0.5, max_train_steps=9)


@pytest.mark.slow
def test_sigkill_again_and_again(straight, tmp_path):
    """The command itself, killed at any time, until it is finished."""
    flags = [f"--{name}={value}" for name, value in (TINY_VAE | EVERY).items() if not isinstance(value, list | None)]
    command = [sys.executable, "-m", "diffusers_ddpm_ext", "train-vae", *flags, "--block_out_channels", "8", "8"]
    command += ["--save_images_epochs", "none", "--output_dir", "run", "--resume_from_checkpoint", "auto"]
    environment = os.environ | {"PYTHONPATH": PYTHONPATH, "OMP_NUM_THREADS": "1"}
    for delay in (0.0, 0.2, 0.5, 1.0, 2.0, None):
        child = subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=subprocess.DEVNULL)
        before = _rows_of(tmp_path / "run")
        while child.poll() is None and (delay is None or _rows_of(tmp_path / "run") == before):
            time.sleep(0.01)  # until it has trained again
        if delay is not None:
            time.sleep(delay)
            child.send_signal(signal.SIGKILL)
        assert child.wait() in (0, -signal.SIGKILL)
    assert_same(tmp_path / "run", straight)


def _rows_of(folder: Path) -> bytes:
    path = folder / "metrics.jsonl"
    return path.read_bytes() if path.exists() else b""


# ------------------------------------------------------------------ randomness and processes


def test_a_step_is_the_same_for_every_split(tmp_path):
    """The noise of the posterior belongs to the position in the effective batch: 1 x 8 is 2 x 4."""
    found = []
    for batch, accumulation in ((8, 1), (4, 2)):
        reset_accelerate()
        setup = build_setup(
            tiny_vae_run(
                tmp_path / "run", train_batch_size=batch, gradient_accumulation_steps=accumulation, kl_weight=1
            )
        )
        trace = train_step(setup, 0, open_batches(setup, 0))
        found.append((trace.norms, torch.stack([output.loss for output in trace.outputs]).mean()))
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-7)


@pytest.mark.slow
def test_two_processes_train_as_one(tmp_path):
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2",
        "-m", "diffusers_ddpm_ext", "train-vae",
    ]  # fmt: skip
    options = TINY_VAE | EVERY | {"train_batch_size": 4, "max_train_steps": 12}
    for name, value in options.items():
        values = ["none"] if value is None else map(str, value) if isinstance(value, list) else [str(value)]
        command += [f"--{name}", *values]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("ACCELERATE_")}
    environment |= {"PYTHONPATH": PYTHONPATH, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, "--output_dir", "two"], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-2000:]
    one = run(tmp_path / "one", max_train_steps=12)
    two = tmp_path / "two"
    assert losses(two) == pytest.approx(losses(one), rel=1e-4)
    scales = [json.loads((folder / "config.json").read_text())["scaling_factor"] for folder in (one, two)]
    assert scales[1] == pytest.approx(scales[0], rel=1e-3)
    for ours, theirs in zip(rows(two), rows(one), strict=True):
        assert ours.keys() == theirs.keys()
        if "val/psnr_ema" in ours:
            assert ours["val/psnr_ema"] == pytest.approx(theirs["val/psnr_ema"], rel=1e-4)
