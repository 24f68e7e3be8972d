"""The folder a pipeline is saved as, and which reader can do what with it.

    model_index.json               stock Diffusers' words, so that stock readers open it
    scheduler/, unet/              the components, each by Diffusers' own code; the scheduler's config keeps our keys
    logvar/, class_embedder/       tables beside the components: no reader but ours knows of them

A model that stock ``DDPMPipeline`` would fail on, or sample wrongly without a word, is written in our words instead:
then every stock door refuses.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from diffusers import UNet2DModel
from huggingface_hub import _CACHED_NO_EXIST, hf_hub_download, try_to_load_from_cache
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

from diffusers_ddpm_ext.diffusion.reverse_step import LEARNED_VARIANCES
from diffusers_ddpm_ext.losses.logvar import LOGVAR_CONFIG_NAME, LOGVAR_FOLDER, LOGVAR_WEIGHTS_NAME
from diffusers_ddpm_ext.models import class_embedder
from diffusers_ddpm_ext.models.unet_2d_ext import UNet2DExtModel
from diffusers_ddpm_ext.schedulers.scheduling_ddpm_ext import DDPMExtScheduler

logger = logging.getLogger(__name__)

TABLES = {
    name: (f"{name}/{LOGVAR_CONFIG_NAME}", f"{name}/{LOGVAR_WEIGHTS_NAME}")
    for name in (LOGVAR_FOLDER, class_embedder.CLASS_EMBEDDER_FOLDER)
}
JOINED = ("conditioning_key", "use_positional_encodings", "null_class_label")
# Stock DDPMScheduler takes the root of a log-variance for these: every sample becomes NaN.
NAN_IN_STOCK = ("learned", "fixed_large_log")


def reads_variance(scheduler: Any) -> bool:
    """Whether the class has a ``variance_type``: a config swap leaves the key with classes that ignore it."""
    return "variance_type" in inspect.signature(type(scheduler).__init__).parameters


def ours_only(unet: Any, scheduler: Any, config: Mapping[str, Any]) -> str:
    """Why stock DDPMPipeline would fail on this model, or run and be wrong.

    Args:
        unet: the pipeline's network.
        scheduler: its scheduler.
        config: of the pipeline.

    Returns:
        One phrase; empty where stock Diffusers samples it right.
    """
    variance_type = scheduler.config.get("variance_type")
    if config.get("conditioning_key") is not None:
        return f"conditioning_key {config['conditioning_key']}"
    if config.get("use_positional_encodings"):
        return "use_positional_encodings"
    if isinstance(scheduler, DDPMExtScheduler) and variance_type in NAN_IN_STOCK:
        return f"variance_type {variance_type}"
    if type(unet) is not UNet2DModel:
        return f"a {type(unet).__name__}"
    if isinstance(scheduler, DDPMExtScheduler):
        return ""
    twice = unet.config.out_channels == 2 * unet.config.in_channels
    learned = variance_type in LEARNED_VARIANCES and twice and not reads_variance(scheduler)
    return f"variance_type {variance_type}" if learned else ""


def stock_words(index: dict[str, Any], unet: Any, scheduler: Any, config: Mapping[str, Any]) -> dict[str, Any]:
    """The content of ``model_index.json``.

    Args:
        index: what Diffusers would write, which names our classes by their modules.
        unet: the pipeline's network.
        scheduler: its scheduler.
        config: of the pipeline.

    Returns:
        A copy in words that readers know. Subclasses of ours, and other schedulers, stay recorded as themselves.
    """
    index = dict(index)
    index.pop("_name_or_path", None)  # where this copy once came from, maybe a private path
    ours = bool(ours_only(unet, scheduler, config))
    # By a module path, a Hub id would not load: Diffusers looks for that file in the repository.
    if type(scheduler) is DDPMExtScheduler:
        index["scheduler"] = ["diffusers", "DDPMExtScheduler" if ours else "DDPMScheduler"]
    if type(unet) is UNet2DExtModel:
        index["unet"] = ["diffusers", "UNet2DExtModel"]
    if index["_class_name"] == "DDPMExtPipeline" and not ours:
        index["_class_name"] = "DDPMPipeline"
    return index


def has_logvar(folder: str) -> bool:
    """Whether a folder holds a table that says what it is."""
    return Path(folder, TABLES[LOGVAR_FOLDER][0]).is_file()


def remove_table(folder: str, name: str) -> None:
    """Take an older table out of a folder that is saved to again: it would come back as the new model's.

    Args:
        folder: of the pipeline.
        name: of the table's folder.
    """
    for file in TABLES[name]:
        Path(folder, file).unlink(missing_ok=True)
    place = Path(folder, name)
    if place.is_dir() and not any(place.iterdir()):
        place.rmdir()


def fetch_tables(repo_id: str, commit: str, **options: Any) -> None:
    """Bring the tables of a repository into its cached snapshot, if it has them.

    Args:
        repo_id: the Hub id.
        commit: id of the commit that the snapshot holds, so that tables and weights belong together.
        **options: of ``hf_hub_download``; those that are None are left at their defaults.
    """
    options = {name: value for name, value in options.items() if value is not None}
    for name, files in TABLES.items():
        cached = try_to_load_from_cache(repo_id, files[0], options.get("cache_dir"), commit)
        if cached is not _CACHED_NO_EXIST:
            _fetch(repo_id, commit, name, options)


def _fetch(repo_id: str, commit: str, name: str, options: dict[str, Any]) -> None:
    try:
        for file in TABLES[name]:
            hf_hub_download(repo_id, file, revision=commit, **options)
    except LocalEntryNotFoundError:
        logger.warning(
            "Could not look for %s of %s: it is not cached, and the Hub was not reached. If a %s was saved there, "
            "pipeline.%s will be None.",
            TABLES[name][0],
            repo_id,
            name,
            name,
        )
    except EntryNotFoundError:
        pass  # most repositories have none; the client remembers that
