"""A run that is killed repeatedly must end with the same bytes as an uninterrupted run.

    python benchmarks/torture/kill.py [--latents] [--kills 200] [--inside_saves 60] [--seed 0] [--folder /tmp/torture]

Runs of the digits with accumulation, a data worker, flips, EMA and a learned log-variance are ended by ``kill -9``: at
random moments, and during the writing of a checkpoint, which is detected by its folder. After each kill the same
command is started again. Exit status 1 if a checkpoint is torn, a run falls back behind its last finished checkpoint,
or the final files differ from those of the uninterrupted run.

With ``--latents`` the runs train in the latents of a first stage, and are also killed while they build their cache of
latents. The uninterrupted run has no cache. Each latent must be in the finished cache once.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from diffusers_ddpm_ext.training.checkpoints.folders import checkpoint_step, list_checkpoints
from diffusers_ddpm_ext.training.checkpoints.manifest import DamagedCheckpoint, verify

ARGUMENTS = (
    "--max_train_steps 60 --checkpointing_steps 4 --seed 7 --use_ema --learn_logvar --train_batch_size 16 "
    "--dataloader_num_workers 1 --gradient_accumulation_steps 2 --random_flip --resume_from_checkpoint auto "
    "--block_out_channels 8 16 --validation_steps 10 --logging_steps 5 --num_preview_images 2 --save_images_steps 25 "
    "--ddpm_num_inference_steps 5"
)
FINAL = (
    "metrics.jsonl",
    "unet/diffusion_pytorch_model.safetensors",
    "unet/diffusion_pytorch_model.raw.safetensors",
    "logvar/diffusion_pytorch_model.safetensors",
    "best/unet/diffusion_pytorch_model.safetensors",
    "checkpoint-60/model.safetensors",
    "checkpoint-60/ema.safetensors",
    "checkpoint-60/optimizer.safetensors",
)
IMAGES = 1797  # digits, each also mirrored
BUILDS_PER_RUN = 5  # that are killed
RECORD_BYTES = 16 + 2 * 4 * 4 * 4 * 4


def start(folder: Path, limit: int, arguments: Sequence[str] = ()) -> subprocess.Popen[bytes]:
    """The run, in its own process group, so that a kill also reaches its data worker."""
    command = [sys.executable, "-m", "diffusers_ddpm_ext.cli", "train", *ARGUMENTS.split(), *arguments]
    command += ["--checkpoints_total_limit", str(limit), "--output_dir", str(folder)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    log = open(f"{folder}.log", "ab")  # noqa: SIM115 - the process uses it
    return subprocess.Popen(command, stdout=log, stderr=log, env=environment, start_new_session=True)


def save_first_stage(folder: Path) -> None:
    """A small autoencoder with random weights, for latents of 4 x 4 x 4."""
    import torch
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    AutoencoderKL(
        1,
        1,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 16),
        norm_num_groups=4,
        scaling_factor=1.0,
    ).save_pretrained(folder)


def cache_bytes(cache: Path) -> int:
    """Bytes of the latents in a cache."""
    return sum(path.stat().st_size for path in cache.glob("*/*.bin"))


def rows(folder: Path) -> int:
    """Number of lines in metrics.jsonl."""
    path = folder / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.is_file() else 0


def wait_and_kill(
    process: subprocess.Popen[bytes], folder: Path, draw: random.Random, aimed: bool, cache: Path
) -> str:
    """Kill a run while it works; return what was interrupted, or "" if the run had ended before."""
    before, delay = rows(folder), draw.random() * 2
    cached = cache_bytes(cache)
    leftovers = set(folder.glob(".writing-*"))  # of the previous process; removed once this one has started
    began: float | None = None
    while process.poll() is None:
        writing = bool(set(folder.glob(".writing-*")) - leftovers)
        building = cache_bytes(cache) != cached and not any(cache.glob("*/manifest.json"))
        if began is None and (rows(folder) > before or writing or building):
            began = time.monotonic()
        if began is not None:
            inside = aimed and writing
            if inside or (not (aimed and not building) and time.monotonic() - began > delay):
                time.sleep(draw.random() * 0.01 if inside else 0)
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
                if building:
                    return "cache"
                return "save" if set(folder.glob(".writing-*")) - leftovers else "elsewhere"
        time.sleep(0.0005)
    return ""


def newest_step(folder: Path) -> int:
    """Step of the newest checkpoint, after verifying that every one is intact; 0 if there is none."""
    for path in list_checkpoints(folder):
        verify(path)
    return max((checkpoint_step(path) or 0 for path in list_checkpoints(folder)), default=0)


def main() -> int:
    """Kill runs, count, and compare the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--latents", action="store_true")
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--inside_saves", type=int, default=60, help="at least so many of them inside a save")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, default=None)
    options = parser.parse_args()
    base = options.folder or Path(tempfile.mkdtemp())
    shutil.rmtree(base, ignore_errors=True)
    base.mkdir(parents=True)
    draw = random.Random(options.seed)
    uninterrupted = base / "uninterrupted"
    latents = ["--vae", str(base / "vae")] if options.latents else []
    if latents:
        save_first_stage(base / "vae")
    if start(uninterrupted, 2, latents).wait() != 0:
        print(f"the uninterrupted run failed: see {uninterrupted}.log")
        return 1
    hits: Counter[str] = Counter()
    torn = backward = runs = different = 0
    while hits.total() < options.kills or hits["save"] < options.inside_saves:
        runs += 1
        folder, cache, newest, builds = base / f"run-{runs}", base / f"cache-{runs}", 0, 0
        arguments = [*latents, "--cache_latents", str(cache)] if latents else []
        while True:
            aimed = hits["save"] < options.inside_saves and draw.random() < 0.6
            watched = cache if builds < BUILDS_PER_RUN else base / "none"
            hit = wait_and_kill(start(folder, 1 + runs % 2, arguments), folder, draw, aimed, watched)
            builds += hit == "cache"
            try:
                step = newest_step(folder)
            except DamagedCheckpoint as error:
                print(f"torn: {error}")
                torn += 1
                break
            backward += step < newest
            newest = max(step, newest)
            if not hit:
                break
            hits[hit] += 1
        for name in FINAL:
            mine = folder / name
            if not mine.is_file() or mine.read_bytes() != (uninterrupted / name).read_bytes():
                print(f"{mine} differs")
                different += 1
        if latents and cache_bytes(cache) != 2 * IMAGES * RECORD_BYTES:
            print(f"{cache} has {cache_bytes(cache) / RECORD_BYTES:g} latents")
            different += 1
        counts = f"{hits.total()} kills, {hits['save']} inside a save, {hits['cache']} inside a cache"
        print(f"run {runs}: {counts}, {torn} torn, {backward} backward, {different} differ", flush=True)
        shutil.rmtree(folder, ignore_errors=True)
        shutil.rmtree(cache, ignore_errors=True)
    print(f"{counts}, over {runs} runs: {torn} torn, {backward} backward, {different} differ")
    return int(torn + backward + different > 0)


if __name__ == "__main__":
    raise SystemExit(main())
