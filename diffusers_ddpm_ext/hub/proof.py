"""Proof of a pushed pipeline: the sha256 of each file, and images that the pipeline must reproduce.

``proof.json`` has the size and sha256 of every other file of the repository, and the settings that the images of the
model card were drawn with. Its last entry is the sha256 of its own text, so that every changed byte is detected.
"""

from __future__ import annotations

import hashlib
import json
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from diffusers_ddpm_ext.utils.files import write_text_atomically

PROOF_NAME, CARD_IMAGES, CARD_GRID = "proof.json", "card/samples.npz", "card/samples.png"
PROOF_FORMAT = 1
CARD_IMAGE_COUNT, CARD_STEPS, CARD_SEED = 9, 50, 0
PIXEL_TOLERANCE, MIN_AGREEMENT = 8, 0.97
"""Other machines round differently: allowed difference of a pixel in levels of 255, and share of pixels within it."""
UNPROVEN_FILES = (PROOF_NAME, ".gitattributes")


def _text(content: dict[str, Any]) -> str:
    return json.dumps(content, indent=1, sort_keys=True) + "\n"


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_proof(place: Path, settings: dict[str, Any] | None) -> None:
    """Write ``proof.json`` for all files of a folder.

    Args:
        place: the folder to upload.
        settings: from `card_draw_settings`; None if there are no images.
    """
    files = {}
    for path in sorted(place.rglob("*")):
        name = path.relative_to(place).as_posix()
        if path.is_file() and name not in UNPROVEN_FILES:
            files[name] = {"size": path.stat().st_size, "sha256": _sha256(path)}
    proof: dict[str, Any] = {"format": PROOF_FORMAT, "files": files, "images": settings}
    proof["sha256"] = hashlib.sha256(_text(proof).encode()).hexdigest()
    write_text_atomically(place / PROOF_NAME, _text(proof))


def read_proof(place: Path) -> dict[str, Any] | None:
    """The proof of a folder, None if there is none.

    Raises:
        ValueError: it was changed, or is of another format.
    """
    path = place / PROOF_NAME
    if not path.is_file():
        return None
    content = path.read_bytes()
    try:
        proof: dict[str, Any] = json.loads(content)
        digest = proof.pop("sha256")
        intact = digest == hashlib.sha256(_text(proof).encode()).hexdigest()
        intact = intact and content == _text(proof | {"sha256": digest}).encode()
    except (ValueError, KeyError, AttributeError, TypeError):
        intact = False
    if not intact:
        raise ValueError(f"{PROOF_NAME} was changed after it was written")
    if proof["format"] != PROOF_FORMAT:
        raise ValueError(f"{PROOF_NAME} has format {proof['format']}, this version reads {PROOF_FORMAT}")
    return proof


def differences_from_proof(place: Path, proof: dict[str, Any]) -> list[str]:
    """The files of a folder that are missing or changed, one sentence each.

    Args:
        place: of the pipeline.
        proof: from `read_proof`.
    """
    messages, digests, files = [], {}, proof["files"]
    for name, entry in files.items():
        path = place / name
        if not path.is_file():
            messages.append(f"{name} is missing")
            continue
        digests[name] = _sha256(path)
        if digests[name] != entry["sha256"]:
            size = path.stat().st_size
            change = f"has {size} bytes instead of {entry['size']}" if size != entry["size"] else "was changed"
            messages.append(f"{name} {change} (sha256 {digests[name][:12]}, not {entry['sha256'][:12]})")
    default, raw = (f"unet/diffusion_pytorch_model.{suffix}" for suffix in ("safetensors", "raw.safetensors"))
    if default in digests and raw in digests:
        swapped = (digests[default], digests[raw]) == (files[raw]["sha256"], files[default]["sha256"])
        if swapped and digests[raw] != digests[default]:
            messages.append("the EMA weights and the raw ones are swapped")
    return messages


def card_draw_settings(pipeline: Any) -> dict[str, Any] | None:
    """What a card's images are drawn with; None for a model that needs other conditions than classes."""
    needs = set(pipeline.conditioning.required) - {"class_labels"}
    if needs and not (needs == {"encoder_hidden_states"} and pipeline.class_embedder is not None):
        return None
    steps = min(CARD_STEPS, len(pipeline.trained_scheduler))
    return {"count": CARD_IMAGE_COUNT, "seed": CARD_SEED, "num_inference_steps": steps}


def draw_card_images(pipeline: Any, settings: dict[str, Any]) -> NDArray[np.uint8]:
    """The images of the card, (N, height, width, C), 0 to 255.

    Args:
        pipeline: a loaded one.
        settings: from `card_draw_settings`.
    """
    from diffusers_ddpm_ext.utils.random_keys import generator

    conditions: dict[str, Any] = {}
    if pipeline.num_classes is not None:
        labels = [label for label in range(pipeline.num_classes) if label != pipeline.config.get("null_class_label")]
        conditions["class_labels"] = [labels[index % len(labels)] for index in range(settings["count"])]
    images = pipeline(
        batch_size=settings["count"],
        generator=[generator("card", settings["seed"], index) for index in range(settings["count"])],
        num_inference_steps=settings["num_inference_steps"],
        output_type="np",
        **conditions,
    ).images
    levels: NDArray[np.uint8] = (images * 255).round().astype(np.uint8)
    return levels


def compare_card_images(place: Path, pipeline: Any, settings: dict[str, Any]) -> tuple[str, float]:
    """Draw the images of the card again and compare them with the saved ones, by the proof's settings.

    Returns a sentence if they differ, otherwise an empty one; and the share of pixels that agree.

    Raises:
        ValueError: the saved images cannot be read.
    """
    try:
        with np.load(place / CARD_IMAGES, allow_pickle=False) as file:
            saved = file["images"]
    except (zipfile.BadZipFile, KeyError, EOFError) as error:
        raise ValueError(f"{CARD_IMAGES} cannot be read: {error}") from None
    images = draw_card_images(pipeline, settings)
    if images.shape != saved.shape:
        return f"the card's images are {saved.shape}, drawn again they are {images.shape}", 0.0
    share = float((np.abs(images.astype(int) - saved.astype(int)) <= PIXEL_TOLERANCE).mean())
    message = "" if share >= MIN_AGREEMENT else f"drawn again, {share:.1%} of the pixels of the card's images agree"
    return message, share
