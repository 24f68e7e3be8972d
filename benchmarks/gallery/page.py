"""Write the numbers of the gallery's entries into its page.

    python benchmarks/gallery/page.py [--page docs/gallery.md --results docs/gallery]

Between ``<!-- numbers: ENTRY -->`` and ``<!-- end -->`` the page gets the tables of ``ENTRY/results.json``, and after
``<!-- compared: ENTRY ENTRY -->`` one table of both. The rest of the page is written by hand.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

DOCS = Path(__file__).resolve().parents[2] / "docs"
BLOCK = re.compile(r"(<!-- (?P<kind>numbers|compared): (?P<entries>[\w -]+?) -->\n).*?(<!-- end -->)", re.DOTALL)
MEASURED = {"metrics": "samples", "metrics-fewer": "samples", "metrics-real": "held-out images"}
LINE = 76  # characters of a line of a command, which fit a page of the site
METRICS = {
    "fd": "Frechet distance (FD)",
    "kid": "kernel distance (KID)",
    "precision": "precision",
    "recall": "recall",
    "density": "density",
    "coverage": "coverage",
}


def interval(metric: dict[str, float], digits: int = 3) -> str:
    """A value with its interval, in so many significant digits of the value."""

    def text(value: float) -> str:
        shown = f"{value:.{digits}g}"
        return f"{value:.0f}" if "e" in shown and abs(value) >= 1 else shown

    return f"{text(metric['value'])} ({text(metric['low'])} to {text(metric['high'])})"


def duration(seconds: float) -> str:
    """Seconds as a person says them."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def numbers(found: dict[str, Any]) -> Iterator[str]:
    """Lines of the tables of one entry."""
    measured = [found[name] for name in MEASURED]
    columns = [f"{of['num_samples']:,} {title}" for of, title in zip(measured, MEASURED.values(), strict=True)]
    yield f"| against {measured[0]['num_reference']:,} training images | " + " | ".join(columns) + " |"
    yield "|---" * (1 + len(columns)) + "|"
    for key, title in METRICS.items():
        cells = [interval(of["metrics"][key]) for of in measured]
        yield f"| {title} | " + " | ".join(cells) + " |"
    copies = found["copies"]["memorization"]
    yield f"| likely copies of a training image | {percent(copies['rate'])} | | |"
    yield f"| the same rate, if nothing were memorized | {percent(copies['chance'])} | | |"
    if "first stage" in found:
        yield f"| first stage: PSNR of reconstructions | | | {found['first stage']['val/psnr_ema']:.1f} dB |"
    if "bound" in found:
        bound = found["bound"]
        held = f"{bound['bits_per_dim']:.3f} ({bound['low']:.3f} to {bound['high']:.3f})"
        yield f"| bits per dimension | | | {held}, {bound['num_images']:,} images |"
    yield ""
    yield "| work | time of the processor |"
    yield "|---|---|"
    for name, stage in found["stages"].items():
        again = "" if stage["starts"] == 1 else f" in {stage['starts']} starts"
        yield f"| {name} | {duration(stage['cpu_seconds'])}{again} |"
    yield ""
    yield "```"
    for command in found["commands"].values():
        yield " \\\n  ".join(lines_of(command))
    yield "```"
    yield "<!-- not run here: what `build_gallery.py` runs -->"
    yield ""
    machine, versions = found["machine"], found["versions"]
    packages = ", ".join(f"{name} {version}" for name, version in versions.items())
    threads = found["model"]["threads"]
    used = "one thread" if threads == 1 else f"{threads} threads"
    yield (
        f"{found['model']['parameters'] / 1e6:.2f} million parameters; {used} of {machine['name']}; "
        f"Python {machine['python']}, {packages}."
    )
    for name, digest in found["sha256"].items():
        yield f"sha256 of `{name}`: `{digest}`."


def lines_of(command: str) -> Iterator[str]:
    """A command cut before options, into lines of a length that fits the page."""
    line = ""
    for part in re.split(r" (?=--)", command):
        if line and len(line) + 1 + len(part) > LINE:
            yield line
            line = part
        else:
            line += f" {part}" if line else part
    yield line


def compared(entries: Sequence[dict[str, Any]]) -> Iterator[str]:
    """Lines of one table of several entries of the same data: what they cost and how good they are."""
    count = entries[0]["metrics"]["num_samples"]
    rows: dict[str, Callable[[dict[str, Any]], str]] = {
        "time of the processor, training": lambda found: duration(
            sum(found["stages"][name]["cpu_seconds"] for name in found["commands"])
        ),
        f"the same, {count:,} samples": lambda found: duration(found["stages"]["samples"]["cpu_seconds"]),
        "parameters of the network, millions": lambda found: f"{found['model']['parameters'] / 1e6:.2f}",
        **{
            title: lambda found, key=key: interval(found["metrics"]["metrics"][key])  # type: ignore[misc]
            for key, title in METRICS.items()
        },
        "likely copies of a training image": lambda found: percent(found["copies"]["memorization"]["rate"]),
    }
    yield "| | " + " | ".join(found["title"] for found in entries) + " |"
    yield "|---" * (1 + len(entries)) + "|"
    for title, cell in rows.items():
        yield f"| {title} | " + " | ".join(map(cell, entries)) + " |"


def percent(rate: dict[str, float]) -> str:
    """A rate with its interval."""
    return f"{100 * rate['value']:.1f} % ({100 * rate['low']:.1f} to {100 * rate['high']:.1f})"


def fill(page: str, results: Path) -> str:
    """The page with the numbers of its entries.

    Raises:
        FileNotFoundError: an entry of the page has no results.
    """

    def block(match: re.Match[str]) -> str:
        entries = [
            json.loads((results / name / "results.json").read_text("utf-8")) for name in match["entries"].split()
        ]
        lines = numbers(entries[0]) if match["kind"] == "numbers" else compared(entries)
        return match[1] + "\n".join(lines) + "\n" + match[4]

    return BLOCK.sub(block, page)


def main() -> int:
    """Write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--page", type=Path, default=DOCS / "gallery.md")
    parser.add_argument("--results", type=Path, default=DOCS / "gallery")
    options = parser.parse_args()
    options.page.write_text(fill(options.page.read_text("utf-8"), options.results), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
