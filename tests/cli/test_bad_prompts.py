"""Prompts, token ids, encoders and their folders that are wrong: one line each, status 2, and nothing is written."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.latent_cases import latent_pipeline, write_pictures
from helpers.prompt_cases import text_pipeline, tiny_conditional_unet
from helpers.text_models import save_text_model, tiny_text_encoder, tiny_tokenizer
from helpers.tiny import tiny_unet
from PIL import Image
from safetensors.torch import load_file, save_file

from diffusers_ddpm_ext import DDPMExtPipeline, DDPMExtScheduler, cli
from diffusers_ddpm_ext.models.spatial_rescaler import SpatialRescaler

PROMPT = ["--prompt", "a red cat"]
VOCABULARY = len(tiny_tokenizer())


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Pipelines, encoders, and files that the cases name."""
    root = tmp_path_factory.mktemp("made")
    text_pipeline("clip").save_pretrained(root / "text")
    text_pipeline("clip", tokenizer=None).save_pretrained(root / "ids")
    text_pipeline("bert", is_latent=True).save_pretrained(root / "bert")
    text_pipeline("").save_pretrained(root / "bare")
    DDPMExtPipeline(tiny_unet(), DDPMExtScheduler(20)).save_pretrained(root / "plain")
    latent_pipeline("kl").save_pretrained(root / "latent")
    DDPMExtPipeline(tiny_unet(5, 3), DDPMExtScheduler(20), "concat").save_pretrained(root / "concat")
    rescaler = SpatialRescaler(n_stages=1, in_channels=6, out_channels=2)
    arguments: dict[str, Any] = {"conditioning_key": "hybrid", "concat_encoder": rescaler}
    text_pipeline("clip", unet=tiny_conditional_unet(5, 3), **arguments).save_pretrained(root / "maps")
    save_text_model(root / "encoder")
    save_text_model(root / "wide", width=24)
    tiny_text_encoder().save_pretrained(root / "untokenized")
    write_pictures(root / "pictures", ["a.png", "b.png", "c.png"])
    write_files(root)
    return root


def write_files(root: Path) -> None:
    """Files of prompts, arrays and pictures, right and wrong."""
    texts = {
        "two.txt": "a\nb\n", "none.txt": "\n\n", "json.txt": '{"prompt": "a"}\n', "list.json": '["a"]',
        "bad.jsonl": "a\n", "key.jsonl": '{"promt": "a"}\n', "number.jsonl": '{"prompt": 1}\n',
        "seed.jsonl": '{"prompt": "a", "seed": -1}\n',
        "negative.jsonl": '{"prompt": "a", "negative_prompt": "b"}\n', "empty.npy": "",
    }  # fmt: skip
    for name, text in texts.items():
        (root / name).write_text(text)
    (root / "latin.txt").write_bytes("caf\xe9\n".encode("latin-1"))
    ids = np.full((2, 8), VOCABULARY - 1)
    arrays = {
        "ids": ids, "three": ids[[0, 1, 1]], "floats": ids.astype(float), "flat": ids[0], "long": np.tile(ids, 3),
        "cube": ids[None], "none": ids[:0], "bools": ids > 0, "huge": np.full((1, 8), 2**64 - 1, dtype=np.uint64),
        "beyond": np.where(np.arange(8) == 5, [[3], [VOCABULARY]], 1), "negative": -ids,
    }  # fmt: skip
    for name, array in arrays.items():
        np.save(root / f"{name}.npy", array)
    np.savez(root / "ids.npz", ids=ids)
    np.save(root / "embeds.npy", np.zeros((1, 8, 16)))
    (root / "labels").mkdir()
    Image.fromarray(np.full((16, 16), 6, dtype=np.uint8)).save(root / "labels/a.png")
    (root / "broken").mkdir()
    (root / "broken/a.png").write_bytes(b"\x89PNG\r\n\x1a\nxxxx")
    write_pictures(root / "colors", ["a.png"])
    (root / "nothing").mkdir()


BAD: dict[str, tuple[str, list[str], str]] = {
    "no prompt": ("text", [], "needs --prompt TEXT or --prompts FILE"),
    "no ids": ("ids", [], "needs --prompt TEXT with --tokenizer FOLDER_OR_ID, or --input_ids"),
    "nothing for cross attention": ("bare", [], "needs --encoder_hidden_states FILE.npy, or --prompt TEXT"),
    "nothing after --prompt": ("text", ["--prompt"], "--prompt"),
    "a prompt for pixels alone": ("plain", PROMPT, "takes none"),
    "a prompt for latents alone": ("latent", PROMPT, "takes none"),
    "a prompt for pictures": ("concat", PROMPT, "takes none"),
    "ids for pixels alone": ("plain", ["--input_ids", "ids.npy"], "takes none"),
    "a tokenizer for pixels alone": ("plain", ["--tokenizer", "encoder"], "takes none"),
    "an encoder for pixels alone": ("plain", ["--text_encoder", "encoder"], "takes none"),
    "pictures for no image encoder": ("text", [*PROMPT, "--image", "pictures"], "--image pictures"),
    "a prompt without an encoder": ("bare", PROMPT, "has no text encoder: give --text_encoder"),
    "ids without an encoder": ("bare", ["--input_ids", "ids.npy"], "has no text encoder"),
    "a prompt without a tokenizer": ("ids", PROMPT, "has no tokenizer: give --tokenizer"),
    "a file without a tokenizer": ("ids", ["--prompts", "two.txt"], "has no tokenizer"),
    "an encoder without a tokenizer": ("bare", [*PROMPT, "--text_encoder", "untokenized"], "has no tokenizer"),
    "prompts twice": ("text", [*PROMPT, "--prompts", "two.txt"], "give one of them"),
    "prompt and ids": ("text", [*PROMPT, "--input_ids", "ids.npy"], "give one of them"),
    "prompt and embeddings": ("text", [*PROMPT, "--encoder_hidden_states", "embeds.npy"], "give one of them"),
    "ids and embeddings": ("ids", ["--input_ids", "ids.npy", "--encoder_hidden_states", "embeds.npy"], "give one"),
    "negative without guidance": ("text", [*PROMPT, "--negative_prompt", "b"], "no effect at --guidance_scale 1"),
    "negative alone": ("text", ["--negative_prompt", "b", "--guidance_scale", "2"], "needs --prompt"),
    "three negatives for two": (
        "text",
        ["--prompt", "a", "b", "--negative_prompt", "x", "y", "z", "--guidance_scale", "2"],
        "3 texts for 2 prompts",
    ),
    "two negatives for one": (
        "text",
        [*PROMPT, "--negative_prompt", "x", "y", "--guidance_scale", "2"],
        "2 texts for 1 prompt",
    ),
    "negatives for a file": (
        "text",
        ["--prompts", "two.txt", "--negative_prompt", *"xyz", "--guidance_scale", "2"],
        "3 texts for 2 prompts",
    ),
    "negatives in a file": ("text", ["--prompts", "negative.jsonl"], "no effect at --guidance_scale 1"),
    "negative for ids": (
        "text",
        ["--input_ids", "ids.npy", "--negative_prompt", "x", "--guidance_scale", "2"],
        "--negative_prompt has",
    ),
    "negative ids for prompts": (
        "text",
        [*PROMPT, "--negative_input_ids", "ids.npy", "--guidance_scale", "2"],
        "--negative_prompt",
    ),
    "negative ids without guidance": (
        "ids",
        ["--input_ids", "ids.npy", "--negative_input_ids", "ids.npy"],
        "no effect at --guidance_scale 1",
    ),
    "guided ids without negative ones": (
        "ids",
        ["--input_ids", "ids.npy", "--guidance_scale", "2"],
        "needs --negative_input_ids",
    ),
    "three negative ids for two": (
        "ids",
        ["--input_ids", "ids.npy", "--negative_input_ids", "three.npy", "--guidance_scale", "2"],
        "3 rows and --input_ids 2",
    ),
    "a tokenizer for ids": ("ids", ["--input_ids", "ids.npy", "--tokenizer", "encoder"], "no effect with --input_ids"),
    "a tokenizer for embeddings": (
        "text",
        ["--encoder_hidden_states", "embeds.npy", "--tokenizer", "encoder"],
        "--tokenizer has no effect",
    ),
    "an encoder for embeddings": (
        "text",
        ["--encoder_hidden_states", "embeds.npy", "--text_encoder", "encoder"],
        "--text_encoder has no effect",
    ),
    "a missing file": ("text", ["--prompts", "nowhere.txt"], "does not exist"),
    "a folder for a file": ("text", ["--prompts", "nothing"], "is a folder"),
    "an empty file": ("text", ["--prompts", "none.txt"], "has no prompt"),
    "JSON in text": ("text", ["--prompts", "json.txt"], "rename it to .jsonl"),
    "a JSON file": ("text", ["--prompts", "list.json"], "ends in .txt"),
    "an array of prompts": ("text", ["--prompts", "ids.npy"], "ends in .txt"),
    "Latin-1": ("text", ["--prompts", "latin.txt"], "not UTF-8"),
    "lines that are no objects": ("text", ["--prompts", "bad.jsonl"], "line 1 is not JSON"),
    "a misspelled key": ("text", ["--prompts", "key.jsonl"], "did you mean prompt?"),
    "a number as prompt": ("text", ["--prompts", "number.jsonl"], "it must be a text"),
    "a negative seed": ("text", ["--prompts", "seed.jsonl"], "seed is -1"),
    "a prompt that is no Unicode": ("text", ["--prompt", "a\udcff"], "not valid Unicode"),
    "a negative prompt that is no Unicode": (
        "text",
        [*PROMPT, "--negative_prompt", "\ud800", "--guidance_scale", "2"],
        "not valid Unicode",
    ),
    "a prompt of a million letters": ("text", ["--prompt", "a" * 1_000_000], "characters"),
    "floats as ids": ("ids", ["--input_ids", "floats.npy"], "token ids are integers"),
    "booleans as ids": ("ids", ["--input_ids", "bools.npy"], "token ids are integers"),
    "flat ids": ("ids", ["--input_ids", "flat.npy"], "token ids are (N, tokens)"),
    "a cube of ids": ("ids", ["--input_ids", "cube.npy"], "token ids are (N, tokens)"),
    "no ids in the file": ("ids", ["--input_ids", "none.npy"], "token ids are (N, tokens)"),
    "too many ids": ("ids", ["--input_ids", "long.npy"], "has 24 tokens per row; the text encoder has 8"),
    "an id beyond the table": ("ids", ["--input_ids", "beyond.npy"], f"row 1 has the token {VOCABULARY}"),
    "a negative id": ("ids", ["--input_ids", "negative.npy"], "row 0 has the token -"),
    "an id of 64 bits": ("ids", ["--input_ids", "huge.npy"], "row 0 has the token 18446744073709551615"),
    "ids as npz": ("ids", ["--input_ids", "ids.npz"], "is not a .npy file"),
    "ids as text": ("ids", ["--input_ids", "two.txt"], "is not a .npy file"),
    "a damaged array": ("ids", ["--input_ids", "empty.npy"], "--input_ids"),
    "missing ids": ("ids", ["--input_ids", "nowhere.npy"], "does not exist"),
    "ids beyond another encoder's table": (
        "bare",
        ["--input_ids", "beyond.npy", "--text_encoder", "encoder"],
        f"has the token {VOCABULARY}",
    ),
    "ids too large for another encoder": (
        "bare",
        ["--input_ids", "huge.npy", "--text_encoder", "encoder"],
        "which are no tokens",
    ),
    "an encoder of another width": ("bare", [*PROMPT, "--text_encoder", "wide"], "width 24"),
    "another width in place of the right one": ("text", [*PROMPT, "--text_encoder", "wide"], "width 24"),
    "an encoder that is missing": ("bare", [*PROMPT, "--text_encoder", "./nowhere"], "--text_encoder"),
    "an encoder that is no encoder": ("bare", [*PROMPT, "--text_encoder", "nothing"], "--text_encoder"),
    "a network as encoder": ("bare", [*PROMPT, "--text_encoder", "plain/unet"], "--text_encoder"),
    "a pipeline without an encoder": ("bare", [*PROMPT, "--text_encoder", "plain"], "text_encoder"),
    "a file as encoder": ("bare", [*PROMPT, "--text_encoder", "two.txt"], "--text_encoder"),
    "a tokenizer that is missing": ("ids", [*PROMPT, "--tokenizer", "./nowhere"], "--tokenizer"),
    "a folder without a tokenizer": ("ids", [*PROMPT, "--tokenizer", "untokenized"], "has no tokenizer"),
    "a pipeline without a tokenizer": ("ids", [*PROMPT, "--tokenizer", "plain"], "tokenizer"),
    "five prompts for three pictures": ("maps", ["--prompts", "two.txt", "--concat", "pictures"], "--prompts has 2"),
    "a label that the model lacks": ("maps", [*PROMPT, "--concat", "labels"], "has the label 6"),
    "colors for labels": ("maps", [*PROMPT, "--concat", "colors"], "is a picture in color"),
    "a broken map": ("maps", [*PROMPT, "--concat", "broken"], "cannot be read"),
    "no maps": ("maps", [*PROMPT, "--concat", "nothing"], "has no image"),
    "maps without a prompt": ("maps", ["--concat", "labels"], "needs --prompt"),
    "a prompt without maps": ("maps", PROMPT, "needs --concat DIR"),
    "the file of prompts as output": ("text", ["--prompts", "two.txt", "--out", "two.txt"], "--out two.txt"),
    "an option that is near": ("text", ["--promt", "a"], "did you mean --prompt?"),
}


@pytest.fixture
def sample(made, monkeypatch, capsys):
    """The error line of the command; it wrote nothing."""
    monkeypatch.chdir(made)

    def command(folder: str, *flags: str) -> str:
        before = {path: path.stat().st_mtime_ns for path in made.rglob("*")}
        line = ["sample", folder, "--device", "cpu", "--num_inference_steps", "2", "--out", "drawn.npy", *flags]
        status = cli.main(line)
        error = capsys.readouterr().err
        lines = [text for text in error.splitlines() if text.startswith("error: ")]
        assert status == 2, error
        assert len(lines) == 1, error
        assert error.splitlines()[-1] == lines[0]
        assert lines[0].isprintable()
        assert len(lines[0]) < 700
        assert {path: path.stat().st_mtime_ns for path in made.rglob("*")} == before
        return lines[0]

    return command


@pytest.mark.parametrize("name", BAD)
def test_bad_options(sample, name):
    folder, flags, answer = BAD[name]
    assert answer in sample(folder, *flags)


def config(part: str, **changes: Any) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        file = folder / part
        file.write_text(json.dumps(json.loads(file.read_text()) | changes))

    return damage


def remove(*parts: str) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        for part in parts:
            shutil.rmtree(folder / part) if (folder / part).is_dir() else (folder / part).unlink()

    return damage


def content(part: str, data: bytes) -> Callable[[Path], None]:
    return lambda folder: (folder / part).write_bytes(data) and None


def weights(change: Callable[[dict[str, torch.Tensor]], Any]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        file = folder / "text_encoder" / "model.safetensors"
        tensors = load_file(file)
        change(tensors)
        save_file(tensors, file, metadata={"format": "pt"})

    return damage


TABLE = "text_model.embeddings.token_embedding.weight"
ENCODER = "text_encoder/config.json"
DAMAGES: dict[str, tuple[Callable[[Path], None], str]] = {
    "no encoder": (remove("text_encoder"), "text_encoder"),
    "no tokenizer": (remove("tokenizer"), "tokenizer"),
    "no configuration": (remove(ENCODER), "config.json"),
    "no weights": (remove("text_encoder/model.safetensors"), "text_encoder"),
    "no vocabulary": (remove("tokenizer/tokenizer.json", "tokenizer/vocab.json"), "tokenizer"),
    "no JSON": (content(ENCODER, b"{"), "config.json"),
    "a list": (content(ENCODER, b"[]"), "config.json"),
    "no text": (content(ENCODER, b"\xff\xfe"), "config.json"),
    "truncated weights": (content("text_encoder/model.safetensors", b"\x10" * 100), "text_encoder"),
    "empty weights": (content("text_encoder/model.safetensors", b""), "text_encoder"),
    "a truncated tokenizer": (content("tokenizer/tokenizer.json", b'{"model": {'), "tokenizer"),
    "two encoders": (config("model_index.json", bert=["transformers", "CLIPTextModel"]), "bert"),
    "an unknown class": (config("model_index.json", text_encoder=["transformers", "Xyzzy"]), "text_encoder"),
    "a class of another kind": (config("model_index.json", text_encoder=["diffusers", "VQModel"]), "text_encoder"),
    "code of its own": (config("model_index.json", text_encoder=["os", "system"]), "text_encoder"),
    "a tokenizer that runs code": (config("model_index.json", tokenizer=["os", "system"]), "tokenizer"),
    "a component that nobody knows": (config("model_index.json", xyzzy=["os", "system"]), "component 'xyzzy'"),
    "another width": (config(ENCODER, hidden_size=24), "text_encoder"),
    "width 0": (config(ENCODER, hidden_size=0), "hidden_size"),
    "a text as width": (config(ENCODER, hidden_size="16"), "hidden_size"),
    "a huge table": (config(ENCODER, vocab_size=10**9), "vocab_size"),
    "a huge width": (config(ENCODER, hidden_size=10**8), "hidden_size"),
    "a thousand layers": (config(ENCODER, num_hidden_layers=10**6), "num_hidden_layers"),
    "no positions": (config(ENCODER, max_position_embeddings=0), "max_position_embeddings"),
    "heads that do not divide": (config(ENCODER, num_attention_heads=3), "text_encoder"),
    "an unknown activation": (config(ENCODER, hidden_act="xyzzy"), "text_encoder"),
    "NaN": (weights(lambda tensors: tensors[TABLE].fill_(torch.nan)), "not finite"),
    "infinity": (weights(lambda tensors: tensors[TABLE].fill_(torch.inf)), "not finite"),
    "a tensor less": (weights(lambda tensors: tensors.pop(TABLE)), "token_embedding"),
    "a tensor of another shape": (
        weights(lambda tensors: tensors.update({TABLE: torch.zeros(3, 16)})),
        "text_encoder",
    ),
    "no tensors": (weights(lambda tensors: tensors.clear()), "text_encoder"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_damaged_folders(sample, made, tmp_path, name):
    damage, answer = DAMAGES[name]
    folder = Path(shutil.copytree(made / "text", tmp_path / "text"))
    damage(folder)
    error = sample(str(folder), *PROMPT)
    assert answer in error.replace(str(tmp_path), "")
    assert sorted(os.listdir(tmp_path)) == ["text"]


def test_there_are_a_hundred():
    assert len(BAD) + len(DAMAGES) >= 100
