"""The generic ``DiffusionPipeline`` opens our folders once the package is imported, and names it if it is not."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel, UNet2DModel

from diffusers_ddpm_ext import DDPMExtPipeline, DDPMExtScheduler

BLOCKS = {"block_out_channels": (8, 16), "layers_per_block": 1, "norm_num_groups": 4}
OPEN = "from diffusers import DiffusionPipeline; pipe = DiffusionPipeline.from_pretrained({folder!r})"
OURS = "import diffusers_ddpm_ext"


def run(code: str) -> subprocess.CompletedProcess[str]:
    """Run a program in a new process; the code sees no name that this process has imported."""
    return subprocess.run([sys.executable, "-W", "error::ImportWarning", "-c", code], capture_output=True, text=True)


def saved(kind: str, folder: Path) -> str:
    """Save a model that stock Diffusers cannot sample."""
    down, up = ("DownBlock2D", "DownBlock2D"), ("UpBlock2D", "UpBlock2D")
    scheduler = DDPMExtScheduler(num_train_timesteps=10)
    if kind == "class tokens":
        network = UNet2DConditionModel(
            8, 1, 1, down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), cross_attention_dim=6,
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"), attention_head_dim=4, **BLOCKS,
        )  # fmt: skip
        pipeline = DDPMExtPipeline(network, scheduler, conditioning_key="crossattn")
        pipeline.class_embedder = torch.randn(3, 6)
    elif kind == "concatenated":
        network = UNet2DModel(8, 3, 1, down_block_types=down, up_block_types=up, **BLOCKS)
        pipeline = DDPMExtPipeline(network, scheduler, conditioning_key="concat")
    else:
        network = UNet2DModel(8, 1, 1, down_block_types=down, up_block_types=up, num_class_embeds=3, **BLOCKS)
        pipeline = DDPMExtPipeline(network, scheduler, conditioning_key="adm")
    pipeline.save_pretrained(folder)
    return str(folder)


KINDS = ["class tokens", "concatenated", "classes"]


def test_the_error_without_the_import_names_the_package(tmp_path: Path) -> None:
    folders = [saved(kind, tmp_path / kind) for kind in KINDS]
    code = "from diffusers import DiffusionPipeline\nfor folder in {folders!r}:\n"
    code += " try: DiffusionPipeline.from_pretrained(folder)\n except AttributeError as error: print(error)"
    messages = run(code.format(folders=folders)).stdout.splitlines()
    assert len(messages) == len(KINDS)
    assert all("diffusers_ddpm_ext" in message for message in messages)


@pytest.mark.parametrize("kind", KINDS)
def test_after_the_import_the_generic_pipeline_opens_the_folder(kind: str, tmp_path: Path) -> None:
    """Before or after diffusers' import, after a search for diffusers that imports nothing, after a failed attempt."""
    open_it = OPEN.format(folder=saved(kind, tmp_path / "model"))
    check = "assert type(pipe) is diffusers_ddpm_ext.DDPMExtPipeline"
    orders = {
        "class tokens": f"{OURS}; {open_it}; assert pipe.class_embedder.shape == (3, 6)",
        "concatenated": f"import diffusers; {OURS}; {open_it}; assert type(pipe.unet).__name__ == 'UNet2DExtModel'",
        "classes": f"{OURS}; from importlib.util import find_spec; find_spec('diffusers'); {open_it}",
    }
    result = run(f"{orders[kind]}; {check}")
    assert result.returncode == 0, result.stderr


def test_the_import_loads_neither_diffusers_nor_torch_and_changes_no_other_name() -> None:
    code = (
        f"import sys; {OURS}; assert not {{'torch', 'diffusers', 'numpy'}} & set(sys.modules); import diffusers\n"
        "assert 'torch' not in sys.modules or diffusers.__version__\n"
        "assert not any('diffusers_ddpm_ext' in str(type(finder)) for finder in sys.meta_path)\n"
        "from diffusers import UNet2DModel, DDPMScheduler\n"
        "try: diffusers.NoSuchName\nexcept AttributeError as error: assert 'NoSuchName' in str(error)\n"
        "assert diffusers.DDPMExtScheduler is diffusers_ddpm_ext.DDPMExtScheduler"
    )
    result = run(code)
    assert result.returncode == 0, result.stderr
