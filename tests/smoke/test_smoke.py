"""The package as a user has it: only public names and commands, no file of the repository.

`make release` copies this file to an empty folder, beside a virtual environment in which the wheel is installed.
"""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from importlib.metadata import distribution, entry_points
from pathlib import Path

import pytest

import diffusers_ddpm_ext

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore::DeprecationWarning")]
PACKAGE = Path(diffusers_ddpm_ext.__file__).parent
TINY = """
--resolution 8 --block_out_channels 8 16 --layers_per_block 1 --attention_head_dim 4 --norm_num_groups 4
--num_train_timesteps 20 --train_batch_size 8 --max_train_steps 3 --logging_steps 1 --validation_max_images 16
--num_preview_images 4 --ddpm_num_inference_steps 5 --report_to none
"""


def ddpm_ext(folder: Path, *arguments: str, status: int = 0) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "diffusers_ddpm_ext", *arguments]
    completed = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert completed.returncode == status, completed.stderr[-2000:]
    return completed


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("smoke")
    ddpm_ext(folder, "train", "--output_dir", "run", *TINY.split())
    return folder


def test_the_distribution_is_the_package():
    assert distribution("diffusers-ddpm-ext").version == diffusers_ddpm_ext.__version__
    (command,) = entry_points(group="console_scripts", name="ddpm-ext")
    assert callable(command.load())


def test_files_that_are_no_modules_are_there():
    assert (PACKAGE / "py.typed").is_file()
    assert (PACKAGE / "metrics" / "digit_features.safetensors").stat().st_size > 10_000
    assert {"cifar10", "compvis", "digits", "folder64"} <= {path.stem for path in PACKAGE.glob("training/recipes/*")}


def test_public_names_and_every_module_can_be_imported():
    for name in diffusers_ddpm_ext.__all__:
        assert getattr(diffusers_ddpm_ext, name) is not None
    for path in PACKAGE.rglob("*.py"):
        if path.name != "__main__.py":
            parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
            importlib.import_module(".".join(part for part in parts if part != "__init__"))


def test_a_run_trains_resumes_and_is_evaluated(trained):
    losses = [json.loads(line) for line in (trained / "run" / "metrics.jsonl").read_text().splitlines()]
    assert any("train/loss" in line for line in losses)
    longer = ["--max_train_steps", "4", "--allow_config_change", "--resume_from_checkpoint", "latest"]
    ddpm_ext(trained, "train", "--output_dir", "run", *TINY.split(), *longer)
    assert json.loads((trained / "run" / "metrics.jsonl").read_text().splitlines()[-1])["step"] == 4
    ddpm_ext(trained, "evaluate", "run", "--max_images", "4", "--num_timesteps", "2")
    ddpm_ext(trained, "report", "run")
    ddpm_ext(trained, "doctor", "run", "--offline")


@pytest.mark.parametrize("scheduler", ["DDPMExtScheduler", "DPMSolverMultistepScheduler"])
def test_samples_are_pictures(trained, scheduler):
    from PIL import Image

    out = f"{scheduler}.png"
    ddpm_ext(trained, "sample", "run", "--num_images", "4", "--num_inference_steps", "3", "--scheduler", scheduler,
             "--out", out)  # fmt: skip
    with Image.open(trained / out) as picture:
        assert min(picture.size) >= 16


def test_stock_diffusers_opens_the_folder(trained):
    from diffusers import DDPMPipeline

    pipe = DDPMPipeline.from_pretrained(trained / "run")
    assert pipe(batch_size=1, num_inference_steps=2, output_type="np").images.shape == (1, 8, 8, 1)


def test_a_wrong_option_is_one_line(trained):
    completed = ddpm_ext(trained, "train", "--max_train_stepz", "3", status=2)
    (line,) = completed.stderr.splitlines()
    assert line.startswith("error: ")
    assert "--max_train_steps" in line
