"""The training objective: target, distance, weights per step, learned log-variance, and the bound.

Symbols, for a sample of step t:

    d     distance(model_output, target), the mean over all axes but the batch
    lv    logvar[t]
    w     weight of step t (``loss_weighting``), 1 for ``simple``
    e     weight of step t in the variational bound
    k     term of step t in the bound, bits per dimension (`diffusers_ddpm_ext.diffusion.likelihood`)
    u     1 / (T p) for a step drawn with probability p, 1 if steps are drawn uniformly

    loss_simple = mean(u d)        loss_vlb = mean(u e d)        loss_gamma = mean(u (d / exp(lv) + lv))
    loss        = mean(u (l_simple_weight * w * (d / exp(lv) + lv) + original_elbo_weight * e d))

``hybrid`` adds ``vlb_weight * (T / 1000) * k`` with a detached mean, so that the bound only trains the learned
variance; ``vlb`` is ``vlb_weight * T * k``, an estimate of the bound without its prior.

With w = 1 this is LatentDiffusion's ``p_losses`` ([LDM] code), and with lv = 0 as well base DDPM's. w multiplies the
complete bracket, so that lv still converges to the log of the unweighted d.

Everything is float32 (float64 for float64 inputs), also for half-precision inputs and under autocast; k is computed in
float64.

Sources: [DDPM] Ho et al. 2020, eqs. 12 and 14; [iDDPM] Nichol & Dhariwal 2021, eqs. 15 and 16 (``hybrid``); [PD]
Salimans & Ho 2022, appendix D; [LDM] Rombach et al. 2022, code.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from diffusers_ddpm_ext.diffusion.arguments import as_steps, check_samples, explain_compvis_names, network_output
from diffusers_ddpm_ext.diffusion.gaussian import Steps, at_step, predict_x0, q_sample, training_target
from diffusers_ddpm_ext.diffusion.levels import EIGHT_BITS, check_decoder
from diffusers_ddpm_ext.diffusion.likelihood import ReverseTransition, SchedulerLike
from diffusers_ddpm_ext.diffusion.reverse_step import LEARNED_VARIANCES, split_variance
from diffusers_ddpm_ext.diffusion.schedule import log_snr
from diffusers_ddpm_ext.diffusion.weighting import ElboKind, LossWeighting, weight_table
from diffusers_ddpm_ext.diffusion.weighting import elbo_weights as make_elbo_weights
from diffusers_ddpm_ext.losses.checks import (
    BOUND_LOSSES,
    OBJECTIVE_LOSSES,
    LossType,
    ObservedConfig,
    check_bound,
    check_bound_alone,
    checked_features,
    checked_schedule,
    checked_share,
    checked_weight,
)
from diffusers_ddpm_ext.losses.distances import Distance, get_distance, l2
from diffusers_ddpm_ext.losses.logvar import LOGVAR_KINDS, ContinuousLogvar, LogvarKind, make_logvar
from diffusers_ddpm_ext.utils.checks import check_one_of, checked_flag, checked_number
from diffusers_ddpm_ext.utils.vocabulary import Decoder, PredictionType


@dataclass(frozen=True)
class ObjectiveOutput:
    """Losses of a batch.

    Attributes:
        loss: scalar to minimize.
        loss_simple: unweighted mean distance, comparable across settings; detached, for logs.
        loss_vlb: mean distance under the weights of the bound; detached, for logs.
        loss_gamma: mean of ``d / exp(logvar[t]) + logvar[t]``; detached, for logs.
        logvar_mean: mean of the logvar table; detached, for logs.
        per_sample_simple: (B,), the distances, unweighted; part of the graph.
        per_sample_loss: (B,), whose mean is ``loss`` if steps are drawn uniformly; part of the graph.
        loss_bound: bits per dimension, an estimate of the bound without its prior; detached, for logs. None unless
            the loss includes the bound.
    """

    loss: Tensor
    loss_simple: Tensor
    loss_vlb: Tensor
    loss_gamma: Tensor
    logvar_mean: Tensor
    per_sample_simple: Tensor
    per_sample_loss: Tensor
    loss_bound: Tensor | None = None

    def scalars(self) -> dict[str, Tensor]:
        """The scalars under their names in a run's metrics; ``loss_bound`` is NaN where the loss has none."""
        bound = torch.full_like(self.loss, math.nan) if self.loss_bound is None else self.loss_bound.to(self.loss)
        return {
            "loss": self.loss,
            "loss_simple": self.loss_simple,
            "loss_vlb": self.loss_vlb,
            "loss_gamma": self.loss_gamma,
            "logvar": self.logvar_mean,
            "loss_bound": bound,
        }


class DDPMObjective(nn.Module):
    """CompVis' diffusion losses as a module, called as ``objective(model_output, x0, noise, t)``.

    Args:
        scheduler: a ``DDPMExtScheduler``. If its config changes, the objective refuses to go on with the old tables.
        prediction_type: what the network predicts; None for the scheduler's, which it must equal.
        loss_type: ``l2``, ``l1``, ``huber``, ``perceptual``, ``hybrid`` (``l2``, and the bound for the learned
            variance), ``vlb`` (the bound alone), or a callable ``distance(prediction, target) -> (B,)``.
        l_simple_weight: weight of the simple loss, 0 or more.
        original_elbo_weight: weight of the variational bound, 0 or more. With another distance than ``l2`` the sum is
            CompVis', but not a bound.
        elbo_weights: ``exact``, the coefficients of the bound, or ``compvis``, the published code's table.
        learn_logvar: whether ``logvar`` is learned. Give it a separate optimizer group, with a learning rate of
            about 2e-2 and without weight decay, which would pull unused steps to 0.
        logvar_init: log-variance at the start, one number or a (T,) tensor.
        snr_gamma: gamma of ``min_snr`` and ``soft_min_snr`` (5 is usual). On its own it means ``min_snr``.
        huber_c: the ``c`` of ``huber``.
        loss_weighting: weight of each step, see `loss_weights`.
        p2_k: k of ``p2``.
        p2_gamma: gamma of ``p2``.
        logvar_kind: ``table``, one value per step, or ``continuous``, a small network of the log-SNR.
        vlb_weight: weight of the bound in ``hybrid`` and ``vlb``.
        decoder: of the bound, see `discretized_gaussian_log_likelihood`.
        bin_width: distance of two levels of the data, for the bound.
        features: for ``perceptual``: ``features(pred_x0, x0) -> (B,)``, a distance of images.
        perceptual_weight: of ``features``, in [0, 1]; ``l2`` has the rest.

    Attributes:
        logvar: (T,), a parameter if learned, else a buffer, ``logvar`` in the state dict in both cases. It stays
            float32 when the module is cast to half precision (``.double()`` makes it float64). Only of the ``table``
            kind; `log_variances` returns both.
        logvar_network: of the ``continuous`` kind, else None.
        schedule: the tables in use.
        prediction_type: of the network.

    Raises:
        ValueError: an option is out of its range, or contradicts the scheduler or another option.
    """

    logvar: Tensor

    @explain_compvis_names
    def __init__(
        self,
        scheduler: SchedulerLike,
        prediction_type: PredictionType | None = None,
        loss_type: LossType | Distance = "l2",
        l_simple_weight: float = 1.0,
        original_elbo_weight: float = 0.0,
        elbo_weights: ElboKind = "exact",
        learn_logvar: bool = False,
        logvar_init: float | Tensor = 0.0,
        snr_gamma: float | None = None,
        huber_c: float = 0.1,
        loss_weighting: LossWeighting = "simple",
        p2_k: float = 1.0,
        p2_gamma: float = 1.0,
        logvar_kind: LogvarKind = "table",
        vlb_weight: float = 1.0,
        decoder: Decoder = "exact",
        bin_width: float = EIGHT_BITS,
        features: Distance | None = None,
        perceptual_weight: float = 1.0,
    ) -> None:
        super().__init__()
        learn_logvar = checked_flag("learn_logvar", learn_logvar)
        self.schedule = checked_schedule(scheduler, prediction_type)
        self._observed = ObservedConfig(scheduler)
        self.prediction_type = self.schedule.prediction_type
        self.loss_type = loss_type if isinstance(loss_type, str) else "custom"
        by_name = loss_type in ("perceptual", *BOUND_LOSSES)
        self.distance: Distance = l2 if by_name else get_distance(loss_type, huber_c, OBJECTIVE_LOSSES)
        self.learns_variance = scheduler.config.variance_type in LEARNED_VARIANCES
        check_bound(self.loss_type, scheduler.config.variance_type, learn_logvar)
        check_decoder(decoder, bin_width)
        self.transition: ReverseTransition | None = None
        if self.loss_type in BOUND_LOSSES:
            config = scheduler.config
            self.transition = ReverseTransition(
                self.schedule, config.variance_type, getattr(config, "v_posterior", None) is not None
            )
        self.decoder, self.bin_width = decoder, float(bin_width)
        self.vlb_weight = checked_weight("vlb_weight", vlb_weight)
        # In a tuple: a frozen feature network is not part of this module's parameters or state.
        self._features = (checked_features(self.loss_type, features),)
        self.perceptual_weight = checked_share("perceptual_weight", perceptual_weight)
        self.l_simple_weight = checked_weight("l_simple_weight", l_simple_weight)
        self.original_elbo_weight = checked_weight("original_elbo_weight", original_elbo_weight)
        if self.l_simple_weight == 0 and self.original_elbo_weight == 0 and self.transition is None:
            raise ValueError("l_simple_weight and original_elbo_weight are both 0: nothing is left to train on.")
        self.elbo_table = make_elbo_weights(self.schedule, elbo_weights)
        weights = weight_table(self.schedule, loss_weighting, snr_gamma, p2_k, p2_gamma)
        self.loss_weighting, self.weight_table = weights
        if self.loss_type == "vlb":
            check_bound_alone(self.loss_weighting, self.l_simple_weight, self.original_elbo_weight)
        for table in (self.elbo_table, self.weight_table):
            if table is not None:
                table.flags.writeable = False  # so that it is transferred to a device once
        self.learn_logvar = learn_logvar
        self._make_logvar(logvar_kind, logvar_init)

    def _make_logvar(self, kind: LogvarKind, init: float | Tensor) -> None:
        check_one_of("logvar_kind", kind, LOGVAR_KINDS)
        self.logvar_network: ContinuousLogvar | None = None
        if kind == "table":
            table = make_logvar(len(self.schedule), init)
            if self.learn_logvar:
                self.logvar = nn.Parameter(table)
            else:
                self.register_buffer("logvar", table)
            return
        if not self.learn_logvar:
            raise ValueError("logvar_kind='continuous' needs learn_logvar=True: a fixed log-variance is a table.")
        number = init.item() if isinstance(init, Tensor) and init.ndim == 0 else init
        start = float(checked_number("logvar_init", number, "one number, finite, with logvar_kind='continuous'"))
        self.logvar_network = ContinuousLogvar(torch.from_numpy(log_snr(self.schedule)), start)

    def log_variances(self) -> Tensor:
        """Current log-variance of every step, (T,), natural log, of either kind."""
        return self.logvar if self.logvar_network is None else self.logvar_network.table()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> DDPMObjective:
        """Move or cast; a cast below float32 changes only the device."""

        def at_least_float32(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return moved if torch.finfo(moved.dtype).bits >= 32 else tensor.to(moved.device)

        return super()._apply(lambda t: at_least_float32(t) if t.is_floating_point() else fn(t), recurse)

    def extra_repr(self) -> str:
        """The settings shown when the module is printed."""
        return (
            f"{self.prediction_type}, T={len(self.schedule)}, l_simple_weight={self.l_simple_weight:g}, "
            f"original_elbo_weight={self.original_elbo_weight:g}, learn_logvar={self.learn_logvar}, "
            f"loss_weighting={self.loss_weighting}"
        )

    def target(self, x0: Tensor, noise: Tensor, t: Steps) -> Tensor:
        """Training target of the network.

        Args:
            x0: clean samples, (B, ...), floating, data units.
            noise: the standard normal noise added to them, same shape.
            t: steps, integers in [0, T): (B,), a list, or one int for all.

        Returns:
            (B, ...), at least float32.

        Raises:
            ValueError: shapes differ, or ``t`` is not one step per sample.
        """
        self._observed.check()
        _check_samples(x0=x0, noise=noise)
        t, dtype = as_steps(t, x0, len(self.schedule)), _common_dtype(x0, noise)
        return training_target(self.schedule, self.prediction_type, x0.to(dtype), noise.to(dtype), t)

    def forward(
        self, model_output: Tensor, x0: Tensor, noise: Tensor, t: Steps, weights: Tensor | None = None
    ) -> ObjectiveOutput:
        """Losses of a batch.

        Args:
            model_output: the network's output for ``q_sample(x0, noise, t)``, (B, ...), floating; (B, 2 C, ...) for a
                learned variance, the prediction first. A Diffusers output with ``.sample`` is taken, too.
            x0: clean samples, (B, C, ...), data units.
            noise: the standard normal noise added to them, same shape.
            t: steps, integers in [0, T): (B,), a list, or one int for all.
            weights: (B,), ``1 / (T p)`` for steps drawn with probability p; None if they are drawn uniformly.

        Returns:
            The losses, at least float32.

        Raises:
            ValueError: shapes differ, ``t`` is not one step per sample, a custom distance returned another shape
                than (B,), or the scheduler's config has changed.
        """
        model_output = network_output(model_output)
        _check_samples(x0=x0, noise=noise)
        if weights is not None:
            _check_weights(weights, x0)
        variance: Tensor | None = None
        if self.learns_variance:
            model_output, variance = split_variance(model_output, x0)
        _check_samples(model_output=model_output, x0=x0, noise=noise)
        with torch.autocast(model_output.device.type, enabled=False):
            dtype = _common_dtype(model_output, x0, noise)
            model_output, x0, noise = model_output.to(dtype), x0.to(dtype), noise.to(dtype)
            target, t = self.target(x0, noise, t), as_steps(t, x0, len(self.schedule))
            distances = self._distances(model_output, target)
            features = self._features[0]
            if features is not None:
                xt = q_sample(self.schedule, x0, noise, t)
                clean = predict_x0(self.schedule, self.prediction_type, model_output, xt, t)
                weight = self.perceptual_weight
                distances = (1 - weight) * distances + weight * _check_per_sample(features(clean, x0), x0, "features")
            bits = None
            if self.transition is not None:
                fixed = model_output.detach() if self.loss_type == "hybrid" else model_output
                output = fixed if variance is None else torch.cat([fixed, variance.to(dtype)], 1)
                xt = q_sample(self.schedule, x0, noise, t)
                bits = self.transition.terms(output, x0, xt, t, decoder=self.decoder, bin_width=self.bin_width).bits
            return self._reduce(distances, t, bits, weights)

    def _distances(self, prediction: Tensor, target: Tensor) -> Tensor:
        return _check_per_sample(self.distance(prediction, target), prediction, "loss_type")

    def _reduce(self, distances: Tensor, t: Tensor, bits: Tensor | None, weights: Tensor | None) -> ObjectiveOutput:
        logvar = self._logvar_at(t).to(distances)
        gamma = distances / torch.exp(logvar) + logvar
        bound = at_step(self.elbo_table, t, distances) * distances
        weighted = gamma if self.weight_table is None else at_step(self.weight_table, t, distances) * gamma
        per_sample = self.l_simple_weight * weighted
        if self.original_elbo_weight > 0:
            per_sample = per_sample + self.original_elbo_weight * bound
        steps = len(self.schedule)
        if bits is not None and self.loss_type == "hybrid":
            per_sample = per_sample + self.vlb_weight * steps / 1000 * bits
        elif bits is not None:
            per_sample = self.vlb_weight * steps * bits
        importance = None if weights is None else weights.to(distances)

        def mean(values: Tensor) -> Tensor:
            return values.mean() if importance is None else (importance * values).mean()

        return ObjectiveOutput(
            loss=mean(per_sample),
            loss_simple=mean(distances.detach()),
            loss_vlb=mean(bound.detach()),
            loss_gamma=mean(gamma.detach()),
            logvar_mean=self.log_variances().detach().mean(),
            per_sample_simple=distances,
            per_sample_loss=per_sample,
            loss_bound=None if bits is None else steps * mean(bits.detach()),
        )

    def _logvar_at(self, t: Tensor) -> Tensor:
        if self.logvar_network is None:
            return self.logvar[t.to(self.logvar.device)]
        levels: Tensor = self.logvar_network(self.logvar_network.log_snr[t.to(self.logvar_network.log_snr.device)])
        return levels


def _check_per_sample(distances: Any, like: Tensor, name: str) -> Tensor:
    if not isinstance(distances, Tensor) or distances.shape != like.shape[:1]:
        got = tuple(distances.shape) if isinstance(distances, Tensor) else type(distances).__name__
        raise ValueError(
            f"{name}: the distance must return one value per sample, shape {tuple(like.shape[:1])}, "
            f"got {got}; take the mean over all axes but the first."
        )
    return distances.to(like.dtype)


def _common_dtype(*tensors: Tensor) -> torch.dtype:
    dtype = torch.float32
    for tensor in tensors:
        dtype = torch.promote_types(dtype, tensor.dtype)
    return dtype


def _check_samples(**tensors: Tensor) -> None:
    check_samples(**tensors)
    for name, tensor in tensors.items():
        if tensor.ndim == 0 or len(tensor) == 0:
            raise ValueError(f"{name} must have at least one sample, shape (B, ...), got {tuple(tensor.shape)}.")


def _check_weights(weights: Any, like: Tensor) -> None:
    if not isinstance(weights, Tensor) or weights.shape != like.shape[:1]:
        got = tuple(weights.shape) if isinstance(weights, Tensor) else type(weights).__name__
        raise ValueError(f"weights must be a tensor of one per sample, shape {tuple(like.shape[:1])}, got {got}.")
