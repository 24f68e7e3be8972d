"""Folders that an earlier version of this package saved still load, sample and resume.

``tests/golden/folders`` was written by the version whose modules were not yet in folders: four pipelines, the samples
that they drew (``samples.npz``), and a training run of 6 steps that was killed after step 4, with its checkpoint of
step 3. ``run_metrics.jsonl`` has the metrics of the same run without the interruption. Other machines round
differently, so values are compared with a tolerance.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState, GradientState
from diffusers import UNet2DModel
from helpers.paths import GOLDEN
from helpers.runs import rows

from diffusers_ddpm_ext import DDPMExtPipeline, UNet2DExtModel, cli

FOLDERS = GOLDEN / "folders"
CALLS: dict[str, dict[str, Any]] = {
    "plain": {},
    "learned_range": {},
    "unet_2d_ext": {},
    "classes": {"class_labels": [0, 2], "guidance_scale": 2.0},
}


@pytest.fixture(autouse=True)
def reset_accelerate() -> Iterator[None]:
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def sample(folder: Path, **call: Any) -> np.ndarray:
    """Two samples of three steps, as they were drawn for ``samples.npz``."""
    pipeline = DDPMExtPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    return pipeline(2, generator, num_inference_steps=3, output_type="latent", **call).images.numpy()


@pytest.fixture(scope="module")
def recorded() -> dict[str, np.ndarray]:
    with np.load(FOLDERS / "samples.npz", allow_pickle=False) as arrays:
        return dict(arrays)


@pytest.mark.parametrize("name", CALLS)
def test_former_pipelines_draw_the_recorded_samples(name, recorded):
    assert np.abs(sample(FOLDERS / name, **CALLS[name]) - recorded[name]).max() <= 1e-5


def test_former_pipelines_load_with_their_classes_and_settings():
    plain, learned, ext, classes = (DDPMExtPipeline.from_pretrained(FOLDERS / name) for name in CALLS)
    assert (type(plain.unet), plain.scheduler.config.v_posterior) == (UNet2DModel, 0.4)
    assert torch.equal(plain.logvar, torch.linspace(-1, 1, 10))
    assert learned.scheduler.config.variance_type == "learned_range"
    assert (type(ext.unet), ext.unet.config.timestep_scale) == (UNet2DExtModel, 0.5)
    assert (classes.config.conditioning_key, classes.config.null_class_label) == ("adm", 3)


def test_a_former_run_resumes_from_its_checkpoint_and_config(tmp_path, recorded):
    run = tmp_path / "run"
    shutil.copytree(FOLDERS / "run", run)
    command = ["train", "--config", str(run / "config.yaml"), "--output_dir", str(run)]
    assert cli.main([*command, "--resume_from_checkpoint", "auto"]) == 0
    assert min(row["step"] for row in rows(run, "timing.jsonl")) == 4, "steps 1 to 3 were trained again"
    resumed = rows(run)
    uninterrupted = [json.loads(line) for line in (FOLDERS / "run_metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in resumed] == [1, 2, 3, 3, 4, 5, 6, 6]
    assert [row.keys() for row in resumed] == [row.keys() for row in uninterrupted]
    for ours, theirs in zip(resumed, uninterrupted, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4)
    assert np.abs(sample(run) - recorded["run"]).max() <= 1e-4
