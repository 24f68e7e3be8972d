"""How a command runs a pipeline's network: the layout of its weights, the compiler, and images per forward pass.

Results change by rounding only, so each of these follows a rule, never a measurement: the same command draws the same
images.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from diffusers_ddpm_ext.errors import as_config_error
from diffusers_ddpm_ext.utils.memory import free_memory_bytes

MemoryFormat = Literal["contiguous", "channels_last"]
MOST_IMAGES = {"cpu": 64}
MOST_IMAGES_ELSEWHERE = 256
USABLE = 0.5
"""Of the free memory: the compiler, the convolutions' work space and the decoder of latents need the rest."""
WORKING_TENSORS = 6
"""Tensors of a level's size that a block holds at a time, beside those that wait for the decoder side."""


def accelerate_network(
    pipeline: Any, memory_format: MemoryFormat | None, compiled: bool, fast_attention: bool = True
) -> None:
    """Lay out and compile the network of a pipeline, in place: its class and the names of its weights stay.

    Args:
        pipeline: on its device, in its precision.
        memory_format: of the weights, which the activations follow. None: contiguous in float32 on an accelerator and
            on a CPU without oneDNN, channels_last otherwise. On a CPU with oneDNN, channels_last comes with the layers
            of `diffusers_ddpm_ext.models.fast_inference`, unless the network is compiled.
        compiled: whether to compile the network. It is compiled at the first step, once per batch size.
        fast_attention: whether to compute attention by `diffusers_ddpm_ext.models.fast_attention` on a CPU.

    Raises:
        ConfigError: there is no compiler.
    """
    import torch

    from diffusers_ddpm_ext.models.fast_attention import has_onednn, use_fast_attention
    from diffusers_ddpm_ext.models.fast_inference import use_fast_inference

    network, is_cpu = pipeline.unet, pipeline.device.type == "cpu"
    if memory_format is None:
        pays = compiled or pipeline.dtype in (torch.bfloat16, torch.float16) or (is_cpu and has_onednn())
        memory_format = "channels_last" if pays else "contiguous"
    if memory_format == "channels_last":
        network.to(memory_format=torch.channels_last)
        if is_cpu and not compiled:
            use_fast_inference(network)
    if fast_attention and is_cpu:
        use_fast_attention(network)
    if compiled:
        with as_config_error("--compile"):  # a missing compiler fails here, not at the first step
            torch.compile(torch.nn.Identity())(torch.zeros(2, device=pipeline.device))
        network.compile()


def images_per_pass(pipeline: Any, num_images: int, is_guided: bool) -> int:
    """Number of images per forward pass that the free memory of the pipeline's device holds, at least 1.

    It is a power of two, or ``num_images`` if that is fewer, and at most 64 on a CPU, where more are not faster,
    and 256 elsewhere.

    Args:
        pipeline: on its device.
        num_images: to draw.
        is_guided: whether guidance doubles the batch.
    """
    from diffusers_ddpm_ext.utils.wrappers import unwrap

    config: Any = unwrap(pipeline.unet).config
    bytes_each = activation_bytes(config, pipeline.dtype.itemsize) * (2 if is_guided else 1)
    most = MOST_IMAGES.get(pipeline.device.type, MOST_IMAGES_ELSEWHERE)
    fitting = int(USABLE * free_memory_bytes(pipeline.device)) // bytes_each
    count = max(1, min(most, fitting))
    return min(num_images, 1 << (count.bit_length() - 1))


def activation_bytes(config: Mapping[str, Any], itemsize: int) -> int:
    """Upper estimate of the bytes of a network's activations for one image, without gradients.

    The encoder side keeps ``layers_per_block`` + 1 outputs per level for the decoder side, and the largest level has
    the working tensors of one block of the decoder side.

    Args:
        config: of the network; levels that it does not name count as one.
        itemsize: bytes of a value.
    """
    size = config.get("sample_size")
    height, width = size if isinstance(size, Sequence) else (size or 1, size or 1)
    widths = list(config.get("block_out_channels") or [config.get("in_channels") or 1])
    layers = config.get("layers_per_block") or 1
    layers_of = list(layers) if isinstance(layers, Sequence) else [layers] * len(widths)
    pixels = [max(1, height >> i) * max(1, width >> i) for i in range(len(widths))]
    kept = sum((count + 1) * w * area for count, w, area in zip(layers_of, widths, pixels, strict=False))
    # A block of the decoder side works on the output of the level below, as wide as that, and on a kept one.
    below = [*widths[1:], widths[-1]]
    working = max((w + lower) * area for w, lower, area in zip(widths, below, pixels, strict=True))
    return itemsize * (kept + WORKING_TENSORS * working)
