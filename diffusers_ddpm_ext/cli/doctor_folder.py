"""Checks of a trained folder for `ddpm-ext doctor`: its pipeline or first stage, its checkpoints and its proof."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from diffusers_ddpm_ext.cli.doctor_files import check_first_stage_files, check_pipeline_files
from diffusers_ddpm_ext.cli.doctor_findings import Finding, Mark
from diffusers_ddpm_ext.cli.doctor_open import open_first_stage, open_pipeline
from diffusers_ddpm_ext.errors import ConfigError


def check_folder(folder: Path, opens: bool = False) -> Iterator[Finding]:
    """Check what is in the output folder of a run, or the folder of a pipeline or a first stage.

    Args:
        folder: to check.
        opens: load its networks, with torch, instead of examining their files.
    """
    from diffusers_ddpm_ext.hub.proof import differences_from_proof, read_proof
    from diffusers_ddpm_ext.training.checkpoints.folders import list_checkpoints
    from diffusers_ddpm_ext.training.checkpoints.manifest import DamagedCheckpoint, verify

    checkpoints = list_checkpoints(folder)
    damage: dict[Path, str] = {}
    for path in checkpoints:
        try:
            verify(path)
        except DamagedCheckpoint as error:
            damage[path] = str(error)
    yield from _check_networks(folder, opens, len(damage) < len(checkpoints), bool(checkpoints))
    remedy = "--resume_from_checkpoint latest sets it aside and uses the newest intact one"
    if len(damage) == len(checkpoints):
        remedy = "no checkpoint is intact: copy one from a backup, or begin again in another folder"
    for path in checkpoints:
        is_damaged = path in damage
        text = f"{damage[path]}: {remedy}" if is_damaged else f"{path.name} is intact"
        yield Finding(Mark.WRONG if is_damaged else Mark.FINE, text)
    try:
        proof = read_proof(folder)
    except ValueError as error:
        yield Finding(Mark.WRONG, f"{error}: ddpm-ext push {folder}")
        return
    changed = [] if proof is None else differences_from_proof(folder, proof)
    if changed:
        yield Finding(Mark.ADVICE, f"changed since the last push ({changed[0]}): ddpm-ext push {folder}")
    elif proof is not None:
        yield Finding(Mark.FINE, "is what was pushed")


def _check_networks(folder: Path, opens: bool, can_resume: bool, has_checkpoints: bool) -> Iterator[Finding]:
    """Check the pipeline of a folder, or the first stage that it is."""
    if (folder / "model_index.json").is_file():
        check, way_out = (open_pipeline if opens else check_pipeline_files), "copy it again"
        if can_resume:
            way_out = "restore it from a checkpoint (--resume_from_checkpoint latest)"
    elif (folder / "config.json").is_file():
        check, way_out = (open_first_stage if opens else check_first_stage_files), "copy it again"
    elif has_checkpoints:
        if can_resume:
            yield Finding(Mark.ADVICE, "it has no pipeline yet: resume with --resume_from_checkpoint latest")
        return
    else:
        text = "it has neither a pipeline (model_index.json) nor checkpoints"
        yield Finding(Mark.WRONG, f"{text}: is it the right folder?")
        return
    try:
        yield from check(folder)
    except ValueError as error:
        reason = " ".join(str(error).split())[:300]
        prefix = "" if opens or not isinstance(error, ConfigError) else f"cannot load the folder {folder}: "
        yield Finding(Mark.WRONG, f"{prefix}{reason}: {way_out}")
    else:
        if not opens:
            yield Finding(Mark.FINE, "its files were examined; --open also loads its networks (with torch)")
