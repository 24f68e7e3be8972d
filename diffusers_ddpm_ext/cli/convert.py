"""`ddpm-ext convert`: original checkpoints in, pipelines out, and back. Runs on the base install and PyYAML."""

from __future__ import annotations

import json
import os
import secrets
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffusers_ddpm_ext.errors import ConfigError, RunError
from diffusers_ddpm_ext.training.config.flags import Parser

if TYPE_CHECKING:
    from diffusers_ddpm_ext.compvis.convert import Converted

HEAD = "Turn an original checkpoint into a pipeline's folder, turn one back, or compare the two."
TAIL = """examples:
  ddpm-ext convert --from compvis --checkpoint model.ckpt --config model.yaml --out my-model
  ddpm-ext convert --from openai --checkpoint ema_0.9999_500000.pt --model_flags flags.json --out my-model
  ddpm-ext convert --check my-model --checkpoint model.ckpt --config model.yaml
  ddpm-ext convert --to compvis my-model --out model.ckpt --config_out model.yaml [--base original.ckpt]

The folder holds the EMA weights as its default files and the raw ones as variant="raw", a learned logvar, and
conversion.json: where each tensor came from, what was left out, and why. Nothing that a checkpoint or a YAML file
names is imported or run."""
FAMILIES = ("compvis", "openai")
CHECKPOINTS = (".ckpt", ".pt", ".pth")


@dataclass(frozen=True)
class ConvertOptions:
    """What `ddpm-ext convert` was asked for; checked."""

    source: str | None
    target: str | None
    check: Path | None
    folder: Path | None
    checkpoint: Path | None
    config: Path | None
    model_flags: Path | None
    ema_checkpoint: Path | None
    out: Path | None
    weights: str
    schedule: str
    ignore_keys: tuple[str, ...]
    load_only_unet: bool
    base: Path | None
    config_out: Path | None
    use_ema: bool
    samples: int
    num_inference_steps: int | None
    seed: int
    overwrite: bool
    quiet: bool


def convert_command(argv: Sequence[str]) -> str:
    """Parse the command line and run the command; arguments and errors are those of the two functions below."""
    return convert(parse_convert_args(argv))


def parse_convert_args(argv: Sequence[str], prog: str = "ddpm-ext convert") -> ConvertOptions:
    """The options of a command line, checked; arguments and errors are those of `Parser.parse_checked`."""
    parser = Parser(prog=prog, usage=f"{prog} [options]", description=HEAD, epilog=TAIL)
    parser.add_argument("folder", nargs="?", metavar="FOLDER", help="With --to: the pipeline's folder.")
    add = parser.add_argument
    add("--from", dest="source", metavar="{compvis,openai}", help="Whose checkpoint it is.")
    add("--to", dest="target", metavar="{compvis}", help="Turn FOLDER back into an original checkpoint.")
    add("--check", metavar="FOLDER", help="Compare a converted folder with its source, weight by weight.")
    add("--checkpoint", metavar="FILE", help=".ckpt, .pt, .pth, .safetensors, or the index of its shards.")
    add("--config", metavar="FILE", help="compvis: the YAML file that belongs to it.")
    add("--model_flags", metavar="FILE", help="openai: the flags of the model and its diffusion, a JSON object.")
    add("--ema_checkpoint", metavar="FILE", help="openai: the averaged weights; --checkpoint has the raw ones.")
    add("--out", metavar="PATH", help="The folder to make; with --to, the checkpoint.")
    add(
        "--weights",
        default="auto",
        metavar="{auto,ema,raw}",
        help="compvis: which weights are the default files; auto: EMA where there, else raw (default: auto).",
    )
    add(
        "--schedule",
        default="config",
        metavar="{config,checkpoint}",
        help="compvis: whose schedule, where they differ (default: config).",
    )
    add("--ignore_keys", nargs="+", default=[], metavar="PREFIX", help="compvis: leave such tensors out.")
    add("--load_only_unet", action="store_true", help="compvis: the network and nothing else.")
    add("--base", metavar="FILE", help="--to: take first stage, conditioning stage and scale factor from it.")
    add("--config_out", metavar="FILE", help="--to: also write the YAML file that belongs to the checkpoint.")
    add("--no_ema", action="store_true", help="--to: write no model_ema.*.")
    add("--samples", type=int, default=0, metavar="N", help="Also draw N images into samples.png (default: 0).")
    add("--num_inference_steps", type=int, metavar="K", help="Steps of those images (default: all T).")
    add("--seed", type=int, default=0, metavar="N", help="Of those images (default: 0).")
    add("--overwrite", action="store_true", help="Replace what is at --out.")
    add("--quiet", action="store_true", help="Print the summary alone, not the table of all tensors.")
    given = parser.parse_checked(argv)
    for name in (
        "check",
        "folder",
        "checkpoint",
        "config",
        "model_flags",
        "ema_checkpoint",
        "out",
        "base",
        "config_out",
    ):
        given[name] = None if given[name] is None else Path(given[name])
    given["ignore_keys"] = tuple(given["ignore_keys"])
    options = ConvertOptions(use_ema=not given.pop("no_ema"), **given)
    _check(options)
    return options


def _check(options: ConvertOptions) -> None:
    if options.target is None and options.folder is not None:
        raise ConfigError(f"{options.folder} is given without --to: say --to compvis, or --check {options.folder}")
    if options.source is None and options.check is not None:
        options = _with_family(options)
    asked = [
        options.source is not None and options.check is None,
        options.target is not None,
        options.check is not None,
    ]
    if sum(asked) != 1:
        raise ConfigError("say one of --from compvis, --from openai, --to compvis FOLDER and --check FOLDER")
    if options.source not in (None, *FAMILIES):
        raise ConfigError(f"--from {options.source!r} is not one of {', '.join(FAMILIES)}")
    if options.target not in (None, "compvis"):
        raise ConfigError(f"--to {options.target!r} is not supported: say --to compvis")
    if options.target is not None:
        _check_way_back(options)
    else:
        _check_source(options)
    for name, low in (("samples", 0), ("num_inference_steps", 1), ("seed", 0)):
        value = getattr(options, name)
        if value is not None and value < low:
            raise ConfigError(f"--{name} must be at least {low}, got {value}")
    if options.weights not in ("auto", "ema", "raw"):
        raise ConfigError(f"--weights {options.weights!r} is not one of auto, ema, raw")
    if options.schedule not in ("config", "checkpoint"):
        raise ConfigError(f"--schedule {options.schedule!r} is not one of config, checkpoint")
    if options.check is None:
        _check_out(options)


def _with_family(options: ConvertOptions) -> ConvertOptions:
    from dataclasses import replace

    return replace(options, source="openai" if options.model_flags is not None else "compvis")


def _check_source(options: ConvertOptions) -> None:
    """What --from and --check need."""
    openai = options.model_flags is not None if options.check is not None else options.source == "openai"
    needs = {"checkpoint": options.checkpoint}
    needs |= {"model_flags": options.model_flags} if openai else {"config": options.config}
    missing = [f"--{name}" for name, value in needs.items() if value is None]
    if missing:
        way = "--check" if options.check is not None else f"--from {options.source}"
        raise ConfigError(f"{way} needs {' and '.join(missing)}; see ddpm-ext convert --help")
    strange = {"config": options.config} if openai else {"model_flags": options.model_flags}
    strange |= {} if openai else {"ema_checkpoint": options.ema_checkpoint}
    strange |= {"base": options.base, "config_out": options.config_out}
    for name, value in strange.items():
        if value is not None:
            raise ConfigError(f"--{name} {value} has no meaning for this conversion: leave it out")
    if openai and (options.ignore_keys or options.load_only_unet or options.schedule != "config"):
        raise ConfigError("--ignore_keys, --load_only_unet and --schedule are for --from compvis: leave them out")
    for path in (options.checkpoint, options.config, options.model_flags, options.ema_checkpoint):
        if path is not None and not path.is_file():
            raise ConfigError(f"{path} {'is a folder' if path.is_dir() else 'does not exist'}: give the file")
    if options.check is not None and not (options.check / "model_index.json").is_file():
        raise ConfigError(f"--check {options.check} holds no pipeline (no model_index.json)")


def _check_way_back(options: ConvertOptions) -> None:
    if options.folder is None:
        raise ConfigError(
            "--to compvis needs the folder of a pipeline: ddpm-ext convert --to compvis FOLDER --out FILE"
        )
    if not (options.folder / "model_index.json").is_file():
        raise ConfigError(f"{options.folder} holds no pipeline (no model_index.json)")
    for name in ("checkpoint", "config", "model_flags", "ema_checkpoint"):
        if getattr(options, name) is not None:
            raise ConfigError(f"--{name} has no meaning for --to compvis: leave it out")
    if options.samples:
        raise ConfigError("--samples has no meaning for --to compvis: ddpm-ext sample draws from the folder")
    if options.config_out is not None and options.config_out.exists() and not options.overwrite:
        raise ConfigError(f"--config_out {options.config_out} exists: name another place, or say --overwrite")
    if options.base is not None and not options.base.is_file():
        raise ConfigError(f"--base {options.base} does not exist: give the original checkpoint")
    if options.out is not None and options.out.suffix not in CHECKPOINTS:
        raise ConfigError(f"--out {options.out} must end in {', '.join(CHECKPOINTS)}")


def _check_out(options: ConvertOptions) -> None:
    out = options.out
    if out is None:
        raise ConfigError("--out is missing: say where the result goes")
    if not out.absolute().parent.is_dir():
        raise ConfigError(f"--out {out} lies in a folder that does not exist: make it first")
    if not os.access(out.absolute().parent, os.W_OK | os.X_OK):
        raise ConfigError(f"--out {out} is not writable: name another place")
    if options.target is None and out.is_file():
        raise ConfigError(f"--out {out} is a file: name a folder")
    if options.target is not None and out.is_dir():
        raise ConfigError(f"--out {out} is a folder: name a file")
    taken = out.is_file() or (out.is_dir() and any(out.iterdir()))
    if taken and not options.overwrite:
        raise ConfigError(f"--out {out} exists: name another place, or say --overwrite")
    if taken and out.is_dir() and not (out / "conversion.json").is_file():
        raise ConfigError(f"--out {out} is not a converted model's folder, so --overwrite does not replace it")


def convert(options: ConvertOptions) -> str:
    """Do it.

    Args:
        options: what was asked for.

    Returns:
        What to print.

    Raises:
        ConfigError: the files cannot be read, do not belong together, or cannot be converted.
        RunError: --check found a difference.
    """
    from diffusers_ddpm_ext.pipelines.loading import quiet_diffusers

    try:
        with quiet_diffusers():
            if options.target is not None:
                return _back(options)
            converted = _read(options)
            return _compare(options, converted) if options.check is not None else _make(options, converted)
    except (RunError, ConfigError):
        raise
    except ValueError as error:
        raise ConfigError(str(error)) from error
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        raise ConfigError(f"{where}{error.strerror or error}") from error


def _read(options: ConvertOptions) -> Converted:
    assert options.checkpoint is not None
    if options.model_flags is not None:
        from diffusers_ddpm_ext.compvis.convert import convert_openai

        return convert_openai(options.checkpoint, options.model_flags, options.ema_checkpoint)
    from diffusers_ddpm_ext.compvis.convert import convert_compvis
    from diffusers_ddpm_ext.compvis.load import LoadOptions

    assert options.config is not None
    load_options = LoadOptions(options.weights, options.ignore_keys, options.load_only_unet, options.schedule)  # type: ignore[arg-type]
    return convert_compvis(options.checkpoint, options.config, load_options)


def _make(options: ConvertOptions, converted: Converted) -> str:
    from diffusers_ddpm_ext.compvis.schema import REPORT_FILE
    from diffusers_ddpm_ext.utils.files import replace_folder

    assert options.out is not None
    draft = options.out.with_name(f".writing-{options.out.name}-{secrets.token_hex(4)}")
    draft.mkdir()
    try:
        converted.save(draft)
        if options.samples:
            _draw(converted.pipeline, draft / "samples.png", options)
        (draft / REPORT_FILE).write_text(json.dumps(converted.report.as_json(), indent=1) + "\n", encoding="utf-8")
        replace_folder(draft, options.out)
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    told = converted.report.summary() if options.quiet else converted.report.table()
    return f"{told}\nThe pipeline is in {options.out}; {REPORT_FILE} says all of the above."


def _draw(pipeline: Any, path: Path, options: ConvertOptions) -> None:
    """A grid of samples, image i from the seed and i alone."""
    from diffusers_ddpm_ext.plotting.sheets import save_grid
    from diffusers_ddpm_ext.utils.random_keys import generator

    key = pipeline.config.get("conditioning_key")
    if key is not None and not (key == "adm" or pipeline.class_embedder is not None):
        raise ConfigError(f"--samples {options.samples}: the model needs conditions ({key}), which only you have")
    channels = pipeline.unet.config.out_channels
    if channels not in (1, 3, 6):
        raise ConfigError(f"--samples {options.samples}: the model makes latents of {channels} channels, no pictures")
    named: dict[str, Any] = {}
    if key is not None:
        named["class_labels"] = [index % pipeline.num_classes for index in range(options.samples)]
    images = pipeline(
        batch_size=options.samples,
        generator=[generator("sample", options.seed, index) for index in range(options.samples)],
        num_inference_steps=options.num_inference_steps,
        output_type="np",
        **named,
    ).images
    save_grid(images.transpose(0, 3, 1, 2) * 2 - 1, path)


def _compare(options: ConvertOptions, converted: Converted) -> str:
    assert options.check is not None
    differences = converted.compare(options.check)
    if differences:
        shown = "; ".join(differences[:5])
        more = f"; and {len(differences) - 5} more" if len(differences) > 5 else ""
        raise RunError(f"--check {options.check}: {len(differences)} differences from the checkpoint: {shown}{more}")
    compared = sum(len(rows) for rows in converted.report.tensors.values())
    return f"{options.check} is its checkpoint's: {compared} tensors equal to the bit, scheduler and logvar too"


def _back(options: ConvertOptions) -> str:
    import yaml

    from diffusers_ddpm_ext.compvis.save import compvis_config, save_compvis

    assert options.folder is not None
    assert options.out is not None
    save_compvis(options.folder, options.out, base=options.base, use_ema=options.use_ema)
    size = options.out.stat().st_size / 2**20
    told = f"{options.out} written, {size:.1f} MiB: the original classes load its state_dict with strict=True"
    if options.config_out is None:
        return told
    text = yaml.safe_dump(compvis_config(options.folder), sort_keys=False, default_flow_style=None)
    options.config_out.write_text(text, encoding="utf-8")
    return f"{told}, under the configuration {options.config_out}"
