"""`ddpm-ext report`: one page that needs nothing but a browser."""

from __future__ import annotations

import base64
import io
from html.parser import HTMLParser
from pathlib import Path

import pytest
from helpers.runs import tiny_run
from helpers.tiny import tiny_unet
from PIL import Image

from diffusers_ddpm_ext import DDPMExtPipeline, DDPMExtScheduler, cli
from diffusers_ddpm_ext.training import trainer

VOID = {"meta", "img", "br"}


class Page(HTMLParser):
    """What a page holds; refuses tags that are not closed."""

    def __init__(self, text):
        super().__init__()
        self.open, self.images, self.addresses, self.headings, self.text = [], [], [], [], ""
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        named = dict(attrs)
        if tag == "img":
            assert named["alt"]
            kind, _, data = named["src"].partition(",")
            assert kind == "data:image/png;base64"
            self.images.append(data)
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
    assert {"Samples", "Curves", "Samples through training", "Schedule and variances", "Every option"} <= {
        *page.headings
    }
    assert page.addresses == []
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
