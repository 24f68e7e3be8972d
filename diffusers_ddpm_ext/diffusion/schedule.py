"""Noise schedules: betas by name, and the tables derived from them.

Symbols, with t counted from 0 to T-1:

    b     betas              variance that step t adds
    a     1 - b
    A     alphas_cumprod     product of a over steps 0..t ("alpha bar" in [DDPM])
    P     A of the previous step, 1 at the first
    SNR   A / (1 - A)
    v     v_posterior        0: variance of the exact posterior, 1: variance of the forward step

All tables are float64 and computed once. A float32 table is one cast at the end, never float32 arithmetic, because
 ``1 - A / P`` cancels: float32 tables are wrong by up to 5e-4 at T = 1000.

Sources: [DDPM] Ho et al. 2020, eqs. 2-7; [iDDPM] Nichol & Dhariwal 2021, eq. 17; [ZTSNR] Lin et al. 2023, algorithm 1.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from diffusers_ddpm_ext.utils.checks import (
    check_one_of,
    checked_flag,
    checked_integer,
    checked_number,
    describe,
    is_number,
)
from diffusers_ddpm_ext.utils.vocabulary import BETA_SCHEDULES, PREDICTION_TYPES, BetaSchedule, PredictionType

Table = npt.NDArray[np.float64]

TABLE_NAMES = (
    "betas",
    "alphas_cumprod",
    "alphas_cumprod_prev",
    "sqrt_alphas_cumprod",
    "sqrt_one_minus_alphas_cumprod",
    "log_one_minus_alphas_cumprod",
    "sqrt_recip_alphas_cumprod",
    "sqrt_recipm1_alphas_cumprod",
    "posterior_variance",
    "posterior_log_variance_clipped",
    "posterior_mean_coef1",
    "posterior_mean_coef2",
    "lvlb_weights",
)
MAX_TRAIN_TIMESTEPS = 100_000  # published models have 4,000 at most; the tables of a chain take about 1 kB per step
MAX_BETA = 0.999
MIN_BETA = 1e-12  # of smaller ones float64 cannot hold 1 - beta, and the first step's noise 1 - A would be 0
LARGEST_LOG_SNR = 20.0  # clamp of the log-SNR, which is minus infinity at zero terminal SNR
MIN_VARIANCE = 1e-20  # floor of a variance whose logarithm is taken


def _betas_from_alpha_bar(alpha_bar: Callable[[float], float], num_train_timesteps: int) -> Table:
    values = np.array([alpha_bar(i / num_train_timesteps) for i in range(num_train_timesteps + 1)])
    return np.minimum(1 - values[1:] / values[:-1], MAX_BETA)


def _laplace_alpha_bar(u: float) -> float:
    log_snr = -0.5 * math.copysign(1, 0.5 - u) * math.log(1 - 2 * abs(0.5 - u) + 1e-6)
    snr = math.exp(log_snr)
    return math.sqrt(snr / (1 + snr))


def make_betas(
    beta_schedule: BetaSchedule,
    num_train_timesteps: int,
    beta_start: float = 1e-4,
    beta_end: float = 0.02,
    cosine_s: float = 0.008,
) -> Table:
    """Betas of a schedule by its name in Diffusers.

    Args:
        beta_schedule: ``linear``; ``scaled_linear`` (linear in the square root of beta); ``squaredcos_cap_v2``
            (cosine, [iDDPM] eq. 17, capped at 0.999); ``sigmoid``; ``laplace``; ``sqrt`` (square root of ``linear``).
        num_train_timesteps: T.
        beta_start: first beta, in (0, 1); not used by the cosine and ``laplace``.
        beta_end: last beta, in (0, 1); not used by the same two.
        cosine_s: offset of the cosine near t = 0, above 0.

    Returns:
        float64 betas, (T,).

    Raises:
        ValueError: the name is unknown, or an argument is out of its range.
    """
    check_one_of("beta_schedule", beta_schedule, BETA_SCHEDULES, ", or pass the betas themselves as trained_betas")
    _check_num_train_timesteps(num_train_timesteps)
    if beta_schedule == "laplace":
        return _betas_from_alpha_bar(_laplace_alpha_bar, num_train_timesteps)
    if beta_schedule == "squaredcos_cap_v2":
        checked_number(
            "cosine_s", cosine_s, "a finite number above 0; the usual value is 0.008", lambda s: 0 < s < math.inf
        )
        return _betas_from_alpha_bar(
            lambda u: math.cos((u + cosine_s) / (1 + cosine_s) * math.pi / 2) ** 2, num_train_timesteps
        )
    for name, value in (("beta_start", beta_start), ("beta_end", beta_end)):
        checked_number(
            name, value, "strictly between 0 and 1; usual values are 0.0001 to 0.02", lambda beta: 0 < beta < 1
        )
    if beta_schedule == "linear":
        return np.linspace(beta_start, beta_end, num_train_timesteps)
    if beta_schedule == "scaled_linear":
        return np.linspace(beta_start**0.5, beta_end**0.5, num_train_timesteps) ** 2
    if beta_schedule == "sqrt":
        return np.linspace(beta_start, beta_end, num_train_timesteps) ** 0.5
    logits = np.linspace(-6, 6, num_train_timesteps)
    return 1 / (1 + np.exp(-logits)) * (beta_end - beta_start) + beta_start


def rescale_zero_terminal_snr(betas: Table) -> Table:
    """Betas shifted and scaled so that no signal is left after the last step ([ZTSNR] algorithm 1).

    Takes and returns float64 betas, (T,); the first is unchanged, the last becomes 1. ValueError if T is 1.
    """
    if len(betas) < 2:
        raise ValueError("rescale_betas_zero_snr=True needs num_train_timesteps >= 2, got 1.")
    root = np.sqrt(np.cumprod(1 - betas))
    root = (root - root[-1]) * (root[0] / (root[0] - root[-1]))
    abar = root**2
    return 1 - abar / np.append(1.0, abar[:-1])


def _check_num_train_timesteps(num_train_timesteps: Any) -> None:
    name = "num_train_timesteps"
    checked_integer(name, num_train_timesteps, "an integer of at least 1; the usual value is 1000", low=1, high=2**63)
    limit = MAX_TRAIN_TIMESTEPS
    checked_integer(name, num_train_timesteps, f"at most {limit}; the usual value is 1000", high=limit)


def as_table(name: str, values: Any) -> Table:
    """One number per step (list, array or tensor) as float64, (T,), exact also from float32; else ValueError."""
    shape = getattr(values, "shape", None)
    if isinstance(values, (list, tuple)):
        shape = (len(values),)
    if not isinstance(shape, tuple) or len(shape) != 1:
        raise ValueError(f"{name}={describe(values)} must be a list of numbers.")
    if shape[0] > MAX_TRAIN_TIMESTEPS:
        raise ValueError(f"{name} has {shape[0]} entries; {MAX_TRAIN_TIMESTEPS} is the limit.")
    try:
        table = np.array(values.tolist() if hasattr(values, "tolist") else values, dtype=np.float64)
    except (TypeError, ValueError, OverflowError) as error:
        raise ValueError(f"{name} must be a list of numbers.") from error
    if table.ndim != 1 or len(table) == 0:
        raise ValueError(f"{name} must be a list of numbers, at least one, got shape {table.shape}.")
    return table


def _checked_betas(betas: Any, name: str = "trained_betas") -> Table:
    table = as_table(name, betas)
    bad = ~((table >= MIN_BETA) & (table < 1))
    bad[-1] &= table[-1] != 1  # zero terminal SNR
    if bad.any():
        t = int(np.argmax(bad))
        raise ValueError(
            f"{name}: beta {table[t]} of step {t} must be between {MIN_BETA:g} and 1 (the last may be 1, for zero "
            "terminal SNR)."
        )
    return table


def checked_v_posterior(v_posterior: Any, num_train_timesteps: int, name: str = "v_posterior") -> float | Table:
    """Check an interpolation weight of the reverse variance, one for all steps or one per step.

    Args:
        v_posterior: a number in [0, 1], or a list, array or tensor of one per step.
        num_train_timesteps: T.
        name: name of the option, for the ValueError.

    Returns:
        A float, or a read-only float64 table (T,).
    """
    scalar = getattr(v_posterior, "shape", None) == () or not hasattr(v_posterior, "__len__")
    if scalar:
        number = v_posterior.item() if hasattr(v_posterior, "item") else v_posterior
        values = np.array(float(number) if is_number(number) else math.nan)
        invalid = not is_number(number)
    else:
        values = as_table(name, v_posterior) if not isinstance(v_posterior, (str, bytes)) else np.zeros(0)
        invalid = len(values) != num_train_timesteps
    if invalid:
        text = f"of shape {values.shape}" if not scalar and len(values) else describe(v_posterior)
        raise ValueError(
            f"{name}={text} must be a number in [0, 1], or one for each of the {num_train_timesteps} training steps."
        )
    bad = ~((values >= 0) & (values <= 1))
    if bad.any():
        where = f" at step {int(np.argmax(bad))}" if values.ndim else ""
        raise ValueError(
            f"{name}={float(values.flat[np.argmax(bad)])!r}{where} must be in [0, 1]: 0 is the posterior's variance, "
            "1 the forward beta."
        )
    if values.ndim == 0:
        return float(values)
    values.flags.writeable = False
    return values


def check_prediction_type(prediction_type: str) -> None:
    """Raise ValueError unless the prediction type is known."""
    check_one_of("prediction_type", prediction_type, PREDICTION_TYPES, " (CompVis' eps, x0 and v)")


class NoiseSchedule:
    """Tables of a discrete diffusion process, under the names of CompVis' ``register_schedule``.

    Args:
        num_train_timesteps: T, the number of steps.
        beta_start: first beta.
        beta_end: last beta.
        beta_schedule: a name of ``BETA_SCHEDULES``, with Diffusers' meaning.
        trained_betas: the betas themselves, (T,); the arguments above are then not used.
        cosine_s: offset of ``squaredcos_cap_v2``.
        rescale_betas_zero_snr: whether the betas are rescaled to zero terminal SNR.
        v_posterior: reverse variance ``(1 - v) * posterior + v * beta``, v in [0, 1]; one number, or (T,).
        prediction_type: what the network predicts; ``lvlb_weights`` depends on it.
        v_decoder: (T,), one per step: the v that replaces ``v_posterior`` at a step if it is the first of the chain,
            that is, the variance of the decoder. Only a likelihood uses it.

    Attributes:
        num_train_timesteps: number of steps of this chain; also ``len(schedule)``.
        timesteps: int64, (K,), ascending: steps of the full chain in this one (all of them, unless `respaced`).
        zero_terminal_snr: whether no signal is left after the last step.
        alphas: ``1 - betas``.
        snr: ``A / (1 - A)``, the signal-to-noise ratio of variances.
        betas, alphas_cumprod, ..., lvlb_weights: the tables of ``TABLE_NAMES``, float64, (K,), read-only.
            ``lvlb_weights`` follows the published code, in its float32 operation order, so that it reproduces its
            values; exact weights of the bound are in `diffusers_ddpm_ext.diffusion.weighting`.

    Raises:
        ValueError: an argument is out of its range; the message names it and what is allowed.
    """

    betas: Table
    alphas_cumprod: Table
    alphas_cumprod_prev: Table
    sqrt_alphas_cumprod: Table
    sqrt_one_minus_alphas_cumprod: Table
    log_one_minus_alphas_cumprod: Table
    sqrt_recip_alphas_cumprod: Table
    sqrt_recipm1_alphas_cumprod: Table
    posterior_variance: Table
    posterior_log_variance_clipped: Table
    posterior_mean_coef1: Table
    posterior_mean_coef2: Table
    lvlb_weights: Table
    alphas: Table
    snr: Table

    def __init__(
        self,
        num_train_timesteps: int = 1000,
        beta_start: float = 1e-4,
        beta_end: float = 0.02,
        beta_schedule: BetaSchedule = "linear",
        trained_betas: Sequence[float] | npt.NDArray[Any] | None = None,
        *,
        cosine_s: float = 0.008,
        rescale_betas_zero_snr: bool = False,
        v_posterior: float | Sequence[float] | npt.NDArray[Any] = 0.0,
        prediction_type: PredictionType = "epsilon",
        v_decoder: Sequence[float] | npt.NDArray[Any] | None = None,
    ) -> None:
        name = "beta_schedule" if trained_betas is None else "trained_betas"
        if trained_betas is None:
            trained_betas = make_betas(beta_schedule, num_train_timesteps, beta_start, beta_end, cosine_s)
        betas = _checked_betas(trained_betas, name)
        if checked_flag("rescale_betas_zero_snr", rescale_betas_zero_snr):
            betas = _checked_betas(rescale_zero_terminal_snr(betas))
        abar = np.cumprod(1 - betas, dtype=np.float64)
        vanished = (abar < np.finfo(np.float64).tiny) & (betas != 1)
        if vanished.any():
            raise ValueError(
                f"num_train_timesteps={len(betas)} with these betas leaves no signal that float64 can hold after step "
                f"{int(np.argmax(vanished))} (alphas_cumprod is 0): use smaller betas, or fewer steps."
            )
        self._fill(betas, abar, np.arange(len(betas)), v_posterior, prediction_type, v_decoder)

    def _fill(
        self,
        betas: Table,
        abar: Table,
        timesteps: npt.NDArray[np.int64],
        v: Any,
        prediction_type: PredictionType,
        first: Any,
    ) -> None:
        check_prediction_type(prediction_type)
        self.num_train_timesteps = len(betas)
        self.v_posterior = checked_v_posterior(v, len(betas))
        self.v_decoder: Table | None = None
        v = np.broadcast_to(self.v_posterior, len(betas))
        if first is not None:
            table = checked_v_posterior(first, len(betas), "v_decoder")
            if isinstance(table, float):
                raise ValueError(f"v_decoder={table!r} must be one number for each of the {len(betas)} steps.")
            self.v_decoder = table
            v = np.append(table[:1], v[1:])
        self.prediction_type = prediction_type
        self.zero_terminal_snr = bool(abar[-1] == 0)
        self.timesteps = timesteps
        with np.errstate(divide="ignore"):  # zero terminal SNR: 1 / A is correctly inf
            tables = _tables(betas, abar, v)
            tables["lvlb_weights"] = _lvlb_weights(tables, prediction_type)
            tables["alphas"] = 1 - betas
            tables["snr"] = abar / (1 - abar)
        for name, table in tables.items():
            setattr(self, name, table)
            table.flags.writeable = False
        timesteps.flags.writeable = False

    def __len__(self) -> int:
        return self.num_train_timesteps

    def __repr__(self) -> str:
        v = self.v_posterior
        text = f"{v:g}" if isinstance(v, float) else f"{v.min():.3g} to {v.max():.3g}"
        return (
            f"NoiseSchedule({self.num_train_timesteps} steps, betas {self.betas[0]:.3g} to {self.betas[-1]:.3g}, "
            f"v_posterior={text}, prediction_type={self.prediction_type!r})"
        )

    def _derived(self, v: Any, prediction_type: PredictionType, first: Any, steps: Any = None) -> NoiseSchedule:
        """This chain, or its ascending ``steps`` only, with other settings."""
        schedule = object.__new__(type(self))
        betas, abar, timesteps = self.betas, self.alphas_cumprod, self.timesteps
        if steps is not None and len(steps) < len(self):
            abar, timesteps = abar[steps], timesteps[steps]
            betas = 1 - abar / np.append(1.0, abar[:-1])
        schedule._fill(betas.copy(), abar.copy(), timesteps.copy(), v, prediction_type, first)
        return schedule

    def respaced(self, timesteps: Sequence[int] | npt.NDArray[Any]) -> NoiseSchedule:
        """The chain of some of the steps ([iDDPM] section 4): same ``alphas_cumprod``, new betas.

        Args:
            timesteps: the steps to keep, in any order: distinct integers in [0, T).

        Returns:
            A schedule of K steps in ascending order, whose ``timesteps`` are the original ones. ``v_posterior`` (of
            the kept steps, if it is one per step) applies to the new chain's variances.

        Raises:
            ValueError: no step, a duplicate, or one outside [0, T).
        """
        steps = np.asarray(timesteps)
        valid = steps.ndim == 1 and len(steps) > 0 and steps.dtype.kind in "iu"
        steps = np.sort(steps)
        if not valid or steps[0] < 0 or steps[-1] >= len(self) or (np.diff(steps) == 0).any():
            raise ValueError(f"timesteps must be distinct integers in [0, {len(self)}), at least one.")
        steps = steps.astype(np.int64)
        v = self.v_posterior if isinstance(self.v_posterior, float) else self.v_posterior[steps]
        first = None if self.v_decoder is None else self.v_decoder[steps]
        return self._derived(v, self.prediction_type, first, steps)

    def with_prediction_type(self, prediction_type: PredictionType) -> NoiseSchedule:
        """The same chain for another prediction type, which only ``lvlb_weights`` depends on."""
        return self._derived(self.v_posterior, prediction_type, self.v_decoder)

    def with_v_posterior(
        self, v_posterior: float | Sequence[float] | Table, v_decoder: Sequence[float] | Table | None = None
    ) -> NoiseSchedule:
        """The same chain with another reverse variance; arguments as in the constructor."""
        return self._derived(v_posterior, self.prediction_type, v_decoder)


def _tables(b: Table, abar: Table, v: Table) -> dict[str, Table]:
    a, prev = 1 - b, np.append(1.0, abar[:-1])
    variance = (1 - v) * b * (1 - prev) / (1 - abar) + v * b
    return {
        "betas": b,
        "alphas_cumprod": abar,
        "alphas_cumprod_prev": prev,
        "sqrt_alphas_cumprod": np.sqrt(abar),
        "sqrt_one_minus_alphas_cumprod": np.sqrt(1 - abar),
        "log_one_minus_alphas_cumprod": np.log(1 - abar),
        "sqrt_recip_alphas_cumprod": np.sqrt(1 / abar),
        "sqrt_recipm1_alphas_cumprod": np.sqrt(1 / abar - 1),
        "posterior_variance": variance,
        "posterior_log_variance_clipped": np.log(np.maximum(variance, MIN_VARIANCE)),
        "posterior_mean_coef1": b * np.sqrt(prev) / (1 - abar),
        "posterior_mean_coef2": (1 - prev) * np.sqrt(a) / (1 - abar),
    }


def _lvlb_weights(tables: dict[str, Table], prediction_type: PredictionType) -> Table:
    """CompVis' weights of the bound, bit-exact: float32 arithmetic in the published order of operations.

    For ``sample`` the denominator is ``2 - A`` (the published ``2. * 1 - A``) and for ``v_prediction`` all are 1;
    neither is the bound's weight. Entry 0 repeats entry 1.
    """
    one, two = np.float32(1), np.float32(2)
    b, variance, abar = (tables[n].astype(np.float32) for n in ("betas", "posterior_variance", "alphas_cumprod"))
    if prediction_type == "epsilon":
        a = (1 - tables["betas"]).astype(np.float32)
        if len(b) == 1:
            variance = np.maximum(variance, b)  # a single step has no second entry to copy
        weights = b * b / (two * variance * a * (one - abar))
    elif prediction_type == "sample":
        weights = np.float32(0.5) * np.sqrt(abar) / (two - abar)
    else:
        weights = np.ones_like(b)
    if len(weights) > 1:
        weights[0] = weights[1]
    return weights.astype(np.float64)


def log_snr(schedule: NoiseSchedule) -> Table:
    """``log(A / (1 - A))`` of every step, (T,); minus infinity at zero terminal SNR."""
    with np.errstate(divide="ignore"):
        return np.log(schedule.alphas_cumprod) - np.log1p(-schedule.alphas_cumprod)
