"""Model card of a folder: its data, training, metrics and figures, and how to load it.

It is written from the files of the folder; what they lack is left out. Imports neither torch nor Diffusers.
"""

from __future__ import annotations

import platform
from collections.abc import Sequence
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from diffusers_ddpm_ext.errors import ConfigError, printable, warn
from diffusers_ddpm_ext.hub.card_code import conditions_code, images_code, latents_code, prompts_code
from diffusers_ddpm_ext.hub.card_components import first_stage_section, text_encoder_section
from diffusers_ddpm_ext.hub.card_facts import BITS_PER_DIM, BITS_PER_LATENT, FolderFacts
from diffusers_ddpm_ext.hub.markdown import code_span, inline_text, preformatted
from diffusers_ddpm_ext.hub.proof import CARD_GRID
from diffusers_ddpm_ext.hub.upload import check_repo_id
from diffusers_ddpm_ext.plotting.channels import channel_view, is_picture
from diffusers_ddpm_ext.utils.files import CONFIG, ENVIRONMENT
from diffusers_ddpm_ext.utils.input_files import JsonObject, read_bytes
from diffusers_ddpm_ext.utils.pixel_format import PixelFormat
from diffusers_ddpm_ext.utils.vocabulary import REQUIRED_CONDITIONS, required_conditions

CARD_NAME = "README.md"
CARD_MARKER = "<!-- made by ddpm-ext: without this line, your own text is kept -->"
CARD_TASK = "unconditional-image-generation"
CARD_PACKAGES = (
    "diffusers-ddpm-ext", "torch", "diffusers", "accelerate", "transformers", "datasets", "huggingface_hub",
)  # fmt: skip
CARD_FIGURES = (
    ("samples/loss.png", "Training and validation loss over optimizer steps."),
    ("samples/logvar.png", "The learned log-variance of each step, against the log of the loss measured there."),
    ("plots/schedule.png", "The schedule: betas and signal-to-noise ratio."),
    ("plots/weights.png", "What each step weighs in the loss."),
    ("plots/variance.png", "Variance of each reverse step, between the posterior's (0) and beta (1)."),
    ("plots/timesteps.png", "The best few steps for the bound."),
    ("evaluation/steps.png", "What each step adds to the bound."),
)
TEXT_TASK = "text-to-image"
STOCK_PIPELINES = {
    "UNet2DModel": ("DDPMPipeline", "LDMPipeline"),
    "UNet2DConditionModel": ("StableDiffusionPipeline", "LDMTextToImagePipeline"),
}
"""Class of the network -> classes of stock Diffusers that sample it."""
CONDITION_WORDS = {
    "class_labels": "classes",
    "encoder_hidden_states": "sequences of embeddings",
    "concat_inputs": "images beside the input",
}
MAX_CLASS_ROWS, MAX_PACKAGES, MAX_CONFIG_CHARACTERS = 200, 50, 2**16


def may_replace_card(folder: Path) -> bool:
    """Whether a folder has no card, or one written by this package."""
    path = folder / CARD_NAME
    if not path.is_file():
        return True
    try:
        return CARD_MARKER.encode() in read_bytes(path)
    except ConfigError:  # too large to be ours
        return False


def environment_versions() -> dict[str, Any]:
    """Versions of the packages and of Python, and the processor's architecture."""
    packages = {}
    for name in CARD_PACKAGES:
        with suppress(PackageNotFoundError):
            packages[name] = version(name)
    return {"packages": packages, "python": platform.python_version(), "machine": platform.machine()}


def make_card(folder: Path, repo_id: str, license_name: str | None = None) -> str:
    """The text of the README.md, metadata first. Names from outside are shown and never act as Markdown or YAML.

    What of the run's records is unreadable is left out, with a warning.

    Args:
        folder: of the pipeline; its figures are included.
        repo_id: id of the repository.
        license_name: of the weights, as the Hub names licenses.

    Raises:
        ConfigError: a file of the pipeline cannot be read, or the id is not one of a repository.
    """
    check_repo_id(repo_id, "repo_id")
    card = _Card(folder, repo_id)
    text = f"---\n{card.metadata(license_name)}\n---\n\n{CARD_MARKER}\n{card.body()}"
    for problem in card.facts.problems:
        warn(f"left out of the card: {problem}")
    return text


class _Card:
    """Facts of a folder, and the parts of its card."""

    def __init__(self, folder: Path, repo_id: str) -> None:
        self.facts = facts = FolderFacts(folder)
        self.repo_id, self.name = repo_id, repo_id.split("/")[-1]
        self.index = facts.pipeline_file("model_index.json")
        self.unet = facts.pipeline_file("unet/config.json")
        self.scheduler = facts.pipeline_file("scheduler/scheduler_config.json")
        self.first_stage, self.text_encoder = facts.first_stage(self.index), facts.text_encoder(self.index)
        self.class_names = facts.class_names(self.index)
        self.key = "" if self.index.content.get("conditioning_key") is None else self.index.string("conditioning_key")
        self.environment, self.images, self.bound = facts.record(ENVIRONMENT), facts.images(), facts.bound()
        self.last = facts.metrics().last
        names = facts.options().get("dataset_name")
        self.datasets = _hub_ids(names if isinstance(names, list) else [names])
        self.dataset = self.datasets[0] if self.datasets and isinstance(names, str) else None  # not one of a mixture

    @property
    def dataset_name(self) -> str:
        """The data set's name for a reader."""
        return self.dataset or (self.images.name if self.images else "the author's images")

    @property
    def sample_shape(self) -> tuple[float, float, int]:
        """Height, width and channels of a sample, which is an image or its latents; 0 where the size is open."""
        if isinstance(self.unet.content.get("sample_size"), list):
            height, width = (*self.unet.numbers("sample_size"), 0, 0)[:2]
        else:
            height = width = self.unet.integer("sample_size", default=0)
        channels = self.unet.integer("out_channels", default=0)
        if self.scheduler.content.get("variance_type") in ("learned", "learned_range"):
            channels //= 2
        return height, width, channels

    @property
    def shape(self) -> tuple[float, float, int]:
        """Height, width and channels of an image; 0 where they are open."""
        height, width, channels = self.sample_shape
        stage = self.first_stage
        if stage is not None:
            height, width, channels = height * stage.factor, width * stage.factor, stage.pixel_channels
        return height, width, channels

    @property
    def pixels(self) -> PixelFormat:
        """Dtype and range of the data."""
        return self.facts.pixel_format(self.index, 0 if self.lacks_first_stage else self.shape[2])

    @property
    def preview_note(self) -> str:
        """Which channels the pictures show, where these are not all."""
        channels = self.shape[2]
        caption = channel_view(channels, self.pixels).caption if channels and not self.lacks_first_stage else ""
        return f" The picture shows {caption}." if caption else ""

    @property
    def lacks_first_stage(self) -> bool:
        """Whether its samples are latents of an autoencoder that is not in the folder."""
        return self.first_stage is None and self.index.content.get("latent_scaling_factor") is not None

    @property
    def stock_pipeline(self) -> str | None:
        """The class of stock Diffusers that samples it; None where none does."""
        unet, name = self.index.content.get("unet"), self.index.content.get("_class_name")
        network = str(unet[1]) if isinstance(unet, list) and len(unet) == 2 else ""
        return str(name) if name in STOCK_PIPELINES.get(network, ()) else None

    @property
    def takes_prompts(self) -> bool:
        """Whether a prompt alone says what the images show."""
        text = self.text_encoder is not None and self.text_encoder.has_tokenizer
        return text and self.key in ("", "crossattn")

    def metadata(self, license_name: str | None) -> str:
        """YAML for the Hub."""
        from huggingface_hub import EvalResult, ModelCardData

        results = []
        task = TEXT_TASK if self.takes_prompts else CARD_TASK
        if self.bound:
            results.append(
                EvalResult(
                    task_type=task,
                    dataset_type=self.dataset or "images",
                    dataset_name=printable(self.dataset_name),
                    dataset_split=printable(self.bound.split),
                    metric_type="bits_per_dim",
                    metric_name=self.bound.label,
                    metric_value=round(self.bound.bits_per_dim, 4),
                )
            )
        prompts = [text for text in self.facts.prompts() if text] if self.takes_prompts else []
        widget: dict[str, Any] = {"widget": [{"text": printable(text)} for text in prompts]} if prompts else {}
        samples = self.facts.sample_scores()
        if samples is not None:
            results += [
                EvalResult(
                    task_type=task,
                    dataset_type=self.dataset or "images",
                    dataset_name=printable(self.dataset_name),
                    dataset_split=printable(samples.split),
                    metric_type=score.type,
                    metric_name=f"{score.name} ({samples.conditions})",
                    metric_value=float(f"{score.value:.5g}"),
                )
                for score in samples.scores
            ]
        data = ModelCardData(
            library_name="diffusers",
            pipeline_tag=task,
            tags=["diffusers", task, "ddpm", "diffusers-ddpm-ext"],
            license=None if license_name is None else printable(license_name),
            datasets=self.datasets or None,
            model_name=self.name if results else None,
            eval_results=results or None,
            **widget,
        )
        return str(data.to_yaml())

    def body(self) -> str:
        """Markdown for the reader."""
        parts = [f"# {inline_text(self.name)}", self._summary()]
        if self.facts.file(CARD_GRID):
            parts.append(
                f"![images drawn from this model]({CARD_GRID})\n\nDrawn with seed 0; "
                f"`ddpm-ext verify {self.repo_id}` draws them again and compares.{self.preview_note}"
            )
        elif self.facts.file("samples.png"):
            parts += ["![images drawn from this model](samples.png)", self.preview_note.strip()]
        parts += [self._classes(), self._loading(), *self._components(), self._metrics()]
        figures = [f"![{text}]({name})\n\n{text}" for name, text in CARD_FIGURES if self.facts.file(name)]
        if figures:
            parts.append("## Curves\n\n" + "\n\n".join(figures))
        parts += [self._training(), CARD_LIMITS]
        return "\n\n".join(part for part in parts if part) + "\n"

    def _summary(self) -> str:
        targets = {"epsilon": "the noise", "sample": "the clean image", "v_prediction": "the velocity v"}
        predicts = targets.get(self.scheduler.string("prediction_type", "epsilon"), "?")
        steps = self.scheduler.integer("num_train_timesteps", default=1000)
        name = inline_text(self.dataset_name) if self.dataset or self.images else self.dataset_name
        size, stage, pixels = _size_text(*self.shape), self.first_stage, self.pixels
        images = f"{size} latents of images" if self.lacks_first_stage else f"{size} images"
        images += "" if pixels.is_8_bit else f" of {pixels.dtype} from {pixels.low:g} to {pixels.high:g}"
        latents = "" if stage is None else f", drawn as {_size_text(*self.sample_shape)} latents"
        return (
            f"A diffusion model of {images} ({name}){latents}, which predicts {predicts} on a chain of {steps} steps,"
            f" trained with [diffusers-ddpm-ext](https://pypi.org/project/diffusers-ddpm-ext/).{self._conditioned()}"
        )

    def _conditioned(self) -> str:
        """A sentence on what the model is given, after a space; empty if nothing."""
        if self.takes_prompts:
            return " It draws what a prompt says."
        if not self.key:
            return ""
        known = self.key in REQUIRED_CONDITIONS
        names = required_conditions(self.key, bool(self.class_names)) if known else ()
        given = " and ".join(CONDITION_WORDS[name] for name in names) or inline_text(self.key)
        return f" It is conditioned on {given}."

    def _classes(self) -> str:
        counted = self.images.classes if self.images else []
        classes = counted or [(name, None) for name in self.class_names.values()]
        rows = [
            f"| {inline_text(name, in_table=True)} | {'' if images is None else f'{images:,}'} |"
            for name, images in classes[:MAX_CLASS_ROWS]
        ]
        more = len(classes) - MAX_CLASS_ROWS
        rest = f"\n\n{more:,} more classes are in model_index.json." if more > 0 else ""
        return "## Classes\n\n| class | images |\n|---|---|\n" + "\n".join(rows) + rest if rows else ""

    def _loading(self) -> str:
        if self.lacks_first_stage:
            return latents_code(self.repo_id)
        classes = self.num_classes
        if self.takes_prompts:
            return prompts_code(self.repo_id, self.stock_pipeline, self.facts.prompts())
        if self.key and not (classes and self.key in ("adm", "crossattn")):
            return conditions_code(self.repo_id)
        return images_code(self.repo_id, self.stock_pipeline, classes, self._array_note())

    def _array_note(self) -> str:
        """What the arrays are that other data than 8-bit images are drawn as; empty for these."""
        pixels, (height, width, channels) = self.pixels, self.shape
        if pixels.is_8_bit and is_picture(channels, pixels):
            return ""
        shape = f"(4, {height:g}, {width:g}, {channels})" if height else "(4, height, width, channels)"
        return f"{shape}, {pixels.dtype} from {pixels.low:g} to {pixels.high:g}"

    @property
    def num_classes(self) -> int:
        """Classes that the model is called with: of the network, or as tokens of cross attention; 0 without them."""
        embedder = self.facts.pipeline_file("class_embedder/config.json")
        if self.key == "crossattn":
            return embedder.integer("num_classes", 1) if embedder.content else 0
        return 0 if self.unet.content.get("num_class_embeds") is None else self.unet.integer("num_class_embeds", 1)

    def _components(self) -> list[str]:
        """The sections about the networks around the denoising one."""
        options, latents = self.facts.options(), _size_text(*self.sample_shape)
        stage, encoder = self.first_stage, self.text_encoder
        return [
            "" if stage is None else first_stage_section(stage, latents, options),
            "" if encoder is None else text_encoder_section(encoder, options),
        ]

    def _metrics(self) -> str:
        rows, bound = [], self.bound
        if bound:
            interval = ""
            if bound.low is not None and bound.high is not None:
                interval = f" ({bound.confidence:.0%} interval {bound.low:.4f} to {bound.high:.4f})"
            count = "?" if bound.num_images is None else bound.num_images
            rows.append(f"| {bound.label}, {count} images | {bound.bits_per_dim:.4f}{interval} |")
        names = {
            "val/loss_simple_ema": "validation loss, averaged weights",
            "val/loss_simple": "validation loss, raw weights",
            "val/bpd_ema": f"{BITS_PER_DIM} of validation, averaged weights",
            "val/latent_bpd_ema": f"{BITS_PER_LATENT} of validation, averaged weights",
        }
        rows += [f"| {text} | {self.last[name]:.4f} |" for name, text in names.items() if name in self.last]
        samples = self.facts.sample_scores()
        if samples is not None:
            of = code_span(samples.conditions, in_table=True)
            rows += [f"| {score.name}, {of} | {score.text} |" for score in samples.scores]
        if "step" in self.last:
            rows.append(f"| optimizer steps | {int(self.last['step']):,} |")
        return "## Numbers\n\n| | |\n|---|---|\n" + "\n".join(rows) if rows else ""

    def _training(self) -> str:
        parts = []
        if self.images:
            train = "streamed" if self.images.train is None else f"{self.images.train:,}"
            parts.append(
                f"Data: {inline_text(self.images.name)}, {train} images for training and "
                f"{self.images.validation:,} held out; fingerprint of names and pixels, sha256 "
                f"{code_span(self.images.fingerprint)}."
            )
        parts += self.facts.attempt(self._environment, [])
        text = self.facts.text(CONFIG)
        if text and len(text) <= MAX_CONFIG_CHARACTERS:
            parts.append(
                "<details><summary>Every option of the run: <code>ddpm-ext train --config config.yaml</code> repeats "
                f"it</summary>\n\n{preformatted(text)}\n\n</details>"
            )
        elif text:
            parts.append("Every option of the run is in config.yaml.")
        return "## Training\n\n" + "\n\n".join(parts)

    def _environment(self) -> list[str]:
        recorded = bool(self.environment.content)
        environment = self.environment if recorded else JsonObject("this machine", environment_versions())
        packages = environment.object("packages", {})
        versions = [f"{inline_text(name)} {inline_text(packages.string(name))}" for name in packages.content]
        action = "Trained" if recorded else "This card was made"
        device = f" on {inline_text(environment.string('device'))}" if environment.content.get("device") else ""
        python = inline_text(environment.string("python"))
        return [f"{action}{device} with Python {python}, {', '.join(versions[:MAX_PACKAGES])}."]


def _hub_ids(names: Sequence[Any]) -> list[str]:
    """Those names of datasets that are ids on the Hub, and not paths."""
    ids = []
    for name in names:
        with suppress(ConfigError):
            ids += [check_repo_id(name)] if isinstance(name, str) else []
    return ids


def _size_text(height: float, width: float, channels: int) -> str:
    return f"{height:g}x{width:g}x{channels}" if height else f"?x?x{channels}"


CARD_LIMITS = """## Limits

It draws what resembles its training images, with their biases and without knowledge of anything else, and may repeat
some of them. It was not checked for any use beyond research and study. The license of the training images binds what
may be done with the weights."""
