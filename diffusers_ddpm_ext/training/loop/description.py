"""Description of a run, printed before it starts: plan, memory, disk and parameters."""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from pathlib import Path

from torch import Tensor

from diffusers_ddpm_ext.models.fast_attention import fast_attention_layers
from diffusers_ddpm_ext.training.config.options import EmaOptions
from diffusers_ddpm_ext.training.data.class_table import count_classes, describe_classes
from diffusers_ddpm_ext.training.factory.optimizer import adam_state_bytes
from diffusers_ddpm_ext.training.loop.batches import describe_stream, run_layout
from diffusers_ddpm_ext.training.loop.setup import Setup
from diffusers_ddpm_ext.training.loop.workload import workload_of
from diffusers_ddpm_ext.training.threads import ThreadChoice
from diffusers_ddpm_ext.training.tracking.plan import (
    DiskUsage,
    StateSizes,
    describe_checkpoints,
    describe_learning_rate,
    describe_memory,
    describe_plan,
    parameter_table,
)


def describe_run(setup: Setup, folder: Path | None, threads: ThreadChoice | None = None) -> str:
    """The table of parameters and the plan, to be printed before the first step.

    Args:
        setup: of the run.
        folder: of the run; None in a dry run.
        threads: of a run on a CPU.
    """
    config, plan = setup.config, setup.plan
    ema, loop = config.ema, config.loop
    logvar_rate = config.objective.logvar_learning_rate if setup.learns_logvar else None
    rate = describe_learning_rate(config.optim, plan.effective_batch, logvar_rate)
    device = f"{setup.accelerator.device.type}, {setup.engine}, precision {setup.accelerator.mixed_precision}"
    computing = [name for name in ("gradient_checkpointing", "torch_compile") if getattr(loop, name)]
    sizes = state_sizes(setup)
    place = str(folder or config.output.output_dir or "a new folder")
    rows = [
        ("data", setup.data.description),
        *_stream_rows(setup),
        *workload_of(setup).describe(setup),
        ("learning rate", rate),
        ("EMA", describe_average(ema)),
        ("parameters", f"{sum(parameter.numel() for parameter in setup.network_parameters):,}"),
        ("memory", describe_memory(sizes, plan.processes if setup.is_sharded else 1)),
        ("device", ", ".join([device, *computing])),
        *_attention_rows(setup),
        *([] if threads is None else [("threads", threads.describe())]),
        ("output", place),
        ("checkpoints", describe_checkpoints(disk_usage(setup, sizes, folder))),
    ]
    tables = [parameter_table(setup.trained.network)]
    if classes := count_classes(setup.data):
        tables.append(describe_classes(classes))
    return "\n".join([*tables, describe_plan(plan, rows)])


def _attention_rows(setup: Setup) -> list[tuple[str, str]]:
    """How many attention layers are faster than PyTorch's, as a row of the plan; none without any."""
    count = fast_attention_layers(setup.trained.network)
    layers = f"{count} layer{'s' * (count > 1)}"
    return [("attention", f"{layers} by oneDNN (--fast_attention never: PyTorch's kernel)")] if count else []


def _stream_rows(setup: Setup) -> list[tuple[str, str]]:
    """How the processes share a stream, as a row of the plan; none without a stream."""
    plan, stream = setup.plan, setup.data.stream
    if stream is None:
        return []
    return [("stream", describe_stream(stream.plan(plan.effective_batch), run_layout(setup)))]


def describe_average(options: EmaOptions) -> str:
    """The decay of the EMA, when it is updated, and how it is kept."""
    if not options.use_ema:
        return "off"
    kept: list[str] = [] if options.ema_dtype == "float32" else [options.ema_dtype]
    kept += ["in main memory"] if options.offload_ema else []
    return ", ".join([f"{options.ema_decay:g}, every {options.ema_every.replace('_', '-')}", *kept])


def state_sizes(setup: Setup) -> StateSizes:
    """Bytes of a run's state, without activations, which depend on the batch."""
    parameters = [*setup.network_parameters, *setup.logvar_parameters]
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    modules = [setup.task, *([] if setup.latents is None else [setup.latents.stage.autoencoder])]
    modules += [] if setup.captions is None else [setup.captions.module]
    own = set(map(id, parameters))
    others = {id(t): t for module in modules for t in (*module.parameters(), *module.buffers()) if id(t) not in own}
    average = [] if setup.ema is None else list(setup.ema.shadow.values())
    return StateSizes(
        parameters=sum(parameter.numel() for parameter in parameters),
        weights=_bytes(parameters),
        gradients=_bytes(trained),
        optimizer=adam_state_bytes((p.numel() for p in trained), setup.config.optim.use_8bit_adam),
        average=_bytes(average),
        frozen=_bytes(others.values()),
        is_offloaded=bool(average) and average[0].device != parameters[0].device,
    )


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def disk_usage(setup: Setup, sizes: StateSizes, folder: Path | None) -> DiskUsage:
    """Disk space that a run's checkpoints need, and that is free."""
    options, output = setup.config.checkpoint, setup.config.output
    every = options.checkpointing_steps
    written = 1 + (0 if every is None else (setup.plan.steps - 1) // every)
    kept = written if options.checkpoints_total_limit is None else min(written, options.checkpoints_total_limit)
    best = 0 if setup.monitor is None else setup.config.monitoring.save_top_k
    place = Path(folder or output.output_dir or ".").absolute()
    while not place.exists():
        place = place.parent
    return DiskUsage(sizes.weights + sizes.optimizer + sizes.average, kept + best, shutil.disk_usage(place).free)
