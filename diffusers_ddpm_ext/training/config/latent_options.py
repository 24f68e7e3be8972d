"""Options of training in the latents of a first stage, and their checks, before anything is loaded or written."""

from __future__ import annotations

from collections.abc import Mapping, Set
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

from diffusers_ddpm_ext.errors import ConfigError, printable
from diffusers_ddpm_ext.utils.input_files import exists
from diffusers_ddpm_ext.utils.option import option
from diffusers_ddpm_ext.utils.vocabulary import LATENTS_KEY, REQUIRED_CONDITIONS, ConcatThroughVae

FIRST_STAGE_FOLDERS = ("vae", "vqvae")
LATENT_CACHE = "runs/latents"
LATENT_WIDTHS = (128, 256, 512)
"""Default widths of a network of latents: they are 4 to 16 times smaller than the images."""


@dataclass(frozen=True)
class LatentOptions:
    """Latent diffusion: train on the latents of a first stage (an autoencoder), which stays as it is."""

    vae: str | None = option(
        None,
        "First stage: the folder of a Diffusers autoencoder (AutoencoderKL, VQModel, AutoencoderTiny, AutoencoderDC)"
        " or of a pipeline with one, or a Hub id. With --ckpt_path FOLDER of a latent model: by default its own.",
        unset="train on pixels",
        path=True,
    )
    vae_subfolder: str | None = option(None, "Subfolder of --vae with the autoencoder.", unset="`vae` or `vqvae`")
    scale_factor: float | Literal["data", "vae"] = option(
        "vae",
        "Factor of the latents. vae: that of the autoencoder's configuration; data: 1 / (their standard deviation over"
        " a sample of the training images). The saved autoencoder gets it as scaling_factor.",
        above=0,
    )
    scale_by_std: bool = option(
        False, "CompVis' name of --scale_factor data. With the first stage of --ckpt_path the factor stays what it is."
    )
    latent_stats: bool = option(
        False, "Subtract the mean of each channel and divide by its standard deviation, measured as for data."
    )
    latent_mode: bool = option(
        False, "Use the mode of the posterior instead of a new sample each time (AutoencoderKL)."
    )
    concat_through_vae: ConcatThroughVae | None = option(
        None,
        "Encode concatenated pictures by the first stage, too: the posterior's mode, unscaled, as CompVis'"
        " LatentDiffusion does, or a scaled sample, as its LatentInpaintDiffusion does. A fourth channel,"
        " transparency, is a mask: transparent is painted. Without a word: mode.",
        unset="pictures are averaged to the latents' size",
        bare="mode",
    )
    cache_latents: str | None = option(
        None,
        "Encode every image once, into this folder, for all epochs and later runs. Images must not be cropped at"
        f" random (--center_crop). Without a folder: {LATENT_CACHE}.",
        unset="encode each image each time",
        metavar="DIR",
        path=True,
        bare=LATENT_CACHE,
    )
    cache_latents_dtype: Literal["float32", "float16"] = option(
        "float32",
        "Numbers in --cache_latents. float16 takes half the space and changes decoded images by about a tenth of one"
        " of 256 levels.",
    )


def check_latent_options(flat: Mapping[str, Any], typed: Set[str]) -> None:
    """Check the options of the section ``latents`` against all others.

    Args:
        flat: every option by name.
        typed: names of those on the command line.

    Raises:
        ConfigError: the first contradiction, with the option, its value and the way out.
    """
    if flat["vae"] is None:
        for item in fields(LatentOptions):
            if item.name in typed and flat[item.name] not in (False, None):
                value = f"--{item.name} {flat[item.name]}"
                raise ConfigError(f"{value} has no effect without --vae: add that, or leave --{item.name} out")
        if (flat["model_config"] or {}).get(LATENTS_KEY):
            raise ConfigError(
                "--model_config is a network of latents: name their first stage with --vae (for a CompVis checkpoint,"
                f" the folder that `ddpm-ext convert` makes of it), or delete {LATENTS_KEY} to train on pixels"
            )
        return
    _check_scale(flat)
    if flat["loss_type"] == "perceptual":
        raise ConfigError(
            "--loss_type perceptual compares images, and with --vae the network predicts latents: use l2, l1 or huber"
        )
    if flat["decoder"] != "continuous":
        raise ConfigError(
            f"--decoder {flat['decoder']} is the probability of a pixel's level, and latents have no levels:"
            " use --decoder continuous"
        )
    if flat["bin_width"] is not None:
        raise ConfigError(f"--bin_width {flat['bin_width']:g} has no effect with --vae: latents have no levels")
    if flat["concat_through_vae"] and "concat_inputs" not in REQUIRED_CONDITIONS[flat["conditioning_key"]]:
        raise ConfigError(
            "--concat_through_vae encodes concatenated pictures, and --conditioning_key"
            f" {flat['conditioning_key'] or 'none'} has none: use --conditioning_key concat and --concat_column"
        )
    check_vae_path(flat["vae"], flat["vae_subfolder"])
    _check_cache(flat, typed)


def _check_cache(flat: Mapping[str, Any], typed: Set[str]) -> None:
    folder, dtype = flat["cache_latents"], flat["cache_latents_dtype"]
    if folder is None and "cache_latents_dtype" in typed:
        raise ConfigError(
            f"--cache_latents_dtype {dtype} has no effect without --cache_latents: add that, or leave it out"
        )
    if folder is not None and flat["random_crop"] == "before":
        raise ConfigError(
            "--cache_latents stores one crop of each image, and --random_crop before cuts another one each time: leave"
            " one out"
        )
    if folder is not None and exists(folder) and not Path(folder).is_dir():
        raise ConfigError(f"--cache_latents {printable(folder, 200)} is a file: name a folder")


def _check_scale(flat: Mapping[str, Any]) -> None:
    factor = flat["scale_factor"]
    if flat["scale_by_std"] and factor != ("vae" if _keeps_first_stage(flat) else "data"):
        raise ConfigError(f"--scale_by_std contradicts --scale_factor {factor}: leave one of them out")
    if flat["latent_stats"] and factor == "data":
        raise ConfigError(
            "--scale_factor data has no effect with --latent_stats, which makes each channel's standard deviation"
            " 1: leave one out, or use a number, the standard deviation to have"
        )


def check_vae_path(vae: str, subfolder: str | None) -> None:
    """Refuse a first stage on this machine that does not exist.

    Raises:
        ConfigError: a path that is not there, or a checkpoint that is not converted.
    """
    path, label = Path(vae), f"--vae {printable(vae, 200)}"
    if path.suffix in (".ckpt", ".safetensors", ".pt", ".yaml"):
        raise ConfigError(
            f"{label} is a file, and must be a folder: make one of a CompVis checkpoint with `ddpm-ext convert`"
        )
    if not exists(path):
        if vae.startswith((".", "/", "~")) or vae.count("/") > 1:
            raise ConfigError(f"{label} does not exist: name the folder of an autoencoder, or of a pipeline with one")
        return
    if subfolder is not None and not (path / subfolder).is_dir():
        raise ConfigError(f"--vae_subfolder {printable(subfolder, 200)} does not exist in {printable(vae, 200)}")


def latent_defaults(flat: Mapping[str, Any], explicit: Mapping[str, Any]) -> dict[str, Any]:
    """Defaults of options that are others in latents, for those that are not set explicitly.

    Args:
        flat: every option by name, before these defaults.
        explicit: the options that are set.
    """
    derived: dict[str, Any] = {}
    vae = flat["vae"]
    if vae is None and explicit.get("ckpt_path") is not None and has_first_stage(Path(explicit["ckpt_path"])):
        derived["vae"] = vae = explicit["ckpt_path"]
    if vae is None:
        return {}
    if flat["scale_by_std"] and "scale_factor" not in explicit:
        derived["scale_factor"] = "vae" if _keeps_first_stage({**flat, "vae": vae}) else "data"
    if "clip_sample" not in explicit:
        derived["clip_sample"] = False  # latents have no bounds
    if "decoder" not in explicit:
        derived["decoder"] = "continuous"
    return derived


def _keeps_first_stage(flat: Mapping[str, Any]) -> bool:
    """Whether the run goes on with the first stage of its initial weights."""
    path = flat["ckpt_path"]
    return path is not None and path == flat["vae"] and has_first_stage(Path(path))


def has_first_stage(folder: Path) -> bool:
    """Whether it is the folder of a pipeline with a first stage."""
    return any((folder / name / "config.json").is_file() for name in FIRST_STAGE_FOLDERS)
