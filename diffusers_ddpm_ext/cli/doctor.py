"""`ddpm-ext doctor`: what is installed, what works, and what to do about what does not."""

from __future__ import annotations

import os
import platform
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

from diffusers_ddpm_ext._version import __version__
from diffusers_ddpm_ext.cli.parser import parse_options
from diffusers_ddpm_ext.errors import ConfigError, RunError
from diffusers_ddpm_ext.utils.option import option, positional

DOCTOR_EXAMPLES = """examples:
  ddpm-ext doctor
  ddpm-ext doctor runs/digits      its pipeline, its checkpoints and its proof, too

The status is 1 where something is wrong (marked !), 0 where there is at most advice (marked ?). Tokens are never
shown."""
FLOORS = {"torch": (2, 10), "diffusers": (0, 38)}
BASE = ("torch", "diffusers", "numpy", "huggingface_hub", "safetensors")
TRAIN = {"accelerate": "accelerate", "matplotlib": "matplotlib", "yaml": "PyYAML"}
OPTIONAL = {
    "transformers": "--loss_type perceptual",
    "datasets": "--dataset_name",
    "torchsde": "DPMSolverSDEScheduler",
    "tensorboard": "--report_to tensorboard",
    "bitsandbytes": "--use_8bit_adam",
}
EXTRA = "pip install diffusers-ddpm-ext[train]"
ROOM, LITTLE = 1 << 30, 5 << 30
PATIENCE = 5.0


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at.

    Attributes:
        mark: `` `` fine, ``?`` advice, ``!`` wrong.
        text: what was found, with the remedy.
    """

    mark: str
    text: str


@dataclass(frozen=True)
class DoctorOptions:
    """Check this machine, this environment and, if one is named, a trained folder.

    Looks at versions, devices, extras, disk, login at the Hub, and recorded values. Every finding is a line with what
    to do about it.
    """

    folder: Path | None = positional("FOLDER", "Output folder of a run, or folder of a saved pipeline.", default=None)
    offline: bool = option(False, "Do not ask the Hub who is logged in.")


def doctor_command(argv: Sequence[str]) -> str:
    """Parse the command line and run the command; arguments and errors are those of the two functions below."""
    doctor(parse_doctor_args(argv))
    return ""


def parse_doctor_args(argv: Sequence[str]) -> DoctorOptions:
    """The options of a command line, checked; errors are those of `parse_options`."""
    options = parse_options(DoctorOptions, argv, "doctor", DOCTOR_EXAMPLES)
    if options.folder is not None and not options.folder.is_dir():
        raise ConfigError(f"{options.folder} is not a folder: give the output folder of a run, or leave it out")
    return options


def doctor(options: DoctorOptions) -> None:
    """Look, and tell each finding as it is found.

    Args:
        options: what was asked for.

    Raises:
        RunError: something is wrong; its findings have been told.
    """
    wrong = 0
    for title, look in _chapters(options):
        sys.stdout.write(f"{title}\n")
        for finding in _survive(look):
            wrong += finding.mark == "!"
            sys.stdout.write(f"  {finding.mark} {finding.text}\n")
            sys.stdout.flush()
    if wrong:
        raise RunError(f"{wrong} {'thing is' if wrong == 1 else 'things are'} wrong: see the lines marked !")


Look = Callable[[], Iterator[Finding]]


def _chapters(options: DoctorOptions) -> Iterator[tuple[str, Look]]:
    yield "Packages", _packages
    yield "Devices", _devices
    yield "Disk", _disk
    if not options.offline:
        yield "Hub", _hub
    yield "Numbers", _numbers
    if options.folder is not None:
        folder = options.folder
        yield str(folder), lambda: _folder(folder)


def _survive(look: Look) -> Iterator[Finding]:
    try:
        yield from look()
    except Exception as error:  # what it looks at is broken in a way of its own
        yield Finding("!", f"could not be looked at: {type(error).__name__}: {' '.join(str(error).split())[:300]}")


# ---------------------------------------------------------------------- this environment


def _installed(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _numbers_of(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split("+")[0].split(".")[:2] if part.isdigit())


def _packages() -> Iterator[Finding]:
    yield Finding(" ", f"diffusers-ddpm-ext {__version__}, Python {platform.python_version()} on {platform.system()}")
    for name in BASE:
        found = _installed(name)
        if found is None:
            yield Finding("!", f"{name} is not installed: pip install diffusers-ddpm-ext")
        elif name in FLOORS and _numbers_of(found) < FLOORS[name]:
            floor = ".".join(map(str, FLOORS[name]))
            yield Finding("!", f"{name} {found} is older than {floor}: pip install -U '{name}>={floor}'")
        else:
            yield Finding(" ", f"{name} {found}")
    missing = [package for module, package in TRAIN.items() if find_spec(module) is None]
    if missing:
        yield Finding("?", f"sampling works, training does not: {', '.join(missing)} missing; {EXTRA}")
    for module, use in OPTIONAL.items():
        if find_spec(module) is None:
            yield Finding(" ", f"{module} is not installed, which only {use} needs: pip install {module}")


def _devices() -> Iterator[Finding]:
    import torch

    cores = os.cpu_count() or 1
    threads = torch.get_num_threads()
    yield Finding(" ", f"{cores} processor cores, {threads} thread{'s' if threads > 1 else ''}")
    told = os.environ.get("OMP_NUM_THREADS")
    if told is not None and told.isdigit() and int(told) < cores:
        text = f"OMP_NUM_THREADS={told} leaves {cores - int(told)} of {cores} cores idle in a run of one process"
        yield Finding("?", f"{text}: unset OMP_NUM_THREADS")
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            memory = torch.cuda.get_device_properties(index).total_memory / (1 << 30)
            half = ", bfloat16" if torch.cuda.is_bf16_supported() else ""
            yield Finding(" ", f"cuda:{index} {torch.cuda.get_device_name(index)}, {memory:.0f} GiB{half}")
    elif torch.backends.mps.is_available():
        yield Finding(" ", "mps (Apple)")
    else:
        hint = "" if torch.version.cuda is None else " although this torch was built for CUDA: is the driver there?"
        yield Finding("?" if hint else " ", f"no accelerator{hint or ': small images only, such as the digits'}")


def _disk() -> Iterator[Finding]:
    from huggingface_hub import constants

    for name, place in (("this folder", Path.cwd()), ("the Hub's cache (HF_HOME)", Path(constants.HF_HOME))):
        nearest = next(each for each in (place, *place.parents) if each.exists())
        try:
            with tempfile.TemporaryFile(dir=nearest) as file:
                file.write(b"0" * 4096)
                file.flush()
        except OSError as error:
            remedy = "go to a folder of your own" if place == Path.cwd() else "set HF_HOME to one of your own"
            yield Finding("!", f"{name} cannot be written ({error.strerror}): {remedy}")
            continue
        free = shutil.disk_usage(nearest).free
        text = f"{name}: {free / (1 << 30):.1f} GiB free"
        if free < ROOM:
            yield Finding("!", f"{text}: make room, a checkpoint needs four times the weights")
        else:
            yield Finding("?" if free < LITTLE else " ", text + (": little for long runs" if free < LITTLE else ""))


def _hub() -> Iterator[Finding]:
    from huggingface_hub import HfApi, get_token

    from diffusers_ddpm_ext.hub.upload import HubTarget, describe_error, hub_timeout

    if get_token() is None:
        yield Finding(" ", "not logged in: `hf auth login` before --push_to_hub")
        return
    try:
        with hub_timeout(PATIENCE):
            who = HfApi().whoami()
    except Exception as error:  # of the client or the transport
        yield Finding("?", f"logged in, but {describe_error(error, HubTarget('the Hub'))}")
        return
    right = (who.get("auth") or {}).get("accessToken", {}).get("role")
    yield Finding(" ", f"logged in as {who['name']}" + (f" (token: {right})" if right else ""))
    if right == "read":
        yield Finding("?", "this token only reads: for --push_to_hub take one that writes")


# ---------------------------------------------------------------------- numbers


def _numbers() -> Iterator[Finding]:
    """Known numbers: of the tables in float64, of a network in float32, of a sampler, of the bound."""
    import torch

    from diffusers_ddpm_ext.diffusion.likelihood import discretized_gaussian_log_likelihood
    from diffusers_ddpm_ext.diffusion.schedule import NoiseSchedule
    from diffusers_ddpm_ext.schedulers.scheduling_ddpm_ext import DDPMExtScheduler

    schedule = NoiseSchedule(1000, v_posterior=0.4)
    yield _same("alphas_cumprod[-1] of DDPM's chain", float(schedule.alphas_cumprod[-1]), TERMINAL, 1e-11)
    yield _same("its posterior variance at t = 500", float(schedule.posterior_variance[500]), POSTERIOR, 1e-11)
    x = torch.linspace(-1, 1, 9, dtype=torch.float64)
    nats = discretized_gaussian_log_likelihood(x, 0.5 * x, torch.full_like(x, -2.0))
    yield _same("nats of a discretised Gaussian", float(nats.sum()), NATS, 1e-10)
    scheduler = DDPMExtScheduler(v_posterior=0.4, prediction_type="v_prediction", clip_sample=False)
    scheduler.set_timesteps(10)
    sample = torch.linspace(-1, 1, 12).reshape(1, 3, 2, 2)
    for t in scheduler.timesteps:
        noise = torch.full_like(sample, 0.5)
        sample = scheduler.step(0.3 * sample, t, sample, variance_noise=noise).prev_sample
    yield _same("ten steps back", float(sample.double().abs().sum()), STEPS, 1e-5)
    torch.manual_seed(0)
    layer = torch.nn.Conv2d(3, 4, 3).eval()
    with torch.no_grad():
        for index, weight in enumerate(layer.parameters()):
            weight.copy_(torch.linspace(-1, 1, weight.numel()).reshape(weight.shape) * (index + 1))
        made = layer(torch.linspace(-1, 1, 3 * 64).reshape(1, 3, 8, 8)).double().square().mean()
    yield _same("a convolution in float32", float(made), CONVOLUTION, 1e-5)


TERMINAL, POSTERIOR, NATS = 4.03582976537568245e-05, 1.005478545132973e-02, -56.310475398118884
STEPS, CONVOLUTION = 9.1107667059481463, 11.52981934420462
"""Recorded from the formulas in 40 digits, and from a convolution written out in float64."""


def _same(name: str, found: float, known: float, tolerance: float) -> Finding:
    off = abs(found - known) / abs(known)
    if off <= tolerance:
        return Finding(" ", f"{name}: {found:.6g}, as recorded")
    return Finding(
        "!", f"{name}: {found:.12g} instead of {known:.12g}: install the pinned torch, or report the platform"
    )


# ---------------------------------------------------------------------- a folder


def _folder(folder: Path) -> Iterator[Finding]:
    from diffusers_ddpm_ext.hub.proof import differences_from_proof, read_proof
    from diffusers_ddpm_ext.pipelines.loading import load_pipeline
    from diffusers_ddpm_ext.training.checkpoints.folders import list_checkpoints
    from diffusers_ddpm_ext.training.checkpoints.manifest import DamagedCheckpoint, verify

    checkpoints = list_checkpoints(folder)
    if (folder / "model_index.json").is_file():
        try:
            pipeline = load_pipeline(str(folder), None, "cpu", "float32")
            size = sum(weight.numel() for weight in pipeline.unet.parameters()) / 1e6
            yield Finding(" ", f"its pipeline opens: {size:.1f} M parameters, {type(pipeline.scheduler).__name__}")
        except ConfigError as error:
            way = "restore it from a checkpoint (--resume_from_checkpoint latest)" if checkpoints else "copy it anew"
            yield Finding("!", f"{' '.join(str(error).split())[:300]}: {way}")
    elif not checkpoints:
        yield Finding("!", "it holds neither a pipeline (model_index.json) nor checkpoints: is it the right folder?")
    else:
        yield Finding("?", "it holds no pipeline yet: go on with --resume_from_checkpoint latest")
    for path in checkpoints:
        try:
            verify(path)
            yield Finding(" ", f"{path.name} is whole")
        except DamagedCheckpoint as error:
            yield Finding("!", f"{error}: --resume_from_checkpoint latest sets it aside and takes the one before")
    try:
        proof = read_proof(folder)
    except ValueError as error:
        yield Finding("!", f"{error}: ddpm-ext push {folder}")
        return
    if proof is not None:
        changed = differences_from_proof(folder, proof)
        text = (
            f"changed since the last push ({changed[0]}): ddpm-ext push {folder}" if changed else "is what was pushed"
        )
        yield Finding("?" if changed else " ", text)
