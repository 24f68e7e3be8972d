"""What `ddpm-ext sample` can be asked for, read from the command line and checked. Imports nothing heavy."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from diffusers_ddpm_ext.cli.arguments import check_dtype, check_pipeline_source
from diffusers_ddpm_ext.errors import ConfigError
from diffusers_ddpm_ext.training.config.flags import Parser

FILES = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".npy", ".npz")
OTHER_STEPS = 50
HEAD = "Draw images from a trained pipeline: a folder of ours or of Diffusers' DDPMPipeline, or a Hub id."
TAIL = """examples:
  ddpm-ext sample runs/digits
  ddpm-ext sample runs/digits --scheduler DPMSolverMultistepScheduler --num_inference_steps 25 --num_images 64
  ddpm-ext sample runs/digits --out samples --num_images 1000          samples/00000.png, ...
  ddpm-ext sample runs/digits --out samples.npz --num_images 1000      uint8 (N, height, width, channels), as arr_0
  ddpm-ext sample runs/xray --out samples --bit_depth 16               what was trained on grey images of 16 bits
  ddpm-ext sample runs/digits --out samples.npy                        float32, the same in [0, 1]
  ddpm-ext sample runs/digits --out video.gif --num_images 9           from noise to images
  ddpm-ext sample google/ddpm-cifar10-32 --device cuda --dtype bfloat16
  ddpm-ext sample runs/classes --class_labels 3 --guidance_scale 2     the class of all images, or several in turn
  accelerate launch -m diffusers_ddpm_ext sample runs/digits --num_images 50000 --out samples     on all devices

Image i follows from the seed and from i alone: it is the same whatever --num_images, --batch_size and the number of
processes. The same line again goes on where it was cut off."""


@dataclass(frozen=True)
class SampleOptions:
    """What `ddpm-ext sample` was asked for; checked."""

    folder: str
    num_images: int
    out: Path
    individual: Path | None
    num_inference_steps: int | None
    batch_size: int
    seed: int
    temperature: float
    variant: str | None
    device: str | None
    dtype: str
    class_labels: tuple[int, ...] | None = None
    concat_inputs: Path | None = None
    encoder_hidden_states: Path | None = None
    guidance_scale: float = 1.0
    guidance_interval: tuple[float, float] | None = None
    scheduler: str | None = None
    scheduler_args: dict[str, Any] = field(default_factory=dict)
    step_args: dict[str, Any] = field(default_factory=dict)
    eta: float | None = None
    optimal_timesteps: bool = False
    bit_depth: int = 8

    @property
    def is_folder(self) -> bool:
        """Whether ``out`` is a folder of PNG files."""
        return not self.out.suffix


def parse_sample_args(argv: Sequence[str], prog: str = "ddpm-ext sample") -> SampleOptions:
    """The options of a command line, checked; arguments and errors are those of `Parser.parse_checked`."""
    parser = Parser(prog=prog, usage=f"{prog} FOLDER [options]", description=HEAD, epilog=TAIL)
    parser.add_argument("folder", metavar="FOLDER", help="Output folder of a run, saved pipeline, or Hub id.")
    parser.add_argument("--num_images", type=int, default=16, metavar="N", help="How many (default: 16).")
    parser.add_argument(
        "--out",
        metavar="PATH",
        help="A grid (.png, .jpg, .webp), a video from noise to images (.gif), an array (.npy, .npz), or, without an"
        " ending, a folder of PNG files (default: samples-seed<SEED>.png in FOLDER).",
    )
    parser.add_argument("--individual", metavar="DIR", help="Also write every image as DIR/00000.png, ...")
    parser.add_argument(
        "--bit_depth",
        type=int,
        default=8,
        metavar="{8,16}",
        help="Of a folder's PNG files, of one channel, and of .npz: what was trained on 16 bits keeps them.",
    )
    parser.add_argument(
        "--scheduler",
        metavar="NAME",
        help="A Diffusers scheduler by its class, e.g. DPMSolverMultistepScheduler (default: the folder's).",
    )
    parser.add_argument(
        "--scheduler_args",
        nargs="+",
        default=[],
        metavar="KEY=VALUE",
        help="Of its configuration, e.g. use_karras_sigmas=true timestep_spacing=trailing.",
    )
    parser.add_argument(
        "--step_args", nargs="+", default=[], metavar="KEY=VALUE", help="Of its step, e.g. s_noise=1.003."
    )
    parser.add_argument("--eta", type=float, metavar="X", help="Noise of DDIM: 0 is none, 1 that of DDPM.")
    parser.add_argument(
        "--optimal_timesteps", action="store_true", help="Take the steps that `ddpm-ext fit-variance` found best."
    )
    parser.add_argument(
        "--num_inference_steps",
        "--ddpm_num_inference_steps",
        type=int,
        metavar="K",
        help=f"Sampling steps, at most T (default: all T, and {OTHER_STEPS} with --scheduler).",
    )
    parser.add_argument("--batch_size", type=int, default=64, metavar="N", help="Images at a time (default: 64).")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="(default: 0)")
    parser.add_argument(
        "--temperature",
        type=float,
        default=1.0,
        metavar="X",
        help="Factor on the noise of each step (default: 1).",
    )
    parser.add_argument(
        "--class_labels",
        nargs="+",
        type=int,
        metavar="N",
        help="Classes, in turn over the images (default, where the model needs them: all in turn).",
    )
    parser.add_argument(
        "--concat_inputs",
        metavar="FILE",
        help="What is joined to the input: .npy (N, C, height, width) in [-1, 1], in turn over the images.",
    )
    parser.add_argument(
        "--encoder_hidden_states",
        metavar="FILE",
        help="Embeddings of cross attention: .npy (N, tokens, width), in turn over the images.",
    )
    parser.add_argument(
        "--guidance_scale", type=float, default=1.0, metavar="S", help="u + S (c - u); 1: no guidance (default)."
    )
    parser.add_argument(
        "--guidance_interval",
        nargs=2,
        type=float,
        metavar=("LOW", "HIGH"),
        help="Guide only at steps of the training chain from LOW to HIGH (default: all).",
    )
    parser.add_argument("--variant", metavar="NAME", help="`raw`: the weights without averaging.")
    parser.add_argument("--device", metavar="NAME", help="cpu, cuda, cuda:1, mps (default: the fastest there is).")
    parser.add_argument("--dtype", default="float32", metavar="{float32,bfloat16,float16}", help="(default: float32)")
    given = parser.parse_checked(argv)
    out = Path(given.pop("out") or _default_out(given["folder"], given["seed"]))
    individual = given.pop("individual")
    for name in ("class_labels", "guidance_interval"):
        given[name] = None if given[name] is None else tuple(given[name])
    for name in ("concat_inputs", "encoder_hidden_states"):
        given[name] = None if given[name] is None else Path(given[name])
    for name in ("scheduler_args", "step_args"):
        given[name] = dict(_pair(name, text) for text in given[name])
    if given["scheduler"] is not None and given["num_inference_steps"] is None:
        given["num_inference_steps"] = OTHER_STEPS
    options = SampleOptions(out=out, individual=Path(individual) if individual else None, **given)
    _check_numbers(options)
    check_pipeline_source(options.folder)
    _check_places(options)
    return options


def _default_out(folder: str, seed: int) -> Path:
    name = f"samples-seed{seed}.png"
    return Path(folder) / name if Path(folder).is_dir() else Path(f"{Path(folder).name}-{name}")


def _pair(option: str, text: str) -> tuple[str, Any]:
    """KEY=VALUE, with numbers, true, false and null as such."""
    key, equals, value = text.partition("=")
    if not (equals and key.isidentifier()):
        raise ConfigError(f"--{option} {text!r} is not KEY=VALUE, e.g. timestep_spacing=trailing")
    try:
        return key, json.loads(value)
    except ValueError:
        return key, value


def _check_numbers(options: SampleOptions) -> None:
    for name, low in (("num_images", 1), ("batch_size", 1), ("num_inference_steps", 1), ("seed", 0)):
        value = getattr(options, name)
        if value is not None and value < low:
            raise ConfigError(f"--{name} must be at least {low}, got {value}")
    if not 0 <= options.temperature < math.inf:
        raise ConfigError(f"--temperature must be at least 0, got {options.temperature}")
    if not math.isfinite(options.guidance_scale):
        raise ConfigError(f"--guidance_scale must be a finite number, got {options.guidance_scale}")
    if options.eta is not None and not 0 <= options.eta < math.inf:
        raise ConfigError(f"--eta must be at least 0, got {options.eta}")
    if options.optimal_timesteps and options.num_inference_steps is None:
        raise ConfigError("--optimal_timesteps needs --num_inference_steps: how many of them")
    for name in ("concat_inputs", "encoder_hidden_states"):
        path = getattr(options, name)
        if path is not None and (path.suffix != ".npy" or not path.is_file()):
            raise ConfigError(f"--{name} {path} is no .npy file: give an array")
    check_dtype(options.dtype)
    if options.bit_depth not in (8, 16):
        raise ConfigError(f"--bit_depth must be 8 or 16, got {options.bit_depth}")
    deep = options.is_folder or options.individual is not None or options.out.suffix.lower() == ".npz"
    if options.bit_depth == 16 and not deep:
        raise ConfigError(f"--bit_depth 16 has no effect on --out {options.out}: name a folder or a .npz file")


def _check_places(options: SampleOptions) -> None:
    out, individual = options.out, options.individual
    if out.suffix.lower() not in ("", *FILES):
        raise ConfigError(f"--out {out} must end in one of {', '.join(FILES)}, or in nothing for a folder")
    if options.is_folder:
        if out.is_file():
            raise ConfigError(f"--out {out} is a file: name a folder, or end it in one of {', '.join(FILES)}")
        if individual is not None:
            raise ConfigError("--individual has no effect where --out is a folder: leave it out")
    elif out.is_dir():
        raise ConfigError(f"--out {out} is a folder: name a file")
    if not out.absolute().parent.is_dir():
        raise ConfigError(f"--out {out} lies in a folder that does not exist: make it first")
    if not os.access(out.absolute().parent, os.W_OK | os.X_OK):
        raise ConfigError(f"--out {out} is not writable: name another place")
    if individual is not None and individual.exists():
        if not individual.is_dir():
            raise ConfigError(f"--individual {individual} is a file: name a folder")
        if any(individual.iterdir()):
            raise ConfigError(f"--individual {individual} is not empty: name another folder")
