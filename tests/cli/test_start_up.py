"""Commands that only read stored numbers and files load no network library: they take a second."""

from __future__ import annotations

import json
import os
import subprocess
import sys

from helpers.hub_server import LoopbackHub
from helpers.paths import TESTS
from helpers.tiny import tiny_unet

from diffusers_ddpm_ext import DDPMExtPipeline, DDPMExtScheduler
from diffusers_ddpm_ext.hub.proof import CARD_IMAGES
from diffusers_ddpm_ext.hub.push import _add_card_and_proof

HEAVY = ("torch", "diffusers", "transformers", "accelerate")
SCRIPT = f"""
import json, sys
from diffusers_ddpm_ext.cli import main
for argv in json.loads(sys.argv[1]):
    status = main(argv)
    print(json.dumps([argv[0], status, [name for name in {HEAVY} if name in sys.modules]]), file=sys.stderr)
"""


def test_no_network_library(tmp_path):
    """One process, command after command: what one of them loads would be loaded after each that follows."""
    folder = tmp_path / "digits"
    pipeline = DDPMExtPipeline(tiny_unet(1), DDPMExtScheduler(20, v_posterior=0.5))
    pipeline.logvar = pipeline.scheduler.alphas_cumprod.log()
    pipeline.save_pretrained(folder)
    (folder / "config.yaml").write_text("data:\n  dataset_name: null\n")
    (folder / "metrics.jsonl").write_text('{"step": 7, "train/loss_simple": 0.5, "val/loss_simple_ema": 0.25}\n')
    _add_card_and_proof(folder, "alice/digits", None, True)
    images = (folder / CARD_IMAGES).read_bytes()
    name = str(folder)
    commands = [
        ["--version"],
        ["report", name],
        ["plot", name, "--out", str(tmp_path / "plots")],
        ["doctor", name],
        ["push", name, "--hub_model_id", "alice/digits"],
        ["verify", name, "--no_images"],
        ["push", name, "--hub_model_id", "alice/bare", "--no_images"],
    ]
    with LoopbackHub({"hf_writerwriter": "write"}) as hub:
        environment = os.environ | hub.environment(str(tmp_path / "home"), "hf_writerwriter")
        done = subprocess.run(
            [sys.executable, "-c", SCRIPT, json.dumps(commands)],
            env=environment | {"PYTHONPATH": str(TESTS.parent)},
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        results = [json.loads(line) for line in done.stderr.splitlines() if line.startswith('["')]
        assert results == [[argv[0], 0, []] for argv in commands], done.stderr
        pushed = hub.repos["alice/digits"].commits[-1].files
        assert CARD_IMAGES in pushed
        assert CARD_IMAGES not in hub.repos["alice/bare"].commits[-1].files
    assert {path.stem for path in (tmp_path / "plots").iterdir()} == {"schedule", "weights", "logvar", "variance"}
    assert "its pipeline is complete: 0.0 M parameters, DDPM" in done.stdout
    assert images  # the first push has used them, the second has removed them
    assert not (folder / CARD_IMAGES).exists()
