"""The images of a card from an earlier push, where nothing that they were drawn from has changed since."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from diffusers_ddpm_ext.hub.card_facts import FolderFacts
from diffusers_ddpm_ext.hub.proof import (
    CARD_GRID,
    CARD_IMAGE_COUNT,
    CARD_IMAGES,
    CARD_SEED,
    CARD_STEPS,
    file_digest,
    read_proof,
)
from diffusers_ddpm_ext.utils.folder_scan import scan_folder
from diffusers_ddpm_ext.utils.pipeline_files import MODEL_INDEX, TABLES, component_folders


def unchanged_card(place: Path) -> dict[str, Any] | None:
    """Settings of the card's images that a folder has from its last push; None where they must be drawn again.

    They are kept if the folder's proof is intact and names the same images, networks, scheduler, tokenizer and index,
    byte by byte, and if this version draws with the same settings.

    Args:
        place: the folder to upload.
    """
    try:
        proof = read_proof(place)
    except ValueError:
        return None
    settings = None if proof is None else proof["images"]
    if proof is None or settings is None:
        return None
    kept_counts = (settings["count"], settings["seed"]) == (CARD_IMAGE_COUNT, CARD_SEED)
    if not kept_counts or settings["num_inference_steps"] > CARD_STEPS:
        return None
    if "prompts" in settings and settings["prompts"] != list(FolderFacts(place).prompts()):
        return None
    folders = {*component_folders(place), *(name.split("/")[0] for name in TABLES)}
    present = {name for name in scan_folder(place).files if name.split("/")[0] in folders}
    proven = {name for name in proof["files"] if name.split("/")[0] in folders}
    if proven != present:
        return None
    for name in (CARD_IMAGES, CARD_GRID, MODEL_INDEX, *present):
        entry = proof["files"].get(name)
        if entry is None or not (place / name).is_file() or file_digest(place / name) != entry["sha256"]:
            return None
    return dict(settings)
