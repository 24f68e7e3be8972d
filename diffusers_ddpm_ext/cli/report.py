"""`ddpm-ext report`: a self-contained HTML page about a run."""

from __future__ import annotations

import base64
import html
import re
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffusers_ddpm_ext.cli.arguments import LOCAL_FOLDER_HELP, check_output_path, check_pipeline_folder
from diffusers_ddpm_ext.cli.extras import TRAIN_MODULES, require_modules
from diffusers_ddpm_ext.cli.parser import parse_options
from diffusers_ddpm_ext.errors import as_run_error
from diffusers_ddpm_ext.utils.files import CONFIG, ENVIRONMENT, EVALUATION, METRICS, read_json, read_rows
from diffusers_ddpm_ext.utils.option import option, positional

REPORT_EXAMPLES = """examples:
  ddpm-ext report runs/digits                      runs/digits/report.html
  ddpm-ext report runs/digits --out digits.html

Bits per dimension are included after `ddpm-ext evaluate`, fitted variances after `ddpm-ext fit-variance`."""
MAX_GRIDS = 12  # grids of samples on the page, evenly spaced over the run
STYLE = """
:root { color-scheme: light dark; }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
h1, h2 { line-height: 1.2; } h2 { margin-top: 2.5rem; border-bottom: 1px solid #8885; padding-bottom: .2rem; }
table { border-collapse: collapse; } td, th { padding: .15rem .8rem .15rem 0; text-align: left; vertical-align: top; }
img { max-width: 100%; height: auto; background: #fff; } figure { margin: 0; }
.many { display: grid; grid-template-columns: repeat(auto-fill, minmax(13rem, 1fr)); gap: 1rem; }
figcaption { font-size: .85em; opacity: .8; } pre { overflow-x: auto; background: #8881; padding: .8rem; }
"""


@dataclass(frozen=True)
class ReportOptions:
    """Write a self-contained page about a run, finished or not, with everything in one file.

    It has curves, samples during training, schedule, variances, bits per dimension, every option and the environment.
    All images are embedded; nothing is loaded from anywhere.
    """

    folder: Path = positional("FOLDER", LOCAL_FOLDER_HELP)
    out: Path | None = option(None, "The page.", metavar="FILE", unset="FOLDER/report.html")

    @property
    def output_file(self) -> Path:
        """The page: ``--out``, or its default."""
        return self.folder / "report.html" if self.out is None else self.out


def report_command(argv: Sequence[str]) -> str:
    """Parse the command line and run the command; arguments and errors are those of the two functions below."""
    options = parse_report_args(argv)
    require_modules(TRAIN_MODULES)
    return report(options)


def parse_report_args(argv: Sequence[str]) -> ReportOptions:
    """The options of a command line, checked; errors are those of `parse_options`."""
    options = parse_options(ReportOptions, argv, "report", REPORT_EXAMPLES)
    if not (options.folder / METRICS).is_file():
        check_pipeline_folder(str(options.folder))
    check_output_path("--out", options.output_file, "file")
    return options


def report(options: ReportOptions) -> str:
    """Write the page; RunError if it cannot be written."""
    from diffusers_ddpm_ext.utils.files import write_text_atomically

    out = options.output_file
    with tempfile.TemporaryDirectory() as temporary:
        page = "\n".join(_page(options.folder, Path(temporary)))
    with as_run_error(out):
        write_text_atomically(out, page)
    return f"{out}: open it in a browser"


def _page(folder: Path, temporary: Path) -> Iterator[str]:
    rows = read_rows(folder / METRICS)
    name = html.escape(folder.resolve().name)
    yield f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>{name}</title>'
    yield f'<meta name="viewport" content="width=device-width"><style>{STYLE}</style></head><body><h1>{name}</h1>'
    yield _overview(folder, rows)
    samples = folder / "samples.png"
    if samples.is_file():
        yield _section("Samples", _figure(samples, "Sampled at the end, with the averaged weights if there are any."))
    yield _curves(folder, temporary, rows)
    yield _grids(folder)
    yield _plots(folder, temporary)
    yield _evaluation(folder)
    for title, file in (("Every option", CONFIG), ("Environment", ENVIRONMENT)):
        path = folder / file
        if path.is_file():
            yield _section(title, f"<pre>{html.escape(path.read_text(encoding='utf-8'))}</pre>")
    yield "</body></html>"


def _section(title: str, content: str) -> str:
    return f"<section><h2>{html.escape(title)}</h2>{content}</section>" if content else ""


def _figure(path: Path, caption: str) -> str:
    text, data = html.escape(caption), base64.b64encode(path.read_bytes()).decode()
    return f'<figure><img alt="{text}" src="data:image/png;base64,{data}"><figcaption>{text}</figcaption></figure>'


def _table(pairs: list[tuple[str, str]]) -> str:
    cells = "".join(f"<tr><th>{html.escape(name)}</th><td>{html.escape(value)}</td></tr>" for name, value in pairs)
    return f"<table>{cells}</table>" if pairs else ""


def _overview(folder: Path, rows: list[dict[str, Any]]) -> str:
    last: dict[str, Any] = {}
    for row in rows:
        last |= row
    pairs = [("state", "finished" if (folder / "finished.json").is_file() else "not finished")] if rows else []
    if "step" in last:
        pairs.append(("optimizer steps", f"{int(last['step']):,}"))
    for key in ("train/loss_simple", "val/loss_simple", "val/loss_simple_ema", "val/bpd", "val/bpd_ema"):
        if key in last:
            best = min(row[key] for row in rows if key in row)
            pairs.append((key, f"{last[key]:.5f}" + (f" (least {best:.5f})" if key.startswith("val") else "")))
    data = read_json(folder / ENVIRONMENT).get("data", {})
    if data:
        pairs.append(("images", f"{data['name']}: {data['train']:,} for training, {data['validation']:,} held out"))
    checkpoints = sorted((path.name for path in folder.glob("checkpoint-*")), key=lambda name: int(name.split("-")[1]))
    if checkpoints:
        pairs.append(("checkpoints", ", ".join(checkpoints)))
    return _table(pairs)


def _curves(folder: Path, temporary: Path, rows: list[dict[str, Any]]) -> str:
    from diffusers_ddpm_ext.plotting.curves import plot_run_losses

    loss_type = re.search(r"^\s*loss_type: (\w+)", _text(folder / CONFIG), re.M)
    losses = plot_run_losses(rows, temporary / "loss.png", loss_type[1] if loss_type else "loss") if rows else None
    figures = [] if losses is None else [_figure(losses, "Losses over optimizer steps.")]
    logvar = folder / "samples" / "logvar.png"
    if logvar.is_file():
        figures.append(_figure(logvar, "The learned log-variance against the measured log loss."))
    return _section("Curves", "".join(figures))


def _grids(folder: Path) -> str:
    """Grids of samples during the run, including the first and the last."""
    numbered = []
    for path in (folder / "samples").glob("samples-*.png"):
        step = re.fullmatch(r"samples-(\d+)", path.stem)
        if step is not None:
            numbered.append((int(step[1]), path))
    numbered.sort()
    if len(numbered) > MAX_GRIDS:
        numbered = [numbered[round(i * (len(numbered) - 1) / (MAX_GRIDS - 1))] for i in range(MAX_GRIDS)]
    figures = "".join(_figure(path, f"after {step:,} steps") for step, path in numbered)
    return _section("Samples through training", f'<div class="many">{figures}</div>' if figures else "")


def _plots(folder: Path, temporary: Path) -> str:
    from diffusers_ddpm_ext.cli.plot import PlotOptions, plot

    if not (folder / "scheduler" / "scheduler_config.json").is_file():
        return ""
    captions = {
        "schedule": "Betas and signal-to-noise ratio.",
        "weights": "The weight of each step in the loss.",
        "variance": "The variance of each reverse step, between that of the posterior (0) and beta (1).",
        "timesteps": "The best few steps for the bound.",
        "steps": "The bound's term at each step.",
    }
    plot(PlotOptions(folder, temporary / "plots"))
    plots = [(temporary / "plots" / f"{name}.png", text) for name, text in captions.items()]
    return _section("Schedule and variances", "".join(_figure(path, text) for path, text in plots if path.is_file()))


def _evaluation(folder: Path) -> str:
    from diffusers_ddpm_ext.hub.card import bound_label

    result = read_json(folder / EVALUATION)
    names = {"bits_per_dim": bound_label(result), "prior": "prior", "steps": "steps", "decoder": "decoder"}
    pairs = [(text, f"{result[name]:.4f}") for name, text in names.items() if name in result]
    if pairs:
        if result["low"] is not None:
            pairs.insert(1, ("interval", f"{result['low']:.4f} to {result['high']:.4f}"))
        pairs.append(("images", str(result.get("num_images", "?"))))
    return _section("Likelihood of held-out images", _table(pairs))


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8") if path.is_file() else ""
