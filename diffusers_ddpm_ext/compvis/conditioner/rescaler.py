"""SpatialRescaler: `diffusers_ddpm_ext.SpatialRescaler`, which has its names."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from diffusers_ddpm_ext.compvis.conditioner.kinds import Argument, ConditionerKind, ConditionerPlan
from diffusers_ddpm_ext.compvis.conditioner.sizes import one_of
from diffusers_ddpm_ext.compvis.key_map import TensorMapping
from diffusers_ddpm_ext.compvis.schema import BOOLEAN, NULL, WIDTH, ValueType, number
from diffusers_ddpm_ext.models.spatial_rescaler import METHODS, SpatialRescaler
from diffusers_ddpm_ext.utils.network_budget import MAX_LEVELS
from diffusers_ddpm_ext.utils.wrappers import plain_state_dict, unwrap

MAPPER = "channel_mapper."
NOTE = "pipeline.concat_encoder"
STAGES = ValueType(f"a whole number from 0 to {MAX_LEVELS}", lambda v: type(v) is int and 0 <= v <= MAX_LEVELS)


def _plan(params: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> ConditionerPlan:
    arguments = {name: value for name, value in params.items() if name in ARGUMENTS}
    arguments["bias"] = bool(arguments["bias"])

    def build() -> nn.Module:
        return SpatialRescaler(**arguments)

    with torch.device("meta"):
        shapes = {name: tuple(tensor.shape) for name, tensor in build().state_dict().items()}
    mappings = (
        TensorMapping(name, name if name.startswith(MAPPER) else "", "same", 1, shape)
        for name, shape in shapes.items()
    )
    return ConditionerPlan(build, tuple(mappings))


def _export(module: nn.Module, layout: Mapping[str, Any], base: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: t.detach() for name, t in plain_state_dict(module).items() if name.startswith(MAPPER)}


def _params_of(module: nn.Module, recorded: Mapping[str, Any]) -> dict[str, Any]:
    config: Any = unwrap(module).config
    return {name: config[name] for name in ARGUMENTS}


ARGUMENTS = {
    "n_stages": Argument(NOTE, STAGES, 1),
    "method": Argument(NOTE, one_of(*METHODS), "bilinear"),
    "multiplier": Argument(NOTE, number(0, 16, exclusive=True), 0.5),
    "in_channels": Argument(NOTE, WIDTH, 3),
    "out_channels": Argument(NOTE, WIDTH | NULL),
    "bias": Argument(NOTE, BOOLEAN, False),
}
RESCALER = ConditionerKind(
    "SpatialRescaler",
    "concat_encoder",
    "SpatialRescaler",
    MAPPER,
    ARGUMENTS,
    _plan,
    _export,
    _params_of,
    has_tensors=lambda params: params["out_channels"] is not None,
)
