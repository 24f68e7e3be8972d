"""The page of `ddpm-ext report`, part by part: what of a run's folder is readable, within a budget of bytes.

Names and texts from outside are escaped. What is missing is left out silently; what is unreadable, too large or a link
is left out and listed at the end of the page.
"""

from __future__ import annotations

import base64
import html
import os
import re
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from diffusers_ddpm_ext.errors import ConfigError, printable, printable_lines
from diffusers_ddpm_ext.hub.card_facts import BITS_PER_LATENT, METRIC_NAMES, SCORE_NAMES, FolderFacts
from diffusers_ddpm_ext.plotting.channels import channel_view
from diffusers_ddpm_ext.utils.files import CONFIG, ENVIRONMENT
from diffusers_ddpm_ext.utils.folder_scan import list_names
from diffusers_ddpm_ext.utils.input_files import read_bytes
from diffusers_ddpm_ext.utils.pixel_format import PixelFormat
from diffusers_ddpm_ext.utils.run_metrics import RunMetrics
from diffusers_ddpm_ext.utils.vocabulary import SCORES

MAX_GRIDS = 12  # grids of samples on the page, evenly spaced over the run
MAX_IMAGE_BYTES, MAX_PAGE_IMAGE_BYTES, MAX_PIXELS = 16 * 2**20, 64 * 2**20, 2**26
MAX_TEXT, MAX_CLASS_ROWS = 2**18, 1000
PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
PLOTTED_FILES = ("scheduler/scheduler_config.json", "logvar", "variance_fit.json", "evaluation/steps.csv", CONFIG)
CAPTIONS = {
    "schedule": "Betas and signal-to-noise ratio.",
    "weights": "The weight of each step in the loss.",
    "variance": "The variance of each reverse step, between that of the posterior (0) and beta (1).",
    "timesteps": "The best few steps for the bound.",
    "steps": "The bound's term at each step.",
}
STYLE = """
:root { color-scheme: light dark; }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
h1, h2 { line-height: 1.2; } h2 { margin-top: 2.5rem; border-bottom: 1px solid #8885; padding-bottom: .2rem; }
table { border-collapse: collapse; } td, th { padding: .15rem .8rem .15rem 0; text-align: left; vertical-align: top; }
img { max-width: 100%; height: auto; background: #fff; } figure { margin: 0; }
.many { display: grid; grid-template-columns: repeat(auto-fill, minmax(13rem, 1fr)); gap: 1rem; }
figcaption { font-size: .85em; opacity: .8; } pre { overflow-x: auto; background: #8881; padding: .8rem; }
"""


class ReportPage:
    """The page about a folder; `parts` writes it.

    Attributes:
        facts: what the folder states, and what of it is left out.
        temporary: an empty folder for plots.
    """

    def __init__(self, folder: Path, temporary: Path) -> None:
        self.facts, self.temporary = FolderFacts(folder), temporary
        self._image_bytes = 0

    def parts(self) -> Iterator[str]:
        """The HTML, in pieces."""
        facts = self.facts
        metrics = facts.metrics()
        name = html.escape(printable(facts.folder.resolve().name))
        yield f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>{name}</title>\n'
        yield f'<meta name="viewport" content="width=device-width"><style>{STYLE}</style></head><body>'
        yield f"<h1>{name}</h1>\n"
        yield self._overview(metrics)
        yield self._classes()
        prompts = [(str(number), prompt) for number, prompt in enumerate(facts.prompts(), 1) if prompt]
        yield _section("Prompts of the previews", _table(prompts))
        final = f"Sampled at the end, with the averaged weights if there are any.{self._preview_note()}"
        yield _section("Samples", self._figure(facts.file("samples.png"), final))
        above = "Held-out images above their reconstructions at the end, with the averaged weights if there are any."
        yield _section("Reconstructions", self._figure(facts.file("reconstructions.png"), above))
        yield self._curves(metrics)
        yield self._grids()
        yield self._plots()
        yield self._evaluation()
        yield self._samples()
        for title, file in (("Every option", CONFIG), ("Environment", ENVIRONMENT)):
            text = printable_lines(facts.text(file))
            if len(text) > MAX_TEXT:
                facts.add_problem(f"{file} after {MAX_TEXT:,} of its {len(text):,} characters")
            yield _section(title, f"<pre>{html.escape(text[:MAX_TEXT])}</pre>" if text else "")
        left_out = "".join(f"<li>{html.escape(printable(problem))}</li>" for problem in facts.problems)
        yield _section("Left out", f"<ul>{left_out}</ul>" if left_out else "")
        yield "</body></html>\n"

    def _overview(self, metrics: RunMetrics) -> str:
        facts, last = self.facts, metrics.last
        pairs = [("state", "finished" if facts.file("finished.json") else "not finished")] if last else []
        if "step" in last:
            pairs.append(("optimizer steps", f"{int(last['step']):,}"))
        for key in METRIC_NAMES:
            if key in last:
                has_least = (
                    key.startswith("val") and key in metrics.least and "psnr" not in key and key not in SCORE_NAMES
                )
                least = f" (least {metrics.least[key]:.5f})" if has_least else ""
                unit = f" {BITS_PER_LATENT}" if "latent_bpd" in key else ""
                pairs.append((key, f"{last[key]:.5f}{unit}{least}"))
        images = facts.images()
        if images is not None:
            train = "streamed" if images.train is None else f"{images.train:,}"
            pairs.append(("images", f"{images.name}: {train} for training, {images.validation:,} held out"))
        _, pixels = facts.attempt(self._pixels, (0, PixelFormat()))
        if not pixels.is_8_bit:
            pairs.append(("values", f"{pixels.dtype} from {pixels.low:g} to {pixels.high:g}"))
        stage = facts.attempt(lambda: facts.first_stage(facts.pipeline_file("model_index.json")), None)
        if stage is not None:
            pairs.append(("first stage", facts.attempt(stage.describe, stage.class_name)))
        encoder = facts.attempt(lambda: facts.text_encoder(facts.pipeline_file("model_index.json")), None)
        if encoder is not None:
            pairs.append(("text encoder", facts.attempt(encoder.describe, encoder.class_name)))
        checkpoints = _numbered(facts.folder, r"checkpoint-([0-9]+)")
        if checkpoints:
            pairs.append(("checkpoints", list_names([path.name for _, path in checkpoints], limit=40)))
        return _table(pairs)

    def _pixels(self) -> tuple[int, PixelFormat]:
        """Channels of an image of the pipeline, 0 without one; dtype and range of the data."""
        unet, index = (self.facts.pipeline_file(name) for name in ("unet/config.json", "model_index.json"))
        stage = self.facts.first_stage(index)
        channels = unet.integer("out_channels", default=0) if stage is None else stage.pixel_channels
        scheduler = self.facts.pipeline_file("scheduler/scheduler_config.json")
        if stage is None and scheduler.content.get("variance_type") in ("learned", "learned_range"):
            channels //= 2
        if index.content.get("latent_scaling_factor") is not None:
            channels = 0
        return channels, self.facts.pixel_format(index, channels)

    def _preview_note(self) -> str:
        """Which channels pictures show, where these are not all."""
        channels, pixels = self.facts.attempt(self._pixels, (0, PixelFormat()))
        caption = channel_view(channels, pixels).caption if channels else ""
        return f" Shown: {caption}." if caption else ""

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
        return _section("Classes", _table(rows))

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
        return _section("Curves", figures)

    def _grids(self) -> str:
        """Grids of samples during the run, including the first and the last."""
        folder = self.facts.file("samples")
        numbered = [] if folder is None else _numbered(folder, r"(?:samples|reconstructions)-([0-9]+)\.png")
        links = [path.name for _, path in numbered if path.is_symlink()]
        if links:
            self.facts.add_problem(f"links in samples: {list_names(links)}")
        numbered = [(step, path) for step, path in numbered if not path.is_symlink()]
        if len(numbered) > MAX_GRIDS:
            numbered = [numbered[round(i * (len(numbered) - 1) / (MAX_GRIDS - 1))] for i in range(MAX_GRIDS)]
        figures = "".join(self._figure(path, f"after {step:,} steps") for step, path in numbered)
        shown = f"<p>{html.escape(self._preview_note())}</p>" if figures and self._preview_note() else ""
        return _section("Samples through training", f'{shown}<div class="many">{figures}</div>' if figures else "")

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
        return _section("Schedule and variances", "".join(figures))

    def _samples(self) -> str:
        samples = self.facts.sample_scores()
        if samples is None:
            return ""
        pairs = [(score.name, score.text) for score in samples.scores]
        pairs.append(("of", f"{samples.conditions}; {samples.confidence:.0%} intervals"))
        figures = [
            ("copies.png", "Samples most like a training image: sample, nearest, second, nearest by pixels."),
            ("loss_gap.png", "The loss of held-out images minus that of training images, at each step."),
        ]
        shown = "".join(self._figure(self.facts.file(f"evaluation/{name}"), text) for name, text in figures)
        return _section("Quality of samples", _table(pairs) + shown)

    def _evaluation(self) -> str:
        bound = self.facts.bound()
        if bound is None:
            return ""
        pairs = [(bound.label, f"{bound.bits_per_dim:.4f}")]
        if bound.low is not None and bound.high is not None:
            pairs.append(("interval", f"{bound.low:.4f} to {bound.high:.4f}"))
        pairs += [(name, f"{value:.4f}") for name, value in bound.parts.items()]
        pairs.append(("images", "?" if bound.num_images is None else str(bound.num_images)))
        return _section("Likelihood of held-out images", _table(pairs))

    def _figure(self, path: Path | None, caption: str) -> str:
        """A PNG inside the page; empty without a path, and for what is no PNG or beyond the budget."""
        content = b"" if path is None else self.facts.attempt(lambda: self._read_image(path), b"")
        if not content:
            return ""
        text, data = html.escape(caption), base64.b64encode(content).decode()
        return f'<figure><img alt="{text}" src="data:image/png;base64,{data}"><figcaption>{text}</figcaption></figure>'

    def _read_image(self, path: Path) -> bytes:
        content = read_bytes(path, max_bytes=MAX_IMAGE_BYTES)
        name = printable(str(path))
        width, height = (int.from_bytes(content[start : start + 4]) for start in (16, 20))
        if not content.startswith(PNG_SIGNATURE) or content[12:16] != b"IHDR" or len(content) < 33:
            raise ConfigError(f"{name} is not a PNG")
        if width * height > MAX_PIXELS:
            raise ConfigError(f"{name} has {width:,} x {height:,} pixels, more than the {MAX_PIXELS:,} that are shown")
        if self._image_bytes + len(content) > MAX_PAGE_IMAGE_BYTES:
            raise ConfigError(f"{name}: the images before it have {self._image_bytes:,} bytes, which is enough")
        self._image_bytes += len(content)
        return content


def _numbered(folder: Path, pattern: str) -> list[tuple[int, Path]]:
    """Entries of a folder with a number in their name, by the number; none where the folder cannot be read."""
    try:
        names = os.listdir(folder)
    except OSError:
        return []
    matches = [(match, name) for name in names if (match := re.fullmatch(pattern, name)) and len(match[1]) < 20]
    return sorted((int(match[1]), folder / name) for match, name in matches)


def _section(title: str, content: str) -> str:
    return f"<section><h2>{html.escape(title)}</h2>{content}</section>\n" if content else ""


def _table(pairs: list[tuple[str, str]]) -> str:
    cells = "".join(
        f"<tr><th>{html.escape(printable(name, 300))}</th><td>{html.escape(printable(value, 2000))}</td></tr>"
        for name, value in pairs
    )
    return f"<table>{cells}</table>\n" if pairs else ""
