"""What lets a reader check a pushed pipeline: the sha256 of each file, and images that it must draw again.

``proof.json`` names every other file of the repository with its size and sha256, and what the images of the card were
drawn with. It closes with the sha256 of its own text, so that no byte of it can change unseen either.
"""

from __future__ import annotations

import hashlib
import json
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from diffusers_ddpm_ext.hub.upload import sha256_of_file
from diffusers_ddpm_ext.utils.files import write_text_atomically

PROOF_NAME, CARD_IMAGES, CARD_GRID = "proof.json", "card/samples.npz", "card/samples.png"
PROOF_FORMAT = 1
CARD_IMAGE_COUNT, CARD_STEPS, CARD_SEED = 9, 50, 0
PIXEL_TOLERANCE, MIN_AGREEMENT = 8, 0.97
"""Other machines round otherwise: levels of 255 that a pixel may be off, and the share of pixels that must be so."""
DEFAULT_WEIGHTS, RAW_WEIGHTS = (
    "unet/diffusion_pytorch_model.safetensors",
    "unet/diffusion_pytorch_model.raw.safetensors",
)
UNPROVEN_FILES = (PROOF_NAME, ".gitattributes")


def _text(facts: dict[str, Any]) -> str:
    return json.dumps(facts, indent=1, sort_keys=True) + "\n"


def write_proof(place: Path, drawn: dict[str, Any] | None) -> None:
    """Write `PROOF_NAME` over all files of a folder.

    Args:
        place: exactly what goes to the Hub.
        drawn: what the images of `CARD_IMAGES` were drawn with; None where there are none.
    """
    files = {}
    for path in sorted(place.rglob("*")):
        name = path.relative_to(place).as_posix()
        if path.is_file() and name not in UNPROVEN_FILES:
            files[name] = {"size": path.stat().st_size, "sha256": sha256_of_file(path)}
    facts: dict[str, Any] = {"format": PROOF_FORMAT, "files": files, "images": drawn}
    facts["sha256"] = hashlib.sha256(_text(facts).encode()).hexdigest()
    write_text_atomically(place / PROOF_NAME, _text(facts))


def read_proof(place: Path) -> dict[str, Any] | None:
    """The proof of a folder, None where there is none.

    Raises:
        ValueError: it was changed.
    """
    path = place / PROOF_NAME
    if not path.is_file():
        return None
    content = path.read_bytes()
    try:
        facts: dict[str, Any] = json.loads(content)
        own = facts.pop("sha256")
        whole = own == hashlib.sha256(_text(facts).encode()).hexdigest()
        whole = whole and content == _text(facts | {"sha256": own}).encode()
    except (ValueError, KeyError, AttributeError, TypeError):
        whole = False
    if not whole:
        raise ValueError(f"{PROOF_NAME} was changed after it was written")
    if facts["format"] != PROOF_FORMAT:
        raise ValueError(f"{PROOF_NAME} has format {facts['format']}, this version reads {PROOF_FORMAT}")
    return facts


def differences_from_proof(place: Path, facts: dict[str, Any]) -> list[str]:
    """What is wrong with the files of a folder, a sentence each.

    Args:
        place: of the pipeline.
        facts: from `read_proof`.
    """
    found, now = [], {}
    for name, said in facts["files"].items():
        path = place / name
        if not path.is_file():
            found.append(f"{name} is missing")
            continue
        now[name] = sha256_of_file(path)
        if now[name] != said["sha256"]:
            size = path.stat().st_size
            how = f"has {size} bytes instead of {said['size']}" if size != said["size"] else "was changed"
            found.append(f"{name} {how} (sha256 {now[name][:12]}, not {said['sha256'][:12]})")
    files = facts["files"]
    if DEFAULT_WEIGHTS in now and RAW_WEIGHTS in now and RAW_WEIGHTS in files:
        swapped = (now[DEFAULT_WEIGHTS], now[RAW_WEIGHTS]) == (
            files[RAW_WEIGHTS]["sha256"],
            files[DEFAULT_WEIGHTS]["sha256"],
        )
        if swapped and now[RAW_WEIGHTS] != now[DEFAULT_WEIGHTS]:
            found.append("the EMA weights and the raw ones are swapped")
    return found


def draw_card_images(pipeline: Any, drawn: dict[str, Any]) -> NDArray[np.uint8]:
    """The images of the card, (N, height, width, C), 0 to 255.

    Args:
        pipeline: opened.
        drawn: count, seed and steps.
    """
    from diffusers_ddpm_ext.utils.random_keys import generator

    given: dict[str, Any] = {}
    if pipeline.num_classes is not None:
        labels = [label for label in range(pipeline.num_classes) if label != pipeline.config.get("null_class_label")]
        given["class_labels"] = [labels[index % len(labels)] for index in range(drawn["count"])]
    images = pipeline(
        batch_size=drawn["count"],
        generator=[generator("card", drawn["seed"], index) for index in range(drawn["count"])],
        num_inference_steps=drawn["num_inference_steps"],
        output_type="np",
        **given,
    ).images
    levels: NDArray[np.uint8] = (images * 255).round().astype(np.uint8)
    return levels


def card_draw_settings(pipeline: Any) -> dict[str, Any] | None:
    """What a card's images are drawn with; None for a model that needs conditions which no card can give."""
    from diffusers_ddpm_ext.models.conditioning import REQUIRED_CONDITIONS

    needs = set(REQUIRED_CONDITIONS[pipeline.conditioning.conditioning_key]) - {"class_labels"}
    if needs and not (needs == {"encoder_hidden_states"} and pipeline.class_embedder is not None):
        return None
    steps = min(CARD_STEPS, len(pipeline.trained_scheduler))
    return {"count": CARD_IMAGE_COUNT, "seed": CARD_SEED, "num_inference_steps": steps}


def compare_card_images(place: Path, pipeline: Any, drawn: dict[str, Any]) -> tuple[str, float]:
    """Draw the images of the card again.

    Args:
        place: of the pipeline.
        pipeline: opened from it.
        drawn: from the proof.

    Returns:
        What is wrong, or nothing; and the share of pixels that agree.

    Raises:
        ValueError: the kept images cannot be read.
    """
    try:
        with np.load(place / CARD_IMAGES, allow_pickle=False) as file:
            kept = file["images"]
    except (zipfile.BadZipFile, KeyError, EOFError) as error:
        raise ValueError(f"{CARD_IMAGES} cannot be read: {error}") from None
    again = draw_card_images(pipeline, drawn)
    if again.shape != kept.shape:
        return f"the card's images are {kept.shape}, drawn again they are {again.shape}", 0.0
    share = float((np.abs(again.astype(int) - kept.astype(int)) <= PIXEL_TOLERANCE).mean())
    wrong = "" if share >= MIN_AGREEMENT else f"drawn again, {share:.1%} of the pixels of the card's images agree"
    return wrong, share
