"""A run's folder: how it is recognized, which files runs write, and their removal before another run.

Only files that a run writes are ever deleted, by their exact names; everything else in the folder stays.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import suppress
from fnmatch import fnmatchcase
from pathlib import Path

from diffusers_ddpm_ext.errors import ConfigError, printable
from diffusers_ddpm_ext.training.checkpoints.folders import list_checkpoints, remove_checkpoint_files, remove_leftovers
from diffusers_ddpm_ext.training.config.autoencoder_options import VAE_SECTIONS
from diffusers_ddpm_ext.training.config.options import SECTIONS
from diffusers_ddpm_ext.utils.files import CONFIG, ENVIRONMENT, METRICS, remove_path
from diffusers_ddpm_ext.utils.folder_lock import LOCK
from diffusers_ddpm_ext.utils.generations import COMMITTED
from diffusers_ddpm_ext.utils.pipeline_files import NETWORKS
from diffusers_ddpm_ext.utils.yaml_io import load_options

PIPELINE_FILES = (
    "model_index.json", "ema.json", *(f"{network}/{name}" for network in NETWORKS for name in (
        "config.json", "diffusion_pytorch_model*.safetensors", "diffusion_pytorch_model*.safetensors.index*.json",
    )), "scheduler/scheduler_config.json", "logvar/config.json",
    "logvar/diffusion_pytorch_model.safetensors", "class_embedder/config.json",
    "class_embedder/diffusion_pytorch_model.safetensors",
    "config.json", "diffusion_pytorch_model*.safetensors", "diffusion_pytorch_model*.safetensors.index*.json",
)  # fmt: skip
RECORD_FILES = (CONFIG, ENVIRONMENT, METRICS, "timing.jsonl", "finished.json", "samples.png", "reconstructions.png")
"""Files at the top of a run's folder, apart from its pipeline."""
RUN_FILES = (
    *PIPELINE_FILES, *RECORD_FILES, *(f"best/{name}" for name in (*PIPELINE_FILES, "monitor.json")),
    "samples/inputs.png", "samples/diffusion_row.png", "samples/samples-[0-9]*.png", "samples/denoise_row-[0-9]*.png",
    "samples/reconstructions-[0-9]*.png",
    "samples/loss.png", "samples/logvar.png", "loss.png", "logvar.png",
    *(f"crash/step-[0-9]*/{name}" for name in (CONFIG, "event.json", "samples.csv", "gradients.csv", "inputs.png")),
    ".hub.json", "proof.json", "card/samples.npz", "card/samples.png",
)  # fmt: skip
"""What a run and its push write, apart from checkpoints and the tracker's files; patterns of paths in its folder."""
RUN_FOLDERS = (*NETWORKS, "scheduler", "logvar", "class_embedder", "samples", "best", "crash", "card")
DRAFT_NAME = re.compile(r"\.(saving|publishing)-[a-z0-9_]{8}|\.writing-pipeline-[0-9a-f]{8}", re.ASCII)
DOWNLOAD_NAME = re.compile(r"\.downloading-[0-9a-zA-Z]{1,40}", re.ASCII)
PART_NAME = re.compile(r"\.(.+)\.[0-9]+\.part", re.ASCII)
MAX_CONFIG_BYTES = 1 << 20
REPOSITORIES = (".git", ".hg", ".svn")


def is_run_folder(folder: Path) -> bool:
    """Whether a run of this package wrote into a folder; a file called ``config.yaml`` alone does not prove that."""
    entries = set(os.listdir(folder))
    drafts = {name for name in entries if _is_draft(name) or DOWNLOAD_NAME.fullmatch(name)}
    if entries and entries - drafts <= {LOCK}:
        return True  # of a run that was killed before it wrote a file
    # A run that the disk had no space for may have left its configuration alone.
    has_records = bool({LOCK, ENVIRONMENT, METRICS} & entries) or entries - drafts == {CONFIG}
    return has_records and _is_run_config(folder / CONFIG)


def _is_run_config(path: Path) -> bool:
    """Whether a file is the resolved configuration of a run: an object for every section, some of earlier versions."""
    try:
        if path.is_symlink() or not path.is_file() or path.stat().st_size > MAX_CONFIG_BYTES:
            return False
        content = load_options(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return len(content) > len(SECTIONS) // 2 and all(
        (name in SECTIONS or name in VAE_SECTIONS) and isinstance(section, dict) for name, section in content.items()
    )


def refuse_foreign_folder(folder: Path, name: str) -> None:
    """Refuse to empty a folder that is not a run's, or that holds more than a run. Changes nothing.

    Args:
        folder: an existing folder that is not empty.
        name: how the user wrote it.

    Raises:
        ConfigError: it is a link, a home folder or above one, a working copy, or not the folder of a run.
    """
    option = f"--overwrite_output_dir: {printable(name)}"
    if folder.is_symlink():
        raise ConfigError(f"{option} is a symbolic link: name the folder itself")
    real = folder.resolve()
    home = Path(os.path.expanduser("~")).resolve()
    if real in (home, *home.parents):
        raise ConfigError(f"{option} is {'the home folder' if real == home else f'above {home}'}: name another folder")
    for repository in REPOSITORIES:
        if os.path.lexists(real / repository):
            raise ConfigError(f"{option} holds {repository}, so it is a working copy: name another folder")
    if not is_run_folder(folder):
        others = sorted(entry for entry in os.listdir(folder) if entry != LOCK)
        raise ConfigError(
            f"{option} is not the folder of a run (it holds {printable(others[0], 60)}): name another folder, or"
            " delete it yourself"
        )


def refuse_unusable_entries(folder: Path, name: str) -> None:
    """Refuse a folder in which something else has the name of a file or folder that a run writes.

    Raises:
        ConfigError: the entry is a link, a folder in place of a file, or a file in place of a folder.
    """
    for entry in RECORD_FILES:
        path = folder / entry
        if os.path.lexists(path) and (path.is_symlink() or not path.is_file()):
            kind = "a symbolic link" if path.is_symlink() else "a folder" if path.is_dir() else "not a regular file"
            raise ConfigError(
                f"--output_dir {printable(name)}: {entry} in it is {kind}: move it away, or name another folder"
            )
    for entry in RUN_FOLDERS:
        path = folder / entry
        if os.path.lexists(path) and not path.is_dir():
            raise ConfigError(
                f"--output_dir {printable(name)}: {entry} in it is not a folder: move it away, or name another folder"
            )


def remove_run_files(folder: Path) -> None:
    """Delete what runs have written into a folder; files of the user stay, and the folders that they are in.

    Raises:
        OSError: a file cannot be deleted.
    """
    for name in RUN_FOLDERS:
        if (folder / name).is_symlink():  # its target is not a run's
            (folder / name).unlink()
    remove_leftovers(folder)
    for path in list_checkpoints(folder):
        if not path.is_symlink():
            remove_checkpoint_files(path)
    for path in _run_files(folder):
        path.unlink()
    for name in RUN_FOLDERS:
        for below, _, _ in os.walk(folder / name, topdown=False):
            with suppress(OSError):  # a file of the user is in it
                os.rmdir(below)
    for path in folder.iterdir():
        if path.name == COMMITTED or DOWNLOAD_NAME.fullmatch(path.name):
            remove_path(path)


def _run_files(folder: Path) -> Iterator[Path]:
    """Regular files and links in a folder that `RUN_FILES` names, none below a link."""
    for above, folders, names in os.walk(folder):
        inside = Path(above).relative_to(folder)
        if inside == Path("."):
            folders[:] = [name for name in folders if name in RUN_FOLDERS]
        for name in names:
            if is_run_file((inside / name).as_posix()):
                yield Path(above) / name


def is_run_file(name: str) -> bool:
    """Whether `RUN_FILES` names a file, given by its path in the folder, with ``/`` between parts."""
    return any(fnmatchcase(name, pattern) and name.count("/") == pattern.count("/") for pattern in RUN_FILES)


def remove_drafts(folder: Path) -> None:
    """Delete what a killed run left partly written, apart from checkpoints. The caller holds the folder's lock."""
    for path in sorted(folder.iterdir()):
        if _is_draft(path.name):
            remove_path(path)


def _is_draft(name: str) -> bool:
    part = PART_NAME.fullmatch(name)
    return DRAFT_NAME.fullmatch(name) is not None or (part is not None and part[1] in RUN_FILES)
