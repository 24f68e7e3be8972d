"""Whole checkpoints with a text encoder: from token ids to the picture, folders, and back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from helpers.published_models import SEED, samples_of, seeded_state
from helpers.text_models import save_text_model, tiny_tokenizer
from helpers.text_stages import SHAPES, TextShape, recorded, seeded_stage, token_ids, whole_model
from torch import Tensor

from diffusers_ddpm_ext import DDPMExtPipeline
from diffusers_ddpm_ext.cli import main
from diffusers_ddpm_ext.compvis import load_compvis, save_compvis
from diffusers_ddpm_ext.compvis.reader.archive import read_tensors
from diffusers_ddpm_ext.compvis.save import compvis_config

PREFIX = "cond_stage_model."
WHOLE = {name: numbers for name, numbers in recorded().items() if name.split()[-1] in ("kl", "vq")}
VOCABULARY = len(tiny_tokenizer())


def parts(name: str) -> tuple[TextShape, str]:
    shape, _, first = name.rpartition(" ")
    return SHAPES[shape], first


def write(
    folder: Path, name: str, dtype: torch.dtype = torch.float32, tiny_table: bool = False, **stage: Any
) -> tuple[Path, Path]:
    """Checkpoint and configuration of a recorded model; ``stage`` are arguments of its text encoder.

    With ``tiny_table`` the encoder has the tokens of `tiny_tokenizer`.
    """
    shape, first = parts(name)
    content = whole_model(shape, first)
    content["model"]["params"]["cond_stage_config"]["params"] |= stage
    state = seeded_state(whole_model(shape, first)) | seeded_stage(WHOLE[name]["shapes"], PREFIX)
    if tiny_table:
        name = next(key for key in state if key.endswith("token_embedding.weight"))
        state[name] = torch.randn(VOCABULARY, shape.width, generator=torch.Generator().manual_seed(0))
    torch.save({"state_dict": {key: tensor.to(dtype) for key, tensor in state.items()}}, folder / "m.ckpt")
    (folder / "m.yaml").write_text(yaml.safe_dump(content))
    return folder / "m.ckpt", folder / "m.yaml"


def draw(pipeline: DDPMExtPipeline, **arguments: Any) -> Tensor:
    """Latents, with noise from the global generator, as the original draws it."""
    pipeline.set_progress_bar_config(disable=True)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        latents: Tensor = pipeline(batch_size=2, output_type="latent", **arguments).images
    return latents


def assert_back(path: Path, source: Path) -> None:
    back, tensors = read_tensors(path), read_tensors(source)
    assert set(tensors) <= set(back)
    assert [key for key in tensors if not torch.equal(back[key].float(), tensors[key].float())] == []
    assert {key for key in back if key.startswith(PREFIX)} == {key for key in tensors if key.startswith(PREFIX)}


@pytest.mark.parametrize("name", ["clip 1 kl", "bert 1 vq", *(pytest.param(name, marks=pytest.mark.slow) for name in
                                  WHOLE if name not in ("clip 1 kl", "bert 1 vq"))])  # fmt: skip
def test_from_token_ids_to_the_picture_as_the_original(name, tmp_path):
    checkpoint, config = write(tmp_path, name)
    pipeline = load_compvis(checkpoint, config)
    latents = draw(pipeline, input_ids=token_ids(parts(name)[0]))
    assert samples_of(latents) == pytest.approx(WHOLE[name]["latents"], abs=1e-5)
    assert samples_of(pipeline.decode_latents(latents)) == pytest.approx(WHOLE[name]["picture"], abs=1e-5)
    save_compvis(pipeline, tmp_path / "back.ckpt", base=checkpoint, use_ema=False)
    assert_back(tmp_path / "back.ckpt", checkpoint)
    save_compvis(pipeline, tmp_path / "back.ckpt", use_ema=False)  # the tensors left out are still in memory
    assert_back(tmp_path / "back.ckpt", checkpoint)


def test_the_command_both_ways(tmp_path, capsys):
    """open_clip's: what conditioning does not use comes from --base."""
    checkpoint, config = write(tmp_path, "open_clip 1 kl", dtype=torch.float16)
    source = ["--checkpoint", str(checkpoint), "--config", str(config)]
    folder, back = tmp_path / "folder", tmp_path / "back.ckpt"
    assert main(["convert", "--from", "compvis", *source, "--out", str(folder)]) == 0
    output = capsys.readouterr().out
    assert "1 is assumed; give another with text_heads (--text_heads)" in output
    report = json.loads((folder / "conversion.json").read_text())
    assert {row["target"] for row in report["tensors"]["text_encoder"]} == set(
        load_compvis(checkpoint, config).text_encoder.state_dict()
    )
    why = {row["source"]: row["why"] for row in report["left_out"]}
    assert "similarity" in why["cond_stage_model.model.text_projection"]
    assert "penultimate" in why["cond_stage_model.model.transformer.resblocks.2.ln_1.weight"]
    section = report["facts"]["conditioners"]["cond_stage_config"]["section"]
    assert section["params"] == {"freeze": True, "layer": "penultimate"}
    rows = {row["key"]: row for row in report["configuration"]}
    assert rows["model.params.cond_stage_config"]["fate"] == "translated"
    assert rows["model.params.cond_stage_config.params.layer"]["fate"] == "translated"
    assert main(["convert", "--check", str(folder), *source]) == 0
    assert main(["convert", "--to", "compvis", str(folder), "--out", str(back)]) == 2
    assert "14 tensors that its conditioning does not use" in capsys.readouterr().err
    assert not back.exists()
    again = ["--base", str(checkpoint), "--config_out", str(tmp_path / "back.yaml"), "--no_ema"]
    assert main(["convert", "--to", "compvis", str(folder), "--out", str(back), *again]) == 0
    assert_back(back, checkpoint)
    params = yaml.safe_load((tmp_path / "back.yaml").read_text())["model"]["params"]
    assert params["cond_stage_config"] == section
    assert params["cond_stage_key"] == "caption"


def test_a_changed_text_encoder_is_a_difference(tmp_path, capsys):
    checkpoint, config = write(tmp_path, "clip 1 kl")
    source = ["--checkpoint", str(checkpoint), "--config", str(config)]
    folder = tmp_path / "folder"
    assert main(["convert", "--from", "compvis", *source, "--out", str(folder)]) == 0
    pipeline = DDPMExtPipeline.from_pretrained(folder)
    with torch.no_grad():
        pipeline.text_encoder.get_input_embeddings().weight[3] += 1
    pipeline.save_pretrained(folder)
    assert main(["convert", "--check", str(folder), *source]) == 1
    assert "text_encoder embeddings.token_embedding.weight differs" in capsys.readouterr().err
    pipeline.text_encoder = None
    save_compvis(pipeline, tmp_path / "back.ckpt", base=checkpoint, use_ema=False)
    assert_back(tmp_path / "back.ckpt", checkpoint)


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_text_model(tmp_path_factory.mktemp("tokenizer"))


def test_prompts_with_a_tokenizer(tokenizer_folder, tmp_path):
    """Padded to max_length as the original does; a prompt is its token ids."""
    checkpoint, config = write(tmp_path, "clip 1 kl", tiny_table=True, max_length=9)
    pipeline = load_compvis(checkpoint, config, tokenizer=tokenizer_folder)
    ids = pipeline.text_encoder_stage.tokenize(["red cat", "a dog"])
    assert ids.shape == (2, 9)
    assert torch.equal(draw(pipeline, prompt=["red cat", "a dog"]), draw(pipeline, input_ids=ids))
    own = tiny_tokenizer(length=5)
    loaded = load_compvis(checkpoint, config, tokenizer=own)
    assert own.model_max_length == 5, "the caller's is not changed"
    assert loaded.text_encoder_stage.max_length == 9
    source = ["--checkpoint", str(checkpoint), "--config", str(config), "--tokenizer", str(tokenizer_folder)]
    folder = tmp_path / "folder"
    assert main(["convert", "--from", "compvis", *source, "--out", str(folder), "--text_heads", "1"]) == 0
    assert torch.equal(DDPMExtPipeline.from_pretrained(folder).text_encoder_stage.tokenize(["red cat", "a dog"]), ids)
    assert main(["convert", "--check", str(folder), *source]) == 0


def test_open_clip_pads_with_token_0(tmp_path, caplog):
    checkpoint, config = write(tmp_path, "open_clip 1 kl", tiny_table=True, max_length=9)
    pipeline = load_compvis(checkpoint, config, tokenizer=tiny_tokenizer(), text_heads=1)
    assert "pads with token 0, '!', as the original does" in caplog.text
    ids = pipeline.text_encoder_stage.tokenize(["cat"])[0]
    assert ids.shape == (77,), "open_clip's tokenizer knows no max_length"
    assert ids[:4].tolist() == [VOCABULARY - 2, tiny_tokenizer().convert_tokens_to_ids("cat</w>"), VOCABULARY - 1, 0]
    assert not ids[4:].any()


def test_heads_beside_the_tokenizer(tmp_path):
    """A config.json of the encoder in the tokenizer's folder, or in text_encoder beside it, if its width fits."""
    from diffusers_ddpm_ext.models.text_encoder_saving import save_encoder

    checkpoint, config = write(tmp_path, "clip 1 kl", tiny_table=True)
    encoder = load_compvis(checkpoint, config, text_heads=4).text_encoder
    assert encoder.config.num_attention_heads == 4
    save_encoder(encoder, tmp_path / "model" / "text_encoder")
    tiny_tokenizer(77).save_pretrained(tmp_path / "model" / "tokenizer")
    pipeline = load_compvis(checkpoint, config, tokenizer=tmp_path / "model" / "tokenizer")
    assert pipeline.text_encoder.config.num_attention_heads == 4
    other = save_text_model(tmp_path / "other")  # of width 16
    assert load_compvis(checkpoint, config, tokenizer=other).text_encoder.config.num_attention_heads == 1


def test_stages_that_are_left_out(tmp_path, caplog):
    checkpoint, config = write(tmp_path, "clip 1 kl")
    assert load_compvis(checkpoint, config, load_only_unet=True).text_encoder is None
    assert load_compvis(checkpoint, config, ignore_keys=[PREFIX]).text_encoder is None
    tensors = {key: tensor for key, tensor in read_tensors(checkpoint).items() if not key.startswith(PREFIX)}
    torch.save({"state_dict": tensors}, tmp_path / "pruned.ckpt")
    assert load_compvis(tmp_path / "pruned.ckpt", config).text_encoder is None
    for stage, reason in (
        ({"layer": "hidden", "layer_idx": 1}, "layer hidden"),
        ({"layer": "pooled"}, "layer pooled"),
    ):
        path, changed = write(tmp_path, "clip 1 kl", **stage)
        pipeline = load_compvis(path, changed)
        assert f"left out, its embeddings can be given: {reason}" in caplog.text
        assert pipeline.text_encoder is None
        draw(pipeline, encoder_hidden_states=torch.randn(2, 3, 64))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layr": "last"}, "did you mean layer; or leave the stage out: ignore_keys cond_stage_model."),
        ({"max_length": 100}, "max_length 100 is more than the 77 positions"),
    ],
)
def test_arguments_are_refused_in_one_line(change, message, tmp_path, capsys):
    checkpoint, config = write(tmp_path, "clip 1 kl", **change)
    source = ["--checkpoint", str(checkpoint), "--config", str(config)]
    assert main(["convert", "--from", "compvis", *source, "--out", str(tmp_path / "folder")]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "folder").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--text_heads", "7"], "7 attention heads (text_heads (--text_heads)) do not divide the width 64"),
        (["--text_heads", "0"], "--text_heads"),
        (["--tokenizer", "no/such/folder"], "no/such/folder"),
        (["--tokenizer", "TMP"], "TMP"),
        (["--load_only_unet", "--tokenizer", "TOKENIZER"], "no text encoder that is converted: leave it out"),
        (["--load_only_unet", "--text_heads", "1"], "text_heads 1 has no effect"),
        (["--samples", "2"], "with --prompt for a text"),
    ],
)
def test_options_that_do_not_fit(options, message, tokenizer_folder, tmp_path, capsys):
    checkpoint, config = write(tmp_path, "clip 1 kl")
    places = {"TMP": str(tmp_path), "TOKENIZER": str(tokenizer_folder)}
    source = ["--checkpoint", str(checkpoint), "--config", str(config), *(places.get(each, each) for each in options)]
    assert main(["convert", "--from", "compvis", *source, "--out", str(tmp_path / "folder")]) == 2
    error = capsys.readouterr().err
    assert places.get(message, message) in error
    assert error.count("\n") == 1
    assert not (tmp_path / "folder").exists()


def test_tokenizers_that_do_not_fit(tmp_path):
    checkpoint, config = write(tmp_path, "bert 1 vq")  # 99 tokens
    with pytest.raises(ValueError, match=r"tokens 0\.\.98: they are of different models"):
        load_compvis(checkpoint, config, tokenizer=tiny_tokenizer())
    with pytest.raises(ValueError, match="tokenizer is 7; pass a tokenizer of Transformers"):
        load_compvis(checkpoint, config, tokenizer=7)
    checkpoint, config = write(tmp_path, "transformer 1 vq")
    with pytest.raises(ValueError, match="TransformerEmbedder takes token ids, input_ids, without a tokenizer"):
        load_compvis(checkpoint, config, tokenizer=tiny_tokenizer())
    with pytest.raises(ValueError, match="no text encoder of CLIP: leave it out"):
        load_compvis(checkpoint, config, text_heads=2)


def test_another_base_is_refused(tmp_path):
    checkpoint, config = write(tmp_path, "clip 1 kl")
    pipeline = load_compvis(checkpoint, config)
    (tmp_path / "other").mkdir()
    other = write(tmp_path / "other", "open_clip 1 kl")[0]
    with pytest.raises(ValueError, match="base has another conditioning stage than the pipeline's FrozenCLIPEmbedder"):
        save_compvis(pipeline, tmp_path / "back.ckpt", base=other)
    assert not (tmp_path / "back.ckpt").exists()


def test_a_pipeline_of_unknown_origin(tmp_path):
    """Its text encoder is written as the class that base has, else as the first that has such a network."""
    checkpoint, config = write(tmp_path, "open_clip 1 kl")
    pipeline = load_compvis(checkpoint, config)
    pipeline.compvis_facts = pipeline.compvis_weights = None
    save_compvis(pipeline, tmp_path / "back.ckpt", base=checkpoint, use_ema=False)
    assert_back(tmp_path / "back.ckpt", checkpoint)
    stage = compvis_config(pipeline, base=checkpoint)["model"]["params"]["cond_stage_config"]
    assert stage["target"].endswith(".FrozenOpenCLIPEmbedder")
    assert stage["params"]["layer"] == "penultimate"
    save_compvis(pipeline, tmp_path / "clip.ckpt", use_ema=False)
    stage = compvis_config(pipeline)["model"]["params"]["cond_stage_config"]
    assert stage["target"].endswith(".FrozenCLIPEmbedder")
    assert f"{PREFIX}transformer.text_model.final_layer_norm.weight" in read_tensors(tmp_path / "clip.ckpt")


@pytest.mark.parametrize("has_first_stage", [True, False])
def test_a_pipeline_that_was_not_converted(has_first_stage, tmp_path):
    """Its version is the folder of its encoder, whose config.json has the heads; max_length is the tokenizer's."""
    checkpoint, config = write(tmp_path, "clip 1 kl", tiny_table=True)
    ignored = [] if has_first_stage else ["first_stage_model."]
    pipeline = load_compvis(checkpoint, config, tokenizer=tiny_tokenizer(), text_heads=4, ignore_keys=ignored)
    pipeline.tokenizer.model_max_length = 9
    pipeline.save_pretrained(tmp_path / "folder")
    folder = tmp_path / "folder"
    save_compvis(folder, tmp_path / "back.ckpt", use_ema=False)
    content = compvis_config(folder, use_ema=False)
    params = content["model"]["params"]
    version = str(folder / "text_encoder")
    assert params["cond_stage_config"]["params"] == {"version": version, "max_length": 9}
    first = params["first_stage_config"]["target"].rpartition(".")[2]
    assert first == ("AutoencoderKL" if has_first_stage else "IdentityFirstStage")
    back = load_compvis(tmp_path / "back.ckpt", content, tokenizer=tiny_tokenizer())
    assert torch.equal(draw(back, prompt="red cat"), draw(pipeline, prompt="red cat"))


def test_damaged_facts(tmp_path):
    checkpoint, config = write(tmp_path, "open_clip 1 kl")
    pipeline = load_compvis(checkpoint, config)
    facts = json.loads(json.dumps(pipeline.compvis_facts))
    entry = facts["conditioners"]["cond_stage_config"]
    for wrong in (
        {"conditioners": 3},
        {"conditioners": {"cond_stage_config": []}},
        {"conditioners": {"other": entry}},
        {"conditioners": {"cond_stage_config": {"section": {"target": "os.system"}}}},
        {"conditioners": {"cond_stage_config": entry | {"layout": [1]}}},
        {"conditioners": {"cond_stage_config": entry | {"layout": {"left_out": 7}}}},
        {"conditioners": {"cond_stage_config": entry | {"layout": {"left_out": [["x"]]}}}},
        {"conditioners": {"cond_stage_config": entry | {"section": entry["section"] | {"params": {"layer": 1}}}}},
    ):
        pipeline.compvis_facts = facts | wrong
        with pytest.raises(ValueError, match=r"conversion\.json|tensors that") as raised:
            save_compvis(pipeline, tmp_path / "back.ckpt", base=checkpoint)
        assert "\n" not in str(raised.value)
