"""Accelerate configurations: the files of the project, and the engines that are refused."""

from __future__ import annotations

import os
import re
import shlex
import sys
from pathlib import Path

import pytest
import torch
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import FullyShardedDataParallelPlugin
from accelerate.utils.launch import prepare_multi_gpu_env, prepare_simple_launcher_cmd_env
from helpers.accelerate_state import fresh_accelerate, reset_accelerate  # noqa: F401
from helpers.paths import ROOT
from helpers.runs import tiny_run
from safetensors.torch import load_file

from diffusers_ddpm_ext import cli
from diffusers_ddpm_ext.errors import ConfigError
from diffusers_ddpm_ext.training import trainer

FOLDER = ROOT / "training" / "accelerate"
EXPECTED = {
    "one_gpu.yaml": (1, "no", False),
    "bf16.yaml": (1, "bf16", False),
    "multi_gpu.yaml": (2, "no", False),
    "multi_node.yaml": (64, "bf16", False),
    "fsdp2.yaml": (2, "no", True),
}


def environment(path: Path) -> dict[str, str]:
    """Environment variables that `accelerate launch --config_file` sets for its processes."""
    args = launch_command_parser().parse_args(["--config_file", str(path), "training/train.py"])
    args, _, _ = _validate_launch_command(args)
    made = prepare_multi_gpu_env(args) if args.num_processes > 1 else prepare_simple_launcher_cmd_env(args)[1]
    return made | {"processes": str(args.num_processes)}


def test_every_file_is_tested():
    assert {path.name for path in FOLDER.glob("*")} == set(EXPECTED)


@pytest.mark.parametrize("name", EXPECTED)
def test_accelerate_reads_the_file_as_intended(name):
    processes, precision, fsdp = EXPECTED[name]
    variables = environment(FOLDER / name)
    assert int(variables["processes"]) == processes
    assert variables["ACCELERATE_MIXED_PRECISION"] == precision
    assert variables.get("ACCELERATE_USE_FSDP", "false") == str(fsdp).lower()


def test_the_command_for_several_machines_starts_one_of_them():
    """The command of docs/scale.md, as Accelerate reads it: 8 of 64 processes, by machine 3."""
    text = (ROOT / "docs" / "scale.md").read_text()
    command = re.search(r"^accelerate launch (.*?)^```", text, re.M | re.S)
    assert command is not None
    words = shlex.split(command[1].replace("\\\n", " ").replace("$RANK", "3").replace("$HEAD", "10.0.0.1"))
    words[1] = str(ROOT / words[1])
    args, _, _ = _validate_launch_command(launch_command_parser().parse_args(words))
    prepare_multi_gpu_env(args)
    assert (args.nnodes, args.nproc_per_node, args.node_rank) == ("8", "8", 3)
    assert args.rdzv_endpoint == "10.0.0.1:29500"


def test_the_fsdp_file_makes_a_plugin_of_the_second_version(monkeypatch):
    for name, value in environment(FOLDER / "fsdp2.yaml").items():
        if "FSDP" in name:
            monkeypatch.setenv(name, value)
    plugin = FullyShardedDataParallelPlugin()
    assert plugin.fsdp_version == 2
    assert plugin.reshard_after_forward is True
    assert set(plugin.transformer_cls_names_to_wrap) == {"ResnetBlock2D", "Attention"}


@pytest.mark.parametrize(
    ("variable", "name"), [("ACCELERATE_USE_DEEPSPEED", "DeepSpeed"), ("ACCELERATE_USE_MEGATRON_LM", "Megatron-LM")]
)
def test_unsupported_engines_are_refused_by_name(variable, name, tmp_path, monkeypatch):
    monkeypatch.setenv(variable, "true")
    with pytest.raises(ConfigError, match=f"{name}.*fsdp2.yaml"):
        trainer.train(tiny_run(tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_fsdp_on_a_cpu_is_a_warning(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    trainer.train(tiny_run(tmp_path / "run", max_train_steps=1))
    printed = capsys.readouterr()
    assert "warning: FSDP was requested, but Accelerate made one process of it" in printed.err
    assert "cpu, one process" in printed.out


def test_an_optimizer_that_is_not_installed_is_an_error_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", None)
    flags = ["--use_8bit_adam", "--max_train_steps", "1", "--output_dir", str(tmp_path / "run")]
    assert cli.main(["train", *flags]) == 2
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert line.startswith("error: --use_8bit_adam")
    assert "pip install bitsandbytes" in line
    assert os.listdir(tmp_path) == []


def test_8_bit_adam_resumes_bit_exactly(tmp_path):
    """If bitsandbytes is installed; it keeps tensors of fewer than 4,096 elements in 32 bits."""
    pytest.importorskip("bitsandbytes")
    options = {"use_8bit_adam": True, "checkpointing_steps": 2, "max_train_steps": 4, "block_out_channels": [32, 64]}
    for folder, minutes in (("straight", None), ("run", 1e-9)):
        reset_accelerate()
        trainer.train(tiny_run(tmp_path / folder, **options, max_train_minutes=minutes))
    reset_accelerate()
    trainer.train(tiny_run(tmp_path / "run", **options, resume_from_checkpoint="latest"))
    for name in ("model", "ema", "optimizer"):
        paths = [tmp_path / folder / "checkpoint-4" / f"{name}.safetensors" for folder in ("straight", "run")]
        assert paths[0].read_bytes() == paths[1].read_bytes()
    stored = load_file(paths[0])
    assert {tensor.dtype for tensor in stored.values()} == {torch.float32, torch.uint8}
