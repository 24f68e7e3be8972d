"""UNet2DExtModel: `UNet2DModel` with the features of original checkpoints that its configuration lacks.

Stock Diffusers would load such a network as another function of the same weights, or sample it wrongly without an
error. So the block types in its configuration have names that stock Diffusers does not know: it refuses the folder,
and only this class opens it. The class name never changes, since saved folders contain it.
"""

from __future__ import annotations

from typing import Any

import torch

# Diffusers looks for the name ModelMixin in the module that defines a network before it loads one.
from diffusers import ModelMixin, UNet2DModel
from diffusers.configuration_utils import register_to_config
from diffusers.models.attention_processor import Attention
from diffusers.models.embeddings import TimestepEmbedding
from torch import Tensor, nn

from diffusers_ddpm_ext.utils.wrappers import plain_state_dict

__all__ = ["ModelMixin", "UNet2DExtModel", "ext_name", "stock_name"]

PREFIX = "Ext"
PROJECTIONS = ("simple_projection", "projection")


def ext_name(block_type: str) -> str:
    """Name of a block type in the configuration of a `UNet2DExtModel`."""
    return block_type if block_type.startswith(PREFIX) else PREFIX + block_type


def stock_name(block_type: str) -> str:
    """Diffusers' name of a block type."""
    return block_type.removeprefix(PREFIX)


class UNet2DExtModel(UNet2DModel):
    """A `UNet2DModel` with a number of attention heads, a timestep scale, or a projected class embedding.

    Args:
        sample_size: see `UNet2DModel`.
        in_channels: input channels, concatenated conditions included.
        out_channels: output channels.
        center_input_sample: see `UNet2DModel`.
        time_embedding_type: see `UNet2DModel`.
        time_embedding_dim: see `UNet2DModel`.
        freq_shift: see `UNet2DModel`.
        flip_sin_to_cos: see `UNet2DModel`.
        down_block_types: Diffusers' names, or the same with the prefix "Ext", as in the configuration.
        mid_block_type: see `UNet2DModel`.
        up_block_types: as ``down_block_types``.
        block_out_channels: see `UNet2DModel`.
        layers_per_block: see `UNet2DModel`.
        mid_block_scale_factor: see `UNet2DModel`.
        downsample_padding: see `UNet2DModel`.
        downsample_type: see `UNet2DModel`.
        upsample_type: see `UNet2DModel`.
        dropout: see `UNet2DModel`.
        act_fn: see `UNet2DModel`.
        attention_head_dim: channels of a head; unused with ``num_attention_heads``.
        norm_num_groups: see `UNet2DModel`.
        attn_norm_num_groups: see `UNet2DModel`.
        norm_eps: see `UNet2DModel`.
        resnet_time_scale_shift: see `UNet2DModel`.
        add_attention: see `UNet2DModel`.
        class_embed_type: also ``simple_projection`` (a linear layer) and ``projection`` (two, a SiLU between), from
            (B, projection_class_embeddings_input_dim) floating labels, as in `UNet2DConditionModel`.
        num_class_embeds: see `UNet2DModel`.
        num_train_timesteps: see `UNet2DModel`.
        num_attention_heads: heads of every attention of the down and middle blocks, for any width.
        num_attention_heads_up: the same for the up blocks; None for ``num_attention_heads``.
        timestep_scale: the network receives ``t * timestep_scale`` (1000 / T is improved-diffusion's
            ``rescale_timesteps``).
        projection_class_embeddings_input_dim: width of the labels of a projected class embedding.

    Raises:
        ValueError: a number of heads does not divide a width, or a projection lacks its width.
    """

    @register_to_config
    def __init__(
        self,
        sample_size: int | tuple[int, int] | None = None,
        in_channels: int = 3,
        out_channels: int = 3,
        center_input_sample: bool = False,
        time_embedding_type: str = "positional",
        time_embedding_dim: int | None = None,
        freq_shift: int = 0,
        flip_sin_to_cos: bool = True,
        down_block_types: tuple[str, ...] = ("DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"),
        mid_block_type: str | None = "UNetMidBlock2D",
        up_block_types: tuple[str, ...] = ("AttnUpBlock2D", "AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
        block_out_channels: tuple[int, ...] = (224, 448, 672, 896),
        layers_per_block: int = 2,
        mid_block_scale_factor: float = 1,
        downsample_padding: int = 1,
        downsample_type: str = "conv",
        upsample_type: str = "conv",
        dropout: float = 0.0,
        act_fn: str = "silu",
        attention_head_dim: int | None = 8,
        norm_num_groups: int = 32,
        attn_norm_num_groups: int | None = None,
        norm_eps: float = 1e-5,
        resnet_time_scale_shift: str = "default",
        add_attention: bool = True,
        class_embed_type: str | None = None,
        num_class_embeds: int | None = None,
        num_train_timesteps: int | None = None,
        num_attention_heads: int | None = None,
        num_attention_heads_up: int | None = None,
        timestep_scale: float = 1.0,
        projection_class_embeddings_input_dim: int | None = None,
    ) -> None:
        projected = class_embed_type in PROJECTIONS
        super().__init__(
            sample_size=sample_size,
            in_channels=in_channels,
            out_channels=out_channels,
            center_input_sample=center_input_sample,
            time_embedding_type=time_embedding_type,
            time_embedding_dim=time_embedding_dim,
            freq_shift=freq_shift,
            flip_sin_to_cos=flip_sin_to_cos,
            down_block_types=tuple(map(stock_name, down_block_types)),
            mid_block_type=mid_block_type,
            up_block_types=tuple(map(stock_name, up_block_types)),
            block_out_channels=block_out_channels,
            layers_per_block=layers_per_block,
            mid_block_scale_factor=mid_block_scale_factor,
            downsample_padding=downsample_padding,
            downsample_type=downsample_type,
            upsample_type=upsample_type,
            dropout=dropout,
            act_fn=act_fn,
            attention_head_dim=None if num_attention_heads is not None else attention_head_dim,
            norm_num_groups=norm_num_groups,
            attn_norm_num_groups=attn_norm_num_groups,
            norm_eps=norm_eps,
            resnet_time_scale_shift=resnet_time_scale_shift,
            add_attention=add_attention,
            class_embed_type=None if projected else class_embed_type,
            num_class_embeds=None if projected else num_class_embeds,
            num_train_timesteps=num_train_timesteps,
        )
        # The parent class has registered its own arguments; the configuration must have ours.
        self.register_to_config(
            down_block_types=tuple(map(ext_name, down_block_types)),
            up_block_types=tuple(map(ext_name, up_block_types)),
            attention_head_dim=attention_head_dim,
            class_embed_type=class_embed_type,
            num_class_embeds=num_class_embeds,
        )
        width = time_embedding_dim or block_out_channels[0] * 4
        if projected:
            self.class_embedding = _projection(class_embed_type, projection_class_embeddings_input_dim, width)
        up = num_attention_heads if num_attention_heads_up is None else num_attention_heads_up
        for blocks, heads in ((self.down_blocks, num_attention_heads), (self.mid_block, num_attention_heads)):
            _set_heads(blocks, heads, "num_attention_heads")
        _set_heads(self.up_blocks, up, "num_attention_heads_up")

    @classmethod
    def from_unet(cls, unet: UNet2DModel) -> UNet2DExtModel:
        """The same network as an instance of this class, which stock Diffusers refuses; the tensors are shared.

        Args:
            unet: a stock network, or an instance of this class, which is returned unchanged.

        Returns:
            The network.
        """
        if isinstance(unet, cls):
            return unet
        with torch.device("meta"):
            same = cls(**{name: value for name, value in unet.config.items() if not name.startswith("_")})
        same.load_state_dict(plain_state_dict(unet), strict=True, assign=True)
        for new, old in zip(same.parameters(), unet.parameters(), strict=True):
            new.requires_grad_(old.requires_grad)
        return same.train(unet.training)

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor | float | int,
        class_labels: Tensor | None = None,
        return_dict: bool = True,
    ) -> Any:
        """Denoise, as `UNet2DModel` does.

        Args:
            sample: (B, C, H, W).
            timestep: of the training schedule, a number or (B,).
            class_labels: (B,), integer, or (B, width), floating, for a projected embedding.
            return_dict: whether to return an output object or a tuple.

        Returns:
            As `UNet2DModel`.
        """
        if self.config.timestep_scale != 1:  # Diffusers would truncate a plain number to an integer
            timestep = torch.as_tensor(timestep, device=sample.device) * self.config.timestep_scale
        return super().forward(sample, timestep, class_labels, return_dict)


def _projection(kind: str | None, inputs: int | None, width: int) -> nn.Module:
    if inputs is None:
        raise ValueError(
            f"class_embed_type is {kind!r}, which needs projection_class_embeddings_input_dim, the width of a label."
        )
    return nn.Linear(inputs, width) if kind == "simple_projection" else TimestepEmbedding(inputs, width)


def _set_heads(blocks: nn.Module | None, heads: int | None, option: str) -> None:
    if blocks is None or heads is None:
        return
    for module in blocks.modules():
        if isinstance(module, Attention):
            if heads < 1 or module.inner_dim % heads:
                raise ValueError(f"{option} is {heads}; it must divide {module.inner_dim}, the width of an attention.")
            module.heads = module.sliceable_head_dim = heads
            module.scale = (module.inner_dim // heads) ** -0.5
