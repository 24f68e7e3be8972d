"""The folder a pipeline is saved as, and which reader can do what with it.

    model_index.json               stock Diffusers' words, so that stock readers open it
    scheduler/, unet/              the components, each by Diffusers' own code; the scheduler's config keeps our keys
    logvar/                        the learned log-variance, beside the components: no reader but ours knows of it

A model that stock ``DDPMPipeline`` would fail on, or sample wrongly without a word, is written in our words instead:
then every stock door refuses.
"""

from __future__ import annotations

import inspect
import logging
from pathlib import Path
from typing import Any

from huggingface_hub import _CACHED_NO_EXIST, hf_hub_download, try_to_load_from_cache
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

from diffusers_ddpm_ext.logvar import CONFIG_NAME, FOLDER, WEIGHTS_NAME
from diffusers_ddpm_ext.scheduler import DDPMExtScheduler

logger = logging.getLogger(__name__)

LOGVAR_FILES = (f"{FOLDER}/{CONFIG_NAME}", f"{FOLDER}/{WEIGHTS_NAME}")
LEARNED_VARIANCES = ("learned", "learned_range")
# Stock DDPMScheduler takes the root of a log-variance for these: every sample becomes NaN.
NAN_IN_STOCK = ("learned", "fixed_large_log")


def reads_variance(scheduler: Any) -> bool:
    """Whether the class has a ``variance_type``: a config swap leaves the key with classes that ignore it."""
    return "variance_type" in inspect.signature(type(scheduler).__init__).parameters


def is_ours_only(unet: Any, scheduler: Any) -> bool:
    """Whether stock DDPMPipeline would fail on this model, or run and be wrong."""
    variance_type = scheduler.config.get("variance_type")
    if isinstance(scheduler, DDPMExtScheduler):
        return variance_type in NAN_IN_STOCK
    twice = unet.config.out_channels == 2 * unet.config.in_channels
    return variance_type in LEARNED_VARIANCES and twice and not reads_variance(scheduler)


def stock_words(index: dict[str, Any], unet: Any, scheduler: Any) -> dict[str, Any]:
    """The content of ``model_index.json``.

    Args:
        index: what Diffusers would write, which names our classes by their modules.
        unet: the pipeline's network.
        scheduler: its scheduler.

    Returns:
        A copy in words that readers know. Subclasses of ours, and other schedulers, stay recorded as themselves.
    """
    index = dict(index)
    index.pop("_name_or_path", None)  # where this copy once came from, maybe a private path
    ours_only = is_ours_only(unet, scheduler)
    if type(scheduler) is DDPMExtScheduler:
        # By a module path, a Hub id would not load: Diffusers looks for that file in the repository.
        index["scheduler"] = ["diffusers", "DDPMExtScheduler" if ours_only else "DDPMScheduler"]
    if index["_class_name"] == "DDPMExtPipeline" and not ours_only:
        index["_class_name"] = "DDPMPipeline"
    return index


def has_logvar(folder: str) -> bool:
    """Whether a folder holds a table that says what it is."""
    return Path(folder, LOGVAR_FILES[0]).is_file()


def remove_logvar(folder: str) -> None:
    """Take an older table out of a folder that is saved to again: it would come back as the new model's."""
    for name in LOGVAR_FILES:
        Path(folder, name).unlink(missing_ok=True)
    place = Path(folder, FOLDER)
    if place.is_dir() and not any(place.iterdir()):
        place.rmdir()


def fetch_logvar(repo_id: str, commit: str, **options: Any) -> None:
    """Bring ``logvar/`` of a repository into its cached snapshot, if it has one.

    Args:
        repo_id: the Hub id.
        commit: id of the commit that the snapshot holds, so that table and weights belong together.
        **options: of ``hf_hub_download``; those that are None are left at their defaults.
    """
    options = {name: value for name, value in options.items() if value is not None}
    cached = try_to_load_from_cache(repo_id, LOGVAR_FILES[0], options.get("cache_dir"), commit)
    if cached is _CACHED_NO_EXIST:
        return
    try:
        for name in LOGVAR_FILES:
            hf_hub_download(repo_id, name, revision=commit, **options)
    except LocalEntryNotFoundError:
        logger.warning(
            "Could not look for %s of %s: it is not cached, and the Hub was not reached. If a logvar was saved there, "
            "pipeline.logvar will be None.",
            LOGVAR_FILES[0],
            repo_id,
        )
    except EntryNotFoundError:
        pass  # most repositories have none; the client remembers that
