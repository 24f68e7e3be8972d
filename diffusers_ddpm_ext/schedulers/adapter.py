"""Adapter to other Diffusers schedulers: converts a network's output to the prediction type of their ``step``.

Symbols:

    x0, eps, v, A    as in `diffusers_ddpm_ext.diffusion.gaussian`; x_t = sqrt(A) x0 + sqrt(1 - A) eps
    sigma            sqrt((1 - A) / A), the noise of x_t / sqrt(A), the coordinate of Euler-like schedulers
    s, m             standard deviation and mean of the Gaussian of the trial

No class is known by its name. Its arguments are read from its signatures, and its behavior is tested: a Gaussian,
whose exact denoiser is known, is sampled with it before the first call of the network.

Sources: [PD] Salimans & Ho 2022, appendix D (v); [EDM] Karras et al. 2022, table 1 (preconditioning).
"""

from __future__ import annotations

import copy
import inspect
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from diffusers_ddpm_ext.diffusion.reverse_step import LEARNED_VARIANCES
from diffusers_ddpm_ext.schedulers.config import BETA_KEYS
from diffusers_ddpm_ext.schedulers.scheduling_ddpm_ext import DDPMExtScheduler

MIN_TERMINAL_ABAR = (
    2.0**-24
)  # replaces a terminal A of zero for schedulers that divide by it; float32's smallest below 1
MEAN, STD = 0.4, 0.3
# The largest errors of the 15 compatible classes at 50 steps are 0.025 and 0.18; a consistency sampler has 0.45.
MEAN_TOLERANCE, LOG_STD_TOLERANCE = 0.04, 0.3
BETA_CONFIG_KEYS = (*BETA_KEYS, "trained_betas")
TRIAL_STEPS, TRIAL_SHAPE = 50, (256, 1, 8, 8)


@dataclass(frozen=True)
class SchedulerAdapter:
    """A scheduler, configured for a model.

    Attributes:
        scheduler: the scheduler, or a copy if this model needs another configuration of it.
        trained: our scheduler, with the tables and the prediction type of the model's training.
        prediction_type: of the output that ``step`` receives.
        uses_variance: whether ``step`` uses the channels of a learned variance.
        kept: the steps of the training chain, ascending, that the scheduler's own chain consists of; None where it is
            the training chain.
    """

    scheduler: Any
    trained: DDPMExtScheduler
    prediction_type: str
    uses_variance: bool
    kept: tuple[int, ...] | None = None

    @property
    def is_ours(self) -> bool:
        """Whether it is a `DDPMExtScheduler`, whose steps are integers and whose ``step`` takes the model's output."""
        return isinstance(self.scheduler, DDPMExtScheduler)

    def with_noise_seed(self, generator: torch.Generator | list[torch.Generator] | None) -> SchedulerAdapter:
        """For a class with ``noise_sampler_seed``: a copy with a seed drawn from the generators of the pipeline call.

        This adapter, if the class takes generators, has a seed, or there is no generator.
        """
        if generator is None or "noise_sampler_seed" not in _arguments(type(self.scheduler).__init__):
            return self
        if self.scheduler.config.noise_sampler_seed is not None:
            return self
        generators = generator if isinstance(generator, list) else [generator]
        seeds = [int(torch.randint(2**31, (), generator=each, device=each.device)) for each in generators]
        scheduler = copy.deepcopy(self.scheduler)
        scheduler.noise_sampler_seed = seeds if isinstance(generator, list) else seeds[0]
        return replace(self, scheduler=scheduler)

    @property
    def timesteps(self) -> Tensor:
        """``scheduler.timesteps``, as steps of the training chain where the scheduler has one of its own."""
        return self.trained_step(self.scheduler.timesteps)

    def trained_step(self, t: Tensor) -> Tensor:
        """Entries of ``scheduler.timesteps``, (...), as steps of the training chain; the device is not read."""
        # take, since indexing with a tensor of one value would read it.
        return t if self.kept is None else self._kept_steps.to(t.device).take(t.long())

    @cached_property
    def _kept_steps(self) -> Tensor:
        return torch.tensor(self.kept, device=self.scheduler.timesteps.device)

    def model_timestep(self, model_input_scale: float, t: Tensor) -> Tensor:
        """Timestep for the network, (), converted if the scheduler's timesteps have another unit than the model's.

        ``model_input_scale`` is from `input_scale`, ``t`` an entry of ``scheduler.timesteps``.
        """
        if self.kept is not None:
            return self.trained_step(t)
        if getattr(self.scheduler, "alphas_cumprod", None) is not None:
            return t
        steps = np.arange(len(self.trained), dtype=np.float64)
        log_sigma = np.log(_sigmas(self.trained))
        return torch.tensor(np.interp(np.log(_sigma_of(model_input_scale)), log_sigma, steps), dtype=torch.float32)

    def late_start_warning(self) -> str:
        """A warning if the first step is far from pure noise, with which sampling starts; empty otherwise."""
        table = getattr(self.scheduler, "alphas_cumprod", None)
        if self.is_ours or table is None:
            return ""
        first = float(self.scheduler.timesteps[0])
        signal = float(np.interp(first, np.arange(len(table)), table.double().cpu().numpy())) ** 0.5
        if signal <= max(0.1, 2 * float(table[-1]) ** 0.5):
            return ""
        return (
            f"{type(self.scheduler).__name__} starts from pure noise at step {first:.4g} of {len(table)}, where the "
            f"model expects {signal:.0%} of the image: set timestep_spacing='trailing', or other num_inference_steps."
        )

    def input_scale(self, t: Tensor) -> float:
        """The scheduler's factor from sample to network input at step ``t``."""
        if self.is_ours:
            return 1.0
        return float(self.scheduler.scale_model_input(torch.ones(1, dtype=torch.float64), t))

    def convert_output(self, output: Tensor, model_input: Tensor, scale: float, t: Tensor) -> Tensor:
        """Convert the network's output for ``step``.

        Args:
            output: (B, C, ...) or, with a learned variance, (B, 2C, ...).
            model_input: the sample part of the network's input, (B, C, ...).
            scale: from `input_scale`.
            t: the step.

        Returns:
            (B, C, ...), or all of ``output`` if ``step`` uses the variance.
        """
        channels = model_input.shape[1]
        if self.uses_variance:
            return output
        output = output[:, :channels]
        native = self.trained.config.prediction_type
        if native == self.prediction_type:
            return output
        root, rest = self._roots(scale, t)
        if native == "epsilon":
            x0, eps = (model_input - rest * output) / root, output
        elif native == "sample":
            x0, eps = output, (model_input - root * output) / rest
        else:
            x0, eps = root * model_input - rest * output, rest * model_input + root * output
        return root * eps - rest * x0

    def _roots(self, scale: float, t: Tensor) -> tuple[float, float]:
        """sqrt(A) and sqrt(1 - A) at a step, from the table, or else from the input's scale."""
        step = float(self.trained_step(t))
        if step.is_integer() and 0 <= step < len(self.trained):
            abar = max(float(self.trained.schedule.alphas_cumprod[int(step)]), MIN_TERMINAL_ABAR)
            # The table is exact, the scale is rounded; but a scheduler may use times between two of our steps.
            if scale == 1 or abs(_sigma_of(scale) / _sigma_of(abar**0.5) - 1) < 1e-3:
                return abar**0.5, (1 - abar) ** 0.5
        return scale, (1 - scale**2) ** 0.5


def _sigma_of(scale: float) -> float:
    return max(1 / scale**2 - 1, 1e-20) ** 0.5


def _sigmas(trained: DDPMExtScheduler) -> Any:
    abar = np.maximum(trained.schedule.alphas_cumprod, MIN_TERMINAL_ABAR)
    return np.sqrt((1 - abar) / abar)


def adapt_scheduler(
    scheduler: Any, trained: DDPMExtScheduler, step_kwargs: Mapping[str, Any] | None = None
) -> SchedulerAdapter:
    """Configure a scheduler for a model, or raise an error that explains why it cannot sample it.

    Args:
        scheduler: any Diffusers scheduler; it is not changed.
        trained: a scheduler of ours with the schedule and the prediction type of training.
        step_kwargs: arguments for every ``step`` (``eta``, ``s_noise``, ...).

    Returns:
        The adapter. Ours is used unchanged; another has passed the trial on a Gaussian.

    Raises:
        ValueError: the class cannot sample such a model, its betas are not those of training, or its ``step`` lacks an
            argument.
    """
    _check_step_kwargs(scheduler, step_kwargs or {})
    learned = scheduler.config.get("variance_type") in LEARNED_VARIANCES
    if isinstance(scheduler, DDPMExtScheduler):
        _check_prediction_type(scheduler, trained)
        _check_betas(scheduler, trained)
        return SchedulerAdapter(scheduler, scheduler, scheduler.config.prediction_type, learned)
    _check_kind(scheduler)
    uses_variance = learned and _uses_variance(scheduler)
    configured = _configured(scheduler, trained, uses_variance)
    _check_betas(configured, trained)
    _check_prediction_type(scheduler, trained)
    native, why = trained.config.prediction_type, ""
    for prediction_type in dict.fromkeys((native, "v_prediction")):
        why = _trial_result(scheduler, trained, prediction_type)
        if not why:
            configured = _with_prediction_type(configured, prediction_type)
            uses_variance = uses_variance and native == prediction_type
            return SchedulerAdapter(configured, trained, prediction_type, uses_variance)
    raise ValueError(
        f"{type(scheduler).__name__} cannot sample this model ({native}): {why}. Use one of "
        "pipeline.scheduler.compatibles with its usual options, or DDPMExtScheduler."
    )


def _check_step_kwargs(scheduler: Any, kwargs: Mapping[str, Any]) -> None:
    known = [name for name in _arguments(scheduler.step)[3:] if name not in ("generator", "return_dict", "kwargs")]
    for name in kwargs:
        if name not in known:
            raise ValueError(
                f"{type(scheduler).__name__}.step takes no {name}; it takes {', '.join(known) or 'nothing more'}."
            )


def _arguments(function: Callable[..., Any]) -> list[str]:
    return list(inspect.signature(function).parameters)


def _check_kind(scheduler: Any) -> None:
    """Reject schedulers of flow-matching models."""
    name, config = type(scheduler).__name__, scheduler.config
    flow = [key for key in config if "flow" in key and config[key] is True]
    if flow or config.get("prediction_type") == "flow_prediction":
        what = f"{flow[0]}=True" if flow else "prediction_type='flow_prediction'"
        raise ValueError(f"{name} with {what} samples flow-matching models; this model is a DDPM: leave that out.")
    if getattr(scheduler, "scale_model_input", None) is None:
        raise ValueError(f"{name} cannot sample this model: without scale_model_input it is for flow matching.")


def _configured(scheduler: Any, trained: DDPMExtScheduler, uses_variance: bool) -> Any:
    """The scheduler, or a copy if this model needs another configuration of it."""
    parameters = inspect.signature(type(scheduler).__init__).parameters
    changes: dict[str, Any] = {}
    if "trained_betas" in parameters:
        rescaled = bool(scheduler.config.get("rescale_betas_zero_snr"))  # if not, the betas differ: an error
        if trained.schedule.zero_terminal_snr and rescaled and "rescale_betas_zero_snr" not in parameters:
            changes["trained_betas"] = _finite_betas(trained)
    elif {"sigma_min", "sigma_max"} <= parameters.keys():
        sigmas = _sigmas(trained)
        changes |= {"sigma_min": float(sigmas[0]), "sigma_max": float(sigmas[-1])}
        if "sigma_data" in parameters:
            changes["sigma_data"] = 1.0  # its preconditioning is then the variance-preserving v
    learned = scheduler.config.get("variance_type") in LEARNED_VARIANCES
    if learned and not uses_variance and "variance_type" in parameters:
        changes["variance_type"] = parameters["variance_type"].default
    return type(scheduler).from_config(scheduler.config, **changes) if changes else scheduler


def _finite_betas(trained: DDPMExtScheduler) -> list[float]:
    """The betas, with the last such that A ends at `MIN_TERMINAL_ABAR` instead of zero."""
    betas, abar = trained.schedule.betas.copy(), trained.schedule.alphas_cumprod
    betas[-1] = 1 - MIN_TERMINAL_ABAR / abar[-2]
    return betas.tolist()


def _with_prediction_type(scheduler: Any, prediction_type: str) -> Any:
    if scheduler.config.get("prediction_type") == prediction_type:
        return scheduler
    return type(scheduler).from_config(scheduler.config, prediction_type=prediction_type)


def _check_prediction_type(scheduler: Any, trained: DDPMExtScheduler) -> None:
    name, native = type(scheduler).__name__, trained.config.prediction_type
    configured = scheduler.config.get("prediction_type", native)
    if configured != native:
        raise ValueError(
            f"{name} has prediction_type={configured!r}, but this model predicts {native!r}: use "
            f"pipeline.scheduler = {name}.from_config(pipeline.scheduler.config)."
        )


def _check_betas(scheduler: Any, trained: DDPMExtScheduler) -> None:
    abar = getattr(scheduler, "alphas_cumprod", None)
    if abar is None:
        return
    name, ours = type(scheduler).__name__, np.maximum(trained.schedule.alphas_cumprod, MIN_TERMINAL_ABAR)
    theirs = np.maximum(abar.double().cpu().numpy(), MIN_TERMINAL_ABAR)
    way = f"use pipeline.scheduler = {name}.from_config(pipeline.scheduler.config)"
    if len(theirs) != len(ours):
        raise ValueError(f"{name} has {len(theirs)} training steps, this model {len(ours)}: {way}.")
    if not np.allclose(np.log(theirs), np.log(ours), rtol=0, atol=2e-3):
        at = int(np.abs(np.log(theirs) - np.log(ours)).argmax())
        raise ValueError(
            f"{name} has other betas than this model was trained with (alphas_cumprod[{at}] is {theirs[at]:.4g}, not "
            f"{ours[at]:.4g}): {way}."
        )


def _uses_variance(scheduler: Any) -> bool:
    """Whether its ``step`` accepts twice the channels, and its result depends on the second half."""
    results = []
    for level in (-1.0, 1.0):
        probe = copy.deepcopy(scheduler)
        sample = torch.zeros(1, 1, 2, 2)
        output = torch.cat([torch.zeros_like(sample), torch.full_like(sample, level)], dim=1)
        generator = torch.Generator().manual_seed(0)
        kwargs = {"generator": generator} if "generator" in _arguments(probe.step) else {}
        try:
            probe.set_timesteps(min(10, len(probe)))
            probe.scale_model_input(sample, probe.timesteps[0])
            results.append(probe.step(output, probe.timesteps[0], sample, **kwargs).prev_sample)
        except (RuntimeError, ValueError, IndexError, TypeError):
            return False
    return results[0].shape == sample.shape and not torch.equal(results[0], results[1])


def supports_temperature(scheduler: Any, step_kwargs: Mapping[str, Any]) -> bool:
    """Whether the result of ``step`` depends on the caller's noise, so that its scale can be chosen."""
    if "variance_noise" not in _arguments(scheduler.step):
        return False
    previous = []
    for level in (-1.0, 1.0):
        probe = copy.deepcopy(scheduler)
        probe.set_timesteps(min(4, len(probe)))
        sample = torch.zeros(1, 1, 2, 2)
        noise = torch.full_like(sample, level)
        previous.append(
            probe.step(torch.zeros_like(sample), probe.timesteps[0], sample, variance_noise=noise, **step_kwargs)
        )
    return not torch.equal(previous[0].prev_sample, previous[1].prev_sample)


_TRIAL_RESULTS: dict[str, str] = {}


def _trial_result(scheduler: Any, trained: DDPMExtScheduler, prediction_type: str) -> str:
    """Sample a Gaussian with a class and its options, on DDPM's chain of 1,000 steps; cached per process.

    Returns what is wrong, as a phrase; empty if the trial passed.
    """
    native = trained.config.prediction_type
    options = {name: value for name, value in scheduler.config.items() if name not in BETA_CONFIG_KEYS}
    key = json.dumps([type(scheduler).__qualname__, native, prediction_type, options], default=str, sort_keys=True)
    if key not in _TRIAL_RESULTS:
        model = DDPMExtScheduler(prediction_type=native, rescale_betas_zero_snr=trained.schedule.zero_terminal_snr)
        names = {name: model.config[name] for name in BETA_CONFIG_KEYS}
        candidate = type(scheduler).from_config(scheduler.config, **names)
        candidate = _with_prediction_type(_configured(candidate, model, uses_variance=False), prediction_type)
        try:
            _TRIAL_RESULTS[key] = _sample_gaussian(
                SchedulerAdapter(candidate, model, prediction_type, uses_variance=False)
            )
        except Exception as error:  # of an unknown class
            _TRIAL_RESULTS[key] = f"{type(error).__name__}: {' '.join(str(error).split())}"[:200].rstrip(". ")
    return _TRIAL_RESULTS[key]


def _sample_gaussian(adapter: SchedulerAdapter) -> str:
    """Sample with the exact denoiser, and compare the distribution of its inputs and of the samples with the truth."""
    scheduler, generator = adapter.scheduler, torch.Generator().manual_seed(0)
    scheduler.set_timesteps(TRIAL_STEPS)
    if float(scheduler.timesteps[0]) < float(scheduler.timesteps[-1]):
        return "it goes from images to noise, not from noise to images"
    log_abar = np.log(np.maximum(adapter.trained.schedule.alphas_cumprod, MIN_TERMINAL_ABAR))
    steps = np.arange(len(log_abar))
    sample = torch.randn(TRIAL_SHAPE, generator=generator) * float(scheduler.init_noise_sigma)
    kwargs = {"generator": generator} if "generator" in _arguments(scheduler.step) else {}
    for t in scheduler.timesteps:
        scale = adapter.input_scale(t)
        time = adapter.model_timestep(scale, t)
        abar = float(np.exp(np.interp(float(time), steps, log_abar)))
        xt = scheduler.scale_model_input(sample, t)
        why = _deviation(xt, abar, f"at step {float(t):.4g} the network's input has")
        if why:
            return why
        output = adapter.convert_output(_exact(xt, abar, adapter.trained.config.prediction_type), xt, scale, t)
        sample = scheduler.step(output, t, sample, **kwargs).prev_sample
    return _deviation(sample, 1.0, "a sampled Gaussian has")


def _exact(xt: Tensor, abar: float, native: str) -> Tensor:
    """Output of the ideal network for x_t, if each x0 is normal with mean `MEAN` and standard deviation `STD`."""
    root, rest = abar**0.5, (1 - abar) ** 0.5
    x0 = MEAN + root * STD**2 / (abar * STD**2 + 1 - abar) * (xt - root * MEAN)
    eps = (xt - root * x0) / rest
    return {"epsilon": eps, "sample": x0, "v_prediction": root * eps - rest * x0}[native]


def _deviation(xt: Tensor, abar: float, where: str) -> str:
    mean, std = abar**0.5 * MEAN, (abar * STD**2 + 1 - abar) ** 0.5
    actual_mean, actual_std = float(xt.mean()), float(xt.std())
    is_mean_off = not abs(actual_mean - mean) <= MEAN_TOLERANCE
    if is_mean_off or not abs(math.log(max(actual_std, 1e-9) / std)) <= LOG_STD_TOLERANCE:
        return f"{where} mean {actual_mean:.3g} and deviation {actual_std:.3g} instead of {mean:.3g} and {std:.3g}"
    return ""
