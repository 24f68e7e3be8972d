"""The page of `ddpm-ext report A B ...`: several runs beside each other.

Curves of each metric over each other, the options in which the runs differ, and samples, which start from the same
noise where seed and size of the images are equal.
"""

from __future__ import annotations

import html
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from diffusers_ddpm_ext.cli.report_html import Figures, page_parts, table
from diffusers_ddpm_ext.cli.report_overview import best_of, numbered, overview
from diffusers_ddpm_ext.errors import printable
from diffusers_ddpm_ext.hub.card_facts import METRIC_NAMES, FolderFacts
from diffusers_ddpm_ext.plotting.comparison import plot_comparison
from diffusers_ddpm_ext.utils.run_metrics import MetricCurve

PLACES = ("output_dir", "logging_dir", "cache_dir", "run_name", "hub_model_id")
"""Options that only say where files go: runs that are compared differ in them always."""
COMPARED = (
    "loss_type", "prediction_type", "num_train_timesteps", "beta_schedule", "beta_start", "beta_end", "cosine_s",
    "rescale_betas_zero_snr", "data_range", "resolution", "vae", "scale_factor", "train_data_dir", "dataset_name",
)  # fmt: skip
"""Options that change what a loss is the mean of."""
MAX_STEPS = 4  # grids of samples of equal steps
ABSENT = "-"


class ComparisonPage:
    """The page about several folders; `parts` writes it.

    Attributes:
        runs: what each folder states, and what of it is left out, by the label of the run.
        temporary: an empty folder for plots.
    """

    def __init__(self, folders: Sequence[Path], temporary: Path) -> None:
        self.runs = {label: FolderFacts(folder) for label, folder in zip(labels_of(folders), folders, strict=True)}
        self.temporary = temporary
        self._figures = Figures()
        self._options = {label: facts.options() for label, facts in self.runs.items()}

    @property
    def problems(self) -> list[str]:
        """What was left out, with the run."""
        return [f"{label}: {problem}" for label, facts in self.runs.items() for problem in facts.problems]

    def parts(self) -> Iterator[str]:
        """The HTML, in pieces."""
        metrics = {label: facts.metrics() for label, facts in self.runs.items()}
        rows = {label: dict(overview(facts, metrics[label])) for label, facts in self.runs.items()}
        curves = ""
        for name in METRIC_NAMES:
            drawn = {label: run.curves.get(name, MetricCurve()) for label, run in metrics.items()}
            path = plot_comparison(self.temporary / f"{name.replace('/', '-')}.png", name, drawn)
            best = {label: best for label, run in metrics.items() if (best := best_of(name, run)) is not None}
            caption = "; ".join(f"{label}: {value:.5f} at step {step:,}" for label, (value, step) in best.items())
            first = next(iter(self.runs.values()))
            curves += self._figures.figure(first, path, f"{name}. Best of {caption}." if caption else f"{name}.")
        sections = [
            ("Results", beside(rows)),
            ("Curves", f"{self._warning()}{curves}" if curves else ""),
            ("Differing options", self._differences()),
            ("Samples", self._samples()),
        ]
        problems = table([(problem,) for problem in self.problems])
        yield from page_parts(" / ".join(self.runs), [*sections, ("Left out", problems)])

    def _warning(self) -> str:
        """A sentence where options differ that change what a loss means."""
        differing = [name for name in COMPARED if len({repr(o.get(name)) for o in self._options.values()}) > 1]
        if not differing:
            return ""
        text = f"Losses of these runs are not the same quantity: {', '.join(differing)} differ."
        return f"<p><strong>{html.escape(text)}</strong></p>"

    def _differences(self) -> str:
        """The options that are not equal in all runs."""
        known = {label: options for label, options in self._options.items() if options}
        if len(known) < 2:
            return ""
        names = {str(name): None for options in known.values() for name in options if name not in PLACES}
        values = {label: {name: _shown(options, name) for name in names} for label, options in known.items()}
        equal = [name for name in names if len({options[name] for options in values.values()}) == 1]
        differing = {label: {n: v for n, v in options.items() if n not in equal} for label, options in values.items()}
        note = f"<p>{len(equal)} other options are equal.</p>" if equal else ""
        return (beside(differing) or "<p>None.</p>") + note

    def _samples(self) -> str:
        """Final samples beside each other, and samples of the last steps at which all runs drew some."""
        seeds = {repr(options.get("seed")) for options in self._options.values()}
        note = "All runs drew them from the same noise where the size of their images is equal (the same seed)."
        if len(seeds) > 1:
            note = "The runs have different seeds, so that the samples start from different noise."
        rows = [self._row("samples.png", "at the end")]
        steps = [self._steps(facts) for facts in self.runs.values()]
        common = sorted(set.intersection(*steps))
        rows += [self._row(f"samples/samples-{step}.png", f"after {step:,} steps") for step in common[-MAX_STEPS:]]
        return f"<p>{html.escape(note)}</p>{''.join(rows)}" if any(rows) else ""

    def _steps(self, facts: FolderFacts) -> set[int]:
        folder = facts.file("samples")
        grids = [] if folder is None else numbered(folder, r"samples-([0-9]+)\.png")
        return {step for step, path in grids if not path.is_symlink()}

    def _row(self, name: str, when: str) -> str:
        figures = [
            self._figures.figure(facts, facts.file(name), f"{label}, {when}") for label, facts in self.runs.items()
        ]
        return f'<div class="beside">{"".join(figures)}</div>' if any(figures) else ""


def labels_of(folders: Sequence[Path]) -> list[str]:
    """Names of folders, with as many of the folders above them as tell them apart."""
    paths = [folder.resolve().parts for folder in folders]
    for length in range(1, max(map(len, paths)) + 1):
        labels = ["/".join(part.strip("/") for part in path[-length:]) for path in paths]
        if len(set(labels)) == len(labels):
            break
    return [printable(label, 200) for label in labels]


def beside(columns: Mapping[str, Mapping[str, str]]) -> str:
    """A table with a column for each run and a row for each name; empty without names."""
    names = list(dict.fromkeys(name for column in columns.values() for name in column))
    rows = [(name, *(column.get(name, ABSENT) for column in columns.values())) for name in names]
    return table(rows, ("", *columns)) if rows else ""


def _shown(options: Mapping[Any, Any], name: str) -> str:
    return ABSENT if name not in options else "none" if options[name] is None else str(options[name])
