"""The command that takes a file which was given to another one: a checkpoint, or a YAML file."""

from __future__ import annotations

from pathlib import PurePath

from diffusers_ddpm_ext.errors import printable

CHECKPOINT_SUFFIXES = (".ckpt", ".pt", ".pth", ".bin", ".safetensors")
YAML_SUFFIXES = (".yaml", ".yml")


def next_command(path: str | PurePath) -> str:
    """A clause for an error message, from its semicolon on; empty for a file of another kind."""
    suffix, shown = PurePath(path).suffix.lower(), printable(str(path), 300)
    if suffix in CHECKPOINT_SUFFIXES:
        command = f"ddpm-ext convert --from compvis --checkpoint {shown} --config CONFIG.yaml --out FOLDER"
        return f"; to make a pipeline of a checkpoint: {command}"
    if suffix in YAML_SUFFIXES:
        return (
            f"; for a YAML file of CompVis: ddpm-ext convert-config {shown}, of ours: ddpm-ext train --config {shown}"
        )
    return ""
