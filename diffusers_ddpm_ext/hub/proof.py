"""Proof of a pushed pipeline: the sha256 of each file, and images that the pipeline must reproduce.

``proof.json`` has the size and sha256 of every other file of the repository, and the settings that the images of the
model card were drawn with. Its last entry is the sha256 of its own text, so that every changed byte is detected.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from diffusers_ddpm_ext.errors import printable
from diffusers_ddpm_ext.hub.card_facts import MAX_PROMPT_CHARACTERS
from diffusers_ddpm_ext.hub.upload import belongs_on_hub, is_hidden
from diffusers_ddpm_ext.utils.array_files import MAX_EXPANSION, read_array
from diffusers_ddpm_ext.utils.files import write_text_atomically
from diffusers_ddpm_ext.utils.folder_scan import list_names, scan_folder
from diffusers_ddpm_ext.utils.generations import COMMITTED
from diffusers_ddpm_ext.utils.input_files import JsonObject, decode_text, json_object, parse_json, read_bytes

PROOF_NAME, CARD_IMAGES, CARD_GRID = "proof.json", "card/samples.npz", "card/samples.png"
PROOF_FORMAT = 1
CARD_IMAGE_COUNT, CARD_STEPS, CARD_SEED = 9, 50, 0
PIXEL_TOLERANCE, MIN_AGREEMENT = 8, 0.97
"""Other machines round differently: allowed difference of a pixel in levels of 255, and share of pixels within it."""
UNPROVEN_FILES = (PROOF_NAME, ".gitattributes")
CLIENT_FOLDERS = ((".git",), (".cache", "huggingface"))
MAX_CARD_IMAGES, MAX_CARD_STEPS = 64, 250
"""What a proof may ask to draw."""
MAX_UNIFORM_BYTES = 4 * 2**20
"""Larger images of a card compress less than a hundredfold."""


def _text(content: dict[str, Any]) -> str:
    return json.dumps(content, indent=1, sort_keys=True) + "\n"


def file_digest(path: Path) -> str:
    """The sha256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_proof(place: Path, settings: dict[str, Any] | None) -> None:
    """Write ``proof.json`` for all files of a folder.

    Args:
        place: the folder to upload.
        settings: from `card_draw_settings`; None if there are no images.
    """
    files = {
        name: {"size": path.stat().st_size, "sha256": file_digest(path)}
        for name, path in scan_folder(place).files.items()
        if name not in UNPROVEN_FILES
    }
    proof: dict[str, Any] = {"format": PROOF_FORMAT, "files": files, "images": settings}
    proof["sha256"] = hashlib.sha256(_text(proof).encode()).hexdigest()
    write_text_atomically(place / PROOF_NAME, _text(proof))


def read_proof(place: Path) -> dict[str, Any] | None:
    """The proof of a folder, None if there is none: ``files`` by name, and ``images``, the settings of the card's.

    Raises:
        ValueError: it was changed, is of another format, or states what no push states.
    """
    path = place / PROOF_NAME
    if not os.path.lexists(path):
        return None
    if path.is_symlink():
        raise ValueError(f"{PROOF_NAME} is a link")
    content = read_bytes(path)
    try:
        proof = json_object(parse_json(decode_text(content, PROOF_NAME), PROOF_NAME), PROOF_NAME).content
        digest = proof.pop("sha256")
        intact = digest == hashlib.sha256(_text(proof).encode()).hexdigest()
        intact = intact and content == _text(proof | {"sha256": digest}).encode()
    except (ValueError, KeyError):
        intact = False
    if not intact:
        raise ValueError(f"{PROOF_NAME} was changed after it was written")
    checked = JsonObject(PROOF_NAME, proof)
    if checked.integer("format") != PROOF_FORMAT:
        raise ValueError(f"{PROOF_NAME} has format {proof['format']}, this version reads {PROOF_FORMAT}")
    files = checked.object("files")
    for name in files.content:
        entry = files.object(name)
        entry.integer("size", low=0)
        if not re.fullmatch("[0-9a-f]{64}", entry.string("sha256")):
            raise ValueError(f"{entry.name}: its sha256 is not 64 hexadecimal digits")
        if name.startswith("/") or "\0" in name or "\\" in name or {"", ".", ".."} & {*name.split("/")}:
            raise ValueError(f"{PROOF_NAME} names {printable(name)!r}, which is no file of the folder")
    if "images" not in proof:
        raise ValueError(f"{PROOF_NAME} has no images")
    if proof["images"] is not None:
        settings = checked.object("images")
        settings.integer("count", low=1, high=MAX_CARD_IMAGES)
        settings.integer("num_inference_steps", low=1, high=MAX_CARD_STEPS)
        settings.integer("seed", low=0, high=2**63 - 1)
        prompts = settings.strings("prompts", ("",))
        if not 1 <= len(prompts) <= MAX_CARD_IMAGES or max(map(len, prompts)) > MAX_PROMPT_CHARACTERS:
            raise ValueError(f"{PROOF_NAME} has {len(prompts)} prompts, or one that is too long")
    return proof


def differences_from_proof(place: Path, proof: dict[str, Any], own_run: bool = False) -> list[str]:
    """What distinguishes a folder from the one that was pushed, one sentence each: it must hold these files alone.

    Beside them stand only ``proof.json``, ``.gitattributes`` and what Git and the Hub's client keep in ``.git`` and
    ``.cache/huggingface``. No loader opens these.

    Args:
        place: of the pipeline.
        proof: from `read_proof`.
        own_run: it is the run's folder that was pushed, which also has what a push leaves out (`entries_beside_push`).
    """
    files = proof["files"]
    scan = scan_folder(place, lambda parts: parts in CLIENT_FOLDERS or (own_run and _is_beside_push(parts, files)))
    cached = {name for name in scan.left_out if name in files and _is_cached_blob(place, name)}
    messages, digests = [], {}
    for name, entry in files.items():
        if name in scan.left_out and name not in cached:
            continue
        if name not in scan.files and name not in cached:
            messages.append(f"{printable(name)} is missing")
            continue
        size = (place / name).stat().st_size
        if size != entry["size"]:
            messages.append(f"{printable(name)} has {size:,} bytes instead of {entry['size']:,}")
            continue
        digests[name] = file_digest(place / name)
        if digests[name] != entry["sha256"]:
            messages.append(f"{printable(name)} was changed (sha256 {digests[name][:12]}, not {entry['sha256'][:12]})")
    for reason in sorted(set(scan.left_out.values())):
        names = [name for name, why in scan.left_out.items() if why == reason and name not in cached]
        messages += [f"{reason}: {list_names(names)}"] if names else []
    added = [name for name in scan.files if name not in files and name not in UNPROVEN_FILES]
    added += [f"{name}/" for name in scan.empty_folders]
    if added:
        messages.append(f"not in {PROOF_NAME}, so added after the push: {list_names(added)}")
    return [*messages, *_swapped_weights(files, digests)]


def entries_beside_push(place: Path, proof: dict[str, Any]) -> list[str]:
    """Names at the top of a run's folder that a push leaves out and no loader of the pipeline opens, sorted."""
    return sorted(path.name for path in place.iterdir() if _is_beside_push((path.name,), proof["files"]))


def _is_beside_push(parts: tuple[str, ...], files: dict[str, Any]) -> bool:
    if parts[0] == COMMITTED:  # a pipeline that counts in place of the folder's own
        return False
    if is_hidden(parts):
        return True
    pushed = {name.split("/")[0] for name in files}
    return parts[0] not in pushed and not belongs_on_hub(parts)


def _is_cached_blob(place: Path, name: str) -> bool:
    """Whether an entry of a snapshot in the Hub client's cache is one of the links that the client made."""
    blobs = place.absolute().parent.parent / "blobs"
    target = Path(os.path.realpath(place / name))
    return place.absolute().parent.name == "snapshots" and target.parent == blobs.resolve() and target.is_file()


def _swapped_weights(files: dict[str, Any], digests: dict[str, str]) -> list[str]:
    default, raw = (f"unet/diffusion_pytorch_model.{suffix}" for suffix in ("safetensors", "raw.safetensors"))
    if default not in digests or raw not in digests or digests[raw] == digests[default]:
        return []
    swapped = (digests[default], digests[raw]) == (files[raw]["sha256"], files[default]["sha256"])
    return ["the EMA weights and the raw ones are swapped"] if swapped else []


def card_draw_settings(pipeline: Any, prompts: Sequence[str] = ("",)) -> dict[str, Any] | None:
    """What a card's images are drawn with; None for latents, and for other conditions than classes and prompts.

    Args:
        pipeline: a loaded one.
        prompts: in turn over the images of a model with a text encoder and its tokenizer.
    """
    if pipeline.is_latent:
        return None
    stage = pipeline.text_encoder_stage
    takes_prompts = stage is not None and stage.tokenizer is not None
    needs = set(pipeline.conditioning.required) - {"class_labels"}
    if needs and not (needs == {"encoder_hidden_states"} and (takes_prompts or pipeline.class_embedder is not None)):
        return None
    steps = min(CARD_STEPS, len(pipeline.trained_scheduler))
    settings = {"count": CARD_IMAGE_COUNT, "seed": CARD_SEED, "num_inference_steps": steps}
    return settings | {"prompts": list(prompts)} if needs and takes_prompts else settings


def card_captions(pipeline: Any, settings: dict[str, Any]) -> list[str] | None:
    """What is written below the card's images: prompts, or names of classes; None without either."""
    if "prompts" in settings:
        return _in_turn(settings["prompts"], settings["count"])
    names, labels = pipeline.class_names, card_labels(pipeline, settings["count"])
    return [names.get(label, str(label)) for label in labels] if names and labels else None


def _in_turn(values: Sequence[Any], count: int) -> list[Any]:
    return [values[index % len(values)] for index in range(count)]


def card_labels(pipeline: Any, count: int) -> list[int] | None:
    """The classes of the card's images, in turn; None for a model without classes."""
    if pipeline.num_classes is None:
        return None
    labels = [label for label in range(pipeline.num_classes) if label != pipeline.config.get("null_class_label")]
    return _in_turn(labels, count)


def draw_card_images(pipeline: Any, settings: dict[str, Any]) -> NDArray[np.uint8]:
    """The images of the card, (N, height, width, C), 0 to 255.

    Args:
        pipeline: a loaded one.
        settings: from `card_draw_settings`.
    """
    from diffusers_ddpm_ext.utils.random_keys import generator

    labels = card_labels(pipeline, settings["count"])
    conditions: dict[str, Any] = {} if labels is None else {"class_labels": labels}
    if "prompts" in settings:
        conditions["prompt"] = _in_turn(settings["prompts"], settings["count"])
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
    path = place / CARD_IMAGES
    saved, packed = read_array(path, key="images"), path.stat().st_size
    size = pipeline.unet.config.sample_size
    factor = 1 if pipeline.first_stage is None else pipeline.first_stage.factor
    expected = (settings["count"], *(side * factor for side in ((size, size) if isinstance(size, int) else size)))
    if saved.dtype != np.uint8 or saved.ndim != 4 or saved.shape[:3] != expected:
        return f"{CARD_IMAGES} holds {saved.dtype} of shape {saved.shape}, not images of this model", 0.0
    if saved.nbytes > max(MAX_UNIFORM_BYTES, MAX_EXPANSION * packed):
        return f"{CARD_IMAGES} expands from {packed:,} to {saved.nbytes:,} bytes, which images do not", 0.0
    images = draw_card_images(pipeline, settings)
    if images.shape != saved.shape:
        return f"{CARD_IMAGES} holds images of shape {saved.shape}, drawn again they are {images.shape}", 0.0
    share = float((np.abs(images.astype(int) - saved.astype(int)) <= PIXEL_TOLERANCE).mean())
    message = "" if share >= MIN_AGREEMENT else f"drawn again, {share:.1%} of the pixels of the card's images agree"
    return message, share
