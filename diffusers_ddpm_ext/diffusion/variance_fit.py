"""The measuring pass: each step's error on data, and what reading the data off at it costs.

Symbols as in :mod:`diffusers_ddpm_ext.diffusion.optimal_variance`. A chain that begins at step t reads the data off
around the predicted x0, with variance ``v (1 - A)``: the cost of every candidate first step follows from the same
predictions as M, for a grid of v whose least value is then refined.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from diffusers_ddpm_ext.diffusion.gaussian import predict_x0, q_sample
from diffusers_ddpm_ext.diffusion.likelihood import (
    EIGHT_BITS,
    ROWS,
    Denoiser,
    SchedulerLike,
    check_decoder,
    discretized_gaussian_log_likelihood,
    exact_dtype,
)
from diffusers_ddpm_ext.diffusion.optimal_variance import OptimalV, Smoother, best_timesteps, optimal_v
from diffusers_ddpm_ext.diffusion.reverse_step import LEARNED_VARIANCES
from diffusers_ddpm_ext.diffusion.schedule import NoiseSchedule, Table

DRAWS = 64
SMALLEST = 1e-300  # error of a perfect network, whose logarithm is wanted
PIXELS = 256  # of an image that the decoder's cost is measured on: it is a mean over dimensions
GRID = np.append(np.geomspace(1e-5, 1.0, 41), 10 ** (1 / 8))  # of v, for the decoder; the last for a parabola alone


@dataclass(frozen=True)
class VarianceFit:
    """What was measured, at each step of the full chain.

    Attributes:
        x0_error: M, (T,), squared data units, smoothed over the log-SNR.
        decoder: least cost of reading the data off at each step, (T,), bits per dimension; infinite where there was
            no draw.
        v_decoder: (T,), the v at which it is least.
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
        """The best steps for every K up to ``largest``, descending; see `variance.best_timesteps`."""
        counts = range(1, min(largest, len(schedule) - (first or 0)) + 1)
        return best_timesteps(schedule, self.x0_error, self.decoder, self.second_moment, counts, first)


class VarianceMeter:
    """Collects predictions, and sums them up.

    Args:
        schedule: the full chain.
        decoder: see `discretized_gaussian_log_likelihood`.
        bin_width: see there.
    """

    def __init__(self, schedule: NoiseSchedule, decoder: str = "exact", bin_width: float = EIGHT_BITS) -> None:
        check_decoder(decoder, bin_width)
        self.schedule, self.decoder, self.bin_width = schedule, decoder, bin_width
        steps = len(schedule)
        self.errors, self.counts = np.zeros(steps), np.zeros(steps, dtype=np.int64)
        self.costs = np.zeros((steps, len(GRID)))
        self.squares = self.images = 0.0

    def add(self, x0: Tensor, pred_x0: Tensor, t: Tensor) -> None:
        """Note a batch.

        Args:
            x0: clean samples, (B, ...), data units.
            pred_x0: what the network predicted for them, unclipped.
            t: at which steps, (B,).
        """
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
            spread = 0.5 * torch.log(v * noise)[:, None]
            nats = discretized_gaussian_log_likelihood(
                x0, pred_x0, spread, bin_width=self.bin_width, decoder=self.decoder
            )
            np.add.at(self.costs[:, column], steps, -nats.mean(1).cpu().numpy() / math.log(2))

    def result(self, x0_error: Table | None = None) -> VarianceFit:
        """What was measured.

        Args:
            x0_error: M from elsewhere, (T,), above 0: from a learned log-variance, say; smoothed likewise.

        Raises:
            ValueError: nothing was measured, or not one finite prediction.
        """
        seen = self.counts > 0
        if not seen.any() or not np.isfinite(self.errors).all():
            raise ValueError("the network's predictions are not finite, or none was made: nothing can be fitted.")
        draws = np.maximum(self.counts, 1)
        smooth = Smoother(self.schedule, self.counts)
        if x0_error is None:
            error = np.exp(smooth(np.log(np.maximum(self.errors / draws, SMALLEST))))
        else:
            error = np.exp(Smoother(self.schedule, np.ones(len(seen)))(np.log(x0_error)))
        decoder, v = (
            np.array(column) for column in zip(*map(_least, smooth(self.costs / draws[:, None])), strict=True)
        )
        decoder[~smooth.near] = np.inf
        optimal = optimal_v(self.schedule, error)
        moment = self.squares / self.images
        return VarianceFit(error, decoder, v, moment, self.counts.copy(), optimal)


def _least(costs: Table) -> tuple[float, float]:
    """The least cost over the grid, and its v, by a parabola in log v through the three lowest points."""
    logs, one = np.log(GRID), len(GRID) - 2
    place = int(np.argmin(np.where(np.isnan(costs), np.inf, costs)[: one + 1]))
    if place == 0:
        return float(costs[place]), float(GRID[place])
    left, middle, right = costs[place - 1 : place + 2]
    bend = left - 2 * middle + right
    if not (math.isfinite(bend) and bend > 0):
        return float(middle), float(GRID[place])
    shift = 0.5 * (left - right) / bend
    if place == one and shift > 0:
        return float(middle), 1.0
    return float(middle - 0.25 * (left - right) * shift), float(np.exp(logs[place] + shift * (logs[1] - logs[0])))


def rows_of(steps: int, draws: int, images: int, rows: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Which image each step sees: ``draws`` in turn, so that no step sees one twice before it saw all.

    Args:
        steps: T.
        draws: of each step.
        images: how many there are.
        rows: in one batch.

    Yields:
        Steps and numbers of images of a batch, (R,) each, int64.
    """
    for some in torch.arange(steps * draws).split(rows):
        t, turn = some % steps, some // steps
        yield t, (t * draws + turn) % images


@torch.no_grad()
def fit_logvar(
    denoiser: Denoiser,
    scheduler: SchedulerLike,
    x0: Tensor,
    *,
    draws: int = DRAWS,
    generator: torch.Generator | None = None,
    decoder: str = "exact",
    bin_width: float = EIGHT_BITS,
    rows: int = ROWS,
    progress: Callable[[int], None] = lambda done: None,
) -> VarianceFit:
    """Measure every step's error on data in one pass, with the network as it is.

    Args:
        denoiser: called as ``denoiser(xt, t)``; returns (B, ...), no variance.
        scheduler: whose full chain and prediction type are meant.
        x0: images, (N, ...), data units; each step takes ``draws`` of them in turn.
        draws: of each step, 1 or more.
        generator: of the noise.
        decoder: see `discretized_gaussian_log_likelihood`.
        bin_width: see there.
        rows: of the network in one call.
        progress: is told how many rows each call had.

    Returns:
        What was measured.

    Raises:
        ValueError: options do not fit, or the scheduler's variance is learned.
    """
    if scheduler.config.variance_type in LEARNED_VARIANCES:
        raise ValueError(
            f"variance_type={scheduler.config.variance_type!r}: the network says its own variance; nothing to fit."
        )
    if draws < 1 or len(x0) == 0:
        raise ValueError(f"draws={draws} must be 1 or more, and there must be an image.")
    schedule = scheduler.schedule
    meter = VarianceMeter(schedule, decoder, bin_width)
    for t, chosen in rows_of(len(schedule), draws, len(x0), rows):
        t, clean = t.to(x0.device), x0[chosen]
        place = generator.device if generator is not None else x0.device
        noise = torch.randn(clean.shape, generator=generator, device=place, dtype=clean.dtype).to(x0.device)
        xt = q_sample(schedule, clean, noise, t)
        meter.add(clean, predict_x0(schedule, schedule.prediction_type, denoiser(xt, t), xt, t), t)
        progress(len(t))
    return meter.result()
