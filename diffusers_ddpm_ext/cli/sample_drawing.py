"""Drawing of the images of `ddpm-ext sample`: batch by batch, each image from its own noise, in several processes."""

from __future__ import annotations

import itertools
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from diffusers_ddpm_ext.cli.sample_conditions import SampleConditions
from diffusers_ddpm_ext.cli.sample_options import SampleOptions
from diffusers_ddpm_ext.cli.sample_output import NUM_FRAMES, VIDEO_SUFFIX
from diffusers_ddpm_ext.utils.random_keys import generator

if TYPE_CHECKING:
    from diffusers_ddpm_ext.cli.sample_files import SampleFormat
    from diffusers_ddpm_ext.cli.sample_output import OneFile, SampleFolder


class Processes(NamedTuple):
    """This process among those that a launcher started."""

    rank: int
    world_size: int
    device: Any
    wait: Callable[[], None]
    leave: Callable[[], None]


class Drawing(NamedTuple):
    """What is drawn.

    Attributes:
        pipeline: the loaded pipeline.
        options: of the command.
        read: the conditions as they were read.
        conditions: arguments of the pipeline's call by name, used in turn over the images.
        calls: of the network for each image.
        batch_size: images per forward pass.
        form: of the values that are drawn.
    """

    pipeline: Any
    options: SampleOptions
    read: SampleConditions
    conditions: Mapping[str, Any]
    calls: int
    batch_size: int
    form: SampleFormat


def draw_missing(drawing: Drawing, output: OneFile | SampleFolder, processes: Processes) -> None:
    """Draw the images that the output does not have yet, this process' share of them. Collective call."""
    from tqdm import tqdm

    num_images, batch_size, calls = drawing.read.num_images, drawing.batch_size, drawing.calls
    is_main = processes.rank == 0
    processes.wait()
    existing = output.existing(num_images)
    if is_main and existing:
        sys.stderr.write(f"{len(existing)} of {num_images} images exist already; resuming\n")
    processes.wait()
    count = num_images - len(existing)
    missing = (index for index in range(num_images) if index not in existing)
    share = itertools.islice(missing, processes.rank, None, processes.world_size)
    num_batches = math.ceil(len(range(processes.rank, count, processes.world_size)) / batch_size)
    hidden = None if is_main else True
    started = False

    def start() -> None:
        """Write the record: only now, since the first batch shows what the network does not accept."""
        nonlocal started
        if not started:
            processes.wait()
            if is_main:
                output.start()
            processes.wait()
        started = True

    with tqdm(total=num_batches * calls, desc="sampling", unit="step", leave=False, disable=hidden) as bar:
        while batch := list(itertools.islice(share, batch_size)):
            # A last batch of another size would be compiled again, which takes longer than drawing an image twice.
            is_filled = drawing.options.compile and count > batch_size
            padding = [batch[-1]] * (batch_size - len(batch)) if is_filled else []
            images, frames = _draw_batch(drawing, batch + padding, bar.update)
            start()
            for position, index in enumerate(batch):
                output.put(index, images[position], None if frames is None else frames[position])
    start()
    processes.wait()
    processes.leave()


def _draw_batch(drawing: Drawing, indices: Sequence[int], on_step: Callable[[], Any]) -> tuple[Any, Any]:
    """Draw images by their indices, (B, height, width, C), float32 in [0, 1] or the data's own values.

    For a video, also its frames, uint8 (B, F, height, width, C), else None.
    """
    options, text = drawing.options, drawing.read.text
    conditions = {name: value[[index % len(value) for index in indices]] for name, value in drawing.conditions.items()}
    is_video = options.output_path.suffix.lower() == VIDEO_SUFFIX
    shown_steps = frame_steps(drawing.calls)
    frames: list[Any] = []

    def on_step_end(pipe: Any, i: int, t: int, tensors: dict[str, Any]) -> dict[str, Any]:
        on_step()
        if is_video and i in shown_steps:
            sample = tensors["model_input"].float()
            pixels = sample if pipe.first_stage is None else pipe.decode_latents(sample)
            frames.append(pixels.cpu().permute(0, 2, 3, 1).numpy() / 2 + 0.5)
        return {}

    images = drawing.pipeline(
        batch_size=len(indices),
        generator=[generator("sample", *text.seed_of(index, options.seed)) for index in indices],
        num_inference_steps=options.num_inference_steps,
        temperature=options.temperature,
        output_type="np" if drawing.form.own is None else "array",
        callback_on_step_end=on_step_end,
        callback_on_step_end_tensor_inputs=["model_input"] if is_video else [],
        guidance_scale=options.guidance_scale,
        guidance_interval=options.guidance_interval,
        eta=options.eta,
        step_kwargs=options.step_args,
        optimal_timesteps=options.optimal_timesteps,
        timesteps=options.timesteps,
        **conditions,
    ).images
    if not is_video:
        return images, None
    last = drawing.form.pictures(images).transpose(0, 2, 3, 1) / 2 + 0.5
    return images, (np.stack([*frames, last], axis=1).clip(0, 1) * 255).round().astype(np.uint8)


def frame_steps(calls: int) -> set[int]:
    """The steps whose inputs are frames of a video."""
    return {round(frame * (calls - 1) / max(NUM_FRAMES - 2, 1)) for frame in range(NUM_FRAMES - 1)}
