"""Processes, micro-batches, engines, activation checkpointing and compilers must not change the results of a run."""

from __future__ import annotations

import itertools
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from helpers.accelerate_state import fresh_accelerate, reset_accelerate  # noqa: F401
from helpers.caption_runs import caption_inputs
from helpers.paths import PYTHONPATH, TESTS
from helpers.runs import losses, rows, tiny_run
from PIL import Image
from safetensors.torch import load_file

from diffusers_ddpm_ext import DDPMExtPipeline
from diffusers_ddpm_ext.errors import ConfigError, RunError
from diffusers_ddpm_ext.models.ema import LitEMA
from diffusers_ddpm_ext.training import distributed, trainer
from diffusers_ddpm_ext.training.config.train_config import parse_train_args
from diffusers_ddpm_ext.training.data import batches as stream
from diffusers_ddpm_ext.training.data import dataset as data
from diffusers_ddpm_ext.training.factory.acceleration import uses_channels_last
from diffusers_ddpm_ext.training.loop import run_batches, step
from diffusers_ddpm_ext.training.loop.setup import build_setup
from diffusers_ddpm_ext.utils import host_reads

SCRIPT = TESTS / "helpers" / "run_list.py"
MODEL = "unet/diffusion_pytorch_model.safetensors"
RAW = "unet/diffusion_pytorch_model.raw.safetensors"


def train(folder: Path, **options: Any) -> Path:
    reset_accelerate()
    trainer.train(tiny_run(folder, **options))
    return folder


def on_two_processes(runs: list[tuple[Path, dict[str, Any]]], *modes: str, limit: int = 240) -> str:
    """Train with `torchrun`, within a limit: a collective call that a process misses would wait for hours."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("ACCELERATE_")}
    environment |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": PYTHONPATH}
    runs_json = json.dumps([[str(folder), options] for folder, options in runs])
    done = subprocess.run(
        [*launcher, str(SCRIPT), runs_json, *modes], env=environment, capture_output=True, text=True, timeout=limit
    )
    assert done.returncode == 0, done.stderr[-9000:]
    return done.stdout + done.stderr


def close(one: Path, other: Path, atol: float) -> None:
    ours, theirs = load_file(one), load_file(other)
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        torch.testing.assert_close(
            ours[name], tensor, atol=atol, rtol=0, msg=lambda text, name=name: f"{name}: {text}"
        )


def equal(one: Path, other: Path) -> bool:
    return one.read_bytes() == other.read_bytes()


# --- learning rate -------------------------------------------------------------------------------------------------

ENDING = {"max_train_steps": 4, "validation_steps": 0, "lr_scheduler": "linear", "lr_warmup_steps": 1}


@pytest.fixture(scope="module")
def ends(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[int, int], list[float]]:
    """Learning rates of every step over accumulation {1, 2, 4} x processes {1, 2}."""
    base = tmp_path_factory.mktemp("ends")
    options = {k: ENDING | {"gradient_accumulation_steps": k, "train_batch_size": 2} for k in (1, 2, 4)}
    for k in (1, 2, 4):
        train(base / f"1-{k}", **options[k])
    on_two_processes([(base / f"2-{k}", options[k]) for k in (1, 2, 4)])
    return {
        (processes, k): [row["lr"] for row in rows(base / f"{processes}-{k}") if "lr" in row]
        for processes in (1, 2)
        for k in (1, 2, 4)
    }


@pytest.mark.parametrize("accumulation", [1, 2, 4])
@pytest.mark.parametrize("processes", [1, 2])
def test_the_lr_schedule_ends_with_the_run(ends, processes, accumulation):
    """Linear after one step of warm-up: 0, 1, 2/3, 1/3 of the peak in the four steps, and 0 after the last."""
    assert ends[processes, accumulation] == pytest.approx([0, 2e-3, 2e-3 * 2 / 3, 2e-3 / 3])


@pytest.mark.parametrize(("scaling", "factor"), [("none", 1), ("linear", 16), ("sqrt", 4)])
def test_lr_scaling(scaling, factor, tmp_path, capsys):
    """The effective batch is 8 x 2; CompVis' scale_lr multiplies by all of it."""
    options = {
        "lr_scaling": scaling,
        "gradient_accumulation_steps": 2,
        "lr_scheduler": "constant",
        "lr_warmup_steps": 0,
    }
    train(tmp_path / "run", max_train_steps=1, learning_rate=1e-5, **options)
    assert rows(tmp_path / "run")[0]["lr"] == pytest.approx(1e-5 * factor)
    plan = capsys.readouterr().out
    assert ("effective batch 16" in plan) == (scaling != "none")
    assert "8 per device x 2 accumulated x 1 process = 16" in plan


def test_the_plan_lists_memory_and_disk(tmp_path, capsys):
    train(tmp_path / "run", max_train_steps=4, checkpointing_steps=1, checkpoints_total_limit=2, save_top_k=0)
    plan = capsys.readouterr().out
    count = sum(tensor.numel() for tensor in load_file(tmp_path / "run" / RAW).values()) + 50  # and logvar
    assert f"{4 * count / 1000:.3g} kB weights + {4 * count / 1000:.3g} kB gradients" in plan
    size = sum(path.stat().st_size for path in (tmp_path / "run" / "checkpoint-4").glob("*.safetensors"))
    line = next(line for line in plan.splitlines() if line.strip().startswith("checkpoints"))
    assert line.split()[1:3] == ["2", "of"]
    assert float(line.split()[3]) * 1000 == pytest.approx(size, rel=0.15)


# --- EMA -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("every", "updates"), [("step", 3), ("micro_batch", 6)])
def test_ema_every(every, updates, tmp_path, monkeypatch):
    """Lightning calls LitEma after each batch: with two micro-batches, once before and once after the weights move."""
    seen: list[list[torch.Tensor]] = []
    real = step.train_step

    def watched(setup: Any, *arguments: Any) -> Any:
        seen.append([p.detach().clone() for p in setup.network_parameters])
        trace = real(setup, *arguments)
        seen.append([p.detach().clone() for p in setup.network_parameters])
        return trace

    monkeypatch.setattr(trainer, "train_step", watched)
    folder = train(
        tmp_path / "run", max_train_steps=3, ema_every=every, gradient_accumulation_steps=2, checkpointing_steps=3
    )
    reference = torch.nn.ParameterList([torch.nn.Parameter(p.clone()) for p in seen[0]])
    ema = LitEMA(reference, 0.999)
    for before, after in zip(seen[::2], seen[1::2], strict=True):
        for weights in [before, after] if every == "micro_batch" else [after]:
            with torch.no_grad():
                for parameter, value in zip(reference, weights, strict=True):
                    parameter.copy_(value)
            ema.step(reference)
    assert ema.num_updates == updates
    saved = load_file(folder / "checkpoint-3" / "ema.safetensors")
    names = [name for name, _ in DDPMExtPipeline.from_pretrained(folder).unet.named_parameters()]
    for name, shadow in zip(names, ema.shadow.values(), strict=True):
        assert torch.equal(saved[name], shadow), name


# --- how it computes -----------------------------------------------------------------------------------------------


def test_gradient_checkpointing_is_bit_exact(tmp_path):
    options = {"max_train_steps": 3, "dropout": 0.1}
    plain = train(tmp_path / "plain", **options)
    kept = train(tmp_path / "kept", gradient_checkpointing=True, **options)
    assert equal(plain / RAW, kept / RAW)
    assert rows(plain) == rows(kept)


@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")  # torch's own, when its compiler loads
@pytest.mark.slow
@pytest.mark.parametrize("how", ["option", "accelerate"])
def test_a_compiled_run_saves_the_same_names_and_resumes(how, tmp_path, monkeypatch):
    """By the option, or by a configuration of Accelerate that wraps the task."""
    options: dict[str, Any] = {"max_train_steps": 4, "checkpointing_steps": 2, "validation_steps": 0}
    plain = train(tmp_path / "plain", **options)
    if how == "option":
        options["torch_compile"] = True
        real = torch.compile
        monkeypatch.setattr(torch, "compile", lambda what, **how: real(what, **{"backend": "eager"} | how))
    else:
        monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "EAGER")
    compiled = train(tmp_path / "compiled", **options)
    for name in (MODEL, RAW, "checkpoint-4/model.safetensors", "checkpoint-4/optimizer.safetensors"):
        close(compiled / name, plain / name, 1e-4)
    torch._dynamo.reset()
    broken = train(tmp_path / "broken", **options, max_train_minutes=1e-9)
    while not (broken / "model_index.json").exists():
        train(tmp_path / "broken", **options, resume_from_checkpoint="latest")
    assert equal(broken / "checkpoint-4/model.safetensors", compiled / "checkpoint-4/model.safetensors")


# --- two processes -------------------------------------------------------------------------------------------------

TWENTY = {"max_train_steps": 20, "validation_steps": 10, "checkpointing_steps": 7}
HALF = {"train_batch_size": 4, "resume_from_checkpoint": "auto"}


def broken_off(folder: Path, at: int, **options: Any) -> None:
    """A run that ends before its step `at`, as a killed one does."""
    real, count = trainer.train_step, itertools.count(1)

    def dying(*arguments: Any) -> Any:
        if next(count) == at:
            raise KeyboardInterrupt
        return real(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer, "train_step", dying)
        with pytest.raises(KeyboardInterrupt):
            train(folder, **options)


@pytest.fixture(scope="module")
def one_process(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The uninterrupted run in one process."""
    return train(tmp_path_factory.mktemp("whole") / "run", **TWENTY)


@pytest.mark.slow
def test_a_run_resumes_on_another_number_of_processes(one_process, tmp_path):
    """7 steps of 1 x 8, then 13 of 2 x 4; and one process resumes the run of two."""
    broken_off(tmp_path / "two", 10, **TWENTY)
    on_two_processes([(tmp_path / "two", TWENTY | HALF)])
    ours, theirs = losses(tmp_path / "two"), losses(one_process)
    assert len(ours) == 20
    assert ours[:7] == theirs[:7]
    assert ours == pytest.approx(theirs, abs=1e-3)
    assert [row["step"] for row in rows(tmp_path / "two")] == [row["step"] for row in rows(one_process)]

    on_two_processes([(tmp_path / "one", TWENTY | HALF | {"max_train_minutes": 1e-9})])
    train(tmp_path / "one", **TWENTY, resume_from_checkpoint="latest")
    assert losses(tmp_path / "one") == pytest.approx(theirs, abs=1e-3)


@pytest.mark.slow
def test_a_sharded_run_is_the_same_run(one_process, tmp_path):
    """`fully_shard` through all of the trainer: clipping, EMA, validation, images, checkpoints, `best`, pipeline.

    A run that DDP started resumes sharded, and the other way round.
    """
    sharded, back, forth = tmp_path / "sharded", tmp_path / "back", tmp_path / "forth"
    half = TWENTY | HALF | {"save_images_steps": 10, "num_preview_images": 3}
    broken_off(forth, 10, **TWENTY)
    output = on_two_processes([(sharded, half), (back, half | {"max_train_minutes": 1e-9}), (forth, half)], "sharded")
    assert "FSDP2" in output
    train(back, **TWENTY, resume_from_checkpoint="latest")
    for folder in (sharded, back, forth):
        assert losses(folder) == pytest.approx(losses(one_process), abs=1e-3), folder.name
        validations = [row["val/loss_simple_ema"] for row in rows(folder) if "val/loss_simple_ema" in row]
        assert validations == pytest.approx(
            [row["val/loss_simple_ema"] for row in rows(one_process) if "val/loss_simple_ema" in row], abs=1e-3
        )
        for name in (MODEL, RAW, "best/" + MODEL, "checkpoint-20/ema.safetensors"):
            close(folder / name, one_process / name, 2e-3)
    assert (sharded / "samples" / "samples-10.png").is_file()
    images = [np.asarray(Image.open(folder / "samples.png"), dtype=float) for folder in (back, one_process)]
    assert np.abs(images[0] - images[1]).mean() < 4


@pytest.mark.slow
def test_a_trained_text_encoder_is_sharded_too(tmp_path):
    options = caption_inputs(tmp_path) | {
        "train_text_encoder": True,
        "validation_bpd": True,
        "validation_bpd_steps": 2,
    }
    whole = train(tmp_path / "whole", **options)
    on_two_processes([(tmp_path / "sharded", options | {"train_batch_size": 4})], "sharded")
    for name in (MODEL, RAW, "text_encoder/model.safetensors", "checkpoint-4/model.safetensors"):
        close(tmp_path / "sharded" / name, whole / name, 2e-3)
    bounds = [[row["val/bpd"] for row in rows(folder) if "val/bpd" in row] for folder in (whole, tmp_path / "sharded")]
    assert len(bounds[0]) == 2
    assert bounds[1] == pytest.approx(bounds[0], rel=1e-3)


# --- failures ------------------------------------------------------------------------------------------------------


def test_a_killed_worker_changes_no_result(tmp_path, monkeypatch, capfd):
    options = {"max_train_steps": 12, "dataloader_num_workers": 1, "random_flip": True, "validation_steps": 0}
    straight = train(tmp_path / "straight", **options)
    real = stream._loader
    workers: list[int] = []

    class Watched:
        def __init__(self, loader: Any) -> None:
            self.loader = loader

        def __iter__(self) -> Any:
            iterator = iter(self.loader)
            workers.extend(worker.pid for worker in iterator._workers)
            return iterator

    def killing(setup: Any, number: int, batches: Any) -> Any:
        if number == 5 and len(workers) == 1:
            os.kill(workers[0], signal.SIGKILL)
        return step.train_step(setup, number, batches)

    monkeypatch.setattr(stream, "_loader", lambda *arguments: Watched(real(*arguments)))
    monkeypatch.setattr(trainer, "train_step", killing)
    folder = train(tmp_path / "run", **options)
    assert len(workers) == 2
    assert "warning: --dataloader_num_workers: a worker died" in capfd.readouterr().err
    assert equal(folder / RAW, straight / RAW)
    assert rows(folder) == rows(straight)


def photos(folder: Path, count: int = 24) -> Path:
    folder.mkdir()
    draw = np.random.default_rng(0)
    for number in range(count):
        Image.fromarray(draw.integers(0, 256, (10, 10), dtype=np.uint8)).save(folder / f"{number:02}.png")
    return folder


@pytest.mark.parametrize("skip", [False, True])
def test_an_image_that_becomes_unreadable(skip, tmp_path, monkeypatch, capfd):
    """The run stops and names the file, or with ``--skip_bad_images`` the next image replaces it."""
    folder = photos(tmp_path / "photos")
    monkeypatch.setattr(data.load_data, "__kwdefaults__", {"progress": False, "memory_limit": 0})
    real = run_batches.open_batches

    def breaking(*arguments: Any, **more: Any) -> Any:
        for path in sorted(folder.iterdir())[::3]:
            path.write_bytes(path.read_bytes()[:40])
        return real(*arguments, **more)

    monkeypatch.setattr(run_batches, "open_batches", breaking)
    options = {
        "train_data_dir": str(folder),
        "skip_bad_images": skip,
        "validation_fraction": 0.0,
        "cache_images": "never",
    }
    options["dataloader_num_workers"] = 1
    if not skip:
        with pytest.raises(RunError, match=r"\.png.*--skip_bad_images"):
            train(tmp_path / "run", **options)
        return
    train(tmp_path / "run", **options)
    errors = capfd.readouterr().err
    for path in sorted(folder.iterdir())[::3]:
        assert errors.count(f"{path.name}'") == 1, "each is reported once"
    assert len(losses(tmp_path / "run")) == 6


@pytest.mark.slow
def test_one_process_that_stops_takes_the_other_with_it(tmp_path):
    """The second process cannot read an image any more: the first does not wait for it."""
    options = {"train_data_dir": str(photos(tmp_path / "photos")), "validation_fraction": 0.0, "cache_images": "never"}
    with pytest.raises(AssertionError, match="became unreadable"):
        on_two_processes([(tmp_path / "run", options)], "unreadable", limit=60)


@pytest.mark.parametrize("when", ["at the start", "on the way"])
def test_a_tracker_that_is_down_does_not_end_the_run(when, tmp_path, monkeypatch, capsys):
    from accelerate.tracking import TensorBoardTracker

    def down(*_: Any, **__: Any) -> None:
        raise ConnectionError("tracker.example: no route to host")

    monkeypatch.setattr(TensorBoardTracker, "start" if when == "at the start" else "log", down)
    straight = train(tmp_path / "straight")
    folder = train(tmp_path / "run", report_to="tensorboard")
    errors = capsys.readouterr().err
    assert errors.count("no route to host") == 1
    assert "warning: --report_to" in errors
    assert rows(folder) == rows(straight)


@pytest.mark.slow
def test_channels_last_changes_the_order_in_memory_and_no_file(tmp_path):
    """Losses up to rounding; the files of either order are alike, and a run resumes bit-exactly."""
    options: dict[str, Any] = {"max_train_steps": 4, "checkpointing_steps": 2, "validation_steps": 0}
    plain = train(tmp_path / "plain", **options)
    options["channels_last"] = "always"
    ours = train(tmp_path / "ours", **options)
    setup = build_setup(tiny_run(tmp_path / "x", **options))
    kernel = setup.denoiser.down_blocks[0].resnets[0].conv1.weight
    assert kernel.is_contiguous(memory_format=torch.channels_last)
    assert not kernel.is_contiguous()
    assert setup.ema.shadow["down_blocks.0.resnets.0.conv1.weight"].stride() == kernel.stride()
    for name in (MODEL, RAW, "checkpoint-4/model.safetensors", "checkpoint-4/optimizer.safetensors"):
        close(ours / name, plain / name, 1e-4)
    broken = train(tmp_path / "broken", **options, max_train_minutes=1e-9)
    while not (broken / "model_index.json").exists():
        train(tmp_path / "broken", **options, resume_from_checkpoint="latest")
    assert equal(broken / "checkpoint-4/optimizer.safetensors", ours / "checkpoint-4/optimizer.safetensors")
    assert equal(broken / MODEL, ours / MODEL)


def test_a_mode_of_compilation_is_refused_where_it_has_no_effect(tmp_path):
    with pytest.raises(ConfigError, match="--torch_compile_mode max-autotune has no effect without --torch_compile"):
        parse_train_args(["--torch_compile_mode", "max-autotune"])
    with pytest.raises(ConfigError, match=r"--torch_compile_mode reduce-overhead records CUDA graphs.* on cpu"):
        build_setup(tiny_run(tmp_path / "run", torch_compile=True, torch_compile_mode="reduce-overhead"))


@pytest.mark.parametrize(
    ("gpu", "computes_bf16", "launcher", "expected"),
    [(True, True, None, "bf16"), (True, False, None, None), (True, True, "no", None), (False, True, None, None)],
)
def test_bf16_is_the_default_where_a_gpu_computes_in_it(gpu, computes_bf16, launcher, expected, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: computes_bf16)
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION", raising=False)
    if launcher is not None:
        monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", launcher)
    assert distributed.default_precision() == expected


@pytest.mark.parametrize(
    ("device", "precision", "fsdp", "auto"),
    [("cuda", "bf16", False, True), ("cuda", "fp16", False, True), ("cuda", "no", False, False),
     ("cuda", "bf16", True, False), ("cpu", "bf16", False, False)],
)  # fmt: skip
def test_channels_last_by_rule(device, precision, fsdp, auto, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true" if fsdp else "false")
    accelerator: Any = SimpleNamespace(device=torch.device(device), mixed_precision=precision)
    assert uses_channels_last("auto", accelerator) == auto
    assert not uses_channels_last("never", accelerator)
    if fsdp:
        with pytest.raises(ConfigError, match="--channels_last always: FSDP"):
            uses_channels_last("always", accelerator)
    else:
        assert uses_channels_last("always", accelerator)


@pytest.mark.slow
def test_two_processes_of_an_accelerator_are_one_with_twice_the_micro_batches(tmp_path, monkeypatch):
    """Noise, stratified steps, the history of a learning sampler and verdicts, none of which the host knows."""
    runs = {}
    for sampler in ("stratified", "loss_second_moment"):
        options = {"max_train_steps": 8, "timestep_sampler": sampler, "num_train_timesteps": 3, "on_nonfinite": "skip"}
        options |= {"train_batch_size": 4, "validation_steps": 0, "ddpm_num_inference_steps": 3, "seed": 2}
        runs[sampler] = options
    on_two_processes([(tmp_path / name / "two", options) for name, options in runs.items()], "device")
    monkeypatch.setattr(host_reads, "FREE", frozenset())
    for name, options in runs.items():
        one = train(tmp_path / name / "one", **options, gradient_accumulation_steps=2)
        ours, theirs = rows(one), rows(tmp_path / name / "two")
        assert [row["train/loss"] for row in ours[:8]] == pytest.approx(
            [row["train/loss"] for row in theirs[:8]], rel=1e-4
        )
        history = [load_file(tmp_path / name / kind / "checkpoint-8" / "model.safetensors") for kind in ("one", "two")]
        if name == "loss_second_moment":
            assert torch.equal(*(tensors["timestep_sampler.counts"] for tensors in history))
            losses = [tensors["timestep_sampler.losses"] for tensors in history]
            torch.testing.assert_close(*losses, rtol=1e-4, atol=1e-6)
            assert (history[0]["timestep_sampler.counts"] == 10).all()
