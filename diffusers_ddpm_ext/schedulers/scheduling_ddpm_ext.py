"""DDPMExtScheduler: ancestral DDPM sampling, exact on every chain, with CompVis' tables and method names.

Symbols, on the chain in use (all T steps, or the K steps of ``set_timesteps``):

    x0, xt, eps, v   as in `diffusers_ddpm_ext.diffusion.gaussian`
    c0, ct           posterior_mean_coef1, posterior_mean_coef2: the posterior mean is ``c0 x0 + ct xt``
    sigma            square root of posterior_variance
    small, large     variance of the exact posterior, and beta, between which ``v_posterior`` interpolates

Sources: [DDPM] Ho et al. 2020, eqs. 6, 7, 15 and section 3.2; [iDDPM] Nichol & Dhariwal 2021, eq. 15 (learned_range)
and section 4 (respacing); [Imagen] Saharia et al. 2022, section 2.3 (thresholding); [ZTSNR] Lin et al. 2023.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler, DDPMSchedulerOutput

# Diffusers looks for the name SchedulerMixin in the module that defines a scheduler before it loads one.
from diffusers.schedulers.scheduling_utils import KarrasDiffusionSchedulers, SchedulerMixin
from torch import Tensor

from diffusers_ddpm_ext.diffusion import gaussian
from diffusers_ddpm_ext.diffusion.arguments import Generators, check_samples, explain_compvis_names, network_output
from diffusers_ddpm_ext.diffusion.respacing import TimestepSpacing, custom_timesteps, spaced_timesteps
from diffusers_ddpm_ext.diffusion.reverse_step import (
    LEARNED_VARIANCES,
    ReverseCoefficients,
    log_variance,
    normalize_timestep,
    per_sample_timesteps,
    scaled_noise,
    small_variance,
    split_variance,
)
from diffusers_ddpm_ext.diffusion.schedule import MIN_VARIANCE, NoiseSchedule, as_table
from diffusers_ddpm_ext.errors import printable
from diffusers_ddpm_ext.schedulers.compvis_api import CompVisAPI
from diffusers_ddpm_ext.schedulers.config import DEFAULT_COSINE_S, DEFAULT_NUM_TRAIN_TIMESTEPS, format_ranges
from diffusers_ddpm_ext.schedulers.config_warnings import leave_out
from diffusers_ddpm_ext.schedulers.live_config import LiveConfig, constructor_defaults
from diffusers_ddpm_ext.schedulers.resolved_config import resolve_config
from diffusers_ddpm_ext.utils.checks import check_one_of, checked_flag, checked_integer, describe
from diffusers_ddpm_ext.utils.quantiles import row_quantiles
from diffusers_ddpm_ext.utils.vocabulary import (
    FROM_COMPVIS_BETA_SCHEDULE,
    SAMPLE_TIMESTEPS,
    VARIANCE_TYPES,
    BetaSchedule,
    PredictionType,
    VarianceType,
)

Betas = Sequence[float] | npt.NDArray[Any] | Tensor
NoiseSource = tuple[Tensor, Generators, Tensor | None]  # the network's output, generators, the caller's noise


class DDPMExtScheduler(LiveConfig, CompVisAPI, SchedulerMixin, ConfigMixin):
    """``DDPMScheduler`` from float64 tables, with CompVis' ``v_posterior``, method names and tables.

    Arguments of ``DDPMScheduler`` have the same meaning. The config is always obeyed: ``register_to_config`` makes the
    scheduler, also one in use, that of the new config, or raises ValueError.

    Args:
        num_train_timesteps: T, at most 100,000. With ``trained_betas`` it is their number and may be left out.
        beta_start: first beta.
        beta_end: last beta.
        beta_schedule: ``linear``, ``scaled_linear``, ``squaredcos_cap_v2``, ``sigmoid``, ``laplace`` or ``sqrt``.
            Betas that some Diffusers scheduler has no name for are in the config as ``trained_betas``, too.
        trained_betas: the betas themselves: list, array or tensor, (T,).
        variance_type: ``fixed_small`` (posterior), ``fixed_large`` (beta), their ``_log`` forms (the same noise),
            ``learned`` (the second half of the model's channels is the log-variance) or ``learned_range`` (it
            interpolates between the logs of small and large, from -1 to 1).
        clip_sample: whether the predicted x0 is clipped to ``clip_sample_range``.
        prediction_type: ``epsilon``, ``sample`` or ``v_prediction``.
        thresholding: whether the predicted x0 is thresholded dynamically instead of clipped.
        dynamic_thresholding_ratio: which quantile of ``|x0|`` is the threshold.
        clip_sample_range: data units.
        sample_max_value: upper limit of the dynamic threshold.
        timestep_spacing: ``leading``, ``linspace`` or ``trailing``; see
            `spaced_timesteps`.
        steps_offset: added to the steps of ``leading``.
        rescale_betas_zero_snr: whether the betas are rescaled to zero terminal SNR; sampling then needs a network that
            predicts v or the sample.
        v_posterior: reverse variance ``(1 - v) * small + v * large``, in [0, 1]: one number, or (T,), one per step, of
            which a shorter chain uses those of its steps. It overrides ``fixed_small`` and ``fixed_large``; with None
            ``variance_type`` decides.
        cosine_s: offset of ``squaredcos_cap_v2``.
        v_decoder: (T,), one per step: the v that replaces ``v_posterior`` at a step if it is the first of the chain.
            Only a likelihood uses it: sampling ends in the mean.
        optimal_timesteps: K as a string -> the K steps to keep, strictly descending, for
            ``set_timesteps(K, optimal=True)``; ``ddpm-ext fit-variance`` finds them.

    Attributes:
        schedule: the `NoiseSchedule` of all T steps.
        kept: the schedule of the steps in use; the same until ``set_timesteps``.
        timesteps: int64, (K,), descending, the steps in use.
        betas, alphas_cumprod, ..., lvlb_weights: CompVis' 13 tables of all T steps (and ``alphas``), float32, CPU.

    Raises:
        ValueError: an argument is out of its range, or two contradict each other.
    """

    _compatibles = [e.name for e in KarrasDiffusionSchedulers]  # noqa: RUF012
    order = 1

    @explain_compvis_names
    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = DEFAULT_NUM_TRAIN_TIMESTEPS,
        beta_start: float = 0.0001,
        beta_end: float = 0.02,
        beta_schedule: BetaSchedule = "linear",
        trained_betas: Betas | None = None,
        variance_type: VarianceType = "fixed_small",
        clip_sample: bool = True,
        prediction_type: PredictionType = "epsilon",
        thresholding: bool = False,
        dynamic_thresholding_ratio: float = 0.995,
        clip_sample_range: float = 1.0,
        sample_max_value: float = 1.0,
        timestep_spacing: TimestepSpacing = "leading",
        steps_offset: int = 0,
        rescale_betas_zero_snr: bool = False,
        v_posterior: float | Betas | None = None,
        cosine_s: float = DEFAULT_COSINE_S,
        v_decoder: Betas | None = None,
        optimal_timesteps: Mapping[str, Sequence[int]] | None = None,
    ) -> None:
        resolved = resolve_config({name: value for name, value in locals().items() if name != "self"})
        self.schedule = resolved.schedule
        self._learned = resolved.values["variance_type"] in LEARNED_VARIANCES
        self.init_noise_sigma = 1.0
        # Keys in this list are dropped when another class reads the config, which would then use its own defaults:
        # other betas, silently.
        self.register_to_config(**resolved.values, _use_default_values=[])
        self._use_all_steps()
        self._is_built = True

    def _use_all_steps(self) -> None:
        self._chain_arguments: dict[str, Any] | None = None
        self.num_inference_steps: int | None = None
        self.custom_timesteps = False
        self._use_steps(self.schedule.timesteps[::-1].copy())

    def _use_steps(self, timesteps: npt.NDArray[np.int64], device: str | torch.device | None = None) -> None:
        try:
            placed = torch.from_numpy(timesteps).to(device)
        except (RuntimeError, TypeError, AssertionError) as error:  # AssertionError: torch without that device
            raise ValueError(f"device={describe(device)} cannot be used: {printable(str(error), 200)}") from None
        full = len(timesteps) == len(self.schedule)
        self.kept = self.schedule if full else self.schedule.respaced(timesteps)
        self._coefficients = ReverseCoefficients(self.kept, len(self.schedule))
        self.timesteps = placed

    def _replace_by(self, rebuilt: DDPMExtScheduler) -> None:
        """Take over the state of a scheduler of another config, on the steps that were set on this one."""
        if self._chain_arguments is not None:
            try:
                rebuilt.set_timesteps(**self._chain_arguments)
            except ValueError as error:
                raise ValueError(
                    f"the steps in use do not fit the new config; call set_timesteps first: {error}"
                ) from None
        rebuilt.timesteps = rebuilt.timesteps.to(self.timesteps.device)
        self.clear_cached_tables()
        self.__dict__.update(vars(rebuilt))

    def register_schedule(
        self,
        given_betas: Betas | None = None,
        beta_schedule: str = "linear",
        timesteps: int = DEFAULT_NUM_TRAIN_TIMESTEPS,
        linear_start: float = 1e-4,
        linear_end: float = 2e-2,
        cosine_s: float = DEFAULT_COSINE_S,
    ) -> None:
        """Replace the schedule by CompVis' arguments; the config gets Diffusers' names, and every step is in use.

        ``v_posterior`` and ``prediction_type`` stay; ``rescale_betas_zero_snr``, which CompVis lacks, is turned off;
        ``v_decoder`` and all timesteps that were fitted to the old schedule are dropped.

        Args:
            given_betas: the betas themselves, (T,); the other arguments are then not used.
            beta_schedule: ``linear`` (Diffusers' ``scaled_linear``), ``sqrt_linear`` (Diffusers' ``linear``),
                ``cosine``, ``squaredcos_cap_v2`` (the cosine of offset 0.008) or ``sqrt``.
            timesteps: T.
            linear_start: first beta.
            linear_end: last beta.
            cosine_s: offset of ``cosine``.

        Raises:
            ValueError: the name is not one of CompVis', or a value is out of its range.
        """
        names = list(FROM_COMPVIS_BETA_SCHEDULE)
        check_one_of("beta_schedule", beta_schedule, names, ", CompVis' names; Diffusers' belong in the constructor")
        betas = None if given_betas is None else as_table("given_betas", given_betas).tolist()
        before = self._chain_arguments
        self._chain_arguments = None
        try:
            self.register_to_config(
                num_train_timesteps=timesteps if betas is None else len(betas),
                beta_start=linear_start,
                beta_end=linear_end,
                beta_schedule=FROM_COMPVIS_BETA_SCHEDULE[beta_schedule],
                trained_betas=betas,
                cosine_s=cosine_s if beta_schedule == "cosine" else DEFAULT_COSINE_S,
                rescale_betas_zero_snr=False,
                v_decoder=None,
                optimal_timesteps=None,
                **({SAMPLE_TIMESTEPS: None} if SAMPLE_TIMESTEPS in self.config else {}),
            )
        except ValueError:
            self._chain_arguments = before
            raise
        self._use_all_steps()

    @property
    def variance_type(self) -> VarianceType:
        """``config.variance_type``, an attribute of ``DDPMScheduler``, too."""
        return self.config.variance_type

    def __len__(self) -> int:
        return len(self.schedule)

    # --- sampling ----------------------------------------------------------------------------------------------------

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        timesteps: Sequence[int] | npt.NDArray[Any] | Tensor | None = None,
        optimal: bool = False,
    ) -> None:
        """Choose the steps to sample with; the posterior is that of the chain of those steps.

        Args:
            num_inference_steps: K, in [1, T], placed by ``timestep_spacing``.
            device: of ``scheduler.timesteps``.
            timesteps: the steps themselves instead, strictly descending, each in [0, T).
            optimal: whether to use the K steps of ``config.optimal_timesteps`` instead of evenly spaced ones.

        Raises:
            ValueError: not exactly one of the two, no optimal steps are known for K, there are not K distinct steps
                in [0, T), or zero terminal SNR with ``epsilon``, where the first step would divide by zero.
        """
        if (num_inference_steps is None) == (timesteps is None):
            raise ValueError("set_timesteps takes exactly one of num_inference_steps and timesteps.")
        _check_terminal_snr(self.schedule)
        if checked_flag("optimal", optimal):
            steps = self._optimal_timesteps(num_inference_steps)
        elif timesteps is not None:
            timesteps = timesteps.tolist() if isinstance(timesteps, Tensor) else timesteps
            steps = custom_timesteps(timesteps, len(self))
        elif num_inference_steps is not None:
            steps = spaced_timesteps(
                num_inference_steps, len(self), self.config.timestep_spacing, self.config.steps_offset
            )
        self._use_steps(steps, device)
        self.num_inference_steps = len(steps)
        self.custom_timesteps = timesteps is not None
        self._chain_arguments = {
            "num_inference_steps": num_inference_steps,
            "timesteps": None if timesteps is None else steps.copy(),
            "optimal": optimal,
        }

    def _optimal_timesteps(self, num_inference_steps: int | None) -> npt.NDArray[np.int64]:
        known = self.config.optimal_timesteps or {}
        if str(num_inference_steps) not in known:
            available = f"known are those for {format_ranges(known)} steps" if known else "none are known"
            raise ValueError(
                f"num_inference_steps={num_inference_steps} with optimal=True: {available}; find them with "
                "`ddpm-ext fit-variance FOLDER`, or leave optimal out."
            )
        return np.array(known[str(num_inference_steps)], dtype=np.int64)

    def scale_model_input(self, sample: Tensor, timestep: int | Tensor | None = None) -> Tensor:
        """Returns ``sample``: DDPM does not scale its input."""
        return sample

    def previous_timestep(self, timestep: int | Tensor) -> Tensor:
        """The next lower step of the chain as a 0-dim tensor; -1 after the last; ValueError outside the chain."""
        t = normalize_timestep(timestep, self.timesteps[:1])
        t = int(t) if isinstance(t, int) or t.numel() == 1 else checked_integer("timestep", t)
        index = int(np.searchsorted(self.kept.timesteps, t))
        if index == len(self.kept) or self.kept.timesteps[index] != t:
            self._coefficients.at(t)
        return torch.tensor(-1 if index == 0 else self.kept.timesteps[index - 1])

    def _get_variance(
        self, t: int | Tensor, predicted_variance: Tensor | None = None, variance_type: VarianceType | None = None
    ) -> Tensor:
        """Variance of a step of the chain in use, as returned by ``DDPMScheduler._get_variance``.

        Args:
            t: the step, an int or 0-dim tensor.
            predicted_variance: the network's prediction, for learned variances.
            variance_type: overrides the config's.

        Returns:
            The variance; its square root for ``fixed_small_log``; its log for ``fixed_large_log``, ``learned`` and
            ``learned_range``. A float64 0-dim tensor, or of the shape of ``predicted_variance``.

        Raises:
            ValueError: ``t`` is not a step of the chain, or a prediction is missing.
        """
        *_, log_small, log_large = self._coefficients.at(int(t))
        kind = variance_type or self.config.variance_type
        check_one_of("variance_type", kind, VARIANCE_TYPES)
        if kind in LEARNED_VARIANCES:
            if predicted_variance is None:
                raise ValueError(f"variance_type={kind!r} needs predicted_variance, the second half of the channels.")
            return log_variance(kind, predicted_variance, log_small, log_large)
        if kind == "fixed_large_log":
            return torch.tensor(log_large, dtype=torch.float64)
        if kind == "fixed_small_log":
            return torch.tensor(0.5 * log_small, dtype=torch.float64).exp()
        table = {
            None: self.kept.posterior_variance,
            "fixed_small": small_variance(self.kept),
            "fixed_large": self.kept.betas,
        }[variance_type]
        variance = table[np.searchsorted(self.kept.timesteps, int(t))]
        return torch.tensor(max(float(variance), MIN_VARIANCE), dtype=torch.float64)

    def step(
        self,
        model_output: Tensor,
        timestep: int | Tensor,
        sample: Tensor,
        generator: Generators = None,
        return_dict: bool = True,
        variance_noise: Tensor | None = None,
    ) -> DDPMSchedulerOutput | tuple[Tensor, Tensor]:
        """Reverse step: from the network's output to x0, to the posterior, and a sample from it.

        Args:
            model_output: the network's output for ``sample``, (B, C, ...); 2 C channels for learned variances. A
                Diffusers output with ``.sample`` is taken, too.
            timestep: one step for the batch, an int or 0-dim tensor; or one per sample, (B,), integer, or a list.
            sample: xt, (B, ...), data units.
            generator: of the noise; a list has one per sample.
            return_dict: whether to return an output object instead of a tuple.
            variance_noise: standard normal noise to use instead of new noise, shape of ``sample``.

        Returns:
            ``prev_sample`` and ``pred_original_sample``, in the precision of ``sample`` (half precision is
            computed in float32). The last step adds no noise.

        Raises:
            ValueError: a step that is not in the chain, or shapes that do not match.
        """
        model_output = network_output(model_output)
        if not isinstance(sample, Tensor) or sample.device != model_output.device:
            check_samples(sample=sample, model_output=model_output)
        if type(timestep) is not int:
            timestep = normalize_timestep(timestep, sample)
        variance = None
        if self._learned:
            model_output, variance = split_variance(model_output, sample)
        shape = sample.shape
        if model_output.shape != shape:
            raise ValueError(
                f"model_output and sample must have the same shape, got {tuple(model_output.shape)} and "
                f"{tuple(shape)}; a network that also predicts variances needs variance_type='learned' or "
                "'learned_range'."
            )
        if variance_noise is not None:
            check_samples(variance_noise=variance_noise)
            if variance_noise.shape != shape:
                got = tuple(variance_noise.shape)
                raise ValueError(f"variance_noise must have sample's shape {tuple(shape)}, got {got}.")
        source, dtype = (model_output, generator, variance_noise), sample.dtype
        if dtype is not torch.float32 or model_output.dtype is not torch.float32:
            check_samples(sample=sample, model_output=model_output)
            exact = torch.promote_types(torch.promote_types(dtype, model_output.dtype), torch.float32)
            sample, model_output = sample.to(exact), model_output.to(exact)
            variance = None if variance is None else variance.to(exact)
        if isinstance(timestep, Tensor):
            previous, x0 = self._step_per_sample(model_output, timestep, sample, variance, source)
        else:
            previous, x0 = self._step_batch(model_output, timestep, sample, variance, source)
        if dtype is not previous.dtype:
            previous, x0 = previous.to(dtype), x0.to(dtype)
        return DDPMSchedulerOutput(prev_sample=previous, pred_original_sample=x0) if return_dict else (previous, x0)

    def _step_batch(
        self, output: Tensor, t: int, xt: Tensor, variance: Tensor | None, source: NoiseSource
    ) -> tuple[Tensor, Tensor]:
        """One step for the batch: Python floats times tensors, in place where the tensor is new."""
        coefficients = self._coefficients
        xt_to_x0, output_to_x0, c0, ct, sigma, log_small, log_large = coefficients.at(t)
        if coefficients.output_is_x0:
            x0 = self._clip_or_threshold(output, in_place=False)
        else:
            x0 = self._clip_or_threshold(xt.mul(xt_to_x0).add_(output, alpha=output_to_x0), in_place=True)
        if t == coefficients.last:
            if t > 0:
                scaled_noise(*source, xt.dtype)  # discarded; the generator advances as in DDPMScheduler
            return xt.mul(ct).add_(x0, alpha=c0), x0
        if variance is None:
            previous = scaled_noise(*source, xt.dtype, sigma)
        else:
            log_scale = log_variance(self.config.variance_type, variance, log_small, log_large).mul(0.5)
            previous = scaled_noise(*source, xt.dtype).mul_(log_scale.exp_())
        return previous.add_(xt, alpha=ct).add_(x0, alpha=c0), x0

    def _step_per_sample(
        self, output: Tensor, t: Tensor, xt: Tensor, variance: Tensor | None, source: NoiseSource
    ) -> tuple[Tensor, Tensor]:
        """One step per sample, each at its own timestep."""
        xt_to_x0, output_to_x0, c0, ct, scale, log_small, log_large = self._coefficients.gather(t, xt)
        if self._coefficients.output_is_x0:
            x0 = self._clip_or_threshold(output, in_place=False)
        else:
            x0 = self._clip_or_threshold(xt_to_x0 * xt + output_to_x0 * output, in_place=True)
        if variance is not None:
            ends = (t == self._coefficients.last).reshape(scale.shape).to(xt.device)
            log_scale = log_variance(self.config.variance_type, variance, log_small, log_large).mul(0.5)
            scale = log_scale.exp().masked_fill(ends, 0)
        return c0 * x0 + ct * xt + scale * scaled_noise(*source, xt.dtype), x0

    def _clip_or_threshold(self, x0: Tensor, in_place: bool) -> Tensor:
        """x0 thresholded or clipped as configured; clipped in place if the tensor is not the caller's."""
        config = self.config
        if config.thresholding:
            return self._threshold_sample(x0)
        if not config.clip_sample:
            return x0
        limit = config.clip_sample_range
        return x0.clamp_(-limit, limit) if in_place else x0.clamp(-limit, limit)

    def _threshold_sample(self, x0: Tensor) -> Tensor:
        """Dynamic thresholding ([Imagen] section 2.3): clip to a quantile of ``|x0|``, at least 1; divide by it."""
        flat = x0.flatten(1) if x0.ndim > 1 else x0[:, None]
        limit = row_quantiles(flat.abs(), self.config.dynamic_thresholding_ratio)
        limit = limit.clamp(min=1, max=self.config.sample_max_value)
        return (flat.clamp(-limit, limit) / limit).reshape(x0.shape)

    # --- the forward process -----------------------------------------------------------------------------------------

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Noise samples to their steps in closed form ([DDPM] eq. 4).

        Args:
            original_samples: x0, (B, ...), floating, data units.
            noise: standard normal, same shape.
            timesteps: integer, (B,), a list, or one for all.

        Returns:
            xt in the precision of ``original_samples``; half precision is computed in float32, where the smallest
            noise levels are still above zero.

        Raises:
            ValueError: integer images (stock would return integers), other shapes, or steps that are not integers in
                [0, T).
        """
        check_samples(original_samples=original_samples, noise=noise)
        t = per_sample_timesteps(timesteps, original_samples)
        return gaussian.q_sample(self.schedule, original_samples, noise, t).to(original_samples.dtype)

    def get_velocity(self, sample: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Velocity of samples x0 and their noise; shapes, precision and errors as in `add_noise`."""
        check_samples(sample=sample, noise=noise)
        t = per_sample_timesteps(timesteps, sample)
        return gaussian.velocity(self.schedule, sample, noise, t).to(sample.dtype)


def _check_terminal_snr(schedule: NoiseSchedule) -> None:
    if schedule.zero_terminal_snr and schedule.prediction_type == "epsilon":
        raise ValueError(
            "prediction_type='epsilon' cannot sample a schedule of zero terminal SNR: its last step has no signal "
            "to recover from the noise. Use prediction_type='v_prediction' or 'sample' trained that way, or "
            "rescale_betas_zero_snr=False."
        )


leave_out(
    (constructor_defaults(DDPMExtScheduler).keys() - constructor_defaults(DDPMScheduler).keys()) | {SAMPLE_TIMESTEPS}
)
