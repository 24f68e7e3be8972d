"""The training objective: target, distance, weights over steps, and the learned log-variance.

Symbols, for a sample of step t:

    d     distance(model_output, target), the mean over all axes but the batch
    lv    logvar[t]
    w     min-SNR weight of step t, 1 where it is off
    e     weight of step t in the variational bound

    loss_simple = mean(d)        loss_vlb = mean(e d)        loss_gamma = mean(d / exp(lv) + lv)
    loss        = mean(l_simple_weight * w * (d / exp(lv) + lv) + original_elbo_weight * e d)

With w = 1 this is LatentDiffusion's ``p_losses`` ([LDM] code), and with lv = 0 as well base DDPM's. w multiplies the
bracket as a whole, so that lv still goes to the log of the unweighted d.

Everything is float32 (float64 for float64 inputs), for half-precision inputs and under autocast too.

Sources: [DDPM] Ho et al. 2020, eqs. 12 and 14; [PD] Salimans & Ho 2022, appendix D; [LDM] Rombach et al. 2022, code;
[min-SNR] Hang et al. 2023.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from diffusers_ddpm_ext.distance import Distance, get_distance
from diffusers_ddpm_ext.gaussian import at_step, check_steps, training_target
from diffusers_ddpm_ext.logvar import make_logvar
from diffusers_ddpm_ext.schedule import PREDICTION_TYPES, NoiseSchedule
from diffusers_ddpm_ext.weighting import elbo_weights as make_elbo_weights
from diffusers_ddpm_ext.weighting import min_snr_weights

COMPVIS_NAMES = {"eps": "epsilon", "x0": "sample", "v": "v_prediction"}


class SchedulerLike(Protocol):
    """What the objective needs of a scheduler; ``DDPMExtScheduler`` has it."""

    @property
    def schedule(self) -> NoiseSchedule:
        """Tables of the full chain."""
        ...

    @property
    def config(self) -> Any:
        """Holds ``prediction_type`` and ``variance_type``."""
        ...


@dataclass(frozen=True)
class ObjectiveOutput:
    """One batch's losses.

    Attributes:
        loss: scalar to minimise.
        loss_simple: unweighted mean distance, comparable across settings; detached, for logs.
        loss_vlb: mean distance under the weights of the bound; detached, for logs.
        loss_gamma: mean of ``d / exp(logvar[t]) + logvar[t]``; detached, for logs.
        logvar_mean: mean of the whole logvar table; detached, for logs.
        per_sample_simple: (B,), the distances, unweighted; part of the graph.
        per_sample_loss: (B,), whose mean is ``loss``; part of the graph.
    """

    loss: Tensor
    loss_simple: Tensor
    loss_vlb: Tensor
    loss_gamma: Tensor
    logvar_mean: Tensor
    per_sample_simple: Tensor
    per_sample_loss: Tensor


class DDPMObjective(nn.Module):
    """CompVis' diffusion losses as a module, called as ``objective(model_output, x0, noise, t)``.

    Args:
        scheduler: a ``DDPMExtScheduler``. Its tables are taken over as they are now.
        prediction_type: what the network predicts; None for the scheduler's, which it must equal.
        loss_type: ``l2``, ``l1``, ``huber``, or a callable ``distance(prediction, target) -> (B,)``.
        l_simple_weight: weight of the simple loss, 0 or more.
        original_elbo_weight: weight of the variational bound, 0 or more. With another distance than ``l2`` the sum is
            CompVis' but no bound.
        elbo_weights: ``exact``, the coefficients of the bound, or ``compvis``, the published code's table.
        learn_logvar: whether ``logvar`` is a parameter. Give it an optimizer group of its own, with a learning rate
            of about 2e-2 and without weight decay, which would pull unseen steps to 0.
        logvar_init: log-variance at the start, one number or a (T,) tensor.
        snr_gamma: min-SNR's gamma (5 is usual); None leaves it off.
        huber_c: the ``c`` of ``huber``.

    Attributes:
        logvar: (T,), a parameter if learned, else a buffer, ``logvar`` in the state dict both ways. It stays float32
            when the module is cast to a half type (``.double()`` makes it float64).
        schedule: the tables in use.
        prediction_type: what the network predicts.

    Raises:
        ValueError: an option is out of its range, contradicts the scheduler, or is not supported yet.
    """

    logvar: Tensor

    def __init__(
        self,
        scheduler: SchedulerLike,
        prediction_type: str | None = None,
        loss_type: str | Distance = "l2",
        l_simple_weight: float = 1.0,
        original_elbo_weight: float = 0.0,
        elbo_weights: str = "exact",
        learn_logvar: bool = False,
        logvar_init: float | Tensor = 0.0,
        snr_gamma: float | None = None,
        huber_c: float = 0.1,
    ) -> None:
        super().__init__()
        self.schedule = _checked_schedule(scheduler, prediction_type)
        self.prediction_type = self.schedule.prediction_type
        self.distance = get_distance(loss_type, huber_c)
        self.l_simple_weight = _checked_weight("l_simple_weight", l_simple_weight)
        self.original_elbo_weight = _checked_weight("original_elbo_weight", original_elbo_weight)
        if self.l_simple_weight == 0 and self.original_elbo_weight == 0:
            raise ValueError("l_simple_weight and original_elbo_weight are both 0: nothing is left to train on.")
        self.elbo_table = make_elbo_weights(self.schedule, elbo_weights)
        self.snr_table = None if snr_gamma is None else min_snr_weights(self.schedule, snr_gamma)
        self.learn_logvar = bool(learn_logvar)
        table = make_logvar(len(self.schedule), logvar_init)
        if self.learn_logvar:
            self.logvar = nn.Parameter(table)
        else:
            self.register_buffer("logvar", table)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> DDPMObjective:
        """Moves and casts go through here; a cast below float32 keeps the dtype and takes the device alone."""

        def never_half(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return moved if torch.finfo(moved.dtype).bits >= 32 else tensor.to(moved.device)

        return super()._apply(lambda t: never_half(t) if t.is_floating_point() else fn(t), recurse)

    def extra_repr(self) -> str:
        """The settings shown when the module is printed."""
        return (
            f"{self.prediction_type}, T={len(self.schedule)}, l_simple_weight={self.l_simple_weight:g}, "
            f"original_elbo_weight={self.original_elbo_weight:g}, learn_logvar={self.learn_logvar}, "
            f"min_snr={self.snr_table is not None}"
        )

    def target(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """What the network should return.

        Args:
            x0: clean samples, (B, ...), floating, data units.
            noise: the standard normal noise they got, same shape.
            t: steps, (B,), integer, each in [0, T).

        Returns:
            (B, ...), at least float32.

        Raises:
            ValueError: shapes differ, or ``t`` is not one step per sample.
        """
        _check_samples(x0=x0, noise=noise)
        check_steps(t, x0, len(self.schedule))
        dtype = _common_dtype(x0, noise)
        return training_target(self.schedule, self.prediction_type, x0.to(dtype), noise.to(dtype), t.long())

    def forward(self, model_output: Tensor, x0: Tensor, noise: Tensor, t: Tensor) -> ObjectiveOutput:
        """The losses of one batch.

        Args:
            model_output: what the network returned for ``q_sample(x0, noise, t)``, (B, ...), floating.
            x0: clean samples, same shape, data units.
            noise: the standard normal noise they got, same shape.
            t: steps, (B,), integer, each in [0, T).

        Returns:
            The losses, at least float32.

        Raises:
            ValueError: shapes differ, ``t`` is not one step per sample, or a custom distance returned another shape
                than (B,).
        """
        _check_samples(model_output=model_output, x0=x0, noise=noise)
        with torch.autocast(model_output.device.type, enabled=False):
            dtype = _common_dtype(model_output, x0, noise)
            target = self.target(x0.to(dtype), noise.to(dtype), t)
            distances = self._distances(model_output.to(dtype), target)
            return self._reduce(distances, t.long())

    def _distances(self, prediction: Tensor, target: Tensor) -> Tensor:
        distances = self.distance(prediction, target)
        if not isinstance(distances, Tensor) or distances.shape != prediction.shape[:1]:
            got = tuple(distances.shape) if isinstance(distances, Tensor) else type(distances).__name__
            raise ValueError(
                f"loss_type: the distance must return one number per sample, shape {tuple(prediction.shape[:1])}, "
                f"got {got}; take the mean over all axes but the first."
            )
        return distances.to(prediction.dtype)

    def _reduce(self, distances: Tensor, t: Tensor) -> ObjectiveOutput:
        logvar = self.logvar[t.to(self.logvar.device)].to(distances)
        gamma = distances / torch.exp(logvar) + logvar
        bound = at_step(self.elbo_table, t, distances) * distances
        weighted = gamma if self.snr_table is None else at_step(self.snr_table, t, distances) * gamma
        per_sample = self.l_simple_weight * weighted
        if self.original_elbo_weight > 0:
            per_sample = per_sample + self.original_elbo_weight * bound
        return ObjectiveOutput(
            loss=per_sample.mean(),
            loss_simple=distances.detach().mean(),
            loss_vlb=bound.detach().mean(),
            loss_gamma=gamma.detach().mean(),
            logvar_mean=self.logvar.detach().mean(),
            per_sample_simple=distances,
            per_sample_loss=per_sample,
        )


def _common_dtype(*tensors: Tensor) -> torch.dtype:
    dtype = torch.float32
    for tensor in tensors:
        dtype = torch.promote_types(dtype, tensor.dtype)
    return dtype


def _check_samples(**tensors: Tensor) -> None:
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if len(set(shapes.values())) > 1:
        raise ValueError("shapes must be equal, got " + ", ".join(f"{name} {shape}" for name, shape in shapes.items()))
    for name, tensor in tensors.items():
        if not tensor.is_floating_point():
            raise ValueError(f"{name} must be a floating tensor, got {tensor.dtype}.")
        if tensor.ndim == 0 or len(tensor) == 0:
            raise ValueError(f"{name} must hold at least one sample, shape (B, ...), got {tuple(tensor.shape)}.")


def _checked_weight(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < math.inf:
        raise ValueError(f"{name}={value!r} must be a finite number of 0 or more.")
    return float(value)


def _checked_schedule(scheduler: SchedulerLike, prediction_type: str | None) -> NoiseSchedule:
    schedule = getattr(scheduler, "schedule", None)
    if not isinstance(schedule, NoiseSchedule):
        raise ValueError(
            f"scheduler={type(scheduler).__name__} has no tables of this package; "
            "convert it with DDPMExtScheduler.from_config(scheduler.config)."
        )
    own = scheduler.config.prediction_type
    if prediction_type is not None and prediction_type not in PREDICTION_TYPES:
        hint = COMPVIS_NAMES.get(prediction_type)
        way_out = f"it is called {hint!r} here" if hint else f"choose one of {', '.join(PREDICTION_TYPES)}"
        raise ValueError(f"prediction_type={prediction_type!r} is unknown: {way_out}.")
    if prediction_type is not None and prediction_type != own:
        raise ValueError(
            f"prediction_type={prediction_type!r} differs from the scheduler's {own!r}, whose tables are used; "
            f"leave it out, or make the scheduler with prediction_type={prediction_type!r}."
        )
    variance_type = scheduler.config.variance_type
    if variance_type in ("learned", "learned_range"):
        raise ValueError(
            f"variance_type={variance_type!r} is not supported yet in training (it samples); "
            "make the scheduler with 'fixed_small', 'fixed_large' or v_posterior."
        )
    if schedule.zero_terminal_snr and own == "epsilon":
        raise ValueError(
            "prediction_type='epsilon' cannot be trained at zero terminal SNR, where the last step holds no signal: "
            "use prediction_type='v_prediction' or 'sample', or rescale_betas_zero_snr=False."
        )
    return schedule if schedule.prediction_type == own else schedule.with_prediction_type(own)
