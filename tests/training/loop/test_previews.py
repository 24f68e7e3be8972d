"""Preview images: the right rows, the same noise for any batch size, and no effect on the training."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from diffusers import UNet2DModel
from PIL import Image

from diffusers_ddpm_ext.plotting.row_timesteps import column_interval, diffusion_timesteps
from diffusers_ddpm_ext.plotting.sheets import GAP
from diffusers_ddpm_ext.schedulers.scheduling_ddpm_ext import DDPMExtScheduler
from diffusers_ddpm_ext.training.data.image_set import ImageSet
from diffusers_ddpm_ext.training.data.image_store import PackedImages
from diffusers_ddpm_ext.training.loop.previews import Preview, diffusion_rows

SIZE = (8, 4)


def denoiser(channels: int = 1, dropout: float = 0.0) -> UNet2DModel:
    torch.manual_seed(0)
    return UNet2DModel(
        sample_size=SIZE,
        in_channels=channels,
        out_channels=channels,
        block_out_channels=(8, 8),
        down_block_types=("DownBlock2D",) * 2,
        up_block_types=("UpBlock2D",) * 2,
        layers_per_block=1,
        norm_num_groups=4,
        dropout=dropout,
        add_attention=False,
    )


def images(n: int, channels: int = 1) -> ImageSet:
    levels = torch.arange(n).view(n, 1, 1, 1).expand(n, channels, *SIZE) * (255 // n)
    return ImageSet(PackedImages(list(levels.to(torch.uint8))), torch.arange(n), SIZE)


def tiles(path) -> np.ndarray:
    """A sheet cut back into its images, (rows, columns, H, W, ...), one value per pixel."""
    with Image.open(path) as image:
        sheet = np.asarray(image)
    height, width = 12 * SIZE[0], 12 * SIZE[1]
    rows, columns = (sheet.shape[0] + GAP) // (height + GAP), (sheet.shape[1] + GAP) // (width + GAP)
    return np.array(
        [
            [sheet[r * (height + GAP) :, c * (width + GAP) :][:height:12, :width:12] for c in range(columns)]
            for r in range(rows)
        ]
    )


@pytest.mark.parametrize(("steps", "columns"), [(1, 1), (2, 2), (10, 10), (11, 6), (50, 11), (250, 11), (1000, 11)])
def test_rows_have_about_ten_columns(steps, columns):
    """CompVis' rule: every t that ``log_every_t`` divides, and the last one."""
    columns_drawn = [t for t in range(steps) if t % column_interval(steps) == 0 or t == steps - 1]
    assert len(columns_drawn) == columns
    assert diffusion_timesteps(steps) == columns_drawn


def test_diffusion_rows_are_the_forward_process():
    """At each logged t the mean over many images is sqrt(abar) x0 and the variance 1 - abar (5 sigma)."""
    scheduler = DDPMExtScheduler(num_train_timesteps=100)
    x0 = torch.full((500, 1, *SIZE), 0.5)
    rows = diffusion_rows(x0, scheduler, seed=0, log_every_t=40)
    abar = np.cumprod(1 - np.linspace(1e-4, 0.02, 100))
    assert rows.shape == (500, 4, 1, *SIZE)
    for column, t in enumerate([0, 40, 80, 99]):
        values = rows[:, column]
        sigma = (1 - abar[t]) ** 0.5
        assert values.mean().item() == pytest.approx(abar[t] ** 0.5 * 0.5, abs=5 * sigma / values.numel() ** 0.5)
        assert values.std().item() == pytest.approx(sigma, rel=0.04)
    assert not torch.allclose(rows[:, 2] - rows[:, 2].mean(), rows[:, 3] - rows[:, 3].mean(), atol=0.1)


def test_data_images(tmp_path):
    scheduler = DDPMExtScheduler(num_train_timesteps=100)
    data = images(20)
    inputs, row = Preview(tmp_path / "samples", seed=0).draw_data(data, scheduler)
    assert [inputs.name, row.name] == ["inputs.png", "diffusion_row.png"]
    drawn = tiles(inputs)
    assert drawn.shape[:2] == (1, 8)
    assert drawn[0, :, 0, 0].tolist() == [12 * index for index in (0, 2, 5, 8, 10, 13, 16, 19)]
    assert tiles(row).shape[:2] == (4, 11)
    assert tiles(Preview(tmp_path, seed=0).draw_data(images(2), scheduler)[1]).shape[:2] == (2, 11)


def test_sample_images(tmp_path):
    scheduler = DDPMExtScheduler(num_train_timesteps=100)
    preview = Preview(tmp_path / "samples", seed=0, num_images=6, num_inference_steps=20, batch_size=4)
    samples, row = preview.draw_samples(denoiser(), scheduler, 30)
    assert sorted(path.name for path in (tmp_path / "samples").iterdir()) == ["denoise_row-30.png", "samples-30.png"]
    assert tiles(row).shape[:2] == (4, 12)  # x_T, then steps 19, 18, 16, ... and 0
    last = tiles(row)[:, -1]
    sheet = tiles(samples)
    assert (sheet.reshape(-1, *SIZE)[:4] == last).all()


def test_an_image_does_not_depend_on_the_batch_size():
    """Image i has its own generator; only the rounding of the network may differ."""
    net, scheduler = denoiser(), DDPMExtScheduler(num_train_timesteps=20)
    few, _ = Preview("x", 0, num_images=3, batch_size=3).sample(net, scheduler)
    many, rows = Preview("x", 0, num_images=7, batch_size=2).sample(net, scheduler)
    torch.testing.assert_close(many[:3], few, atol=1e-5, rtol=0)
    assert rows.shape == (2, 12, 1, *SIZE)
    torch.testing.assert_close(rows[:, -1], few[:2], atol=1e-5, rtol=0)
    assert rows[:, 0].std().item() == pytest.approx(1, abs=0.3)
    other, _ = Preview("x", 1, num_images=3).sample(net, scheduler)
    assert not torch.allclose(other, few, atol=0.1)


def test_previews_change_nothing_of_the_training(tmp_path):
    """Mode, gradients, timesteps and the global generator stay as they are; previews have no dropout."""
    net, scheduler = denoiser(dropout=0.5).train(), DDPMExtScheduler(num_train_timesteps=20)
    state, timesteps = torch.get_rng_state(), scheduler.timesteps.clone()
    preview = Preview(tmp_path, 0, num_images=2, num_inference_steps=5)
    preview.draw_samples(net, scheduler, 1)
    preview.draw_data(images(3), scheduler)
    assert net.training
    assert all(parameter.grad is None for parameter in net.parameters())
    assert torch.equal(scheduler.timesteps, timesteps)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(preview.sample(net, scheduler)[0], preview.sample(net.eval(), scheduler)[0])
    assert not net.training


def test_more_inference_steps_than_the_chain_has_use_all(tmp_path):
    net, scheduler = denoiser(3), DDPMExtScheduler(num_train_timesteps=10)
    all_steps, rows = Preview(tmp_path, 0, num_images=1).sample(net, scheduler)
    assert rows.shape == (1, 11, 3, *SIZE)
    assert torch.equal(
        Preview(tmp_path, 0, num_images=1, num_inference_steps=1000).sample(net, scheduler)[0], all_steps
    )
