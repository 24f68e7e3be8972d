"""Any Diffusers scheduler as a sampler of our models: what a network predicts, said as ``step`` takes it.

Symbols:

    x0, eps, v, A    as in :mod:`diffusers_ddpm_ext.diffusion.gaussian`; x_t = sqrt(A) x0 + sqrt(1 - A) eps
    sigma            sqrt((1 - A) / A), the noise of x_t / sqrt(A), which Euler-like schedulers walk on
    s, m             standard deviation and mean of the Gaussian that a sampler is tried on

Nothing here knows a class by its name. What a class takes is read off its signatures, and what it does is tried: a
Gaussian, whose exact denoiser is known, is sent through it before the network is called for the first time.

Sources: [PD] Salimans & Ho 2022, appendix D (v); [EDM] Karras et al. 2022, table 1 (preconditioning).
"""

from __future__ import annotations

import copy
import inspect
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from diffusers_ddpm_ext.diffusion.reverse_step import LEARNED_VARIANCES
from diffusers_ddpm_ext.schedulers.config import BETA_KEYS
from diffusers_ddpm_ext.schedulers.scheduling_ddpm_ext import DDPMExtScheduler

TERMINAL_ABAR = 2.0**-24
"""What a terminal A of zero is for schedulers that divide by it: the smallest that float32 tells from none."""
MEAN, STD = 0.4, 0.3
MEAN_TOLERANCE, LOG_STD_TOLERANCE = 0.04, 0.3
"""Of the 15 compatible classes at 50 steps, the worst are off by 0.025 and by 0.18; a consistency sampler by 0.45."""
BETA_CONFIG_KEYS = (*BETA_KEYS, "trained_betas")
TRIED_STEPS, TRIED_SHAPE = 50, (256, 1, 8, 8)


@dataclass(frozen=True)
class SchedulerAdapter:
    """A scheduler, ready to sample a model.

    Attributes:
        scheduler: the one given, or, where it needs other words for this model, a copy of it in those words.
        trained: our scheduler, whose tables and prediction type are those of the model's training.
        spoken: the prediction type that ``step`` is handed.
        reads_variance: whether ``step`` uses the channels of a learned variance.
    """

    scheduler: Any
    trained: DDPMExtScheduler
    spoken: str
    reads_variance: bool

    @property
    def is_ours(self) -> bool:
        """Whether the scheduler is ours, whose steps are integers and whose ``step`` takes the model as it is."""
        return isinstance(self.scheduler, DDPMExtScheduler)

    def with_noise_seed(self, generator: torch.Generator | list[torch.Generator] | None) -> SchedulerAdapter:
        """The same, where a class seeds its noise by ``noise_sampler_seed``: with one drawn from the generators.

        Args:
            generator: of the call; the start has been drawn from it.

        Returns:
            This sampler, where the class takes generators, is told a seed, or is given none.
        """
        if generator is None or "noise_sampler_seed" not in _arguments(type(self.scheduler).__init__):
            return self
        if self.scheduler.config.noise_sampler_seed is not None:
            return self
        each = generator if isinstance(generator, list) else [generator]
        seeds = [int(torch.randint(2**31, (), generator=one, device=one.device)) for one in each]
        scheduler = copy.deepcopy(self.scheduler)
        scheduler.noise_sampler_seed = seeds if isinstance(generator, list) else seeds[0]
        return replace(self, scheduler=scheduler)

    def model_timestep(self, model_input_scale: float, t: Tensor) -> Tensor:
        """The step that the network is told, (), where a scheduler counts in other units than the model.

        Args:
            model_input_scale: from `input_scale`.
            t: an entry of ``scheduler.timesteps``.
        """
        if getattr(self.scheduler, "alphas_cumprod", None) is not None:
            return t
        steps = np.arange(len(self.trained), dtype=np.float64)
        log_sigma = np.log(_sigmas(self.trained))
        return torch.tensor(np.interp(np.log(_sigma_of(model_input_scale)), log_sigma, steps), dtype=torch.float32)

    def late_start_warning(self) -> str:
        """A sentence where the first step is far from pure noise, which the start is; nothing where all is well."""
        table = getattr(self.scheduler, "alphas_cumprod", None)
        if self.is_ours or table is None:
            return ""
        first = float(self.scheduler.timesteps[0])
        left = float(np.interp(first, np.arange(len(table)), table.double().cpu().numpy())) ** 0.5
        if left <= max(0.1, 2 * float(table[-1]) ** 0.5):
            return ""
        return (
            f"{type(self.scheduler).__name__} begins at step {first:.4g} of {len(table)}, where {left:.0%} of the "
            "image would still be there, from pure noise: take timestep_spacing='trailing', or other "
            "num_inference_steps."
        )

    def input_scale(self, t: Tensor) -> float:
        """What the scheduler multiplies a sample by at step ``t`` to make it the network's input."""
        if self.is_ours:
            return 1.0
        return float(self.scheduler.scale_model_input(torch.ones(1, dtype=torch.float64), t))

    def convert_output(self, output: Tensor, model_input: Tensor, scale: float, t: Tensor) -> Tensor:
        """The network's output as ``step`` takes it.

        Args:
            output: (B, C, ...) or, with a learned variance, (B, 2C, ...).
            model_input: what the network was given of the sample, (B, C, ...).
            scale: from `input_scale`.
            t: the step.

        Returns:
            (B, C, ...), or all of ``output`` where ``step`` reads the variance.
        """
        channels = model_input.shape[1]
        if self.reads_variance:
            return output
        output = output[:, :channels]
        native = self.trained.config.prediction_type
        if native == self.spoken:
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
        """sqrt(A) and sqrt(1 - A) at a step, from what the input is scaled by, or else from the tables."""
        step = float(t)
        if step.is_integer() and 0 <= step < len(self.trained):
            abar = max(float(self.trained.schedule.alphas_cumprod[int(step)]), TERMINAL_ABAR)
            # The table is exact, the scale is rounded; but a scheduler may stand between two of our steps.
            if scale == 1 or abs(_sigma_of(scale) / _sigma_of(abar**0.5) - 1) < 1e-3:
                return abar**0.5, (1 - abar) ** 0.5
        return scale, (1 - scale**2) ** 0.5


def _sigma_of(scale: float) -> float:
    return max(1 / scale**2 - 1, 1e-20) ** 0.5


def _sigmas(trained: DDPMExtScheduler) -> Any:
    abar = np.maximum(trained.schedule.alphas_cumprod, TERMINAL_ABAR)
    return np.sqrt((1 - abar) / abar)


def adapt_scheduler(
    scheduler: Any, trained: DDPMExtScheduler, step_kwargs: Mapping[str, Any] | None = None
) -> SchedulerAdapter:
    """Make a scheduler ready for a model, or say why it cannot sample it.

    Args:
        scheduler: any Diffusers scheduler; it is not changed.
        trained: a scheduler of ours with the schedule and the prediction type of training.
        step_kwargs: arguments for every ``step`` (``eta``, ``s_noise``, ...).

    Returns:
        The sampler. Ours is taken as it is; another has sampled a Gaussian right.

    Raises:
        ValueError: the class cannot sample such a model, its betas are not those of training, or its ``step`` has no
            such argument.
    """
    _check_step_kwargs(scheduler, step_kwargs or {})
    learned = scheduler.config.get("variance_type") in LEARNED_VARIANCES
    if isinstance(scheduler, DDPMExtScheduler):
        _check_prediction_type(scheduler, trained)
        _check_betas(scheduler, trained)
        return SchedulerAdapter(scheduler, scheduler, scheduler.config.prediction_type, learned)
    _check_kind(scheduler)
    reads = learned and _reads_variance(scheduler)
    fitting = _configured(scheduler, trained, reads)
    _check_betas(fitting, trained)
    _check_prediction_type(scheduler, trained)
    native, why = trained.config.prediction_type, ""
    for spoken in dict.fromkeys((native, "v_prediction")):
        why = _trial_result(scheduler, trained, spoken)
        if not why:
            return SchedulerAdapter(
                _with_prediction_type(fitting, spoken), trained, spoken, reads and native == spoken
            )
    raise ValueError(
        f"{type(scheduler).__name__} cannot sample this model ({native}): {why}. Take one of "
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
    """Refuse at sight what is built on another process."""
    name, config = type(scheduler).__name__, scheduler.config
    flow = [key for key in config if "flow" in key and config[key] is True]
    if flow or config.get("prediction_type") == "flow_prediction":
        what = f"{flow[0]}=True" if flow else "prediction_type='flow_prediction'"
        raise ValueError(f"{name} with {what} samples flow-matching models; this one is a DDPM: leave that out.")
    if getattr(scheduler, "scale_model_input", None) is None:
        raise ValueError(f"{name} cannot sample this model: without scale_model_input it is made for flow matching.")


def _configured(scheduler: Any, trained: DDPMExtScheduler, reads_variance: bool) -> Any:
    """The scheduler, or where its configuration must say something else for this model, a copy that does."""
    takes = inspect.signature(type(scheduler).__init__).parameters
    changes: dict[str, Any] = {}
    if "trained_betas" in takes:
        asked = bool(scheduler.config.get("rescale_betas_zero_snr"))  # where it is not, the betas differ: refused
        if trained.schedule.zero_terminal_snr and asked and "rescale_betas_zero_snr" not in takes:
            changes["trained_betas"] = _finite_betas(trained)
    elif {"sigma_min", "sigma_max"} <= takes.keys():
        sigmas = _sigmas(trained)
        changes |= {"sigma_min": float(sigmas[0]), "sigma_max": float(sigmas[-1])}
        if "sigma_data" in takes:
            changes["sigma_data"] = 1.0  # its preconditioning is then the variance-preserving one, in v
    learned = scheduler.config.get("variance_type") in LEARNED_VARIANCES
    if learned and not reads_variance and "variance_type" in takes:
        changes["variance_type"] = takes["variance_type"].default
    return type(scheduler).from_config(scheduler.config, **changes) if changes else scheduler


def _finite_betas(trained: DDPMExtScheduler) -> list[float]:
    """The betas, with the last such that A ends at `TERMINAL_ABAR` instead of zero."""
    betas, abar = trained.schedule.betas.copy(), trained.schedule.alphas_cumprod
    betas[-1] = 1 - TERMINAL_ABAR / abar[-2]
    return betas.tolist()


def _with_prediction_type(scheduler: Any, spoken: str) -> Any:
    if scheduler.config.get("prediction_type") == spoken:
        return scheduler
    return type(scheduler).from_config(scheduler.config, prediction_type=spoken)


def _check_prediction_type(scheduler: Any, trained: DDPMExtScheduler) -> None:
    name, native = type(scheduler).__name__, trained.config.prediction_type
    said = scheduler.config.get("prediction_type", native)
    if said != native:
        raise ValueError(
            f"{name} is told prediction_type={said!r}, but this model predicts {native!r}: use "
            f"pipeline.scheduler = {name}.from_config(pipeline.scheduler.config)."
        )


def _check_betas(scheduler: Any, trained: DDPMExtScheduler) -> None:
    abar = getattr(scheduler, "alphas_cumprod", None)
    if abar is None:
        return
    name, ours = type(scheduler).__name__, np.maximum(trained.schedule.alphas_cumprod, TERMINAL_ABAR)
    theirs = np.maximum(abar.double().cpu().numpy(), TERMINAL_ABAR)
    way = f"use pipeline.scheduler = {name}.from_config(pipeline.scheduler.config)"
    if len(theirs) != len(ours):
        raise ValueError(f"{name} has {len(theirs)} training steps, this model {len(ours)}: {way}.")
    if not np.allclose(np.log(theirs), np.log(ours), rtol=0, atol=2e-3):
        at = int(np.abs(np.log(theirs) - np.log(ours)).argmax())
        raise ValueError(
            f"{name} has other betas than this model was trained with (alphas_cumprod[{at}] is {theirs[at]:.4g}, not "
            f"{ours[at]:.4g}): {way}."
        )


def _reads_variance(scheduler: Any) -> bool:
    """Whether its ``step`` takes twice the channels, and the second half makes a difference."""
    drawn = []
    for level in (-1.0, 1.0):
        probe = copy.deepcopy(scheduler)
        sample = torch.zeros(1, 1, 2, 2)
        output = torch.cat([torch.zeros_like(sample), torch.full_like(sample, level)], dim=1)
        generator = torch.Generator().manual_seed(0)
        extra = {"generator": generator} if "generator" in _arguments(probe.step) else {}
        try:
            probe.set_timesteps(min(10, len(probe)))
            probe.scale_model_input(sample, probe.timesteps[0])
            drawn.append(probe.step(output, probe.timesteps[0], sample, **extra).prev_sample)
        except (RuntimeError, ValueError, IndexError, TypeError):
            return False
    return drawn[0].shape == sample.shape and not torch.equal(drawn[0], drawn[1])


def supports_temperature(scheduler: Any, step_kwargs: Mapping[str, Any]) -> bool:
    """Whether noise of the caller's makes a difference to ``step``, so that its scale can be chosen.

    Args:
        scheduler: to be asked.
        step_kwargs: what ``step`` is called with besides.
    """
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


def _trial_result(scheduler: Any, trained: DDPMExtScheduler, spoken: str) -> str:
    """Send a Gaussian through a class with its options, on DDPM's own chain of 1,000 steps, once a process.

    Args:
        scheduler: whose class and options are tried.
        trained: what the model predicts.
        spoken: what ``step`` is handed.

    Returns:
        What is wrong, in a phrase; nothing where all went well.
    """
    native = trained.config.prediction_type
    options = {name: value for name, value in scheduler.config.items() if name not in BETA_CONFIG_KEYS}
    key = json.dumps([type(scheduler).__qualname__, native, spoken, options], default=str, sort_keys=True)
    if key not in _TRIAL_RESULTS:
        model = DDPMExtScheduler(prediction_type=native, rescale_betas_zero_snr=trained.schedule.zero_terminal_snr)
        names = {name: model.config[name] for name in BETA_CONFIG_KEYS}
        placed = type(scheduler).from_config(scheduler.config, **names)
        placed = _with_prediction_type(_configured(placed, model, reads_variance=False), spoken)
        try:
            _TRIAL_RESULTS[key] = _sample_gaussian(SchedulerAdapter(placed, model, spoken, reads_variance=False))
        except Exception as error:  # of a class that we know nothing of
            _TRIAL_RESULTS[key] = f"{type(error).__name__}: {' '.join(str(error).split())}"[:200].rstrip(". ")
    return _TRIAL_RESULTS[key]


def _sample_gaussian(sampler: SchedulerAdapter) -> str:
    """Sample with the exact denoiser, and compare the law of every input of it, and of the end, with what it is."""
    scheduler, generator = sampler.scheduler, torch.Generator().manual_seed(0)
    scheduler.set_timesteps(TRIED_STEPS)
    if float(scheduler.timesteps[0]) < float(scheduler.timesteps[-1]):
        return "it goes from images to noise, not back"
    log_abar = np.log(np.maximum(sampler.trained.schedule.alphas_cumprod, TERMINAL_ABAR))
    steps = np.arange(len(log_abar))
    sample = torch.randn(TRIED_SHAPE, generator=generator) * float(scheduler.init_noise_sigma)
    extra = {"generator": generator} if "generator" in _arguments(scheduler.step) else {}
    for t in scheduler.timesteps:
        scale = sampler.input_scale(t)
        time = sampler.model_timestep(scale, t)
        abar = float(np.exp(np.interp(float(time), steps, log_abar)))
        xt = scheduler.scale_model_input(sample, t)
        why = _off(xt, abar, f"at step {float(t):.4g} it hands the network")
        if why:
            return why
        output = sampler.convert_output(_exact(xt, abar, sampler.trained.config.prediction_type), xt, scale, t)
        sample = scheduler.step(output, t, sample, **extra).prev_sample
    return _off(sample, 1.0, "a Gaussian comes out with")


def _exact(xt: Tensor, abar: float, native: str) -> Tensor:
    """What the ideal network says of x_t, where each x0 is normal with mean `MEAN` and deviation `STD`."""
    root, rest = abar**0.5, (1 - abar) ** 0.5
    x0 = MEAN + root * STD**2 / (abar * STD**2 + 1 - abar) * (xt - root * MEAN)
    eps = (xt - root * x0) / rest
    return {"epsilon": eps, "sample": x0, "v_prediction": root * eps - rest * x0}[native]


def _off(xt: Tensor, abar: float, where: str) -> str:
    mean, std = abar**0.5 * MEAN, (abar * STD**2 + 1 - abar) ** 0.5
    found_mean, found_std = float(xt.mean()), float(xt.std())
    wrong_mean = not abs(found_mean - mean) <= MEAN_TOLERANCE
    if wrong_mean or not abs(math.log(max(found_std, 1e-9) / std)) <= LOG_STD_TOLERANCE:
        return f"{where} mean {found_mean:.3g} and deviation {found_std:.3g} instead of {mean:.3g} and {std:.3g}"
    return ""
