"""Setup of a training run: every object that is built once, before the first step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from accelerate import Accelerator
from diffusers import UNet2DModel
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from diffusers_ddpm_ext.errors import ConfigError, as_config_error, warn
from diffusers_ddpm_ext.models.ema import LitEMA
from diffusers_ddpm_ext.training.checkpoints.output_dir import check_output_dir
from diffusers_ddpm_ext.training.config.autoencoder_config import AutoencoderConfig
from diffusers_ddpm_ext.training.config.checks import tracker_names
from diffusers_ddpm_ext.training.config.options import LoopOptions, OptimOptions
from diffusers_ddpm_ext.training.config.train_config import TrainConfig
from diffusers_ddpm_ext.training.data.caption_encoder import CaptionEncoder
from diffusers_ddpm_ext.training.data.conditions import check_precision
from diffusers_ddpm_ext.training.data.dataset import ImageData, load_data
from diffusers_ddpm_ext.training.data.image_set import ImageSet
from diffusers_ddpm_ext.training.data.latents import LatentEncoder, SampleSet, sample_set
from diffusers_ddpm_ext.training.data.preview_format import with_preview
from diffusers_ddpm_ext.training.distributed import (
    any_rank,
    fail_together,
    fsdp_requested,
    keep_own_buffers,
    make_accelerator,
    sum_over_ranks,
)
from diffusers_ddpm_ext.training.evaluation.processes import Processes
from diffusers_ddpm_ext.training.evaluation.sample_scores import SampleScores, build_sample_scores
from diffusers_ddpm_ext.training.factory.acceleration import prepare_network, uses_channels_last
from diffusers_ddpm_ext.training.factory.autoencoder import AutoencoderParts, build_autoencoder_parts
from diffusers_ddpm_ext.training.factory.first_stage import build_latent_encoder, data_options
from diffusers_ddpm_ext.training.factory.optimizer import (
    adamw,
    adamw_8bit,
    lr_schedule,
    parameter_groups,
    scale_learning_rate,
)
from diffusers_ddpm_ext.training.factory.parts import Parts, build_ema, build_parts
from diffusers_ddpm_ext.training.factory.text_encoder import build_caption_encoder
from diffusers_ddpm_ext.training.factory.trainable import Trainable
from diffusers_ddpm_ext.training.factory.warm_start import initialize_ema, load_initial_weights
from diffusers_ddpm_ext.training.loop.hub_publisher import check_hub_token
from diffusers_ddpm_ext.training.tracking.monitor import Monitor
from diffusers_ddpm_ext.training.tracking.plan import (
    SMALLER,
    Plan,
    clipping_warning,
    epochs_warning,
    model_size_warning,
    schedule_warning,
    steps_for_epochs,
    warmup_warning,
)
from diffusers_ddpm_ext.utils.dtensor import gather_in_method, is_sharded
from diffusers_ddpm_ext.utils.pixel_format import PixelFormat
from diffusers_ddpm_ext.utils.vocabulary import SCORES


@dataclass(frozen=True)
class Setup:
    """Objects of a run that are built once. Training changes their state, never the objects.

    Attributes:
        config: as parsed.
        accelerator: device, precision and processes.
        data: the images.
        trained: network and loss, without wrappers.
        plan: length of the run and sizes of its batches.
        task: network and loss as prepared by Accelerate.
        optimizer: as prepared by Accelerate.
        lr_scheduler: stepped once per optimizer step, for any number of processes and micro-batches.
        ema: the moving average; None without one.
        monitor: ranks the validations; None where nothing is monitored.
        sample_scores: measures samples at each validation; None without ``validation_metrics``.
        ckpt_path_missing: whether ``ckpt_path`` does not exist, which is an error unless the run resumes.
    """

    config: TrainConfig
    accelerator: Accelerator
    data: ImageData
    trained: Trainable
    plan: Plan
    task: nn.Module
    optimizer: torch.optim.Optimizer
    lr_scheduler: LambdaLR
    ema: LitEMA | None
    monitor: Monitor | None
    sample_scores: SampleScores | None
    ckpt_path_missing: bool

    @property
    def seed(self) -> int:
        """Random seed."""
        return self.config.loop.seed

    @property
    def parts(self) -> Parts:
        """What is trained, in the run of a diffusion model."""
        assert isinstance(self.trained, Parts)
        return self.trained

    @property
    def latents(self) -> LatentEncoder | None:
        """The first stage, which makes latents of images; None for a run on pixels."""
        return self.trained.latents if isinstance(self.trained, Parts) else None

    @property
    def captions(self) -> CaptionEncoder | None:
        """The text encoder, which makes tokens of captions; None for a run without them."""
        return self.trained.captions if isinstance(self.trained, Parts) else None

    @cached_property
    def pixel_format(self) -> PixelFormat:
        """Dtype and range of the data, and how previews show its channels; recorded in the saved pipeline."""
        return with_preview(self.data, self.config.data.preview_channels)

    @property
    def pipeline_kwargs(self) -> dict[str, Any]:
        """Arguments of the pipeline, in the run of a diffusion model."""
        return self.parts.pipeline_kwargs | {"pixel_format": self.pixel_format}

    def samples(self, images: ImageSet) -> SampleSet:
        """What the network denoises for a set of images."""
        return sample_set(images, self.latents)

    @cached_property
    def validation_samples(self) -> SampleSet | None:
        """What the network denoises for the validation images; None without them."""
        images = self.data.validation
        return None if images is None else sample_set(images, self.latents, keeps_latents=True)

    @property
    def autoencoder(self) -> AutoencoderParts:
        """What is trained, in the run of a first stage."""
        assert isinstance(self.trained, AutoencoderParts)
        return self.trained

    @property
    def denoiser(self) -> UNet2DModel:
        """The network of a diffusion model with its raw weights, without wrappers."""
        return self.parts.denoiser

    @cached_property
    def network_parameters(self) -> list[nn.Parameter]:
        """`Trainable.weights`; cached, since walking the modules takes time."""
        return self.trained.weights

    @cached_property
    def logvar_parameters(self) -> list[nn.Parameter]:
        """Parameters of the log-variances; empty where they are not learned."""
        return self.trained.logvar_parameters

    @property
    def num_train_timesteps(self) -> int:
        """Length T of the chain."""
        return self.trained.num_train_timesteps

    @property
    def learns_logvar(self) -> bool:
        """Whether log-variances are learned."""
        return bool(self.logvar_parameters)

    @property
    def is_sharded(self) -> bool:
        """Whether the network is sharded over the processes, so that a forward pass is a collective call."""
        return any(map(is_sharded, self.network_parameters))

    @property
    def engine(self) -> str:
        """How the work is distributed over processes."""
        if self.is_sharded:
            return "FSDP2"
        return "DDP" if self.plan.processes > 1 else "one process"

    def processes(self, stop_requested: Callable[[], bool]) -> Processes:
        """How the processes share an evaluation; ``stop_requested`` is whether this process should stop."""
        accelerator, lockstep = self.accelerator, self.is_sharded
        return Processes(
            accelerator.process_index,
            accelerator.num_processes,
            accelerator.device,
            lambda tensor: sum_over_ranks(accelerator, tensor),
            (lambda: any_rank(accelerator, stop_requested())) if lockstep else stop_requested,
            lockstep,
        )


def build_setup(config: TrainConfig) -> Setup:
    """Read the images and build everything. Nothing is written.

    Raises:
        ConfigError: an option that cannot be satisfied, by name; in the process of the lowest rank where it was found.
    """
    loop = config.loop
    trackers = [] if loop.dry_run else tracker_names(config.output.report_to)
    accelerator = make_accelerator(loop.mixed_precision, loop.gradient_accumulation_steps, trackers)
    if loop.num_threads != "auto":
        torch.set_num_threads(loop.num_threads)
    with fail_together(accelerator):
        if accelerator.is_main_process:
            check_output_dir(config.output, config.resumes)
        check_hub_token(config.hub)
        latents = build_latent_encoder(config, accelerator.device)
        captions = build_caption_encoder(config, accelerator.device)
        data = load_data(
            data_options(config.data, latents),
            config.model.conditioning_key,
            tokenizer=None if captions is None else captions.stage,
            progress=accelerator.is_main_process,
        )
        if captions is not None and data.captions is not None:
            captions.read(data.captions, config.text.cache_text_embeddings)
        check_precision(data.train.columns, accelerator.mixed_precision)
        trained: Trainable
        if isinstance(config, AutoencoderConfig):
            trained = build_autoencoder_parts(config, data.train)
        else:
            trained = build_parts(config, data.train, latents, captions)
        data = replace(data, train=replace(data.train, dropout=trained.dropout))
        plan = make_plan(loop, None if data.stream is not None else len(data.train), accelerator.num_processes)
        initial = None
        if isinstance(trained, Parts):
            initial = load_initial_weights(config, trained.denoiser, trained.objective)
        task = trained.make_task().to(accelerator.device)
        if uses_channels_last(loop.channels_last, accelerator):
            trained.network.to(
                memory_format=torch.channels_last
            )  # before the average and the moments, which follow it
        ema = build_ema(config.ema, trained.network)
        if initial is not None:
            accelerator.print(initial.describe(None if ema is None else initialize_ema(initial, ema, config.start)))
        prepare_network(trained, loop, accelerator.state.dynamo_plugin)
        optimizer = make_optimizer(config.optim, config.objective.logvar_learning_rate, trained, plan.effective_batch)
        with as_config_error("--lr_scheduler"):
            optim = config.optim
            lr_scheduler = lr_schedule(
                optim.lr_scheduler, optimizer, plan.steps, optim.lr_warmup_steps, optim.lr_scheduler_args
            )
        pixels = with_preview(data, config.data.preview_channels)
        monitor = make_monitor(config, trained, has_validation=data.validation is not None)
        scores = build_sample_scores(config.validation, data, pixels, accelerator.device)
    # Accelerate does not get the scheduler: its wrapper steps once per process and step.
    wrapped, optimizer = accelerator.prepare(task, optimizer)
    keep_own_buffers(wrapped)
    if isinstance(trained, Parts):
        gather_in_method(accelerator.unwrap_model(wrapped), "predict")
    with fail_together(accelerator):
        check_sharding(config, is_sharded=any(map(is_sharded, trained.network.parameters())))
    missing = initial is None and config.start.ckpt_path is not None
    setup = Setup(
        config, accelerator, data, trained, plan, wrapped, optimizer, lr_scheduler, ema, monitor, scores, missing
    )
    if accelerator.is_main_process:
        for warning in setup_warnings(setup):
            warn(warning)
    return setup


def check_sharding(config: TrainConfig, is_sharded: bool) -> None:
    """Refuse what does not work on sharded weights, as a ConfigError."""
    if is_sharded and config.optim.use_8bit_adam:
        raise ConfigError("--use_8bit_adam has no sharded state (FSDP2): leave it out, the state is sharded already")
    if is_sharded and config.ema.offload_ema:
        raise ConfigError("--offload_ema has no sharded average (FSDP2): leave it out, the EMA is sharded already")


def setup_warnings(setup: Setup) -> list[str]:
    """Sentences on choices that are probably mistakes."""
    device = setup.accelerator.device.type
    size = sum(parameter.numel() for parameter in setup.network_parameters)
    denoises = isinstance(setup.trained, Parts)
    smaller = SMALLER if denoises else "half the --block_out_channels"
    warnings = [
        setup.data.warning,
        *([] if setup.data.captions is None else setup.data.captions.warnings),
        schedule_warning(setup.parts.objective.schedule) if denoises else None,
        model_size_warning(size, device, setup.samples(setup.data.train).shape[1:], smaller),
        clipping_warning(setup.config.schedule, setup.latents is not None),
        warmup_warning(setup.config.optim, setup.plan.steps),
        epochs_warning(setup.plan),
    ]
    if device == "cpu" and setup.ema is not None and setup.ema.offload:
        warnings.append("--offload_ema has no effect on a CPU: the EMA is in main memory already, as the network is")
    if fsdp_requested() and not setup.is_sharded:
        warnings.insert(0, f"FSDP was requested, but Accelerate made {setup.engine} of it: it has no FSDP on {device}")
    return [warning for warning in warnings if warning is not None]


def make_plan(options: LoopOptions, images: int | None, processes: int) -> Plan:
    """Length of the run, in optimizer steps; ``max_train_steps`` takes precedence over ``num_epochs``.

    ``images`` is the size of the training set; None for a stream.
    """
    batch, accumulation = options.train_batch_size, options.gradient_accumulation_steps
    if options.max_train_steps is not None:
        steps = options.max_train_steps
    elif options.num_epochs is not None and images is not None:
        steps = steps_for_epochs(options.num_epochs, images, batch * accumulation * processes)
    else:
        raise ConfigError("the run has no end: give --max_train_steps or --num_epochs")
    return Plan(batch, accumulation, processes, steps, images)


def make_optimizer(
    options: OptimOptions, logvar_learning_rate: float, trained: Trainable, effective_batch: int
) -> torch.optim.Optimizer:
    """AdamW over the network and, in a separate group, the log-variances; a ConfigError where it is not available."""
    groups = parameter_groups(
        trained.weights, trained.logvar_parameters, options.adam_weight_decay, logvar_learning_rate
    )
    rate = scale_learning_rate(options.learning_rate, options.lr_scaling, effective_batch)
    make = adamw_8bit if options.use_8bit_adam else adamw
    with as_config_error("--use_8bit_adam" if options.use_8bit_adam else ""):
        return make(groups, rate, (options.adam_beta1, options.adam_beta2), options.adam_epsilon)


def make_monitor(config: TrainConfig, trained: Trainable, has_validation: bool) -> Monitor | None:
    """The monitor of the best checkpoints; None without a metric. A metric that is not logged is a ConfigError."""
    options = config.monitoring
    name = options.monitor
    if name is None and not has_validation:
        if options.early_stopping_patience is not None:
            raise ConfigError(
                "--early_stopping_patience needs a metric: hold out images for validation, or name a --monitor"
            )
        return None
    kinds, suffixes = (
        trained.validation_kinds(config.validation.validation_bpd),
        ("", "_ema")[: 1 + config.ema.use_ema],
    )
    name = name or f"val/{kinds[0]}{suffixes[-1]}"
    validated = [f"val/{kind}{suffix}" for suffix in suffixes for kind in kinds]
    scores = [score for metric in config.validation.validation_metrics or () for score in SCORES[metric]]
    validated += [f"val/{score}{suffixes[-1]}" for score in scores]  # of the weights that the pipeline samples with
    names = [*trained.train_metrics, *(validated if has_validation else [])]
    if name not in names:
        raise ConfigError(f"--monitor {name} is not logged in this run: choose one of {', '.join(names)}")
    return Monitor(
        name,
        options.monitor_mode,
        options.save_top_k,
        options.early_stopping_patience,
        options.early_stopping_min_delta,
    )
