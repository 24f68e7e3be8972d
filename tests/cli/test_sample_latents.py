"""`ddpm-ext sample` of models of latents: decoded pictures, and pictures of a folder as conditions."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.latent_cases import latent_pipeline, write_pictures
from helpers.tiny import EXACT, tiny_unet
from PIL import Image

from diffusers_ddpm_ext import DDPMExtPipeline, DDPMExtScheduler, cli
from diffusers_ddpm_ext.utils.random_keys import generator

SCALE = 0.7


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("pipelines")
    for kind in ("kl", "vq", "tiny"):
        latent_pipeline(kind).save_pretrained(root / kind)
    latent_pipeline("kl", 4, concat_through_vae="mode").save_pretrained(root / "mode")
    latent_pipeline("kl", 4, concat_through_vae="sample").save_pretrained(root / "drawn")
    latent_pipeline("kl", 5, concat_through_vae="mode").save_pretrained(root / "holes")
    latent_pipeline("kl", 3).save_pretrained(root / "sharp")
    DDPMExtPipeline(tiny_unet(4, 3), DDPMExtScheduler(20), "concat").save_pretrained(root / "gray")
    DDPMExtPipeline(tiny_unet(5, 3), DDPMExtScheduler(20), "concat").save_pretrained(root / "two")
    DDPMExtPipeline(tiny_unet(), DDPMExtScheduler(20)).save_pretrained(root / "plain")
    DDPMExtPipeline(tiny_unet(4), DDPMExtScheduler(20), latent_scaling_factor=0.5).save_pretrained(root / "latents")
    return root


@pytest.fixture
def sample(folders, tmp_path, monkeypatch, capsys):
    """Exit status, and what was printed; nothing is left after an error."""
    monkeypatch.chdir(tmp_path)

    def command(name: str, *flags: str) -> tuple[int, str]:
        line = ["sample", str(folders / name), "--device", "cpu", *EXACT, "--num_inference_steps", "2", *flags]
        before = sorted(os.listdir())
        status = cli.main(line)
        printed = capsys.readouterr()
        if status:
            assert status == 2
            assert printed.err.count("error: ") == 1
            assert sorted(os.listdir()) == before
        return status, printed.err if status else printed.out

    return command


def draw(folder: Path, count: int, **arguments) -> torch.Tensor:
    """The latents that the command draws."""
    pipeline = DDPMExtPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    noise = [generator("sample", 0, index) for index in range(count)]
    return pipeline(count, noise, 2, "latent", **arguments).images


def decoded(folder: Path, latents: torch.Tensor) -> np.ndarray:
    """What Diffusers' own autoencoder makes of latents, as images in [0, 1]."""
    vae = DDPMExtPipeline.from_pretrained(folder).vae
    with torch.no_grad():
        pixels = vae.decode(latents / SCALE).sample
    return (pixels / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).numpy()


@pytest.mark.parametrize("kind", ["kl", "vq", "tiny"])
def test_the_first_stage_decodes(folders, sample, kind):
    status, printed = sample(kind, "--num_images", "3", "--out", "a.npy")
    assert status == 0
    assert "3 images of 16x16x3" in printed
    images = np.load("a.npy")
    np.testing.assert_allclose(images, decoded(folders / kind, draw(folders / kind, 3)), atol=2e-6)
    assert sample(kind, "--num_images", "3", "--out", "each", "--batch_size", "2")[0] == 0
    for index in range(3):
        with Image.open(f"each/0000{index}.png") as image:
            assert abs(np.asarray(image) / 255 - images[index]).max() <= 0.5 / 255 + 1e-6


def test_a_video_is_decoded_frame_by_frame(sample):
    assert sample("kl", "--num_images", "2", "--out", "a.gif")[0] == 0
    with Image.open("a.gif") as video:
        assert video.n_frames == 3
        assert min(video.size) >= 16


def test_latents_without_a_first_stage_are_called_so(folders, sample, capsys):
    status, printed = sample("latents", "--num_images", "2", "--out", "a.npy")
    assert status == 0
    assert "2 latents of 8x8x4" in printed
    assert "latents of an autoencoder that is not in the folder, not images" in printed
    assert np.load("a.npy").shape == (2, 8, 8, 4)
    assert "that is not in its folder, not images" in sample("latents", "--out", "a.png")[1]
    cli.main(["doctor", str(folders / "latents"), "--offline"])
    assert "? its samples are latents of an autoencoder that is not in the folder" in capsys.readouterr().out


def pixels_of(path: Path, size: int) -> torch.Tensor:
    """A square picture by Pillow alone: resized to cover, then cropped."""
    with Image.open(path) as image:
        scale = size / min(image.size)
        image = image.convert("RGB").resize([round(side * scale) for side in image.size], Image.Resampling.BILINEAR)
        left, top = (image.width - size) // 2, (image.height - size) // 2
        levels = np.asarray(image.crop((left, top, left + size, top + size)))
    return torch.from_numpy(levels.copy()).permute(2, 0, 1)[None].float() / 127.5 - 1


def test_conditions_go_through_the_first_stage(folders, sample):
    """By Diffusers' own classes: the posterior's mode, not scaled; the outputs have the pictures' names."""
    write_pictures(Path("in"), ["b.png", "a.jpg", "deep/c.webp"])
    assert sample("mode", "--concat", "in", "--out", "out")[0] == 0
    names = [str(path.relative_to("out")) for path in Path("out").rglob("*.png")]
    assert sorted(names) == ["a.png", "b.png", "deep/c.png"]
    vae = DDPMExtPipeline.from_pretrained(folders / "mode").vae
    inputs = torch.cat([pixels_of(Path("in") / name, 16) for name in ("a.jpg", "b.png", "deep/c.webp")])
    with torch.no_grad():
        conditions = vae.encode(inputs).latent_dist.mode()
    expected = decoded(folders / "mode", draw(folders / "mode", 3, concat_inputs=conditions))
    for name, image in zip(("a.png", "b.png", "deep/c.png"), expected, strict=True):
        with Image.open(Path("out") / name) as written:
            assert abs(np.asarray(written) / 255 - image).max() <= 0.5 / 255 + 1e-5, name


def test_a_sample_of_the_posterior_is_scaled_and_keyed(folders, sample):
    write_pictures(Path("in"), ["a.png"])
    assert sample("drawn", "--concat", "in", "--out", "one.npy")[0] == 0
    assert sample("drawn", "--concat", "in", "--out", "two.npy")[0] == 0
    assert np.array_equal(np.load("one.npy"), np.load("two.npy"))
    vae = DDPMExtPipeline.from_pretrained(folders / "drawn").vae
    with torch.no_grad():
        posterior = vae.encode(pixels_of(Path("in/a.png"), 16)).latent_dist
    noise = torch.randn(posterior.mean.shape, generator=generator("sample/concat", 0, 0))
    conditions = (posterior.mean + posterior.std * noise) * SCALE
    expected = decoded(folders / "drawn", draw(folders / "drawn", 1, concat_inputs=conditions))
    np.testing.assert_allclose(np.load("one.npy"), expected, atol=5e-6)


def test_what_is_transparent_is_painted(folders, sample):
    write_pictures(Path("in"), ["a.png"], (16, 16), "RGBA")
    assert sample("holes", "--concat", "in", "--out", "a.npy")[0] == 0
    mask = torch.full((1, 1, 8, 8), -1.0)
    mask[..., :4] = 1  # the left half
    with Image.open("in/a.png") as image:
        levels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].float()
    color = torch.where(levels[:, 3:] < 128, -1.0, levels[:, :3] / 127.5 - 1)
    vae = DDPMExtPipeline.from_pretrained(folders / "holes").vae
    with torch.no_grad():
        conditions = torch.cat([vae.encode(color).latent_dist.mode(), mask], dim=1)
    expected = decoded(folders / "holes", draw(folders / "holes", 1, concat_inputs=conditions))
    np.testing.assert_allclose(np.load("a.npy"), expected, atol=5e-6)
    write_pictures(Path("opaque"), ["a.png"])
    assert "has no transparent part" in sample("holes", "--concat", "opaque", "--out", "b.npy")[1]


@pytest.mark.parametrize(("name", "channels"), [("sharp", 3), ("gray", 1)])
def test_pictures_that_stay_pixels(folders, sample, name, channels):
    write_pictures(Path("in"), ["a.png", "b.png"], (8, 8))
    assert sample(name, "--concat", "in", "--out", "a.npy")[0] == 0
    inputs = torch.cat([pixels_of(Path("in") / each, 8) for each in ("a.png", "b.png")])
    if channels == 1:
        gray = [Image.open(f"in/{each}.png").convert("L") for each in "ab"]
        inputs = torch.stack([torch.from_numpy(np.array(image))[None].float() / 127.5 - 1 for image in gray])
    latents = draw(folders / name, 2, concat_inputs=inputs)
    expected = (latents / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).numpy()
    expected = expected if name == "gray" else decoded(folders / name, latents)
    np.testing.assert_allclose(np.load("a.npy"), expected, atol=5e-6)


def test_more_images_than_pictures_are_numbered(sample):
    write_pictures(Path("in"), ["a.png", "b.png"])
    assert sample("mode", "--concat", "in", "--num_images", "5", "--out", "out")[0] == 0
    names = ["a-2.png", "a-3.png", "a.png", "b-2.png", "b.png"]
    assert sorted(os.listdir("out")) == sorted([*names, "samples.json"])
    first = Path("out/a.png").read_bytes()
    assert first != Path("out/a-2.png").read_bytes()
    Path("out/a.png").unlink()
    Path("out/.b.png.77.part").write_text("")  # of a killed command
    assert sample("mode", "--concat", "in", "--num_images", "5", "--out", "out")[0] == 0
    assert Path("out/a.png").read_bytes() == first
    assert not Path("out/.b.png.77.part").exists()
    assert sample("mode", "--concat", "in", "--out", "grid.png", "--individual", "each")[0] == 0
    assert sorted(os.listdir("each")) == ["a.png", "b.png"]
    assert Path("each/a.png").read_bytes() == first
    shutil.copy("in/a.png", "in/b-2.png")
    assert "rename it" in sample("mode", "--concat", "in", "--num_images", "5", "--out", "other")[1]
    assert "holds images with concat" in sample("mode", "--concat", "in", "--out", "out")[1]


@pytest.mark.parametrize(
    ("name", "flags", "answer"),
    [
        ("mode", (), "needs --concat DIR or --concat_inputs FILE.npy"),
        ("plain", ("--concat", "in"), "takes none"),
        ("two", ("--concat", "in"), "a.png cannot be read: it has 3 channels, which --channels 2"),
        ("mode", ("--concat", "empty"), "empty"),
        ("mode", ("--concat", "nowhere"), "does not exist"),
        ("mode", ("--concat", "in/a.png"), "is a file"),
        ("mode", ("--concat", "notes"), "has no picture"),
        ("mode", ("--concat", "twice"), "would both become a.png"),
        ("mode", ("--concat", "broken"), "bad.png cannot be read"),
        ("mode", ("--concat", "in", "--concat_inputs", "x.npy"), "give one of them"),
        ("mode", ("--concat", "in", "--out", "in"), "is what --concat reads"),
        ("mode", ("--concat", "in", "--out", "in/out"), "is in the folder that --concat reads"),
        ("mode", ("--concat", "in", "--individual", "in/each"), "--individual in/each is in the folder"),
    ],
)
def test_wrong_folders_of_pictures(sample, name, flags, answer):
    write_pictures(Path("in"), ["a.png"])
    write_pictures(Path("twice"), ["a.png", "a.jpg"])
    for folder in ("empty", "notes", "broken"):
        Path(folder).mkdir()
    Path("notes/a.txt").write_text("no picture")
    Path("broken/bad.png").write_bytes(b"\x89PNG\r\n\x1a\nnot")
    status, error = sample(name, *flags)
    assert status == 2
    assert answer in error


def test_a_model_of_text_takes_embeddings_as_a_file(folders, sample, tmp_path_factory):
    folder = tmp_path_factory.mktemp("text") / "model"
    shutil.copytree(folders / "kl", folder)
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(
        json.dumps(index | {"conditioning_key": "crossattn", "_class_name": "diffusers_ddpm_ext.DDPMExtPipeline"})
    )
    assert "needs --encoder_hidden_states FILE.npy, or --prompt TEXT with --text_encoder" in sample(str(folder))[1]
