"""Model card of a folder: its data, training, metrics and figures, and how to load it.

It is written from the files of the folder; what they lack is left out. Imports neither torch nor Diffusers.
"""

from __future__ import annotations

import platform
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from diffusers_ddpm_ext.hub.proof import CARD_GRID
from diffusers_ddpm_ext.utils.files import CONFIG, ENVIRONMENT, EVALUATION, METRICS, read_json, read_rows

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


def may_replace_card(folder: Path) -> bool:
    """Whether a folder has no card, or one written by this package."""
    path = folder / CARD_NAME
    return not path.is_file() or CARD_MARKER in path.read_text(encoding="utf-8")


def environment_versions() -> dict[str, Any]:
    """Versions of the packages and of Python, and the processor's architecture."""
    packages = {}
    for name in CARD_PACKAGES:
        with suppress(PackageNotFoundError):
            packages[name] = version(name)
    return {"packages": packages, "python": platform.python_version(), "machine": platform.machine()}


def make_card(folder: Path, repo_id: str, license_name: str | None = None) -> str:
    """The text of the README.md, metadata first.

    Args:
        folder: of the pipeline; its figures are included.
        repo_id: id of the repository.
        license_name: of the weights, as the Hub names licenses.
    """
    from huggingface_hub import EvalResult, ModelCardData

    facts = _FolderFacts(folder)
    results = []
    bound = facts.bound
    if bound:
        results.append(
            EvalResult(
                task_type=CARD_TASK,
                dataset_type=facts.dataset or "images",
                dataset_name=facts.dataset_name,
                dataset_split=str(bound.get("split", "validation")),
                metric_type="bits_per_dim",
                metric_name=bound_label(bound),
                metric_value=round(bound["bits_per_dim"], 4),
            )
        )
    data = ModelCardData(
        library_name="diffusers",
        pipeline_tag=CARD_TASK,
        tags=["diffusers", CARD_TASK, "ddpm", "diffusers-ddpm-ext"],
        license=license_name,
        datasets=[facts.dataset] if facts.dataset else None,
        model_name=repo_id.split("/")[-1] if results else None,
        eval_results=results or None,
    )
    return f"---\n{data.to_yaml()}\n---\n\n{CARD_MARKER}\n{_body(folder, repo_id, facts)}"


class _FolderFacts:
    """What the files of a folder state about the model."""

    def __init__(self, folder: Path) -> None:
        self.index = read_json(folder / "model_index.json")
        self.unet = read_json(folder / "unet" / "config.json")
        self.scheduler = read_json(folder / "scheduler" / "scheduler_config.json")
        self.environment = read_json(folder / ENVIRONMENT)
        self.bound = read_json(folder / EVALUATION)
        path = folder / CONFIG
        self.config = path.read_text(encoding="utf-8") if path.is_file() else ""
        self.last: dict[str, Any] = {}
        for row in read_rows(folder / METRICS):
            self.last |= row

    @property
    def dataset(self) -> str | None:
        """The data set's id on the Hub, if it has one."""
        for line in self.config.splitlines():
            key, _, value = line.strip().partition(": ")
            if key == "dataset_name" and value not in ("null", "") and not value.startswith((".", "/", "~")):
                return value.strip("'\"")
        return None

    @property
    def dataset_name(self) -> str:
        """The data set's name for a reader."""
        return str(self.dataset or self.environment.get("data", {}).get("name") or "the author's images")

    @property
    def size(self) -> str:
        """Height, width and channels of an image."""
        size = self.unet.get("sample_size")
        height, width = (size, size) if isinstance(size, int) else size or ("?", "?")
        channels = self.unet.get("out_channels", 0)
        if self.scheduler.get("variance_type") in ("learned", "learned_range"):
            channels //= 2
        return f"{height}x{width}x{channels}"

    @property
    def opens_in_stock(self) -> bool:
        """Whether stock ``DDPMPipeline`` samples it."""
        stock = self.index.get("_class_name") == "DDPMPipeline"
        return stock and self.index.get("unet", ["", ""])[1] == "UNet2DModel"


def _body(folder: Path, repo_id: str, facts: _FolderFacts) -> str:
    parts = [f"# {repo_id.split('/')[-1]}", _summary(facts)]
    if (folder / CARD_GRID).is_file():
        parts.append(
            f"![images drawn from this model]({CARD_GRID})\n\nDrawn with seed 0; "
            f"`ddpm-ext verify {repo_id}` draws them again and compares."
        )
    elif (folder / "samples.png").is_file():
        parts.append("![images drawn from this model](samples.png)")
    parts += [_snippets(repo_id, facts), _metrics(facts)]
    figures = [f"![{text}]({name})\n\n{text}" for name, text in CARD_FIGURES if (folder / name).is_file()]
    if figures:
        parts.append("## Curves\n\n" + "\n\n".join(figures))
    parts += [_training(facts), CARD_LIMITS]
    return "\n\n".join(part for part in parts if part) + "\n"


def _summary(facts: _FolderFacts) -> str:
    targets = {"epsilon": "the noise", "sample": "the clean image", "v_prediction": "the velocity v"}
    predicts = targets.get(facts.scheduler.get("prediction_type", "epsilon"), "?")
    steps = facts.scheduler.get("num_train_timesteps", 1000)
    key = facts.index.get("conditioning_key")
    conditioned = f" It is conditioned ({key})." if key else ""
    return (
        f"A diffusion model of {facts.size} images ({facts.dataset_name}), which predicts {predicts} on a chain of "
        f"{steps} steps, trained with [diffusers-ddpm-ext](https://pypi.org/project/diffusers-ddpm-ext/).{conditioned}"
    )


def _snippets(repo_id: str, facts: _FolderFacts) -> str:
    ours = (
        "## Load it\n\n```python\nimport torch\nfrom diffusers_ddpm_ext import DDPMExtPipeline\n\n"
        f'pipe = DDPMExtPipeline.from_pretrained("{repo_id}")\n'
        "images = pipe(batch_size=4, num_inference_steps=50, generator=torch.Generator().manual_seed(0)).images\n```"
    )
    other = (
        "Any other sampler of Diffusers:\n\n```python\nimport diffusers\nfrom diffusers_ddpm_ext import "
        f'DDPMExtPipeline\n\npipe = DDPMExtPipeline.from_pretrained("{repo_id}")\n'
        "pipe.scheduler = diffusers.DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)\n"
        "images = pipe(batch_size=4, num_inference_steps=20).images\n```"
    )
    if facts.index.get("conditioning_key") and facts.index["conditioning_key"] != "adm":
        ours, other = ours.replace("batch_size=4,", "batch_size=4, ..."), ""
        return f"{ours}\n\nThis model needs conditions; see the arguments of the call."
    if not facts.opens_in_stock:
        return f"{ours}\n\n{other}\n\nStock Diffusers cannot sample this model, and refuses it."
    stock = (
        "Without diffusers-ddpm-ext, in stock Diffusers:\n\n```python\nfrom diffusers import DDPMPipeline\n\n"
        f'pipe = DDPMPipeline.from_pretrained("{repo_id}")\n'
        "images = pipe(batch_size=4, num_inference_steps=50).images\n```"
    )
    return f"{ours}\n\n{other}\n\n{stock}"


def bound_label(bound: dict[str, Any]) -> str:
    """The name of a number of bits per dimension, with its chain and bins: only equal ones can be compared.

    Args:
        bound: the JSON of `ddpm-ext evaluate`.
    """
    details = []
    last = min(bound.get("chain_timesteps") or [0])
    if "chain" in bound:
        details.append(f"chain of {bound['chain']:,} steps{f' down to t = {last}' if last else ''}")
    if bound.get("decoder_kind") == "continuous":
        details.append("density")
    elif "bin_width" in bound:
        details.append(f"bins of {bound['bin_width']:.4g}")
    if bound.get("decoder_kind") == "improved_diffusion":
        details.append("improved-diffusion's decoder")
    return f"bits per dimension ({', '.join(details)})" if details else "bits per dimension"


def _metrics(facts: _FolderFacts) -> str:
    rows = []
    if facts.bound:
        low, high = facts.bound["low"], facts.bound["high"]
        confidence = facts.bound.get("confidence", 0.95)
        rows.append(
            f"| {bound_label(facts.bound)}, {facts.bound.get('num_images', '?')} images | "
            f"{facts.bound['bits_per_dim']:.4f} ({confidence:.0%} interval {low:.4f} to {high:.4f}) |"
        )
    names = {
        "val/loss_simple_ema": "validation loss, averaged weights",
        "val/loss_simple": "validation loss, raw weights",
        "val/bpd_ema": "bits per dimension of validation, averaged weights",
    }
    rows += [f"| {text} | {facts.last[name]:.4f} |" for name, text in names.items() if name in facts.last]
    if "step" in facts.last:
        rows.append(f"| optimizer steps | {int(facts.last['step']):,} |")
    return "## Numbers\n\n| | |\n|---|---|\n" + "\n".join(rows) if rows else ""


def _training(facts: _FolderFacts) -> str:
    parts = []
    data = facts.environment.get("data", {})
    if data:
        parts.append(
            f"Data: {data['name']}, {data['train']:,} images for training and {data['validation']:,} held out; "
            f"fingerprint of names and pixels, sha256 `{data['fingerprint']}`."
        )
    environment = facts.environment or environment_versions()
    versions = ", ".join(f"{name} {number}" for name, number in environment.get("packages", {}).items())
    action = "Trained" if facts.environment else "This card was made"
    device = f" on {environment['device']}" if environment.get("device") else ""
    parts.append(f"{action}{device} with Python {environment['python']}, {versions}.")
    if facts.config:
        parts.append(
            "<details><summary>Every option of the run: <code>ddpm-ext train --config config.yaml</code> repeats it"
            f"</summary>\n\n```yaml\n{facts.config.rstrip()}\n```\n\n</details>"
        )
    return "## Training\n\n" + "\n\n".join(parts)


CARD_LIMITS = """## Limits

It draws what resembles its training images, with their biases and without knowledge of anything else, and may repeat
some of them. It was not checked for any use beyond research and study. The license of the training images binds what
may be done with the weights."""
