"""Weights of original conditioning stages, converted to modules of transformers and Diffusers and back, bit-exact."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from diffusers_ddpm_ext.compvis.conditioner.kinds import ConditionerConfig, ConvertedConditioner
from diffusers_ddpm_ext.compvis.conditioner.registry import KINDS
from diffusers_ddpm_ext.compvis.weights import check_weights, convert_mapped


def convert_conditioner(tensors: Mapping[str, Tensor], config: ConditionerConfig) -> ConvertedConditioner:
    """Build the module that computes the same as an original conditioning stage.

    Args:
        tensors: of the stage, any floating dtype, by its keys without the stage's prefix.
        config: of the stage.

    Returns:
        The module, float32, in eval mode, its weights not trained; one row per tensor; and how it was converted.

    Raises:
        ValueError: keys are missing or unexpected, shapes differ, or values are not finite.
    """
    plan = config.kind.plan(config.params, tensors)
    own = {name: tensor for name, tensor in tensors.items() if name not in plan.left_out}
    check_weights(own)
    converted, rows = convert_mapped(own, plan.mappings, new_order=True)
    with torch.device("meta"):
        module = plan.build()
    module.load_state_dict(converted, strict=True, assign=True)
    plan.finish(module)
    return ConvertedConditioner(module.requires_grad_(False).eval(), rows, plan)


def export_conditioner(
    module: nn.Module, name: str, layout: Mapping[str, Any] | None = None, base: Mapping[str, Tensor] | None = None
) -> dict[str, Tensor]:
    """Convert a module's weights to an original stage's keys and shapes; the inverse of `convert_conditioner`.

    Args:
        module: of transformers or Diffusers.
        name: of the original's class, in the registry.
        layout: how the original file was arranged, as recorded by the conversion.
        base: tensors of another checkpoint's stage, for what the module does not compute with.

    Returns:
        The stage's keys, without its prefix, to tensors in the module's dtype, on its device.

    Raises:
        ValueError: the class cannot express the module, or tensors of ``base`` are needed; the message names them.
    """
    return KINDS[name].export(module, layout or {}, base or {})
