"""Images per second of the pipeline, in float32 and bfloat16, and what a checkpoint costs in training steps.

Sampling: `DDPMExtPipeline` beside Diffusers' `DDPMPipeline` with the same random network, 50 steps. Checkpoint: a run
that saves one every other step, beside the same run without: the time until the loop goes on, by the run's own
files.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from pathlib import Path
from unittest import mock

import torch
from common import TINY, arguments, device, seconds, write
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from stock.contenders import Network, save_images

from diffusers_ddpm_ext import DDPMExtPipeline, DDPMExtScheduler
from diffusers_ddpm_ext.training import trainer
from diffusers_ddpm_ext.training.config.train_config import TrainConfig
from diffusers_ddpm_ext.training.loop.run import Run

GPU_SIZES = (
    (Network("32 x 32", 32, (128, 256, 256, 256), 1, 64), 50),
    (Network("64 x 64", 64, (128, 256, 384, 512), 2, 16), 50),
)


def sampling_rows(network: Network, steps: int) -> list[dict[str, object]]:
    """Images per second of both pipelines."""
    model = UNet2DModel.from_config(network.config).to(device()).eval()
    rows = []
    for dtype in (torch.float32, torch.bfloat16):
        model.to(dtype)
        pipelines = {"DDPMExtPipeline": DDPMExtPipeline(model, DDPMExtScheduler())}
        if dtype == torch.float32:  # the stock pipeline cannot turn bfloat16 into arrays
            pipelines["DDPMPipeline"] = DDPMPipeline(model, DDPMScheduler())
        for name, pipeline in pipelines.items():
            pipeline.set_progress_bar_config(disable=True)
            generator = torch.Generator(device()).manual_seed(0)

            def draw(pipeline=pipeline, generator=generator):
                kwargs = {"batch_size": network.batch, "num_inference_steps": steps, "output_type": "np"}
                return pipeline(generator=generator, **kwargs)

            took = statistics.median(seconds(draw, 2))
            rows.append(
                {
                    "network": network.name,
                    "pipeline": name,
                    "dtype": str(dtype),
                    "images_per_second": network.batch / took,
                }
            )
    return rows


def checkpoint_cost(network: Network) -> dict[str, float]:
    """Seconds that a step and a checkpoint take in a run of 12 steps with 6 checkpoints."""
    saves: list[float] = []
    save = trainer.save_checkpoint

    def timed(run: Run) -> bool:
        start = time.perf_counter()
        written = save(run)
        saves.append(time.perf_counter() - start)
        return written

    with tempfile.TemporaryDirectory() as name, mock.patch.object(trainer, "save_checkpoint", timed):
        folder = Path(name)
        save_images(folder / "images", network.side, 4 * network.batch)
        config = TrainConfig.from_flat(
            {
                "train_data_dir": [str(folder / "images")], "resolution": network.side, "max_train_steps": 12,
                "train_batch_size": network.batch, "model_config": network.config, "checkpointing_steps": 2,
                "checkpoints_total_limit": 1, "output_dir": str(folder / "run"), "report_to": "none",
                "save_images_epochs": None, "num_preview_images": 4, "ddpm_num_inference_steps": 2,
                "validation_fraction": 0, "lr_warmup_steps": 2,
            }
        )  # fmt: skip
        trainer.train(config)
        files = folder.glob("run/checkpoint-12/*")
        size = sum(file.stat().st_size for file in files) / 2**20
    cost = statistics.median(saves)
    return {"mib": size, "seconds": cost, "mib_per_second": size / cost, "saves": len(saves)}


def main() -> None:
    """Write images per second and the cost of a checkpoint."""
    args = arguments(__doc__)
    sizes = GPU_SIZES if torch.cuda.is_available() else ((TINY, 5),)
    rows = [row for network, steps in sizes for row in sampling_rows(network, steps)]
    write(args.out, True, rows=rows, checkpoint=checkpoint_cost(sizes[0][0]))


if __name__ == "__main__":
    main()
