"""The folder and the repository of a `DDPMExtPipeline`: saving, pushing, loading (`pipelines.layout`)."""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline, SchedulerMixin
from huggingface_hub import upload_folder
from torch import Tensor

from diffusers_ddpm_ext.diffusion.schedule import log_snr
from diffusers_ddpm_ext.losses.logvar import LOGVAR_FOLDER, ContinuousLogvar, load_continuous, load_logvar, save_logvar
from diffusers_ddpm_ext.models import class_embedder
from diffusers_ddpm_ext.models.class_embedder import load_class_embedder, save_class_embedder
from diffusers_ddpm_ext.pipelines.layout import JOINED, fetch_tables, has_logvar, ours_only, remove_table, stock_words
from diffusers_ddpm_ext.schedulers.scheduling_ddpm_ext import DDPMExtScheduler

logger = logging.getLogger(__name__)


class PipelineFiles(DiffusionPipeline):
    """What a pipeline with tables beside its components adds to Diffusers' saving and loading.

    Attributes:
        logvar: (T,), or None.
        class_embedder: (num_classes, dim), or None.
        logvar_network: the function that ``logvar`` was taken from, where it is of the continuous kind, or None.
    """

    logvar: Tensor | None
    class_embedder: Tensor | None
    logvar_network: ContinuousLogvar | None = None

    def save_tables(self, folder: str) -> None:
        """Write the tables into a folder, and take out those that this pipeline does not have.

        Args:
            folder: of the pipeline, made if it is missing.
        """
        if self.logvar is not None:
            self.logvar = self.logvar  # checked again: the scheduler may have been replaced by one of another length
            save_logvar(folder, self.logvar, self.logvar_network)
        if self.class_embedder is not None:
            save_class_embedder(folder, self.class_embedder)
        for name in self.missing_tables():
            remove_table(folder, name)

    def missing_tables(self) -> list[str]:
        """Folders of the tables that this pipeline does not have."""
        held = {LOGVAR_FOLDER: self.logvar, class_embedder.CLASS_EMBEDDER_FOLDER: self.class_embedder}
        return [name for name, table in held.items() if table is None]

    def save_pretrained(self, save_directory: str | os.PathLike[str], *args: Any, **kwargs: Any) -> None:
        """Save to a folder that stock Diffusers opens too; takes the arguments of ``DiffusionPipeline``'s method.

        Args:
            save_directory: the folder, made if it is missing.
            *args: as in Diffusers.
            **kwargs: as in Diffusers; with ``push_to_hub=True`` everything travels in one commit, logvar included.
        """
        folder = os.fspath(save_directory)
        if os.path.isfile(folder):
            raise ValueError(f"save_directory is {folder}, which is a file; give a folder.")
        # Before the components: the upload is the last thing that happens below.
        self.save_tables(folder)
        why = ours_only(self.unet, self.scheduler, self.config)
        if why:
            logger.warning(
                "Stock Diffusers cannot sample this model right (%s): the folder names DDPMExtPipeline, and readers "
                "need diffusers-ddpm-ext.",
                why,
            )
        super().save_pretrained(folder, *args, **kwargs)

    def to_json_file(self, json_file_path: str | os.PathLike[str]) -> None:
        """Write ``model_index.json`` in words that stock Diffusers knows."""
        index = stock_words(json.loads(self.to_json_string()), self.unet, self.scheduler, self.config)
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
        """Diffusers' upload; tables that a pipeline does not have are taken out of the repository, too."""
        return upload_folder(
            repo_id=repo_id,
            folder_path=os.fspath(working_dir),
            path_in_repo=subfolder,
            token=token,
            commit_message=commit_message or f"Upload {type(self).__name__}",
            create_pr=create_pr,
            delete_patterns=[f"{name}/*" for name in self.missing_tables()] or None,
        )

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike[str], **kwargs: Any) -> Any:
        """Load from a folder or a Hub id, saved by this class or by stock ``DDPMPipeline``.

        Args:
            pretrained_model_name_or_path: the folder or ``user/name``.
            **kwargs: as in ``DiffusionPipeline.from_pretrained``.

        Returns:
            The pipeline, with ``logvar`` and ``class_embedder`` if they were saved.
        """
        source = os.fspath(pretrained_model_name_or_path)
        if kwargs.get("custom_pipeline") is not None or (not os.path.isdir(source) and source.count("/") > 1):
            return super().from_pretrained(source, **kwargs)  # another class, or a path that does not exist
        folder = source if os.path.isdir(source) else os.fspath(cls.download(source, **kwargs))
        pipeline = super().from_pretrained(folder, **kwargs)
        pipeline.register_to_config(_name_or_path=source)
        if isinstance(kwargs.get("scheduler"), SchedulerMixin):
            names = ("cache_dir", "token", "local_files_only")
            hub: dict[str, Any] = {name: kwargs[name] for name in names if name in kwargs}
            if folder != source:
                hub["revision"] = Path(folder).name
            config = DDPMExtScheduler.load_config(source, subfolder="scheduler", **hub)
            pipeline._trained_scheduler = DDPMExtScheduler.from_config(config)
        # Stock Diffusers may have cached a repository's table without its config: to us that is none (and was logged).
        if folder == source or has_logvar(folder):
            pipeline.logvar = load_logvar(folder)
            if isinstance(pipeline.scheduler, DDPMExtScheduler):
                pipeline.logvar_network = load_continuous(
                    folder, torch.from_numpy(log_snr(pipeline.scheduler.schedule))
                )
        pipeline.class_embedder = load_class_embedder(folder)
        return pipeline

    @classmethod
    def download(cls, pretrained_model_name: str, **kwargs: Any) -> str | os.PathLike[str]:
        """Bring a repository into the cache, as Diffusers does, and the tables beside its components too.

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
        """Build one on another pipeline's components, sharing them.

        Args:
            pipeline: e.g. a stock ``DDPMPipeline``.
            **kwargs: as in ``DiffusionPipeline.from_pipe``.

        Returns:
            The new pipeline; from one of ours it takes ``logvar`` and ``class_embedder`` along, and how conditions
            are joined.
        """
        if isinstance(pipeline, PipelineFiles):
            kwargs = {name: pipeline.config[name] for name in JOINED if name in pipeline.config} | kwargs
        new = super().from_pipe(pipeline, **kwargs)
        if isinstance(pipeline, PipelineFiles) and isinstance(new, PipelineFiles):
            new.logvar, new.class_embedder = pipeline.logvar, pipeline.class_embedder
            new.logvar_network = pipeline.logvar_network
        return new
