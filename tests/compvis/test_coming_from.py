"""The pages coming-from-compvis.md and coming-from-openai.md: complete, and every row names an existing test."""

from __future__ import annotations

import ast
import inspect
import re

import pytest
from helpers.paths import ROOT

from diffusers_ddpm_ext import DDPMExtPipeline, DDPMExtScheduler, DDPMObjective
from diffusers_ddpm_ext.compvis import load_compvis
from diffusers_ddpm_ext.compvis.config.openai import FAMILY_DEFAULTS, REFUSED_FLAGS, SHARED_DEFAULTS
from diffusers_ddpm_ext.training.config.options import OPTIONS

# DDPM.__init__ of stablediffusion, whose arguments include latent-diffusion's.
ARGUMENTS = [
    "unet_config",
    "timesteps",
    "beta_schedule",
    "loss_type",
    "ckpt_path",
    "ignore_keys",
    "load_only_unet",
    "monitor",
    "use_ema",
    "first_stage_key",
    "image_size",
    "channels",
    "log_every_t",
    "clip_denoised",
    "linear_start",
    "linear_end",
    "cosine_s",
    "given_betas",
    "original_elbo_weight",
    "v_posterior",
    "l_simple_weight",
    "conditioning_key",
    "parameterization",
    "scheduler_config",
    "use_positional_encodings",
    "learn_logvar",
    "logvar_init",
    "make_it_fit",
    "ucg_training",
    "reset_ema",
    "reset_num_ema_updates",
]
# LatentDiffusion.__init__ of the same, and what it takes out of its further arguments.
LATENT_ARGUMENTS = [
    "first_stage_config",
    "cond_stage_config",
    "num_timesteps_cond",
    "cond_stage_key",
    "cond_stage_trainable",
    "concat_mode",
    "cond_stage_forward",
    "conditioning_key",
    "scale_factor",
    "scale_by_std",
    "force_null_conditioning",
    "ckpt_path",
    "ignore_keys",
    "reset_ema",
    "reset_num_ema_updates",
]
DEFECTS = 33


def table(page: str, columns: int, section: str = "") -> list[list[str]]:
    """The cells of the tables of a page, or of one of its sections."""
    text = (ROOT / "docs" / page).read_text().split(f"## {section}" if section else "\0")[-1]
    lines = text.split("\n## ")[0].splitlines() if section else text.splitlines()
    rows = [line.strip("|").split("|") for line in lines if line[:3] == "| `"]
    return [[cell.strip() for cell in row] for row in rows if len(row) == columns]


ROWS = {
    (title, row[0].strip("`")): row
    for title in ("DDPM", "LatentDiffusion")
    for row in table("coming-from-compvis.md", 4, f"Every argument of `{title}.__init__`")
}
NAMES = [("DDPM", name) for name in ARGUMENTS] + [("LatentDiffusion", name) for name in LATENT_ARGUMENTS]


def test_every_argument_has_a_row():
    assert sorted(ROWS) == sorted(NAMES)


@pytest.mark.parametrize("name", NAMES, ids="-".join)
def test_the_names_of_a_row_exist(name):
    _, here, _, tested_by = ROWS[name]
    known = set(OPTIONS) | {"load_compvis"}
    for function in (
        DDPMExtScheduler.__init__,
        DDPMObjective.__init__,
        DDPMExtPipeline.__init__,
        DDPMExtPipeline.__call__,
    ):
        known |= set(inspect.signature(function).parameters)
    known |= set(inspect.signature(load_compvis).parameters)
    named = re.findall(r"`(--)?(\w+)", here)
    assert named
    for dashes, name in named:
        assert name in OPTIONS if dashes else name in known | {"DDPMExtPipeline", "LitEMA"}, name
    file, _, test = tested_by.strip("`").partition("::")
    tree = ast.parse((ROOT / "tests" / file).read_text())
    assert test in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


def test_every_defect_that_a_row_names_is_described():
    page = (ROOT / "docs" / "coming-from-compvis.md").read_text()
    described = set(re.findall(r"^\| (D\d+) \|", page, re.MULTILINE))
    assert described == {f"D{number}" for number in range(1, DEFECTS + 1)}
    assert set(re.findall(r"D\d+", page)) == described


def test_every_openai_flag_has_a_row():
    rows = {row[0].strip("`") for row in table("coming-from-openai.md", 2)}
    flags = (
        SHARED_DEFAULTS.keys()
        | FAMILY_DEFAULTS["improved"].keys()
        | FAMILY_DEFAULTS["guided"].keys()
        | (REFUSED_FLAGS.keys() - {"classifier"})
    )
    assert rows == flags | {"classifier_*"}
