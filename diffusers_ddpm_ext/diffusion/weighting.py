"""Loss weights per timestep, in the space of the network's prediction.

Symbols, with t counted from 0 to T-1:

    b, a, A, P   betas, 1 - betas, alphas_cumprod, and alphas_cumprod of the previous step (1 at the first)
    S            posterior_variance, the variance of the model's reverse step
    SNR          A / (1 - A)

By the algebra of `diffusers_ddpm_ext.diffusion.gaussian`, an error of the prediction is an error of x0:

    |x0 error|^2  =  |eps error|^2 / SNR  =  (1 - A) |v error|^2

so a weight in x0 space has an equivalent in each of the others, and all three minimize the same function.

Sources: [DDPM] Ho et al. 2020, eqs. 8 and 12; [VDM] Kingma et al. 2021; [min-SNR] Hang et al. 2023, eq. 8;
[soft min-SNR] Crowson et al. 2024, section 4.2 (HDiT); [P2] Choi et al. 2022, eq. 8; [debiased] Yu et al. 2024.
"""

from __future__ import annotations

import math
from typing import Any, Literal, get_args

import numpy as np

from diffusers_ddpm_ext.diffusion.schedule import NoiseSchedule, Table
from diffusers_ddpm_ext.utils.checks import check_one_of, checked_number

ElboKind = Literal["exact", "compvis"]
LossWeighting = Literal["simple", "min_snr", "soft_min_snr", "p2", "debiased", "elbo", "compvis_elbo"]
ELBO_KINDS: tuple[ElboKind, ...] = get_args(ElboKind)
WEIGHTINGS: tuple[LossWeighting, ...] = get_args(LossWeighting)
DEFAULT_GAMMA = 5.0


def elbo_weights(schedule: NoiseSchedule, kind: ElboKind = "exact") -> Table:
    """Weights of the steps' mean squared errors in the variational bound, up to constants.

    ``exact``: the factor of the squared error in ``KL(q(x_{t-1} | x_t, x0) || p(x_{t-1} | x_t))``, nats for the sum
    over dimensions ([DDPM] eq. 8), where q has the exact posterior's variance and p the schedule's
    ``posterior_variance`` S, for any ``v_posterior``: ``b^2 P / (2 S (1 - A)^2)`` for ``sample``,
    ``b^2 / (2 S a (1 - A))`` for ``epsilon`` and ``b^2 P / (2 S (1 - A))`` for ``v_prediction``. At t = 0 with
    ``v_posterior`` 0, where S is 0 and the weight infinite, S is replaced by ``posterior_variance[1]``
    (by ``betas[0]`` in a chain of one step).

    ``compvis``: the published code's ``lvlb_weights``, for parity runs; for ``sample`` and ``v_prediction`` they are
    not those of the bound.

    Args:
        schedule: tables of T steps, respaced or not; its ``prediction_type`` is the space.
        kind: ``exact`` or ``compvis``.

    Returns:
        float64, (T,). Infinite only at the last step of ``epsilon`` with zero terminal SNR.

    Raises:
        ValueError: ``kind`` is unknown.
    """
    check_one_of("elbo_weights", kind, ELBO_KINDS, ": the bound's coefficients, or the published code's table")
    if kind == "compvis":
        return schedule.lvlb_weights.astype(np.float64)
    b, a, prev = schedule.betas, schedule.alphas, schedule.alphas_cumprod_prev
    noise = 1 - schedule.alphas_cumprod
    variance = schedule.posterior_variance.copy()
    if variance[0] == 0:
        variance[0] = variance[1] if len(variance) > 1 else b[0]
    if schedule.prediction_type == "sample":
        return b**2 * prev / (2 * variance * noise**2)
    if schedule.prediction_type == "v_prediction":
        return b**2 * prev / (2 * variance * noise)
    with np.errstate(divide="ignore"):  # zero terminal SNR: no finite weight exists
        return b**2 / (2 * variance * a * noise)


def loss_weights(
    schedule: NoiseSchedule,
    weighting: LossWeighting,
    *,
    gamma: float = DEFAULT_GAMMA,
    p2_k: float = 1.0,
    p2_gamma: float = 1.0,
) -> Table:
    """Weight of each step's squared error, in the space of the network's prediction.

    All but ``simple`` and ``compvis_elbo`` are a function W(SNR) of the x0 error, mapped to the schedule's
    ``prediction_type``, so that the same function is minimized in all three spaces:

    ================  =============================  ===============================================
    ``simple``        1 in every space               [DDPM] eq. 14; three different functions
    ``min_snr``       ``min(SNR, gamma)``            [min-SNR]; without a cap the eps error has weight 1
    ``soft_min_snr``  ``SNR gamma / (SNR + gamma)``  [soft min-SNR], a smooth min-SNR
    ``p2``            ``SNR / (k + SNR)^gamma``      [P2], with k = ``p2_k`` and gamma = ``p2_gamma``
    ``debiased``      ``sqrt(SNR)``                  [debiased]: 1 / sqrt(SNR) on the eps error
    ``elbo``          the bound's, `elbo_weights`    [DDPM] eq. 12
    ``compvis_elbo``  the published code's table     its own in each space
    ================  =============================  ===============================================

    Args:
        schedule: tables of T steps; its ``prediction_type`` is the space.
        weighting: a name in the table above.
        gamma: of ``min_snr`` and ``soft_min_snr``, above 0.
        p2_k: of ``p2``, above 0.
        p2_gamma: of ``p2``, 0 or more; with 0 the eps error has weight 1.

    Returns:
        float64, (T,). Infinite at the last step of ``epsilon`` with zero terminal SNR under ``debiased`` and ``elbo``.

    Raises:
        ValueError: the name is unknown, or an argument out of its range.
    """
    check_one_of("loss_weighting", weighting, WEIGHTINGS)
    check_gamma(gamma)
    _check_p2(p2_k, p2_gamma)
    if weighting == "simple":
        return np.ones(len(schedule))
    if weighting == "min_snr":
        return min_snr_weights(schedule, gamma)
    if weighting in ("elbo", "compvis_elbo"):
        return elbo_weights(schedule, "exact" if weighting == "elbo" else "compvis")
    signal, noise = schedule.alphas_cumprod, 1 - schedule.alphas_cumprod
    # W / SNR, the weight of the eps error, is finite unless W is much larger than the SNR.
    with np.errstate(divide="ignore"):
        if weighting == "soft_min_snr":
            on_noise = gamma * noise / (signal + gamma * noise)
        elif weighting == "p2":
            on_noise = (noise / (p2_k * noise + signal)) ** p2_gamma
        else:
            on_noise = np.sqrt(noise / signal)
    if schedule.prediction_type == "epsilon":
        return on_noise
    if weighting == "debiased":  # inf * 0 at zero terminal SNR, where the weight is 0
        return np.sqrt(signal / noise) if schedule.prediction_type == "sample" else np.sqrt(signal * noise)
    return on_noise * (signal / noise if schedule.prediction_type == "sample" else signal)


def weight_table(
    schedule: NoiseSchedule, weighting: LossWeighting, gamma: float | None, p2_k: float, p2_gamma: float
) -> tuple[LossWeighting, Table | None]:
    """Name and weights (T,) of a weighting; None for ``simple``, which gamma alone turns into ``min_snr``."""
    if gamma is not None:
        check_gamma(gamma)
        check_one_of("loss_weighting", weighting, WEIGHTINGS)
        if weighting == "simple":
            weighting = "min_snr"
        elif weighting not in ("min_snr", "soft_min_snr"):
            raise ValueError(
                f"snr_gamma={gamma!r} is only used by loss_weighting='min_snr' and 'soft_min_snr', not {weighting!r}."
            )
    used = DEFAULT_GAMMA if gamma is None else gamma
    table = loss_weights(schedule, weighting, gamma=used, p2_k=p2_k, p2_gamma=p2_gamma)
    if not (table < math.inf).all():
        raise ValueError(
            f"loss_weighting={weighting!r} has no finite weight for {schedule.prediction_type!r} at zero terminal "
            "SNR: use prediction_type='v_prediction' or 'sample'."
        )
    return weighting, None if weighting == "simple" else table


def _check_p2(k: Any, gamma: Any) -> None:
    checked_number("p2_k", k, "a finite number, above 0; the usual value is 1", lambda k: 0 < k < math.inf)
    checked_number("p2_gamma", gamma, "a finite number, 0 or more; the usual value is 1", lambda g: 0 <= g < math.inf)


def min_snr_weights(schedule: NoiseSchedule, gamma: float = DEFAULT_GAMMA) -> Table:
    """Weights ``min(SNR, gamma)`` of the x0 error ([min-SNR]), (T,), mapped to the network's prediction.

    ``min(SNR, gamma)`` for ``sample``, ``min(1, gamma / SNR)`` for ``epsilon``, ``min(A, gamma (1 - A))`` for
    ``v_prediction``: the same function is minimized in all three, and all are finite at zero terminal SNR, too. With
    infinite ``gamma`` the eps error has weight 1; ValueError unless ``gamma`` is a number above 0.
    """
    check_gamma(gamma)
    abar, noise = schedule.alphas_cumprod, 1 - schedule.alphas_cumprod
    if schedule.prediction_type == "sample":
        return np.minimum(abar / noise, gamma)
    if schedule.prediction_type == "v_prediction":
        return np.minimum(abar, gamma * noise)
    with np.errstate(divide="ignore"):  # SNR 0 at the last step: gamma / 0 is inf, and 1 is the smaller
        return np.minimum(1.0, gamma * noise / abar)


def check_gamma(gamma: Any) -> None:
    """Raise ValueError unless ``gamma`` is a number above 0."""
    checked_number("snr_gamma", gamma, "above 0; the usual value is 5, and None turns min-SNR off", lambda g: g > 0)
