"""Pictures of the gallery: samples of the seeds 0 to 63 in order, and the same seeds with few calls of the network."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import diffusers
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from diffusers_ddpm_ext import DDPMExtPipeline
from diffusers_ddpm_ext.pipelines.acceleration import accelerate_network
from diffusers_ddpm_ext.plotting.sheets import image_grid
from diffusers_ddpm_ext.utils.random_keys import generator
from gallery.entries import OWN_SAMPLER

GRID, COLUMNS, PER_ROW = 64, 16, 8
CALLS = (5, 10, 25, 50)
SAMPLERS = {OWN_SAMPLER: "DDPM, ancestral", "DDIMScheduler": "DDIM", "DPMSolverMultistepScheduler": "DPM-Solver++"}
FRAME_MS, LAST_FRAME_MS = 120, 2500
MAX_BYTES, MAX_FRAMES = 400_000, 26
QUALITIES = (80, 60, 40, 20)  # of an animation, as WebP counts
MARGIN = 20  # pixels above a row, for its caption, and between parts of a sheet


def open_model(folder: Path) -> DDPMExtPipeline:
    """A trained pipeline, prepared as `ddpm-ext sample` does."""
    pipeline = DDPMExtPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    accelerate_network(pipeline, None, compiled=False)
    return pipeline


def draw(
    pipeline: DDPMExtPipeline,
    sampler: str,
    calls: int,
    count: int,
    guidance: float,
    every: Callable[[Tensor], None] | None = None,
) -> Tensor:
    """Samples (count, C, H, W) in [-1, 1]; sample i has the noise of `ddpm-ext sample --seed 0` and the next class.

    Args:
        pipeline: a trained one.
        sampler: class of its scheduler.
        calls: of the network.
        count: of samples.
        guidance: classifier-free guidance scale; for a model of classes.
        every: is given the noise and what each call leaves, as images; for at most 32 samples.
    """
    original = pipeline.scheduler
    if sampler != OWN_SAMPLER:
        pipeline.scheduler = getattr(diffusers, sampler).from_config(original.config, timestep_spacing="trailing")
    null_class = pipeline.config.get("null_class_label")
    classes = [label for label in range(pipeline.unet.config.get("num_class_embeds") or 0) if label != null_class]
    parts = []
    for start in range(0, count, 32):
        rows = range(start, min(start + 32, count))
        chosen = [classes[row % len(classes)] for row in rows] if classes else None
        labels = {} if chosen is None else {"class_labels": chosen, "guidance_scale": guidance}
        output = pipeline(
            len(rows),
            [generator("sample", 0, row) for row in rows],
            num_inference_steps=calls,
            output_type="pt",
            log_every_t=None if every is None else 1,
            **labels,
        )
        for left in output.intermediates or () if every is not None else ():
            every(left if pipeline.vae is None else pipeline.decode_latents(left))
        parts.append(output.images.float() * 2 - 1)
    pipeline.scheduler = original
    return torch.cat(parts)


def save_small(sheet: Image.Image, path: Path) -> None:
    """Write a sheet with all its colors, or with 256 of them if the file would be larger than `MAX_BYTES`."""
    sheet.save(path, optimize=True)
    if path.stat().st_size > MAX_BYTES:
        sheet.quantize(256, dither=Image.Dither.NONE).save(path, optimize=True)


def calls_sheet(rows: Sequence[tuple[str, Tensor]], enlarge: int) -> Image.Image:
    """Rows of images, each below its caption."""
    grids = [image_grid(images, columns=PER_ROW, enlarge=enlarge).convert("RGB") for _, images in rows]
    width, height = grids[0].size
    sheet = Image.new("RGB", (width, len(grids) * (height + MARGIN)), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(12)
    for number, ((caption, _), grid) in enumerate(zip(rows, grids, strict=True)):
        top = number * (height + MARGIN)
        pen.text((2, top + 3), caption, fill="black", font=font)
        sheet.paste(grid, (0, top + MARGIN))
    return sheet


def side_by_side(sheet: Image.Image, parts: int, between: int) -> Image.Image:
    """A tall sheet of equal rows cut into parts of the same height, from left to right; as it is where they differ.

    Args:
        sheet: of RGB.
        parts: into which it is cut.
        between: white pixels between two rows, which the last one lacks.
    """
    height, rest = divmod(sheet.height + between, parts)
    if rest:
        return sheet
    wide = Image.new("RGB", (parts * (sheet.width + MARGIN) - MARGIN, height), "white")
    for part in range(parts):
        rows = sheet.crop((0, part * height, sheet.width, min((part + 1) * height, sheet.height)))
        wide.paste(rows, (part * (sheet.width + MARGIN), 0))
    return wide


def save_animation(frames: Sequence[Tensor], path: Path, enlarge: int) -> None:
    """Write frames (N, C, H, W) in about [-1, 1], each a row of images, as an animation that holds its last one.

    Of more than `MAX_FRAMES` so many are shown, evenly spaced, first and last among them. Its quality is the best of
    `QUALITIES` with which the file is not larger than `MAX_BYTES`, or else the last one.
    """
    if len(frames) > MAX_FRAMES:
        frames = [frames[round(index * (len(frames) - 1) / (MAX_FRAMES - 1))] for index in range(MAX_FRAMES)]
    rows = [image_grid(frame.clamp(-1, 1), columns=len(frame), enlarge=enlarge).convert("RGB") for frame in frames]
    times = [FRAME_MS] * (len(rows) - 1) + [LAST_FRAME_MS]
    for quality in QUALITIES:
        rows[0].save(path, save_all=True, append_images=rows[1:], duration=times, loop=0, quality=quality, method=6)
        if path.stat().st_size <= MAX_BYTES:
            break


def save_sheets(folder: Path, out: Path, sampler: str, calls: int, guidance: float, enlarge: int) -> None:
    """Write the pictures of a model into ``out``.

    ``samples.png`` has 64 samples, ``calls.png`` three samplers with 5 to 50 calls, and ``denoising.webp`` shows the
    first eight samples while they are drawn.
    """
    pipeline = open_model(folder)
    frames: list[Tensor] = []
    draw(pipeline, sampler, calls, PER_ROW, guidance, frames.append)
    save_animation(frames, out / "denoising.webp", enlarge)
    save_small(image_grid(draw(pipeline, sampler, calls, GRID, guidance), COLUMNS, enlarge), out / "samples.png")
    rows = [
        (f"{title}, {count} calls", draw(pipeline, name, count, PER_ROW, guidance))
        for name, title in SAMPLERS.items()
        for count in CALLS
    ]
    save_small(calls_sheet(rows, enlarge), out / "calls.png")
