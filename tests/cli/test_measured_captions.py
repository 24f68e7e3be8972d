"""`evaluate` and `fit-variance` of models of captions, against the same networks with the encoder's stored outputs."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import UNet2DConditionModel
from helpers.caption_runs import write_pictures
from helpers.text_models import tiny_text_encoder, tiny_tokenizer

from diffusers_ddpm_ext import DDPMExtPipeline, DDPMExtScheduler
from diffusers_ddpm_ext.cli import main


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The pipeline with its text encoder (text) and without (stored), and pictures with captions and embeddings."""
    folder = tmp_path_factory.mktemp("measured")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = UNet2DConditionModel(
            sample_size=8, block_out_channels=(8, 8), layers_per_block=1, norm_num_groups=4, cross_attention_dim=16,
            attention_head_dim=4, in_channels=3, out_channels=3,
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        )  # fmt: skip
        for name, weight in network.named_parameters():
            if "attn2" in name:
                weight.data.mul_(20)  # or the captions would hardly change the output
    scheduler, encoder, tokenizer = DDPMExtScheduler(num_train_timesteps=10), tiny_text_encoder(), tiny_tokenizer()
    shared = {"unet": network, "scheduler": scheduler, "conditioning_key": "crossattn"}
    DDPMExtPipeline(**shared, text_encoder=encoder, tokenizer=tokenizer).save_pretrained(folder / "text")
    DDPMExtPipeline(**shared).save_pretrained(folder / "stored")
    pictures = write_pictures(folder / "pictures", count=6)
    rows = [json.loads(line) for line in (pictures / "metadata.jsonl").read_text().splitlines()]
    for number, row in enumerate(rows):
        text = row["text"][0]
        ids = tokenizer(text, padding="max_length", truncation=True, return_tensors="pt").input_ids
        with torch.no_grad():
            np.save(pictures / f"{number}.npy", encoder(ids).last_hidden_state[0].numpy())
        row["embedding"] = f"{number}.npy"
    (pictures / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


DATA = ["--resolution", "8", "--validation_fraction", "0.5"]
COLUMNS = {"text": ["--caption_column", "text"], "stored": ["--context_column", "embedding"]}


def test_the_bound_of_captions_is_that_of_their_embeddings(folders, tmp_path, capsys):
    bits = {}
    for name, column in COLUMNS.items():
        arguments = [*DATA, "--train_data_dir", str(folders / "pictures"), *column, "--out", str(tmp_path / name)]
        assert main(["evaluate", str(folders / name), *arguments]) == 0, capsys.readouterr().err
        bits[name] = json.loads((tmp_path / name / "evaluation.json").read_text())["bits_per_dim"]
    assert bits["text"] == pytest.approx(bits["stored"], rel=1e-6)
    other = (folders / "pictures" / "metadata.jsonl").read_text().replace('"red"', '"dog"')
    (folders / "pictures" / "metadata.jsonl").write_text(other)
    arguments = [
        *DATA,
        "--train_data_dir",
        str(folders / "pictures"),
        *COLUMNS["text"],
        "--out",
        str(tmp_path / "text"),
    ]
    assert main(["evaluate", str(folders / "text"), *arguments]) == 0, capsys.readouterr().err
    changed = json.loads((tmp_path / "text" / "evaluation.json").read_text())["bits_per_dim"]
    assert changed != pytest.approx(bits["text"], rel=1e-6)  # the stored rows are of other captions: not taken
    (folders / "pictures" / "metadata.jsonl").write_text(other.replace('"dog"', '"red"'))


def test_fitted_variances_of_captions_are_those_of_their_embeddings(folders, capsys):
    fitted = {}
    for name, column in COLUMNS.items():
        arguments = [*DATA, "--train_data_dir", str(folders / "pictures"), *column, "--draws", "4"]
        assert main(["fit-variance", str(folders / name), *arguments]) == 0, capsys.readouterr().err
        config = json.loads((folders / name / "scheduler" / "scheduler_config.json").read_text())
        fitted[name] = config["v_posterior"]
    np.testing.assert_allclose(fitted["text"], fitted["stored"], rtol=1e-5)


def test_a_model_of_captions_needs_them_or_their_embeddings(folders, capsys):
    arguments = [*DATA, "--train_data_dir", str(folders / "pictures")]
    assert main(["evaluate", str(folders / "text"), *arguments]) == 2
    assert "takes prompts: name the column with the captions by --caption_column" in capsys.readouterr().err
    assert main(["evaluate", str(folders / "stored"), *arguments, *COLUMNS["text"]]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "has no text encoder: leave it out" in error
