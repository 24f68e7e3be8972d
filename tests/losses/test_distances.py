"""Distances against torch's own losses, limits and the scheme of their shapes."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from diffusers_ddpm_ext.losses.distances import get_distance, huber, l1, l2


def pair(*shape: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(shape, generator=generator), torch.randn(shape, generator=generator)


@pytest.mark.parametrize("shape", [(3,), (3, 5), (3, 3, 3), (3, 2, 4, 5), (3, 1, 2, 3, 4)])
@pytest.mark.parametrize(("distance", "reference"), [(l1, F.l1_loss), (l2, F.mse_loss)])
def test_mean_per_sample_for_any_rank(distance, reference, shape):
    prediction, target = pair(*shape)
    one_by_one = torch.stack([reference(p, t) for p, t in zip(prediction, target, strict=True)])
    torch.testing.assert_close(distance(prediction, target), one_by_one)


def test_huber_is_the_published_formula():
    prediction, target = pair(4, 3, 8, 8)
    prediction, target, c = prediction.double(), target.double(), 0.3
    formula = (2 * c * (((prediction - target) ** 2 + c**2).sqrt() - c)).mean((1, 2, 3))
    torch.testing.assert_close(huber(prediction, target, c), formula, rtol=1e-12, atol=0)


def test_huber_goes_to_l2_and_to_scaled_l1():
    """At c = 1e4 the textbook form loses all digits in float32; the limit must still be the square."""
    prediction, target = pair(4, 3, 8, 8)
    torch.testing.assert_close(huber(prediction, target, 1e4), l2(prediction, target), rtol=1e-6, atol=0)
    torch.testing.assert_close(huber(prediction, target, 1e-6) / 2e-6, l1(prediction, target), rtol=1e-4, atol=0)


def test_huber_has_a_gradient_at_zero():
    prediction = torch.zeros(2, 3, requires_grad=True)
    huber(prediction, torch.zeros(2, 3), 0.1).sum().backward()
    assert (prediction.grad == 0).all()


def test_names_and_callables():
    prediction, target = pair(4, 3, 2, 2)
    assert get_distance("l1") is l1
    assert get_distance("l2") is l2
    torch.testing.assert_close(get_distance("huber", 0.5)(prediction, target), huber(prediction, target, 0.5))
    assert get_distance(huber) is huber


@pytest.mark.parametrize("name", ["perceptual", "hybrid"])
def test_the_error_lists_the_names_of_the_caller(name):
    """These losses are the objective's; a distance alone they are not."""
    with pytest.raises(ValueError, match=f"{name}' is unknown: choose one of l2, l1, huber, or"):
        get_distance(name)
    with pytest.raises(ValueError, match="choose one of l2, other, or"):
        get_distance(name, names=("l2", "other"))


@pytest.mark.parametrize("name", ["l3", "", None, 2])
def test_unknown_names_are_refused(name):
    with pytest.raises(ValueError, match=r"loss_type.*l2, l1, huber"):
        get_distance(name)


@pytest.mark.parametrize("c", [0, -1.0, float("nan"), float("inf"), "0.1", True])
def test_huber_c_out_of_range(c):
    with pytest.raises(ValueError, match="huber_c"):
        get_distance("huber", c)
