"""Push of a trained folder to the Hub, with its model card and its proof."""

from __future__ import annotations

import os
import shlex
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from diffusers_ddpm_ext.errors import ConfigError, RunError, warn
from diffusers_ddpm_ext.hub.upload import (
    HUB_TIMEOUT,
    HubTarget,
    PushError,
    UploadList,
    copy_snapshot,
    create_repo,
    list_upload_files,
    record_push,
    redact_tokens,
    upload,
)
from diffusers_ddpm_ext.utils.files import copy_atomically, remove_path, write_atomically, write_text_atomically
from diffusers_ddpm_ext.utils.first_stage_config import FIRST_STAGE_SLOTS
from diffusers_ddpm_ext.utils.folder_scan import is_below_link, scan_folder
from diffusers_ddpm_ext.utils.generations import read_one_generation
from diffusers_ddpm_ext.utils.input_files import read_json_object
from diffusers_ddpm_ext.utils.option import option, positional
from diffusers_ddpm_ext.utils.pipeline_files import MODEL_INDEX, owned_files
from diffusers_ddpm_ext.utils.text_encoder_config import TEXT_ENCODER_SLOTS


@dataclass(frozen=True)
class PushOptions:
    """Options of an upload; those of `ddpm-ext push`."""

    folder: Path = positional("FOLDER", "Output folder of a run, or folder of a saved pipeline.")
    hub_model_id: str | None = option(
        None, "Name of the repository, or user/name.", metavar="ID", unset="the folder's name"
    )
    hub_private_repo: bool = option(False, "A repository that is created is private.", alias=("private",))
    with_checkpoint: bool = option(False, "Also upload the newest checkpoint, so that training can be resumed.")
    license: str | None = option(
        None, "License of the weights, for the card, e.g. mit, cc-by-4.0.", metavar="NAME", unset="not stated"
    )
    commit_message: str = option("Upload by ddpm-ext", "Message of the commit.")
    no_images: bool = option(False, "Draw no images for the card and for `verify`.")
    timeout: float = option(HUB_TIMEOUT, "How long the Hub may take to answer.", above=0, metavar="SECONDS")
    hub_token: str | None = option(
        None, "Token of the Hub.", metavar="TOKEN", unset="HF_TOKEN, or the one that `hf auth login` stored"
    )

    @property
    def repo_id(self) -> str:
        """Name of the repository, with or without its namespace."""
        return self.hub_model_id or self.folder.resolve().name

    @property
    def command(self) -> str:
        """The command line of this push, without tokens."""
        parts = ["ddpm-ext", "push", str(self.folder), "--hub_model_id", self.repo_id]
        parts += ["--hub_private_repo"] * self.hub_private_repo + ["--with_checkpoint"] * self.with_checkpoint
        parts += ["--license", self.license] if self.license else []
        return shlex.join(parts)


def push(options: PushOptions, checkpoint: Path | None = None) -> str:
    """Write card and proof, upload the folder, and compare the commit with it.

    Args:
        options: of the push.
        checkpoint: folder of the checkpoint to upload with the pipeline; None for the pipeline alone.

    Returns:
        One line that names the repository.

    Raises:
        ConfigError: the pipeline cannot be loaded.
        RunError: the upload failed; the message has the command that completes it.
    """
    if options.hub_token is not None:
        os.environ["HF_TOKEN"] = options.hub_token
    target = HubTarget(options.repo_id, options.hub_private_repo or None, options.hub_token, options.timeout)
    try:
        from diffusers_ddpm_ext.hub.card_reuse import unchanged_card  # not at the top: `--help` loads no numpy

        with tempfile.TemporaryDirectory(prefix=".pushing-", dir=options.folder) as name:
            place = Path(name)
            uploads = _copy_one_generation(options.folder, checkpoint, place)
            if uploads.warning:
                warn(uploads.warning)
            settings = None if options.no_images else unchanged_card(place)
            if settings is None:
                _check_components(place, options.folder)
            target = replace(target, repo_id=create_repo(target, warn))
            _add_card_and_proof(place, target.repo_id, options.license, not options.no_images, settings)
            result = upload(place, target, options.commit_message, warn)
            _copy_card_and_proof(place, options.folder)
        record_push(options.folder, result)
    except (PushError, OSError) as error:
        reason = redact_tokens(str(error), options.hub_token)
        raise RunError(f"{reason}. {options.folder} is as it was; to finish: {options.command}") from None
    return (
        f"{result.files} files are in {result.url} (commit {result.commit[:12]}), each compared with the folder's; "
        f"to check them at any time: ddpm-ext verify {result.repo_id}"
    )


def _copy_one_generation(folder: Path, checkpoint: Path | None, place: Path) -> UploadList:
    """Copy what belongs on the Hub into an empty folder: all files of the pipeline from one save."""

    def copy(pipeline: Path) -> UploadList:
        for path in place.iterdir():
            remove_path(path)
        uploads = list_upload_files(folder, checkpoint)
        if pipeline != folder:  # a save that is not finished, whose files count already
            for name in owned_files(folder):
                uploads.files.pop(name, None)
            uploads.files.update(scan_folder(pipeline).files)
        uploads.check_complete(checkpoint)
        copy_snapshot(uploads.files, place)
        return uploads

    return read_one_generation(folder, copy)


def _check_components(place: Path, folder: Path) -> None:
    """Raise ConfigError for a copy with encoders that cannot be opened, before a repository is created."""
    index = read_json_object(place / MODEL_INDEX).content if (place / MODEL_INDEX).is_file() else {}
    if not any(isinstance(index.get(slot), list) for slot in (*FIRST_STAGE_SLOTS, *TEXT_ENCODER_SLOTS)):
        return
    from diffusers_ddpm_ext.pipelines.loading import load_pipeline, select_device

    try:
        load_pipeline(str(place), None, select_device("cpu"), "float32")
    except ConfigError as error:
        raise ConfigError(str(error).replace(str(place), str(folder))) from None


def _add_card_and_proof(
    place: Path, repo_id: str, license_name: str | None, draw: bool, settings: dict[str, Any] | None = None
) -> None:
    """Write the card and the proof into the folder to upload; never through its links to the run's files.

    ``settings`` are those of the card's images where the folder has them already; else ``draw`` says whether to draw
    them.
    """
    from diffusers_ddpm_ext.hub.card import CARD_NAME, make_card, may_replace_card
    from diffusers_ddpm_ext.hub.proof import CARD_GRID, CARD_IMAGES, write_proof

    if settings is None:
        for name in (CARD_IMAGES, CARD_GRID):
            (place / name).unlink(missing_ok=True)
        settings = _draw_card(place) if draw else None
    if may_replace_card(place):
        write_text_atomically(place / CARD_NAME, make_card(place, repo_id, license_name))
    write_proof(place, settings)


def _draw_card(place: Path) -> dict[str, Any] | None:
    import numpy as np

    from diffusers_ddpm_ext.hub.card_facts import FolderFacts
    from diffusers_ddpm_ext.hub.proof import (
        CARD_GRID,
        CARD_IMAGES,
        card_captions,
        card_draw_settings,
        draw_card_images,
    )
    from diffusers_ddpm_ext.pipelines.loading import load_pipeline, select_device
    from diffusers_ddpm_ext.plotting.sheets import save_grid

    pipeline = load_pipeline(str(place), None, select_device("cpu"), "float32")
    settings = card_draw_settings(pipeline, FolderFacts(place).prompts())
    if settings is None:
        return None
    images = draw_card_images(pipeline, settings)
    write_atomically(place / CARD_IMAGES, lambda file: np.savez_compressed(file, images=images))
    captions = card_captions(pipeline, settings)
    save_grid(
        images.transpose(0, 3, 1, 2) / 127.5 - 1, place / CARD_GRID, captions=captions, pixels=pipeline.pixel_format
    )
    return settings


def _copy_card_and_proof(place: Path, folder: Path) -> None:
    """Copy the uploaded card and proof into the folder, and delete older images of a card without any.

    A link in their place, or the folder ``card`` being one, stays as it is.
    """
    from diffusers_ddpm_ext.hub.card import CARD_NAME
    from diffusers_ddpm_ext.hub.proof import CARD_GRID, CARD_IMAGES, PROOF_NAME

    for name in (CARD_NAME, PROOF_NAME, CARD_IMAGES, CARD_GRID):
        if is_below_link(folder, name):
            continue
        if (place / name).is_file():
            copy_atomically(place / name, folder / name)
        elif name != CARD_NAME:
            (folder / name).unlink(missing_ok=True)
    cards = folder / "card"
    if cards.is_dir() and not cards.is_symlink() and not any(cards.iterdir()):
        cards.rmdir()
