"""Optimal reverse variances and optimal timesteps, from tables of prediction errors.

Symbols, with t a step of the full chain and s < t the next lower step of a shorter chain:

    A, SNR   alphas_cumprod, A / (1 - A)
    M        mean squared error of the predicted x0 at step t, averaged over data, noise and dimensions
    b, B     beta and posterior variance of the chain that goes from t to s in one step
    c1       its posterior_mean_coef1
    S        variance of the model's reverse step, (1 - v) B + v b

The step's mean KL divergence is ``(log(S / B) - 1 + B / S + c1^2 M / S) / 2`` nats per dimension, least at
``S = B + c1^2 M``; and since ``b - B = c1^2 (1 - A)``, that is

    v* = M / (1 - A),        the least divergence    log(1 + M (SNR_s - SNR_t)) / 2

for every s: one table is optimal for every shorter chain. v* is at most 1 if the network is no worse than the mean of
data of variance 1 or less; larger values are clipped, at a cost.

The first step of a chain has no lower step: its term is the decoder, whose cost and best variance do not follow from
M and are measured.

Sources: [DDPM] Ho et al. 2020, eqs. 5 to 7; [Analytic-DPM] Bao et al. 2022, theorem 1 (the optimal variance) and
section 4 (the best steps by dynamic programming); [Watson] Watson et al. 2021 (the same recursion).
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from diffusers_ddpm_ext.diffusion.schedule import LARGEST_LOG_SNR, NoiseSchedule, Table, log_snr

SMOOTHING_REACH = 0.5  # half of the smoothing window, natural log of the SNR
MAX_FITTED_TIMESTEPS = 5_000  # tables over pairs of steps have 25 million entries, 200 MB
LEAST_V = 1e-6  # smallest fitted v; in v_decoder 0 means that v is not set


@dataclass(frozen=True)
class OptimalV:
    """Reverse variances that minimize the bound.

    Attributes:
        v: (T,), ``v_posterior`` of each step, in [0, 1].
        clipped: int64, the steps whose optimal v is above 1.
        loss: cost of clipping in bits per dimension, summed over the steps of the chain.
    """

    v: Table
    clipped: np.ndarray
    loss: float


def x0_error_of_logvar(schedule: NoiseSchedule, logvar: Table) -> Table:
    """M, (T,), squared data units, from the log of the mean squared error of the network's prediction.

    ``logvar`` is the natural log of an ``l2`` loss, (T,), learned or measured; ValueError unless it is one finite
    number per step. M is infinite at zero terminal SNR for ``epsilon``.
    """
    table = np.asarray(logvar, dtype=np.float64)
    if table.shape != (len(schedule),) or not np.isfinite(table).all():
        raise ValueError(f"logvar must be {len(schedule)} finite numbers, got shape {table.shape}.")
    error = np.exp(table)
    if schedule.prediction_type == "v_prediction":
        return (1 - schedule.alphas_cumprod) * error
    if schedule.prediction_type == "sample":
        return error
    with np.errstate(divide="ignore"):
        return error / schedule.snr


def log_loss_of_x0_error(schedule: NoiseSchedule, x0_error: Table) -> Table:
    """The inverse of `x0_error_of_logvar`: log of the prediction's mean squared error, (T,)."""
    error = np.log(_checked_error(schedule, x0_error))
    if schedule.prediction_type == "v_prediction":
        return error - np.log1p(-schedule.alphas_cumprod)
    return error if schedule.prediction_type == "sample" else error + np.log(schedule.snr)


def check_fitted_length(schedule: NoiseSchedule) -> None:
    """Raise ValueError if a chain is too long for tables over pairs of its steps."""
    if len(schedule) > MAX_FITTED_TIMESTEPS:
        raise ValueError(
            f"num_train_timesteps={len(schedule)} is too long to fit variances and steps, which compares all pairs of "
            f"steps: at most {MAX_FITTED_TIMESTEPS}."
        )


class Smoother:
    """Smooths per-step measurements by local linear regression in the log-SNR.

    A step's value is that of a line fitted to the steps within ``reach`` of its log-SNR, weighted by their draws and
    by a linear falloff. Isolated steps keep their value, as in short chains; in a chain of a thousand each step uses
    the draws of dozens of others. Without it the noise of the measurement would decide which steps are best.

    Args:
        schedule: of the full chain.
        counts: (T,), draws of each step.
        reach: half of the window, natural log.

    Raises:
        ValueError: there is no draw at all, or the chain has over 5,000 steps.
    """

    def __init__(self, schedule: NoiseSchedule, counts: Table | np.ndarray, reach: float = SMOOTHING_REACH) -> None:
        check_fitted_length(schedule)
        draws = np.asarray(counts, dtype=np.float64)
        if not draws.any():
            raise ValueError("log_error: no step was measured; take at least one draw.")
        self.level = level = log_snr(schedule).clip(-LARGEST_LOG_SNR, LARGEST_LOG_SNR)
        self.known = np.flatnonzero(draws > 0)
        offset = level[self.known][None] - level[:, None]
        weight = draws[self.known] * np.clip(1 - np.abs(offset) / reach, 0, None)
        total = np.where(weight.sum(1) > 0, weight.sum(1), 1)
        centre = (weight * offset).sum(1) / total
        spread = (weight * offset**2).sum(1) / total - centre**2
        self.near = (weight.sum(1) > 0) & ((draws > 0) | (spread > 1e-9))
        lever = np.where(spread > 1e-9, -centre / np.where(spread > 1e-9, spread, 1), 0)
        # The line's value at the step itself, as a sum over the measured steps.
        self.matrix = weight / total[:, None] * (1 + lever[:, None] * (offset - centre[:, None]))

    def __call__(self, values: Table) -> Table:
        """Smooth a curve, (T,) or (T, n), to float64 of the same shape.

        Values of steps without a draw are not used; far from any draw the result is interpolated linearly in the
        log-SNR.
        """
        table = np.asarray(values, dtype=np.float64)
        smooth: Table = self.matrix @ table[self.known]
        if not self.near.all():
            columns = smooth.reshape(len(self.near), -1)
            filled = [np.interp(-self.level, -self.level[self.near], column[self.near]) for column in columns.T]
            smooth = np.stack(filled, 1).reshape(smooth.shape)
        return smooth


def optimal_v(schedule: NoiseSchedule, x0_error: Table) -> OptimalV:
    """v* of every step, for this chain and all shorter ones, with the steps clipped on this chain.

    ``x0_error`` is M of each step of the chain, full or respaced, (K,), squared data units; ValueError if it has
    another length, or negative or undefined values.
    """
    error = _checked_error(schedule, x0_error)
    unclipped = error / (1 - schedule.alphas_cumprod)
    v = np.clip(unclipped, LEAST_V, 1)
    clipped = np.flatnonzero(unclipped > 1 + 1e-12)
    costly = clipped[clipped > 0]
    prev = np.append(np.inf, schedule.snr[:-1])
    with np.errstate(invalid="ignore"):
        lost = step_bits(error, v, prev, schedule.snr, schedule.alphas_cumprod) - _least_bits(
            error, prev, schedule.snr
        )
    return OptimalV(v, schedule.timesteps[clipped].copy(), float(lost[costly].sum()))


def step_bits(x0_error: Table, v: Table, snr_below: Table, snr: Table, abar: Table) -> Table:
    """Mean KL divergence of a step for any v, bits per dimension; arguments broadcast.

    Args:
        x0_error: M.
        v: of the step's reverse variance, in [0, 1].
        snr_below: SNR of the next lower step.
        snr: SNR of the step itself.
        abar: A of the step itself.
    """
    # b - B = c1^2 (1 - A) and c1^2 / B = SNR_s - SNR_t, so S / B = 1 + v (1 - A) (SNR_s - SNR_t).
    gain = snr_below - snr
    ratio = v * (1 - abar) * gain
    return 0.5 * (np.log1p(ratio) + (x0_error * gain - ratio) / (1 + ratio)) / math.log(2)


def _least_bits(x0_error: Table, snr_below: Table, snr: Table) -> Table:
    return 0.5 * np.log1p(x0_error * (snr_below - snr)) / math.log(2)


def pair_costs(schedule: NoiseSchedule, x0_error: Table) -> Table:
    """Mean KL divergence of one step from t to s, with the best v in [0, 1]: (T, T), bits per dimension, at [s, t].

    ``x0_error`` is M of the full chain, (T,). Infinite unless s < t.
    """
    error, snr = _checked_error(schedule, x0_error), schedule.snr
    if (error <= 1 - schedule.alphas_cumprod).all():  # no step's optimal v is clipped
        costs = _least_bits(error[None], snr[:, None], snr[None])
    else:
        v = optimal_v(schedule, error).v
        costs = step_bits(error[None], v[None], snr[:, None], snr[None], schedule.alphas_cumprod[None])
    costs[np.tril_indices(len(schedule))] = np.inf
    return costs


def prior_costs(schedule: NoiseSchedule, second_moment: float) -> Table:
    """``KL(q(x_t) || N(0, I))`` of a chain that ends at t, bits per dimension, (T,).

    ``second_moment`` is the mean of x0^2 over data and dimensions.
    """
    abar = schedule.alphas_cumprod
    return 0.5 * (abar * (second_moment - 1) - schedule.log_one_minus_alphas_cumprod) / math.log(2)


def best_timesteps(
    schedule: NoiseSchedule,
    x0_error: Table,
    decoder: Table,
    second_moment: float,
    counts: Iterable[int],
    first: int | None = None,
) -> dict[int, np.ndarray]:
    """The K steps that minimize the bound, for each K, by dynamic programming over pairs of steps.

    Args:
        schedule: the full chain.
        x0_error: M, (T,), squared data units.
        decoder: cost of the decoder at each step, bits per dimension, (T,); infinite at steps that may not be first.
        second_moment: mean of x0^2 over data and dimensions.
        counts: values of K, each in [1, T].
        first: the first step of every chain; None: any.

    Returns:
        K -> int64, (K,), descending.

    Raises:
        ValueError: a K is out of its range, or too large for chains that start at ``first``; a table is invalid; the
            chain has over 5,000 steps.
    """
    check_fitted_length(schedule)
    requested = sorted(set(counts))
    total = len(schedule)
    longest = total - (first or 0)
    if not requested or requested[0] < 1 or requested[-1] > longest:
        raise ValueError(f"num_inference_steps={requested} must be in [1, {longest}].")
    decoder_bits = np.array(decoder, dtype=np.float64)
    if decoder_bits.shape != (total,) or np.isnan(decoder_bits).any():
        raise ValueError(f"decoder must be {total} numbers, got shape {decoder_bits.shape}.")
    if first is not None:
        decoder_bits = np.where(np.arange(total) == first, decoder_bits, np.inf)
    costs = np.ascontiguousarray(pair_costs(schedule, x0_error).T)  # [t, s]: minima over s, contiguous in memory
    prior = prior_costs(schedule, second_moment)
    best, came_from, chosen = decoder_bits, [], {}
    for count in range(1, requested[-1] + 1):
        if count > 1:
            through = costs + best
            came_from.append(through.argmin(1))
            best = through[np.arange(total), came_from[-1]]
        if count in requested:
            steps = [int(np.argmin(best + prior))]
            for back in reversed(came_from):
                steps.append(int(back[steps[-1]]))
            chosen[count] = np.array(steps, dtype=np.int64)
    return chosen


def _checked_error(schedule: NoiseSchedule, x0_error: Table) -> Table:
    error = np.asarray(x0_error, dtype=np.float64)
    if error.shape != (len(schedule),) or not (error >= 0).all():
        raise ValueError(f"x0_error must be {len(schedule)} values of 0 or more, got shape {error.shape}.")
    return error
