"""Pictures, histograms and the configuration of a run arrive at its tracker."""

from __future__ import annotations

import numpy as np
import pytest
from accelerate.state import AcceleratorState, GradientState
from runs import rows, tiny_run

from diffusers_ddpm_ext.training import trainer


@pytest.fixture(autouse=True)
def fresh_accelerate():
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def test_tensorboard(tmp_path):
    from PIL import Image
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    config = tiny_run(tmp_path / "run", report_to="tensorboard", save_images_steps=3, learn_logvar=True)
    folder = trainer.train(config)
    readers = []
    for place in {path.parent for path in folder.rglob("events.out*")}:
        events = EventAccumulator(str(place), size_guidance={"images": 0, "histograms": 0})
        events.Reload()
        readers += [events] if events.Tags()["images"] else []
    (events,) = readers
    tags = events.Tags()
    assert set(tags["images"]) == {"inputs", "diffusion_row", "samples", "denoise_row", "loss", "logvar"}
    assert [event.step for event in events.Images("samples")] == [3, 6]
    last = events.Images("samples")[-1]
    with Image.open(folder / "samples" / "samples-6.png") as picture:
        assert (last.width, last.height) == picture.size
    histograms = events.Histograms("train/loss_simple of steps")
    losses = [row["train/loss_simple"] for row in rows(folder) if "train/loss_simple" in row]
    assert sum(event.histogram_value.num for event in histograms) == len(losses) == 6
    assert np.isclose(sum(event.histogram_value.sum for event in histograms), sum(losses), rtol=1e-5)
    assert list(folder.rglob("hparams.yml"))


def test_wandb_offline(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    folder = trainer.train(tiny_run(tmp_path / "run", report_to="wandb", save_images_steps=3))
    assert (folder / "finished.json").is_file()
    media = {path.name.split("_")[0] for path in tmp_path.rglob("media/images/*.png")}
    assert {"samples", "inputs", "loss"} <= media


def test_a_tracker_that_takes_no_pictures_is_left_alone(tmp_path):
    from diffusers_ddpm_ext.training.showing import show

    class Plain:
        name = "plain"

    show([Plain()], {"missing": tmp_path / "missing.png"}, [1.0], 1)
