"""What a run says before it starts: one plan, and where the parameters are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from diffusers_ddpm_ext.diffusion.schedule import NoiseSchedule
from diffusers_ddpm_ext.training.config.options import OptimOptions, ScheduleOptions
from diffusers_ddpm_ext.training.factory.optimizer import scale_learning_rate
from diffusers_ddpm_ext.utils.vocabulary import TO_COMPVIS_BETA_SCHEDULE, TO_COMPVIS_PREDICTION_TYPE

SLOW_ON_CPU = 20_000_000  # parameters; that many take seconds a step at 64x64
SIGNAL_LEFT = 0.1  # of the amplitude after the last step; Stable Diffusion's schedule leaves 0.068


@dataclass(frozen=True)
class Plan:
    """How far a run goes and in what portions, all in optimizer steps.

    Attributes:
        batch: images of one device and forward pass.
        accumulation: forward passes of an optimizer step.
        processes: devices.
        steps: optimizer steps of the run.
        images: size of the training set.
    """

    batch: int
    accumulation: int
    processes: int
    steps: int
    images: int

    @property
    def effective_batch(self) -> int:
        """Images of one optimizer step."""
        return self.batch * self.accumulation * self.processes

    @property
    def epochs(self) -> float:
        """Passes over the images."""
        return self.steps * self.effective_batch / self.images

    def epoch(self, step: int) -> int:
        """Epochs that are complete after ``step`` optimizer steps."""
        return step * self.effective_batch // self.images


def steps_for_epochs(epochs: int, images: int, effective_batch: int) -> int:
    """Optimizer steps that complete so many epochs of one endless stream of images."""
    return -(-epochs * images // effective_batch)


def describe_schedule(options: ScheduleOptions) -> str:
    """The schedule in both vocabularies, Diffusers' first."""
    if options.trained_betas is not None:
        count = len(options.trained_betas)
        betas, compvis = f"{count} trained_betas", f"{count} given_betas"
    else:
        name = options.beta_schedule
        ends = f" {options.beta_start:g} to {options.beta_end:g}"
        shape = f" s={options.cosine_s:g}" if name == "squaredcos_cap_v2" else ends if name != "laplace" else ""
        betas = f"{name}{shape}, T={options.num_train_timesteps}"
        compvis = TO_COMPVIS_BETA_SCHEDULE.get(name, "given_betas")
    if options.rescale_betas_zero_snr:
        betas, compvis = f"{betas}, zero terminal SNR", "given_betas"
    prediction = options.prediction_type
    return f"{betas}, predicts {prediction} (CompVis: {compvis}, {TO_COMPVIS_PREDICTION_TYPE[prediction]})"


def schedule_warning(schedule: NoiseSchedule) -> str | None:
    """What is to be said of a schedule that ends before the image is gone, as betas made for 1,000 steps do in 100.

    Args:
        schedule: the training's.

    Returns:
        A sentence with the way out; None where at most ``SIGNAL_LEFT`` of the image's amplitude is left.
    """
    signal = float(schedule.sqrt_alphas_cumprod[-1])
    if signal <= SIGNAL_LEFT:
        return None
    return (
        f"after the last of the {len(schedule)} steps {signal:.0%} of the image's amplitude is left, but sampling "
        "begins from noise alone, which it never sees: use --beta_schedule squaredcos_cap_v2, larger betas "
        "(--beta_end), or, unless noise is predicted, --rescale_betas_zero_snr"
    )


def model_size_warning(parameters: int, device: str, size: tuple[int, int]) -> str | None:
    """What is to be said of a network that is too large for a processor.

    Args:
        parameters: that are trained.
        device: its type.
        size: height and width of an image, in pixels.

    Returns:
        A sentence with the way out; None where there is nothing to be said.
    """
    if device != "cpu" or parameters < SLOW_ON_CPU or size[0] * size[1] < 32 * 32:
        return None
    return (
        f"{parameters:,} parameters on a CPU take many seconds a step: use an accelerator, or a smaller network, e.g."
        " --block_out_channels 32 64 64 --attention_levels 2 --norm_num_groups 8"
    )


def describe_learning_rate(options: OptimOptions, plan: Plan, logvar_rate: float | None) -> str:
    """The learning rate, how it was scaled, and its course."""
    warmup = f" after {options.lr_warmup_steps} steps of warm-up" if options.lr_warmup_steps else ""
    logvar = f"; logvar {logvar_rate:g}" if logvar_rate is not None else ""
    rate = f"{options.learning_rate:g}"
    if options.lr_scaling != "none":
        factor = {"linear": "effective batch", "sqrt": "root of the effective batch"}[options.lr_scaling]
        scaled = scale_learning_rate(options.learning_rate, options.lr_scaling, plan.effective_batch)
        rate += f" x {factor} {plan.effective_batch} = {scaled:g}"
    return f"{rate} {options.lr_scheduler}{warmup}{logvar}"


@dataclass(frozen=True)
class StateSizes:
    """Bytes of a run's state.

    Attributes:
        weights: of what is trained; its gradients take as much.
        optimizer: two moments.
        average: EMA's.
    """

    weights: int
    optimizer: int
    average: int


@dataclass(frozen=True)
class DiskUsage:
    """What checkpoints take.

    Attributes:
        checkpoint: bytes of one.
        kept: how many there will be at most.
        free: bytes that are free now.
    """

    checkpoint: int
    kept: int
    free: int

    @property
    def is_enough(self) -> bool:
        """Whether they fit, the pipeline and a checkpoint in the writing included."""
        return (self.kept + 2) * self.checkpoint <= self.free


def in_bytes(count: int) -> str:
    """A number of bytes for people, in powers of 1000."""
    size, unit = float(count), 0
    while size >= 999.5 and unit < 4:
        size, unit = size / 1000, unit + 1
    return f"{size:.3g} {('B', 'kB', 'MB', 'GB', 'TB')[unit]}"


def describe_memory(sizes: StateSizes, parts: int) -> str:
    """Memory of weights, gradients, optimizer and EMA, in all and in each process."""
    total = 2 * sizes.weights + sizes.optimizer + sizes.average
    each = f", spread over {parts} processes: {in_bytes(total // parts)} each" if parts > 1 else ""
    weights, optimizer, average = map(in_bytes, (sizes.weights, sizes.optimizer, sizes.average))
    parts_of_it = f"{weights} weights + {weights} gradients + {optimizer} optimizer + {average} EMA"
    return f"{parts_of_it} = {in_bytes(total)}{each}, and activations"


def describe_checkpoints(disk: DiskUsage) -> str:
    """Checkpoints against the disk."""
    need = f"{disk.kept} of {in_bytes(disk.checkpoint)} = {in_bytes(disk.kept * disk.checkpoint)} at most"
    advice = "" if disk.is_enough else ": NOT ENOUGH, set --checkpoints_total_limit or make room"
    return f"{need}; {in_bytes(disk.free)} free{advice}"


def count_params(module: nn.Module) -> dict[str, int]:
    """Number of parameters of each top-level part of a module, parts without any left out."""
    counts = {name: sum(p.numel() for p in part.parameters()) for name, part in module.named_children()}
    own = sum(p.numel() for p in module.parameters(recurse=False))
    return {name: count for name, count in (counts | {"(own)": own}).items() if count}


def table(rows: Sequence[tuple[str, str]], indent: str = "  ") -> str:
    """Two columns of text, the first as wide as it must be."""
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{indent}{name:<{width}}  {value}" for name, value in rows)


def parameter_table(module: nn.Module) -> str:
    """Parameters per top-level module, and their sum."""
    counts = count_params(module)
    digits = len(f"{sum(counts.values()):,}")
    rows = [(name, f"{count:>{digits},}") for name, count in (*counts.items(), ("total", sum(counts.values())))]
    return "parameters\n" + table(rows)


def describe_plan(plan: Plan, rows: Sequence[tuple[str, str]]) -> str:
    """The plan of a run.

    Args:
        plan: its portions.
        rows: what else there is to say, by name: data, schedule, ...

    Returns:
        Lines to print.
    """
    batch = (
        f"{plan.batch} a device x {plan.accumulation} accumulated x {plan.processes} "
        f"process{'es' if plan.processes > 1 else ''} = {plan.effective_batch}"
    )
    length = f"{plan.steps:,} optimizer steps, {plan.epochs:.3g} epochs of {plan.images:,} images"
    return "plan\n" + table([*rows, ("batch", batch), ("length", length)])
