"""`ddpm-ext doctor`: checks of the machine, the environment and a trained folder."""

from __future__ import annotations

import platform
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

from diffusers_ddpm_ext._version import __version__
from diffusers_ddpm_ext.cli.arguments import LOCAL_FOLDER_HELP
from diffusers_ddpm_ext.cli.doctor_devices import check_devices
from diffusers_ddpm_ext.cli.doctor_findings import Finding, Mark
from diffusers_ddpm_ext.cli.doctor_folder import check_folder
from diffusers_ddpm_ext.cli.extras import INSTALL_EXTRA, TRAIN_MODULES
from diffusers_ddpm_ext.cli.parser import parse_options
from diffusers_ddpm_ext.errors import ConfigError, RunError, print_lines, printable
from diffusers_ddpm_ext.utils.next_command import next_command
from diffusers_ddpm_ext.utils.option import option, positional

DOCTOR_EXAMPLES = """examples:
  ddpm-ext doctor
  ddpm-ext doctor runs/digits           its pipeline, its checkpoints and its proof, in a second
  ddpm-ext doctor runs/digits --open    also loads its networks and checks the machine

The status is 1 where something is wrong (marked !), 0 where there is at most advice (marked ?). Tokens are never
printed."""
MINIMUM_VERSIONS = {"torch": (2, 10), "diffusers": (0, 38)}
BASE_PACKAGES = ("torch", "diffusers", "numpy", "huggingface_hub", "safetensors")
OPTIONAL_MODULES = {
    "transformers": "a model of text or --loss_type perceptual",
    "datasets": "--dataset_name",
    "torchsde": "DPMSolverSDEScheduler",
    "tensorboard": "--report_to tensorboard",
    "bitsandbytes": "--use_8bit_adam",
}
TOO_FEW_BYTES, FEW_BYTES = 1 << 30, 5 << 30
LOGIN_TIMEOUT = 5.0


@dataclass(frozen=True)
class DoctorOptions:
    """Check this machine and this environment, or a trained folder.

    Looks at versions, devices, extras, disk, login at the Hub, and recorded values. With a folder, which is checked
    without torch, devices and recorded values are left out. Every finding is a line with what to do about it.
    """

    folder: Path | None = positional("FOLDER", LOCAL_FOLDER_HELP, default=None)
    open: bool = option(
        False, "Load the networks of the folder, decode and encode with them, and check devices and recorded values."
    )
    offline: bool = option(False, "Do not ask the Hub who is logged in.")


def doctor_command(argv: Sequence[str]) -> str:
    """Run `ddpm-ext doctor`, printing each finding as soon as it is known.

    Raises:
        ConfigError: an option is wrong.
        RunError: something is wrong; the findings have been printed.
    """
    wrong = 0
    for title, check in _checks(parse_doctor_args(argv)):
        print_lines(f"{title}\n")
        for finding in _findings(check):
            wrong += finding.mark is Mark.WRONG
            print_lines(f"  {finding.mark.value} {' '.join(finding.text.split())}\n")
    if wrong:
        raise RunError(f"{wrong} {'thing is' if wrong == 1 else 'things are'} wrong: see the lines marked !")
    return ""


def parse_doctor_args(argv: Sequence[str]) -> DoctorOptions:
    """The options of a command line, checked; errors are those of `parse_options`."""
    options = parse_options(DoctorOptions, argv, "doctor", DOCTOR_EXAMPLES)
    if options.folder is not None and not options.folder.is_dir():
        command = next_command(options.folder)
        raise ConfigError(
            f"{options.folder} is not a folder: give the output folder of a run, or leave it out{command}"
        )
    if options.open and options.folder is None:
        raise ConfigError("--open loads the networks of a folder: name one, or leave it out")
    return options


Check = Callable[[], Iterator[Finding]]


def _checks(options: DoctorOptions) -> Iterator[tuple[str, Check]]:
    loads_torch = options.folder is None or options.open
    yield "Packages", _check_packages
    if loads_torch:
        yield "Devices", check_devices
    yield "Disk", _check_disk
    if not options.offline:
        yield "Hub", _check_login
    if loads_torch:
        yield "Recorded values", _check_recorded_values
    if options.folder is not None:
        folder = options.folder
        yield printable(str(folder)), lambda: check_folder(folder, options.open)


def _findings(check: Check) -> Iterator[Finding]:
    try:
        yield from check()
    except Exception as error:  # a broken installation can raise anything
        message = " ".join(str(error).split())[:300]
        yield Finding(Mark.WRONG, f"could not be checked: {type(error).__name__}: {message}")


# ---------------------------------------------------------------------- this environment


def _installed_version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _major_minor(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split("+")[0].split(".")[:2] if part.isdigit())


def _check_packages() -> Iterator[Finding]:
    yield Finding(
        Mark.FINE, f"diffusers-ddpm-ext {__version__}, Python {platform.python_version()} on {platform.system()}"
    )
    for name in BASE_PACKAGES:
        installed = _installed_version(name)
        if installed is None:
            yield Finding(Mark.WRONG, f"{name} is not installed: pip install diffusers-ddpm-ext")
        elif name in MINIMUM_VERSIONS and _major_minor(installed) < MINIMUM_VERSIONS[name]:
            minimum = ".".join(map(str, MINIMUM_VERSIONS[name]))
            remedy = f"pip install -U '{name}>={minimum}'"
            yield Finding(Mark.WRONG, f"{name} {installed} is older than {minimum}: {remedy}")
        else:
            yield Finding(Mark.FINE, f"{name} {installed}")
    missing = [package for module, package in TRAIN_MODULES.items() if find_spec(module) is None]
    if missing:
        remedy = INSTALL_EXTRA.format(extra="train")
        yield Finding(Mark.ADVICE, f"sampling works, training does not: {', '.join(missing)} missing; {remedy}")
    for module, use in OPTIONAL_MODULES.items():
        if find_spec(module) is None:
            yield Finding(Mark.FINE, f"{module} is not installed, which only {use} needs: pip install {module}")


def _check_disk() -> Iterator[Finding]:
    from huggingface_hub import constants

    for name, place in (("this folder", Path.cwd()), ("the Hub's cache (HF_HOME)", Path(constants.HF_HOME))):
        nearest = next(each for each in (place, *place.parents) if each.exists())
        try:
            with tempfile.TemporaryFile(dir=nearest) as file:
                file.write(b"0" * 4096)
                file.flush()
        except OSError as error:
            remedy = (
                "change to a folder that you own" if place == Path.cwd() else "set HF_HOME to a folder that you own"
            )
            yield Finding(Mark.WRONG, f"{name} cannot be written ({error.strerror}): {remedy}")
            continue
        free = shutil.disk_usage(nearest).free
        text = f"{name}: {free / (1 << 30):.1f} GiB free"
        if free < TOO_FEW_BYTES:
            yield Finding(Mark.WRONG, f"{text}: free some space, a checkpoint needs four times the weights")
        else:
            few = free < FEW_BYTES
            yield Finding(Mark.ADVICE if few else Mark.FINE, text + (": little for long runs" if few else ""))


def _check_login() -> Iterator[Finding]:
    from huggingface_hub import HfApi, get_token

    from diffusers_ddpm_ext.hub.upload import describe_error, hub_timeout

    if get_token() is None:
        yield Finding(Mark.FINE, "not logged in: `hf auth login` before --push_to_hub")
        return
    try:
        with hub_timeout(LOGIN_TIMEOUT):
            who = HfApi().whoami()
    except Exception as error:  # of the client or the transport
        yield Finding(Mark.ADVICE, f"logged in, but {describe_error(error, 'the Hub')}")
        return
    role = (who.get("auth") or {}).get("accessToken", {}).get("role")
    yield Finding(Mark.FINE, f"logged in as {who['name']}" + (f" (token: {role})" if role else ""))
    if role == "read":
        yield Finding(Mark.ADVICE, "this token can only read: --push_to_hub needs a token that can write")


# ---------------------------------------------------------------------- recorded values


def _check_recorded_values() -> Iterator[Finding]:
    """Compare with recorded values: schedule tables in float64, a decoder term, a sampler, a layer in float32."""
    import torch

    from diffusers_ddpm_ext.diffusion.levels import discretized_gaussian_log_likelihood
    from diffusers_ddpm_ext.diffusion.schedule import NoiseSchedule
    from diffusers_ddpm_ext.schedulers.scheduling_ddpm_ext import DDPMExtScheduler

    schedule = NoiseSchedule(1000, v_posterior=0.4)
    yield _compare_value(
        "alphas_cumprod[-1] of DDPM's schedule", float(schedule.alphas_cumprod[-1]), TERMINAL_ABAR, 1e-11
    )
    yield _compare_value(
        "its posterior variance at t = 500", float(schedule.posterior_variance[500]), POSTERIOR_VARIANCE, 1e-11
    )
    x = torch.linspace(-1, 1, 9, dtype=torch.float64)
    nats = discretized_gaussian_log_likelihood(x, 0.5 * x, torch.full_like(x, -2.0))
    yield _compare_value("nats of a discretized Gaussian", float(nats.sum()), DECODER_NATS, 1e-10)
    scheduler = DDPMExtScheduler(v_posterior=0.4, prediction_type="v_prediction", clip_sample=False)
    scheduler.set_timesteps(10)
    sample = torch.linspace(-1, 1, 12).reshape(1, 3, 2, 2)
    for t in scheduler.timesteps:
        noise = torch.full_like(sample, 0.5)
        sample = scheduler.step(0.3 * sample, t, sample, variance_noise=noise).prev_sample
    yield _compare_value("ten reverse steps", float(sample.double().abs().sum()), TEN_STEPS_SUM, 1e-5)
    torch.manual_seed(0)
    layer = torch.nn.Conv2d(3, 4, 3).eval()
    with torch.no_grad():
        for index, weight in enumerate(layer.parameters()):
            weight.copy_(torch.linspace(-1, 1, weight.numel()).reshape(weight.shape) * (index + 1))
        made = layer(torch.linspace(-1, 1, 3 * 64).reshape(1, 3, 8, 8)).double().square().mean()
    yield _compare_value("a convolution in float32", float(made), CONVOLUTION_MEAN, 1e-5)


TERMINAL_ABAR, POSTERIOR_VARIANCE, DECODER_NATS = 4.03582976537568245e-05, 1.005478545132973e-02, -56.310475398118884
TEN_STEPS_SUM, CONVOLUTION_MEAN = 9.1107667059481463, 11.52981934420462
"""From the formulas in 40 digits, and from a convolution written out in float64."""


def _compare_value(name: str, value: float, recorded: float, tolerance: float) -> Finding:
    if abs(value - recorded) / abs(recorded) <= tolerance:
        return Finding(Mark.FINE, f"{name}: {value:.6g}, as recorded")
    remedy = "install the pinned torch, or report the platform"
    return Finding(Mark.WRONG, f"{name}: {value:.12g} instead of {recorded:.12g}: {remedy}")
