"""Log-variance per step: LatentDiffusion's table, fixed or learned, or a continuous function of the log-SNR.

Training minimizes ``loss / exp(logvar[t]) + logvar[t]``, whose minimum over logvar is the log of step t's
expected loss: a learned table is an estimate of the network's log loss per step ([LDM] Rombach et al. 2022, code). A
table's entry learns only from its own step; the continuous kind shares information between nearby steps ([EDM2] Karras
et al. 2024, section 2.1 and appendix B.2: random Fourier features of the noise level, and one linear layer initialized
with 0).

File format 1, a folder ``logvar/`` next to a pipeline's components: ``config.json`` with ``format`` and
``num_train_timesteps``, and ``diffusion_pytorch_model.safetensors`` with the key ``logvar``, float32 (T,). For the
continuous kind ``config.json`` has ``"kind": "continuous"``, and there are ``continuous.*`` tensors, while ``logvar``
holds the function's values at the T steps: any reader of the table can read it.
"""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from safetensors.torch import save
from torch import Tensor, nn

from diffusers_ddpm_ext.diffusion.schedule import LARGEST_LOG_SNR
from diffusers_ddpm_ext.errors import ConfigError, printable
from diffusers_ddpm_ext.losses.logvar_files import (
    LOGVAR_CONFIG_NAME,
    LOGVAR_FOLDER,
    LOGVAR_FORMAT,
    LOGVAR_KEY,
    LOGVAR_WEIGHTS_NAME,
    logvar_folder,
    read_logvar,
    read_logvar_config,
)
from diffusers_ddpm_ext.utils.array_files import read_tensors
from diffusers_ddpm_ext.utils.checks import describe
from diffusers_ddpm_ext.utils.input_files import file_name

LogvarKind = Literal["table", "continuous"]
LOGVAR_KINDS: tuple[LogvarKind, ...] = get_args(LogvarKind)
CONTINUOUS = "continuous."
CHANNELS = 128


def make_logvar(num_train_timesteps: int, init: float | Tensor = 0.0) -> Tensor:
    """Make a table, float32, (T,).

    ``init`` is one value for all steps, or a table (T,), which is copied; ValueError if it has another length, or is
    not finite.
    """
    try:
        table = torch.as_tensor(init, dtype=torch.float32).detach()
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise ValueError(f"logvar_init={describe(init)} must be a finite number; the usual value is 0.") from error
    if table.ndim == 0:
        table = table.expand(num_train_timesteps)
    if table.shape != (num_train_timesteps,):
        raise ValueError(
            f"logvar_init must be one number or a table of {num_train_timesteps}, got shape {tuple(table.shape)}."
        )
    if not bool(torch.isfinite(table).all()):
        raise ValueError(f"logvar_init={describe(init)} must be finite; the usual value is 0.")
    return table.clone()


class ContinuousLogvar(nn.Module):
    """Log-variance as a smooth function of the log-SNR: fixed random Fourier features, one linear layer, an offset.

    Called as ``logvar(log_snr)``, natural log, any shape, float32; the same network serves any schedule.

    Args:
        log_snr: of the T steps of `table`, (T,), float64.
        init: initial value everywhere.
        channels: number of features.
        seed: of the features.

    Attributes:
        weights: (channels + 1,), the parameter: the linear layer, and the offset last.
        frequencies, phases: (channels,), fixed; with ``centre`` and ``spread``, of the log-SNR, in the state dict.
    """

    weights: nn.Parameter
    frequencies: Tensor
    phases: Tensor
    centre: Tensor
    spread: Tensor
    log_snr: Tensor

    def __init__(self, log_snr: Tensor, init: float = 0.0, channels: int = CHANNELS, seed: int = 0) -> None:
        super().__init__()
        if not math.isfinite(init):
            raise ValueError(f"logvar_init={describe(init)} must be finite; the usual value is 0.")
        levels = log_snr.detach().double().clamp(-LARGEST_LOG_SNR, LARGEST_LOG_SNR)
        spread = levels.std(correction=0) if len(levels) > 1 else torch.ones(())
        generator = torch.Generator().manual_seed(seed)
        self.register_buffer("frequencies", 2 * math.pi * torch.randn(channels, generator=generator))
        self.register_buffer("phases", 2 * math.pi * torch.rand(channels, generator=generator))
        self.register_buffer("centre", levels.mean().float())
        self.register_buffer("spread", spread.float().clamp(min=1e-6))
        self.register_buffer("log_snr", levels.float(), persistent=False)
        self.weights = nn.Parameter(torch.zeros(channels + 1))
        with torch.no_grad():
            self.weights[-1] = init

    def forward(self, log_snr: Tensor) -> Tensor:
        """See the class."""
        return self._evaluate(log_snr, self.weights)

    def _evaluate(self, log_snr: Tensor, weights: Tensor) -> Tensor:
        level = (log_snr.to(self.centre).clamp(-LARGEST_LOG_SNR, LARGEST_LOG_SNR) - self.centre) / self.spread
        # A quarter of the standard deviation's frequencies: [EDM2] divides its log sigma by 4 likewise.
        features = torch.cos(0.25 * level.unsqueeze(-1) * self.frequencies + self.phases)
        return features @ weights[:-1] * math.sqrt(2 / len(self.frequencies)) + weights[-1]

    def table(self, weights: Tensor | None = None) -> Tensor:
        """Values at the T steps, (T,), part of the graph; optionally with other weights."""
        return self._evaluate(self.log_snr, self.weights if weights is None else weights)


def save_logvar(
    folder: str | os.PathLike[str], table: Tensor, network: ContinuousLogvar | None = None, **meta: Any
) -> Path:
    """Write a table next to a pipeline's components.

    Args:
        folder: the pipeline's folder, in which ``logvar/`` is created.
        table: (T,), floating, any device.
        network: of the continuous kind, from which the table was computed.
        **meta: further entries of ``config.json``, JSON values.

    Returns:
        The folder ``logvar/``.

    Raises:
        ValueError: ``table`` is not a floating tensor of one axis.
    """
    if table.ndim != 1 or not table.is_floating_point():
        raise ValueError(f"logvar must be a floating tensor (T,), got {table.dtype} of shape {tuple(table.shape)}.")
    target = Path(folder) / LOGVAR_FOLDER
    target.mkdir(parents=True, exist_ok=True)
    config = {**meta, "format": LOGVAR_FORMAT, "num_train_timesteps": len(table)}
    tensors = {LOGVAR_KEY: table}
    if network is not None:
        config["kind"] = "continuous"
        tensors |= {CONTINUOUS + name: tensor for name, tensor in network.state_dict().items()}
    values = {name: tensor.detach().to("cpu", torch.float32).contiguous() for name, tensor in tensors.items()}
    (target / LOGVAR_WEIGHTS_NAME).write_bytes(save(values, metadata={"format": "pt"}))
    (target / LOGVAR_CONFIG_NAME).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    return target


def load_logvar(folder: str | os.PathLike[str], num_train_timesteps: int | None = None) -> Tensor | None:
    """Read a table that `save_logvar` wrote. No pickle is opened.

    Args:
        folder: the pipeline's folder, the parent of ``logvar/``.
        num_train_timesteps: T that the table must have; None for that of its ``config.json``.

    Returns:
        float32, (T,), on the CPU; None if the folder exists and has no ``logvar/``.

    Raises:
        ValueError: the folder does not exist, or a file is missing, damaged, of another format or of another length;
            the message names it.
    """
    table = read_logvar(folder, num_train_timesteps)
    return None if table is None else torch.from_numpy(table)


def load_continuous(folder: str | os.PathLike[str], log_snr: Tensor) -> ContinuousLogvar | None:
    """Read the continuous log-variance that `save_logvar` wrote, on the CPU.

    Args:
        folder: of the pipeline.
        log_snr: of the steps of its table, (T,).

    Returns:
        None if the folder has no log-variances, or only a table.

    Raises:
        ValueError: the folder does not exist, or a file is missing or damaged; the message names it.
    """
    source = logvar_folder(folder)
    if source is None:
        return None
    kind = read_logvar_config(source).string("kind", default="table")
    if kind == "table":
        return None
    if kind != "continuous":
        raise ConfigError(
            f"{file_name(source / LOGVAR_CONFIG_NAME)}: kind is {printable(kind, 60)!r}; known are "
            f"{', '.join(LOGVAR_KINDS)}."
        )
    path = source / LOGVAR_WEIGHTS_NAME
    tensors = read_tensors(path)
    state = {name.removeprefix(CONTINUOUS): t for name, t in tensors.items() if name.startswith(CONTINUOUS)}
    try:
        network = ContinuousLogvar(log_snr, channels=len(state["frequencies"]))
        network.load_state_dict(state)
    except (KeyError, RuntimeError, TypeError) as error:
        text = printable(" ".join(str(error).split()), 200)
        raise ConfigError(f"{file_name(path)} does not hold a continuous log-variance: {text}") from None
    for name, tensor in network.state_dict().items():
        if not bool(torch.isfinite(tensor).all()) or (name == "spread" and tensor <= 0):
            raise ConfigError(
                f"{file_name(path)}: {CONTINUOUS}{name} holds values that are not finite, or not positive."
            )
    return network
