"""The saved folder of a `DDPMExtPipeline`: saving, pushing and loading, so that stock Diffusers opens it too.

    model_index.json               names of stock Diffusers' classes, so that stock readers open the folder
    scheduler/, unet/              the components, each written by Diffusers; the scheduler's config keeps our keys
    vqvae/ or vae/                 the first stage: as LDMPipeline names it, or as ours does
    logvar/, class_embedder/       tables next to the components, which only this package reads

A model that the stock pipelines would fail on, or sample wrongly without an error, is saved under our class names
instead: then stock Diffusers refuses it.
"""

from __future__ import annotations

import copy
import inspect
import json
import logging
import os
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline, SchedulerMixin
from huggingface_hub import _CACHED_NO_EXIST, hf_hub_download, try_to_load_from_cache, upload_folder
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
from torch import Tensor

from diffusers_ddpm_ext.diffusion.schedule import log_snr
from diffusers_ddpm_ext.errors import printable
from diffusers_ddpm_ext.losses.logvar import ContinuousLogvar, load_continuous, load_logvar, save_logvar
from diffusers_ddpm_ext.losses.logvar_files import LOGVAR_CONFIG_NAME, LOGVAR_FOLDER, LOGVAR_WEIGHTS_NAME
from diffusers_ddpm_ext.models.class_embedder import CLASS_EMBEDDER_FOLDER, load_class_embedder, save_class_embedder
from diffusers_ddpm_ext.models.latent_scale import SLOTS
from diffusers_ddpm_ext.models.text_kinds import ENCODER_SLOTS
from diffusers_ddpm_ext.pipelines.condition_encoders import ENCODER_COMPONENTS, checked_alias, float32_dtypes
from diffusers_ddpm_ext.pipelines.folder_checks import check_loaded, check_pipeline_folder
from diffusers_ddpm_ext.pipelines.pipeline_parts import PipelineParts
from diffusers_ddpm_ext.pipelines.saved_encoders import finish_encoders, place_encoders, quiet_saving, split_encoders
from diffusers_ddpm_ext.pipelines.stock_layout import (
    needs_guard,
    plain_network,
    reason_to_refuse_stock,
    saved_first_stage,
    stock_class,
    stock_model_index,
)
from diffusers_ddpm_ext.schedulers.scheduling_ddpm_ext import DDPMExtScheduler
from diffusers_ddpm_ext.utils.generations import read_one_generation, replace_pipeline
from diffusers_ddpm_ext.utils.network_folder import as_folder_error
from diffusers_ddpm_ext.utils.pipeline_files import (
    MODEL_INDEX,
    NETWORK_RECORDS,
    NETWORKS,
    RESULTS,
    TOKENIZER_FILES,
    files_to_keep,
    is_weights,
    weights_variant,
)

logger = logging.getLogger(__name__)

TABLE_FILES = {
    folder: (f"{folder}/{LOGVAR_CONFIG_NAME}", f"{folder}/{LOGVAR_WEIGHTS_NAME}")
    for folder in (LOGVAR_FOLDER, CLASS_EMBEDDER_FOLDER)
}
CARD = "README.md"
CONDITIONING_ARGUMENTS = (
    "conditioning_key",
    "use_positional_encodings",
    "null_class_label",
    "id2label",
    "latent_scaling_factor",
    "concat_through_vae",
    "pixel_format",
)


class SavedPipeline(DiffusionPipeline):
    """Saving and loading of a pipeline that has tables next to its components.

    Attributes:
        logvar: (T,), or None.
        class_embedder: (num_classes, dim), or None.
        vae: the first stage, or None.
        logvar_network: the function that ``logvar`` was computed with, where it is of the continuous kind, or None.
    """

    logvar: Tensor | None
    class_embedder: Tensor | None
    logvar_network: ContinuousLogvar | None = None
    vae: Any

    def save_pretrained(self, save_directory: str | os.PathLike[str], *args: Any, **kwargs: Any) -> None:
        """Save to a folder that stock Diffusers opens too; takes the arguments of ``DiffusionPipeline``'s method.

        Args:
            save_directory: the folder, created if it is missing.
            *args: as in Diffusers.
            **kwargs: as in Diffusers; with ``push_to_hub=True`` everything is in one commit, logvar included.
        """
        folder = Path(save_directory)
        if folder.is_file():
            raise ValueError(f"save_directory is {printable(str(folder))}, which is a file; give a folder.")
        arguments = inspect.signature(super().save_pretrained).bind(folder, *args, **kwargs).arguments
        if arguments.get("push_to_hub"):
            kwargs.setdefault("repo_id", folder.resolve().name)  # Diffusers would take the draft's
        self.warn_if_stock_fails()
        failure: BaseException | None = None
        with replace_pipeline(folder, partial(files_to_keep, variant=arguments.get("variant"))) as draft:
            try:
                self.write_files(draft, *args, **kwargs)
            except BaseException as error:
                if not (draft / MODEL_INDEX).is_file():
                    raise
                failure = error  # of the upload, which comes last: the folder has been saved
            if (folder / CARD).exists():
                (draft / CARD).unlink(missing_ok=True)  # of the upload; the folder has its own
        if failure is not None:
            raise failure

    def warn_if_stock_fails(self) -> None:
        """Log why the folder of this pipeline does not name a stock class, if it does not."""
        reason = self._reason_to_refuse_stock()
        if reason:
            logger.warning(
                "Stock Diffusers cannot sample this model right (%s): the folder names DDPMExtPipeline, and readers "
                "need diffusers-ddpm-ext.",
                reason,
            )

    def write_files(self, folder: Path, *args: Any, **kwargs: Any) -> None:
        """Write the files of `save_pretrained` into an empty folder; same arguments."""
        if self.logvar is not None:
            self.logvar = self.logvar  # checked again: the scheduler may have been replaced by one of another length
            save_logvar(folder, self.logvar, self.logvar_network)
        if self.class_embedder is not None:
            save_class_embedder(folder, self.class_embedder)
        plain = copy.copy(self)
        plain.unet = plain_network(self.unet, needs_guard(self.scheduler, self.config))
        stock = stock_class(self.parts)
        if self.vae is not None:
            slot, vae = saved_first_stage(self.vae, stock)
            plain.__dict__.update(dict.fromkeys(SLOTS) | {slot: vae})
            entries = dict.fromkeys(SLOTS, (None, None)) | {slot: ("diffusers", type(vae).__name__)}
            plain.register_to_config(**entries)
        place_encoders(plain, stock)
        with quiet_saving(self):
            super(SavedPipeline, plain).save_pretrained(os.fspath(folder), *args, **kwargs)

    def save_config(self, save_directory: str | os.PathLike[str], push_to_hub: bool = False, **kwargs: Any) -> None:
        """Diffusers' method, which is the last step of saving before an upload."""
        finish_encoders(Path(save_directory))
        super().save_config(save_directory, push_to_hub=push_to_hub, **kwargs)

    @property
    def parts(self) -> PipelineParts:
        """What decides which class the folder of this pipeline names."""

        def first(*names: str) -> Any:
            return next((self.__dict__[name] for name in names if self.__dict__.get(name) is not None), None)

        return PipelineParts(
            self.unet,
            self.scheduler,
            self.config,
            first(*SLOTS),
            first(*ENCODER_SLOTS),
            first("tokenizer"),
            first("concat_encoder", "image_encoder") is not None,
        )

    def _reason_to_refuse_stock(self) -> str:
        return reason_to_refuse_stock(self.parts)

    def _absent_tables(self) -> list[str]:
        """Folders of the tables that this pipeline does not have."""
        tables = {LOGVAR_FOLDER: self.logvar, CLASS_EMBEDDER_FOLDER: self.class_embedder}
        return [name for name, table in tables.items() if table is None]

    def to_json_file(self, json_file_path: str | os.PathLike[str]) -> None:
        """Write ``model_index.json`` with class names that stock Diffusers knows."""
        index = stock_model_index(json.loads(self.to_json_string()), self.parts)
        Path(json_file_path).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")

    def _upload_folder(
        self,
        working_dir: str | os.PathLike[str],
        repo_id: str,
        token: str | None = None,
        commit_message: str | None = None,
        create_pr: bool = False,
        subfolder: str | None = None,
    ) -> Any:
        """Diffusers' upload, which also deletes from the repository what a former model owned and this one lacks."""
        names = [path.name for path in Path(working_dir, "unet").glob("*") if is_weights(path.name)]
        patterns = [f"{name}/*" for name in self._absent_tables()]
        if any(weights_variant(name) is None for name in names):  # not a variant that is added to the others
            patterns += [*NETWORK_RECORDS, *RESULTS, *(f"{name}/config.json" for name in NETWORKS if name != "unet")]
            patterns += [f"{name}/{end}" for name in NETWORKS for end in ("*.safetensors", "*.bin", "*.index*.json")]
            patterns += [f"tokenizer/{name}" for name in TOKENIZER_FILES]
            patterns += ["feature_extractor/preprocessor_config.json", "feature_extractor/processor_config.json"]
        return upload_folder(
            repo_id=repo_id,
            folder_path=os.fspath(working_dir),
            path_in_repo=subfolder,
            token=token,
            commit_message=commit_message or f"Upload {type(self).__name__}",
            create_pr=create_pr,
            delete_patterns=patterns or None,
        )

    def register_to_config(self, **kwargs: Any) -> None:
        """Diffusers' method; the generic ``DiffusionPipeline.from_pretrained`` calls it last, with the folder."""
        super().register_to_config(**kwargs)
        folder = kwargs.get("_name_or_path")
        if isinstance(folder, (str, os.PathLike)) and os.path.isdir(folder):
            self._load_tables(os.fspath(folder))

    def _load_tables(self, folder: str) -> None:
        """Load the tables that a folder holds next to its components."""
        # In its cache, stock Diffusers may have stored a repository's table without its config: we then load none, as
        # `fetch_tables` has logged.
        if Path(folder).parent.name != "snapshots" or Path(folder, TABLE_FILES[LOGVAR_FOLDER][0]).is_file():
            self.logvar = load_logvar(folder)
            if isinstance(self.scheduler, DDPMExtScheduler):
                self.logvar_network = load_continuous(folder, torch.from_numpy(log_snr(self.scheduler.schedule)))
        self.class_embedder = load_class_embedder(folder)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike[str], **kwargs: Any) -> Any:
        """Load from a folder or a Hub id, saved by this class or by stock ``DDPMPipeline``.

        Args:
            pretrained_model_name_or_path: the folder or ``user/name``.
            **kwargs: as in ``DiffusionPipeline.from_pretrained``. A ``torch_dtype`` is that of the network: a first
                stage is loaded in float32, unless a dictionary says otherwise. ``vae=None`` leaves it out, and the
                samples are latents.

        Returns:
            The pipeline, with ``logvar`` and ``class_embedder`` if they were saved.
        """
        source = os.fspath(pretrained_model_name_or_path)
        if kwargs.get("custom_pipeline") is not None or (not os.path.isdir(source) and source.count("/") > 1):
            return super().from_pretrained(source, **kwargs)  # another class, or a path that does not exist
        if "scheduler" in kwargs and kwargs["scheduler"] is None:
            del kwargs["scheduler"]  # a pipeline needs one: that of the folder
        if os.path.isdir(source):
            pipeline = read_one_generation(source, lambda folder: cls._load(folder, kwargs, {}))
        else:
            folder = Path(cls.download(source, **kwargs))
            names = ("cache_dir", "token", "local_files_only")
            hub = {name: kwargs[name] for name in names if name in kwargs}
            pipeline = cls._load(folder, kwargs, {"repo": source, "revision": folder.name} | hub)
        DiffusionPipeline.register_to_config(pipeline, _name_or_path=source)  # ours would load the tables again
        return pipeline

    @classmethod
    def _load(cls, folder: Path, kwargs: Mapping[str, Any], hub: dict[str, Any]) -> Any:
        """Load from a folder, which a repository was downloaded to if ``hub`` says so."""
        kwargs = dict(kwargs)
        without = any(slot in kwargs and kwargs[slot] is None for slot in SLOTS)
        vae = checked_alias("vae", kwargs.pop("vae", None), "vqvae", kwargs.pop("vqvae", None))
        if vae is not None:
            kwargs |= {"vae": vae, "vqvae": None}  # instead of the folder's, in whatever slot that is
        given = frozenset(name for name in ("unet", "scheduler", *SLOTS) if kwargs.get(name) is not None)
        given |= {name for name in ENCODER_COMPONENTS if name in kwargs}
        check_pipeline_folder(folder, kwargs.get("variant"), given)
        kwargs, encoders = split_encoders(folder, kwargs)
        with as_folder_error(folder):
            pipeline = super().from_pretrained(os.fspath(folder), **kwargs | float32_dtypes(kwargs))
        if kwargs.get("device_map") is None:
            check_loaded(pipeline, folder, kwargs.get("variant"), given)
        for name, component in encoders.items():
            if component is not None:
                setattr(pipeline, name, component)
        if without and vae is None and pipeline.vae is not None:
            pipeline.vae = None
        if isinstance(kwargs.get("scheduler"), SchedulerMixin):  # then a download has none
            repo = hub.get("repo", folder)
            options = {name: value for name, value in hub.items() if name != "repo"}
            config = DDPMExtScheduler.load_config(repo, subfolder="scheduler", **options)
            pipeline._trained_scheduler = DDPMExtScheduler.from_config(config)
        return pipeline

    @classmethod
    def download(cls, pretrained_model_name: str, **kwargs: Any) -> str | os.PathLike[str]:
        """Download a repository into the cache, as Diffusers does, and the tables next to its components.

        Args:
            pretrained_model_name: the Hub id.
            **kwargs: as in ``DiffusionPipeline.download``.

        Returns:
            The snapshot's folder.
        """
        folder = super().download(pretrained_model_name, **kwargs)
        names = ("cache_dir", "token", "local_files_only", "force_download")
        fetch_tables(pretrained_model_name, Path(folder).name, **{name: kwargs.get(name) for name in names})
        return folder

    @classmethod
    def from_pipe(cls, pipeline: DiffusionPipeline, **kwargs: Any) -> Any:
        """Build a pipeline from another one's components, sharing them.

        Args:
            pipeline: e.g. a stock ``DDPMPipeline``.
            **kwargs: as in ``DiffusionPipeline.from_pipe``.

        Returns:
            The new pipeline; from one of ours also with its ``logvar``, ``class_embedder`` and conditioning.
        """
        if isinstance(pipeline, SavedPipeline):
            kwargs = {
                name: pipeline.config[name] for name in CONDITIONING_ARGUMENTS if name in pipeline.config
            } | kwargs
        if kwargs.get("image_encoder", pipeline.components.get("image_encoder")) is None:
            kwargs.setdefault("feature_extractor", None)  # of a safety checker, which this class does not have
        if any(name in kwargs and kwargs[name] is None for name in ENCODER_SLOTS):
            kwargs.setdefault("tokenizer", None)
        new = super().from_pipe(pipeline, **kwargs)
        if isinstance(pipeline, SavedPipeline) and isinstance(new, SavedPipeline):
            new.logvar, new.class_embedder = pipeline.logvar, pipeline.class_embedder
            new.logvar_network = pipeline.logvar_network
            if pipeline.vae is not None and new.vae is None:
                new.vae = pipeline.vae
                new.vae = None  # its samples are latents all the same
        return new


# ------------------------------------------------------------------ tables on the Hub


def fetch_tables(repo_id: str, commit: str, **options: Any) -> None:
    """Download the tables of a repository into its cached snapshot, if it has them.

    ``commit`` is the snapshot's, so that tables and weights belong together; ``options`` are those of
    ``hf_hub_download``, those that are None are left at their defaults.
    """
    options = {name: value for name, value in options.items() if value is not None}
    for name, files in TABLE_FILES.items():
        cached = try_to_load_from_cache(repo_id, files[0], options.get("cache_dir"), commit)
        if cached is _CACHED_NO_EXIST:
            continue
        try:
            for file in files:
                hf_hub_download(repo_id, file, revision=commit, **options)
        except LocalEntryNotFoundError:
            logger.warning(
                "Could not look for %s of %s: it is not cached, and the Hub was not reached. If a %s was saved there, "
                "pipeline.%s will be None.",
                files[0],
                repo_id,
                name,
                name,
            )
        except EntryNotFoundError:
            pass  # most repositories have none; the client caches that
