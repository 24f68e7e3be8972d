"""`ddpm-ext sample` with prompts, token ids, label maps and pictures: what is drawn, named and recorded."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.prompt_cases import text_pipeline, tiny_conditional_unet
from helpers.text_models import save_text_model, tiny_text_encoder, tiny_tokenizer
from helpers.tiny import EXACT
from PIL import Image

from diffusers_ddpm_ext import DDPMExtPipeline, cli
from diffusers_ddpm_ext.models.spatial_rescaler import SpatialRescaler
from diffusers_ddpm_ext.plotting.sheets import CAPTION_HEIGHT, LINE_HEIGHT
from diffusers_ddpm_ext.utils.random_keys import generator

LABELS = 6


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("pipelines")
    text_pipeline("clip").save_pretrained(root / "clip")
    text_pipeline("bert", is_latent=True).save_pretrained(root / "bert")
    text_pipeline("clip", tokenizer=None).save_pretrained(root / "ids")
    text_pipeline("").save_pretrained(root / "bare")
    save_text_model(root / "encoder")
    rescaler = SpatialRescaler(n_stages=1, in_channels=LABELS, out_channels=2)
    unet = tiny_conditional_unet(5, 3)
    text_pipeline("clip", unet=unet, conditioning_key="hybrid", concat_encoder=rescaler).save_pretrained(root / "maps")
    return root


@pytest.fixture
def sample(folders, tmp_path, monkeypatch, capsys):
    """Exit status, and what was printed; nothing is left after an error."""
    monkeypatch.chdir(tmp_path)

    def command(name: str, *flags: str) -> tuple[int, str]:
        before = sorted(os.listdir())
        status = cli.main(
            ["sample", str(folders / name), "--device", "cpu", *EXACT, "--num_inference_steps", "2", *flags]
        )
        printed = capsys.readouterr()
        if status:
            assert status == 2
            assert printed.err.count("error: ") == 1
            assert sorted(os.listdir()) == before
        return status, printed.err if status else printed.out

    return command


def draw(folder: Path, keys: list[tuple[int, int]], **arguments) -> np.ndarray:
    """Images of a pipeline's call with the command's noise."""
    pipeline = DDPMExtPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    noise = [generator("sample", *key) for key in keys]
    return pipeline(generator=noise, num_inference_steps=2, output_type="np", **arguments).images


@pytest.mark.parametrize("name", ["clip", "bert"])
def test_prompts_are_drawn_in_turn(folders, sample, name):
    prompts = ["red cat", "a blue dog"]
    assert sample(name, "--prompt", *prompts, "--num_images", "3", "--out", "a.npy", "--batch_size", "2")[0] == 0
    expected = draw(folders / name, [(0, 0), (0, 1), (0, 2)], prompt=[*prompts, prompts[0]])
    images = np.load("a.npy")
    np.testing.assert_allclose(images, expected, atol=2e-6)
    other = draw(folders / name, [(0, 1)], prompt="red cat")
    assert abs(images[1] - other[0]).max() > 1e-3, "the prompt makes no difference"


def test_guidance_leads_away_from_the_empty_prompt_or_the_negative_one(folders, sample):
    flags = ["--prompt", "red cat", "--num_images", "2", "--guidance_scale", "3"]
    assert sample("clip", *flags, "--out", "empty.npy")[0] == 0
    assert sample("clip", *flags, "--negative_prompt", "", "--out", "same.npy")[0] == 0
    assert sample("clip", *flags, "--negative_prompt", "dog", "--out", "dog.npy")[0] == 0
    keys = [(0, 0), (0, 1)]
    empty = draw(folders / "clip", keys, prompt=["red cat"] * 2, guidance_scale=3, negative_prompt=["", ""])
    dog = draw(folders / "clip", keys, prompt=["red cat"] * 2, guidance_scale=3, negative_prompt=["dog", "dog"])
    np.testing.assert_allclose(np.load("empty.npy"), empty, atol=2e-6)
    np.testing.assert_allclose(np.load("same.npy"), empty, atol=2e-6)
    np.testing.assert_allclose(np.load("dog.npy"), dog, atol=2e-6)
    assert abs(empty - dog).max() > 1e-3


def test_a_file_draws_one_image_for_each_prompt(folders, sample):
    Path("p.txt").write_text("red cat\n\nblue dog\ngreen\n")
    status, printed = sample("clip", "--prompts", "p.txt", "--out", "each")
    assert status == 0
    assert printed.startswith("3 images of 8x8x3 written to each")
    assert sorted(os.listdir("each")) == ["00000.png", "00001.png", "00002.png", "samples.json"]
    record = json.loads(Path("each/samples.json").read_text())
    assert record["prompt"] == ["red cat", "blue dog", "green"]
    assert not {"negative_prompt", "prompt_seed", "prompts", "tokenizer"} & set(record)
    expected = draw(folders / "clip", [(0, index) for index in range(3)], prompt=record["prompt"])
    for index, image in enumerate(expected):
        with Image.open(f"each/0000{index}.png") as drawn:
            assert abs(np.asarray(drawn) / 255 - image).max() <= 0.5 / 255 + 1e-6


def test_rows_of_a_file_have_seeds_and_negative_prompts(folders, sample):
    """With a seed of its own, an image does not depend on its place in the file, nor on --seed."""
    rows = [{"prompt": "dog"}, {"prompt": "cat", "seed": 7, "negative_prompt": "red"}]
    Path("p.jsonl").write_text("\n".join(map(json.dumps, rows)))
    flags = ["--prompts", "p.jsonl", "--guidance_scale", "2"]
    assert sample("clip", *flags, "--seed", "3", "--num_images", "4", "--out", "a.npy")[0] == 0
    keys = [(3, 0), (7, 0), (3, 2), (7, 1)]
    prompts, negative = ["dog", "cat"] * 2, ["", "red"] * 2
    expected = draw(folders / "clip", keys, prompt=prompts, negative_prompt=negative, guidance_scale=2)
    np.testing.assert_allclose(np.load("a.npy"), expected, atol=2e-6)
    typed = ["--prompt", "cat", "--negative_prompt", "red", "--seed", "7", "--guidance_scale", "2"]
    assert sample("clip", *typed, "--num_images", "1", "--out", "b.npy")[0] == 0
    np.testing.assert_allclose(np.load("b.npy")[0], expected[1], atol=2e-6)


def test_prompts_typed_or_read_are_the_same_images(sample):
    """A file resumes what the command line began: the record has the prompts, not where they came from."""
    Path("p.txt").write_text("cat\ndog\n")
    assert sample("clip", "--prompt", "cat", "dog", "--num_images", "2", "--out", "each")[0] == 0
    before = Path("each/samples.json").read_bytes()
    assert sample("clip", "--prompts", "p.txt", "--num_images", "4", "--out", "each")[0] == 0
    assert Path("each/samples.json").read_bytes() == before
    assert len(list(Path("each").glob("*.png"))) == 4
    status, error = sample("clip", "--prompt", "cat", "red", "--num_images", "2", "--out", "each")
    assert status == 2
    assert "holds images with prompt" in error


def test_prompts_are_below_the_images_of_a_grid(sample):
    """One line for short prompts, up to three for long ones; control characters are escaped."""
    assert sample("clip", "--prompt", "cat", "\x1b[2Jdog", "--num_images", "4", "--out", "short.png")[0] == 0
    assert sample("clip", "--prompt", "cat", "a red dog " * 20, "--num_images", "4", "--out", "long.png")[0] == 0
    with Image.open("short.png") as short, Image.open("long.png") as long:
        assert short.size == (2 * 96 + 4, 2 * (96 + CAPTION_HEIGHT) + 4)
        assert long.size == (2 * 96 + 4, 2 * (96 + CAPTION_HEIGHT + 2 * LINE_HEIGHT) + 4)
        assert (np.asarray(short)[96 : 96 + CAPTION_HEIGHT, :96] < 128).any()
    assert sample("clip", "--prompt", "cat", "--num_images", "2", "--out", "video.gif")[0] == 0


def test_the_empty_prompt_is_a_prompt(folders, sample):
    assert sample("clip", "--prompt", "", "--num_images", "1", "--out", "a.npy")[0] == 0
    np.testing.assert_allclose(np.load("a.npy"), draw(folders / "clip", [(0, 0)], prompt=""), atol=2e-6)


def test_token_ids_take_the_place_of_prompts(folders, sample):
    ids = tiny_tokenizer()(["red cat", "dog", ""], padding="max_length", max_length=8).input_ids
    np.save("ids.npy", np.array(ids[:2], dtype=np.int32))
    np.save("empty.npy", np.array(ids[2:]))
    flags = ["--input_ids", "ids.npy", "--num_images", "2"]
    assert sample("ids", *flags, "--out", "a.npy")[0] == 0
    expected = draw(folders / "clip", [(0, 0), (0, 1)], prompt=["red cat", "dog"])
    np.testing.assert_allclose(np.load("a.npy"), expected, atol=2e-6)
    guided = [*flags, "--guidance_scale", "2", "--negative_input_ids", "empty.npy"]
    assert sample("ids", *guided, "--out", "b.npy")[0] == 0
    expected = draw(folders / "clip", [(0, 0), (0, 1)], prompt=["red cat", "dog"], guidance_scale=2)
    np.testing.assert_allclose(np.load("b.npy"), expected, atol=2e-6)


def test_encoders_from_elsewhere(folders, sample):
    """A folder without its tokenizer, or without both; another encoder draws other images."""
    expected = draw(folders / "clip", [(0, 0)], prompt="red cat")
    encoder = str(folders / "encoder")
    flags = ["--prompt", "red cat", "--num_images", "1", "--tokenizer", encoder]
    assert sample("ids", *flags, "--out", "a.npy")[0] == 0
    assert sample("bare", *flags, "--text_encoder", encoder, "--out", "b.npy")[0] == 0
    assert sample("bare", *flags, "--text_encoder", str(folders / "clip"), "--out", "c.npy")[0] == 0
    for name in ("a.npy", "b.npy", "c.npy"):
        np.testing.assert_allclose(np.load(name), expected, atol=2e-6)
    save_text_model(Path("other"), seed=1)
    assert sample("clip", *flags[:4], "--text_encoder", "other", "--out", "d.npy")[0] == 0
    assert abs(np.load("d.npy") - expected).max() > 1e-3


def test_maps_of_labels_go_through_the_concat_encoder(folders, sample):
    """Against one-hot maps made by hand; larger maps are resized without mixing labels."""
    Path("maps").mkdir()
    labels = np.random.default_rng(0).integers(0, LABELS, (16, 16), dtype=np.uint8)
    Image.fromarray(labels).save("maps/b.png")
    Image.fromarray(labels.repeat(2, 0).repeat(2, 1)).save("maps/a.png")
    palette = Image.fromarray(labels, mode=None).convert("P")
    palette.putpalette([200, 10, 10] * 256)
    palette.putdata(labels.flatten().tolist())
    palette.save("maps/c.png")
    assert sample("maps", "--concat", "maps", "--prompt", "cat", "--out", "out")[0] == 0
    assert sorted(path.name for path in Path("out").glob("*.png")) == ["a.png", "b.png", "c.png"]
    maps = torch.from_numpy(np.eye(LABELS, dtype=np.float32)[labels]).permute(2, 0, 1)[None].expand(3, -1, -1, -1)
    keys = [(0, index) for index in range(3)]
    expected = draw(folders / "maps", keys, prompt=["cat"] * 3, concat_images=maps)
    for index, name in enumerate(["a", "b", "c"]):
        with Image.open(f"out/{name}.png") as image:
            assert abs(np.asarray(image) / 255 - expected[index]).max() <= 0.5 / 255 + 1e-6


def test_a_prompt_that_is_too_long_is_cut_with_a_warning(folders, sample, caplog):
    assert sample("clip", "--prompt", "red " * 30, "--num_images", "1", "--out", "a.npy")[0] == 0
    assert "is longer than 8 tokens and is cut" in caplog.text


@pytest.mark.parametrize("kind", ["clip", "bert", "t5"])
def test_the_encoder_is_part_of_the_model(kind, tmp_path, sample, folders):
    """Images of another encoder do not resume those of this one."""
    text_pipeline("clip").save_pretrained(tmp_path / "one")
    pipeline = text_pipeline("clip")
    pipeline.text_encoder = tiny_text_encoder(kind, seed=5)
    pipeline.save_pretrained(tmp_path / "two")
    flags = ["--prompt", "cat", "--num_images", "1", "--out", "each"]
    assert sample(str(tmp_path / "one"), *flags)[0] == 0
    status, error = sample(str(tmp_path / "two"), *flags)
    assert status == 2
    assert "holds images with model" in error


def test_a_safety_checker_is_left_out_and_named(folders, sample, tmp_path):
    arguments = ("--prompt", "red cat", "--num_images", "1")
    assert "safety" not in sample("clip", *arguments, "--out", "a.npy")[1]
    copy = shutil.copytree(folders / "clip", tmp_path / "checked")
    index = json.loads((copy / "model_index.json").read_text(encoding="utf-8"))
    index["safety_checker"] = ["stable_diffusion", "StableDiffusionSafetyChecker"]
    (copy / "model_index.json").write_text(json.dumps(index), encoding="utf-8")
    (copy / "safety_checker").mkdir()
    status, printed = sample(str(copy), *arguments, "--out", "b.npy")
    assert status == 0
    assert printed.endswith("; its safety checker was not run\n")
    assert np.array_equal(np.load("a.npy"), np.load("b.npy"))
