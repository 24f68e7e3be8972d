"""The ancestral sampler of DDPM as a Diffusers scheduler, exact on every chain, with the methods CompVis' users know.

Symbols, for the chain of the steps in use (all T of them, or the K kept by ``set_timesteps``):

    x0, xt, eps, v   as in :mod:`diffusers_ddpm_ext.gaussian`
    c0, ct           posterior_mean_coef1, posterior_mean_coef2: the mean one step back is ``c0 x0 + ct xt``
    sigma            square root of posterior_variance
    small, large     the variance of the exact posterior, and beta: the two ends that ``v_posterior`` mixes

Sources: [DDPM] Ho et al. 2020, eqs. 6, 7, 15 and section 3.2; [iDDPM] Nichol & Dhariwal 2021, eq. 15 (learned_range) and
section 4 (respacing); [Imagen] Saharia et al. 2022, section 2.3 (thresholding); [ZTSNR] Lin et al. 2023.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from diffusers.configuration_utils import ConfigMixin, FrozenDict, register_to_config
from diffusers.schedulers.scheduling_ddpm import DDPMSchedulerOutput

# Diffusers looks for the name SchedulerMixin in the module that defines a scheduler before it loads one.
from diffusers.schedulers.scheduling_utils import KarrasDiffusionSchedulers, SchedulerMixin
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from diffusers_ddpm_ext import gaussian
from diffusers_ddpm_ext.respacing import TIMESTEP_SPACINGS, custom_timesteps, spaced_timesteps
from diffusers_ddpm_ext.schedule import MIN_VARIANCE, NoiseSchedule, make_betas

VARIANCE_TYPES = ("fixed_small", "fixed_small_log", "fixed_large", "fixed_large_log", "learned", "learned_range")
COMPVIS_SCHEDULES = {
    "linear": "scaled_linear",
    "sqrt_linear": "linear",
    "cosine": "squaredcos_cap_v2",
    "squaredcos_cap_v2": "squaredcos_cap_v2",
    "sqrt": "sqrt",
}
DEFAULT_NUM_TRAIN_TIMESTEPS = 1000
DEFAULT_COSINE_S = 0.008
# What the trained network depends on. A swap keeps these even where the other class has them by default.
PROCESS_KEYS = (
    "num_train_timesteps",
    "beta_start",
    "beta_end",
    "beta_schedule",
    "trained_betas",
    "cosine_s",
    "rescale_betas_zero_snr",
    "prediction_type",
)
BETA_KEYS = frozenset(PROCESS_KEYS[:6]) - {"trained_betas"}

Generators = torch.Generator | list[torch.Generator] | None
Betas = Sequence[float] | npt.NDArray[Any] | Tensor


class _Float32Table:
    """A table of ``scheduler.schedule`` as a float32 CPU tensor, cast when it is first read."""

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    def __get__(self, scheduler: Any, owner: type | None = None) -> Any:
        if scheduler is None:
            return self
        table = torch.tensor(getattr(scheduler.schedule, self.name), dtype=torch.float32)
        scheduler.__dict__[self.name] = table  # found before this descriptor from now on
        return table


class _ReverseSteps:
    """What one reverse step multiplies with, for every step of a chain.

    A row is ``(xt_to_x0, output_to_x0, c0, ct, sigma, log small, log large)``: Python floats for a step that the whole
    batch shares, so that nothing is gathered and no tensor is read, and a table for steps per sample.
    """

    def __init__(self, kept: NoiseSchedule, num_train_timesteps: int) -> None:
        zeros, ones = np.zeros(len(kept)), np.ones(len(kept))
        to_x0 = {
            "epsilon": (kept.sqrt_recip_alphas_cumprod, -kept.sqrt_recipm1_alphas_cumprod),
            "sample": (zeros, ones),
            "v_prediction": (kept.sqrt_alphas_cumprod, -kept.sqrt_one_minus_alphas_cumprod),
        }[kept.prediction_type]
        sigma = np.sqrt(kept.posterior_variance)
        sigma[0] = 0  # the chain ends in x0 itself
        self.columns = np.stack(
            [
                *to_x0,
                kept.posterior_mean_coef1,
                kept.posterior_mean_coef2,
                sigma,
                np.log(np.maximum(_small_variance(kept), MIN_VARIANCE)),
                np.log(kept.betas),
            ],
            axis=1,
        )
        usable = np.isfinite(self.columns).all(axis=1)  # zero terminal SNR and epsilon: x0 cannot be told at T-1
        self.last = int(kept.timesteps[0])
        self.steps = kept.timesteps[usable]
        self.columns = self.columns[usable]
        self.rows = dict(zip(self.steps.tolist(), map(tuple, self.columns.tolist()), strict=True))
        self._num_train_timesteps = num_train_timesteps
        self._tables: dict[tuple[torch.device, torch.dtype], Tensor] = {}

    def row(self, t: int) -> tuple[float, ...]:
        """The row of one step; ValueError where the chain does not keep it."""
        try:
            return self.rows[t]
        except KeyError:
            raise self._not_kept([t]) from None

    def gather(self, t: Tensor, like: Tensor, dtype: torch.dtype) -> Tensor:
        """Rows of steps (B,), as (7, B, 1, ..., 1); NaN for unknown steps on an accelerator, where none is read."""
        gaussian.check_steps(t, like, self._num_train_timesteps)
        key = (t.device, dtype)
        if key not in self._tables:
            table = np.full((self._num_train_timesteps, self.columns.shape[1]), np.nan)
            table[self.steps] = self.columns
            self._tables[key] = torch.tensor(table, dtype=dtype, device=t.device)
        rows = self._tables[key][t]
        if t.device.type == "cpu" and rows.isnan().any():
            raise self._not_kept([step for step in t.tolist() if step not in self.rows])
        return rows.T.reshape(rows.shape[1], -1, *(1,) * (like.ndim - 1)).to(like.device)

    def _not_kept(self, steps: list[int]) -> ValueError:
        some = self.steps.tolist()
        named = ", ".join(map(str, some if len(some) < 8 else [*some[:3], "...", *some[-3:]]))
        return ValueError(
            f"timestep {', '.join(map(str, steps[:4]))} is not a step of the chain in use ({named}); take the steps from "
            "scheduler.timesteps, or call set_timesteps with those you want."
        )


def _small_variance(kept: NoiseSchedule) -> npt.NDArray[np.float64]:
    return kept.betas * (1 - kept.alphas_cumprod_prev) / (1 - kept.alphas_cumprod)


class DDPMExtScheduler(SchedulerMixin, ConfigMixin):
    """``DDPMScheduler`` from float64 tables, with CompVis' ``v_posterior``, method names and tables.

    Arguments that ``DDPMScheduler`` has mean the same here.

    Args:
        num_train_timesteps: T. Given ``trained_betas`` it is their number, and need not be said.
        beta_start: first beta.
        beta_end: last beta.
        beta_schedule: ``linear``, ``scaled_linear``, ``squaredcos_cap_v2``, ``sigmoid``, ``laplace`` or ``sqrt``. What not
            every Diffusers scheduler has a name for is carried in the config as ``trained_betas`` too.
        trained_betas: the betas themselves: list, array or tensor, (T,).
        variance_type: ``fixed_small`` (posterior), ``fixed_large`` (beta), their ``_log`` forms (the same noise),
            ``learned`` (second half of the model's channels is the log-variance) or ``learned_range`` (it mixes the
            logs of small and large, -1 to 1).
        clip_sample: whether the predicted x0 is clipped to ``clip_sample_range``.
        prediction_type: ``epsilon``, ``sample`` or ``v_prediction``.
        thresholding: whether the predicted x0 is thresholded dynamically, instead of clipped.
        dynamic_thresholding_ratio: which quantile of ``|x0|`` is the threshold.
        clip_sample_range: data units.
        sample_max_value: upper limit of the dynamic threshold.
        timestep_spacing: ``leading``, ``linspace`` or ``trailing``; see
            :func:`~diffusers_ddpm_ext.respacing.spaced_timesteps`.
        steps_offset: added to the steps of ``leading``.
        rescale_betas_zero_snr: whether the betas are rescaled to zero terminal SNR; sampling then needs a network that
            predicts v or the sample.
        v_posterior: reverse variance ``(1 - v) * small + v * large``, in [0, 1]. It wins over ``fixed_small`` and
            ``fixed_large``; None lets ``variance_type`` decide.
        cosine_s: offset of ``squaredcos_cap_v2``.

    Attributes:
        schedule: the :class:`~diffusers_ddpm_ext.schedule.NoiseSchedule` of all T steps.
        kept: that of the steps in use; the same until ``set_timesteps``.
        timesteps: int64, (K,), descending, the steps in use.
        betas, alphas_cumprod, ..., lvlb_weights: CompVis' 13 tables of all T steps (and ``alphas``), float32, on the CPU.

    Raises:
        ValueError: an argument is out of its range, or two contradict each other.
    """

    _compatibles = [e.name for e in KarrasDiffusionSchedulers]  # noqa: RUF012
    order = 1

    betas = _Float32Table()
    alphas = _Float32Table()
    alphas_cumprod = _Float32Table()
    alphas_cumprod_prev = _Float32Table()
    sqrt_alphas_cumprod = _Float32Table()
    sqrt_one_minus_alphas_cumprod = _Float32Table()
    log_one_minus_alphas_cumprod = _Float32Table()
    sqrt_recip_alphas_cumprod = _Float32Table()
    sqrt_recipm1_alphas_cumprod = _Float32Table()
    posterior_variance = _Float32Table()
    posterior_log_variance_clipped = _Float32Table()
    posterior_mean_coef1 = _Float32Table()
    posterior_mean_coef2 = _Float32Table()
    lvlb_weights = _Float32Table()

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = DEFAULT_NUM_TRAIN_TIMESTEPS,
        beta_start: float = 0.0001,
        beta_end: float = 0.02,
        beta_schedule: str = "linear",
        trained_betas: Betas | None = None,
        variance_type: str = "fixed_small",
        clip_sample: bool = True,
        prediction_type: str = "epsilon",
        thresholding: bool = False,
        dynamic_thresholding_ratio: float = 0.995,
        clip_sample_range: float = 1.0,
        sample_max_value: float = 1.0,
        timestep_spacing: str = "leading",
        steps_offset: int = 0,
        rescale_betas_zero_snr: bool = False,
        v_posterior: float | None = None,
        cosine_s: float = DEFAULT_COSINE_S,
    ) -> None:
        _check_one_of("variance_type", variance_type, VARIANCE_TYPES)
        _check_one_of("timestep_spacing", timestep_spacing, TIMESTEP_SPACINGS)
        if v_posterior is not None:
            if variance_type not in ("fixed_small", "fixed_large"):
                raise ValueError(
                    f"v_posterior={v_posterior} contradicts variance_type={variance_type!r}: leave v_posterior out, or "
                    "leave variance_type at 'fixed_small'."
                )
            # What comes closest in a reader that does not know v_posterior.
            variance_type = "fixed_small" if v_posterior < 0.5 else "fixed_large"
        self.register_to_config(variance_type=variance_type)
        self.init_noise_sigma = 1.0
        self._set_process(
            num_train_timesteps, beta_start, beta_end, beta_schedule, trained_betas, cosine_s, rescale_betas_zero_snr
        )
        # Keys in this list are dropped when a config is handed to another class, which would then use its own defaults:
        # other betas, silently.
        self.register_to_config(_use_default_values=[])

    def _set_process(
        self,
        num_train_timesteps: int,
        beta_start: float,
        beta_end: float,
        beta_schedule: str,
        trained_betas: Betas | None,
        cosine_s: float,
        rescale_betas_zero_snr: bool,
    ) -> None:
        """Make the tables, say in the config what they were made of, and keep every step."""
        if trained_betas is not None:
            trained_betas = _as_floats(trained_betas)
            if num_train_timesteps not in (DEFAULT_NUM_TRAIN_TIMESTEPS, len(trained_betas)):
                raise ValueError(
                    f"num_train_timesteps={num_train_timesteps} contradicts the {len(trained_betas)} trained_betas: "
                    "leave num_train_timesteps out, or pass as many betas."
                )
            num_train_timesteps = len(trained_betas)
        elif _needs_betas_in_config(beta_schedule, cosine_s):
            trained_betas = make_betas(beta_schedule, num_train_timesteps, beta_start, beta_end, cosine_s).tolist()
        variance_type, v_posterior = self.config.variance_type, self.config.v_posterior
        if v_posterior is None:
            v_posterior = float(variance_type.startswith("fixed_large"))
        self.schedule = NoiseSchedule(
            num_train_timesteps,
            beta_start,
            beta_end,
            beta_schedule,
            trained_betas,
            cosine_s=cosine_s,
            rescale_betas_zero_snr=rescale_betas_zero_snr,
            v_posterior=v_posterior,
            prediction_type=self.config.prediction_type,
        )
        self.register_to_config(
            num_train_timesteps=len(self.schedule),
            beta_start=beta_start,
            beta_end=beta_end,
            beta_schedule=beta_schedule,
            trained_betas=trained_betas,
            cosine_s=cosine_s,
            rescale_betas_zero_snr=rescale_betas_zero_snr,
        )
        for name, member in vars(DDPMExtScheduler).items():
            if isinstance(member, _Float32Table):
                self.__dict__.pop(name, None)
        self.num_inference_steps: int | None = None
        self.custom_timesteps = False
        self._keep(self.schedule.timesteps[::-1].copy())

    def _keep(self, timesteps: npt.NDArray[np.int64], device: str | torch.device | None = None) -> None:
        full = len(timesteps) == len(self.schedule)
        self.kept = self.schedule if full else self.schedule.respaced(timesteps)
        self._steps = _ReverseSteps(self.kept, len(self.schedule))
        self.timesteps = torch.from_numpy(timesteps).to(device)

    # --- configs -----------------------------------------------------------------------------------------------------

    @classmethod
    def from_config(cls, config: Any = None, return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """A scheduler from the config of this class or of a compatible one; ``kwargs`` override it.

        What a network was trained with (betas, number of steps, what it predicts) is kept also where the other class
        has it by default; of the rest, its defaults are replaced by ours, as everywhere in Diffusers.

        Args:
            config: ``scheduler.config``, or a dict.
            return_unused_kwargs: whether to return ``(scheduler, unused)``.
            **kwargs: arguments of the constructor.
        """
        if isinstance(config, dict):
            config = dict(config)
            defaults = config.get("_use_default_values", [])
            config["_use_default_values"] = [key for key in defaults if key not in PROCESS_KEYS]
            if config.get("variance_type", "") is None:  # multistep solvers write null
                del config["variance_type"]
            if BETA_KEYS & kwargs.keys() and "trained_betas" not in kwargs and _are_derived(config):
                config["trained_betas"] = None  # they follow from what is being changed
        return super().from_config(config, return_unused_kwargs=return_unused_kwargs, **kwargs)

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """As :meth:`SchedulerMixin.from_pretrained`: a folder or a Hub id, ``subfolder=`` and the rest."""
        loaded = super().from_pretrained(*args, **kwargs)
        scheduler = loaded[0] if isinstance(loaded, tuple) else loaded
        scheduler._internal_dict = FrozenDict(
            {key: value for key, value in scheduler.config.items() if key != "_use_default_values"}
        )
        return loaded

    @property
    def variance_type(self) -> str:
        """``config.variance_type``, where ``DDPMScheduler`` has it as well."""
        return self.config.variance_type

    def __len__(self) -> int:
        return len(self.schedule)

    # --- sampling ----------------------------------------------------------------------------------------------------

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        timesteps: Sequence[int] | npt.NDArray[Any] | Tensor | None = None,
    ) -> None:
        """Choose the steps to sample with; the posterior becomes that of the chain of those steps.

        Args:
            num_inference_steps: K, in [1, T], placed by ``timestep_spacing``.
            device: where ``scheduler.timesteps`` goes.
            timesteps: the steps themselves instead, strictly descending, each in [0, T).

        Raises:
            ValueError: both or none given, K distinct steps in [0, T) do not come out, or zero terminal SNR with
                ``epsilon``, where the first step would divide by zero.
        """
        if (num_inference_steps is None) == (timesteps is None):
            raise ValueError("set_timesteps takes one of num_inference_steps and timesteps, not both and not none.")
        _check_terminal_snr(self.schedule)
        if timesteps is not None:
            steps = custom_timesteps(_as_list(timesteps), len(self))
        else:
            steps = spaced_timesteps(
                num_inference_steps, len(self), self.config.timestep_spacing, self.config.steps_offset
            )
        self.num_inference_steps = len(steps)
        self.custom_timesteps = timesteps is not None
        self._keep(steps, device)

    def scale_model_input(self, sample: Tensor, timestep: int | Tensor | None = None) -> Tensor:
        """``sample`` itself: nothing is scaled in DDPM."""
        return sample

    def previous_timestep(self, timestep: int | Tensor) -> Tensor:
        """The step that follows ``timestep`` on the way down, as a 0-dim tensor; -1 after the last.

        Raises:
            ValueError: the chain does not keep ``timestep``.
        """
        t = int(timestep)
        index = int(np.searchsorted(self.kept.timesteps, t))
        if index == len(self.kept) or self.kept.timesteps[index] != t:
            self._steps.row(t)
        return torch.tensor(-1 if index == 0 else self.kept.timesteps[index - 1])

    def _get_variance(
        self, t: int | Tensor, predicted_variance: Tensor | None = None, variance_type: str | None = None
    ) -> Tensor:
        """What stock's method of this name returns: variance; standard deviation for ``fixed_small_log``; log-variance
        for ``fixed_large_log``, ``learned`` and ``learned_range``. A float64 0-dim tensor, or like the prediction."""
        *_, log_small, log_large = self._steps.row(int(t))
        kind = variance_type or self.config.variance_type
        _check_one_of("variance_type", kind, VARIANCE_TYPES)
        if kind in ("learned", "learned_range"):
            if predicted_variance is None:
                raise ValueError(f"variance_type={kind!r} needs predicted_variance, the second half of the channels.")
            return self._log_variance(kind, predicted_variance, log_small, log_large)
        if kind == "fixed_large_log":
            return torch.tensor(log_large, dtype=torch.float64)
        if kind == "fixed_small_log":
            return torch.tensor(log_small, dtype=torch.float64).mul(0.5).exp()
        index = int(np.searchsorted(self.kept.timesteps, int(t)))
        if variance_type is None:
            variance = self.kept.posterior_variance[index]
        else:
            variance = (_small_variance(self.kept) if kind == "fixed_small" else self.kept.betas)[index]
        return torch.tensor(max(float(variance), MIN_VARIANCE), dtype=torch.float64)

    @staticmethod
    def _log_variance(kind: str, predicted: Tensor, log_small: Any, log_large: Any) -> Tensor:
        if kind == "learned":
            return predicted
        large = (predicted + 1) / 2
        return large * log_large + (1 - large) * log_small

    def step(
        self,
        model_output: Tensor,
        timestep: int | Tensor,
        sample: Tensor,
        generator: Generators = None,
        return_dict: bool = True,
        variance_noise: Tensor | None = None,
    ) -> DDPMSchedulerOutput | tuple[Tensor, Tensor]:
        """One step back: the network's output to x0, x0 to the posterior, and a draw from it.

        Args:
            model_output: what the network returned for ``sample``, (B, C, ...); 2 C channels for learned variances.
            timestep: the step of the whole batch, an int or 0-dim tensor; or one step per sample, (B,), integer.
            sample: xt, (B, ...), data units.
            generator: where the noise is drawn from; a list holds one for each sample.
            return_dict: whether to return an output object rather than a tuple.
            variance_noise: standard normal noise to use instead of drawing it, shape of ``sample``.

        Returns:
            ``prev_sample`` and ``pred_original_sample``, in the precision of ``sample`` (half types are computed in
            float32). Samples at their last step get no noise.

        Raises:
            ValueError: a step that the chain does not keep, or shapes that do not fit.
        """
        if type(timestep) is not int:
            timestep = _shared_or_each(timestep, sample)
        log_variance = None
        if self.config.variance_type in ("learned", "learned_range"):
            model_output, log_variance = _halves(model_output, sample)
        if model_output.shape != sample.shape:
            raise ValueError(
                f"model_output and sample must have one shape, got {tuple(model_output.shape)} and "
                f"{tuple(sample.shape)}; a network that also predicts variances needs variance_type='learned' or "
                "'learned_range'."
            )
        if variance_noise is not None and variance_noise.shape != sample.shape:
            raise ValueError(
                f"variance_noise must have sample's shape {tuple(sample.shape)}, got {tuple(variance_noise.shape)}."
            )
        drawn = variance_noise is None and timestep != 0 if type(timestep) is int else variance_noise is None
        noise = _draw(model_output, generator) if drawn else variance_noise

        dtype = sample.dtype
        if dtype is not torch.float32 or model_output.dtype is not torch.float32:
            exact = torch.promote_types(torch.promote_types(dtype, model_output.dtype), torch.float32)
            sample, model_output = sample.to(exact), model_output.to(exact)
            noise = None if noise is None else noise.to(exact)
            log_variance = None if log_variance is None else log_variance.to(exact)
        if type(timestep) is int:
            previous, x0 = self._step_together(model_output, timestep, sample, log_variance, noise, drawn)
        else:
            previous, x0 = self._step_each(model_output, timestep, sample, log_variance, noise)
        if dtype is not previous.dtype:
            previous, x0 = previous.to(dtype), x0.to(dtype)
        return DDPMSchedulerOutput(prev_sample=previous, pred_original_sample=x0) if return_dict else (previous, x0)

    def _step_together(
        self, output: Tensor, t: int, xt: Tensor, log_variance: Tensor | None, noise: Tensor | None, own_noise: bool
    ) -> tuple[Tensor, Tensor]:
        """One step for the whole batch: Python floats times tensors, in place where the tensor is ours."""
        xt_to_x0, output_to_x0, c0, ct, sigma, log_small, log_large = self._steps.row(t)
        if self.config.prediction_type == "sample":
            x0 = self._bounded(output)
        else:
            x0 = self._bounded(torch.mul(xt, xt_to_x0).add_(output, alpha=output_to_x0), own=True)
        if noise is None or t == self._steps.last:
            return torch.mul(xt, ct).add_(x0, alpha=c0), x0
        if log_variance is not None:
            scale = self._log_variance(self.config.variance_type, log_variance, log_small, log_large)
            noise = scale.mul(0.5).exp_().mul_(noise)
        else:
            noise = noise.mul_(sigma) if own_noise else noise.mul(sigma)
        return noise.add_(xt, alpha=ct).add_(x0, alpha=c0), x0

    def _step_each(
        self, output: Tensor, t: Tensor, xt: Tensor, log_variance: Tensor | None, noise: Tensor
    ) -> tuple[Tensor, Tensor]:
        """One step for each sample at its own place of the chain."""
        xt_to_x0, output_to_x0, c0, ct, sigma, log_small, log_large = self._steps.gather(t, xt, xt.dtype)
        if self.config.prediction_type == "sample":
            x0 = self._bounded(output)
        else:
            x0 = self._bounded(xt_to_x0 * xt + output_to_x0 * output, own=True)
        scale = sigma
        if log_variance is not None:
            log_scale = 0.5 * self._log_variance(self.config.variance_type, log_variance, log_small, log_large)
            ends = (t == self._steps.last).reshape(sigma.shape).to(xt.device)
            scale = log_scale.exp().masked_fill(ends, 0)
        return c0 * x0 + ct * xt + scale * noise, x0

    def _bounded(self, x0: Tensor, own: bool = False) -> Tensor:
        """x0 within the range that the config allows; in place if the tensor is our ``own``."""
        config = self.config
        if config.thresholding:
            return self._threshold_sample(x0)
        if not config.clip_sample:
            return x0
        limit = config.clip_sample_range
        return x0.clamp_(-limit, limit) if own else x0.clamp(-limit, limit)

    def _threshold_sample(self, x0: Tensor) -> Tensor:
        """Dynamic thresholding ([Imagen] section 2.3): clip to a quantile of ``|x0|``, at least 1, and divide by it."""
        flat = x0.flatten(1)
        limit = torch.quantile(flat.abs(), self.config.dynamic_thresholding_ratio, dim=1, keepdim=True)
        limit = limit.clamp(min=1, max=self.config.sample_max_value)
        return (flat.clamp(-limit, limit) / limit).reshape(x0.shape)

    # --- the forward process -----------------------------------------------------------------------------------------

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Noise samples to their steps at once ([DDPM] eq. 4).

        Args:
            original_samples: x0, (B, ...), data units.
            noise: standard normal, same shape.
            timesteps: integer, (B,), or one for all.

        Returns:
            xt in the precision of ``original_samples``; half types are computed in float32, where the smallest noise
            levels are still above zero.
        """
        t = _for_each(timesteps, original_samples)
        return gaussian.q_sample(self.schedule, original_samples, noise, t).to(original_samples.dtype)

    def get_velocity(self, sample: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """The velocity of samples x0 and their noise; shapes and precision as in :meth:`add_noise`."""
        return gaussian.velocity(self.schedule, sample, noise, _for_each(timesteps, sample)).to(sample.dtype)

    # --- CompVis' names ----------------------------------------------------------------------------------------------
    # Shapes: x_start, x_t, noise, v are (B, ...); t is (B,), integer, counted on the chain of all T steps. Results are at
    # least float32.

    def register_schedule(
        self,
        given_betas: Betas | None = None,
        beta_schedule: str = "linear",
        timesteps: int = DEFAULT_NUM_TRAIN_TIMESTEPS,
        linear_start: float = 1e-4,
        linear_end: float = 2e-2,
        cosine_s: float = DEFAULT_COSINE_S,
    ) -> None:
        """Replace the schedule, in CompVis' words; the config follows, in Diffusers' words, and every step is in use.

        ``v_posterior`` and ``prediction_type`` stay; ``rescale_betas_zero_snr``, which CompVis has not, is switched off.

        Args:
            given_betas: the betas themselves, (T,); the other arguments are then not used.
            beta_schedule: ``linear`` (Diffusers' ``scaled_linear``), ``sqrt_linear`` (Diffusers' ``linear``),
                ``cosine``, ``squaredcos_cap_v2`` (the cosine of offset 0.008) or ``sqrt``.
            timesteps: T.
            linear_start: first beta.
            linear_end: last beta.
            cosine_s: offset of ``cosine``.

        Raises:
            ValueError: the name is not one of CompVis', or a number is out of its range.
        """
        if beta_schedule not in COMPVIS_SCHEDULES:
            raise ValueError(
                f"beta_schedule={beta_schedule!r} is not one of CompVis' ({', '.join(COMPVIS_SCHEDULES)}); Diffusers' names "
                "belong in the constructor."
            )
        if given_betas is not None:
            given_betas = _as_floats(given_betas)
            timesteps = len(given_betas)
        self._set_process(
            timesteps,
            linear_start,
            linear_end,
            COMPVIS_SCHEDULES[beta_schedule],
            given_betas,
            cosine_s if beta_schedule == "cosine" else DEFAULT_COSINE_S,
            rescale_betas_zero_snr=False,
        )

    def q_sample(
        self, x_start: Tensor, t: Tensor, noise: Tensor | None = None, generator: Generators = None
    ) -> Tensor:
        """Noise ``x_start`` to step t; ``noise`` is drawn from ``generator`` where it is not given."""
        noise = _draw(x_start, generator) if noise is None else noise
        return gaussian.q_sample(self.schedule, x_start, noise, t)

    def q_mean_variance(self, x_start: Tensor, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Mean, variance and log-variance of x_t given ``x_start``."""
        law = gaussian.q_mean_variance(self.schedule, x_start, t)
        return law.mean, law.variance, law.log_variance

    def q_posterior(self, x_start: Tensor, x_t: Tensor, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Mean, variance and clipped log-variance of x_{t-1} given ``x_start`` and ``x_t``."""
        law = gaussian.posterior(self.schedule, x_start, x_t, t)
        return law.mean, law.variance, law.log_variance

    def predict_start_from_noise(self, x_t: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """x0 from x_t and the noise in it."""
        return gaussian.x0_from_eps(self.schedule, x_t, noise, t)

    def predict_start_from_z_and_v(self, x_t: Tensor, t: Tensor, v: Tensor) -> Tensor:
        """x0 from x_t and its velocity."""
        return gaussian.x0_from_v(self.schedule, x_t, v, t)

    def predict_eps_from_z_and_v(self, x_t: Tensor, t: Tensor, v: Tensor) -> Tensor:
        """The noise in x_t from its velocity."""
        return gaussian.eps_from_v(self.schedule, x_t, v, t)

    def get_v(self, x: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """The velocity of x0 = ``x`` and ``noise``."""
        return gaussian.velocity(self.schedule, x, noise, t)


def _check_one_of(name: str, value: Any, allowed: Sequence[str]) -> None:
    if value not in allowed:
        raise ValueError(f"{name}={value!r} is unknown: choose one of {', '.join(allowed)}.")


def _check_terminal_snr(schedule: NoiseSchedule) -> None:
    if schedule.zero_terminal_snr and schedule.prediction_type == "epsilon":
        raise ValueError(
            "prediction_type='epsilon' cannot sample a schedule of zero terminal SNR: its last step holds no signal to "
            "recover from the noise. Use prediction_type='v_prediction' or 'sample' with a network trained so, or "
            "rescale_betas_zero_snr=False."
        )


def _needs_betas_in_config(beta_schedule: str, cosine_s: float) -> bool:
    """Whether some stock scheduler has no name for these betas."""
    if beta_schedule == "squaredcos_cap_v2":
        return cosine_s != DEFAULT_COSINE_S
    return beta_schedule not in ("linear", "scaled_linear")


def _are_derived(config: dict[str, Any]) -> bool:
    """Whether a config's betas are those of its own name, carried for readers that do not know it."""
    betas, name = config.get("trained_betas"), config.get("beta_schedule")
    cosine_s = config.get("cosine_s", DEFAULT_COSINE_S)
    if betas is None or name is None or not _needs_betas_in_config(name, cosine_s):
        return False
    try:
        named = make_betas(name, len(betas), config.get("beta_start", 1e-4), config.get("beta_end", 0.02), cosine_s)
    except ValueError:
        return False
    return np.array_equal(named, np.asarray(betas, dtype=np.float64))


def _as_list(values: Any) -> Any:
    return values.tolist() if isinstance(values, Tensor) else values


def _as_floats(betas: Betas) -> list[float]:
    """Betas as a config can hold them; exact, also from float32."""
    values = np.asarray(_as_list(betas), dtype=np.float64)
    if values.ndim != 1:
        raise ValueError(f"trained_betas must be a list of numbers, got shape {values.shape}.")
    return values.tolist()


def _shared_or_each(timestep: Any, sample: Tensor) -> int | Tensor:
    """An int where the batch shares its step, else (B,). A step on an accelerator stays there: reading it would stall."""
    if not isinstance(timestep, Tensor):
        return operator.index(timestep)
    if timestep.ndim == 0 and timestep.device.type == "cpu" and not timestep.is_floating_point():
        return int(timestep)
    return _for_each(timestep, sample)


def _for_each(timesteps: Any, samples: Tensor) -> Tensor:
    """One step per sample from as many, or from one for all."""
    timesteps = torch.as_tensor(timesteps)
    return timesteps.reshape(-1).expand(samples.shape[0]) if timesteps.numel() == 1 else timesteps


def _halves(model_output: Tensor, sample: Tensor) -> tuple[Tensor, Tensor]:
    if sample.ndim < 2 or model_output.ndim != sample.ndim or model_output.shape[1] != 2 * sample.shape[1]:
        raise ValueError(
            f"learned variances need model_output of twice sample's channels, got {tuple(model_output.shape)} for "
            f"{tuple(sample.shape)}; for a network without them use variance_type='fixed_small'."
        )
    output, log_variance = model_output.split(sample.shape[1], dim=1)
    return output, log_variance


def _draw(like: Tensor, generator: Generators) -> Tensor:
    """Standard normal noise, the same numbers as Diffusers' ``randn_tensor``."""
    one = not isinstance(generator, list)
    if one and (generator is None or generator.device.type == like.device.type):
        # Cheaper than randn; empty_like would follow the strides of permuted samples, and so order the draws anew.
        return torch.empty(like.shape, dtype=like.dtype, device=like.device).normal_(generator=generator)
    if not one and len(generator) not in (1, like.shape[0]):
        raise ValueError(f"generator must hold one generator per sample ({like.shape[0]}), got {len(generator)}.")
    return randn_tensor(like.shape, generator=generator, device=like.device, dtype=like.dtype)
