"""What the files alone show is told before torch is imported."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from PIL import Image

CASES = {
    "channels of a file": (["--train_data_dir", "gray", "--model_config_name_or_path", "net.json"], "in_channels"),
    "channels of an object": (["--channels", "1", "--model_config", '{"in_channels": 3}'], "in_channels"),
    "channels of the digits": (["--model_config", '{"in_channels": 4}'], "the digits have 1"),
    "a network of a million layers": (["--model_config_name_or_path", "large.json"], "layers_per_block"),
    "a network that is no JSON": (["--model_config_name_or_path", "gray/0.png"], "not text"),
    "missing weights": (["--ckpt_path", "nowhere.ckpt"], "does not exist"),
    "missing metadata": (["--train_data_dir", "gray", "--conditioning_key", "adm", "--class_column", "x"], "metadata"),
    "a wrong column": (["--train_data_dir", "color", "--conditioning_key", "adm", "--class_column", "x"], "is not in"),
    "no column": (["--train_data_dir", "gray", "--conditioning_key", "concat"], "--concat_column"),
    "a changed dropout": (["--conditioning_dropout", '{"class_labels": 0.1}'], "conditions of this run are none"),
    "no checkpoint": (["--output_dir", "new", "--resume_from_checkpoint", "latest"], "no checkpoint"),
    "a folder of the system": (["--output_dir", "/proc/x"], "cannot be written"),
    "a missing tracker": (["--report_to", "swanlab"], "not installed"),
}  # fmt: skip


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("place")
    for name, mode in (("gray", "L"), ("color", "RGB")):
        (folder / name).mkdir()
        Image.new(mode, (8, 8)).save(folder / name / "0.png")
    (folder / "color" / "metadata.csv").write_text("file_name,kind\n0.png,1\n")
    (folder / "net.json").write_text(json.dumps({"in_channels": 3}))
    (folder / "large.json").write_text(json.dumps({"layers_per_block": 10**6}))
    return folder


def test_mistakes_are_told_without_torch(place):
    """All cases in one process: it ends without torch."""
    code = textwrap.dedent(f"""
        import sys
        from diffusers_ddpm_ext.cli import main
        for name, (argv, _) in {CASES!r}.items():
            assert main(["train", *argv]) == 2, name
        heavy = {{"torch", "diffusers", "accelerate"}} & sys.modules.keys()
        assert not heavy, heavy
    """)
    result = subprocess.run([sys.executable, "-c", code], cwd=place, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    lines = result.stderr.splitlines()
    assert len(lines) == len(CASES)
    for line, (_, message) in zip(lines, CASES.values(), strict=True):
        assert line.startswith("error: ")
        assert message in line
    assert {path.name for path in place.iterdir()} == {"gray", "color", "net.json", "large.json"}
