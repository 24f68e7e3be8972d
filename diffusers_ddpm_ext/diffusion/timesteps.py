"""Timestep samplers: the training steps of a batch, and the weights that make every choice unbiased.

A step drawn with probability p has the weight 1 / (T p): the weighted mean of any function of the step has the
expectation of its uniform mean, for any sampler. Steps are drawn by inverting the distribution function at numbers u
in [0, 1) that the caller draws, so that they are a function of the caller's random keys.

======================  ==============================================================================================
``uniform``             every step with equal probability
``stratified``          one step of a batch in each of N equal intervals of the chain; equal probabilities
``loss_second_moment``  in proportion to the root mean square of a step's last losses ([iDDPM] section 3.3)
``log_snr_normal``      log-SNR normally distributed, e.g. around perceptually important levels ([EDM] section 5)
``log_snr_uniform``     log-SNR uniformly distributed ([VDM])
======================  ==============================================================================================

Sources: [iDDPM] Nichol & Dhariwal 2021, eq. 18, and its published code; [VDM] Kingma et al. 2021, appendix I.1 (one
draw per interval); [EDM] Karras et al. 2022.
"""

from __future__ import annotations

import math
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor, nn

from diffusers_ddpm_ext.diffusion.schedule import LARGEST_LOG_SNR, NoiseSchedule, Table, log_snr
from diffusers_ddpm_ext.utils.checks import check_one_of, checked_integer, checked_number, describe

SamplerName = Literal["uniform", "stratified", "loss_second_moment", "log_snr_normal", "log_snr_uniform"]
SAMPLERS: tuple[SamplerName, ...] = get_args(SamplerName)
HISTORY = 10  # losses stored per step
UNIFORM_SHARE = 0.001  # fraction of uniform draws in loss_second_moment
LOG_SNR_SHARE = 0.1  # fraction of uniform draws in the log-SNR densities: no weight is above 10

__all__ = ["LossSecondMomentSampler", "TimestepSampler", "log_snr_edges", "make_sampler", "stratify"]


class TimestepSampler(nn.Module):
    """Draws steps with fixed probabilities.

    Args:
        probabilities: of the T steps, (T,), float64, above 0, of sum 1; None for equal ones.
        num_train_timesteps: T.
        stratified: whether a batch has one step in each of N equal intervals of the chain.
    """

    def __init__(self, probabilities: Table | None, num_train_timesteps: int, stratified: bool = False) -> None:
        super().__init__()
        self.num_train_timesteps = num_train_timesteps
        self.stratified = stratified
        self._fixed = probabilities

    @property
    def learns(self) -> bool:
        """Whether it uses the losses (`update`)."""
        return False

    def probabilities(self) -> Table | None:
        """Probabilities of the T steps, (T,), float64; None if they are equal."""
        return self._fixed

    def draw(self, u: Tensor) -> tuple[Tensor, Tensor | None]:
        """Steps at quantiles of the distribution.

        Args:
            u: (B,), float64, on the CPU, each in [0, 1).

        Returns:
            Steps (B,), int64, and their weights 1 / (T p), (B,), float64; None if all are 1.
        """
        p, last = self.probabilities(), self.num_train_timesteps - 1
        if p is None:
            return (u.double() * self.num_train_timesteps).long().clamp(max=last), None
        edges = np.cumsum(p)
        places = np.searchsorted(edges / edges[-1], u.double().numpy(), side="right").clip(max=last)
        return torch.from_numpy(places.astype(np.int64)), torch.from_numpy(1 / (len(p) * p[places]))

    def update(self, timesteps: Tensor, losses: Tensor) -> None:
        """Record the losses (N,) of a batch at its steps (N,), if the sampler learns from them.

        The losses are without the weights of `draw`, in an order that is the same on every rank.
        """


class LossSecondMomentSampler(TimestepSampler):
    """Steps in proportion to the root mean square of their last losses, once every step has a full history.

    Until then they are drawn uniformly. Non-finite losses are left out. The history is in the state dict.

    Args:
        num_train_timesteps: T.
        history: losses stored per step.
        uniform_share: fraction of uniform draws, in (0, 1].

    Attributes:
        losses: (T, history), float64 (float32 on MPS, which lacks float64), the last ones, oldest first.
        counts: (T,), int64, how many are stored.
    """

    losses: Tensor
    counts: Tensor

    def __init__(self, num_train_timesteps: int, history: int = HISTORY, uniform_share: float = UNIFORM_SHARE) -> None:
        super().__init__(None, num_train_timesteps)
        checked_integer("history", history, "1 or more, and at most 1000", 1, 1000)
        checked_number("uniform_share", uniform_share, "in (0, 1]", lambda share: 0 < share <= 1)
        self.uniform_share = uniform_share
        self.register_buffer("losses", torch.zeros(num_train_timesteps, history, dtype=torch.float64))
        self.register_buffer("counts", torch.zeros(num_train_timesteps, dtype=torch.int64))

    @property
    def learns(self) -> bool:
        """True."""
        return True

    def _apply(self, fn: Any, recurse: bool = True) -> LossSecondMomentSampler:
        """Move the history with the module, so that it is synchronized there, but keep its precision."""
        device = fn(torch.zeros(1)).device
        self.losses = self.losses.to(device, torch.float32 if device.type == "mps" else torch.float64)
        self.counts = self.counts.to(device)
        return self

    def probabilities(self) -> Table | None:
        """As in `TimestepSampler`; equal until every step has a full history, and if all losses are 0."""
        if not self.is_warm:
            return None
        root = np.sqrt((self.losses.double().cpu().numpy() ** 2).mean(axis=1))
        total = root.sum()
        if total == 0 or not math.isfinite(total):
            return None
        uniform = self.uniform_share / len(root)
        p: Table = root / total * (1 - self.uniform_share) + uniform
        return p

    @property
    def is_warm(self) -> bool:
        """Whether every step has a full history."""
        return bool((self.counts == self.losses.shape[1]).all())

    def update(self, timesteps: Tensor, losses: Tensor) -> None:
        """See `TimestepSampler.update`."""
        history, counts = self.losses.cpu().numpy(), self.counts.cpu().numpy()
        full = history.shape[1]
        for t, loss in zip(timesteps.tolist(), losses.double().tolist(), strict=True):
            if not math.isfinite(loss):
                continue
            if counts[t] == full:
                history[t, :-1] = history[t, 1:].copy()
                history[t, -1] = loss
            else:
                history[t, counts[t]] = loss
                counts[t] += 1
        self.losses.copy_(torch.from_numpy(history))
        self.counts.copy_(torch.from_numpy(counts))


def make_sampler(
    name: SamplerName, schedule: NoiseSchedule, log_snr_mean: float = 0.0, log_snr_std: float = 2.0
) -> TimestepSampler:
    """Make a sampler by name, for the steps of the full chain.

    Args:
        name: one of the table in this module's docstring.
        schedule: of the full chain.
        log_snr_mean: of ``log_snr_normal``.
        log_snr_std: of ``log_snr_normal``, above 0.

    Raises:
        ValueError: the name is unknown, or a value is out of its range.
    """
    if not isinstance(schedule, NoiseSchedule):
        raise ValueError(f"schedule={describe(schedule)} must be a NoiseSchedule: scheduler.schedule has one.")
    steps = len(schedule)
    check_one_of("timestep_sampler", name, SAMPLERS)
    if name == "loss_second_moment":
        return LossSecondMomentSampler(steps)
    if not name.startswith("log_snr"):
        return TimestepSampler(None, steps, stratified=name == "stratified")
    checked_number("log_snr_mean", log_snr_mean, "finite; at 0 signal and noise are equal")
    checked_number("log_snr_std", log_snr_std, "finite and above 0; 2 is usual", lambda std: 0 < std < math.inf)
    edges = log_snr_edges(schedule)
    if name == "log_snr_uniform":
        mass = np.diff(-edges)
    else:
        z = (edges - log_snr_mean) / log_snr_std
        mass = np.diff(-np.array([math.erf(value / math.sqrt(2)) for value in z]))
    total = mass.sum()
    if not total > 0:
        raise ValueError(
            f"log_snr_mean={log_snr_mean} with log_snr_std={log_snr_std} is outside the chain's log-SNR, "
            f"{edges[-1]:.1f} to {edges[0]:.1f}."
        )
    return TimestepSampler((1 - LOG_SNR_SHARE) * mass / total + LOG_SNR_SHARE / steps, steps)


def log_snr_edges(schedule: NoiseSchedule) -> Table:
    """Edges of the intervals around each step's log-SNR, descending, (T + 1,); the outer ones are symmetric."""
    levels = log_snr(schedule).clip(-LARGEST_LOG_SNR, LARGEST_LOG_SNR)
    if len(levels) == 1:
        return np.array([levels[0] + 0.5, levels[0] - 0.5])
    middles = (levels[1:] + levels[:-1]) / 2
    return np.concatenate([[2 * levels[0] - middles[0]], middles, [2 * levels[-1] - middles[-1]]])


def stratify(u: Tensor, positions: Tensor, order: Tensor) -> Tensor:
    """Move each random number of a batch into its own interval of [0, 1).

    Args:
        u: (B,), float64, in [0, 1).
        positions: (B,), of the samples in the effective batch of N.
        order: (N,), a permutation: the interval of each position. Over random orders each result is uniform.
    """
    return (order[positions].double() + u.double()) / len(order)
