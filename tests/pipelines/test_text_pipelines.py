"""Calls of pipelines with text and image encoders, against the formulas written out."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler
from helpers.latent_cases import latent_pipeline
from helpers.text_cases import text_pipeline, tiny_text_unet
from helpers.text_models import tiny_text_encoder, tiny_tokenizer
from PIL import Image
from torch import Tensor
from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModel, CLIPVisionModelWithProjection

from diffusers_ddpm_ext import DDPMExtPipeline, DDPMExtScheduler, SpatialRescaler
from diffusers_ddpm_ext.models.text_encoder import TextEncoder

STEPS = 2


@pytest.fixture(scope="module")
def pipeline() -> DDPMExtPipeline:
    return text_pipeline()


def draw(pipeline: DDPMExtPipeline, *args: Any, seed: int = 3, **kwargs: Any) -> Tensor:
    """Latents, which show differences that decoding would hide."""
    generator = torch.Generator().manual_seed(seed)
    return pipeline(*args, generator=generator, num_inference_steps=STEPS, output_type="latent", **kwargs).images


def tokens(pipeline: DDPMExtPipeline, *prompts: str) -> Tensor:
    assert pipeline.text_encoder_stage is not None
    return pipeline.text_encoder_stage.encode_prompts(prompts)


def written_out(pipeline: DDPMExtPipeline, context: Tensor, negative: Tensor, scale: float, seed: int = 3) -> Tensor:
    """The loop of [DDPM] algorithm 2 with guidance, two network calls per step."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(len(context), 4, 8, 8, generator=generator)
    scheduler = DDPMExtScheduler.from_config(pipeline.scheduler.config)
    scheduler.set_timesteps(STEPS)
    with torch.no_grad():
        for t in scheduler.timesteps:
            c, u = (pipeline.unet(x, t, encoder_hidden_states=each).sample for each in (context, negative))
            x = scheduler.step(u + scale * (c - u), t, x, generator=generator).prev_sample
    return x


# ------------------------------------------------------------------ prompts


def test_a_prompt_is_its_tokens_under_every_name(pipeline):
    expected = draw(pipeline, prompt_embeds=tokens(pipeline, "a red cat"))
    ids = pipeline.text_encoder_stage.tokenize(["a red cat"])
    for arguments in (
        {"batch_size": "a red cat"},
        {"batch_size": ["a red cat"]},
        {"prompt": "a red cat"},
        {"prompt": ("a red cat",)},
        {"input_ids": ids},
        {"input_ids": ids[0].tolist()},
        {"encoder_hidden_states": tokens(pipeline, "a red cat")},
    ):
        assert torch.equal(draw(pipeline, **arguments), expected)
    assert not torch.allclose(draw(pipeline, "a blue dog"), expected, atol=1e-3)


def test_one_prompt_for_all_images_or_one_per_image(pipeline):
    both = draw(pipeline, ["a red cat", "a blue dog"])
    same = draw(pipeline, 2, prompt="a red cat")
    assert torch.allclose(both[0], same[0], atol=1e-6)
    assert not torch.allclose(both[1], same[1], atol=1e-3)


def test_images_of_each_prompt_come_one_after_the_other(pipeline):
    prompts, negatives = ["a red cat", "a blue dog"], ["", "green"]
    images = draw(pipeline, prompts, negative_prompt=negatives, num_images_per_prompt=2, guidance_scale=2.0)
    twice = [[each for each in texts for _ in range(2)] for texts in (prompts, negatives)]
    assert torch.equal(images, draw(pipeline, twice[0], negative_prompt=twice[1], guidance_scale=2.0))


@pytest.mark.parametrize("scale", [0.0, 1.0, 2.5])
def test_guidance_is_against_the_empty_prompt(pipeline, scale):
    context = tokens(pipeline, "a red cat", "a blue dog")
    expected = written_out(pipeline, context, tokens(pipeline, "", ""), scale)
    assert (draw(pipeline, ["a red cat", "a blue dog"], guidance_scale=scale) - expected).abs().max() <= 1e-5


@pytest.mark.parametrize(
    "negative",
    [
        lambda p: {"negative_prompt": "green"},
        lambda p: {"negative_input_ids": p.text_encoder_stage.tokenize(["green"])},
        lambda p: {"negative_prompt_embeds": tokens(p, "green")},
        lambda p: {"negative_encoder_hidden_states": tokens(p, "green")},
    ],
)
def test_negative_prompts(pipeline, negative):
    expected = written_out(pipeline, tokens(pipeline, "cat"), tokens(pipeline, "green"), 3.0)
    assert (draw(pipeline, "cat", guidance_scale=3.0, **negative(pipeline)) - expected).abs().max() <= 1e-5


def test_guidance_against_another_number_of_tokens(pipeline):
    context = tokens(pipeline, "a red cat")[:, :3]
    expected = written_out(pipeline, context, tokens(pipeline, ""), 2.0)
    assert (draw(pipeline, prompt_embeds=context, guidance_scale=2.0) - expected).abs().max() <= 1e-5


@pytest.mark.parametrize("kind", ["bert", "t5", "projection"])
def test_every_kind_of_encoder(kind):
    pipeline = text_pipeline(kind)
    context, negative = tokens(pipeline, "a red cat"), tokens(pipeline, "")
    expected = written_out(pipeline, context, negative, 2.0)
    assert (draw(pipeline, "a red cat", guidance_scale=2.0) - expected).abs().max() <= 1e-5


def test_all_steps_are_all_steps_also_with_the_offset_of_stable_diffusion(pipeline):
    assert pipeline.scheduler.config.steps_offset == 1
    seen: list[int] = []

    def note(_: Any, __: int, t: Tensor, ___: Any) -> dict[str, Any]:
        seen.append(int(t))
        return {}

    pipeline("cat", callback_on_step_end=note)
    assert seen == list(range(50))[::-1]
    seen.clear()
    pipeline("cat", callback_on_step_end=note, num_inference_steps=5)
    assert seen == [41, 31, 21, 11, 1]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({}, "prompt is missing"),
        ({"prompt": "a", "input_ids": [[0]]}, "prompt and input_ids are both given"),
        ({"prompt_embeds": 0, "encoder_hidden_states": 0}, "prompt_embeds and encoder_hidden_states"),
        ({"batch_size": "a", "prompt": "b"}, "prompt is given too"),
        ({"prompt": ["a", "b"], "batch_size": 3}, "prompt has 2 entries, but batch_size is 3"),
        ({"prompt": ["a", "b"], "negative_prompt": ["a"] * 3, "guidance_scale": 2.0}, "negative_prompt has 3 entries"),
        ({"prompt": "a", "negative_prompt": "b"}, "no effect at guidance_scale 1"),
        ({"prompt": ["a", 3]}, "prompt 1 is 3"),
        ({"negative_prompt": 4, "prompt": "a", "guidance_scale": 2.0}, "negative_prompt is 4"),
        ({"prompt": []}, "empty list"),
        ({"input_ids": [[9999]]}, "the token 9999"),
        ({"input_ids": [[0] * 9]}, "8 positions"),
        ({"prompt_embeds": torch.zeros(1, 8, 12)}, r"prompt_embeds has shape \(1, 8, 12\).*16"),
        ({"prompt_embeds": torch.zeros(8, 16)}, r"prompt_embeds has shape \(8, 16\)"),
        ({"prompt_embeds": torch.full((1, 8, 16), float("nan"))}, "prompt_embeds has values that are NaN"),
        ({"prompt": "a", "class_labels": 1}, "class_labels is given"),
        ({"prompt": "a", "num_images_per_prompt": 0}, "num_images_per_prompt is 0"),
        ({"prompt": "a", "num_images_per_prompt": 2, "batch_size": 3}, "leave batch_size out"),
        ({"prompt": "a", "image": 1}, "no image_encoder"),
        ({"prompt": "a", "concat_images": 1}, "no concat_encoder"),
    ],
)
def test_wrong_calls_are_one_sentence(pipeline, arguments, words):
    with pytest.raises(ValueError, match=words) as error:
        pipeline(**arguments, num_inference_steps=STEPS)
    assert "\n" not in str(error.value)


def test_without_a_tokenizer_there_are_token_ids():
    pipeline = text_pipeline(tokenizer=None)
    ids, negative = [[1, 2, 3]], [[4, 5, 6]]
    context, empty = (pipeline.text_encoder_stage.encode(torch.tensor(each)) for each in (ids, negative))
    expected = written_out(pipeline, context, empty, 2.0)
    drawn = draw(pipeline, input_ids=ids, negative_input_ids=negative, guidance_scale=2.0)
    assert (drawn - expected).abs().max() <= 1e-5
    with pytest.raises(ValueError, match="pass input_ids or prompt_embeds"):
        draw(pipeline, "cat")
    with pytest.raises(ValueError, match="needs negative_input_ids or negative_prompt_embeds"):
        draw(pipeline, input_ids=ids, guidance_scale=2.0)


def test_without_a_text_encoder_there_are_embeddings():
    pipeline = DDPMExtPipeline(tiny_text_unet(), DDPMExtScheduler(50, clip_sample=False))
    with pytest.raises(ValueError, match="no text encoder: pass prompt_embeds"):
        draw(pipeline, prompt="cat")
    with pytest.raises(ValueError, match="takes no prompt"):
        draw(pipeline, "cat")
    with pytest.raises(ValueError, match="takes no text"):
        draw(latent_pipeline(), prompt="cat")


# ------------------------------------------------------------------ components


def test_components_that_do_not_fit():
    encoder, tokenizer = tiny_text_encoder(width=24), tiny_tokenizer()
    scheduler = DDPMExtScheduler(50)
    with pytest.raises(ValueError, match="width 24, but the network's cross attention takes 16"):
        DDPMExtPipeline(tiny_text_unet(), scheduler, text_encoder=encoder)
    with pytest.raises(ValueError, match="tokenizer is given without a text_encoder"):
        DDPMExtPipeline(tiny_text_unet(), scheduler, tokenizer=tokenizer)
    with pytest.raises(ValueError, match="two names"):
        DDPMExtPipeline(tiny_text_unet(), scheduler, text_encoder=encoder, bert=encoder)
    with pytest.raises(ValueError, match="has no encoder_hidden_states"):
        latent_pipeline(text_encoder=encoder)
    with pytest.raises(ValueError, match="has no concat_inputs"):
        text_pipeline(concat_encoder=SpatialRescaler())
    with pytest.raises(ValueError, match="makes 5 channels, but the network takes 4"):
        latent_pipeline(concat_channels=4, concat_encoder=SpatialRescaler(out_channels=5))
    with pytest.raises(ValueError, match="feature_extractor is given without"):
        text_pipeline(feature_extractor=CLIPImageProcessor())
    with pytest.raises(ValueError, match="image_encoder is CLIPTextModel"):
        text_pipeline(image_encoder=tiny_text_encoder())


def test_components_are_assigned_and_taken_away_later():
    pipeline = text_pipeline(tokenizer=None)
    assert pipeline.config["text_encoder"] == ("transformers", "CLIPTextModel")
    pipeline.tokenizer = tiny_tokenizer()
    assert pipeline.config["tokenizer"] == ("transformers", "CLIPTokenizer")
    assert pipeline.scheduler.config.steps_offset == 1
    first = draw(pipeline, "a red cat")
    pipeline.text_encoder = tiny_text_encoder(seed=4)
    assert not torch.allclose(draw(pipeline, "a red cat"), first, atol=1e-3)
    pipeline.text_encoder = None
    assert pipeline.config["tokenizer"] == pipeline.config["text_encoder"] == (None, None)
    assert pipeline.text_encoder_stage is None


def test_half_precision_changes_the_network_alone(pipeline):
    half = text_pipeline(unet=tiny_text_unet()).to(torch.float16)
    assert half.text_encoder.dtype == torch.float32
    assert torch.equal(tokens(half, "cat"), tokens(pipeline, "cat"))


# ------------------------------------------------------------------ pictures as conditions


def test_pictures_become_concatenated_inputs(tmp_path):
    encoder = SpatialRescaler(n_stages=1, in_channels=5, out_channels=3)
    pipeline = latent_pipeline(concat_channels=3, concat_encoder=encoder)
    maps = torch.rand(2, 5, 16, 16, generator=torch.Generator().manual_seed(0))
    expected = draw(pipeline, concat_inputs=encoder(maps).detach())
    assert torch.equal(draw(pipeline, concat_images=maps), expected)
    assert torch.equal(draw(pipeline, concat_images=[maps[:1], maps[1:]]), expected)
    pipeline.save_pretrained(tmp_path)
    again = DDPMExtPipeline.from_pretrained(tmp_path)
    assert torch.equal(draw(again, concat_images=maps), expected)
    with pytest.raises(ValueError, match="concat_images and concat_inputs"):
        draw(pipeline, concat_images=maps, concat_inputs=maps)
    with pytest.raises(ValueError, match="concat_images is"):
        draw(pipeline, concat_images="map.png")


def test_text_and_concatenated_inputs_are_guided_by_the_text_alone():
    pipeline = text_pipeline(unet=tiny_text_unet(channels=7), conditioning_key="hybrid")
    context, concat = tokens(pipeline, "a red cat"), torch.randn(1, 3, 8, 8)
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(1, 4, 8, 8, generator=generator)
    scheduler = DDPMExtScheduler.from_config(pipeline.scheduler.config)
    scheduler.set_timesteps(STEPS)
    with torch.no_grad():
        for t in scheduler.timesteps:
            joined = torch.cat([x, concat], dim=1)
            states = (context, tokens(pipeline, ""))
            c, u = (pipeline.unet(joined, t, encoder_hidden_states=each).sample for each in states)
            x = scheduler.step(u + 2.0 * (c - u), t, x, generator=generator).prev_sample
    drawn = draw(pipeline, "a red cat", concat_inputs=concat, guidance_scale=2.0)
    assert (drawn - x).abs().max() <= 1e-5


def _vision(width: int, projection: bool = True) -> Any:
    config = CLIPVisionConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=16, patch_size=8,
        projection_dim=width,
    )  # fmt: skip
    torch.manual_seed(0)
    return (CLIPVisionModelWithProjection if projection else CLIPVisionModel)(config).eval()


@pytest.mark.parametrize("projection", [True, False])
def test_an_image_is_one_token_of_cross_attention(projection, tmp_path):
    encoder = _vision(16, projection)
    scheduler = DDPMExtScheduler(50, clip_sample=False)
    pipeline = DDPMExtPipeline(tiny_text_unet(), scheduler, image_encoder=encoder)
    pixels = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    mean, std = np.array([0.48145466, 0.4578275, 0.40821073]), np.array([0.26862954, 0.26130258, 0.27577711])
    values = torch.from_numpy((pixels / 255 - mean) / std).permute(2, 0, 1)[None].float()
    with torch.no_grad():
        output = encoder(values)
    embeds = output.image_embeds if projection else output.pooler_output
    expected = draw(pipeline, prompt_embeds=embeds[:, None])
    in_data_units = torch.from_numpy(pixels / 127.5 - 1).permute(2, 0, 1)[None].float()
    for image in (Image.fromarray(pixels), [Image.fromarray(pixels)], in_data_units):
        assert (draw(pipeline, image=image) - expected).abs().max() <= 1e-5
    pipeline.feature_extractor = CLIPImageProcessor(size=16, crop_size=16)
    assert (draw(pipeline, image=Image.fromarray(pixels)) - expected).abs().max() <= 1e-5
    pipeline.save_pretrained(tmp_path)
    again = DDPMExtPipeline.from_pretrained(tmp_path)
    assert (draw(again, image=Image.fromarray(pixels)) - expected).abs().max() <= 1e-5
    with pytest.raises(ValueError, match="image is"):
        draw(pipeline, image="cat.png")
    with pytest.raises(ValueError, match="both given"):
        draw(pipeline, image=in_data_units, prompt_embeds=embeds[:, None])


def test_text_and_an_image_as_label_together():
    unet = tiny_text_unet(class_embed_type="projection", projection_class_embeddings_input_dim=12)
    pipeline = text_pipeline(unet=unet, image_encoder=_vision(12))
    image = torch.rand(1, 3, 20, 24, generator=torch.Generator().manual_seed(0)) * 2 - 1
    resized = torch.nn.functional.interpolate(image, (16, 16), mode="bicubic", align_corners=True)
    first = draw(pipeline, "a red cat", image=image, guidance_scale=2.0)
    assert torch.equal(first, draw(pipeline, "a red cat", image=resized, guidance_scale=2.0))
    with torch.no_grad():
        mean = torch.tensor([0.48145466, 0.4578275, 0.40821073])[:, None, None]
        std = torch.tensor([0.26862954, 0.26130258, 0.27577711])[:, None, None]
        embeds = pipeline.image_encoder(((resized + 1) / 2 - mean) / std).image_embeds
    arguments = {"class_labels": embeds, "negative_class_labels": torch.zeros_like(embeds), "negative_prompt": ""}
    assert torch.allclose(first, draw(pipeline, "a red cat", guidance_scale=2.0, **arguments), atol=1e-6)
    assert isinstance(pipeline.text_encoder_stage, TextEncoder)


def test_all_steps_with_another_scheduler():
    pipeline = text_pipeline()
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config)
    without = DDIMScheduler.from_config(pipeline.scheduler.config, steps_offset=0)
    images = pipeline("cat", generator=torch.Generator().manual_seed(3), output_type="latent").images
    assert pipeline.scheduler.config.steps_offset == 1
    pipeline.scheduler = without
    expected = pipeline("cat", generator=torch.Generator().manual_seed(3), output_type="latent").images
    assert torch.equal(images, expected)
