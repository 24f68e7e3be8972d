"""Tables as tensors: kept while the table lives, right after every change of device, precision and content."""

from __future__ import annotations

import gc

import numpy as np
import pytest
import torch

from diffusers_ddpm_ext.diffusion import device_tables
from diffusers_ddpm_ext.diffusion.device_tables import table_tensor
from diffusers_ddpm_ext.diffusion.gaussian import at_step, q_sample
from diffusers_ddpm_ext.diffusion.schedule import NoiseSchedule

CPU = torch.device("cpu")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_read_only_table_is_converted_once(dtype, monkeypatch):
    table = NoiseSchedule(7).sqrt_alphas_cumprod
    first = table_tensor(table, CPU, dtype)
    assert first.dtype == dtype
    assert first.tolist() == table.astype(str(dtype).removeprefix("torch.")).tolist()
    monkeypatch.setattr(device_tables, "_converted", None)
    assert table_tensor(table, CPU, dtype) is first


def test_a_table_that_may_change_is_read_at_each_use():
    table = np.arange(3.0)
    assert at_step(table, 2, torch.zeros(1)).item() == 2
    table[2] = 5
    assert at_step(table, 2, torch.zeros(1)).item() == 5


def test_tensors_end_with_their_table_and_never_serve_its_successor():
    """A new table may get the id of one that is gone."""
    schedule = NoiseSchedule(5)
    table_tensor(schedule.betas, CPU, torch.float32)
    number = id(schedule.betas)
    assert any(key[0] == number for key in device_tables._kept)
    del schedule
    gc.collect()
    assert all(key[0] != number for key in device_tables._kept)
    for steps in range(2, 40):
        own = NoiseSchedule(steps).betas
        assert torch.equal(table_tensor(own, CPU, torch.float64), torch.tensor(own))


def test_sampling_in_inference_mode_leaves_tables_that_can_be_trained_with():
    schedule, x = NoiseSchedule(5), torch.ones(2, 3)
    with torch.inference_mode():
        q_sample(schedule, x, x, 1)
    weight = torch.ones(2, 3, requires_grad=True)
    q_sample(schedule, weight, x, 1).sum().backward()
    assert weight.grad is not None


def test_a_traced_step_does_not_leave_its_tensors_behind():
    from torch._subclasses.fake_tensor import FakeTensorMode

    schedule, x, t = NoiseSchedule(5), torch.ones(2, 3), torch.tensor([0, 4])
    with FakeTensorMode(allow_non_fake_inputs=True):
        table_tensor(schedule.betas, CPU, torch.float32)
    assert torch.equal(at_step(schedule.betas, t, x)[:, 0], torch.tensor(schedule.betas[[0, 4]]).float())
