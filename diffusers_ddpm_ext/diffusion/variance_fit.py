"""Variance fitting: measures each step's prediction error and decoder cost on data.

Symbols as in `diffusers_ddpm_ext.diffusion.optimal_variance`. The decoder of a chain whose first step is t has
the predicted x0 as its mean and the variance ``v (1 - A)``: the cost of every candidate first step follows from the
same predictions as M, on a grid of v whose minimum is then refined.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from diffusers_ddpm_ext.diffusion.arguments import check_finite
from diffusers_ddpm_ext.diffusion.gaussian import predict_x0, q_sample
from diffusers_ddpm_ext.diffusion.levels import (
    EIGHT_BITS,
    check_decoder,
    discretized_gaussian_log_likelihood,
    exact_dtype,
)
from diffusers_ddpm_ext.diffusion.likelihood import (
    ROWS,
    Denoiser,
    SchedulerLike,
    check_denoiser,
    normal_like,
    run_denoiser,
)
from diffusers_ddpm_ext.diffusion.optimal_variance import (
    OptimalV,
    Smoother,
    best_timesteps,
    check_fitted_length,
    optimal_v,
)
from diffusers_ddpm_ext.diffusion.reverse_step import LEARNED_VARIANCES
from diffusers_ddpm_ext.diffusion.schedule import NoiseSchedule, Table
from diffusers_ddpm_ext.utils.checks import checked_integer, describe
from diffusers_ddpm_ext.utils.vocabulary import Decoder

DRAWS = 64
SMALLEST = 1e-300  # floor of an error whose logarithm is taken
PIXELS = 256  # per image for the decoder's cost, a mean over dimensions
GRID = np.append(np.geomspace(1e-5, 1.0, 41), 10 ** (1 / 8))  # of v, for the decoder; the last only for the parabola


@dataclass(frozen=True)
class VarianceFit:
    """Measured and fitted values at each step of the full chain.

    Attributes:
        x0_error: M, (T,), squared data units, smoothed over the log-SNR.
        decoder: least cost of the decoder at each step, (T,), bits per dimension; infinite without a draw.
        v_decoder: (T,), the v of that least cost.
        second_moment: mean of x0^2.
        draws: (T,), int64.
        optimal: v* of the full chain.
    """

    x0_error: Table
    decoder: Table
    v_decoder: Table
    second_moment: float
    draws: np.ndarray
    optimal: OptimalV

    def choose(self, schedule: NoiseSchedule, largest: int = 100, first: int | None = None) -> dict[int, np.ndarray]:
        """The best steps for every K up to ``largest``, descending; see `best_timesteps`."""
        counts = range(1, min(largest, len(schedule) - (first or 0)) + 1)
        return best_timesteps(schedule, self.x0_error, self.decoder, self.second_moment, counts, first)


class VarianceMeter:
    """Accumulates prediction errors and decoder costs per step; see `discretized_gaussian_log_likelihood`."""

    def __init__(self, schedule: NoiseSchedule, decoder: Decoder = "exact", bin_width: float = EIGHT_BITS) -> None:
        check_decoder(decoder, bin_width)
        check_fitted_length(schedule)
        self.schedule, self.decoder, self.bin_width = schedule, decoder, bin_width
        steps = len(schedule)
        self.errors, self.counts = np.zeros(steps), np.zeros(steps, dtype=np.int64)
        self.costs = np.zeros((steps, len(GRID)))
        self.squares = self.images = 0.0

    def add(self, x0: Tensor, pred_x0: Tensor, t: Tensor) -> None:
        """Add a batch: clean samples and their unclipped predictions, (B, ...), at steps (B,)."""
        exact = exact_dtype(x0.device)
        x0, pred_x0 = x0.to(exact).flatten(1), pred_x0.to(exact).flatten(1)
        steps = t.cpu().numpy()
        np.add.at(self.errors, steps, (x0 - pred_x0).square().mean(1).cpu().numpy())
        np.add.at(self.counts, steps, 1)
        self.squares += float(x0.square().mean(1).sum())
        self.images += len(x0)
        stride = max(1, x0.shape[1] // PIXELS)
        x0, pred_x0 = x0[:, ::stride], pred_x0[:, ::stride]
        noise = torch.from_numpy(1 - self.schedule.alphas_cumprod[steps]).to(x0)
        for column, v in enumerate(GRID):
            log_scale = 0.5 * torch.log(v * noise)[:, None]
            nats = discretized_gaussian_log_likelihood(
                x0, pred_x0, log_scale, bin_width=self.bin_width, decoder=self.decoder
            )
            np.add.at(self.costs[:, column], steps, -nats.mean(1).cpu().numpy() / math.log(2))

    def result(self, x0_error: Table | None = None) -> VarianceFit:
        """Fit the variances; ValueError if nothing was measured, or a prediction is not finite.

        ``x0_error`` is M, (T,), above 0, to use instead of the measured one, such as that of a learned log-variance.
        """
        has_draws = self.counts > 0
        if not has_draws.any() or not np.isfinite(self.errors).all():
            raise ValueError("the network's predictions are not finite, or there are none: nothing can be fitted.")
        draws = np.maximum(self.counts, 1)
        smooth = Smoother(self.schedule, self.counts)
        if x0_error is None:
            error = np.exp(smooth(np.log(np.maximum(self.errors / draws, SMALLEST))))
        else:
            error = np.exp(Smoother(self.schedule, np.ones(len(has_draws)))(np.log(x0_error)))
        decoder, v = (
            np.array(column) for column in zip(*map(_least, smooth(self.costs / draws[:, None])), strict=True)
        )
        decoder[~smooth.near] = np.inf
        optimal = optimal_v(self.schedule, error)
        moment = self.squares / self.images
        return VarianceFit(error, decoder, v, moment, self.counts.copy(), optimal)


def _least(costs: Table) -> tuple[float, float]:
    """Least cost over the grid and its v, by a parabola in log v around the lowest point."""
    logs, one = np.log(GRID), len(GRID) - 2
    index = int(np.argmin(np.where(np.isnan(costs), np.inf, costs)[: one + 1]))
    if index == 0:
        return float(costs[index]), float(GRID[index])
    left, middle, right = costs[index - 1 : index + 2]
    curvature = left - 2 * middle + right
    if not (math.isfinite(curvature) and curvature > 0):
        return float(middle), float(GRID[index])
    shift = 0.5 * (left - right) / curvature
    if index == one and shift > 0:
        return float(middle), 1.0
    return float(middle - 0.25 * (left - right) * shift), float(np.exp(logs[index] + shift * (logs[1] - logs[0])))


def measurement_batches(steps: int, draws: int, images: int, rows: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Steps and image indices, (R,) each: ``draws`` images per step in turn, none twice before all were used."""
    for batch in torch.arange(steps * draws).split(rows):
        t, turn = batch % steps, batch // steps
        yield t, (t * draws + turn) % images


def check_fixed_variance(scheduler: SchedulerLike) -> None:
    """Raise ValueError if the scheduler's variance is learned."""
    kind = scheduler.config.variance_type
    if kind in LEARNED_VARIANCES:
        raise ValueError(f"variance_type={kind!r}: the network predicts its own variance; nothing to fit.")


@torch.no_grad()
def measure_errors(
    scheduler: SchedulerLike,
    num_images: int,
    draw: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]],
    denoise: Callable[[Tensor, Tensor, Tensor], Tensor],
    *,
    draws: int = DRAWS,
    decoder: Decoder = "exact",
    bin_width: float = EIGHT_BITS,
    rows: int = ROWS,
    progress: Callable[[int], None] = lambda rows: None,
) -> VarianceMeter:
    """Measure a network's error at every step of the full chain.

    Args:
        scheduler: its full chain and prediction type are used.
        num_images: number of images; each step uses ``draws`` of them in turn.
        draw: ``draw(images, t) -> (x0, noise)`` from image indices and steps, (R,) each on the CPU.
        denoise: ``denoise(xt, t, images)`` returns the network's output, (R, ...), without a variance.
        draws: per step, 1 or more.
        decoder: see `discretized_gaussian_log_likelihood`.
        bin_width: see `discretized_gaussian_log_likelihood`.
        rows: network inputs per call.
        progress: called with the number of rows of each call.

    Raises:
        ValueError: an option is invalid, or the scheduler's variance is learned.
    """
    if not isinstance(getattr(scheduler, "schedule", None), NoiseSchedule):
        raise ValueError(f"scheduler={describe(scheduler)} has no NoiseSchedule: pass a DDPMExtScheduler.")
    check_fixed_variance(scheduler)
    checked_integer("draws", draws, "an integer of 1 or more", low=1)
    checked_integer("rows", rows, "an integer of 1 or more", low=1)
    if num_images == 0:
        raise ValueError("there must be an image.")
    schedule = scheduler.schedule
    meter = VarianceMeter(schedule, decoder, bin_width)
    for t, images in measurement_batches(len(schedule), draws, num_images, rows):
        x0, noise = draw(images, t)
        t = t.to(x0.device)
        xt = q_sample(schedule, x0, noise, t)
        check_finite("x0", x0)
        meter.add(x0, predict_x0(schedule, schedule.prediction_type, denoise(xt, t, images), xt, t), t)
        progress(len(t))
    return meter


def fit_logvar(
    denoiser: Denoiser,
    scheduler: SchedulerLike,
    x0: Tensor,
    *,
    draws: int = DRAWS,
    generator: torch.Generator | None = None,
    decoder: Decoder = "exact",
    bin_width: float = EIGHT_BITS,
    rows: int = ROWS,
    progress: Callable[[int], None] = lambda rows: None,
) -> VarianceFit:
    """Measure every step's error on images ``x0``, (N, ...), and fit the variances.

    ``denoiser(xt, t)`` returns (R, ...), a tensor or a Diffusers output, without a variance; ``generator`` is that of
    the noise. Other arguments and errors are those of `measure_errors`.
    """
    check_denoiser(denoiser, x0)

    def draw(images: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        clean = x0[images]
        return clean, normal_like(clean, generator)

    return measure_errors(
        scheduler,
        len(x0),
        draw,
        lambda xt, t, images: run_denoiser(denoiser, xt, t),
        draws=draws,
        decoder=decoder,
        bin_width=bin_width,
        rows=rows,
        progress=progress,
    ).result()
