"""The plan of a run, printed before it starts: its length, memory, disk space and parameters."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from diffusers_ddpm_ext.diffusion.schedule import NoiseSchedule
from diffusers_ddpm_ext.training.config.options import ObjectiveOptions, OptimOptions, ScheduleOptions
from diffusers_ddpm_ext.training.factory.optimizer import scale_learning_rate
from diffusers_ddpm_ext.utils.vocabulary import TO_COMPVIS_BETA_SCHEDULE, TO_COMPVIS_PREDICTION_TYPE

SMALLER = "--block_out_channels 32 64 64 --attention_levels 2 --norm_num_groups 8"
SLOW_ON_CPU = 20_000_000  # parameters; they take seconds per step at 64x64
MANY_EPOCHS = 1000
MAX_TERMINAL_SIGNAL = 0.1  # of the amplitude after the last step; Stable Diffusion's schedule leaves 0.068


@dataclass(frozen=True)
class Plan:
    """The length of a run and its batches, in optimizer steps.

    Attributes:
        batch: images per device and forward pass.
        accumulation: micro-batches per optimizer step.
        processes: number of processes.
        steps: optimizer steps of the run.
        images: size of the training set; None for a stream.
    """

    batch: int
    accumulation: int
    processes: int
    steps: int
    images: int | None

    @property
    def effective_batch(self) -> int:
        """Images per optimizer step."""
        return self.batch * self.accumulation * self.processes

    @property
    def epochs(self) -> float:
        """Number of passes over the images; 0 for a stream."""
        return 0.0 if self.images is None else self.steps * self.effective_batch / self.images

    def epoch(self, step: int) -> int:
        """Epochs that are complete after ``step`` optimizer steps; 0 for a stream."""
        return 0 if self.images is None else step * self.effective_batch // self.images


@dataclass(frozen=True)
class Trial:
    """What a few steps took on this machine.

    Attributes:
        seconds: of one optimizer step; None where its memory was not enough.
        image_bytes: of memory that each image of a batch needs; None where that was not measured.
        free_bytes: of memory; 0 where that is unknown.
        is_extrapolated: whether the time is that of one image, times their number.
    """

    seconds: float | None
    image_bytes: int | None
    free_bytes: int
    is_extrapolated: bool

    @property
    def largest_batch(self) -> int | None:
        """The largest power of two of images that fits; 0 where none does, None where that is unknown."""
        if not self.image_bytes or not self.free_bytes:
            return None
        images = self.free_bytes // self.image_bytes
        return 2 ** (images.bit_length() - 1) if images else 0


def steps_for_epochs(epochs: int, images: int, effective_batch: int) -> int:
    """Optimizer steps that complete a number of epochs."""
    return -(-epochs * images // effective_batch)


def describe_schedule(options: ScheduleOptions) -> str:
    """The noise schedule under Diffusers' names and CompVis'."""
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


def describe_loss(options: ObjectiveOptions, weighting: str) -> str:
    """The loss, its log-variances and its weights."""
    text = f"{options.loss_type}, logvar {'learned' if options.learn_logvar else options.logvar_init}"
    if weighting != "simple":
        gamma = "" if options.snr_gamma is None else f" {options.snr_gamma:g}"
        text += f", weights {weighting}{gamma}"
    if options.timestep_sampler != "uniform":
        text += f", steps {options.timestep_sampler}"
    if options.original_elbo_weight:
        text += f", {options.original_elbo_weight:g} x {options.elbo_weights} ELBO"
    return text


def schedule_warning(schedule: NoiseSchedule) -> str | None:
    """Warn of a schedule that leaves more than ``MAX_TERMINAL_SIGNAL``, as betas for 1,000 steps do in 100."""
    signal = float(schedule.sqrt_alphas_cumprod[-1])
    if signal <= MAX_TERMINAL_SIGNAL:
        return None
    return (
        f"after the last of the {len(schedule)} steps {signal:.0%} of the image's amplitude is left, but sampling "
        "starts from pure noise, which training never sees: use --beta_schedule squaredcos_cap_v2, larger betas "
        "(--beta_end), or, unless noise is predicted, --rescale_betas_zero_snr"
    )


def clipping_warning(options: ScheduleOptions, in_latents: bool) -> str | None:
    """Warn of sampling that clips latents, which have no bounds, to less than most schedules leave of them."""
    if not in_latents or not (options.clip_sample or options.thresholding):
        return None
    name = "--thresholding" if options.thresholding else f"--clip_sample to {options.clip_sample_range:g}"
    return (
        f"{name} cuts off latents while sampling, which have no bounds: leave it out, or use a range of several times"
        " their standard deviation, about 1"
    )


def model_size_warning(parameters: int, device: str, size: tuple[int, int], smaller: str) -> str | None:
    """Warn of a network with too many parameters for images of that height and width on a CPU.

    ``smaller`` are the options of a smaller one.
    """
    if device != "cpu" or parameters < SLOW_ON_CPU or size[0] * size[1] < 32 * 32:
        return None
    return (
        f"{parameters:,} parameters on a CPU take many seconds per step: use an accelerator, or a smaller network,"
        f" e.g. {smaller}"
    )


def warmup_warning(options: OptimOptions, steps: int) -> str | None:
    """Warn of a warm-up that ends after the run, so that the learning rate never reaches its value."""
    warmup = options.lr_warmup_steps
    if warmup < steps or not warmup:
        return None
    return (
        f"the warm-up of {warmup:,} steps is not over when the run of {steps:,} steps ends, so that the learning rate"
        f" never reaches {options.learning_rate:g}: use --lr_warmup_steps {steps // 10}, or a longer run"
    )


def epochs_warning(plan: Plan) -> str | None:
    """Warn of a run that sees each image ``MANY_EPOCHS`` times or more, as one on a handful of images does."""
    if plan.images is None or plan.epochs < MANY_EPOCHS:
        return None
    steps = steps_for_epochs(MANY_EPOCHS // 10, plan.images, plan.effective_batch)
    return (
        f"{plan.epochs:,.0f} epochs of {plan.images:,} images: a network that sees each image so often memorizes them;"
        f" use more images, or fewer steps (--max_train_steps {steps:,} are {MANY_EPOCHS // 10} epochs)"
    )


def describe_learning_rate(options: OptimOptions, effective_batch: int, logvar_learning_rate: float | None) -> str:
    """The learning rate, its scaling and its schedule."""
    warmup = f" after {options.lr_warmup_steps} steps of warm-up" if options.lr_warmup_steps else ""
    logvar = f"; logvar {logvar_learning_rate:g}" if logvar_learning_rate is not None else ""
    learning_rate = f"{options.learning_rate:g}"
    if options.lr_scaling != "none":
        factor = {"linear": "effective batch", "sqrt": "root of the effective batch"}[options.lr_scaling]
        scaled = scale_learning_rate(options.learning_rate, options.lr_scaling, effective_batch)
        learning_rate += f" x {factor} {effective_batch} = {scaled:g}"
    return f"{learning_rate} {options.lr_scheduler}{warmup}{logvar}"


@dataclass(frozen=True)
class StateSizes:
    """Sizes of a run's state, in bytes, once it has taken a step.

    Attributes:
        parameters: number of trained values; not bytes.
        weights: trained parameters.
        gradients: of these, between the backward pass and the update.
        optimizer: moments.
        average: EMA weights.
        frozen: networks that are not trained, and tables.
        is_offloaded: whether the average is in main memory, and the network elsewhere.
    """

    parameters: int
    weights: int
    gradients: int
    optimizer: int
    average: int
    frozen: int
    is_offloaded: bool

    @property
    def on_device(self) -> int:
        """All of it that is on the network's device."""
        return self.weights + self.gradients + self.optimizer + self.frozen + (self.average, 0)[self.is_offloaded]


@dataclass(frozen=True)
class DiskUsage:
    """Disk space of a run's checkpoints.

    Attributes:
        checkpoint: bytes of one checkpoint.
        kept: largest number of checkpoints kept at a time.
        free: free bytes.
    """

    checkpoint: int
    kept: int
    free: int

    @property
    def is_enough(self) -> bool:
        """Whether they fit, including the pipeline and a checkpoint that is being written."""
        return (self.kept + 2) * self.checkpoint <= self.free


def format_bytes(count: int) -> str:
    """A number of bytes with three digits and a unit, in powers of 1000."""
    size, unit = float(count), 0
    while size >= 999.5 and unit < 4:
        size, unit = size / 1000, unit + 1
    return f"{size:.3g} {('B', 'kB', 'MB', 'GB', 'TB')[unit]}"


def describe_memory(sizes: StateSizes, shards: int) -> str:
    """Memory of weights, gradients, optimizer and EMA, in total, per parameter, and per process."""
    total = sizes.on_device
    each = f", sharded over {shards} processes: {format_bytes(total // shards)} each" if shards > 1 else ""
    terms = [("weights", sizes.weights), ("gradients", sizes.gradients), ("optimizer", sizes.optimizer)]
    terms += [("EMA", sizes.average)] if sizes.average and not sizes.is_offloaded else []
    terms += [("frozen", sizes.frozen)] if sizes.frozen > total / 1000 else []  # else it is tables alone
    text = " + ".join(f"{format_bytes(size)} {name}" for name, size in terms)
    offloaded = f"; {format_bytes(sizes.average)} EMA in main memory" if sizes.is_offloaded else ""
    per_parameter = f"{total / sizes.parameters:.3g} bytes per parameter"
    return f"{text} = {format_bytes(total)}{each} ({per_parameter}), and activations{offloaded}"


def describe_checkpoints(disk: DiskUsage) -> str:
    """Disk space that checkpoints need, and that is free."""
    need = f"{disk.kept} of {format_bytes(disk.checkpoint)} = {format_bytes(disk.kept * disk.checkpoint)} at most"
    advice = "" if disk.is_enough else ": NOT ENOUGH, set --checkpoints_total_limit or free disk space"
    return f"{need}; {format_bytes(disk.free)} free{advice}"


def format_table(rows: Sequence[tuple[str, str]]) -> str:
    """Two aligned columns of text."""
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"  {name:<{width}}  {value}" for name, value in rows)


def parameter_table(module: nn.Module) -> str:
    """Number of parameters of each submodule that has any, and their sum."""
    counts = {name: sum(p.numel() for p in child.parameters()) for name, child in module.named_children()}
    counts["(own)"] = sum(p.numel() for p in module.parameters(recurse=False))
    total = sum(counts.values())
    width = len(f"{total:,}")
    rows = [(name, f"{count:>{width},}") for name, count in (*counts.items(), ("total", total)) if count]
    return "parameters\n" + format_table(rows)


def describe_trial(trial: Trial, plan: Plan) -> str:
    """The time and the memory of a run, from a trial, as lines to print."""
    if trial.seconds is None:
        smaller = f"--train_batch_size {max(plan.batch // 2, 1)} --gradient_accumulation_steps {plan.accumulation * 2}"
        return "trial\n" + format_table([("memory", f"NOT ENOUGH for --train_batch_size {plan.batch}: try {smaller}")])
    how = "from one image" if trial.is_extrapolated else "the fastest of three steps"
    speed = f"{trial.seconds:.3g} s per step, {plan.effective_batch / trial.seconds:.3g} images/s ({how})"
    total = f"{format_duration(plan.steps * trial.seconds)} for {plan.steps:,} steps, without validation and previews"
    rows = [("time", speed), ("total", total)]
    batch = trial.largest_batch
    if batch is not None and trial.image_bytes is not None:
        need = f"{format_bytes(trial.image_bytes)} per image of a batch, {format_bytes(trial.free_bytes)} free"
        fits = f"up to --train_batch_size {batch} fits" if batch >= plan.batch else f"{plan.batch:,} images do NOT fit"
        rows.append(("activations", f"about {need}: {fits}"))
    return "trial\n" + format_table(rows)


def format_duration(seconds: float) -> str:
    """A duration in the unit that fits: ``40 seconds``, ``3.5 hours``, ``12 days``."""
    for unit, length in (("days", 86_400), ("hours", 3_600), ("minutes", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.2g} {unit}"
    return f"{seconds:.2g} seconds" if seconds < 10 else f"{seconds:.0f} seconds"


def describe_plan(plan: Plan, rows: Sequence[tuple[str, str]]) -> str:
    """The plan of a run as lines to print: rows of names and texts, then batch and length."""
    batch = (
        f"{plan.batch} per device x {plan.accumulation} accumulated x {plan.processes} "
        f"process{'es' if plan.processes > 1 else ''} = {plan.effective_batch}"
    )
    if plan.images is None:
        size = f"{plan.steps * plan.effective_batch:,} images of a stream"
    else:
        size = f"{plan.epochs:.3g} epochs of {plan.images:,} images"
    length = f"{plan.steps:,} optimizer steps, {size}"
    return "plan\n" + format_table([*rows, ("batch", batch), ("length", length)])
