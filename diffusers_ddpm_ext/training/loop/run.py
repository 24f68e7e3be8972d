"""A run: all of its state in one place, and how it comes to be."""

from __future__ import annotations

import shutil
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import DynamoBackend, broadcast_object_list
from diffusers import UNet2DModel
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from diffusers_ddpm_ext.errors import ConfigError, as_config_error, warn
from diffusers_ddpm_ext.losses.checks import BOUND_LOSSES
from diffusers_ddpm_ext.models.ema import LitEMA
from diffusers_ddpm_ext.training.checkpoints.lock import FolderLock
from diffusers_ddpm_ext.training.checkpoints.output_dir import acquire_output_dir, check_output_dir
from diffusers_ddpm_ext.training.config.checks import tracker_names
from diffusers_ddpm_ext.training.config.train_config import TrainConfig
from diffusers_ddpm_ext.training.data.dataset import ImageData, load_data
from diffusers_ddpm_ext.training.distributed import (
    any_rank,
    fail_together,
    fsdp_requested,
    make_accelerator,
    sum_over_ranks,
)
from diffusers_ddpm_ext.training.evaluation.processes import Processes
from diffusers_ddpm_ext.training.factory.optimizer import (
    adamw,
    adamw_8bit,
    lr_schedule,
    parameter_groups,
    scale_learning_rate,
)
from diffusers_ddpm_ext.training.factory.parts import Parts, build_ema, build_parts
from diffusers_ddpm_ext.training.factory.task import DenoisingTask
from diffusers_ddpm_ext.training.factory.warm_start import initialize_ema, load_initial_weights
from diffusers_ddpm_ext.training.loop.hub_publisher import Publisher, check_token, fetch_run
from diffusers_ddpm_ext.training.signals import SignalRequests
from diffusers_ddpm_ext.training.tracking.monitor import Monitor
from diffusers_ddpm_ext.training.tracking.plan import (
    DiskUsage,
    Plan,
    StateSizes,
    describe_checkpoints,
    describe_learning_rate,
    describe_memory,
    describe_plan,
    describe_schedule,
    model_size_warning,
    parameter_table,
    schedule_warning,
    steps_for_epochs,
)
from diffusers_ddpm_ext.training.tracking.step_losses import LossMeter
from diffusers_ddpm_ext.utils.dtensor import full_tensor, is_sharded


@dataclass
class Run:
    """All there is of a run.

    Attributes:
        config: as parsed.
        accelerator: device, precision and processes.
        data: the images.
        parts: network, scheduler and objective, free of wrappers.
        plan: how far to go.
        task: network and objective as prepared by Accelerate.
        optimizer: as prepared by Accelerate.
        lr_scheduler: stepped once per optimizer step, whatever the processes and micro-batches.
        ema: the moving average, None where there is none.
        folder: of the run; None until it is taken.
        lock: that keeps the folder this run's alone; in the first process.
        step: optimizer steps done.
        todo: what the present step still calls for, in order; in every checkpoint.
        metrics_size: bytes of the metrics that belong to the run's past when it goes on.
        stopped_early: whether the monitor's patience is used up.
        recoveries: steps in a row that were left out, or returns to the same checkpoint.
        monitor: follows the validations, None where nothing is monitored.
        last_row: numbers of the step that was read last.
        requests: what signals have asked for.
        meter: losses not read back from the device yet.
        start_is_missing: whether ``ckpt_path`` was not found, which a run that goes on does without.
        publisher: pushes the folder to the Hub, in the first process where that was asked for.
    """

    config: TrainConfig
    accelerator: Accelerator
    data: ImageData
    parts: Parts
    plan: Plan
    task: nn.Module
    optimizer: torch.optim.Optimizer
    lr_scheduler: LambdaLR
    ema: LitEMA | None
    folder: Path | None = None
    lock: FolderLock | None = None
    step: int = 0
    todo: list[str] = field(default_factory=list)
    metrics_size: int = 0
    stopped_early: bool = False
    recoveries: int = 0
    monitor: Monitor | None = None
    last_row: dict[str, float] = field(default_factory=dict)
    requests: SignalRequests = field(default_factory=SignalRequests)
    meter: LossMeter = field(default_factory=LossMeter)
    start_is_missing: bool = False
    publisher: Publisher | None = None

    @property
    def seed(self) -> int:
        """Of everything random."""
        return self.config.loop.seed

    @property
    def denoiser(self) -> UNet2DModel:
        """The network with its raw weights, free of wrappers."""
        return self.parts.denoiser

    @cached_property
    def network(self) -> list[nn.Parameter]:
        """The network's parameters; found once, since walking the modules takes a while."""
        return list(self.parts.denoiser.parameters())

    @property
    def taken_folder(self) -> Path:
        """The run's folder, once it is there."""
        assert self.folder is not None
        return self.folder

    @property
    def num_train_timesteps(self) -> int:
        """Length T of the chain."""
        return self.parts.objective.schedule.num_train_timesteps

    @property
    def learns_logvar(self) -> bool:
        """Whether log-variances are learned."""
        return self.parts.objective.learn_logvar

    @cached_property
    def logvar_parameters(self) -> list[nn.Parameter]:
        """Those of the log-variances; none where they are not learned."""
        return list(self.parts.objective.parameters())

    @property
    def is_sharded(self) -> bool:
        """Whether the network is spread over the processes, so that none can use it alone."""
        return any(map(is_sharded, self.network))

    @property
    def processes(self) -> Processes:
        """How the processes share a measurement."""
        accelerator, lockstep = self.accelerator, self.is_sharded

        def stopped() -> bool:
            own = bool(self.requests.stopped_by)
            return any_rank(accelerator, own) if lockstep else own

        return Processes(
            accelerator.process_index,
            accelerator.num_processes,
            accelerator.device,
            lambda tensor: sum_over_ranks(accelerator, tensor),
            stopped,
            lockstep,
        )


@torch.no_grad()
def take_logvar(run: Run) -> Tensor | None:
    """The learned log-variances as they are now, (T,); None where they are not learned. All processes enter."""
    objective = run.parts.objective
    if not objective.learn_logvar:
        return None
    network = objective.logvar_network
    return (
        full_tensor(objective.logvar.detach())
        if network is None
        else network.table(full_tensor(network.weights.detach()))
    )


def start(config: TrainConfig) -> Run:
    """Read the images and build everything. Nothing is written.

    Args:
        config: as parsed.

    Returns:
        The run before its first step.

    Raises:
        ConfigError: an option that cannot be met, with its name; in the first process that found one.
    """
    loop = config.loop
    trackers = [] if loop.dry_run else tracker_names(config.output.report_to)
    accelerator = make_accelerator(loop.mixed_precision, loop.gradient_accumulation_steps, trackers)
    with fail_together(accelerator):
        if accelerator.is_main_process:
            check_output_dir(config.output, config.resumes)
        check_token(config.hub)
        data = load_data(config.data, config.model.conditioning_key, progress=accelerator.is_main_process)
        parts = build_parts(config, data.train)
        data = replace(data, train=replace(data.train, dropout=parts.dropout))
        plan = make_plan(config, len(data.train), accelerator.num_processes)
        initial = load_initial_weights(config, parts.denoiser, parts.objective)
        task = DenoisingTask(parts.denoiser, parts.objective, parts.conditioning, parts.sampler).to(accelerator.device)
        ema = build_ema(config.ema, parts.denoiser)
        if initial is not None:
            accelerator.print(initial.describe(None if ema is None else initialize_ema(initial, ema, config.start)))
        prepare_network(config, accelerator, parts.denoiser)
        optimizer = make_optimizer(config, parts, plan)
        with as_config_error("--lr_scheduler"):
            optim = config.optim
            lr_scheduler = lr_schedule(
                optim.lr_scheduler, optimizer, plan.steps, optim.lr_warmup_steps, optim.lr_scheduler_args
            )
    # The scheduler is kept from Accelerate, whose wrapper steps once per process and step.
    wrapped, optimizer = accelerator.prepare(task, optimizer)
    run = Run(config, accelerator, data, parts, plan, wrapped, optimizer, lr_scheduler, ema)
    run.start_is_missing = initial is None and config.start.ckpt_path is not None
    with fail_together(accelerator):
        run.monitor = make_monitor(run)
    if fsdp_requested() and not run.is_sharded and accelerator.is_main_process:
        warn(
            f"FSDP was asked for, but Accelerate made {engine(run)} of it: it has no FSDP on {accelerator.device.type}"
        )
    size = sum(parameter.numel() for parameter in run.network)
    doubts = (
        data.warning,
        schedule_warning(parts.objective.schedule),
        model_size_warning(size, accelerator.device.type, data.size),
    )
    for doubt in doubts:
        if doubt is not None and accelerator.is_main_process:
            warn(doubt)
    return run


def prepare_network(config: TrainConfig, accelerator: Accelerator, denoiser: UNet2DModel) -> None:
    """Say how the network computes: activations kept or not, compiled or not.

    Args:
        config: as parsed.
        accelerator: whose configuration may ask for a compiler; it is taken over here, for the network alone.
        denoiser: on its final device; its weights and their names stay.

    Raises:
        ConfigError: it cannot, or nothing can be compiled here.
    """
    if config.loop.gradient_checkpointing:
        with as_config_error("--gradient_checkpointing"):
            denoiser.enable_gradient_checkpointing()
    plugin = accelerator.state.dynamo_plugin
    asked = plugin.backend not in (None, DynamoBackend.NO)
    if asked or config.loop.torch_compile:
        how = plugin.to_kwargs() if asked else {}
        how.pop("use_regional_compilation", None)
        plugin.backend = DynamoBackend.NO
        with as_config_error("--torch_compile"):  # a missing compiler shows here, not in the first step
            torch.compile(torch.nn.Identity(), **how)(torch.zeros(2, device=denoiser.device))
        denoiser.compile(**how)  # in place: no wrapper, whose name would be in every checkpoint


def engine(run: Run) -> str:
    """What spreads the work over the processes."""
    if run.is_sharded:
        return "FSDP2"
    return "DDP" if run.plan.processes > 1 else "one process"


def metrics(run: Run) -> list[str]:
    """Names that the run logs at a validation, and that can be monitored."""
    kinds = ["loss", "loss_simple", "loss_vlb"]
    names = [f"train/{kind}" for kind in kinds]
    if run.config.objective.loss_type in BOUND_LOSSES:
        names.append("train/loss_bound")
    if run.learns_logvar:
        names += ["train/loss_gamma", "logvar"]
    if run.config.validation.validation_bpd:
        kinds.append("bpd")
    if run.data.validation is not None:
        names += [f"val/{kind}{suffix}" for suffix in ("", "_ema")[: 1 + (run.ema is not None)] for kind in kinds]
    return names


def make_monitor(run: Run) -> Monitor | None:
    """What decides on the best checkpoints; None without validation images, where nobody asked for it."""
    options = run.config.monitoring
    name = options.monitor
    if name is None and run.data.validation is None:
        if options.early_stopping_patience is not None:
            raise ConfigError(
                "--early_stopping_patience needs a metric: hold out images for validation, or name a --monitor"
            )
        return None
    name = name or ("val/loss_simple" if run.ema is None else "val/loss_simple_ema")
    if name not in metrics(run):
        raise ConfigError(f"--monitor {name} is not logged in this run: choose one of {', '.join(metrics(run))}")
    return Monitor(
        name,
        options.monitor_mode,
        options.save_top_k,
        options.early_stopping_patience,
        options.early_stopping_min_delta,
    )


def make_plan(config: TrainConfig, images: int, processes: int) -> Plan:
    """How far to go, in optimizer steps.

    Args:
        config: as parsed.
        images: size of the training set.
        processes: of the run.

    Returns:
        The plan; ``max_train_steps`` wins over ``num_epochs``.
    """
    loop = config.loop
    effective_batch = loop.train_batch_size * loop.gradient_accumulation_steps * processes
    if loop.max_train_steps is not None:
        steps = loop.max_train_steps
    elif loop.num_epochs is not None:
        steps = steps_for_epochs(loop.num_epochs, images, effective_batch)
    else:
        raise ConfigError("the run has no end: give --max_train_steps or --num_epochs")
    return Plan(loop.train_batch_size, loop.gradient_accumulation_steps, processes, steps, images)


def make_optimizer(config: TrainConfig, parts: Parts, plan: Plan) -> torch.optim.Optimizer:
    """AdamW over the network and, in a group of its own, the log-variances.

    Args:
        config: as parsed.
        parts: on their final device.
        plan: whose effective batch may scale the rate.

    Returns:
        The optimizer.

    Raises:
        ConfigError: it is not to be had here.
    """
    optim = config.optim
    groups = parameter_groups(
        parts.denoiser.parameters(),
        parts.objective.parameters(),
        optim.adam_weight_decay,
        config.objective.logvar_learning_rate,
    )
    rate = scale_learning_rate(optim.learning_rate, optim.lr_scaling, plan.effective_batch)
    make = adamw_8bit if optim.use_8bit_adam else adamw
    with as_config_error("--use_8bit_adam" if optim.use_8bit_adam else ""):
        return make(groups, rate, (optim.adam_beta1, optim.adam_beta2), optim.adam_epsilon)


def describe(run: Run) -> str:
    """What the run is going to do, to be printed before it does.

    Args:
        run: before its first step.

    Returns:
        The plan and the table of parameters.
    """
    config = run.config
    objective, ema = config.objective, config.ema
    loss = f"{objective.loss_type}, logvar {'learned' if objective.learn_logvar else objective.logvar_init}"
    if run.parts.objective.loss_weighting != "simple":
        gamma = "" if objective.snr_gamma is None else f" {objective.snr_gamma:g}"
        loss += f", weights {run.parts.objective.loss_weighting}{gamma}"
    if objective.timestep_sampler != "uniform":
        loss += f", steps {objective.timestep_sampler}"
    if objective.original_elbo_weight:
        loss += f", {objective.original_elbo_weight:g} x {objective.elbo_weights} ELBO"
    rate = describe_learning_rate(
        config.optim, run.plan.effective_batch, objective.logvar_learning_rate if objective.learn_logvar else None
    )
    threads = torch.get_num_threads()
    device = f"{run.accelerator.device.type}, {engine(run)}, precision {run.accelerator.mixed_precision}"
    loop = config.loop
    computing = [name for name in ("gradient_checkpointing", "torch_compile") if getattr(loop, name)]
    average = f"{ema.ema_decay:g}, every {ema.ema_every.replace('_', '-')}" if ema.use_ema else "off"
    rows = [
        ("data", run.data.description),
        ("schedule", describe_schedule(config.schedule)),
        ("loss", loss),
        ("learning rate", rate),
        ("EMA", average),
        ("parameters", f"{sum(parameter.numel() for parameter in run.network):,}"),
        ("memory", describe_memory(sizes_of(run), run.plan.processes if run.is_sharded else 1)),
        ("device", ", ".join([f"{device}, {threads} thread{'s' if threads > 1 else ''}", *computing])),
        ("output", str(run.folder or config.output.output_dir or "a fresh folder")),
        ("checkpoints", describe_checkpoints(disk_of(run))),
    ]
    return f"{parameter_table(run.denoiser)}\n{describe_plan(run.plan, rows)}"


def sizes_of(run: Run) -> StateSizes:
    """Bytes of a run's state; activations, which depend on the batch, not counted."""
    parameters = [*run.network, *run.logvar_parameters]
    weights = sum(parameter.numel() * parameter.element_size() for parameter in parameters)
    moments = 2 * sum(parameter.numel() for parameter in parameters) if run.config.optim.use_8bit_adam else 2 * weights
    average = 0 if run.ema is None else sum(s.numel() * s.element_size() for s in run.ema.shadow.values())
    return StateSizes(weights, moments, average)


def disk_of(run: Run) -> DiskUsage:
    """What a run's checkpoints take of the disk, and what is free there."""
    options, plan = run.config.checkpoint, run.plan
    every = options.checkpointing_steps
    written = 1 + (0 if every is None else (plan.steps - 1) // every)
    kept = written if options.checkpoints_total_limit is None else min(written, options.checkpoints_total_limit)
    best = 0 if run.monitor is None else run.config.monitoring.save_top_k
    folder = Path(run.folder or run.config.output.output_dir or ".").absolute()
    while not folder.exists():
        folder = folder.parent
    sizes = sizes_of(run)
    return DiskUsage(sizes.weights + sizes.optimizer + sizes.average, kept + best, shutil.disk_usage(folder).free)


def take_folder(run: Run) -> Path:
    """Make the run's folder, or take the one that a run is to go on in, and lock it.

    Args:
        run: before its first step; it knows its folder afterwards.

    Returns:
        The folder.

    Raises:
        ConfigError: it cannot be had; in the first process.
    """
    accelerator = run.accelerator
    names: list[str | None] = [None]
    with fail_together(accelerator):
        if accelerator.is_main_process:
            folder, run.lock = acquire_output_dir(run.config.data, run.config.output, run.config.resumes)
            if run.config.hub.resume_from_hub is not None:
                accelerator.print(fetch_run(run.config.hub.resume_from_hub, folder))
            names = [str(folder)]
    broadcast_object_list(names)
    run.folder = Path(str(names[0]))
    return run.folder
