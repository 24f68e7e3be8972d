"""`ddpm-ext convert`: original checkpoints to pipelines, and back. Needs the base install and PyYAML only."""

from __future__ import annotations

import json
import secrets
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from diffusers_ddpm_ext.cli.arguments import check_no_input, check_output_file, check_output_path
from diffusers_ddpm_ext.cli.parser import parse_options
from diffusers_ddpm_ext.compvis.load_options import LoadOptions, ScheduleSource, WeightChoice
from diffusers_ddpm_ext.errors import ConfigError, RunError
from diffusers_ddpm_ext.utils.option import option, positional

if TYPE_CHECKING:
    from diffusers_ddpm_ext.compvis.convert import Converted
    from diffusers_ddpm_ext.compvis.convert_first_stage import ConvertedFirstStage

CONVERT_EXAMPLES = """examples:
  ddpm-ext convert --from compvis --checkpoint model.ckpt --config model.yaml --out my-model
  ddpm-ext convert --from openai --checkpoint ema_0.9999_500000.pt --model_flags flags.json --out my-model
  ddpm-ext convert --check my-model --checkpoint model.ckpt --config model.yaml
  ddpm-ext convert --to compvis my-model --out model.ckpt --config_out model.yaml [--base original.ckpt]

The folder holds the EMA weights as its default files and the raw ones as variant="raw", a learned logvar, and
conversion.json: the source of each tensor, what was left out, and why. Nothing that a checkpoint or a YAML file
names is imported or executed."""
CHECKPOINT_SUFFIXES = (".ckpt", ".pt", ".pth")
BETAS_NOTE = (
    "No beta_schedule of the original gives these betas: its classes take them from the checkpoint, and so does "
    "ddpm-ext convert with --schedule checkpoint."
)
MODES = "--from compvis, --from openai, --to compvis FOLDER and --check FOLDER"


@dataclass(frozen=True)
class ConvertOptions:
    """Convert an original checkpoint to a pipeline's folder, convert one back, or compare the two."""

    folder: Path | None = positional("FOLDER", "With --to: the pipeline's folder.", default=None)
    source: Literal["compvis", "openai"] | None = option(None, "Origin of the checkpoint.", flag="from")
    target: Literal["compvis"] | None = option(None, "Convert FOLDER back to an original checkpoint.", flag="to")
    check: Path | None = option(
        None, "Compare a converted folder with its source, weight by weight.", metavar="FOLDER"
    )
    checkpoint: Path | None = option(
        None, "The checkpoint: .ckpt, .pt, .pth, .safetensors, or the index of its shards.", metavar="FILE"
    )
    config: Path | None = option(None, "compvis: the YAML file that belongs to the checkpoint.", metavar="FILE.yaml")
    model_flags: Path | None = option(
        None, "openai: the flags of the model and its diffusion, a JSON object.", metavar="FILE"
    )
    ema_checkpoint: Path | None = option(
        None, "openai: the EMA weights, if --checkpoint has the raw ones.", metavar="FILE"
    )
    out: Path | None = option(None, "The folder to write; with --to, the checkpoint.", metavar="PATH")
    weights: WeightChoice = option(
        "auto", "compvis: the weights of the default files; auto: EMA if present, else raw."
    )
    schedule: ScheduleSource = option("config", "compvis: whose schedule to use if they differ.")
    ignore_keys: tuple[str, ...] = option((), "compvis: prefixes of tensors to leave out.", metavar="PREFIX")
    load_only_unet: bool = option(False, "compvis: the network only.")
    tokenizer: str | None = option(
        None,
        "compvis: the tokenizer of the text encoder, which no checkpoint has; without it the pipeline takes ids.",
        metavar="FOLDER_OR_ID",
        path=True,
    )
    text_heads: int | None = option(
        None,
        "compvis: attention heads of a CLIP text encoder, which no checkpoint tells.",
        low=1,
        metavar="N",
        unset="config.json beside the tokenizer, else width / 64",
    )
    base: Path | None = option(
        None, "--to: copy first stage, conditioning stage and scale factor from this checkpoint.", metavar="FILE"
    )
    config_out: Path | None = option(
        None, "--to: also write the YAML file that belongs to the checkpoint.", metavar="FILE"
    )
    no_ema: bool = option(False, "--to: write no model_ema.*.")
    samples: int = option(0, "Also draw this many images into samples.png.", low=0, metavar="N")
    num_inference_steps: int | None = option(None, "Sampling steps of --samples.", low=1, metavar="K", unset="all T")
    seed: int = option(0, "Random seed of --samples.", low=0, metavar="N")
    overwrite: bool = option(False, "Replace what exists at --out.")
    verbose: bool = option(False, "Also print the table of all tensors, which conversion.json contains.")
    quiet: bool = option(False, "Print the result only.")


@dataclass(frozen=True)
class CompVisSource:
    """A checkpoint of CompVis' classes."""

    checkpoint: Path
    config: Path
    load: LoadOptions
    tokenizer: str | None


@dataclass(frozen=True)
class OpenAISource:
    """A checkpoint of improved-diffusion or guided-diffusion."""

    checkpoint: Path
    model_flags: Path
    ema_checkpoint: Path | None


@dataclass(frozen=True)
class FolderConversion:
    """Mode --from: convert a checkpoint to a pipeline's folder, with ``samples`` images of it."""

    source: CompVisSource | OpenAISource
    out: Path
    samples: int
    num_inference_steps: int | None
    seed: int
    quiet: bool
    verbose: bool


@dataclass(frozen=True)
class FolderCheck:
    """Mode --check: compare a converted folder with its source."""

    folder: Path
    source: CompVisSource | OpenAISource


@dataclass(frozen=True)
class CheckpointExport:
    """Mode --to: convert a pipeline's folder to an original checkpoint."""

    folder: Path
    out: Path
    base: Path | None
    config_out: Path | None
    use_ema: bool


def convert_command(argv: Sequence[str]) -> str:
    """Parse the command line and run the command; arguments and errors are those of the two functions below."""
    return run_conversion(parse_convert_args(argv))


def parse_convert_args(argv: Sequence[str]) -> FolderConversion | FolderCheck | CheckpointExport:
    """The mode and its options, checked; errors are those of `parse_options`."""
    options = parse_options(ConvertOptions, argv, "convert", CONVERT_EXAMPLES)
    if options.target is None and options.folder is not None:
        raise ConfigError(f"{options.folder} is given without --to: use --to compvis, or --check {options.folder}")
    modes = (options.source and options.check is None, options.target, options.check)
    if sum(bool(mode) for mode in modes) != 1:
        raise ConfigError(f"give one of {MODES}")
    if options.target is not None:
        return _export(options)
    if options.check is not None:
        check = FolderCheck(options.check, _source(options, "--check", options.model_flags is not None))
        _check_has_model("--check ", check.folder)
        return check
    source = _source(options, f"--from {options.source}", options.source == "openai")
    out = _checked_out(options, "folder")
    if options.quiet and options.verbose:
        raise ConfigError("--quiet and --verbose exclude each other: leave one of them out")
    return FolderConversion(
        source, out, options.samples, options.num_inference_steps, options.seed, options.quiet, options.verbose
    )


def _source(options: ConvertOptions, mode: str, is_openai: bool) -> CompVisSource | OpenAISource:
    needed = ("checkpoint", "model_flags") if is_openai else ("checkpoint", "config")
    missing = [f"--{name}" for name in needed if getattr(options, name) is None]
    if missing:
        raise ConfigError(f"{mode} needs {' and '.join(missing)}; see ddpm-ext convert --help")
    _refuse_set(
        options,
        ("config", "tokenizer", "text_heads") if is_openai else ("model_flags", "ema_checkpoint"),
        "this conversion",
    )
    _refuse_set(options, ("base", "config_out"), "this conversion")
    if is_openai and (options.ignore_keys or options.load_only_unet or options.schedule != "config"):
        raise ConfigError("--ignore_keys, --load_only_unet and --schedule are for --from compvis: leave them out")
    for path in (options.checkpoint, options.config, options.model_flags, options.ema_checkpoint):
        if path is not None and not path.is_file():
            raise ConfigError(f"{path} {'is a folder' if path.is_dir() else 'does not exist'}: give the file")
    assert options.checkpoint is not None
    if options.model_flags is not None:
        return OpenAISource(options.checkpoint, options.model_flags, options.ema_checkpoint)
    assert options.config is not None
    load = LoadOptions(
        options.weights, options.ignore_keys, options.load_only_unet, options.schedule, options.text_heads
    )
    return CompVisSource(options.checkpoint, options.config, load, options.tokenizer)


def _export(options: ConvertOptions) -> CheckpointExport:
    if options.folder is None:
        raise ConfigError(
            "--to compvis needs the folder of a pipeline: ddpm-ext convert --to compvis FOLDER --out FILE"
        )
    _check_has_model("", options.folder)
    _refuse_set(
        options, ("checkpoint", "config", "model_flags", "ema_checkpoint", "tokenizer", "text_heads"), "--to compvis"
    )
    if options.samples:
        raise ConfigError("--samples has no effect with --to compvis: ddpm-ext sample draws from the folder")
    if options.config_out is not None:
        check_output_file("--config_out", options.config_out, (".yaml", ".yml"))
        if options.config_out.exists() and not options.overwrite:
            raise ConfigError(f"--config_out {options.config_out} exists: name another place, or use --overwrite")
    if options.base is not None and not options.base.is_file():
        raise ConfigError(f"--base {options.base} does not exist: give the original checkpoint")
    if options.out is not None:
        check_output_file("--out", options.out, CHECKPOINT_SUFFIXES)
    out = _checked_out(options, "file")
    check_no_input("--out", out, {"--base": options.base})
    return CheckpointExport(options.folder, out, options.base, options.config_out, not options.no_ema)


def _check_has_model(option: str, folder: Path) -> None:
    if not any((folder / name).is_file() for name in ("model_index.json", "config.json")):
        raise ConfigError(
            f"{option}{folder} holds no pipeline (no model_index.json), nor an autoencoder (no config.json)"
        )


def _refuse_set(options: ConvertOptions, names: Sequence[str], mode: str) -> None:
    """Refuse options that have no effect in a mode."""
    for name in names:
        if getattr(options, name) is not None:
            raise ConfigError(f"--{name} {getattr(options, name)} has no effect with {mode}: leave it out")


def _checked_out(options: ConvertOptions, kind: Literal["file", "folder"]) -> Path:
    out = options.out
    if out is None:
        raise ConfigError("--out is missing: give the path of the result")
    check_output_path("--out", out, kind)
    exists = out.is_file() or (out.is_dir() and any(out.iterdir()))
    if exists and not options.overwrite:
        raise ConfigError(f"--out {out} exists: name another place, or use --overwrite")
    if exists and out.is_dir() and not (out / "conversion.json").is_file():
        raise ConfigError(f"--out {out} is not the folder of a converted model, so --overwrite does not replace it")
    return out


def run_conversion(mode: FolderConversion | FolderCheck | CheckpointExport) -> str:
    """Convert or compare, and return the text to print.

    Args:
        mode: one of the three modes, with its options.

    Raises:
        ConfigError: the files cannot be read, do not belong together, or cannot be converted.
        RunError: --check found a difference.
    """
    from diffusers_ddpm_ext.pipelines.loading import quiet_diffusers

    try:
        with quiet_diffusers():
            if isinstance(mode, CheckpointExport):
                return _write_checkpoint(mode)
            converted = _convert(mode.source)
            return (
                _compare(mode.folder, converted) if isinstance(mode, FolderCheck) else _write_folder(mode, converted)
            )
    except (RunError, ConfigError):
        raise
    except ValueError as error:
        raise ConfigError(str(error)) from error
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        raise ConfigError(f"{where}{error.strerror or error}") from error


def _convert(source: CompVisSource | OpenAISource) -> Converted | ConvertedFirstStage:
    from diffusers_ddpm_ext.compvis.convert import convert_compvis, convert_openai
    from diffusers_ddpm_ext.compvis.convert_first_stage import convert_first_stage_file, is_first_stage_config

    if isinstance(source, OpenAISource):
        return convert_openai(source.checkpoint, source.model_flags, source.ema_checkpoint)
    if is_first_stage_config(source.config):
        if source.tokenizer is not None:
            raise ConfigError(f"--tokenizer {source.tokenizer}: an autoencoder has no text encoder: leave it out")
        return convert_first_stage_file(source.checkpoint, source.config, source.load)
    return convert_compvis(source.checkpoint, source.config, source.load, source.tokenizer)


def _write_folder(mode: FolderConversion, converted: Converted | ConvertedFirstStage) -> str:
    from diffusers_ddpm_ext.compvis.schema import REPORT_FILE
    from diffusers_ddpm_ext.utils.files import apply_umask, replace_folder

    pipeline = converted.pipeline
    if mode.samples and pipeline is None:
        raise ConfigError(f"--samples {mode.samples}: an autoencoder draws no samples: leave it out")
    draft = mode.out.with_name(f".writing-{mode.out.name}-{secrets.token_hex(4)}")
    draft.mkdir()
    try:
        converted.save(draft)
        apply_umask(draft)
        if mode.samples:
            _draw_samples(pipeline, draft / "samples.png", mode)
        (draft / REPORT_FILE).write_text(json.dumps(converted.report.as_json(), indent=1) + "\n", encoding="utf-8")
        replace_folder(draft, mode.out)
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    report = converted.report.summary() if mode.quiet else converted.report.table(tensors=mode.verbose)
    what = f"The first stage is in {mode.out}, for --vae" if pipeline is None else f"The pipeline is in {mode.out}"
    return f"{report}\n{what}; {REPORT_FILE} contains this report."


def _draw_samples(pipeline: Any, path: Path, mode: FolderConversion) -> None:
    """Draw a grid of samples; image i depends on the seed and on i only."""
    from diffusers_ddpm_ext.plotting.sheets import save_grid
    from diffusers_ddpm_ext.utils.random_keys import generator

    key = pipeline.config.get("conditioning_key")
    if key is not None and not (key == "adm" or pipeline.class_embedder is not None):
        raise ConfigError(
            f"--samples {mode.samples}: the model needs conditions ({key}), which are not in its folder: leave "
            f"it out, and use ddpm-ext sample {mode.out}, with --prompt for a text"
        )
    if pipeline.is_latent:
        raise ConfigError(
            f"--samples {mode.samples}: the model generates latents of {pipeline.channels} channels, not images: leave"
            f" it out, and use ddpm-ext sample {mode.out} --out FILE.npy"
        )
    conditions: dict[str, Any] = {}
    if key is not None:
        conditions["class_labels"] = [index % pipeline.num_classes for index in range(mode.samples)]
    images = pipeline(
        batch_size=mode.samples,
        generator=[generator("sample", mode.seed, index) for index in range(mode.samples)],
        num_inference_steps=mode.num_inference_steps,
        output_type="np",
        **conditions,
    ).images
    save_grid(images.transpose(0, 3, 1, 2) * 2 - 1, path, pixels=pipeline.pixel_format)


def _compare(folder: Path, converted: Converted | ConvertedFirstStage) -> str:
    differences = converted.compare(folder)
    if differences:
        more = f"; and {len(differences) - 5} more" if len(differences) > 5 else ""
        first = "; ".join(differences[:5])
        raise RunError(f"--check {folder}: {len(differences)} differences from the checkpoint: {first}{more}")
    count = sum(len(rows) for rows in converted.report.tensors.values())
    rest = ", scheduler and logvar too" if converted.pipeline is not None else ""
    return f"{folder} matches its checkpoint: {count} tensors are bit-exact{rest}"


def _write_checkpoint(mode: CheckpointExport) -> str:
    from diffusers_ddpm_ext.compvis.save import compvis_config, has_named_betas, save_compvis
    from diffusers_ddpm_ext.utils.files import write_text_atomically
    from diffusers_ddpm_ext.utils.yaml_io import dump_options

    config = (
        None if mode.config_out is None else compvis_config(mode.folder, mode.use_ema, mode.base)
    )  # errors come first
    save_compvis(mode.folder, mode.out, base=mode.base, use_ema=mode.use_ema)
    size = mode.out.stat().st_size / 2**20
    report = f"{mode.out} written, {size:.1f} MiB: the original classes load its state_dict with strict=True"
    if config is None or mode.config_out is None:
        return report
    note = "" if has_named_betas(mode.folder) else BETAS_NOTE
    write_text_atomically(mode.config_out, (f"# {note}\n" if note else "") + dump_options(config))
    return f"{report}, with the configuration {mode.config_out}" + (f"\nnote: {note}" if note else "")
