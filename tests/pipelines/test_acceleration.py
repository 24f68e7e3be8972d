"""How a command runs the network: layouts and precisions, the compiler, images per pass, and reads of the device."""

from __future__ import annotations

import pytest
import torch
from diffusers import DDIMScheduler, UNet2DModel
from helpers.tiny import tiny_unet
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from diffusers_ddpm_ext import DDPMExtPipeline, DDPMExtScheduler
from diffusers_ddpm_ext.models import fast_attention
from diffusers_ddpm_ext.models.fast_attention import has_onednn
from diffusers_ddpm_ext.pipelines import acceleration
from diffusers_ddpm_ext.pipelines.acceleration import accelerate_network, activation_bytes, images_per_pass
from diffusers_ddpm_ext.schedulers.adapter import adapt_scheduler
from diffusers_ddpm_ext.schedulers.custom_timesteps import with_timesteps


def make(dtype=torch.float32, classes=None):
    network = tiny_unet()
    if classes is not None:
        network = UNet2DModel.from_config(network.config, num_class_embeds=classes).eval()
    pipeline = DDPMExtPipeline(network.to(dtype), DDPMExtScheduler(100), null_class_label=classes and 0)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def draw(pipeline, steps=3, **arguments):
    return pipeline(2, torch.Generator().manual_seed(0), steps, "pt", **arguments).images


def is_channels_last(pipeline):
    return pipeline.unet.down_blocks[0].resnets[0].conv1.weight.stride(1) == 1


@pytest.mark.parametrize(
    ("dtype", "memory_format", "expected"),
    [
        (torch.float32, None, has_onednn()),
        (torch.bfloat16, None, True),
        (torch.float32, "channels_last", True),
        (torch.float32, "contiguous", False),
        (torch.bfloat16, "contiguous", False),
    ],
)
def test_the_layout_of_a_rule_or_an_option(dtype, memory_format, expected):
    pipeline = make(dtype)
    before = {name: tensor.clone() for name, tensor in pipeline.unet.state_dict().items()}
    accelerate_network(pipeline, memory_format, compiled=False)
    assert is_channels_last(pipeline) is expected
    after = pipeline.unet.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


def test_a_cpu_without_onednn_keeps_float32_contiguous(monkeypatch):
    monkeypatch.setattr(fast_attention, "has_onednn", lambda: False)
    pipeline = make()
    accelerate_network(pipeline, None, compiled=False)
    assert not is_channels_last(pipeline)


def test_channels_last_changes_images_by_rounding_only():
    contiguous = draw(make())
    pipeline = make()
    accelerate_network(pipeline, "channels_last", compiled=False)
    torch.testing.assert_close(draw(pipeline), contiguous, rtol=0, atol=1e-4)


def test_only_the_network_is_in_half_precision():
    """The scheduler gets float32 samples and outputs; what the network gets and returns is bfloat16."""
    pipeline, seen = make(torch.bfloat16), set()
    pipeline.unet.register_forward_hook(lambda _, inputs, out: seen.update({inputs[0].dtype, out[0].dtype}))

    def on_step(pipe, i, t, tensors):
        assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}
        return {}

    draw(
        pipeline,
        callback_on_step_end=on_step,
        callback_on_step_end_tensor_inputs=list(pipeline._callback_tensor_inputs),
    )
    assert seen == {torch.bfloat16}


class Reads(TorchDispatchMode):
    """Counts the values that are read from tensors on the way to Python."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("kind", ["plain", "temperature", "guided"])
def test_no_step_reads_a_value(kind):
    """Nine steps read as few values as three: those of the checks around the loop."""
    arguments = {"temperature": {"temperature": 0.5}, "guided": {"class_labels": 1, "guidance_scale": 2.0}}
    counts = []
    for steps in (3, 9):
        with Reads() as reads:
            draw(make(classes=4 if kind == "guided" else None), steps, **arguments.get(kind, {}))
        counts.append(reads.count)
    assert counts[0] == counts[1] > 0


def test_a_guidance_interval_is_compared_at_each_step():
    counts = []
    for steps in (3, 9):
        with Reads() as reads:
            draw(make(classes=4), steps, class_labels=1, guidance_scale=2.0, guidance_interval=(0, 50))
        counts.append(reads.count)
    assert counts[1] - counts[0] == 6


def test_steps_of_a_chain_of_its_own_are_not_read():
    """The network's timesteps of a class that gets a chain of the chosen steps alone."""
    chosen = [90, 40, 7, 0]
    scheduler = DDIMScheduler.from_config(make().scheduler.config)
    sampler = with_timesteps(adapt_scheduler(scheduler, make().trained_scheduler), chosen)
    with Reads() as reads:
        times = [sampler.model_timestep(1.0, t) for t in sampler.scheduler.timesteps]
    assert reads.count == 0
    assert [int(time) for time in times] == chosen == sampler.timesteps.tolist()


class LiveBytes(TorchDispatchMode):
    """The most bytes of results that were alive at one time, without views of the weights."""

    def __init__(self, network):
        super().__init__()
        self.live, self.peak = {}, 0
        self.weights = {weight.untyped_storage()._cdata for weight in network.parameters()}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in self.weights:
                    self.live.setdefault(storage._cdata, (StorageWeakRef(storage), storage.nbytes()))
        self.live = {key: entry for key, entry in self.live.items() if not entry[0].expired()}
        self.peak = max(self.peak, sum(size for _, size in self.live.values()))
        return out


@pytest.mark.parametrize("widths", [(16, 32), (32, 32, 64)])
@pytest.mark.parametrize("side", [16, 32])
def test_the_estimated_memory_is_enough(widths, side):
    """At least what a forward pass really keeps at one time, and not over four times as much."""
    network = UNet2DModel(
        sample_size=side,
        block_out_channels=widths,
        norm_num_groups=8,
        down_block_types=("DownBlock2D",) * len(widths),
        up_block_types=("UpBlock2D",) * len(widths),
    ).eval()
    batch = 4
    with torch.no_grad(), LiveBytes(network) as live:
        network(torch.zeros(batch, 3, side, side), 5)
    assert 1 <= batch * activation_bytes(network.config, 4) / live.peak <= 4


@pytest.mark.parametrize(
    ("images_in_memory", "num_images", "guided", "expected"),
    [(0, 9, False, 1), (5, 9, False, 4), (5, 9, True, 2), (1000, 9, False, 9), (1000, 1000, False, 64)],
)
def test_images_per_pass(images_in_memory, num_images, guided, expected, monkeypatch):
    pipeline = make()
    free = images_in_memory * activation_bytes(pipeline.unet.config, 4) / acceleration.USABLE
    monkeypatch.setattr(acceleration, "free_memory_bytes", lambda device: free)
    assert images_per_pass(pipeline, num_images, guided) == expected


@pytest.mark.slow
def test_a_compiled_network_is_not_compiled_again():
    """With an error for whatever would be compiled after the first step."""
    pipeline = make()
    expected = draw(pipeline, 5)
    pipeline.unet.compile(backend="eager")

    def on_step(pipe, i, t, tensors):
        torch._dynamo.config.error_on_recompile = True
        return {}

    try:
        images = draw(pipeline, 5, callback_on_step_end=on_step)
        again = draw(pipeline, 5)
    finally:
        torch._dynamo.config.error_on_recompile = False
        torch._dynamo.reset()
    torch.testing.assert_close(images, expected, rtol=0, atol=1e-5)
    assert torch.equal(images, again)
