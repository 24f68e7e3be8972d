"""Cost of a training step without the network: noise, clipping, optimizer, EMA and logging.

Reference: the same parts of Diffusers' `train_unconditional.py` with `--use_ema`, built from the same public classes
with the same arguments: torch.randn and DDPMScheduler.add_noise, Accelerate's clip_grad_norm_, AdamW with torch's
defaults, the prepared cosine schedule, EMAModel, and in every step the loss is read from the device, logged to
TensorBoard and displayed in the progress bar. Ours are the trainer's own functions, with TensorBoard and
metrics.jsonl.

Both work on copies of one network and get the same gradients with a total norm of 2, which both clip to 1. One thread;
the two alternate in short rounds, and the median of the rounds' ratios is reported, so that a busy machine slows both
equally.

    python benchmarks/bench_step.py [--seconds 35]
"""

from __future__ import annotations

import argparse
import copy
import statistics
import tempfile
import time
from collections.abc import Callable
from itertools import count
from pathlib import Path

import torch
from accelerate import Accelerator
from diffusers import DDPMScheduler, UNet2DModel
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from tqdm.auto import tqdm

from diffusers_ddpm_ext.diffusion.gaussian import q_sample
from diffusers_ddpm_ext.losses.objective import ObjectiveOutput
from diffusers_ddpm_ext.training.config.train_config import TrainConfig
from diffusers_ddpm_ext.training.loop.metrics_logging import log_losses, open_metrics_logger
from diffusers_ddpm_ext.training.loop.run import Run, RunProgress
from diffusers_ddpm_ext.training.loop.setup import build_setup
from diffusers_ddpm_ext.training.loop.step import clip, seed_dropout
from diffusers_ddpm_ext.training.signals import SignalRequests
from diffusers_ddpm_ext.training.tracking.step_losses import LossMeter, StepTrace
from diffusers_ddpm_ext.utils import random_keys as keys

MIN_ROUNDS = 3
STEPS = 10  # per round; our logging interval, so that each round reads the losses once
MODELS: dict[str, tuple[dict[str, object], int, int]] = {
    "4 M, 64 x 1 x 8 x 8": ({"block_out_channels": [64, 128], "attention_levels": [1]}, 64, 8),
    "15 M, 8 x 3 x 32 x 32": ({"block_out_channels": [64, 128, 256], "attention_levels": [1]}, 8, 32),
}


def peer_step(accelerator: Accelerator, model: UNet2DModel, batch: torch.Tensor) -> Callable[[], None]:
    """The parts of a step of `train_unconditional.py` around forward and backward."""
    scheduler = DDPMScheduler(num_train_timesteps=1000, beta_schedule="linear", prediction_type="epsilon")
    ema = EMAModel(
        model.parameters(),
        decay=0.9999,
        use_ema_warmup=True,
        inv_gamma=1.0,
        power=0.75,
        model_cls=UNet2DModel,
        model_config=model.config,
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, betas=(0.95, 0.999), weight_decay=1e-6, eps=1e-8)
    lr_scheduler = get_scheduler("cosine", optimizer, num_warmup_steps=500, num_training_steps=10**6)
    optimizer, lr_scheduler = accelerator.prepare(optimizer, lr_scheduler)
    bar, numbers = tqdm(total=10**6), count(1)
    loss = torch.tensor(0.5, requires_grad=True)

    def step() -> None:
        noise = torch.randn(batch.shape)
        timesteps = torch.randint(0, 1000, (len(batch),)).long()
        scheduler.add_noise(batch, noise, timesteps)
        accelerator.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        lr_scheduler.step()
        optimizer.zero_grad()
        ema.step(model.parameters())
        bar.update(1)
        number = next(numbers)
        logs = {"loss": loss.detach().item(), "lr": lr_scheduler.get_last_lr()[0], "step": number}
        logs["ema_decay"] = ema.cur_decay_value
        bar.set_postfix(**logs)
        accelerator.log(logs, step=number)

    return step


def our_step(run: Run, batch: torch.Tensor) -> Callable[[], None]:
    """The parts of the trainer's step around forward and backward."""
    setup, schedule = run.setup, run.setup.parts.objective.schedule
    positions, ones = torch.arange(len(batch)), torch.ones(len(batch))
    output = ObjectiveOutput(*torch.full((5,), 0.5).unbind(), ones, ones)

    def step() -> None:
        number = run.progress.step
        t, noise = keys.sample_draws(setup.seed, number, positions, batch.shape[1:], setup.num_train_timesteps)
        seed_dropout(setup.accelerator, setup.seed, number, 0)
        q_sample(schedule, batch, noise, t)
        norms = clip(setup)
        setup.optimizer.step()
        setup.optimizer.zero_grad()
        learning_rate = float(setup.lr_scheduler.get_last_lr()[0])
        setup.lr_scheduler.step()
        assert setup.ema is not None
        setup.ema.step(setup.denoiser)
        run.progress.step += 1
        run.meter.add(StepTrace(run.progress.step, learning_rate, [output], [positions], [t], norms))
        run.logger.progress_bar.update()
        if run.progress.step % setup.config.output.logging_steps == 0:
            log_losses(run)

    return step


def timed(step: Callable[[], None], model: UNet2DModel, gradients: list[torch.Tensor]) -> float:
    """Milliseconds per step, without the time to set the gradients."""
    total = 0.0
    for _ in range(STEPS):
        for parameter, gradient in zip(model.parameters(), gradients, strict=True):
            parameter.grad = gradient.clone()
        start_time = time.perf_counter()
        step()
        total += time.perf_counter() - start_time
    return 1000 * total / STEPS


def measure(name: str, seconds: float, folder: Path) -> str:
    """One row of the table, from as many rounds as fit into the seconds, and at least three."""
    sizes, batch_size, side = MODELS[name]
    options = {"resolution": side, "train_batch_size": batch_size, "max_train_steps": 10**6, "layers_per_block": 2}
    options |= {"lr_scheduler": "cosine", "report_to": "tensorboard", "logging_steps": STEPS, "learning_rate": 1e-4}
    options |= {"norm_num_groups": 32, "learn_logvar": False, "prediction_type": "epsilon", "ema_decay": 0.9999}
    options |= {"channels": 1 if side == 8 else 3}
    setup, progress = build_setup(TrainConfig.from_flat(options | sizes)), RunProgress()
    logger = open_metrics_logger(setup, folder, progress)
    run = Run(setup, folder, None, None, SignalRequests(), LossMeter(), logger, progress)
    peer = copy.deepcopy(setup.denoiser)
    batch = torch.randn(batch_size, *setup.data.train.shape)
    steps = {"ours": (our_step(run, batch), setup.denoiser), "peer": (peer_step(setup.accelerator, peer, batch), peer)}
    gradients = [torch.randn_like(parameter) for parameter in peer.parameters()]
    torch._foreach_mul_(gradients, 2.0 / torch.nn.utils.get_total_norm(gradients))
    for step, model in steps.values():
        timed(step, model, gradients)
    times: dict[str, list[float]] = {"ours": [], "peer": []}
    end = time.perf_counter() + seconds
    for number in count():
        if number >= MIN_ROUNDS and time.perf_counter() > end:
            break
        for name_of_step in sorted(steps, reverse=bool(number % 2)):
            times[name_of_step].append(timed(*steps[name_of_step], gradients))
    ratios = [peer / ours for ours, peer in zip(times["ours"], times["peer"], strict=True)]
    low, ratio, high = statistics.quantiles(ratios, n=4, method="inclusive")
    ours, theirs = statistics.median(times["ours"]), statistics.median(times["peer"])
    millions = sum(parameter.numel() for parameter in peer.parameters()) / 1e6
    return f"| {name} ({millions:.1f} M) | {theirs:.1f} | {ours:.1f} | {ratio:.2f} ({low:.2f} to {high:.2f}) |"


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=35, help="of each of the two networks, without its start")
    seconds = parser.parse_args().seconds
    torch.set_num_threads(1)
    rows = []
    for name in MODELS:
        with tempfile.TemporaryDirectory() as folder:
            rows.append(measure(name, seconds, Path(folder)))
    print("\n| parts of a step outside forward and backward | reference, ms | ours, ms | reference / ours |")
    print("|---|---|---|---|")
    print("\n".join(rows))


if __name__ == "__main__":
    main()
