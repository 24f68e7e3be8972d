"""Training with captions: what the network gets, the cache, a trained encoder, resuming, the saved pipeline."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from helpers.accelerate_state import fresh_accelerate, reset_accelerate  # noqa: F401
from helpers.caption_runs import COLORS, caption_inputs, contents, train, weights, write_pictures
from helpers.runs import tiny_run
from helpers.text_models import save_text_model, tiny_text_encoder, tiny_tokenizer
from helpers.tiny import tiny_autoencoder

from diffusers_ddpm_ext import DDPMExtPipeline
from diffusers_ddpm_ext.cli import main
from diffusers_ddpm_ext.errors import ConfigError
from diffusers_ddpm_ext.models.text_encoder import TextEncoder
from diffusers_ddpm_ext.models.text_encoder_saving import save_encoder
from diffusers_ddpm_ext.training import trainer
from diffusers_ddpm_ext.training.config.checks import MODEL_SIZES
from diffusers_ddpm_ext.training.config.train_config import parse_train_args
from diffusers_ddpm_ext.training.data import caption_encoder
from diffusers_ddpm_ext.training.loop import captions as loop_captions
from diffusers_ddpm_ext.training.loop.batches import open_batches
from diffusers_ddpm_ext.training.loop.setup import build_setup

TOKENIZER = "the tokenizer of the inputs"


class Killed(BaseException):
    """Stands for `kill -9`."""


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return caption_inputs(tmp_path_factory.mktemp("captions"))


@pytest.fixture(scope="module")
def frozen(inputs: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(tmp_path_factory.mktemp("runs") / "frozen", inputs)


@pytest.fixture(scope="module")
def trained(inputs: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(tmp_path_factory.mktemp("runs") / "trained", inputs, train_text_encoder=True)


def setup_of(folder: Path, options: dict[str, Any], **more: Any) -> Any:
    reset_accelerate()
    return build_setup(tiny_run(folder, **options | more))


# ------------------------------------------------------------------ what the network gets


@pytest.mark.parametrize("kind", ["clip", "projection", "bert", "t5"])
def test_tokens_are_those_of_the_encoder(kind, inputs, tmp_path):
    """Against the networks of Transformers and Diffusers on the captions of the images of a batch."""
    options = inputs | {"text_encoder": str(save_text_model(tmp_path / kind, kind)), "train_batch_size": 16}
    setup = setup_of(tmp_path / "run", options)
    batch = next(open_batches(setup, 0))
    texts = setup.data.captions.texts(batch.conditions.captions.tolist())
    assert set(texts) == {"", *COLORS, *(f"a {color} cat" for color in COLORS)}
    encoder, tokenizer = tiny_text_encoder(kind), tiny_tokenizer()
    ids = tokenizer(texts, padding="max_length", truncation=True, return_tensors="pt").input_ids
    with torch.no_grad():
        expected = encoder(ids).last_hidden_state
    received: list[torch.Tensor] = []
    setup.denoiser.register_forward_pre_hook(
        lambda module, args, kwargs: received.append(kwargs["encoder_hidden_states"]), with_kwargs=True
    )
    with torch.no_grad():
        setup.task(batch.pixels, batch.pixels, torch.zeros(16, dtype=torch.long), batch.conditions)
    torch.testing.assert_close(received[0], expected, rtol=1e-5, atol=1e-6)
    assert setup.denoiser.config.cross_attention_dim == 16


@pytest.mark.parametrize("way", ["uncached", "files"])
def test_cached_and_uncached_training_are_equal_to_the_bit(way, frozen, inputs, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if way == "files":
        monkeypatch.setattr(caption_encoder, "KEPT_BYTES", 0)
    run = train(tmp_path / "run", inputs, cache_text_embeddings=way == "files")
    assert contents(run) == contents(frozen)
    assert (tmp_path / "runs").exists() == (way == "files")
    if way == "files":
        monkeypatch.setattr(TextEncoder, "encode", lambda *_: pytest.fail("encoded again"))
        setup = setup_of(tmp_path / "again", inputs)
        loop_captions.open_text_cache(setup)
        assert setup.captions.encode_conditions(next(open_batches(setup, 0)).conditions).captions is None


def test_captions_are_encoded_once_also_after_a_killed_build(inputs, tmp_path, monkeypatch):
    """In files, each caption once, also after a build that was killed at any place."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(caption_encoder, "KEPT_BYTES", 0)
    encoded: list[Any] = []
    limit = 3
    original = TextEncoder.encode

    def encode(self: TextEncoder, ids: torch.Tensor, *args: Any, **options: Any) -> torch.Tensor:
        if len(encoded) == limit:
            raise Killed
        encoded.append(tuple(ids[0].tolist()))
        return original(self, ids, *args, **options)

    setup = setup_of(tmp_path / "run", inputs)
    monkeypatch.setattr("diffusers_ddpm_ext.training.data.text_cache.CAPTIONS_PER_CHUNK", 1)
    monkeypatch.setattr(TextEncoder, "encode", encode)
    with pytest.raises(Killed):
        loop_captions.open_text_cache(setup)
    limit = 100
    loop_captions.open_text_cache(setup)
    assert len(encoded) == len(set(encoded)) == len(setup.data.captions) == 7


# ------------------------------------------------------------------ a trained encoder


def test_a_trained_encoder_is_saved_raw_and_has_no_average(trained, inputs):
    before = tiny_text_encoder().state_dict()
    model = weights(trained, "model")
    after = {name.removeprefix("text_encoder."): t for name, t in model.items() if name.startswith("text_encoder.")}
    assert after.keys() == before.keys()
    changed = {name for name in after if not torch.equal(after[name], before[name])}
    assert {name for name in after if "layers.0" in name and "k_proj.bias" not in name} <= changed
    assert not any("text" in name for name in weights(trained, "ema"))
    assert any(name.startswith("text_encoder.") for name in weights(trained, "optimizer"))
    pipeline = DDPMExtPipeline.from_pretrained(trained)
    saved = pipeline.text_encoder.state_dict()
    assert all(torch.equal(saved[name], after[name]) for name in after)


def test_its_first_step_is_that_of_plain_torch(inputs, tmp_path):
    """One step of AdamW on the sum of both networks' gradients, clipped by their common norm."""
    options = inputs | {"train_text_encoder": True, "max_train_steps": 1, "lr_warmup_steps": 0, "use_ema": False}
    setup = setup_of(tmp_path / "run", options)
    encoder = tiny_text_encoder().train()
    denoiser = type(setup.denoiser).from_config(setup.denoiser.config)
    denoiser.load_state_dict(setup.denoiser.state_dict())
    seen: dict[str, Any] = {}

    def remember(module: Any, args: Any, kwargs: Any, output: Any) -> None:
        seen.update(args=args, kwargs=kwargs, output=output.sample)

    handle = setup.denoiser.register_forward_hook(remember, with_kwargs=True)
    batches = open_batches(setup, 0)
    batch = next(open_batches(setup, 0))
    trainer.train_step(setup, 0, batches)
    handle.remove()
    ids = setup.data.captions.input_ids(batch.conditions.captions)
    xt, t = seen["args"]
    prediction = denoiser(xt, t, encoder_hidden_states=encoder(ids).last_hidden_state).sample
    abar = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 50, dtype=torch.float64), 0)[t].reshape(-1, 1, 1, 1)
    noise = ((xt - abar.sqrt() * batch.pixels) / (1 - abar).sqrt()).float()
    (prediction - noise).square().mean().backward()
    parameters = [*denoiser.parameters(), *encoder.parameters()]
    torch.nn.utils.clip_grad_norm_(parameters, 0.1)
    torch.optim.AdamW(parameters, 2e-3, (0.95, 0.999), 1e-8, 1e-6).step()
    for own, expected in ((setup.captions.module, encoder), (setup.denoiser, denoiser)):
        for (name, value), (_, wanted) in zip(own.named_parameters(), expected.named_parameters(), strict=True):
            torch.testing.assert_close(value, wanted, rtol=1e-3, atol=2e-4, msg=name)


@pytest.mark.slow
def test_accumulated_steps_train_the_encoder_alike(inputs, tmp_path):
    options = inputs | {"train_text_encoder": True, "save_images_steps": None, "checkpointing_steps": 4}
    whole = train(tmp_path / "whole", options)
    parts = train(tmp_path / "parts", options, train_batch_size=4, gradient_accumulation_steps=2)
    first, second = weights(whole, "model"), weights(parts, "model")
    for name, tensor in first.items():
        torch.testing.assert_close(second[name], tensor, rtol=1e-3, atol=1e-4)


UNUSED = {"projection": ["text_projection.weight"], "bert": ["to_logits.weight", "to_logits.bias"]}


@pytest.mark.parametrize("kind", [pytest.param("projection", marks=pytest.mark.slow), "t5", "bert"])
def test_weights_that_no_token_depends_on_are_not_trained(kind, inputs, tmp_path):
    options = inputs | {"text_encoder": str(save_text_model(tmp_path / kind, kind)), "train_text_encoder": True}
    setup = setup_of(tmp_path / "run", options)
    module = setup.captions.module
    frozen = [name for name, weight in module.named_parameters() if not weight.requires_grad]
    assert frozen == UNUSED.get(kind, [])
    batch = next(open_batches(setup, 0))
    setup.task(batch.pixels, batch.pixels, torch.ones(8, dtype=torch.long), batch.conditions).loss.backward()
    trained_weights = [weight for weight in module.parameters() if weight.requires_grad]
    assert all(weight.grad is not None for weight in trained_weights)
    assert {id(w) for w in setup.network_parameters} >= {id(w) for w in trained_weights}


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_mixed_precision(precision, inputs, tmp_path):
    if precision == "fp16" and not torch.cuda.is_available():
        pytest.skip("float16 needs a GPU")
    run = train(tmp_path / "run", inputs, train_text_encoder=True, mixed_precision=precision)
    assert all(tensor.dtype != torch.bfloat16 for tensor in weights(run, "model").values())
    again = train(tmp_path / "again", inputs, train_text_encoder=True, mixed_precision=precision)
    assert contents(run) == contents(again)


# ------------------------------------------------------------------ resuming


def kill_at(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, call: int) -> None:
    """Replace a function by one that is killed at that call, before it does anything."""
    real, calls = getattr(owner, name), [0]

    def last(*arguments: Any, **named: Any) -> Any:
        calls[0] += 1
        if calls[0] == call:
            raise Killed
        return real(*arguments, **named)

    monkeypatch.setattr(owner, name, last)


PLACES: list[tuple[str, str, int]] = [
    ("diffusers_ddpm_ext.training.trainer", "train_step", 1),
    ("diffusers_ddpm_ext.training.trainer", "train_step", 4),
    ("diffusers_ddpm_ext.training.loop.tasks", "validate", 1),
    ("diffusers_ddpm_ext.training.loop.saving", "write_checkpoint", 2),
    ("diffusers_ddpm_ext.training.loop.workload", "save_pipeline", 1),
    ("diffusers_ddpm_ext.training.loop.workload", "save_pipeline", 2),
]


@pytest.mark.parametrize("place", [pytest.param(p, marks=[pytest.mark.slow] * (p != PLACES[1])) for p in PLACES])
@pytest.mark.parametrize("is_trained", [False, True], ids=["frozen", "trained"])
def test_a_killed_run_resumes_to_the_bit(is_trained, place, frozen, trained, inputs, tmp_path, monkeypatch):
    import importlib

    module, name, call = place
    options = inputs | {"train_text_encoder": is_trained, "cache_text_embeddings": not is_trained}
    with monkeypatch.context() as patch:
        kill_at(patch, importlib.import_module(module), name, call)
        with pytest.raises(Killed):
            train(tmp_path / "run", options)
    train(tmp_path / "run", options, resume_from_checkpoint="auto")
    assert contents(tmp_path / "run") == contents(trained if is_trained else frozen)


def copy_of(run: Path, folder: Path) -> Path:
    shutil.copytree(run, folder)
    shutil.rmtree(folder / "checkpoint-4")
    (folder / "finished.json").unlink()
    return folder


def other_tokenizer(folder: Path) -> dict[str, Any]:
    tiny_tokenizer(length=6).save_pretrained(folder / "tokenizer")
    return {"tokenizer": str(folder / "tokenizer")}


REFUSED: list[tuple[Callable[[Path], dict[str, Any]], str]] = [
    (lambda folder: {"text_encoder": str(save_text_model(folder / "e", seed=1))}, "is another text encoder"),
    (other_tokenizer, r"--text_encoder is another text encoder, or has another tokenizer \(sha256"),
    (lambda folder: {"train_text_encoder": True}, "--train_text_encoder is True and was False"),
    (lambda folder: {"conditioning_dropout": None}, "--conditioning_dropout is None and was"),
    (
        lambda folder: {"train_data_dir": str(write_pictures(folder / "p", captions=1))},
        "the images or their conditions are not those of the run",
    ),
]


@pytest.mark.parametrize(
    ("change", "message"), REFUSED, ids=["encoder", "tokenizer", "trained", "dropout", "captions"]
)
def test_another_run_is_refused(change, message, frozen, inputs, tmp_path):
    run = copy_of(frozen, tmp_path / "run")
    before = sorted(path.name for path in run.iterdir())
    with pytest.raises(ConfigError, match=message):
        train(run, inputs | change(tmp_path), resume_from_checkpoint="latest")
    assert sorted(path.name for path in run.iterdir()) == before


@pytest.mark.slow
def test_a_moved_encoder_is_the_same(frozen, inputs, tmp_path):
    run = copy_of(frozen, tmp_path / "run")
    shutil.copytree(inputs["text_encoder"], tmp_path / "moved")
    moved = inputs | {"text_encoder": str(tmp_path / "moved"), "tokenizer": inputs["text_encoder"]}
    train(run, moved, resume_from_checkpoint="latest", cache_text_embeddings=False)
    assert contents(run) == contents(frozen)


# ------------------------------------------------------------------ previews and the saved pipeline


def test_the_saved_pipeline_draws_by_prompt(frozen, inputs):
    pipeline = DDPMExtPipeline.from_pretrained(frozen)
    pipeline.set_progress_bar_config(disable=True)

    def draw(scale: float) -> Any:
        generator = torch.Generator().manual_seed(1)
        options = {"num_inference_steps": 3, "output_type": "np", "guidance_scale": scale}
        return pipeline(prompt="a red cat", generator=generator, **options).images

    images = [draw(scale) for scale in (1.0, 3.0)]
    assert abs(images[0] - images[1]).max() > 1e-4
    prompts = json.loads((frozen / "environment.json").read_text())["data"]["prompts"]
    assert len(prompts) == 9
    assert set(prompts) == set(COLORS), "the first caption of each validation image"


def test_prompts_of_previews(inputs, tmp_path, monkeypatch):
    """They are drawn below the samples, and each row of samples is what the pipeline draws of its prompt."""
    seen: list[Any] = []
    call = DDPMExtPipeline.__call__
    monkeypatch.setattr(DDPMExtPipeline, "__call__", lambda self, *a, **k: (seen.append(k), call(self, *a, **k))[1])
    options = inputs | {"preview_prompts": ["a blue dog", ""], "preview_guidance_scale": 2.0, "max_train_steps": 2}
    run = train(tmp_path / "run", options)
    assert seen[-1]["prompt"] == ["a blue dog", ""]
    prompts = json.loads((run / "environment.json").read_text())["data"]["prompts"]
    assert prompts[:3] == ["a blue dog", "", "a blue dog"]


def test_a_run_from_a_pipeline_goes_on_with_its_text_encoder(trained, inputs, tmp_path):
    options = {name: value for name, value in inputs.items() if name != "text_encoder"}
    setup = setup_of(tmp_path / "run", options, ckpt_path=str(trained))
    assert setup.config.text.text_encoder == str(trained)
    expected = DDPMExtPipeline.from_pretrained(trained).text_encoder.state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in setup.captions.module.state_dict().items())


def test_captions_in_latents(inputs, tmp_path):
    tiny_autoencoder("kl", channels=3, latent_channels=2).save_pretrained(tmp_path / "vae")
    options = inputs | {"vae": str(tmp_path / "vae"), "center_crop": True, "max_train_steps": 2}
    plain = train(tmp_path / "plain", options)
    cached = train(tmp_path / "cached", options, cache_latents=str(tmp_path / "latents"), cache_text_embeddings=False)
    assert contents(plain, 2) == contents(cached, 2)
    pipeline = DDPMExtPipeline.from_pretrained(plain)
    assert pipeline.text_encoder_stage.width == 16
    assert pipeline.vae is not None


# ------------------------------------------------------------------ wrong inputs


def network(width: Any) -> dict[str, Any]:
    return {
        "_class_name": "UNet2DConditionModel", "cross_attention_dim": width, "block_out_channels": [8, 16],
        "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"], "norm_num_groups": 4, "layers_per_block": 1,
        "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"], "attention_head_dim": 4,
    }  # fmt: skip


def new_encoder(**changes: Any) -> dict[str, Any]:
    """Options of a run that trains a text encoder from random weights; other names are settings of the encoder."""
    options: dict[str, Any] = {"train_text_encoder": True, "tokenizer": TOKENIZER, "cache_text_embeddings": False}
    settings = {
        "_class_name": "LDMBertModel", "vocab_size": len(tiny_tokenizer()), "max_position_embeddings": 8,
        "d_model": 16, "encoder_layers": 1, "encoder_ffn_dim": 32, "encoder_attention_heads": 2, "head_dim": 8,
        "dropout": 0.0,
    }  # fmt: skip
    settings |= {name: value for name, value in changes.items() if name not in options}
    changes = {name: value for name, value in changes.items() if name in options}
    return options | {"text_encoder_config": settings} | changes


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"caption_column": None}, "--text_encoder .* needs --caption_column"),
    ({"text_encoder": None}, "--caption_column text needs --text_encoder"),
    ({"conditioning_key": "adm"}, "--conditioning_key adm has none: use crossattn"),
    ({"text_encoder": "/no/folder"}, "--text_encoder /no/folder does not exist"),
    ({"text_encoder": "model.ckpt"}, "--text_encoder model.ckpt is a file, and must be a folder"),
    ({"text_encoder_subfolder": "encoder"}, "--text_encoder_subfolder encoder does not exist in"),
    ({"tokenizer": "/no/folder"}, "--tokenizer /no/folder does not exist"),
    ({"train_text_encoder": True, "cache_text_embeddings": True}, "--cache_text_embeddings has no effect with"),
    ({"model_config": network(24)}, "cross_attention_dim is 24, and the tokens of --text_encoder have width 16"),
    ({"model_config": network([16, 32])}, r"cross_attention_dim is \[16, 32\], and the tokens"),
    ({"context_column": "x"}, "--context_column x .*--caption_column"),
    (
        {"text_encoder_config": {"_class_name": "CLIPTextModel"}},
        "--text_encoder and --text_encoder_config .*contradict",
    ),
    (
        {"text_encoder": None} | new_encoder(train_text_encoder=False),
        "--text_encoder_config needs --train_text_encoder",
    ),
    ({"text_encoder": None} | new_encoder(tokenizer=None), "--text_encoder_config needs --tokenizer: it has none"),
    ({"text_encoder": None} | new_encoder(_class_name="GPT2Model"), "_class_name is 'GPT2Model'; it must be one of"),
    ({"text_encoder": None} | new_encoder(n_embed=8), "--text_encoder_config: LDMBertModel has no n_embed"),
    ({"text_encoder": None} | new_encoder(d_model=0), "--text_encoder_config: d_model is 0; it must be an integer"),
    (
        {"text_encoder": None} | new_encoder(d_model=60_000, vocab_size=9_000_000),
        "--text_encoder_config: the weights take",
    ),
    ({"text_encoder": None} | new_encoder(vocab_size=100), "--tokenizer: .* the text encoder has the tokens 0..99"),
]


@pytest.mark.parametrize(("change", "message"), WRONG)
def test_wrong_options_are_one_line(change, message, inputs, tmp_path):
    sizes = dict.fromkeys(MODEL_SIZES) if "model_config" in change else {}
    if change.get("tokenizer") == TOKENIZER:
        change = change | {"tokenizer": inputs["text_encoder"]}
    with pytest.raises(ConfigError, match=message) as error:
        setup_of(tmp_path / "run", inputs, **sizes, **change)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("flag", ["--train_text_encoder", "--preview_prompts x", "--tokenizer gpt2"])
def test_options_of_captions_need_captions(flag):
    with pytest.raises(ConfigError, match=f"{flag.split()[0]} .* has no effect without --text_encoder"):
        parse_train_args(flag.split())


def test_a_new_encoder_depends_on_the_seed_alone(inputs, tmp_path):
    options = inputs | {"text_encoder": None} | new_encoder(tokenizer=inputs["text_encoder"])
    first, again, other = (setup_of(tmp_path / "run", options, seed=seed).captions for seed in (1, 1, 2))
    assert first.content_hash == again.content_hash != other.content_hash
    run = train(tmp_path / "whole", options)
    assert DDPMExtPipeline.from_pretrained(run).text_encoder.config.d_model == 16
    changed = options | {"text_encoder_config": options["text_encoder_config"] | {"encoder_ffn_dim": 64}}
    copy = copy_of(run, tmp_path / "copy")
    with pytest.raises(ConfigError, match="is another text encoder"):
        train(copy, changed, resume_from_checkpoint="latest")
    train(tmp_path / "copy", options, resume_from_checkpoint="latest")
    assert contents(tmp_path / "copy") == contents(run)


def test_tokens_that_are_not_finite_are_one_line(inputs, tmp_path):
    encoder = tiny_text_encoder()
    torch.nn.init.constant_(encoder.get_parameter("final_layer_norm.weight"), 3e38)
    save_encoder(encoder, tmp_path / "large")
    tiny_tokenizer().save_pretrained(tmp_path / "large")
    setup = setup_of(tmp_path / "run", inputs, text_encoder=str(tmp_path / "large"))
    with pytest.raises(ConfigError, match=r"--text_encoder: .*not finite"):
        setup.captions.encode_numbers(torch.tensor([0]))


def test_an_encoder_without_a_tokenizer_says_how_to_name_one(inputs, tmp_path):
    save_encoder(tiny_text_encoder(), tmp_path / "alone")
    with pytest.raises(ConfigError, match=r"--text_encoder .* comes without a tokenizer: name one with --tokenizer"):
        setup_of(tmp_path / "run", inputs, text_encoder=str(tmp_path / "alone"))
    setup = setup_of(tmp_path / "run", inputs, text_encoder=str(tmp_path / "alone"), tokenizer=inputs["text_encoder"])
    assert setup.captions.shape == (8, 16)


# ------------------------------------------------------------------ recipes of CompVis' configurations


def compvis_config(stage: dict[str, Any], latent: bool, **params: Any) -> dict[str, Any]:
    unet = {
        "image_size": 8, "in_channels": 2 if latent else 3, "out_channels": 2 if latent else 3, "model_channels": 32,
        "attention_resolutions": [2], "num_res_blocks": 1, "channel_mult": [1, 1], "num_heads": 2,
        "use_spatial_transformer": True, "transformer_depth": 1, "context_dim": 16, "legacy": False,
    }  # fmt: skip
    first = {"target": "ldm.models.autoencoder.IdentityFirstStage"}
    if latent:
        dd = {"double_z": True, "z_channels": 2, "resolution": 8, "in_channels": 3, "out_ch": 3, "ch": 32,
              "ch_mult": [1, 1], "num_res_blocks": 1, "attn_resolutions": [], "dropout": 0.0}  # fmt: skip
        first = {"target": "ldm.models.autoencoder.AutoencoderKL", "params": {"embed_dim": 2, "ddconfig": dd}}
    model = {
        "unet_config": {"target": "ldm.modules.diffusionmodules.openaimodel.UNetModel", "params": unet},
        "first_stage_config": first, "cond_stage_config": stage, "conditioning_key": "crossattn", "timesteps": 20,
        "image_size": 4 if latent else 8, "channels": 2 if latent else 3, "cond_stage_key": "caption", **params,
    }  # fmt: skip
    return {
        "model": {"target": "ldm.models.diffusion.ddpm.LatentDiffusion", "base_learning_rate": 1e-4, "params": model}
    }


STAGES = {
    "bert": {"target": "ldm.modules.encoders.modules.BERTEmbedder", "params": {"n_embed": 16, "n_layer": 1}},
    "clip": {"target": "ldm.modules.encoders.modules.FrozenCLIPEmbedder", "params": {}},
    "openclip": {"target": "ldm.modules.encoders.modules.FrozenOpenCLIPEmbedder", "params": {"freeze": False}},
}
FLAGS = {
    "bert": "--caption_column COLUMN",
    "clip": "--text_encoder openai/clip-vit-large-patch14 --caption_column COLUMN",
    "openclip": "--text_encoder FOLDER --caption_column COLUMN",
}


@pytest.mark.parametrize(
    "kind", ["bert", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("clip", "openclip"))]
)
@pytest.mark.parametrize("latent", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["pixels", "latents"])
def test_the_recipe_of_a_text_model_runs(latent, kind, inputs, tmp_path, capsys):
    """The stage is trained where the original trains it: not where its class freezes its weights."""
    dropout = {"caption": {"p": 0.1, "val": ""}}
    content = compvis_config(STAGES[kind], latent, cond_stage_trainable=True, ucg_training=dropout)
    (tmp_path / "model.yaml").write_text(yaml.safe_dump(content))
    assert main(["convert-config", str(tmp_path / "model.yaml"), "--out", str(tmp_path / "run.yaml")]) == 0
    assert f"--train_data_dir FOLDER {FLAGS[kind]}" in capsys.readouterr().out
    flags = [
        "--config",
        str(tmp_path / "run.yaml"),
        "--train_data_dir",
        inputs["train_data_dir"],
        "--report_to",
        "none",
    ]
    flags += ["--output_dir", str(tmp_path / "run"), "--caption_column", "text", "--tokenizer", inputs["text_encoder"]]
    flags += ["--max_train_steps", "1", "--num_preview_images", "1", "--train_batch_size", "4"]
    flags += ["--ddpm_num_inference_steps", "2"]
    if kind != "bert":
        flags += ["--text_encoder", inputs["text_encoder"]]
    if latent:
        tiny_autoencoder("kl", channels=3, latent_channels=2).save_pretrained(tmp_path / "vae")
        flags += ["--vae", str(tmp_path / "vae"), "--cache_latents", str(tmp_path / "cache"), "--center_crop"]
    reset_accelerate()
    assert main(["train", *flags]) == 0, capsys.readouterr().err
    output = capsys.readouterr().out
    assert ("frozen" if kind == "clip" else "trained") in output.split("text encoder ")[1].splitlines()[0]
    pipeline = DDPMExtPipeline.from_pretrained(tmp_path / "run")
    assert pipeline.text_encoder_stage.kind == ("bert" if kind == "bert" else "clip")
