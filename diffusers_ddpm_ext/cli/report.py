"""`ddpm-ext report`: a run as one page that needs nothing but a browser."""

from __future__ import annotations

import base64
import html
import re
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffusers_ddpm_ext.cli.arguments import check_pipeline_folder
from diffusers_ddpm_ext.cli.extras import TRAIN_MODULES, require_modules
from diffusers_ddpm_ext.errors import ConfigError, RunError
from diffusers_ddpm_ext.training.config.flags import Parser
from diffusers_ddpm_ext.utils.files import CONFIG, ENVIRONMENT, EVALUATION, METRICS, read_json, read_rows

HEAD = """One self-contained page about a run, finished or not: curves, samples through training, schedule, variances,
bits per dimension, every option and the environment. All pictures are inside; it loads nothing from anywhere."""
TAIL = """examples:
  ddpm-ext report runs/digits                      runs/digits/report.html
  ddpm-ext report runs/digits --out digits.html

Bits per dimension are shown after `ddpm-ext evaluate`, fitted variances after `ddpm-ext fit-variance`."""
MANY = 12
"""Grids of samples that are shown, evenly over the run."""
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
    """What `ddpm-ext report` was asked for; checked."""

    folder: Path
    out: Path


def report_command(argv: Sequence[str]) -> str:
    """Parse the command line and run the command; arguments and errors are those of the two functions below."""
    options = parse_report_args(argv)
    require_modules(TRAIN_MODULES)
    return report(options)


def parse_report_args(argv: Sequence[str], prog: str = "ddpm-ext report") -> ReportOptions:
    """The options of a command line, checked; arguments and errors are those of `Parser.parse_checked`."""
    parser = Parser(prog=prog, usage=f"{prog} FOLDER [options]", description=HEAD, epilog=TAIL)
    parser.add_argument("folder", metavar="FOLDER", help="Output folder of a run, or a saved pipeline.")
    parser.add_argument("--out", metavar="FILE", help="The page (default: FOLDER/report.html).")
    given = parser.parse_checked(argv)
    folder = Path(given["folder"])
    if not (folder / METRICS).is_file():
        folder = check_pipeline_folder(given["folder"])
    out = folder / "report.html" if given["out"] is None else Path(given["out"])
    if out.is_dir():
        raise ConfigError(f"--out {out} is a folder: name a file")
    if not out.absolute().parent.is_dir():
        raise ConfigError(f"--out {out} lies in a folder that does not exist: make it first")
    return ReportOptions(folder, out)


def report(options: ReportOptions) -> str:
    """Write the page.

    Args:
        options: what was asked for.

    Returns:
        One line that says where it is.

    Raises:
        RunError: it cannot be written.
    """
    from diffusers_ddpm_ext.utils.files import write_text_atomically

    with tempfile.TemporaryDirectory() as place:
        page = "\n".join(_page(options.folder, Path(place)))
    try:
        write_text_atomically(options.out, page)
    except OSError as error:
        raise RunError(f"cannot write {error.filename or options.out}: {error.strerror or error}") from None
    return f"{options.out}: open it in a browser"


def _page(folder: Path, place: Path) -> Iterator[str]:
    rows = read_rows(folder / METRICS)
    name = html.escape(folder.resolve().name)
    yield f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>{name}</title>'
    yield f'<meta name="viewport" content="width=device-width"><style>{STYLE}</style></head><body><h1>{name}</h1>'
    yield _facts(folder, rows)
    samples = folder / "samples.png"
    if samples.is_file():
        yield _section("Samples", _figure(samples, "Drawn at the end, with the averaged weights where there are any."))
    yield _curves(folder, place, rows)
    yield _grids(folder)
    yield _plots(folder, place)
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


def _facts(folder: Path, rows: list[dict[str, Any]]) -> str:
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


def _curves(folder: Path, place: Path, rows: list[dict[str, Any]]) -> str:
    from diffusers_ddpm_ext.plotting.curves import plot_run_losses

    known = re.search(r"^\s*loss_type: (\w+)", _text(folder / CONFIG), re.M)
    picture = plot_run_losses(rows, place / "loss.png", known[1] if known else "loss") if rows else None
    shown = [] if picture is None else [_figure(picture, "Losses over optimizer steps.")]
    logvar = folder / "samples" / "logvar.png"
    if logvar.is_file():
        shown.append(_figure(logvar, "The learned log-variance against the measured log loss."))
    return _section("Curves", "".join(shown))


def _grids(folder: Path) -> str:
    """Grids of samples through the run, the first and the last among them."""
    numbered = []
    for path in (folder / "samples").glob("samples-*.png"):
        step = re.fullmatch(r"samples-(\d+)", path.stem)
        if step is not None:
            numbered.append((int(step[1]), path))
    numbered.sort()
    if len(numbered) > MANY:
        numbered = [numbered[round(i * (len(numbered) - 1) / (MANY - 1))] for i in range(MANY)]
    shown = "".join(_figure(path, f"after {step:,} steps") for step, path in numbered)
    return _section("Samples through training", f'<div class="many">{shown}</div>' if shown else "")


def _plots(folder: Path, place: Path) -> str:
    from diffusers_ddpm_ext.cli.plot import PlotOptions, plot

    if not (folder / "scheduler" / "scheduler_config.json").is_file():
        return ""
    captions = {
        "schedule": "Betas and signal-to-noise ratio.",
        "weights": "What each step weighs in the loss.",
        "variance": "The variance of each reverse step, between the posterior's (0) and beta (1).",
        "timesteps": "The best few steps for the bound.",
        "steps": "What each step adds to the bound.",
    }
    plot(PlotOptions(folder, place / "plots"))
    drawn = [(place / "plots" / f"{name}.png", text) for name, text in captions.items()]
    return _section("Schedule and variances", "".join(_figure(path, text) for path, text in drawn if path.is_file()))


def _evaluation(folder: Path) -> str:
    from diffusers_ddpm_ext.hub.card import bound_label

    facts = read_json(folder / EVALUATION)
    names = {"bits_per_dim": bound_label(facts), "prior": "prior", "steps": "steps", "decoder": "decoder"}
    pairs = [(text, f"{facts[name]:.4f}") for name, text in names.items() if name in facts]
    if pairs:
        pairs.insert(1, ("interval", f"{facts['low']:.4f} to {facts['high']:.4f}"))
        pairs.append(("images", str(facts.get("num_images", "?"))))
    return _section("Likelihood of held-out images", _table(pairs))


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8") if path.is_file() else ""
