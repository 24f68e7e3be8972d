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

from diffusers_ddpm_ext.hub.upload import sha256_of
from diffusers_ddpm_ext.utils.files import write_text_atomically

PROOF, IMAGES, SHEET = "proof.json", "card/samples.npz", "card/samples.png"
FORMAT = 1
COUNT, STEPS, SEED = 9, 50, 0
CLOSE, SHARE = 8, 0.97
"""Other machines round otherwise: levels of 255 that a pixel may be off, and the share of pixels that must be so."""
DEFAULT, RAW = "unet/diffusion_pytorch_model.safetensors", "unet/diffusion_pytorch_model.raw.safetensors"
UNPROVEN = (PROOF, ".gitattributes")


def _text(facts: dict[str, Any]) -> str:
    return json.dumps(facts, indent=1, sort_keys=True) + "\n"


def write_proof(place: Path, drawn: dict[str, Any] | None) -> None:
    """Write `PROOF` over all files of a folder.

    Args:
        place: exactly what goes to the Hub.
        drawn: what the images of `IMAGES` were drawn with; None where there are none.
    """
    files = {}
    for path in sorted(place.rglob("*")):
        name = path.relative_to(place).as_posix()
        if path.is_file() and name not in UNPROVEN:
            files[name] = {"size": path.stat().st_size, "sha256": sha256_of(path)}
    facts: dict[str, Any] = {"format": FORMAT, "files": files, "images": drawn}
    facts["sha256"] = hashlib.sha256(_text(facts).encode()).hexdigest()
    write_text_atomically(place / PROOF, _text(facts))


def read_proof(place: Path) -> dict[str, Any] | None:
    """The proof of a folder, None where there is none.

    Raises:
        ValueError: it was changed.
    """
    path = place / PROOF
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
        raise ValueError(f"{PROOF} was changed after it was written")
    if facts["format"] != FORMAT:
        raise ValueError(f"{PROOF} has format {facts['format']}, this version reads {FORMAT}")
    return facts


def check_files(place: Path, facts: dict[str, Any]) -> list[str]:
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
        now[name] = sha256_of(path)
        if now[name] != said["sha256"]:
            size = path.stat().st_size
            how = f"has {size} bytes instead of {said['size']}" if size != said["size"] else "was changed"
            found.append(f"{name} {how} (sha256 {now[name][:12]}, not {said['sha256'][:12]})")
    files = facts["files"]
    if DEFAULT in now and RAW in now and RAW in files:
        swapped = (now[DEFAULT], now[RAW]) == (files[RAW]["sha256"], files[DEFAULT]["sha256"])
        if swapped and now[RAW] != now[DEFAULT]:
            found.append("the EMA weights and the raw ones are swapped")
    return found


def draw(pipeline: Any, drawn: dict[str, Any]) -> NDArray[np.uint8]:
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


def what_to_draw(pipeline: Any) -> dict[str, Any] | None:
    """What a card's images are drawn with; None for a model that needs conditions which no card can give."""
    from diffusers_ddpm_ext.models.conditioning import NEEDS

    needs = set(NEEDS[pipeline.join.conditioning_key]) - {"class_labels"}
    if needs and not (needs == {"encoder_hidden_states"} and pipeline.class_embedder is not None):
        return None
    steps = min(STEPS, len(pipeline.trained_scheduler))
    return {"count": COUNT, "seed": SEED, "num_inference_steps": steps}


def check_images(place: Path, pipeline: Any, drawn: dict[str, Any]) -> tuple[str, float]:
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
        with np.load(place / IMAGES, allow_pickle=False) as file:
            kept = file["images"]
    except (zipfile.BadZipFile, KeyError, EOFError) as error:
        raise ValueError(f"{IMAGES} cannot be read: {error}") from None
    again = draw(pipeline, drawn)
    if again.shape != kept.shape:
        return f"the card's images are {kept.shape}, drawn again they are {again.shape}", 0.0
    share = float((np.abs(again.astype(int) - kept.astype(int)) <= CLOSE).mean())
    wrong = "" if share >= SHARE else f"drawn again, {share:.1%} of the pixels of the card's images agree"
    return wrong, share
