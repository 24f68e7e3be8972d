"""What a run says before it starts: one plan, and where the parameters are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from diffusers_ddpm_ext.training.options import OptimOptions, ScheduleOptions

COMPVIS_BETAS = {"scaled_linear": "linear", "linear": "sqrt_linear", "squaredcos_cap_v2": "cosine", "sqrt": "sqrt"}
COMPVIS_PREDICTIONS = {"epsilon": "eps", "sample": "x0", "v_prediction": "v"}


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


def steps_of(epochs: int, images: int, effective_batch: int) -> int:
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
        compvis = COMPVIS_BETAS.get(name, "given_betas")
    if options.rescale_betas_zero_snr:
        betas, compvis = f"{betas}, zero terminal SNR", "given_betas"
    prediction = options.prediction_type
    return f"{betas}, predicts {prediction} (CompVis: {compvis}, {COMPVIS_PREDICTIONS[prediction]})"


def describe_rate(options: OptimOptions, logvar_rate: float | None) -> str:
    """The learning rate and its course."""
    warmup = f" after {options.lr_warmup_steps} steps of warm-up" if options.lr_warmup_steps else ""
    logvar = f"; logvar {logvar_rate:g}" if logvar_rate is not None else ""
    return f"{options.learning_rate:g} {options.lr_scheduler}{warmup}{logvar}"


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
