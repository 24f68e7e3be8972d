"""How a run's network is computed: its order in memory, gradient checkpointing, and compilation, all in place."""

from __future__ import annotations

import torch
from accelerate import Accelerator
from accelerate.utils import DynamoBackend, TorchDynamoPlugin

from diffusers_ddpm_ext.errors import ConfigError, as_config_error
from diffusers_ddpm_ext.training.config.options import LoopOptions
from diffusers_ddpm_ext.training.distributed import fsdp_requested
from diffusers_ddpm_ext.training.factory.trainable import Trainable


def uses_channels_last(option: str, accelerator: Accelerator) -> bool:
    """Whether the network is kept with its channels last in memory; a ConfigError where FSDP cannot shard it so."""
    sharded = fsdp_requested() and accelerator.device.type != "cpu"
    if option == "always" and sharded:
        raise ConfigError("--channels_last always: FSDP shards weights in torch's own order only; use never or auto")
    if option != "auto":
        return option == "always"
    return accelerator.device.type == "cuda" and accelerator.mixed_precision in ("fp16", "bf16") and not sharded


def prepare_network(trained: Trainable, options: LoopOptions, plugin: TorchDynamoPlugin) -> None:
    """Enable gradient checkpointing and compilation, in place; a ConfigError where that is not possible.

    A compiler that Accelerate's configuration requests is applied to the network only, and removed from the plugin.
    """
    if options.gradient_checkpointing:
        with as_config_error("--gradient_checkpointing"):
            trained.enable_gradient_checkpointing()
    device = trained.network.device.type
    if options.torch_compile_mode == "reduce-overhead" and device != "cuda":
        raise ConfigError(
            f"--torch_compile_mode reduce-overhead records CUDA graphs, and this run is on {device}: leave it out"
        )
    requested = plugin.backend not in (None, DynamoBackend.NO)
    if requested or options.torch_compile:
        kwargs = plugin.to_kwargs() if requested else {}
        if options.torch_compile:
            kwargs["mode"] = options.torch_compile_mode
        kwargs.pop("use_regional_compilation", None)
        plugin.backend = DynamoBackend.NO
        with as_config_error("--torch_compile"):  # a missing compiler fails here, not in the first step
            torch.compile(torch.nn.Identity(), **kwargs)(torch.zeros(2, device=trained.network.device))
        for module in trained.compiled_modules:
            module.compile(**kwargs)  # in place: a wrapper's name would be in every checkpoint
