"""The page of `ddpm-ext report`, part by part: what of a run's folder is readable, within a budget of bytes.

Names and texts from outside are escaped. What is missing is left out silently; what is unreadable, too large or a link
is left out and listed at the end of the page.
"""

from __future__ import annotations

import html
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from diffusers_ddpm_ext.cli.report_html import Figures, folded, page_parts, table
from diffusers_ddpm_ext.cli.report_overview import numbered, overview, preview_note, score_pairs
from diffusers_ddpm_ext.errors import as_config_error, printable, printable_lines
from diffusers_ddpm_ext.hub.card_facts import FolderFacts
from diffusers_ddpm_ext.plotting.row_timesteps import denoising_timesteps, diffusion_timesteps
from diffusers_ddpm_ext.utils.files import CONFIG, ENVIRONMENT
from diffusers_ddpm_ext.utils.folder_scan import list_names
from diffusers_ddpm_ext.utils.run_metrics import RunMetrics
from diffusers_ddpm_ext.utils.vocabulary import SCORES

MAX_GRIDS = 12  # grids of samples on the page, evenly spaced over the run
MAX_TEXT, MAX_CLASS_ROWS = 2**18, 1000
PLOTTED_FILES = ("scheduler/scheduler_config.json", "logvar", "variance_fit.json", "evaluation/steps.csv", CONFIG)
CAPTIONS = {
    "schedule": "Betas and signal-to-noise ratio.",
    "weights": "The weight of each step in the loss, before a learned log-variance divides it.",
    "variance": "The variance of each reverse step, between that of the posterior (0) and beta (1).",
    "timesteps": "The best few steps for the bound.",
    "steps": "The bound's term at each step.",
}


class ReportPage:
    """The page about a folder; `parts` writes it.

    Attributes:
        facts: what the folder states, and what of it is left out.
        temporary: an empty folder for plots.
    """

    def __init__(self, folder: Path, temporary: Path) -> None:
        self.facts, self.temporary = FolderFacts(folder), temporary
        self._figures = Figures()

    @property
    def problems(self) -> list[str]:
        """What was left out."""
        return self.facts.problems

    def parts(self) -> Iterator[str]:
        """The HTML, in pieces."""
        facts = self.facts
        metrics = facts.metrics()
        intro = table(overview(facts, metrics))
        sections = [
            ("Classes", self._classes()),
            ("Training images", self._inputs()),
            ("Prompts of the previews", self._prompts()),
            ("Samples", self._final()),
            ("Reconstructions", self._reconstructions()),
            ("Curves", self._curves(metrics)),
            ("Samples through training", self._grids()),
            ("Diffusion and denoising", self._rows()),
            ("Schedule and variances", self._plots()),
            ("Likelihood of held-out images", self._evaluation()),
            ("Quality of samples", self._samples()),
            ("Every option", self._text(CONFIG)),
            ("Environment", self._text(ENVIRONMENT)),
        ]
        problems = table([(problem,) for problem in facts.problems])
        yield from page_parts(facts.folder.resolve().name, [*sections, ("Left out", problems)], intro)

    def _text(self, name: str) -> str:
        text = printable_lines(self.facts.text(name))
        if len(text) > MAX_TEXT:
            self.facts.add_problem(f"{name} after {MAX_TEXT:,} of its {len(text):,} characters")
        return folded(text[:MAX_TEXT], f"{name}, {len(text.splitlines()):,} lines")

    def _prompts(self) -> str:
        return table([(str(number), prompt) for number, prompt in enumerate(self.facts.prompts(), 1) if prompt])

    def _final(self) -> str:
        caption = f"Sampled at the end, with the averaged weights if there are any.{preview_note(self.facts)}"
        return self._figure(self.facts.file("samples.png"), caption)

    def _reconstructions(self) -> str:
        caption = "Held-out images above their reconstructions at the end, with the averaged weights if there are any."
        return self._figure(self.facts.file("reconstructions.png"), caption)

    def _inputs(self) -> str:
        """Some training images as the network gets them."""
        caption = f"Evenly spaced over the training set, resized and cropped.{preview_note(self.facts)}"
        return self._figure(self.facts.file("samples/inputs.png"), caption)

    def _rows(self) -> str:
        """An image losing its structure to noise, and noise becoming an image, with the timestep of each column."""
        facts = self.facts
        folder = facts.file("samples")
        rows = [] if folder is None else numbered(folder, r"denoise_row-([0-9]+)\.png")
        nothing: tuple[list[int], list[int]] = ([], [])
        diffusion, denoising = facts.attempt(self._row_timesteps, nothing)
        figures = self._figure(
            facts.file("samples/diffusion_row.png"),
            f"Training images with the noise of timestep t = {_listed(diffusion)}.",
        )
        if rows:
            step, path = rows[-1]
            text = f"Denoising after {step:,} optimizer steps: noise, then the sample after the step at t = "
            figures += self._figure(facts.file(f"samples/{path.name}"), f"{text}{_listed(denoising)}.")
        return figures

    def _row_timesteps(self) -> tuple[list[int], list[int]]:
        """Timesteps of the columns of both rows; empty where the folder does not state them."""
        from diffusers_ddpm_ext.diffusion.respacing import spaced_timesteps
        from diffusers_ddpm_ext.schedulers.resolved_config import read_scheduler_config

        if self.facts.file("scheduler/scheduler_config.json") is None:
            return [], []
        values = read_scheduler_config(self.facts.folder).values
        chain = int(values["num_train_timesteps"])
        count = self.facts.options().get("ddpm_num_inference_steps")
        count = min(count, chain) if isinstance(count, int) and count > 0 else chain
        with as_config_error("samples/denoise_row"):
            steps = spaced_timesteps(count, chain, values["timestep_spacing"], values["steps_offset"])
        return diffusion_timesteps(chain), denoising_timesteps(steps.tolist())

    def _classes(self) -> str:
        facts, images = self.facts, self.facts.images()
        classes = images.classes if images else []
        if not classes:
            names: dict[int, str] = {}
            names = facts.attempt(lambda: facts.class_names(facts.pipeline_file("model_index.json")), names)
            classes = [(name, None) for name in names.values()]
        rows = [(name, "" if count is None else f"{count:,} images") for name, count in classes[:MAX_CLASS_ROWS]]
        if len(classes) > MAX_CLASS_ROWS:
            rows.append(("...", f"{len(classes) - MAX_CLASS_ROWS:,} more classes"))
        return table(rows)

    def _curves(self, metrics: RunMetrics) -> str:
        from diffusers_ddpm_ext.plotting.curves import plot_run_losses

        loss_type = self.facts.options().get("loss_type")
        name = printable(loss_type, 40) if isinstance(loss_type, str) else "loss"
        losses = plot_run_losses(metrics.curves, self.temporary / "loss.png", name)
        logvar = self.facts.file("samples/logvar.png")
        figures = self._figure(losses, "Losses over optimizer steps.")
        for score in (score for scores in SCORES.values() for score in scores):
            figures += self._figure(self.facts.file(f"samples/{score}.png"), f"Of samples: {score}.")
        figures += self._figure(logvar, "The learned log-variance against the measured log loss.")
        return figures

    def _grids(self) -> str:
        """Grids of samples during the run, including the first and the last."""
        folder = self.facts.file("samples")
        grids = [] if folder is None else numbered(folder, r"(?:samples|reconstructions)-([0-9]+)\.png")
        links = [path.name for _, path in grids if path.is_symlink()]
        if links:
            self.facts.add_problem(f"links in samples: {list_names(links)}")
        grids = [(step, path) for step, path in grids if not path.is_symlink()]
        if len(grids) > MAX_GRIDS:
            grids = [grids[round(i * (len(grids) - 1) / (MAX_GRIDS - 1))] for i in range(MAX_GRIDS)]
        figures = "".join(self._figure(path, f"after {step:,} steps") for step, path in grids)
        note = preview_note(self.facts)
        shown = f"<p>{html.escape(note)}</p>" if figures and note else ""
        return f'{shown}<div class="many">{figures}</div>' if figures else ""

    def _plots(self) -> str:
        from diffusers_ddpm_ext.cli.plot import draw_plot
        from diffusers_ddpm_ext.schedulers.resolved_config import read_scheduler_config

        facts = self.facts
        scheduler_file = facts.file("scheduler/scheduler_config.json")
        problems = len(facts.problems)
        for name in PLOTTED_FILES:
            facts.file(name)
        if scheduler_file is None or len(facts.problems) > problems:
            return ""
        scheduler = facts.attempt(lambda: read_scheduler_config(facts.folder), None)
        if scheduler is None:
            return ""
        figures = []
        for name, caption in CAPTIONS.items():
            draw = partial(draw_plot, name, facts.folder, scheduler, self.temporary / f"{name}.png")
            figures.append(self._figure(facts.attempt(draw, None), caption))
        return "".join(figures)

    def _samples(self) -> str:
        samples = self.facts.sample_scores()
        if samples is None:
            return ""
        figures = [
            ("copies.png", "Samples most like a training image: sample, nearest, second, nearest by pixels."),
            ("loss_gap.png", "The loss of held-out images minus that of training images, at each step."),
        ]
        shown = "".join(self._figure(self.facts.file(f"evaluation/{name}"), text) for name, text in figures)
        return table(score_pairs(samples)) + shown

    def _evaluation(self) -> str:
        bound = self.facts.bound()
        if bound is None:
            return ""
        pairs = [(bound.label, f"{bound.bits_per_dim:.4f}")]
        if bound.low is not None and bound.high is not None:
            pairs.append(("interval", f"{bound.low:.4f} to {bound.high:.4f}"))
        pairs += [(name, f"{value:.4f}") for name, value in bound.parts.items()]
        pairs.append(("images", "?" if bound.num_images is None else str(bound.num_images)))
        return table(pairs)

    def _figure(self, path: Path | None, caption: str) -> str:
        return self._figures.figure(self.facts, path, caption)


def _listed(timesteps: list[int]) -> str:
    return ", ".join(map(str, timesteps)) if timesteps else "?"
