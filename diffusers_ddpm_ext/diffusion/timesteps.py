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
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor, nn

from diffusers_ddpm_ext.diffusion.arguments import as_steps
from diffusers_ddpm_ext.diffusion.device_tables import table_tensor
from diffusers_ddpm_ext.diffusion.levels import exact_dtype
from diffusers_ddpm_ext.diffusion.schedule import LARGEST_LOG_SNR, NoiseSchedule, Table, log_snr
from diffusers_ddpm_ext.utils.checks import check_one_of, checked_integer, checked_number, describe
from diffusers_ddpm_ext.utils.host_reads import reads_are_free

SamplerName = Literal["uniform", "stratified", "loss_second_moment", "log_snr_normal", "log_snr_uniform"]
SAMPLERS: tuple[SamplerName, ...] = get_args(SamplerName)
HISTORY = 10  # losses stored per step
UNIFORM_SHARE = 0.001  # fraction of uniform draws in loss_second_moment
LOG_SNR_SHARE = 0.1  # fraction of uniform draws in the log-SNR densities: no weight is above 10

__all__ = ["LossSecondMomentSampler", "TimestepSampler", "log_snr_edges", "make_sampler", "stratify"]


@dataclass(frozen=True)
class _Quantiles:
    """Distribution function of the steps at the end of each, and the steps' weights 1 / (T p); read-only, (T,)."""

    edges: Table
    weights: Table

    @classmethod
    def of(cls, p: Table) -> _Quantiles:
        edges = np.cumsum(p)
        quantiles = cls(edges / edges[-1], 1 / (len(p) * p))
        for table in (quantiles.edges, quantiles.weights):
            table.flags.writeable = False  # so that it is transferred to a device once
        return quantiles

    def draw(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """Steps and weights; see `TimestepSampler.draw`."""
        edges, weights = (table_tensor(table, u.device, u.dtype) for table in (self.edges, self.weights))
        places = torch.searchsorted(edges, u, right=True).clamp(max=len(self.edges) - 1)
        return places, weights[places]


def _checked_probabilities(probabilities: Any, num_train_timesteps: int) -> Table:
    table: Table = np.asarray(probabilities, dtype=np.float64)
    if (
        table.shape != (num_train_timesteps,)
        or not (table > 0).all()
        or not math.isclose(table.sum(), 1, rel_tol=1e-6)
    ):
        raise ValueError(
            f"probabilities={describe(probabilities)} must be {num_train_timesteps:,} numbers above 0 whose sum is 1."
        )
    return table


def _check_numbers(u: Any) -> None:
    if not isinstance(u, Tensor) or not u.is_floating_point() or u.ndim != 1:
        raise ValueError(f"u={describe(u)} must be a floating tensor of shape (B,), with numbers in [0, 1).")
    if u.numel() and reads_are_free(u.device):
        low, high = (float(end) for end in u.aminmax())
        if not 0 <= low <= high < 1:
            raise ValueError(f"u must be in [0, 1), got {low:g} to {high:g}.")


class TimestepSampler(nn.Module):
    """Draws steps with fixed probabilities.

    Args:
        probabilities: of the T steps, (T,), float64, above 0, of sum 1; None for equal ones.
        num_train_timesteps: T.
        stratified: whether a batch has one step in each of N equal intervals of the chain.

    Raises:
        ValueError: ``probabilities`` are not T positive numbers of sum 1.
    """

    def __init__(self, probabilities: Table | None, num_train_timesteps: int, stratified: bool = False) -> None:
        super().__init__()
        checked_integer("num_train_timesteps", num_train_timesteps, "1 or more", 1)
        if probabilities is not None:
            probabilities = _checked_probabilities(probabilities, num_train_timesteps)
        self.num_train_timesteps = num_train_timesteps
        self.stratified = stratified
        self._fixed = probabilities
        self._fixed_quantiles = None if probabilities is None else _Quantiles.of(probabilities)

    @property
    def learns(self) -> bool:
        """Whether it uses the losses (`update`)."""
        return False

    @property
    def is_uniform(self) -> bool:
        """Whether the steps of a batch are drawn independently and with equal probabilities."""
        return not self.stratified and self.probabilities() is None

    def probabilities(self) -> Table | None:
        """Probabilities of the T steps, (T,), float64; None if they are equal."""
        return self._fixed

    def draw(self, u: Tensor) -> tuple[Tensor, Tensor | None]:
        """Steps at quantiles of the distribution.

        Args:
            u: (B,), float64 (float32 on MPS, which lacks it), each in [0, 1).

        Returns:
            Steps (B,), int64, and their weights 1 / (T p), (B,), of the dtype of ``u``; None if all are 1. Both on the
            device of ``u``, where nothing is read.

        Raises:
            ValueError: ``u`` is not a floating tensor (B,) of numbers in [0, 1); their range is not checked on an
                accelerator.
        """
        _check_numbers(u)
        quantiles, u = self._quantiles(), u.to(exact_dtype(u.device))
        return (self._uniform(u), None) if quantiles is None else quantiles.draw(u)

    def _uniform(self, u: Tensor) -> Tensor:
        return (u * self.num_train_timesteps).long().clamp(max=self.num_train_timesteps - 1)

    def _quantiles(self) -> _Quantiles | None:
        return self._fixed_quantiles

    def update(self, timesteps: Tensor, losses: Tensor) -> None:
        """Record the losses (N,) of a batch at its steps (N,), if the sampler learns from them.

        The losses are without the weights of `draw`, in an order that is the same on every rank.

        Raises:
            ValueError: a step is not in [0, T), which is not checked on an accelerator, or steps and losses are not as
                many.
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
        self._last: tuple[tuple[int, ...], _Quantiles | None] | None = None

    @property
    def learns(self) -> bool:
        """True."""
        return True

    def _apply(self, fn: Any, recurse: bool = True) -> LossSecondMomentSampler:
        """Move the history with the module, so that it is synchronized there, but keep its precision."""
        device = fn(torch.zeros(1)).device
        self.losses = self.losses.to(device, exact_dtype(device))
        self.counts = self.counts.to(device)
        self._last = None
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
    def is_uniform(self) -> bool:
        """As in `TimestepSampler`."""
        return self._quantiles() is None

    @property
    def is_warm(self) -> bool:
        """Whether every step has a full history."""
        return bool((self.counts == self.losses.shape[1]).all())

    def draw(self, u: Tensor) -> tuple[Tensor, Tensor | None]:
        """As in `TimestepSampler`; on an accelerator there always are weights, of 1 while the steps are uniform."""
        _check_numbers(u)
        if reads_are_free(u.device):
            return super().draw(u)
        root = self.losses.square().mean(1).sqrt()
        total, full = root.sum(), (self.counts == self.losses.shape[1]).all()
        is_learned = full & torch.isfinite(total) & (total > 0)
        p = root / total * (1 - self.uniform_share) + self.uniform_share / len(root)
        edges = p.cumsum(0)
        places = torch.searchsorted(edges / edges[-1], u, right=True).clamp(max=len(root) - 1)
        weights = torch.where(is_learned, 1 / (len(root) * p[places]), torch.ones_like(u))
        return torch.where(is_learned, places, self._uniform(u)), weights

    def _quantiles(self) -> _Quantiles | None:
        """Those of the present history, computed once until an update or another state changes it."""
        version = self.losses._version, self.counts._version
        if self._last is None or self._last[0] != version:
            p = self.probabilities()
            self._last = version, None if p is None else _Quantiles.of(p)
        return self._last[1]

    @torch.no_grad()
    def update(self, timesteps: Tensor, losses: Tensor) -> None:
        """See `TimestepSampler.update`. Several losses of one step follow each other in the order of the batch."""
        as_steps(timesteps, losses, len(self.losses), "timesteps")
        self._last = None
        if not reads_are_free(self.losses.device):
            self._update_on_device(timesteps.to(self.counts), losses.to(self.losses))
            return
        history, counts = self.losses.numpy(), self.counts.numpy()
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

    def _update_on_device(self, timesteps: Tensor, losses: Tensor) -> None:
        """The same without reading anything: all losses at once, those to be left out in a row of their own."""
        steps, full = self.losses.shape
        t, order = torch.where(torch.isfinite(losses), timesteps, steps).sort(stable=True)
        losses = losses[order]
        first, end = torch.searchsorted(t, t), torch.searchsorted(t, t, right=True)  # of the samples of the same step
        history = torch.cat([self.losses, self.losses.new_zeros(1, full)])
        counts = torch.cat([self.counts, self.counts.new_zeros(1)])
        before = counts[t]
        dropped = (before + end - first - full).clamp(min=0)
        places = torch.arange(full, device=t.device) + dropped[:, None]
        history[t] = history[t].gather(1, places.clamp(max=full - 1))
        slot = before - dropped + torch.arange(len(t), device=t.device) - first
        left_out = (slot < 0) | (t == steps)
        history[torch.where(left_out, steps, t), slot.clamp(0, full - 1)] = losses
        counts[t] = (before + end - first).clamp(max=full)
        self.losses.copy_(history[:-1])
        self.counts.copy_(counts[:-1])


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
    dtype = exact_dtype(u.device)
    return (order[positions].to(dtype) + u.to(dtype)) / len(order)
