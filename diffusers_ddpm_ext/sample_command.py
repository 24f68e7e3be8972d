"""`ddpm-ext sample`: pictures from a saved pipeline. Runs on the base install."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffusers_ddpm_ext.opening import check_dtype, check_folder, find_device, open_pipeline
from diffusers_ddpm_ext.training.errors import ConfigError
from diffusers_ddpm_ext.training.flags import Parser

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    Pixels = npt.NDArray[np.float32]

PICTURES = (".png", ".jpg", ".jpeg", ".webp")
HEAD = "Draw images from a trained pipeline: a folder of ours or of Diffusers' DDPMPipeline, or a Hub id."
TAIL = """examples:
  ddpm-ext sample runs/digits
  ddpm-ext sample runs/digits --num_images 100 --num_inference_steps 250 --out grid.png
  ddpm-ext sample runs/digits --num_images 1000 --out samples.npy     float32 (N, height, width, channels) in [0, 1]
  ddpm-ext sample google/ddpm-cifar10-32 --device cuda --dtype bfloat16
  ddpm-ext sample runs/classes --class_labels 3 --guidance_scale 2     the class of all images, or several in turn

Image i follows from the seed and from i alone: it is the same whatever --num_images and --batch_size."""


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


def parse_sample_args(argv: Sequence[str], prog: str = "ddpm-ext sample") -> SampleOptions:
    """Read and check the command line. Imports nothing heavy, writes nothing.

    Args:
        argv: the arguments after the command.
        prog: how help calls the program.

    Returns:
        The options.

    Raises:
        ConfigError: anything a person must put right; one sentence.
        SystemExit: `--help` was asked for.
    """
    parser = Parser(prog=prog, usage=f"{prog} FOLDER [options]", description=HEAD, epilog=TAIL)
    parser.add_argument("folder", metavar="FOLDER", help="Output folder of a run, saved pipeline, or Hub id.")
    parser.add_argument("--num_images", type=int, default=16, metavar="N", help="How many (default: 16).")
    parser.add_argument(
        "--out",
        metavar="FILE",
        help="A grid (.png, .jpg, .webp) or an array (.npy) (default: samples-seed<SEED>.png in FOLDER).",
    )
    parser.add_argument("--individual", metavar="DIR", help="Also write every image as DIR/00000.png, ...")
    parser.add_argument(
        "--num_inference_steps",
        "--ddpm_num_inference_steps",
        type=int,
        metavar="K",
        help="Sampling steps, at most T (default: all T).",
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
    options = SampleOptions(out=out, individual=Path(individual) if individual else None, **given)
    _check_numbers(options)
    check_folder(options.folder)
    _check_places(options)
    return options


def _default_out(folder: str, seed: int) -> Path:
    name = f"samples-seed{seed}.png"
    return Path(folder) / name if Path(folder).is_dir() else Path(f"{Path(folder).name}-{name}")


def _check_numbers(options: SampleOptions) -> None:
    for name, low in (("num_images", 1), ("batch_size", 1), ("num_inference_steps", 1), ("seed", 0)):
        value = getattr(options, name)
        if value is not None and value < low:
            raise ConfigError(f"--{name} must be at least {low}, got {value}")
    if not 0 <= options.temperature < math.inf:
        raise ConfigError(f"--temperature must be at least 0, got {options.temperature}")
    if not math.isfinite(options.guidance_scale):
        raise ConfigError(f"--guidance_scale must be a finite number, got {options.guidance_scale}")
    for name in ("concat_inputs", "encoder_hidden_states"):
        path = getattr(options, name)
        if path is not None and (path.suffix != ".npy" or not path.is_file()):
            raise ConfigError(f"--{name} {path} is no .npy file: give an array")
    check_dtype(options.dtype)


def _check_places(options: SampleOptions) -> None:
    out, individual = options.out, options.individual
    if out.suffix.lower() not in (*PICTURES, ".npy"):
        raise ConfigError(f"--out {out} must end in one of {', '.join((*PICTURES, '.npy'))}")
    if out.is_dir():
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


def sample(options: SampleOptions) -> str:
    """Load the pipeline, draw, and write.

    Args:
        options: what was asked for.

    Returns:
        One line that says what was written where.

    Raises:
        ConfigError: the pipeline cannot be opened, or does not take these options.
    """
    import numpy as np

    asked = f"--variant {options.variant}"
    pipeline = open_pipeline(options.folder, options.variant, find_device(options.device), options.dtype, asked)
    try:
        images = np.concatenate(list(_batches(pipeline, options)))
    except ValueError as error:
        raise ConfigError(f"{options.folder}: {error}") from None
    count, height, width, channels = images.shape
    try:
        _write(images, options)
    except OSError as error:
        raise ConfigError(f"cannot write {error.filename or options.out}: {error.strerror or error}") from None
    beside = f" and, one by one, to {options.individual}" if options.individual else ""
    return f"{count} images of {height}x{width}x{channels} written to {options.out}{beside}"


def _batches(pipeline: Any, options: SampleOptions) -> Iterator[Pixels]:
    from tqdm import tqdm

    from diffusers_ddpm_ext.training.keys import generator

    conditions = _conditions(pipeline, options)
    starts = range(0, options.num_images, options.batch_size)
    steps = options.num_inference_steps or pipeline.scheduler.config.num_train_timesteps

    def advance(pipe: Any, i: int, t: int, tensors: dict[str, Any]) -> dict[str, Any]:
        bar.update()
        return tensors

    with tqdm(total=len(starts) * steps, desc="sampling", unit="step", leave=False, disable=None) as bar:
        for start in starts:
            indices = range(start, min(start + options.batch_size, options.num_images))
            output = pipeline(
                batch_size=len(indices),
                generator=[generator("sample", options.seed, index) for index in indices],
                num_inference_steps=options.num_inference_steps,
                temperature=options.temperature,
                output_type="np",
                callback_on_step_end=advance,
                guidance_scale=options.guidance_scale,
                guidance_interval=options.guidance_interval,
                **{name: value[[index % len(value) for index in indices]] for name, value in conditions.items()},
            )
            yield output.images


def _conditions(pipeline: Any, options: SampleOptions) -> dict[str, Any]:
    """What the images are conditioned on, to be taken in turn: given, and else all classes."""
    import numpy as np
    import torch

    found: dict[str, Any] = {}
    for name in ("concat_inputs", "encoder_hidden_states"):
        path = getattr(options, name)
        if path is not None:
            try:
                found[name] = torch.from_numpy(np.load(path, allow_pickle=False).astype(np.float32))
            except (OSError, ValueError) as error:
                raise ConfigError(f"--{name} {path} cannot be read: {error}") from None
            if found[name].ndim != (4 if name == "concat_inputs" else 3) or not len(found[name]):
                raise ConfigError(f"--{name} {path} has shape {tuple(found[name].shape)}; see --help")
    if options.class_labels is not None:
        found["class_labels"] = torch.tensor(options.class_labels)
    elif pipeline.num_classes is not None and "encoder_hidden_states" not in found:
        classes, null = range(pipeline.num_classes), pipeline.config.get("null_class_label")
        found["class_labels"] = torch.tensor([label for label in classes if label != null])
    return found


def _write(images: Pixels, options: SampleOptions) -> None:
    import numpy as np

    from diffusers_ddpm_ext.plots import save_grid, write_whole

    signed = images.transpose(0, 3, 1, 2) * 2 - 1
    if options.individual is not None:
        for index, pixels in enumerate(signed):
            save_grid(pixels[None], options.individual / f"{index:05d}.png", enlarge=1)
    if options.out.suffix.lower() == ".npy":
        write_whole(options.out, lambda file: np.save(file, images.astype(np.float32)))
    else:
        save_grid(signed, options.out)
