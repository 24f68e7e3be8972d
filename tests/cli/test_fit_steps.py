"""`ddpm-ext fit-steps` and `--timesteps`, as a user types them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMPipeline, UNet2DModel
from helpers.latent_cases import latent_pipeline
from helpers.tiny import EXACT, tiny_unet

from diffusers_ddpm_ext import DDPMExtPipeline, DDPMExtScheduler, cli

pytestmark = pytest.mark.filterwarnings("ignore:__array:DeprecationWarning")  # of NumPy 2 about Diffusers
FEW = ["--num_trajectories", "3", "--reference_steps", "9", "--device", "cpu"]
CONFIG = Path("scheduler") / "scheduler_config.json"


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    place = tmp_path_factory.mktemp("saved") / "pipe"
    DDPMExtPipeline(tiny_unet(), DDPMExtScheduler(20, prediction_type="v_prediction")).save_pretrained(place)
    return place


@pytest.fixture
def folder(saved, tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(saved, tmp_path / "pipe")
    return Path("pipe")


def fit(folder: Path, *flags: str) -> dict:
    assert cli.main(["fit-steps", str(folder), *FEW, *flags]) == 0
    return json.loads((folder / CONFIG).read_text())["sample_timesteps"]


def refused(capsys, *argv: str) -> str:
    """The only line on standard error, beside progress bars, of a command that fails with status 2."""
    capsys.readouterr()
    assert cli.main(list(argv)) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    line = error.rpartition("\r")[2]
    assert line.startswith("error: ")
    return line


def test_fit_sample_and_undo(folder, capsys):
    """Fits of numbers and classes add up; sampling uses them; stock Diffusers loads the folder; undo restores it."""
    before = json.loads((folder / CONFIG).read_text())
    first = fit(folder, "--num_inference_steps", "2")
    assert "2 steps" in capsys.readouterr().out
    second = fit(folder, "--num_inference_steps", "3")
    assert second["DDIMScheduler"]["2"] == first["DDIMScheduler"]["2"]
    both = fit(folder, "--num_inference_steps", "2", "--scheduler", "DPMSolverMultistepScheduler")
    assert both["DDIMScheduler"] == second["DDIMScheduler"]
    assert [len(both["DDIMScheduler"][count]) for count in ("2", "3")] == [2, 3]
    records = json.loads((folder / "steps_fit.json").read_text())
    assert records["format"] == 1
    fits = records["fits"]["DDIMScheduler"]
    assert all(fits[count]["error"] <= fits[count]["error_even"] for count in ("2", "3"))
    line = ["sample", "pipe", "--num_images", "2", "--device", "cpu", "--scheduler", "DDIMScheduler", *EXACT]
    assert cli.main([*line, "--num_inference_steps", "3", "--timesteps", "samples", "--out", "a.npy"]) == 0
    assert "3 calls of the network each" in capsys.readouterr().out
    pipe = DDPMExtPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    from diffusers_ddpm_ext.utils.random_keys import generator

    images = pipe(2, [generator("sample", 0, i) for i in range(2)], None, "np", timesteps=second["DDIMScheduler"]["3"])
    assert np.array_equal(np.load("a.npy"), images.images)
    assert DDPMPipeline.from_pretrained(folder).scheduler.config.num_train_timesteps == 20
    assert cli.main(["fit-steps", "pipe", "--undo"]) == 0
    assert json.loads((folder / CONFIG).read_text()) == before
    assert not (folder / "steps_fit.json").exists()
    assert "--undo" in refused(capsys, "fit-steps", "pipe", "--undo")


def test_the_same_fit_twice(folder):
    first = fit(folder, "--num_inference_steps", "2", "3")
    record = (folder / "steps_fit.json").read_bytes()
    assert fit(folder, "--num_inference_steps", "2", "3") == first
    assert (folder / "steps_fit.json").read_bytes() == record


def test_classes_with_guidance(folder):
    shutil.rmtree(folder)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        blocks = {"down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2}
        sizes = {"block_out_channels": (8, 16), "layers_per_block": 1, "norm_num_groups": 4, "num_class_embeds": 3}
        unet = UNet2DModel(8, 1, 1, **blocks, **sizes)
    DDPMExtPipeline(unet, DDPMExtScheduler(20), null_class_label=2).save_pretrained(folder)
    fit(folder, "--num_inference_steps", "2", "--guidance_scale", "2", "--class_labels", "1", "0")
    facts = json.loads((folder / "steps_fit.json").read_text())["fits"]["DDIMScheduler"]["2"]
    assert (facts["guidance_scale"], facts["class_labels"]) == (2, ["1", "0"])
    plain = fit(folder, "--num_inference_steps", "2")  # all classes in turn
    assert plain["DDIMScheduler"]["2"]
    other = json.loads((folder / "steps_fit.json").read_text())["fits"]["DDIMScheduler"]["2"]
    assert other["error_even"] != facts["error_even"]


def test_latents_with_and_without_their_first_stage(folder):
    shutil.rmtree(folder)
    latent_pipeline().save_pretrained(folder)
    assert fit(folder, "--num_inference_steps", "2")["DDIMScheduler"]["2"]


def test_metrics_of_samples(folder, capsys):
    line = ["evaluate", "pipe", "--metrics", "kid", "--timesteps"]
    assert "--num_inference_steps" in refused(capsys, *line, "samples")
    assert "--timesteps has no effect on the bound" in refused(capsys, "evaluate", "pipe", "--timesteps", "even")


BAD = {
    "noise": (["--scheduler", "EulerAncestralDiscreteScheduler"], ["draws noise", "DDIMScheduler"]),
    "our own": (["--scheduler", "DDPMExtScheduler"], ["draws noise", "DDIMScheduler"]),
    "no timesteps": (["--scheduler", "PNDMScheduler"], ["PNDMScheduler takes none", "DDIMScheduler"]),
    "misspelled": (["--scheduler", "DDIMSchedular"], ["did you mean DDIMScheduler"]),
    "option of another": (["--scheduler_args", "solver_order=2"], ["--scheduler_args solver_order", "DDIMScheduler"]),
    "twice": (["--num_inference_steps", "3", "3"], ["names one twice"]),
    "no steps": (["--num_inference_steps", "0"], ["--num_inference_steps", "at least 1"]),
    "too many": (["--num_inference_steps", "9"], ["--num_inference_steps 9", "--reference_steps, 9"]),
    "more than trained": (["--reference_steps", "21"], ["--reference_steps 21", "20 steps"]),
    "no trajectory": (["--num_trajectories", "0"], ["--num_trajectories", "at least 1"]),
    "classes": (["--class_labels", "3"], ["--class_labels 3", "takes none"]),
    "guidance": (["--guidance_scale", "3"], ["--guidance_scale 3", "unconditional"]),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_options(case, folder, capsys):
    before = (folder / CONFIG).read_bytes()
    flags, expected = BAD[case]
    line = refused(
        capsys,
        "fit-steps",
        "pipe",
        *FEW,
        *(["--num_inference_steps", "2"] if "num_inf" not in flags[0] else []),
        *flags,
    )
    for text in expected:
        assert text in line
    assert (folder / CONFIG).read_bytes() == before
    assert not (folder / "steps_fit.json").exists()


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--timesteps", "samples"], "--timesteps samples needs --num_inference_steps"),
        (
            ["--timesteps", "samples", "--num_inference_steps", "2"],
            "ddpm-ext fit-steps FOLDER --scheduler DDIMScheduler",
        ),
        (["--timesteps", "bound", "--num_inference_steps", "2"], "none are known"),
        (["--timesteps", "best", "--num_inference_steps", "2"], "samples, bound, even"),
        (["--timesteps", "even", "--optimal_timesteps", "--num_inference_steps", "2"], "give one of them"),
    ],
)
def test_steps_that_are_not_there(flags, expected, folder, capsys):
    assert expected in refused(capsys, "sample", "pipe", "--device", "cpu", "--scheduler", "DDIMScheduler", *flags)
    assert not list(folder.glob("samples*"))


@pytest.mark.parametrize("content", ["[]", "{", '{"format": 1, "fits": {"DDIMScheduler": 3}}'])
def test_a_damaged_record_is_kept(content, folder, capsys):
    (folder / "steps_fit.json").write_text(content)
    before = (folder / CONFIG).read_bytes()
    assert "steps_fit.json" in refused(capsys, "fit-steps", "pipe", *FEW, "--num_inference_steps", "2")
    assert (folder / CONFIG).read_bytes() == before
    assert (folder / "steps_fit.json").read_text() == content


def test_damaged_steps_are_not_added_to(folder, capsys):
    config = json.loads((folder / CONFIG).read_text()) | {"sample_timesteps": {"DDIMScheduler": {"2": [1]}}}
    (folder / CONFIG).write_text(json.dumps(config))
    assert "scheduler_config.json" in refused(capsys, "fit-steps", "pipe", *FEW, "--num_inference_steps", "2")
