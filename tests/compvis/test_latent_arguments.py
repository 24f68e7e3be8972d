"""Arguments of `LatentDiffusion` that name parts outside the network: what each becomes, or why it has no effect."""

from __future__ import annotations

from typing import Any

import pytest
from helpers.conversion_cases import BASE

from diffusers_ddpm_ext.compvis.config.ddpm import CompVisConfig, read_compvis_config

STAGE = {"target": "ldm.modules.encoders.modules.FrozenCLIPEmbedder"}


def read(**params: Any) -> CompVisConfig:
    network = {"target": "ldm.modules.diffusionmodules.openaimodel.UNetModel", "params": dict(BASE)}
    params = {"unet_config": network, "image_size": 8, "cond_stage_config": STAGE} | params
    return read_compvis_config({"model": {"target": "ldm.models.diffusion.ddpm.LatentDiffusion", "params": params}})


def fate(config: CompVisConfig, name: str) -> tuple[str, str]:
    row = next(row for row in config.rows if row.key == f"model.params.{name}")
    return row.fate, row.note


def test_methods_of_a_stage_have_no_effect():
    plain, named = read(conditioning_key="crossattn"), read(conditioning_key="crossattn", cond_stage_forward="embed")
    assert fate(named, "cond_stage_forward")[0] == "without effect"
    assert (plain.conditioning_key, plain.schedule) == (named.conditioning_key, named.schedule)


def test_the_key_of_a_condition_is_a_column():
    action, note = fate(read(conditioning_key="crossattn", cond_stage_key="caption"), "cond_stage_key")
    assert action == "without effect"
    assert all(option in note for option in ("--class_column", "--concat_column", "--context_column"))


@pytest.mark.parametrize(
    ("key", "force", "expected"),
    [("crossattn", True, "crossattn"), ("crossattn", False, None), (None, True, "concat"), (None, False, None)],
)
def test_a_forced_key_counts_without_a_stage(key, force, expected):
    """As stablediffusion's class resolves it: `conditioning_key` is dropped without a stage, unless it is forced."""
    config = read(conditioning_key=key, cond_stage_config="__is_unconditional__", force_null_conditioning=force)
    assert config.conditioning_key == expected
