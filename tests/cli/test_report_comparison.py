"""`ddpm-ext report A B`: curves, differing options and samples of several runs on one page."""

from __future__ import annotations

import base64
import io
import json
from pathlib import Path

import numpy as np
import pytest
from cli.test_report import Page
from PIL import Image

from diffusers_ddpm_ext import cli
from diffusers_ddpm_ext.cli.report_comparison import labels_of
from diffusers_ddpm_ext.plotting import comparison
from diffusers_ddpm_ext.utils.run_metrics import MetricCurve


def add_run(folder: Path, losses: list[float], **options: object) -> Path:
    """The records of a run that a comparison reads, and pictures of one gray."""
    (folder / "samples").mkdir(parents=True)
    rows = [{"step": 10 * i, "val/loss_simple": loss} for i, loss in enumerate(losses, 1)]
    (folder / "metrics.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    (folder / "config.yaml").write_text(json.dumps({"engine": {"seed": 0, "output_dir": str(folder)} | options}))
    gray = Image.fromarray(np.full((8, 8), len(losses), dtype=np.uint8))
    for name in ("samples.png", "samples/samples-10.png", f"samples/samples-{len(losses)}5.png"):
        gray.save(folder / name)
    return folder


@pytest.fixture
def runs(tmp_path, monkeypatch) -> list[str]:
    monkeypatch.chdir(tmp_path)
    add_run(tmp_path / "a" / "digits", [3.0, 1.0, 2.0], learning_rate=1e-3, vae=None)
    add_run(tmp_path / "b" / "digits", [4.0, 0.5], learning_rate=2e-3, vae=None)
    return ["a/digits", "b/digits"]


def test_two_runs(runs, tmp_path, capsys):
    assert cli.main(["report", *runs]) == 0
    assert "comparison.html" in capsys.readouterr().out
    text = Path("comparison.html").read_text()
    page = Page(text)
    assert page.headings == ["a/digits / b/digits", "Results", "Curves", "Differing options", "Samples"]
    assert "<th>learning_rate</th><td>0.001</td><td>0.002</td>" in text
    assert "output_dir" not in page.text, "it differs always"
    assert "2 other options are equal." in page.text, "seed and vae"
    assert "Best of a/digits: 1.00000 at step 20; b/digits: 0.50000 at step 20." in page.text
    assert "same noise" in page.text
    pictures = [Image.open(io.BytesIO(base64.b64decode(data))) for data in page.images]
    assert [np.asarray(picture).flat[0] for picture in pictures if picture.size == (8, 8)] == [3, 2, 3, 2], (
        "the final samples and those of the one common step"
    )


def test_what_cannot_be_compared_is_said(runs, tmp_path, capsys):
    add_run(
        tmp_path / "c" / "digits", [1.0], seed=1, prediction_type="sample", huber_c=0.1, learning_rate=1e-3, vae=None
    )
    assert cli.main(["report", *runs, "c/digits", "--out", "page.html"]) == 0
    text = Page(Path("page.html").read_text()).text
    assert "not the same quantity: prediction_type differ." in text, "an option that is not stated has its default"
    assert "validation losses are of other images or other noise: seed differ." in text
    assert "Seeds: 0: a/digits, b/digits; 1: c/digits." in text


def test_of_a_run_without_options_nothing_is_claimed(runs, tmp_path):
    (add_run(tmp_path / "c" / "digits", [1.0]) / "config.yaml").unlink()
    assert cli.main(["report", *runs, "c/digits", "--out", "page.html"]) == 0
    text = Page(Path("page.html").read_text()).text
    assert "Whether losses are the same quantity is not known: c/digits has no options." in text
    assert "differ." not in text
    assert "Seeds: 0: a/digits, b/digits; not known: c/digits." in text


def test_reconstructions_are_beside_each_other(runs):
    for number, run in enumerate(runs, 5):
        gray = Image.fromarray(np.full((9, 9), number, dtype=np.uint8))
        gray.save(f"{run}/reconstructions.png")
        gray.save(f"{run}/samples/reconstructions-10.png")
    assert cli.main(["report", *runs]) == 0
    page = Page(Path("comparison.html").read_text())
    pictures = [Image.open(io.BytesIO(base64.b64decode(data))) for data in page.images]
    assert [np.asarray(picture).flat[0] for picture in pictures if picture.size == (9, 9)] == [5, 6, 5, 6]
    assert page.headings[-1] == "Reconstructions"


def test_what_was_evaluated_is_beside_each_other(runs):
    for number, run in enumerate(runs):
        Path(run, "evaluation").mkdir()
        Path(run, "evaluation/evaluation.json").write_text(
            json.dumps({"bits_per_dim": 2.5 + number, "low": 2, "high": 4})
        )
        kid = {"metrics": {"kid": {"value": 0.5 + number, "low": 0.25, "high": 2}}, "samples": {}, "num_samples": 7}
        text = json.dumps(kid | {"features": {"name": "digits"}, "split": "train", "confidence": 0.95})
        Path(run, "evaluation/sample_metrics.json").write_text(text)
    assert cli.main(["report", *runs]) == 0
    text = Path("comparison.html").read_text()
    assert "<td>2.5000 (2.0000 to 4.0000)</td><td>3.5000 (2.0000 to 4.0000)</td>" in text
    assert "<th>kernel distance</th><td>0.5 (0.25 to 2)</td><td>1.5 (0.25 to 2)</td>" in text


def test_eight_runs_with_long_names_are_all_named(tmp_path, monkeypatch):
    """Names that differ in the middle of 200 letters, and in the first and last word of a caption."""
    monkeypatch.chdir(tmp_path)
    runs = [
        add_run(tmp_path / f"{'r' * 110}{letter * 20}{'s' * 110}", [1.0 + n]) for n, letter in enumerate("abcdefgh")
    ]
    assert cli.main(["report", *map(str, runs)]) == 0
    text = Page(Path("comparison.html").read_text()).text
    caption = text[text.index("Best of") :]
    for number in range(1, 9):
        assert f"{number}: rrr" in caption
        assert f"{number}.00000 at step 10" in caption


def test_a_damaged_run_does_not_hide_the_others(runs, capsys):
    Path("b/digits/metrics.jsonl").write_text('{"step": 10, "val/loss_simple": 4.0}\nnonsense\n')
    assert cli.main(["report", *runs]) == 0
    assert "b/digits: " in capsys.readouterr().err
    page = Page(Path("comparison.html").read_text())
    assert "Left out" in page.headings
    assert "a/digits: 1.00000 at step 20; b/digits: 4.00000 at step 10" in page.text


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["a/../a/digits"], "is given twice"),
        (["missing/one/two"], "missing/one/two"),
        ([f"x{number}" for number in range(8)], "10 folders are given: compare 8 at most"),
        (["--out", "no/page.html"], "does not exist"),
    ],
)
def test_bad_input(runs, more, message, tmp_path, capsys):
    for number in range(8):
        add_run(tmp_path / f"x{number}", [1.0])
    assert cli.main(["report", *runs, *more]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line
    assert not Path("comparison.html").exists()


def test_labels_tell_folders_apart(tmp_path):
    assert labels_of([tmp_path / "a", tmp_path / "b"]) == ["a", "b"]
    assert labels_of([tmp_path / "a" / "run", tmp_path / "b" / "run"]) == ["a/run", "b/run"]
    assert labels_of([Path("/x/a/run"), Path("/y/a/run"), Path("/y/b")]) == ["x/a/run", "y/a/run", "/y/b"]


def test_a_run_without_a_metric_keeps_its_color(tmp_path, monkeypatch):
    """The third run is drawn in the third color, though the second one has no values."""
    lines = []
    monkeypatch.setattr(comparison, "save_figure", lambda path, draw: draw(Axes()) or path)

    class Axes:
        def plot(self, steps, values, **style):
            lines.append((style["label"], style["color"], list(values)))

        def __getattr__(self, name):
            return Axes() if name == "xaxis" else lambda *args, **named: None

    curves = {"a": MetricCurve([1.0], [2.0]), "b": MetricCurve(), "c": MetricCurve([1.0], [3.0])}
    comparison.plot_comparison(tmp_path / "x.png", "val/bpd", curves)
    assert lines == [("a", comparison.INKS[0], [2.0]), ("c", comparison.INKS[2], [3.0])]
    assert comparison.plot_comparison(tmp_path / "x.png", "val/bpd", {"a": MetricCurve()}) is None
