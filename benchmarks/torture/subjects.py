"""Intact folders and files of every kind that the project reads, made once; cases damage copies of them.

| name | what it is |
|---|---|
| ``images`` | 24 color images in two class folders |
| ``run`` | a class-conditional run on them: checkpoints, ``best``, log-variance, evaluation, fit, card and proof |
| ``tokens``, ``joined`` | pipelines with cross attention and with concatenated inputs |
| ``vae``, ``latent``, ``cache`` | a first stage, a run in its latents, and the cache of these |
| ``table``, ``hints`` | 12 images with ``metadata.csv``: classes, joined images, embeddings |
| ``options`` | files that options name: betas, conditions |
| ``compvis`` | an original checkpoint, its YAML file, and ``converted``, the folder made of it |
| ``openai`` | a checkpoint with the names of OpenAI's, and its flags |
"""

from __future__ import annotations

import json
import os
import random
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

from forked import run_forked

ROOT = Path(__file__).resolve().parents[2]
GOLDEN = ROOT / "tests" / "golden" / "h_ckpt"
SIZE = ["--resolution", "8", "--block_out_channels", "8", "16", "--layers_per_block", "1", "--attention_levels", "1"]
SIZE += ["--attention_head_dim", "4", "--norm_num_groups", "4", "--num_train_timesteps", "20"]
LOOP = ["--train_batch_size", "8", "--lr_warmup_steps", "1", "--num_preview_images", "2", "--report_to", "none"]
LOOP += ["--ddpm_num_inference_steps", "2", "--validation_steps", "2", "--checkpointing_steps", "2"]
TINY = [*SIZE, *LOOP]
"""Options of a run of some ten thousand weights."""
CLASSES = ["--conditioning_dropout", '{"class_labels": 0.1}', "--max_train_steps", "6", "--output_dir", "run"]
LATENTS = ["--train_data_dir", "images", "--center_crop", "--vae", "vae", "--cache_latents", "cache"]
ORIGINAL = ["--checkpoint", "compvis/model.ckpt", "--config", "compvis/model.yaml"]


def environment(home: Path) -> None:
    """Set what the package and its libraries read on import: no network, one thread, a cache of its own."""
    os.environ |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "HF_HOME": str(home), "TQDM_MININTERVAL": "5"}
    for folder in (ROOT, ROOT / "tests"):
        if str(folder) not in sys.path:
            sys.path.insert(0, str(folder))


def import_everything() -> None:
    """Import what the commands import, so that forks share it."""
    import importlib
    import pkgutil

    import accelerate
    import matplotlib.figure
    import scipy.special
    import torch
    from diffusers import DDPMPipeline, UNet2DConditionModel, UNet2DModel

    import diffusers_ddpm_ext

    torch.set_num_threads(1)
    used = (accelerate, matplotlib.figure, scipy.special, DDPMPipeline, UNet2DModel, UNet2DConditionModel)
    assert all(used)
    for module in pkgutil.walk_packages(diffusers_ddpm_ext.__path__, "diffusers_ddpm_ext."):
        if not module.name.endswith("__main__"):
            importlib.import_module(module.name)


def command(argv: list[str]) -> Callable[[], int]:
    """A command line as a function that returns its exit status."""

    def work() -> int:
        from diffusers_ddpm_ext.cli import main

        return main(argv)

    return work


def draw_images(folder: Path, count: int, size: int = 8) -> None:
    """Write small color images of noise."""
    from PIL import Image

    folder.mkdir(parents=True, exist_ok=True)
    draw = random.Random(folder.name)
    for index in range(count):
        Image.frombytes("RGB", (size, size), draw.randbytes(size * size * 3)).save(folder / f"{index:02}.png")


def build(place: Path) -> None:
    """Make all subjects in a folder, unless it has them already.

    Raises:
        RuntimeError: a command failed on intact input.
    """
    if (place / "complete").exists():
        return
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir(parents=True)
    logs = place.parent
    steps: list[Callable[[], int]] = [
        lambda: _images(place),
        lambda: _pipelines(place),
        lambda: _originals(place),
        command(
            ["train", "--train_data_dir", "images", *TINY, "--conditioning_key", "adm", "--learn_logvar", *CLASSES]
        ),
        command(["train", *LATENTS, *TINY, "--max_train_steps", "2", "--output_dir", "latent"]),
        command(["evaluate", "run", "--num_timesteps", "2"]),
        command(["fit-variance", "run", "--draws", "2", "--max_steps", "5"]),
        lambda: _forget_last_checkpoint(place / "run"),
        lambda: _proof(place / "run"),
        command(["convert", "--from", "compvis", *ORIGINAL, "--out", "compvis/converted", "--quiet"]),
    ]
    for step in steps:
        outcome = run_forked(step, place, logs)
        if outcome.status:
            raise RuntimeError(f"{outcome.stdout[-1000:]}\n{outcome.stderr[-3000:]}")
    (place / "complete").touch()


def _images(place: Path) -> int:
    for name in ("cats", "dogs"):
        draw_images(place / "images" / name, 12)
    table = place / "table"
    draw_images(table, 12)
    draw_images(place / "hints", 12)
    import numpy as np

    (table / "embeddings").mkdir()
    rows = []
    for index in range(12):
        np.save(table / "embeddings" / f"{index:02}.npy", np.full((2, 6), index, dtype=np.float32))
        rows.append((f"{index:02}.png", str(index % 3), f"../hints/{index:02}.png", f"embeddings/{index:02}.npy"))
    columns = ("file_name", "class", "hint", "embedding")
    (table / "metadata.csv").write_text("".join(",".join(row) + "\n" for row in (columns, *rows)))
    _options(place / "options", [dict(zip(columns, row, strict=True)) for row in rows])
    return 0


def _options(place: Path, rows: list[dict[str, str]]) -> None:
    """Intact files of the kinds that options name."""
    import numpy as np
    from safetensors.numpy import save_file

    place.mkdir()
    np.save(place / "betas.npy", np.linspace(0.01, 0.5, 20))
    (place / "betas.json").write_text(json.dumps([0.01 * (step + 1) for step in range(20)]))
    np.save(place / "states.npy", np.ones((1, 2, 6), dtype=np.float32))
    np.save(place / "inputs.npy", np.zeros((1, 3, 8, 8), dtype=np.float32))
    (place / "hub.json").write_text(json.dumps({"format": 1, "repo_id": "me/run", "commit": "0" * 40}))
    save_file({"x": np.ones((2, 6), dtype=np.float32)}, place / "00.safetensors")
    (place / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def _pipelines(place: Path) -> int:
    import torch
    from diffusers import UNet2DConditionModel
    from helpers.tiny import tiny_autoencoder, tiny_unet

    from diffusers_ddpm_ext import DDPMExtPipeline, DDPMExtScheduler, UNet2DExtModel

    torch.manual_seed(0)
    network = UNet2DConditionModel(
        sample_size=8, in_channels=3, out_channels=3, block_out_channels=(8, 8), layers_per_block=1, norm_num_groups=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=6, attention_head_dim=2,
    )  # fmt: skip
    DDPMExtPipeline(network, DDPMExtScheduler(20), "crossattn").save_pretrained(place / "tokens")
    joined = UNet2DExtModel(**dict(tiny_unet(3).config) | {"in_channels": 6})
    DDPMExtPipeline(joined, DDPMExtScheduler(20), "concat").save_pretrained(place / "joined")
    tiny_autoencoder("kl").save_pretrained(place / "vae")
    return 0


def _originals(place: Path) -> int:
    import torch
    from helpers.conversion_cases import random_weights
    from safetensors.torch import save_file

    from diffusers_ddpm_ext.compvis.architecture import translate_unet
    from diffusers_ddpm_ext.compvis.config.openai import read_flags
    from diffusers_ddpm_ext.compvis.weights import export_unet

    (place / "compvis").mkdir()
    shutil.copy(GOLDEN / "ema.ckpt", place / "compvis" / "model.ckpt")
    shutil.copy(GOLDEN / "ema.yaml", place / "compvis" / "model.yaml")
    state = torch.load(GOLDEN / "ema.ckpt", weights_only=True)["state_dict"]
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, place / "options" / "start.safetensors")
    (place / "openai").mkdir()
    flags = {"image_size": 32, "num_channels": 32, "num_res_blocks": 1, "channel_mult": "1,2", "learn_sigma": True}
    params = read_flags(flags).unet_params
    weights = export_unet(random_weights(translate_unet(params).build()), params)
    torch.save(weights, place / "openai" / "model.pt")
    (place / "openai" / "flags.json").write_text(json.dumps(flags))
    return 0


def _forget_last_checkpoint(folder: Path) -> int:
    """A finished run that can also be resumed, from step 4."""
    shutil.rmtree(folder / "checkpoint-6")
    monitor = folder / "best" / "monitor.json"
    monitor.write_text(json.dumps(json.loads(monitor.read_text()) | {"step": 4}))
    return 0


def _proof(folder: Path) -> int:
    """The card's images and the proof, as `ddpm-ext push` writes them before it uploads."""
    import numpy as np

    from diffusers_ddpm_ext.hub import proof
    from diffusers_ddpm_ext.pipelines.loading import load_pipeline

    pipeline = load_pipeline(str(folder), None, "cpu", "float32")
    settings = proof.card_draw_settings(pipeline) | {"count": 2, "num_inference_steps": 3}
    (folder / "card").mkdir()
    np.savez(folder / proof.CARD_IMAGES, images=proof.draw_card_images(pipeline, settings))
    (folder / "README.md").write_text("---\nlicense: mit\n---\n# A card\n")
    proof.write_proof(folder, settings)
    return 0
