"""Options of `ddpm-ext evaluate` about samples. Imports nothing heavy."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffusers_ddpm_ext.errors import ConfigError, printable
from diffusers_ddpm_ext.utils.option import option
from diffusers_ddpm_ext.utils.vocabulary import SAMPLE_METRICS, NamedTimesteps

SAMPLES_HELP = """Quality of samples, with --metrics or --memorization, instead of the bound: samples are drawn and
compared with the images of --split by their features."""
DEFAULT_SAMPLES, MAX_SAMPLES = 2000, 10**7
OTHER_SCHEDULER_STEPS = 50
DRAWING = ("num_samples", "scheduler", "scheduler_args", "timesteps", "guidance_scale", "eta")
"""Options that say how samples are drawn."""


@dataclass(frozen=True)
class SampleMetricsOptions:
    """Which metrics of samples, and how the samples are drawn and compared."""

    metrics: tuple[str, ...] | None = option(
        None,
        "fd: Frechet distance (FID with Inception's features); kid: unbiased kernel distance; prdc: precision, recall,"
        " density and coverage. One or several.",
        metavar="NAME",
    )
    memorization: bool = option(False, "How many samples are copies of training images.")
    num_samples: int | None = option(
        None, "Samples to draw.", low=4, high=MAX_SAMPLES, metavar="N", unset=f"{DEFAULT_SAMPLES:,}"
    )
    samples: Path | None = option(
        None,
        "Samples made elsewhere instead: a folder of images, or .npy or .npz (N, height, width, C), uint8, uint16, or"
        " float in [0, 1]. They are prepared as the images.",
        metavar="DIR|FILE",
    )
    feature_extractor: str | None = option(
        None,
        "What is compared: pixels; digits, a classifier of the digits; the folder or Hub id of a vision model of"
        " Transformers, e.g. facebook/dinov2-base; or a TorchScript file.",
        metavar="NAME",
        unset="digits for the digits, else pixels",
        path=True,
    )
    trust_feature_extractor: bool = option(False, "Run a TorchScript file as --feature_extractor.")
    nearest: int = option(5, "The k of precision, recall, density and coverage.", low=1, metavar="K")
    scheduler: str | None = option(
        None, "A Diffusers scheduler by its class, to sample with.", metavar="NAME", unset="the one in FOLDER"
    )
    scheduler_args: dict[str, Any] = option({}, "Changes to the scheduler's configuration.", metavar="KEY=VALUE")
    timesteps: NamedTimesteps | None = option(
        None, "Which K timesteps, as in `ddpm-ext sample`: samples, bound or even.", unset="even"
    )
    guidance_scale: float = option(1.0, "Classifier-free guidance of the samples.", metavar="S")
    eta: float | None = option(None, "Noise of DDIM: 0 is none, 1 that of DDPM.", low=0)
    feature_cache: Path | None = option(
        None, "Folder of the images' features, for the next time.", metavar="DIR", unset="features in --out"
    )


def sample_metrics_options(typed: Mapping[str, Any]) -> SampleMetricsOptions | None:
    """The options of a command line, checked; None without --metrics and --memorization.

    Raises:
        ConfigError: a metric is unknown, or an option has no effect.
    """
    options = SampleMetricsOptions(**typed)
    if options.metrics is None and not options.memorization:
        given = [name for name, value in typed.items() if value not in (None, False)]
        if given:
            raise ConfigError(f"--{given[0]} has no effect on the bound: add --metrics or --memorization")
        return None
    metrics = options.metrics or ()
    for name in metrics:
        if name not in SAMPLE_METRICS:
            raise ConfigError(f"--metrics {printable(name, 60)} must be one of {', '.join(SAMPLE_METRICS)}")
    if len(set(metrics)) < len(metrics):
        raise ConfigError(f"--metrics {' '.join(metrics)} names one twice: leave one out")
    if options.samples is not None:
        for name in DRAWING:
            if typed.get(name) is not None:
                raise ConfigError(f"--{name} has no effect on --samples, which are not drawn: leave one out")
    if "nearest" in typed and "prdc" not in metrics:
        raise ConfigError("--nearest has no effect without --metrics prdc: leave it out")
    return options
