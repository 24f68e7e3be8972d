"""The page of `ddpm-ext report A B ...`: several runs beside each other.

Curves of each metric over each other, the options in which the runs differ, and samples, which start from the same
noise where the seeds and the sizes are equal.
"""

from __future__ import annotations

import html
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from diffusers_ddpm_ext.cli.report_html import Figures, page_parts, table
from diffusers_ddpm_ext.cli.report_overview import best_of, measured, numbered, overview
from diffusers_ddpm_ext.errors import printable
from diffusers_ddpm_ext.hub.card_facts import METRIC_NAMES, FolderFacts
from diffusers_ddpm_ext.plotting.comparison import plot_comparison
from diffusers_ddpm_ext.utils.run_metrics import MetricCurve

PLACES = ("output_dir", "logging_dir", "cache_dir", "run_name", "hub_model_id")
"""Options that only say where files go: runs that are compared differ in them always."""
COMPARED = (
    "loss_type", "huber_c", "perceptual_model", "perceptual_weight", "prediction_type", "num_train_timesteps",
    "beta_schedule", "beta_start", "beta_end", "cosine_s", "trained_betas", "rescale_betas_zero_snr",
    "data_range", "channels", "resolution", "resize", "resize_filter", "background", "vae", "scale_factor",
    "scale_by_std", "latent_stats", "latent_mode", "train_data_dir", "dataset_name", "dataset_config_name",
    "image_column", "first_stage_type", "reconstruction_loss", "kl_weight", "commitment_weight",
)  # fmt: skip
"""Options that change what a loss is the mean of."""
HELD_OUT = (
    "seed", "validation_fraction", "validation_split", "validation_data_dir", "validation_examples",
    "validation_max_images", "streaming",
)  # fmt: skip
"""Options that change the held-out images, or the noise and timesteps that they are validated with."""
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
        rows = {
            label: dict([*overview(facts, metrics[label]), *measured(facts)]) for label, facts in self.runs.items()
        }
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
            ("Reconstructions", self._rows("reconstructions")),
        ]
        problems = table([(problem,) for problem in self.problems])
        yield from page_parts(" / ".join(self.runs), [*sections, ("Left out", problems)])

    def _warning(self) -> str:
        """Sentences where options differ that change what a loss means, or may."""
        sentences = []
        if names := self._differing(COMPARED):
            sentences.append(f"Losses of these runs are not the same quantity: {', '.join(names)} differ.")
        if names := self._differing(HELD_OUT):
            sentences.append(f"Their validation losses are of other images or other noise: {', '.join(names)} differ.")
        unknown = [label for label, options in self._options.items() if not options]
        if unknown:
            sentences.append(
                f"Whether losses are the same quantity is not known: {', '.join(unknown)} has no options."
            )
        return "".join(f"<p><strong>{html.escape(sentence)}</strong></p>" for sentence in sentences)

    def _differing(self, names: Sequence[str]) -> list[str]:
        """Those of the options that differ among the runs with options; one that is not stated has its default."""
        from diffusers_ddpm_ext.training.config.option_table import TRAIN

        unless = {name: TRAIN.options[name].default if name in TRAIN.options else None for name in names}
        known = [options for options in self._options.values() if options]
        return [name for name in names if len({repr(options.get(name, unless[name])) for options in known}) > 1]

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
        rows = self._rows("samples")
        return f"<p>{html.escape(self._noise())}</p>{rows}" if rows else ""

    def _noise(self) -> str:
        """Which runs draw from the same noise, as a sentence."""
        of_seed: dict[str, list[str]] = {}
        for label, options in self._options.items():
            of_seed.setdefault(str(options["seed"]) if "seed" in options else "not known", []).append(label)
        where = "the same noise where their images, or latents, have the same size"
        if len(of_seed) == 1 and "not known" not in of_seed:
            return f"All runs have the seed {next(iter(of_seed))}: samples start from {where}."
        seeds = "; ".join(f"{seed}: {', '.join(labels)}" for seed, labels in of_seed.items())
        return f"Samples of runs with equal seeds start from {where}. Seeds: {seeds}."

    def _rows(self, kind: str) -> str:
        """Pictures at the end, and of the last steps at which all runs wrote some; ``kind`` starts their names."""
        rows = [self._row(f"{kind}.png", "at the end")]
        steps = [self._steps(facts, kind) for facts in self.runs.values()]
        common = sorted(set.intersection(*steps))
        rows += [self._row(f"samples/{kind}-{step}.png", f"after {step:,} steps") for step in common[-MAX_STEPS:]]
        return "".join(rows)

    def _steps(self, facts: FolderFacts, kind: str) -> set[int]:
        folder = facts.file("samples")
        grids = [] if folder is None else numbered(folder, rf"{kind}-([0-9]+)\.png")
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
    shown = [printable(label, 200) for label in labels]
    if len(set(shown)) < len(shown):  # long names that differ in the middle
        shown = [f"{number}: {label}" for number, label in enumerate(shown, 1)]
    return shown


def beside(columns: Mapping[str, Mapping[str, str]]) -> str:
    """A table with a column for each run and a row for each name; empty without names."""
    names = list(dict.fromkeys(name for column in columns.values() for name in column))
    rows = [(name, *(column.get(name, ABSENT) for column in columns.values())) for name in names]
    return table(rows, ("", *columns)) if rows else ""


def _shown(options: Mapping[Any, Any], name: str) -> str:
    return ABSENT if name not in options else "none" if options[name] is None else str(options[name])
