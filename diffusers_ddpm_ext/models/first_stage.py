"""First stages of latent diffusion: Diffusers' autoencoders behind one rule for the scale of latents.

    z    latents as the autoencoder has them: a sample of the posterior (KL), before quantization (VQ), or its output
    x    latents as the diffusion model has them
    m, s shift and scale, one per channel or one for all:  x = (z - m) / s,  z = s x + m

``m`` is ``latents_mean`` of the autoencoder's configuration, else ``shift_factor``, else 0. ``s`` is
``latents_std / scaling_factor``, or ``1 / scaling_factor``. These are the formulas of Diffusers' pipelines for SDXL,
Stable Diffusion 3 and Flux, and CompVis' ``scale_factor`` is ``1 / s``.
"""

from __future__ import annotations

import copy
import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderDC, AutoencoderKL, AutoencoderTiny, VQModel
from diffusers.utils.torch_utils import randn_tensor
from huggingface_hub import snapshot_download
from torch import Tensor, nn

from diffusers_ddpm_ext.errors import ConfigError, printable
from diffusers_ddpm_ext.models.evaluation_mode import evaluation_mode
from diffusers_ddpm_ext.utils.checks import checked_number, describe
from diffusers_ddpm_ext.utils.dtensor import full_tensor
from diffusers_ddpm_ext.utils.generations import read_one_generation
from diffusers_ddpm_ext.utils.input_files import file_name, read_json_object
from diffusers_ddpm_ext.utils.network_folder import as_folder_error, check_complete, check_network_folder
from diffusers_ddpm_ext.utils.pipeline_files import MODEL_INDEX
from diffusers_ddpm_ext.utils.wrappers import network_class, plain_state_dict, unwrap

KINDS = {AutoencoderKL: "kl", VQModel: "vq", AutoencoderTiny: "tiny", AutoencoderDC: "dc"}
_CLASSES = "AutoencoderKL, VQModel, AutoencoderTiny or AutoencoderDC"
SLOTS = ("vae", "vqvae")
"""Names of the component in pipelines."""
SCALE_KEYS = ("scaling_factor", "shift_factor", "latents_mean", "latents_std")
BLANK_SIZES = (64, 256, 1024)
"""Sizes of the blank images that show the compression factor: the next one where the latents have one pixel."""


class FirstStage:
    """An autoencoder between pixels and the latents of a diffusion model.

    It computes in float32 or more, outside autocast: an autoencoder in half precision is cast to float32, which is
    exact, and stays so. Slicing and tiling are those of the autoencoder (``enable_tiling()``).

    Args:
        autoencoder: an ``AutoencoderKL``, ``VQModel``, ``AutoencoderTiny`` or ``AutoencoderDC``; wrappers such as
            ``torch.compile`` are taken off.

    Raises:
        ValueError: it is of another class, or its configuration has no valid scale: a ``scaling_factor`` that is not
            a positive number, a mean without a standard deviation, a shift beside a mean, or a wrong number of them.
    """

    def __init__(self, autoencoder: nn.Module) -> None:
        self.kind = _kind_of(autoencoder)
        self.autoencoder: Any = unwrap(autoencoder)
        config: Any = self.autoencoder.config
        outputs = config.get("out_channels", config.in_channels)
        if outputs != config.in_channels:
            raise ValueError(
                f"The autoencoder has in_channels {config.in_channels} and out_channels {outputs}; a first stage must "
                "return as many channels as it takes."
            )
        self._rule()

    # ------------------------------------------------------------------ what it is

    @property
    def is_stochastic(self) -> bool:
        """Whether encoding draws from a posterior: `AutoencoderKL`."""
        return self.kind == "kl"

    @property
    def pixel_channels(self) -> int:
        """Channels of the pictures."""
        return int(self.autoencoder.config.in_channels)

    @property
    def latent_channels(self) -> int:
        """Channels C of the latents."""
        config = self.autoencoder.config
        width = config.get("vq_embed_dim") if self.kind == "vq" else None
        return int(config.latent_channels if width is None else width)

    @cached_property
    def factor(self) -> int:
        """Pixels per latent, along the height as along the width: measured by encoding a blank image."""
        self._to_float32()
        weight = next(self.autoencoder.parameters())
        device = "cpu" if weight.is_meta else weight.device  # meta: offloaded, hooks bring the weights
        for size in BLANK_SIZES:
            blank = torch.zeros(1, self.pixel_channels, size, size, device=device, dtype=weight.dtype)
            with self._exact(blank):
                # The encoder alone: tiling would cut the image.
                height, width = self.autoencoder.encoder(blank).shape[-2:]
            if height > 1:
                break
        if height != width or height < 1 or size % height:
            raise ValueError(
                f"The autoencoder encodes a blank image of {size}x{size} pixels as {height}x{width} latents; a first "
                "stage must divide both sides by the same whole number."
            )
        return size // int(height)

    def latent_size(self, height: int, width: int) -> tuple[int, int]:
        """Height and width of the latents of an image.

        Args:
            height: in pixels.
            width: in pixels.

        Raises:
            ValueError: the compression factor does not divide them.
        """
        f = self.factor
        if min(height, width) < 1 or height % f or width % f:
            near = sorted({max(f, side // f * f + step) for side in (height, width) for step in (0, f)})
            raise ValueError(
                f"The size is {height}x{width} pixels; this first stage makes one latent of {f}x{f} pixels, so both "
                f"sides must be multiples of {f}, e.g. {', '.join(map(str, near))}."
            )
        return height // f, width // f

    # ------------------------------------------------------------------ the scale

    @property
    def shift(self) -> Tensor:
        """m of the rule: (1, C, 1, 1) or (1, 1, 1, 1), float32, on the CPU."""
        return _as_tensor(self._rule()[0])

    @property
    def scale(self) -> Tensor:
        """s of the rule: (1, C, 1, 1) or (1, 1, 1, 1), float32, on the CPU."""
        return _as_tensor([1 / factor for factor in self._rule()[1]])

    def normalize(self, z: Tensor) -> Tensor:
        """Latents of the autoencoder as those of the diffusion model, ``(z - m) / s``: same shape."""
        shift, factor = (_as_tensor(values).to(z.device) for values in self._rule())
        return (z - shift) * factor if bool(shift.any()) else z * factor

    def denormalize(self, x: Tensor) -> Tensor:
        """Latents of the diffusion model as those of the autoencoder, ``s x + m``: same shape."""
        return x * self.scale.to(x.device) + self.shift.to(x.device)

    def with_scale(
        self,
        scale_factor: float | None,
        mean: Sequence[float] | Tensor | None = None,
        std: Sequence[float] | Tensor | None = None,
    ) -> FirstStage:
        """The same autoencoder with another scale in its configuration: ``x = (z - mean) * scale_factor / std``.

        The shift, mean and standard deviation of the old configuration do not remain. The weights are shared, the
        configuration of this one's autoencoder is not changed.

        Args:
            scale_factor: positive. None: 1 with ``mean`` and ``std``; without them the old scale, explicitly written.
            mean: (C,), or None for 0.
            std: (C,), positive, or None for 1.

        Returns:
            The new first stage.

        Raises:
            ValueError: see the class.
        """
        autoencoder = copy.copy(self.autoencoder)
        config = autoencoder.config
        if scale_factor is None and mean is None and std is None:
            new = {"scaling_factor": config.get("scaling_factor", 1.0)}
        else:
            new = {"scaling_factor": 1.0 if scale_factor is None else scale_factor}
            for name, values in (("latents_mean", mean), ("latents_std", std)):
                if values is not None or name in config:
                    new[name] = None if values is None else torch.as_tensor(values, dtype=torch.float64).tolist()
            if "shift_factor" in config:
                new["shift_factor"] = 0.0 if self.kind == "tiny" else None  # the class' own default
        autoencoder.register_to_config(**new)
        return FirstStage(autoencoder)

    def _rule(self) -> tuple[list[float], list[float]]:
        """m and 1 / s, each one number or one per channel, in double precision; checked."""
        config = self.autoencoder.config
        factor = _checked_positive("scaling_factor", config.get("scaling_factor", 1.0))
        mean = self._per_channel("latents_mean")
        std = self._per_channel("latents_std")
        shift = config.get("shift_factor")
        shift = 0.0 if shift is None else checked_number("shift_factor of the autoencoder", shift, "a number")
        if mean is not None and std is None:
            raise ValueError(
                "The autoencoder's configuration has latents_mean without latents_std; write both, or neither."
            )
        if mean is not None and shift:
            raise ValueError(
                f"The autoencoder's configuration has a shift_factor ({shift}) beside latents_mean; both are what is "
                "subtracted from the latents: keep one."
            )
        scales = [1.0] if std is None else [_checked_positive("latents_std", value) for value in std]
        return [shift] if mean is None else mean, [factor / value for value in scales]

    def _per_channel(self, key: str) -> list[float] | None:
        values = self.autoencoder.config.get(key)
        if values is None:
            return None
        if not isinstance(values, list | tuple) or len(values) != self.latent_channels:
            raise ValueError(
                f"{key} of the autoencoder is {describe(values)}; it must be a list of {self.latent_channels} "
                "numbers, one per channel of the latents."
            )
        return [checked_number(f"{key} of the autoencoder", value, "a list of numbers") for value in values]

    # ------------------------------------------------------------------ encoding and decoding

    @torch.no_grad()
    def posterior(self, pixels: Tensor) -> tuple[Tensor, Tensor | None]:
        """What the encoder says about images, in the autoencoder's own scale.

        Args:
            pixels: (B, C, H, W), floating, in [-1, 1].

        Returns:
            Mean and standard deviation of the posterior (KL); otherwise the latents and None. Each (B, C, h, w),
            float32. Latents of a VQ model are those before quantization.

        Raises:
            ValueError: the pixels have another shape or type, or a size that the factor does not divide.
        """
        self._check_images("pixels", pixels, self.pixel_channels)
        self.latent_size(pixels.shape[2], pixels.shape[3])
        self._to_float32()
        pixels = pixels.to(self._dtype)
        with self._exact(pixels):
            output = self.autoencoder.encode(pixels)
        if self.is_stochastic:
            return output.latent_dist.mean, output.latent_dist.std
        return (output.latent if self.kind == "dc" else output.latents), None

    @torch.no_grad()
    def encode(
        self, pixels: Tensor, generator: torch.Generator | list[torch.Generator] | None = None, mode: bool = False
    ) -> Tensor:
        """Images as latents of the diffusion model.

        Args:
            pixels: (B, C, H, W), floating, in [-1, 1].
            generator: of the posterior's noise, of which an image takes as many numbers as it has latents; the global
                one without it. Only a KL autoencoder draws.
            mode: take the posterior's mean instead of a draw.

        Returns:
            (B, C, h, w), float32.

        Raises:
            ValueError: as `posterior`.
        """
        mean, std = self.posterior(pixels)
        if std is not None and not mode:
            mean = mean + std * randn_tensor(mean.shape, generator=generator, device=mean.device, dtype=mean.dtype)
        return self.normalize(mean)

    def encode_condition(self, pixels: Tensor) -> Tensor:
        """A picture as CompVis' models take it as a condition: not scaled, and the posterior's mean.

        Args:
            pixels: (B, C, H, W), floating, in [-1, 1].

        Returns:
            (B, C, h, w), float32; of a VQ model before quantization.
        """
        return self.posterior(pixels)[0]

    def decode(self, latents: Tensor) -> Tensor:
        """Latents of the diffusion model as images; gradients flow to the latents where these are enabled.

        Args:
            latents: (B, C, h, w), floating. A VQ model quantizes them, after the scale is undone.

        Returns:
            (B, C, H, W), float32, in about [-1, 1], not clipped.

        Raises:
            ValueError: the latents have another shape or type.
        """
        self._check_images("latents", latents, self.latent_channels)
        self._to_float32()
        with self._exact(latents):
            pixels: Tensor = self.autoencoder.decode(self.denormalize(latents.to(self._dtype))).sample
        return pixels

    @property
    def _dtype(self) -> torch.dtype:
        return torch.promote_types(torch.float32, self.autoencoder.dtype)

    def _to_float32(self) -> None:
        if self.autoencoder.dtype != self._dtype:
            self.autoencoder.to(self._dtype)

    @contextmanager
    def _exact(self, tensor: Tensor) -> Iterator[None]:
        """Evaluation mode, without autocast."""
        with torch.autocast(tensor.device.type, enabled=False), evaluation_mode(self.autoencoder):
            yield

    def _check_images(self, name: str, images: Any, channels: int) -> None:
        shape = tuple(getattr(images, "shape", ()))
        if not isinstance(images, Tensor) or len(shape) != 4 or shape[1] != channels:
            what = f"shape {shape}" if isinstance(images, Tensor) else describe(images)
            raise ValueError(f"{name}: {what}; this first stage takes a tensor (B, {channels}, height, width).")
        if not images.is_floating_point():
            raise ValueError(f"{name} has type {images.dtype}; it must be floating, with pixels in [-1, 1].")

    # ------------------------------------------------------------------ identity

    def content_hash(self) -> str:
        """sha256 (hex) of what the autoencoder computes: class, configuration without the scale, and weights.

        Weights in half precision count as their float32 values.
        """
        config = {
            key: value
            for key, value in self.autoencoder.config.items()
            if not key.startswith("_") and key not in SCALE_KEYS
        }
        content = hashlib.sha256(f"{network_class(self.autoencoder).__name__}\n".encode())
        content.update(json.dumps(config, sort_keys=True, default=str).encode())
        for name, tensor in sorted(plain_state_dict(self.autoencoder).items()):
            tensor = full_tensor(tensor.detach()).cpu()
            tensor = tensor.float() if tensor.is_floating_point() and tensor.dtype != torch.float64 else tensor
            content.update(f"\n{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
            content.update(tensor.contiguous().numpy().tobytes())
        return content.hexdigest()


def _kind_of(autoencoder: Any) -> str:
    """kl, vq, tiny or dc."""
    found: type = network_class(autoencoder) if isinstance(autoencoder, nn.Module) else type(autoencoder)
    for cls, kind in KINDS.items():
        if issubclass(found, cls):
            return kind
    raise ValueError(f"The first stage is {found.__name__}; it must be an {_CLASSES}.")


def _checked_positive(key: str, value: Any) -> float:
    return checked_number(f"{key} of the autoencoder", value, "a positive number", lambda v: 0 < v < float("inf"))


def _as_tensor(values: list[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64).float().view(1, -1, 1, 1)


# ------------------------------------------------------------------ loading


def load_first_stage(path_or_id: str | os.PathLike[str], subfolder: str | None = None) -> Any:
    """Load an autoencoder: frozen, in evaluation mode, in float32.

    Args:
        path_or_id: a folder or Hub id, of the autoencoder itself or of a pipeline, whose ``vae`` or ``vqvae`` is
            taken. Without a network, a repository is read from the cache.
        subfolder: where in it the autoencoder is.

    Returns:
        The autoencoder, for `FirstStage`.

    Raises:
        ConfigError: it does not exist, cannot be read, or is no first stage; one sentence.
    """
    source = os.fspath(path_or_id)
    if os.path.isdir(source):
        autoencoder: Any = read_one_generation(source, lambda folder: _load(_find(folder, subfolder)))
        return autoencoder
    try:
        places = (subfolder,) if subfolder else (".", *SLOTS)
        patterns = [MODEL_INDEX, *(os.path.normpath(f"{place}/config.json") for place in places)]
        folder = Path(snapshot_download(source, allow_patterns=patterns))
        place = _find(folder, subfolder).relative_to(folder).as_posix()
        weights = [f"{place}/*.{kind}".removeprefix("./") for kind in ("safetensors", "bin", "index.json")]
        folder = Path(snapshot_download(source, revision=folder.name, allow_patterns=[*patterns, *weights]))
    except ConfigError:
        raise
    except (OSError, ValueError) as error:
        reason = printable(" ".join(str(error).split()).split(". ")[0], 300)
        raise ConfigError(
            f"{printable(source)} is not a folder on this machine and cannot be loaded from the Hub: check the name, "
            f"the network and, for a private repository, `hf auth whoami` ({reason})"
        ) from None
    return _load(_find(folder, subfolder))


def _find(folder: Path, subfolder: str | None) -> Path:
    """The folder of the autoencoder inside another one."""
    if subfolder is not None:
        if os.path.isabs(subfolder) or ".." in Path(subfolder).parts:
            raise ConfigError(f"subfolder is {printable(subfolder)}; it must be a folder inside {file_name(folder)}")
        if not (folder / subfolder).is_dir():
            raise ConfigError(f"{file_name(folder)} has no folder {printable(subfolder)}: correct the subfolder")
        return folder / subfolder
    if not (folder / MODEL_INDEX).is_file():
        if not (folder / "config.json").is_file():
            raise ConfigError(
                f"{file_name(folder)} has neither config.json nor {MODEL_INDEX}: give the folder of a Diffusers "
                "autoencoder, or of a pipeline with one"
            )
        return folder
    index = read_json_object(folder / MODEL_INDEX)
    slot = next((name for name in SLOTS if any(index.list(name, []))), None)
    if slot is None:
        raise ConfigError(
            f"{file_name(folder)} is a pipeline without a first stage ({' or '.join(SLOTS)}): give another folder, or "
            "the autoencoder's own"
        )
    return folder / slot


def _load(folder: Path) -> Any:
    config = check_network_folder(folder)
    name = config.string("_class_name")
    cls: Any = next((cls for cls in KINDS if cls.__name__ == name), None)
    if cls is None:
        raise ConfigError(f"{config.name} is of a {printable(name, 80)}; a first stage is an {_CLASSES}")
    with as_folder_error(folder):
        autoencoder = cls.from_pretrained(os.fspath(folder), torch_dtype=torch.float32, local_files_only=True)
        check_complete(autoencoder, folder)
    if not all(bool(torch.isfinite(weight).all()) for weight in autoencoder.parameters()):
        raise ConfigError(f"{file_name(folder)}: the autoencoder's weights are not finite (NaN or infinity)")
    try:
        FirstStage(autoencoder)
    except ValueError as error:
        raise ConfigError(f"{config.name}: {error}") from None
    return autoencoder.eval().requires_grad_(False)
