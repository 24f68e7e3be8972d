"""The training loop, in runs of a few steps."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState
from diffusers import UNet2DModel
from helpers.accelerate_state import fresh_accelerate  # noqa: F401
from helpers.runs import losses, rows, tiny_run
from safetensors.torch import load_file

from diffusers_ddpm_ext import DDPMExtPipeline
from diffusers_ddpm_ext.errors import ConfigError, RunError
from diffusers_ddpm_ext.training.loop.batches import open_batches
from diffusers_ddpm_ext.training.loop.description import describe_run
from diffusers_ddpm_ext.training.loop.metrics_logging import PROJECT
from diffusers_ddpm_ext.training.loop.setup import build_setup
from diffusers_ddpm_ext.training.loop.step import train_step
from diffusers_ddpm_ext.training.loop.stop_requests import StopRequest
from diffusers_ddpm_ext.training.loop.tasks import due_after
from diffusers_ddpm_ext.training.tracking.step_losses import LossMeter
from diffusers_ddpm_ext.training.trainer import train

UNET = "unet/diffusion_pytorch_model.safetensors"
RAW = "unet/diffusion_pytorch_model.raw.safetensors"


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("finished") / "run"
    assert train(tiny_run(folder, seed=3)) == folder
    AcceleratorState._reset_state(reset_partial_state=True)
    return folder


def weights(folder: Path, name: str = UNET) -> dict[str, torch.Tensor]:
    return load_file(folder / name)


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_files_of_a_finished_run(finished: Path):
    files = {path.relative_to(finished).as_posix() for path in finished.rglob("*") if path.is_file()}
    images = {"inputs", "diffusion_row", "samples-6", "denoise_row-6", "loss", "logvar"}
    best = {path for path in files if path.startswith("best/")}
    saved = {path for path in files if path.startswith(("unet/", "scheduler/", "logvar/"))}
    saved |= {"model_index.json", "ema.json"}
    assert {path.removeprefix("best/") for path in best} == saved | {"monitor.json"}
    checkpoints = {path for path in files if path.startswith("checkpoint-")}
    names = {path.rpartition("/")[2] for path in checkpoints}
    assert names == {"manifest.json", "state.json", *(f"{n}.safetensors" for n in ("model", "ema", "optimizer"))}
    assert files - best - checkpoints == {
        "finished.json", "ema.json", "config.yaml",
        "environment.json", "metrics.jsonl", "timing.jsonl", "samples.png",
        "model_index.json", "scheduler/scheduler_config.json", "unet/config.json", UNET, RAW,
        "logvar/config.json", "logvar/diffusion_pytorch_model.safetensors",
        *(f"samples/{name}.png" for name in images),
    }  # fmt: skip


def test_every_step_has_a_row(finished: Path):
    written = rows(finished)
    assert [row["step"] for row in written if "train/loss" in row] == [1, 2, 3, 4, 5, 6]
    first = next(row for row in written if row["step"] == 1)
    assert set(first) == {
        "step", "train/loss", "train/loss_simple", "train/loss_vlb", "train/loss_gamma", "train/grad_norm", "logvar",
        "lr",
    }  # fmt: skip
    checks = [row for row in written if "val/loss" in row]
    assert [row["step"] for row in checks] == [3, 6]
    names = ("loss", "loss_simple", "loss_vlb")
    assert set(checks[0]) == {"step", *(f"val/{n}" for n in names), *(f"val/{n}_ema" for n in names)}
    assert checks[0]["val/loss_simple"] != checks[0]["val/loss_simple_ema"]
    assert {"seconds", "images_per_second"} <= set(rows(finished, "timing.jsonl")[0])


def test_learning_rate_counts_optimizer_steps(finished: Path):
    """Warm-up of 2 steps from 0, then half a cosine that would reach 0 after the sixth."""
    lr = [row["lr"] for row in rows(finished) if "lr" in row]
    expected = [0, 1e-3, *(2e-3 * 0.5 * (1 + torch.cos(torch.tensor(torch.pi * n / 4)).item()) for n in range(4))]
    assert lr == pytest.approx(expected, rel=1e-6)


def test_the_folder_is_a_pipeline(finished: Path):
    """The EMA weights are the default files, the raw ones a variant, and logvar is saved, too."""
    pipeline = DDPMExtPipeline.from_pretrained(finished)
    raw = UNet2DModel.from_pretrained(finished, subfolder="unet", variant="raw")
    assert same(pipeline.unet.state_dict(), weights(finished))
    assert same(raw.state_dict(), weights(finished, RAW))
    assert not same(pipeline.unet.state_dict(), raw.state_dict())
    assert pipeline.logvar is not None
    assert pipeline.logvar.shape == (50,)
    assert (pipeline.logvar != 0).any()
    assert pipeline.scheduler.config.prediction_type == "v_prediction"


def test_the_same_seed_is_the_same_run(finished: Path, tmp_path: Path):
    """More validation, images and saving during the run change no value; another seed changes them all."""
    busy = tiny_run(
        tmp_path / "busy", seed=3, validation_steps=2, save_images_steps=2, save_model_epochs=1, logging_steps=1
    )
    train(busy)
    for name in (UNET, RAW, "logvar/diffusion_pytorch_model.safetensors"):
        assert same(weights(finished, name), weights(tmp_path / "busy", name))
    assert losses(finished) == losses(tmp_path / "busy")
    assert rows(finished)[-1] == rows(tmp_path / "busy")[-1], "the last validation"
    train(tiny_run(tmp_path / "other", seed=4))
    assert all(a != b for a, b in zip(losses(finished), losses(tmp_path / "other"), strict=True))


def test_accumulation_is_a_larger_batch(tmp_path: Path):
    whole = tiny_run(tmp_path / "whole", train_batch_size=8, dataloader_num_workers=1)
    parts = tiny_run(tmp_path / "parts", train_batch_size=2, gradient_accumulation_steps=4)
    train(whole)
    train(parts)
    assert losses(tmp_path / "parts") == pytest.approx(losses(tmp_path / "whole"), abs=1e-5)


def test_dropout_follows_its_keys(tmp_path: Path):
    """Runs with dropout repeat; the program's random numbers before them do not matter."""
    for name in ("one", "two"):
        torch.manual_seed(len(name) + (name == "two"))
        train(tiny_run(tmp_path / name, dropout=0.3, max_train_steps=3))
    train(tiny_run(tmp_path / "none", max_train_steps=3))
    assert losses(tmp_path / "one") == losses(tmp_path / "two")
    assert losses(tmp_path / "one") != losses(tmp_path / "none")


def test_without_ema_the_raw_weights_are_the_default(tmp_path: Path):
    folder = tmp_path / "run"
    train(tiny_run(folder, use_ema=False, learn_logvar=False, seed=3))
    assert not (folder / RAW).exists()
    assert not (folder / "logvar").exists()
    assert not (folder / "samples" / "logvar.png").exists()
    assert "val/loss_simple_ema" not in rows(folder)[-1]
    assert "logvar" not in rows(folder)[0]
    assert DDPMExtPipeline.from_pretrained(folder).logvar is None


def test_ema_without_memory_is_the_raw_weights(tmp_path: Path):
    folder = tmp_path / "run"
    train(tiny_run(folder, ema_decay=0.0, ema_use_num_updates=False))
    assert same(weights(folder), weights(folder, RAW))


def test_bfloat16_trains_close_to_float32(finished: Path, tmp_path: Path):
    train(tiny_run(tmp_path / "low", seed=3, mixed_precision="bf16"))
    low, full = losses(tmp_path / "low"), losses(finished)
    assert low != full
    assert low == pytest.approx(full, rel=0.05)
    assert all(tensor.dtype == torch.float32 for tensor in weights(tmp_path / "low").values())


def test_overwrite_output_dir_removes_the_first_run(tmp_path: Path):
    """--overwrite_output_dir: neither the logvar nor the raw weights nor the rows of the run before stay."""
    folder = tmp_path / "run"
    train(tiny_run(folder))
    train(tiny_run(folder, overwrite_output_dir=True, use_ema=False, learn_logvar=False, max_train_steps=2))
    assert len(losses(folder)) == 2
    assert not (folder / "logvar").exists()
    assert not (folder / RAW).exists()


def test_dry_run_prints_the_plan_and_writes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    options = {"dry_run": True, "gradient_accumulation_steps": 4, "beta_schedule": "scaled_linear"}
    assert train(tiny_run(tmp_path / "run", report_to="tensorboard", **options)) is None
    plan = capsys.readouterr().out
    for text in (
        "8x8",
        "scaled_linear",
        "CompVis: linear, v",
        "x 4 accumulated",
        "= 32",
        "6 optimizer",
        "down_blocks",
    ):
        assert text in plan
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "left"),
    [
        ({"num_train_timesteps": 1000}, None),
        ({"num_train_timesteps": 100}, "60%"),  # prod(1 - linspace(1e-4, 0.02, 100)) = 0.6030 ** 2
        ({"num_train_timesteps": 100, "beta_end": 0.2}, None),
        ({"num_train_timesteps": 100, "beta_schedule": "squaredcos_cap_v2"}, None),
        ({"num_train_timesteps": 100, "rescale_betas_zero_snr": True}, None),
    ],
)
def test_a_schedule_that_leaves_signal_is_a_warning(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], options: dict[str, Any], left: str | None
):
    train(tiny_run(tmp_path / "run", dry_run=True, **({"beta_schedule": "linear"} | options)))
    warnings = capsys.readouterr().err
    assert ("of the image's amplitude is left" in warnings) == (left is not None)
    assert (left or "") in warnings


@pytest.mark.skipif(torch.accelerator.is_available(), reason="runs take the accelerator, where size does not matter")
@pytest.mark.parametrize(
    ("options", "warned"),
    [
        ({"block_out_channels": [128, 256, 512], "resolution": 32}, True),
        ({"block_out_channels": [128, 256, 512], "resolution": 8}, False),
        ({"block_out_channels": [32, 64, 64], "resolution": 32}, False),
    ],
)
def test_a_network_too_large_for_a_cpu_is_a_warning(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], options: dict[str, Any], warned: bool
):
    """And the smaller network that it suggests can be requested."""
    small = {"num_train_timesteps": 1000, "attention_levels": [2], "norm_num_groups": 8, "layers_per_block": 2}
    train(tiny_run(tmp_path / "run", dry_run=True, **(small | options)))
    line = capsys.readouterr().err
    assert ("parameters on a CPU" in line) == warned
    assert ("--block_out_channels 32 64 64 --attention_levels 2 --norm_num_groups 8" in line) == warned


def test_parameters_in_the_table_add_up(tmp_path: Path):
    setup = build_setup(tiny_run(tmp_path / "run"))
    total = sum(parameter.numel() for parameter in setup.denoiser.parameters())
    table = describe_run(setup, None).split("plan")[0].splitlines()[1:]
    counts = [int(line.split()[1].replace(",", "")) for line in table]
    assert counts[-1] == total == sum(counts[:-1])


def test_tensorboard_gets_the_metrics(tmp_path: Path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder = tmp_path / "run"
    train(tiny_run(folder, report_to="tensorboard", logging_steps=3))
    read = EventAccumulator(str(folder / "logs" / PROJECT)).Reload()
    steps = [event.step for event in read.Scalars("train/loss")]
    assert steps == [3, 6]
    assert read.Scalars("train/loss")[0].value == pytest.approx(sum(losses(folder)[:3]) / 3, rel=1e-6)
    assert [event.step for event in read.Scalars("val/loss_simple_ema")] == [3, 6]


def test_a_non_finite_loss_stops_the_run(tmp_path: Path):
    """The rows end before the non-finite step, which is reported with its timesteps, though it was read later."""
    folder = tmp_path / "run"
    options = {"learning_rate": 1e18, "lr_scheduler": "constant", "lr_warmup_steps": 0, "adam_beta1": 0.0}
    with pytest.raises(RunError) as stop:
        train(tiny_run(folder, **options, logging_steps=6, validation_steps=0))
    good = [row["step"] for row in rows(folder)]
    assert good == list(range(1, len(good) + 1))
    text = str(stop.value)
    assert text.startswith(f"step {len(good) + 1}: ")
    assert "timesteps" in text
    assert "--learning_rate" in text
    assert "\n" not in text
    assert not (folder / "model_index.json").exists()


def test_logvar_is_clipped_separately(tmp_path: Path):
    """A limit far below the network's norm leaves the gradient of logvar as it is if that is small."""
    seen: list[torch.Tensor] = []
    setup = build_setup(
        tiny_run(tmp_path / "run", max_grad_norm=0.01, l_simple_weight=0.001, original_elbo_weight=1.0)
    )
    assert setup.learns_logvar

    def spy(*_) -> None:
        network = torch.nn.utils.get_total_norm([p.grad for p in setup.network_parameters])
        seen.append(torch.stack([setup.parts.objective.logvar.grad.norm(), network]))

    setup.optimizer.optimizer.register_step_pre_hook(spy)
    meter = LossMeter()
    meter.add(train_step(setup, 0, open_batches(setup, 0)))
    logvar, network = seen[0].tolist()
    assert network == pytest.approx(0.01, rel=1e-3)
    # each of 8 samples gives its entry l_simple_weight / 8 * (1 - loss), which is below 0.01 in all
    assert 0 < logvar < 0.01
    (record,) = meter.read(lambda tensor: tensor)
    assert record.grad_norm > 0.01


def test_work_is_due_by_steps_and_epochs(tmp_path: Path):
    """Epochs are those of one endless stream: with 8 of 1,617 images per step, the first ends within step 203."""
    setup = build_setup(tiny_run(tmp_path / "run", max_train_steps=500, save_model_epochs=1, save_images_steps=7))
    called = {"log_losses": [], "checkpoint": [], "validation": [], "images": [], "model": []}
    for step in range(1, 501):
        work = due_after(step, setup.config, setup.plan, StopRequest())
        for name in called:
            if name in work.tasks or getattr(work, name, False):
                called[name].append(step)
    assert called["model"] == [203, 405, 500]
    assert called["checkpoint"] == [500]
    assert called["images"] == list(range(7, 500, 7))
    assert called["validation"] == [*range(3, 500, 3), 500]
    others = {step for name in ("model", "images", "validation") for step in called[name]}
    assert called["log_losses"] == sorted({*range(4, 501, 4), *others, 500})


def test_unsupported_precision_is_refused(tmp_path: Path):
    if torch.accelerator.is_available():
        pytest.skip("this machine has fp16")
    with pytest.raises(ConfigError, match="--mixed_precision"):
        train(tiny_run(tmp_path / "run", mixed_precision="fp16"))
    assert list(tmp_path.iterdir()) == []


def test_config_is_written_for_the_next_run(finished: Path):
    from diffusers_ddpm_ext.training.config.train_config import parse_train_args

    again = parse_train_args(["--config", str(finished / "config.yaml")])
    assert again.loop.seed == 3
    assert again.loop.max_train_steps == 6
    assert json.dumps(again.to_flat_dict()["block_out_channels"]) == "[8, 16]"


def test_a_network_that_cannot_be_sampled_is_a_warning(tmp_path: Path, monkeypatch, capsys):
    """Weights of the average may overflow in sampling although every loss is finite."""

    def overflow(*arguments: Any) -> None:
        raise ValueError("Non-finite values in the model's first output")

    monkeypatch.setattr("diffusers_ddpm_ext.training.loop.previews.Preview.draw_samples", overflow)
    train(tiny_run(tmp_path / "run", max_train_steps=2))
    assert (tmp_path / "run" / "finished.json").is_file()
    assert "the images of step 2 could not be drawn: Non-finite values" in capsys.readouterr().err
