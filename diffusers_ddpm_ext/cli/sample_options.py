"""Options of `ddpm-ext sample` and the checks that compare them. Imports nothing heavy."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from diffusers_ddpm_ext.cli.arguments import (
    DEVICE_HELP,
    FOLDER_HELP,
    Dtype,
    check_no_input,
    check_not_locked,
    check_output_path,
    check_pipeline_source,
)
from diffusers_ddpm_ext.cli.parser import parse_options
from diffusers_ddpm_ext.errors import ConfigError
from diffusers_ddpm_ext.training.config.pixel_options import ResizeMode
from diffusers_ddpm_ext.utils.folder_lock import FolderLock
from diffusers_ddpm_ext.utils.option import option, positional
from diffusers_ddpm_ext.utils.vocabulary import NamedTimesteps

ARRAYS = ("concat_inputs", "encoder_hidden_states", "input_ids", "negative_input_ids")
"""Options that name a .npy file."""
FILE_TYPES = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".npy", ".npz", ".tif", ".tiff")
NO_PICTURES = ("", ".npy", ".npz", ".tif", ".tiff")
"""Of --out: what shows all channels, or the data's values."""
OTHER_SCHEDULER_STEPS = 50
DEFAULT_IMAGES, MAX_IMAGES = 16, 10**9
SAMPLE_EXAMPLES = """examples:
  ddpm-ext sample runs/digits
  ddpm-ext sample runs/digits --scheduler DPMSolverMultistepScheduler --num_inference_steps 25 --num_images 64
  ddpm-ext sample runs/digits --scheduler DDIMScheduler --num_inference_steps 5 --timesteps samples    after fit-steps
  ddpm-ext sample runs/digits --out samples --num_images 1000          samples/00000.png, ...
  ddpm-ext sample runs/digits --out samples.npz --num_images 1000      uint8 (N, height, width, channels), as arr_0
  ddpm-ext sample runs/bands --out samples.npy                         of other data: its dtype and range, all channels
  ddpm-ext sample runs/bands --out samples --format tif                samples/00000.tif, ... in the same values
  ddpm-ext sample runs/digits --out samples.npy                        8-bit images as float32 in [0, 1]
  ddpm-ext sample runs/digits --out video.gif --num_images 9           from noise to images
  ddpm-ext sample google/ddpm-cifar10-32 --device cuda --dtype bfloat16
  ddpm-ext sample runs/classes --class_labels 3 --guidance_scale 2     one class for all images; several: in turn
  ddpm-ext sample runs/food --class_labels Bread "Dairy product" 7     by name, where the classes have names
  ddpm-ext sample runs/emoji --prompt "a red apple" "a cat" --guidance_scale 3     in turn over the images
  ddpm-ext sample runs/emoji --prompts prompts.txt --out drawn         drawn/00000.png of its first line, and so on
  ddpm-ext sample runs/sharp --concat small --out large                large/cat.png from small/cat.jpg, and so on
  accelerate launch -m diffusers_ddpm_ext sample runs/digits --num_images 50000 --out samples     on all devices

Image i depends on the seed, its conditions and i only: it is the same for any --num_images, --batch_size and number of
processes.
The same command resumes where it was interrupted. Samples of a model of latents are decoded by the first stage in its
folder; without one they are written as they are, to .npy or .npz."""


@dataclass(frozen=True)
class SampleOptions:
    """Draw images from a trained pipeline.

    It is a folder of this package or of Diffusers' DDPMPipeline, LDMPipeline, LDMTextToImagePipeline or
    StableDiffusionPipeline (whose safety checker is not run), or a Hub id.
    """

    folder: str = positional("FOLDER", FOLDER_HELP, path=True)
    num_images: int | None = option(
        None,
        "Number of images.",
        low=1,
        high=MAX_IMAGES,
        metavar="N",
        unset=f"{DEFAULT_IMAGES}, or one for each prompt of --prompts, or picture of --concat or --image",
    )
    out: Path | None = option(
        None,
        "A grid (.png, .jpg, .webp), a video from noise to images (.gif), all images as an array (.npy, .npz) or as"
        " the pages of a .tif, or, without a suffix, a folder with a file for each image.",
        unset="samples-seed<SEED>.png in FOLDER",
    )
    individual: Path | None = option(None, "Also write every image as DIR/00000.png, ...", metavar="DIR")
    format: Literal["png", "npy", "npz", "tif"] | None = option(
        None, "Type of the files in a folder of images.", unset="that of the model's data; png for 8-bit images"
    )
    num_inference_steps: int | None = option(
        None,
        "Sampling steps, at most T.",
        alias=("ddpm_num_inference_steps",),
        low=1,
        metavar="K",
        unset=f"all T, or {OTHER_SCHEDULER_STEPS} with --scheduler",
    )
    batch_size: int | None = option(
        None, "Images per forward pass.", low=1, unset="as many as fit into the memory, at most 64; 256 on a GPU"
    )
    seed: int = option(0, "Random seed.", low=0)
    temperature: float = option(1.0, "Factor on the noise of each step.", low=0)
    variant: str | None = option(
        None, "Variant of the weights; `raw`: without averaging.", metavar="NAME", unset="the default files"
    )
    device: str | None = option(None, DEVICE_HELP, metavar="NAME", unset="the fastest available")
    dtype: Dtype = option("float32", "Precision of the network; samples and scheduler stay in float32.")
    memory_format: Literal["contiguous", "channels_last"] | None = option(
        None,
        "Layout of the network's weights; the images differ by rounding only. On an x86 CPU, channels_last comes with"
        " convolutions and group normalizations that are faster without gradients.",
        unset="channels_last on an x86 CPU, in half precision and with --compile, else contiguous",
    )
    fast_attention: Literal["auto", "never"] = option(
        "auto",
        "Compute attention on an x86 CPU by oneDNN and, with heads of 8 channels, a few heads at a time (auto), or by"
        " PyTorch's kernel (never); the images differ by rounding only.",
    )
    compile: bool = option(
        False,
        "Compile the network with torch.compile, which takes minutes at the first step: for many images or steps.",
    )
    class_labels: tuple[str, ...] | None = option(
        None,
        "Classes by number or by name, in turn over the images.",
        metavar="CLASS",
        unset="all classes in turn, where the model needs them",
    )
    concat_inputs: Path | None = option(
        None,
        "Images that are concatenated to the input: .npy (N, C, height, width) in [-1, 1], in turn over the images.",
        metavar="FILE",
    )
    concat: Path | None = option(
        None,
        "Pictures to concatenate to the input, in turn over the images, which are named after them: resized, cropped,"
        " and sent through the first stage or the concat_encoder where the model was trained so. Where it also takes a"
        " mask (inpainting), the transparent part of a picture is painted; where it takes labels, the levels of a gray"
        " picture are these.",
        metavar="DIR",
    )
    concat_resize: ResizeMode | None = option(
        None,
        "How pictures of --concat get the size, as --resize of `ddpm-ext train`.",
        unset="as in the training run, whose config.yaml is in FOLDER, or else crop",
    )
    image: Path | None = option(
        None,
        "Pictures for the image encoder of a model that has one, in turn over the images, which are named after them.",
        metavar="DIR",
    )
    prompt: tuple[str, ...] | None = option(
        None, "Prompts, each in quotes, in turn over the images.", metavar="TEXT", phrases=True
    )
    negative_prompt: tuple[str, ...] | None = option(
        None,
        "What guidance leads away from: one text for all prompts, or one for each.",
        metavar="TEXT",
        unset="the empty prompt",
        phrases=True,
    )
    prompts: Path | None = option(
        None,
        "A file of prompts, in turn over the images: .txt with one a line, or .jsonl with an object a line, its keys"
        " prompt, negative_prompt and seed. Blank lines are skipped; a line that begins with # is a prompt.",
        metavar="FILE",
    )
    input_ids: Path | None = option(
        None,
        "Token ids in place of prompts, where there is no tokenizer: .npy (N, tokens), integers, in turn over the"
        " images.",
        metavar="FILE",
    )
    negative_input_ids: Path | None = option(
        None,
        "Token ids in place of --negative_prompt: .npy (1, tokens), or one row for each of --input_ids.",
        metavar="FILE",
    )
    text_encoder: str | None = option(
        None,
        "A text encoder of Transformers or Diffusers: its folder or Hub id, or that of a pipeline which has one.",
        metavar="FOLDER_OR_ID",
        unset="the one in FOLDER",
        path=True,
    )
    tokenizer: str | None = option(
        None,
        "A tokenizer of Transformers, likewise. Checkpoints of CompVis have none.",
        metavar="FOLDER_OR_ID",
        unset="that of --text_encoder, or the one in FOLDER",
        path=True,
    )
    encoder_hidden_states: Path | None = option(
        None,
        "Embeddings for cross attention, in place of prompts: .npy (N, tokens, width), in turn over the images.",
        metavar="FILE",
    )
    guidance_scale: float = option(1.0, "Classifier-free guidance: u + S (c - u); 1: no guidance.", metavar="S")
    guidance_interval: tuple[float, float] | None = option(
        None, "Guide only at timesteps of the training chain from LOW to HIGH.", metavar="LOW HIGH", unset="all"
    )
    scheduler: str | None = option(
        None,
        "A Diffusers scheduler by its class, e.g. DPMSolverMultistepScheduler.",
        metavar="NAME",
        unset="the one in FOLDER",
    )
    scheduler_args: dict[str, Any] = option(
        {},
        "Changes to the scheduler's configuration, e.g. use_karras_sigmas=true timestep_spacing=trailing.",
        metavar="KEY=VALUE",
    )
    step_args: dict[str, Any] = option(
        {}, "Arguments of the scheduler's step, e.g. s_noise=1.003.", metavar="KEY=VALUE"
    )
    eta: float | None = option(None, "Noise of DDIM: 0 is none, 1 that of DDPM.", low=0)
    optimal_timesteps: bool = option(False, "Use the timesteps that `ddpm-ext fit-variance` found best.")
    timesteps: NamedTimesteps | None = option(
        None,
        "Which K timesteps: samples: those that `ddpm-ext fit-steps` found for this scheduler; bound: those that"
        " `ddpm-ext fit-variance` found, with any scheduler; even: those of the scheduler's spacing.",
        unset="even",
    )
    bit_depth: Literal[8, 16] | None = option(
        None,
        "Bits of a folder's files and of .npz and .tif, which then hold unsigned integers from 0.",
        unset="dtype and range of the model's data; 8 for 8-bit images",
    )
    preview_channels: tuple[int, ...] | None = option(
        None,
        "Channels that grids and videos show, by number from 0: one in gray, or three as red, green and blue.",
        metavar="I",
        unset="those of the training run, by default principal components; the first of two",
    )

    @property
    def output_path(self) -> Path:
        """Where the images go: ``--out``, or its default."""
        if self.out is not None:
            return self.out
        name, folder = f"samples-seed{self.seed}.png", Path(self.folder)
        return folder / name if folder.is_dir() else Path(f"{folder.name}-{name}")

    @property
    def writes_array(self) -> bool:
        """Whether the images go to an array, which may hold any numbers."""
        return self.output_path.suffix.lower() in (".npy", ".npz")

    @property
    def is_folder(self) -> bool:
        """Whether the images go to a folder of files."""
        return not self.output_path.suffix


def parse_sample_args(argv: Sequence[str]) -> SampleOptions:
    """The options of a command line, checked; errors are those of `parse_options`."""
    options = parse_options(SampleOptions, argv, "sample", SAMPLE_EXAMPLES)
    check_timesteps_options(options.timesteps, options.num_inference_steps, options.optimal_timesteps)
    if options.scheduler is not None and options.num_inference_steps is None:
        options = replace(options, num_inference_steps=OTHER_SCHEDULER_STEPS)
    _check_sample_options(options)
    check_pipeline_source(options.folder)
    _check_sample_paths(options)
    return options


def check_timesteps_options(timesteps: str | None, count: int | None, optimal: bool) -> None:
    """Raise ConfigError for ``--timesteps`` without a number of steps, or beside ``--optimal_timesteps``."""
    if optimal and timesteps is not None:
        raise ConfigError("--optimal_timesteps is --timesteps bound: give one of them")
    if timesteps not in (None, "even") and count is None:
        raise ConfigError(f"--timesteps {timesteps} needs --num_inference_steps: how many of them")


def _check_sample_options(options: SampleOptions) -> None:
    if options.optimal_timesteps and options.num_inference_steps is None:
        raise ConfigError("--optimal_timesteps needs --num_inference_steps: how many of them")
    for name in ARRAYS:
        path = getattr(options, name)
        if path is not None and path.suffix != ".npy":
            raise ConfigError(f"--{name} {path} is not a .npy file: give an array")
    if options.concat is not None and options.concat_inputs is not None:
        raise ConfigError("--concat and --concat_inputs are both what is concatenated to the input: give one of them")
    if options.concat_resize is not None and options.concat is None:
        raise ConfigError(f"--concat_resize {options.concat_resize} has no effect without --concat: leave it out")
    out = options.output_path
    has_files = options.is_folder or options.individual is not None
    takes_depth = has_files or out.suffix.lower() in (".npz", ".tif", ".tiff")
    if options.bit_depth == 16 and not takes_depth:
        raise ConfigError(f"--bit_depth 16 has no effect on --out {out}: name a folder or a .npz file")
    if options.format is not None and not has_files:
        raise ConfigError(f"--format {options.format} has no effect on --out {out}, which its suffix is the format of")
    if options.preview_channels is not None and out.suffix.lower() in NO_PICTURES:
        raise ConfigError(f"--preview_channels has no effect on --out {out}, which holds all channels: leave it out")


def _check_sample_paths(options: SampleOptions) -> None:
    out, individual = options.output_path, options.individual
    if out.suffix.lower() not in ("", *FILE_TYPES):
        raise ConfigError(f"--out {out} must end in one of {', '.join(FILE_TYPES)}, or in nothing for a folder")
    check_output_path("--out", out, "folder" if options.is_folder else "file")
    inputs = {f"--{name}": getattr(options, name) for name in ("concat", "image", "prompts", *ARRAYS)}
    check_no_input("--out", out, inputs)
    for option_name in ("concat", "image"):
        folder = getattr(options, option_name)
        for name, place in (("--out", out), ("--individual", individual)):
            if folder is not None and place is not None and place.resolve().is_relative_to(folder.resolve()):
                raise ConfigError(f"{name} {place} is in the folder that --{option_name} reads: name another place")
    if options.is_folder and individual is not None:
        raise ConfigError("--individual has no effect where --out is a folder: leave it out")
    lock = FolderLock(out) if options.is_folder else FolderLock(out.parent, out.name)
    check_not_locked("--out", lock)
    if individual is not None:
        _check_individual(individual)


def _check_individual(folder: Path) -> None:
    if not folder.parent.exists():  # it is created, with its parents
        return
    check_output_path("--individual", folder, "folder")
    if folder.is_dir() and any(folder.iterdir()):
        raise ConfigError(f"--individual {folder} is not empty: name another folder")
    check_not_locked("--individual", FolderLock(folder.resolve().parent, folder.resolve().name))
