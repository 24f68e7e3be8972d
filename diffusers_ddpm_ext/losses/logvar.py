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
from safetensors.torch import load, save
from torch import Tensor, nn

from diffusers_ddpm_ext.diffusion.schedule import LARGEST_LOG_SNR

LOGVAR_FORMAT = 1
LOGVAR_FOLDER = "logvar"
LOGVAR_CONFIG_NAME = "config.json"
LOGVAR_WEIGHTS_NAME = "diffusion_pytorch_model.safetensors"
LOGVAR_KEY = "logvar"
LogvarKind = Literal["table", "continuous"]
LOGVAR_KINDS: tuple[LogvarKind, ...] = get_args(LogvarKind)
CONTINUOUS = "continuous."
CHANNELS = 128


def make_logvar(num_train_timesteps: int, init: float | Tensor = 0.0) -> Tensor:
    """Make a table, float32, (T,).

    ``init`` is one value for all steps, or a table (T,), which is copied; ValueError if it has another length, or is
    not finite.
    """
    table = torch.as_tensor(init, dtype=torch.float32).detach()
    if table.ndim == 0:
        table = table.expand(num_train_timesteps)
    if table.shape != (num_train_timesteps,):
        raise ValueError(
            f"logvar_init must be one number or a table of {num_train_timesteps}, got shape {tuple(table.shape)}."
        )
    if not bool(torch.isfinite(table).all()):
        raise ValueError(f"logvar_init={init!r} must be finite; the usual value is 0.")
    return table.clone()


class ContinuousLogvar(nn.Module):
    """Log-variance as a smooth function of the log-SNR: fixed random Fourier features, one linear layer, an offset.

    Called as ``logvar(log_snr)``, natural log, any shape, float32; the same network serves any schedule.

    Args:
        log_snr: of the T steps of :meth:`table`, (T,), float64.
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
            raise ValueError(f"logvar_init={init!r} must be finite; the usual value is 0.")
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
    """Read a table that :func:`save_logvar` wrote. No pickle is opened.

    Args:
        folder: the pipeline's folder, the parent of ``logvar/``.
        num_train_timesteps: T that the table must have; None for that of its ``config.json``.

    Returns:
        float32, (T,), on the CPU; None if the folder has no ``logvar/``.

    Raises:
        ValueError: a file is missing, damaged, of another format or of another length; the message names the file.
    """
    source = Path(folder) / LOGVAR_FOLDER
    if not source.is_dir():
        return None
    length = _read_length(source / LOGVAR_CONFIG_NAME)
    path = source / LOGVAR_WEIGHTS_NAME
    try:
        tensors = load(path.read_bytes())
    except Exception as error:  # safetensors' error class differs between versions
        raise ValueError(f"{path} cannot be read as a safetensors file: {error}") from error
    table = tensors.get(LOGVAR_KEY)
    if table is None or table.ndim != 1 or not table.is_floating_point():
        raise ValueError(
            f"{path} must hold one floating tensor (T,) under the key {LOGVAR_KEY!r}, got {sorted(tensors)}."
        )
    for owner, expected in ((source / LOGVAR_CONFIG_NAME, length), ("the scheduler", num_train_timesteps)):
        if expected is not None and len(table) != expected:
            raise ValueError(f"{path} holds {len(table)} steps, but {owner} says {expected}.")
    table = table.to(torch.float32)
    if not bool(torch.isfinite(table).all()):
        raise ValueError(f"{path} holds values that are not finite.")
    return table


def load_continuous(folder: str | os.PathLike[str], log_snr: Tensor) -> ContinuousLogvar | None:
    """Read the continuous log-variance that :func:`save_logvar` wrote, on the CPU.

    ``folder`` is that of the pipeline, ``log_snr`` that of the steps of its table, (T,). None if the folder has no
    log-variances, or only a table; a ValueError names a file that is missing or damaged.
    """
    source = Path(folder) / LOGVAR_FOLDER
    if not source.is_dir() or _read_config(source / LOGVAR_CONFIG_NAME).get("kind") != "continuous":
        return None
    path = source / LOGVAR_WEIGHTS_NAME
    try:
        tensors = load(path.read_bytes())
        state = {name.removeprefix(CONTINUOUS): t for name, t in tensors.items() if name.startswith(CONTINUOUS)}
        network = ContinuousLogvar(log_snr, channels=len(state["frequencies"]))
        network.load_state_dict(state)
    except Exception as error:  # safetensors' error class differs between versions
        raise ValueError(f"{path} does not hold a continuous log-variance: {error}") from error
    return network


def _read_config(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(config, dict) or config.get("format") != LOGVAR_FORMAT:
        raise ValueError(f'{path} must have "format": {LOGVAR_FORMAT}; a newer version of this package may read it.')
    return config


def _read_length(path: Path) -> int:
    length = _read_config(path).get("num_train_timesteps")
    if not isinstance(length, int):
        raise ValueError(f"{path} must name num_train_timesteps, the number of steps, got {length!r}.")
    return length
