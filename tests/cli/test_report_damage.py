"""`ddpm-ext report` shows what is right of a damaged or hostile folder, and names the rest; `plot` is one line."""

from __future__ import annotations

import base64
import json
import os
import shutil
import struct
import subprocess
import sys
import zlib
from html.parser import HTMLParser
from pathlib import Path

import pytest
from helpers.paths import TESTS
from helpers.tiny import tiny_unet

from diffusers_ddpm_ext import DDPMExtPipeline, DDPMExtScheduler, cli
from diffusers_ddpm_ext.cli import report_html
from diffusers_ddpm_ext.plotting import chain, curves
from diffusers_ddpm_ext.utils.run_metrics import MAX_POINTS, MetricCurve, read_metrics


def png(width: int = 1, height: int = 1, padding: int = 0) -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
    return (
        b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"\0\0")) + chunk(b"IEND", b"") + bytes(padding)
    )


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run") / "digits"
    DDPMExtPipeline(tiny_unet(1), DDPMExtScheduler(20)).save_pretrained(folder)
    rows = [{"step": step, "train/loss_simple": 1 / step, "val/loss_simple": 2 / step} for step in range(1, 9)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "config.yaml").write_text("data:\n  dataset_name: null\n")
    (folder / "samples").mkdir()
    for step in (3, 6):
        (folder / "samples" / f"samples-{step}.png").write_bytes(png())
    (folder / "samples.png").write_bytes(png())
    data = {"name": "digits", "train": 90, "validation": 9, "fingerprint": "abc"}
    (folder / "environment.json").write_text(json.dumps({"python": "3.11", "packages": {}, "data": data}))
    (folder / "evaluation").mkdir()
    facts = {
        "bits_per_dim": 3.25,
        "low": 3.0,
        "high": 3.5,
        "num_images": 9,
        "prior": 0.5,
        "steps": 2.5,
        "decoder": 0.25,
    }
    (folder / "evaluation" / "evaluation.json").write_text(json.dumps(facts))
    (folder / "evaluation" / "steps.csv").write_text("timestep,bits_per_dim\n0,0.25\n5,1.5\n19,0.5\n")
    (folder / "logvar").mkdir()
    return folder


@pytest.fixture
def folder(made, tmp_path):
    shutil.rmtree(made / "logvar", ignore_errors=True)
    return Path(shutil.copytree(made, tmp_path / "digits"))


@pytest.fixture
def quick_figures(monkeypatch):
    """Figures are not drawn; that takes half a second each, and tests/plotting draws the odd ones."""
    for module in (curves, chain):
        monkeypatch.setattr(module, "save_figure", lambda path, draw: Path(path).write_bytes(png()) and Path(path))


class Page(HTMLParser):
    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.images: list[bytes] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        if tag == "img":
            self.images.append(base64.b64decode(dict(attrs)["src"].partition(",")[2]))

    def handle_data(self, data):
        self.text += data


def page_of(folder: Path, capsys) -> tuple[Page, str]:
    assert cli.main(["report", str(folder)]) == 0
    err = capsys.readouterr().err
    assert all(line.startswith("warning: left out of the report: ") for line in err.splitlines()), err
    return Page((folder / "report.html").read_text()), err


def test_a_whole_folder_has_no_warning(folder, capsys):
    page, err = page_of(folder, capsys)
    assert err == ""
    assert "Left out" not in page.text
    assert {"3.2500", "digits: 90 for training", "0.12500", "3.0000 to 3.5000"} <= {
        part for part in ("3.2500", "digits: 90 for training", "0.12500", "3.0000 to 3.5000") if part in page.text
    }
    assert len(page.images) == 7


BROKEN_JSON = [
    b"", b"{", b"[]", b"null", b"3", b'"x"', b"true", b"\xff\xfe{}", b"\x00", b"[" * 30_000, b'{"data": ' * 3000,
    b'{"bits_per_dim": ' + b"9" * 4000 + b', "step": ' + b"9" * 4000 + b"}", b'{"a": 1, "a": 2}', b'{"a": "\\ud800"}',
]  # fmt: skip
FILES = {
    "metrics.jsonl": [*(b'{"step": 1, "train/loss_simple": 0.5}\n' + content + b"\n" for content in BROKEN_JSON[1:]),
                      b'{"step": -1}\n', b'{"step": null}\n', b'{"step": NaN}\n', b'{"train/loss_simple": 1}\n',
                      b'{"step": 1, "val/bpd": "low"}\n', b'{"step": 1, "val/bpd": [1]}\n', b"x" * (2 * 2**20)],
    "environment.json": [*BROKEN_JSON, b'{"data": []}', b'{"data": {}}', b'{"data": {"name": 1}}',
                         b'{"data": {"name": "x", "train": -1, "validation": 0}}',
                         b'{"data": {"name": "x", "train": 1, "validation": 0, "classes": [1]}}',
                         b'{"data": {"name": "x", "train": 1, "validation": 0, "classes": {"name": "x"}}}'],
    "evaluation/evaluation.json": [*BROKEN_JSON, b'{"bits_per_dim": null}', b'{"bits_per_dim": Infinity}',
                                   b'{"bits_per_dim": 1, "low": "x"}', b'{"bits_per_dim": 1, "prior": {}}',
                                   b'{"bits_per_dim": 1, "num_images": 1.5}',
                                   b'{"bits_per_dim": 1, "bin_width": "x"}'],
    "evaluation/steps.csv": [b"", b"timestep\n1\n", b"timestep,bits_per_dim\n", b"timestep,bits_per_dim\n0\n",
                             b"timestep,bits_per_dim\nx,1\n", b"timestep,bits_per_dim\n1.5,1\n", b"\xff,\n",
                             b"timestep,bits_per_dim\n0,nan\n", b"timestep,bits_per_dim\n0,inf\n", b'"\n',
                             b"timestep,bits_per_dim\n0,1e999\n", b"timestep,timestep,bits_per_dim\n0,0,1\n",
                             b"timestep,bits_per_dim\n" + b"9" * 4000 + b",1\n",
                             "timestep,bits_per_dim\n١,1\n".encode()],
    "scheduler/scheduler_config.json": [*BROKEN_JSON[:-2], b'{"beta_schedule": 5}', b'{"v_posterior": "x"}',
                                        b'{"num_train_timesteps": "many"}', b'{"num_train_timesteps": -3}',
                                        b'{"trained_betas": [NaN]}', b'{"optimal_timesteps": {"x": 1}}'],
    "variance_fit.json": [b"\xff"],
    "config.yaml": [b"a: [", b"\xff\xfe", b"\x00", b"- a", b"a: 1\na: 2", b"[" * 5000, b"# " + b"x" * 2**21],
    "samples.png": [b"", b"GIF89a", b"\x89PNG\r\n\x1a\n", png(1, 100_000_000), png(padding=17 * 2**20)],
    "samples/samples-6.png": [b"<svg onload=alert(1)>"],
    "model_index.json": [b"[" * 30_000, b'{"id2label": 5}', b'{"id2label": {"x": "y"}}'],
}  # fmt: skip
DAMAGE = [(name, content) for name, contents in FILES.items() for content in contents]
UNREAD = {"variance_fit.json"}  # without a learned log-variance nothing asks for it


@pytest.mark.parametrize(("name", "content"), DAMAGE, ids=[f"{name}-{i}" for i, (name, _) in enumerate(DAMAGE)])
@pytest.mark.usefixtures("quick_figures")
def test_one_damaged_file(name, content, folder, capsys):
    """The page is written, names the file, and shows the other parts."""
    (folder / name).write_bytes(content)
    page, err = page_of(folder, capsys)
    if name in UNREAD:
        assert err == ""
        return
    assert Path(name).name in err or (name.startswith("evaluation") and "evaluation" in err), err
    assert "Left out" in page.text
    assert "Samples through training" in page.text
    assert ("3.2500" in page.text) or name == "evaluation/evaluation.json"
    assert ("digits: 90" in page.text) or name == "environment.json"
    status = cli.main(["plot", str(folder), "--out", str(folder.parent / "plots")])
    err = capsys.readouterr().err
    assert (status, err.count("error: ")) in ((0, 0), (2, 1)), err
    assert status == 0 or not (folder.parent / "plots").exists(), "all plots, or none"


@pytest.mark.parametrize("name", [*FILES, "samples", "evaluation", "scheduler", "unet", "card", "plots"])
@pytest.mark.parametrize("kind", ["pipe", "folder", "link", "loop"])
@pytest.mark.usefixtures("quick_figures")
def test_what_is_no_file(name, kind, folder, tmp_path, capsys):
    path, elsewhere = folder / name, tmp_path / "elsewhere"
    shutil.move(path, elsewhere) if path.exists() else elsewhere.write_text("secret")
    if elsewhere.is_dir():
        (elsewhere / "secret.txt").write_text("secret")
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    else:
        path.symlink_to(elsewhere if kind == "link" else path.name)
    if name == "model_index.json" and kind in ("pipe", "loop"):
        assert cli.main(["report", str(folder)]) in (0, 2)
        return
    page, err = page_of(folder, capsys)
    shown = {"card", "plots", "unet", "variance_fit.json"}  # of which the page shows nothing
    if kind == "link" and name not in shown:
        assert f"{name} is a link" in err or f"{name}/" in err or f"links in samples: {Path(name).name}" in err
    assert "secret" not in (folder / "report.html").read_text()
    assert "optimizer steps" in page.text or name == "metrics.jsonl"


@pytest.mark.usefixtures("quick_figures")
def test_names_are_shown_and_never_obeyed(folder, capsys):
    name = "<script>alert(1)</script>\x1b[31m\u202e"
    data = {"name": name, "train": 1, "validation": 0, "fingerprint": name, "classes": [{"name": name, "images": 77}]}
    (folder / "environment.json").write_text(json.dumps({"python": name, "packages": {name: name}, "data": data}))
    (folder / "config.yaml").write_text(json.dumps({"loss_type": name, "dataset_name": name}))
    (folder / "checkpoint-old").mkdir()
    (folder / f"checkpoint-{'9' * 200}").mkdir()
    (folder / "checkpoint-5").mkdir()
    (folder / "checkpoint-\u0665").mkdir()
    (folder / "metrics.jsonl").write_text('{"step": 1, "val/bpd": "' + "\\u001b[31m" + '"}\n')
    renamed = folder.rename(folder.parent / "a <b> \x1b[31m")
    page, err = page_of(renamed, capsys)
    assert "script" not in page.tags
    assert "\x1b" not in page.text + err
    assert "77 images" in page.text
    assert "checkpoint-5" in page.text
    assert "checkpoint-old" not in page.text


@pytest.mark.usefixtures("quick_figures")
def test_thousands_of_samples_and_a_budget_of_bytes(folder, capsys, monkeypatch):
    for step in range(3000):
        (folder / "samples" / f"samples-{step}.png").write_bytes(png())
    page, err = page_of(folder, capsys)
    assert err == ""
    assert len(page.images) == 17
    monkeypatch.setattr(report_html, "MAX_PAGE_IMAGE_BYTES", 500)
    page, err = page_of(folder, capsys)
    assert "which is enough" in err
    assert sum(map(len, page.images)) <= 500


def test_a_long_run_in_bounded_memory(tmp_path):
    """120,000 rows: the memory grows by less than the file, and the curve keeps its mean and its end."""
    path = tmp_path / "metrics.jsonl"
    with path.open("w") as file:
        for step in range(1, 120_001):
            file.write(json.dumps({"step": step, "train/loss_simple": 1 + (step % 2), "note": "x" * 150}) + "\n")
    code = (
        "import resource, sys; from diffusers_ddpm_ext.utils.run_metrics import read_metrics\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "m = read_metrics(sys.argv[1], ['train/loss_simple']); c = m.curves['train/loss_simple']\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before, len(c.values), c.steps[-1],\n"
        "      m.last['step'], sum(c.values) / len(c.values), *m.least['train/loss_simple'], m.problem)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=True,
        env=os.environ | {"PYTHONPATH": str(TESTS.parent)},
    )  # fmt: skip
    kilobytes, points, end, last, mean, least, least_step = map(float, done.stdout.split())
    assert kilobytes < 8_000 < path.stat().st_size / 1024
    assert MAX_POINTS / 2 <= points <= MAX_POINTS
    assert (end, last, mean, least, least_step) == (120_000, 120_000, 1.5, 1, 2)


@pytest.mark.parametrize("count", [1, 2, MAX_POINTS, MAX_POINTS + 1, 2 * MAX_POINTS + 3, 5 * MAX_POINTS])
def test_a_curve_keeps_its_values_or_their_means(count):
    curve = MetricCurve()
    for step in range(count):
        curve.append(step, float(step))
    width = curve.stride
    assert width == 1 if count <= MAX_POINTS else width & (width - 1) == 0
    assert len(curve.values) == len(curve.steps) == count // width
    assert curve.values == [sum(range(i, i + width)) / width for i in range(0, count // width * width, width)]
    assert curve.steps == [i + width - 1 for i in range(0, count // width * width, width)]


def test_rows_before_a_damage_count(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "a": 5, "b": NaN}\n\n{"step": 2, "a": 3}\nnonsense\n{"step": 3, "a": 1}\n')
    metrics = read_metrics(path, ["a", "b"])
    assert (metrics.last["step"], metrics.last["a"], metrics.least) == (2, 3, {"a": (3, 2)})
    assert metrics.most == {"a": (5, 1)}
    assert "line 4" in metrics.problem
    path.write_text('{"step": 1, "a": 5}\n{"step": 2, "a"')
    assert read_metrics(path, ["a"]).problem == "", "a row that is being written"
    assert read_metrics(tmp_path / "missing.jsonl", ["a"]).last == {}
