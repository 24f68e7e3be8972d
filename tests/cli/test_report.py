"""`ddpm-ext report`: one page that needs nothing but a browser."""

from __future__ import annotations

import base64
import io
import json
import shutil
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DModel
from helpers.runs import tiny_run
from helpers.tiny import tiny_unet
from PIL import Image

from diffusers_ddpm_ext import DDPMExtPipeline, DDPMExtScheduler, cli
from diffusers_ddpm_ext.plotting.row_timesteps import column_interval, denoising_timesteps
from diffusers_ddpm_ext.training import trainer
from diffusers_ddpm_ext.utils.run_timing import format_duration, read_timing

VOID = {"meta", "img", "br"}


class Page(HTMLParser):
    """What a page holds; refuses tags that are not closed."""

    def __init__(self, text):
        super().__init__()
        self.open, self.images, self.addresses, self.headings, self.text = [], [], [], [], ""
        self.anchors = []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        named = dict(attrs)
        if tag == "img":
            assert named["alt"]
            kind, _, data = named["src"].partition(",")
            assert kind == "data:image/png;base64"
            self.images.append(data)
        self.anchors += [named["id"]] if "id" in named else []
        self.addresses += [value for name, value in attrs if name in ("href", "src", "action") and tag != "img"]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data
        if self.open and self.open[-1] in ("h1", "h2"):
            self.headings.append(data)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    config = tiny_run(tmp_path_factory.mktemp("runs") / "a <run> & more", save_images_steps=2, checkpointing_steps=3)
    return trainer.train(config)


def page_of(folder, capsys, *flags):
    assert cli.main(["report", str(folder), *flags]) == 0
    assert "report.html" in capsys.readouterr().out or flags
    return Page((folder / "report.html").read_text())


def test_a_whole_run(folder, capsys):
    page = page_of(folder, capsys)
    assert page.headings[0] == "a <run> & more"
    assert {"Training images", "Diffusion and denoising"} <= {*page.headings}
    assert {"Samples", "Curves", "Samples through training", "Schedule and variances", "Every option"} <= {
        *page.headings
    }
    sections = [heading.lower().replace(" ", "-") for heading in page.headings[1:]]
    assert page.addresses == [f"#{section}" for section in sections], "the contents list every section, nothing else"
    assert page.anchors == sections
    assert "http" not in (folder / "report.html").read_text().replace(page.text, "")
    for data in page.images:
        with Image.open(io.BytesIO(base64.b64decode(data, validate=True))) as image:
            image.load()
    assert len(page.images) >= 7
    for texts in ("optimizer steps", "6", "finished", "max_train_steps: 6", "checkpoint-3, checkpoint-6", "torch"):
        assert texts in page.text


def test_every_picture_is_that_of_the_run(folder, capsys):
    page = page_of(folder, capsys)
    kept = {base64.b64encode(path.read_bytes()).decode() for path in (folder / "samples").glob("samples-*.png")}
    assert kept <= set(page.images)


def test_a_run_that_is_not_finished(folder, tmp_path, capsys):
    (tmp_path / "metrics.jsonl").write_text((folder / "metrics.jsonl").read_text() + '{"step": 7, "train/lo')
    page = page_of(tmp_path, capsys)
    assert "not finished" in page.text
    assert len(page.images) == 1


def test_a_pipeline_alone(tmp_path, capsys):
    DDPMExtPipeline(tiny_unet(1), DDPMExtScheduler(20)).save_pretrained(tmp_path)
    assert "Schedule and variances" in page_of(tmp_path, capsys).headings


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["missing/one/two"], "missing/one/two"),
        (["."], "holds no pipeline"),
        (["run", "--out", "."], "is a folder"),
        (["run", "--out", "no/report.html"], "does not exist"),
    ],
)
def test_bad_input(argv, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("run").mkdir()
    Path("run/metrics.jsonl").write_text("")
    assert cli.main(["report", *argv]) == 2
    assert message in capsys.readouterr().err


def test_rows_name_their_timesteps(folder, capsys):
    """Of 50 training steps every fifth and the last, by CompVis' rule, and all 5 of the sampler."""
    text = page_of(folder, capsys).text
    assert "with the noise of timestep t = 0, 5, 10, 15, 20, 25, 30, 35, 40, 45, 49." in text
    assert "after 6 optimizer steps: noise, then the sample after the step at t = 40, 30, 20, 10, 0." in text


@pytest.mark.parametrize("steps", [1, 2, 7, 10, 11, 25, 50])
def test_timesteps_of_the_denoising_are_those_of_the_pipeline(steps):
    """The pipeline's own call says at which timestep each image of `intermediates` was made."""
    pipe, made = DDPMExtPipeline(tiny_unet(1), DDPMExtScheduler(50)), []
    pipe.set_progress_bar_config(disable=True)

    def record(_, index, t, values):
        made.append((int(t), values["latents"].clone()))
        return {}

    generator = torch.Generator().manual_seed(0)
    arguments = {"num_inference_steps": steps, "generator": generator, "callback_on_step_end": record}
    images = pipe(1, log_every_t=column_interval(steps), callback_on_step_end_tensor_inputs=["latents"], **arguments)
    found = [next(t for t, sample in made if torch.equal(sample, image)) for image in images.intermediates[1:]]
    assert found == denoising_timesteps([t for t, _ in made])


def test_speed_and_time(tmp_path):
    """Two processes of a run: the second one counts from 0; 30 steps in 6 seconds."""
    rows = [(10, 2.0), (20, 4.0), (25, 1.0), (30, 2.0)]
    (tmp_path / "timing.jsonl").write_text("".join(f'{{"step": {a}, "seconds": {b}}}\n' for a, b in rows))
    timing = read_timing(tmp_path / "timing.jsonl")
    assert (timing.steps, timing.seconds, timing.steps_per_second, timing.problem) == (30, 6, 5, "")
    rows = [(10, 2.0, 0), (20, 3.0, 10), (40, 5.0, 20), (40, 2.0, 30)]  # a slow first step; nothing falls
    lines = [f'{{"step": {a}, "seconds": {b}, "start_step": {c}}}\n' for a, b, c in rows]
    (tmp_path / "timing.jsonl").write_text("".join(lines))
    timing = read_timing(tmp_path / "timing.jsonl")
    assert (timing.steps, timing.seconds) == (50, 12)
    (tmp_path / "timing.jsonl").write_text('{"step": 10, "seconds": 2}\n{"step": "x", "seconds": 3}\n')
    timing = read_timing(tmp_path / "timing.jsonl")
    assert timing.steps_per_second == 5
    assert "row 2: step is 'x', not a number" in timing.problem
    assert read_timing(tmp_path / "missing").steps_per_second is None


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.4, "0 s"),
        (119, "119 s"),
        (600, "10 min"),
        (7199, "2 h 0 min"),
        (12_060, "3 h 21 min"),
        (360_000, "4 days 4 h"),
    ],
)
def test_durations(seconds, text):
    assert format_duration(seconds) == text


def test_the_overview(folder, tmp_path, capsys):
    """The best value and its step, speed, size, and what a converted model came from."""
    shutil.copytree(folder / "unet", tmp_path / "unet")
    rows = [(1, 3.0, 10.0), (2, 1.0, 12.0), (3, 1.0, 11.0), (4, 2.0, 9.0)]
    lines = [json.dumps({"step": step, "val/loss_simple": loss, "val/psnr": psnr}) for step, loss, psnr in rows]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    record = {"format": 1, "from": "compvis", "source": "model.ckpt", "default": "ema", "left_out": [{}, {}]}
    (tmp_path / "conversion.json").write_text(json.dumps(record))
    text = page_of(tmp_path, capsys).text
    assert "2.00000 (best 1.00000 at step 2)" in text
    assert "9.00000 (best 12.00000 at step 2)" in text
    assert f"parameters{sum(weight.numel() for weight in tiny_unet_of(folder).parameters()):,}" in text
    assert "converted frommodel.ckpt of CompVis' code, ema weights, 2 tensors left out" in text


def tiny_unet_of(folder):
    return UNet2DModel.from_pretrained(folder, subfolder="unet")
