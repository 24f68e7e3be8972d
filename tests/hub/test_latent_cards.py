"""Cards, pushes and proofs of models of latents: the first stage belongs to the folder, and pictures are decoded."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from diffusers import UNet2DConditionModel, UNet2DModel
from helpers.hub_server import LoopbackHub
from helpers.latent_cases import latent_pipeline, tiny_first_stage
from helpers.paths import TESTS
from helpers.tiny import tiny_unet
from PIL import Image

from diffusers_ddpm_ext import DDPMExtPipeline, DDPMExtScheduler, cli
from diffusers_ddpm_ext.errors import ConfigError
from diffusers_ddpm_ext.hub.card import make_card
from diffusers_ddpm_ext.hub.push import _add_card_and_proof

TOKEN = "hf_secretsecretsecret"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder as a push brings it to the Hub."""
    folder = tmp_path_factory.mktemp("pushed") / "latent"
    latent_pipeline("kl").save_pretrained(folder)
    _add_card_and_proof(folder, "alice/latent", None, True)
    return folder


@pytest.fixture
def folder(made, tmp_path):
    return Path(shutil.copytree(made, tmp_path / "latent"))


def first_stage_of(folder: Path) -> Path:
    return next(folder / slot for slot in ("vae", "vqvae") if (folder / slot).is_dir())


def rows_of(card: str) -> dict[str, str]:
    return dict(re.findall(r"^\| ([\w ]+) \| (.*) \|$", card.split("## First stage")[1], re.M))


@pytest.mark.parametrize(
    ("kind", "name", "factor"),
    [("kl", "AutoencoderKL", 2), ("vq", "VQModel", 2), ("tiny", "AutoencoderTiny", 2), ("dc", "AutoencoderDC", 4)],
)
def test_the_card_describes_the_first_stage(kind, name, factor, tmp_path):
    """Factor and sizes against what the autoencoder itself does with a picture."""
    pipeline = latent_pipeline(kind)
    pipeline.save_pretrained(tmp_path)
    card = make_card(tmp_path, "me/x")
    rows = rows_of(card)
    latents = pipeline.encode_images(torch.zeros(1, 3, 8 * factor, 8 * factor))
    assert latents.shape == (1, 4, 8, 8)
    assert rows["pixels per latent"] == f"{factor} x {factor}"
    assert rows["latents of an image"] == "8x8x4"
    assert rows["scale factor"] == "0.7"
    assert rows["class"] == f"{name}, in `{first_stage_of(tmp_path).name}/`"
    assert f"{8 * factor}x{8 * factor}x3 images" in card
    assert "drawn as 8x8x4 latents" in card
    assert "license of the autoencoder" in card
    assert "from diffusers import LDMPipeline" in card


def test_the_origin_of_a_first_stage_is_shown_and_never_acts(folder):
    (folder / "config.yaml").write_text(yaml.safe_dump({"latents": {"vae": "<b>stabilityai</b>/sd-vae"}}))
    assert "took it from `<b>stabilityai</b>/sd-vae`" in make_card(folder, "me/x")


def test_models_that_stock_diffusers_refuses(tmp_path):
    latent_pipeline("kl", 4, concat_through_vae="mode").save_pretrained(tmp_path / "concat")
    card = make_card(tmp_path / "concat", "me/x")
    assert "needs conditions" in card
    assert "LDMPipeline" not in card
    DDPMExtPipeline(tiny_unet(4), DDPMExtScheduler(20), latent_scaling_factor=0.5).save_pretrained(
        tmp_path / "latents"
    )
    card = make_card(tmp_path / "latents", "me/x")
    assert 'output_type="latent"' in card
    assert "not part of this repository" in card
    assert "## First stage" not in card


def test_bits_per_latent_dimension_name_first_stage_and_scale(folder):
    (folder / "evaluation").mkdir()
    stage = {"class": "AutoencoderKL", "sha256": "ab12cd34" * 8, "scale": [1 / 0.7], "shift": [0.0]}
    record = {"bits_per_dim": -1.5, "low": None, "high": None, "confidence": 0.95, "num_images": 1, "chain": 20}
    record |= {"unit": "bits per latent dimension", "decoder_kind": "continuous", "bin_width": None}
    (folder / "evaluation/evaluation.json").write_text(json.dumps(record | {"first_stage": stage}))
    name = "bits per latent dimension (chain of 20 steps, first stage ab12cd34, scale 0.7, density)"
    assert f"| {name}, 1 images | -1.5000 |" in make_card(folder, "me/x")
    (folder / "metrics.jsonl").write_text('{"step": 7, "val/latent_bpd_ema": 0.5}\n')
    assert "| bits per latent dimension of validation, averaged weights | 0.5000 |" in make_card(folder, "me/x")


@pytest.mark.parametrize("content", [b"[]", b"\xff", b"{", b'{"block_out_channels": 5}', b'{"scaling_factor": NaN}'])
def test_a_first_stage_that_cannot_be_read_has_no_card(content, folder):
    (first_stage_of(folder) / "config.json").write_bytes(content)
    with pytest.raises(ConfigError, match=re.escape("config.json")):
        make_card(folder, "me/x")


def test_images_of_a_card_are_decoded(made):
    images = np.load(made / "card/samples.npz")["images"]
    assert images.shape == (9, 16, 16, 3)
    with Image.open(made / "card/samples.png") as grid:
        assert grid.mode == "RGB"
    files = json.loads((made / "proof.json").read_text())["files"]
    stage = first_stage_of(made).name
    assert {f"{stage}/config.json", f"{stage}/diffusion_pytorch_model.safetensors"} <= set(files)


def test_the_first_stage_belongs_to_the_proof(folder, capsys):
    assert cli.main(["verify", str(folder)]) == 0
    assert "agree in 100.00%" in capsys.readouterr().out
    weights = first_stage_of(folder) / "diffusion_pytorch_model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    assert cli.main(["verify", str(folder)]) == 1
    assert f"{weights.parent.name}/diffusion_pytorch_model.safetensors was changed" in capsys.readouterr().err
    shutil.rmtree(weights.parent)
    assert cli.main(["verify", str(folder)]) == 1
    assert "is missing" in capsys.readouterr().err


@pytest.mark.slow
def test_push_verify_and_the_code_of_the_card(folder, tmp_path):
    """With the real client against a loopback Hub; the stock block in a process that cannot import this package."""
    with LoopbackHub({TOKEN: "write"}) as hub:
        environment = {name: value for name, value in os.environ.items() if name != "HF_TOKEN"}
        environment |= hub.environment(str(tmp_path / "home"), TOKEN) | {"PYTHONPATH": str(TESTS.parent)}

        def run(*argv: str) -> str:
            done = subprocess.run(
                [sys.executable, *argv], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120,
                check=False,
            )  # fmt: skip
            assert done.returncode == 0, done.stderr
            return done.stdout

        damaged = Path(shutil.copytree(folder, tmp_path / "damaged"))
        config = first_stage_of(damaged) / "config.json"
        config.write_text(json.dumps(json.loads(config.read_text()) | {"scaling_factor": 0}))
        with pytest.raises(AssertionError, match=rf"error: cannot load the folder {damaged}.*scaling_factor"):
            run("-m", "diffusers_ddpm_ext", "push", str(damaged), "--no_images")
        assert not hub.repos, "nothing was created"
        run("-m", "diffusers_ddpm_ext", "push", str(folder))
        files = hub.files("alice/latent")
        assert f"{first_stage_of(folder).name}/diffusion_pytorch_model.safetensors" in files
        assert "agree in 100.00%" in run("-m", "diffusers_ddpm_ext", "verify", "alice/latent")
        few = ("--num_inference_steps", "2", "--num_images", "2")
        drawn = run("-m", "diffusers_ddpm_ext", "sample", "alice/latent", *few, "--out", "x.png")
        assert "2 images of 16x16x3" in drawn
        blocks = re.findall(r"^```python\n(.*?)^```", files["README.md"].decode(), re.M | re.S)
        assert len(blocks) == 3
        assert "LDMPipeline" in blocks[2]
        for block in blocks:
            stock = "" if "diffusers_ddpm_ext" in block else "import sys\nsys.modules['diffusers_ddpm_ext'] = None\n"
            code = block.replace("_steps=50", "_steps=10").replace("_steps=20", "_steps=10")  # the chain has 20
            run("-c", f"{stock}{code}\nassert [image.size for image in images] == [(16, 16)] * 4\n")


@pytest.mark.parametrize("kind", ["network", "tokens", "pixels"])
def test_the_code_of_a_model_of_classes_runs(kind, tmp_path):
    """Its first block, with the pipeline's folder in place of the repository."""
    unet = UNet2DModel(**tiny_unet(3 if kind == "pixels" else 4).config | {"num_class_embeds": 3})
    vae = {} if kind == "pixels" else {"vae": tiny_first_stage("kl")}
    if kind == "tokens":
        unet = UNet2DConditionModel(
            sample_size=8, in_channels=4, out_channels=4, block_out_channels=(8, 8), norm_num_groups=4,
            layers_per_block=1, cross_attention_dim=6, attention_head_dim=4,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        )  # fmt: skip
    pipeline = DDPMExtPipeline(unet, DDPMExtScheduler(20), "crossattn" if kind == "tokens" else "adm", **vae)
    if kind == "tokens":
        pipeline.class_embedder = torch.randn(3, 6)
    pipeline.save_pretrained(tmp_path)
    blocks = re.findall(r"^```python\n(.*?)^```", make_card(tmp_path, "me/x"), re.M | re.S)
    assert len(blocks) == 2
    names: dict = {}
    exec(blocks[0].replace("me/x", str(tmp_path)).replace("_steps=50", "_steps=2"), names)
    assert len(names["images"]) == 4
    assert "class_labels=[0, 1, 2, 0]" in blocks[0]
    assert "class_labels=[0, 1, 2, 0]" in blocks[1]
