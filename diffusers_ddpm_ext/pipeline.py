"""DDPMExtPipeline: CompVis' ``p_sample_loop`` as a Diffusers pipeline, and the folder it is saved as.

What is saved opens everywhere: a reader without this package gets ``DDPMPipeline`` and ``DDPMScheduler``, while
`DDPMExtPipeline` turns the stock scheduler back into ours, with all its keys (`diffusers_ddpm_ext.layout`).

Source: [DDPM] Ho et al. 2020, algorithm 2.
"""

from __future__ import annotations

import inspect
import json
import logging
import math
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import diffusers
import numpy as np
import torch
from diffusers import DDPMScheduler, DiffusionPipeline, ImagePipelineOutput, SchedulerMixin, UNet2DModel
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.utils.torch_utils import randn_tensor
from huggingface_hub import upload_folder
from torch import Tensor

from diffusers_ddpm_ext.layout import (
    LEARNED_VARIANCES,
    fetch_logvar,
    has_logvar,
    is_ours_only,
    reads_variance,
    remove_logvar,
    stock_words,
)
from diffusers_ddpm_ext.logvar import FOLDER, load_logvar, save_logvar
from diffusers_ddpm_ext.scheduler import DDPMExtScheduler

logger = logging.getLogger(__name__)

OUTPUT_TYPES = ("pil", "np", "pt", "latent")
PIL_MODES = {1: "L", 3: "RGB", 4: "RGBA"}


@dataclass
class DDPMExtPipelineOutput(ImagePipelineOutput):
    """What one call of `DDPMExtPipeline` made.

    Args:
        images: list of PIL images, or an array (B, H, W, C) in [0, 1] for "np", a tensor (B, C, H, W) in [0, 1] for
            "pt", the same in data units and unclipped for "latent".
        intermediates: with ``log_every_t``, CompVis' list: x_T, then the sample after each logged step, each
            (B, C, H, W) in data units on the pipeline's device. None otherwise.
        pred_x0: with ``log_every_t``, the clean images predicted at the logged steps, so that ``pred_x0[k]`` belongs
            to ``intermediates[k + 1]``. None also where the scheduler does not report its prediction.
    """

    intermediates: list[Tensor] | None = None
    pred_x0: list[Tensor] | None = None


class DDPMExtPipeline(DiffusionPipeline):
    """Draws images from an unconditional diffusion model ([DDPM] algorithm 2), step by step as CompVis' ``DDPM``.

    Args:
        unet: network from (B, C, H, W) and a step to (B, C, H, W), or to (B, 2C, H, W) with learned variances.
        scheduler: any Diffusers scheduler. A plain ``DDPMScheduler`` becomes a `DDPMExtScheduler` with its config,
            here and whenever one is assigned to ``pipeline.scheduler``; other classes stay what they are.
    """

    model_cpu_offload_seq = "unet"
    _callback_tensor_inputs: ClassVar[list[str]] = ["latents", "model_output"]

    def __init__(self, unet: UNet2DModel, scheduler: SchedulerMixin) -> None:
        super().__init__()
        self._logvar: Tensor | None = None
        self._num_timesteps = 0
        self._interrupt = False
        self.register_modules(unet=unet, scheduler=as_ours(scheduler))

    def __setattr__(self, name: str, value: Any) -> None:
        """Assign, and turn a stock scheduler into ours on the way."""
        super().__setattr__(name, as_ours(value) if name == "scheduler" else value)

    # ------------------------------------------------------------------ what it knows

    @property
    def logvar(self) -> Tensor | None:
        """The learned log-variance of the training loss, one entry a step: (T,), float32, CPU. None if not learned.

        `from_pretrained` of this class reads it; the generic ``DiffusionPipeline`` knows nothing of it.
        """
        return self._logvar

    @logvar.setter
    def logvar(self, table: Tensor | None) -> None:
        steps = self.scheduler.config.num_train_timesteps
        if table is not None:
            table = torch.as_tensor(table).detach().to(device="cpu", dtype=torch.float32, copy=True)
            if table.shape != (steps,):
                raise ValueError(
                    f"logvar has shape {tuple(table.shape)}; this pipeline's scheduler has {steps} steps, so it must "
                    f"be ({steps},). Take the table of the objective that trained with this schedule."
                )
            _check_finite(table, "logvar")
        self._logvar = table

    @property
    def num_timesteps(self) -> int:
        """Number of steps of the last call."""
        return self._num_timesteps

    @property
    def interrupt(self) -> bool:
        """Whether a callback asked to stop, by ``pipeline._interrupt = True``."""
        return self._interrupt

    # ------------------------------------------------------------------ sampling

    @torch.no_grad()
    def __call__(
        self,
        batch_size: int = 1,
        generator: torch.Generator | list[torch.Generator] | None = None,
        num_inference_steps: int | None = None,
        output_type: str | None = "pil",
        return_dict: bool = True,
        log_every_t: int | None = None,
        temperature: float = 1.0,
        callback_on_step_end: Callable[..., dict[str, Any]] | PipelineCallback | MultiPipelineCallbacks | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        latents: Tensor | None = None,
        timesteps: Sequence[int] | None = None,
    ) -> DDPMExtPipelineOutput | tuple[Any, ...]:
        """Draw a batch of images.

        Args:
            batch_size: how many images.
            generator: source of all noise, or a list of them, one an image: then image i depends on generator i only,
                whatever the batch.
            num_inference_steps: number K of steps kept of the T trained ones. None takes all T.
            output_type: "pil", "np", "pt", or "latent" (the sample in data units, as the scheduler left it).
            return_dict: whether to return a `DDPMExtPipelineOutput` or a tuple of its fields that are not None.
            log_every_t: with n, the output also carries ``intermediates`` and ``pred_x0`` for each kept step i,
                counted from K - 1 down to 0, with ``i % n == 0`` or ``i == K - 1`` (CompVis' ``log_every_t``).
            temperature: factor on the noise of each step, not on the starting noise (CompVis' ``temperature``). Other
                values than 1 need a `DDPMExtScheduler`.
            callback_on_step_end: called as ``callback(pipeline, i, t, tensors)`` after each step, i counting up from
                0; ``latents`` in the dict it returns replaces the sample.
            callback_on_step_end_tensor_inputs: which tensors it gets: "latents" (the sample), "model_output".
            latents: the starting noise, (batch_size, C, H, W), standard normal, instead of a drawn one.
            timesteps: the steps to keep, descending, instead of ``num_inference_steps``.

        Returns:
            `DDPMExtPipelineOutput`, or a tuple whose first entry is the images.

        Raises:
            ValueError: an argument is out of its range, the model does not fit, or the samples are not finite.
        """
        self._check_call(batch_size, output_type, log_every_t, temperature)
        generator = _check_generators(generator, batch_size)
        if isinstance(callback_on_step_end, PipelineCallback | MultiPipelineCallbacks):
            callback_on_step_end_tensor_inputs = callback_on_step_end.tensor_inputs
        self._check_callback_inputs(callback_on_step_end_tensor_inputs)
        shape = self._sample_shape(batch_size, output_type)

        device = self._execution_device
        steps = self._set_timesteps(num_inference_steps, timesteps, device)
        sample = self._start(shape, generator, latents, device)
        record = _Record(log_every_t, len(steps), sample)
        accepts_generator = "generator" in inspect.signature(self.scheduler.step).parameters
        step_kwargs: dict[str, Any] = {"generator": generator} if accepts_generator else {}
        self._num_timesteps, self._interrupt = len(steps), False
        network_dtype = self.unet.dtype
        # As ints, the steps cost our scheduler no read from the device.
        step_arguments = steps.tolist() if isinstance(self.scheduler, DDPMExtScheduler) else steps

        for i, t in enumerate(self.progress_bar(steps)):
            model_input = self.scheduler.scale_model_input(sample, t)
            model_output = self.unet(model_input.to(network_dtype), t, return_dict=False)[0].to(sample.dtype)
            if i == 0:
                _check_finite(model_output, "the model's first output")
            model_output = self._drop_unread_variance(model_output, sample)
            if temperature != 1.0:
                step_kwargs["variance_noise"] = None
                if step_arguments[i] != 0:  # at 0 the scheduler draws nothing either
                    noise = randn_tensor(sample.shape, generator=generator, device=device, dtype=sample.dtype)
                    step_kwargs["variance_noise"] = noise.mul_(temperature)
            result = self.scheduler.step(model_output, step_arguments[i], sample, **step_kwargs)
            sample = result.prev_sample
            if callback_on_step_end is not None:
                tensors = {"latents": sample, "model_output": model_output}
                chosen = {name: tensors[name] for name in callback_on_step_end_tensor_inputs}
                sample = (callback_on_step_end(self, i, t, chosen) or {}).get("latents", sample)
            record.add(i, sample, result)
            if self._interrupt:
                break

        _check_finite(sample, "the samples")
        output = DDPMExtPipelineOutput(self._as_images(sample, output_type), record.intermediates, record.pred_x0)
        self.maybe_free_model_hooks()
        return output if return_dict else output.to_tuple()

    def _check_call(
        self, batch_size: int, output_type: str | None, log_every_t: int | None, temperature: float
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}; it must be 1 or more.")
        if output_type not in OUTPUT_TYPES:
            raise ValueError(f"output_type is {output_type!r}; it must be one of {', '.join(OUTPUT_TYPES)}.")
        if log_every_t is not None and log_every_t < 1:
            raise ValueError(f"log_every_t is {log_every_t}; it must be 1 or more, or None for no intermediates.")
        if not (math.isfinite(temperature) and temperature >= 0):
            raise ValueError(f"temperature is {temperature}; it must be a finite number, 0 or more.")
        if temperature != 1.0 and not isinstance(self.scheduler, DDPMExtScheduler):
            raise ValueError(
                f"temperature is {temperature}, but {type(self.scheduler).__name__} draws its own noise. Leave it at "
                "1, or use pipeline.scheduler = DDPMExtScheduler.from_config(pipeline.scheduler.config)."
            )

    def _check_callback_inputs(self, names: Iterable[str]) -> None:
        unknown = [name for name in names if name not in self._callback_tensor_inputs]
        if unknown:
            raise ValueError(
                f"callback_on_step_end_tensor_inputs has {', '.join(unknown)}; it may have "
                f"{', '.join(self._callback_tensor_inputs)}."
            )

    def _sample_shape(self, batch_size: int, output_type: str | None) -> tuple[int, int, int, int]:
        config = self.unet.config
        channels, size = config.in_channels, config.sample_size
        if size is None:
            raise ValueError(
                "The model's config has sample_size None, so the size of an image is unknown. Set it once: "
                "pipeline.unet.register_to_config(sample_size=(height, width))."
            )
        if output_type == "pil" and channels not in PIL_MODES:
            known = ", ".join(f"{count} ({mode})" for count, mode in PIL_MODES.items())
            raise ValueError(
                f'output_type is "pil", but the images have {channels} channels; PIL images have {known}. '
                'Use output_type="np" or output_type="pt".'
            )
        height, width = (size, size) if isinstance(size, int) else size
        return batch_size, channels, height, width

    def _set_timesteps(self, count: int | None, timesteps: Sequence[int] | None, device: torch.device) -> Tensor:
        if timesteps is not None:
            if count is not None:
                raise ValueError("num_inference_steps and timesteps both say which steps to take; give one of them.")
            if "timesteps" not in inspect.signature(self.scheduler.set_timesteps).parameters:
                name = type(self.scheduler).__name__
                raise ValueError(f"timesteps is given, but {name} takes only num_inference_steps.")
            self.scheduler.set_timesteps(timesteps=[int(t) for t in timesteps], device=device)
        else:
            count = self.scheduler.config.num_train_timesteps if count is None else count
            if count < 1:
                raise ValueError(f"num_inference_steps is {count}; it must be 1 or more, or None for all steps.")
            self.scheduler.set_timesteps(count, device=device)
        return self.scheduler.timesteps

    def _start(
        self,
        shape: tuple[int, int, int, int],
        generator: torch.Generator | list[torch.Generator] | None,
        latents: Tensor | None,
        device: torch.device,
    ) -> Tensor:
        """x_T. The sample is never below float32: only the network runs in half precision."""
        dtype = torch.promote_types(torch.float32, self.unet.dtype)
        if latents is None:
            latents = randn_tensor(shape, generator=generator, device=device, dtype=dtype)
        elif latents.shape != shape:
            raise ValueError(f"latents has shape {tuple(latents.shape)}; batch_size and the model ask for {shape}.")
        return latents.to(device=device, dtype=dtype) * self.scheduler.init_noise_sigma

    def _drop_unread_variance(self, model_output: Tensor, sample: Tensor) -> Tensor:
        """Keep the half of the channels that the scheduler reads."""
        channels, made = sample.shape[1], model_output.shape[1]
        learned = self.scheduler.config.get("variance_type") in LEARNED_VARIANCES
        if made == channels or (learned and made == 2 * channels and reads_variance(self.scheduler)):
            return model_output
        if learned and made == 2 * channels:
            return model_output[:, :channels]
        raise ValueError(
            f"The model makes {made} channels of {channels}. An unconditional model makes as many as it takes, or "
            f"twice as many when the scheduler's variance_type is one of {', '.join(LEARNED_VARIANCES)} (here: "
            f"{self.scheduler.config.get('variance_type')})."
        )

    def _as_images(self, sample: Tensor, output_type: str | None) -> Any:
        if output_type == "latent":
            return sample
        images = (sample / 2 + 0.5).clamp(0, 1)
        if output_type == "pt":
            return images
        array: np.ndarray = images.cpu().permute(0, 2, 3, 1).float().numpy()
        return self.numpy_to_pil(array) if output_type == "pil" else array

    # ------------------------------------------------------------------ saving and loading

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
        if self._logvar is not None:
            self.logvar = self._logvar  # the scheduler may have been replaced by one of another length
            save_logvar(folder, self._logvar)
        else:
            remove_logvar(folder)
        if is_ours_only(self.unet, self.scheduler):
            logger.warning(
                "Stock Diffusers cannot sample this model right (variance_type %s): the folder names DDPMExtPipeline, "
                "and readers need diffusers-ddpm-ext.",
                self.scheduler.config.get("variance_type"),
            )
        super().save_pretrained(folder, *args, **kwargs)

    def to_json_file(self, json_file_path: str | os.PathLike[str]) -> None:
        """Write ``model_index.json`` in words that stock Diffusers knows."""
        index = stock_words(json.loads(self.to_json_string()), self.unet, self.scheduler)
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
        """Diffusers' upload; a pipeline without a logvar also takes an older one out of the repository."""
        return upload_folder(
            repo_id=repo_id,
            folder_path=os.fspath(working_dir),
            path_in_repo=subfolder,
            token=token,
            commit_message=commit_message or f"Upload {type(self).__name__}",
            create_pr=create_pr,
            delete_patterns=[f"{FOLDER}/*"] if self._logvar is None else None,
        )

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike[str], **kwargs: Any) -> Any:
        """Load from a folder or a Hub id, saved by this class or by stock ``DDPMPipeline``.

        Args:
            pretrained_model_name_or_path: the folder or ``user/name``.
            **kwargs: as in ``DiffusionPipeline.from_pretrained``.

        Returns:
            The pipeline, with ``logvar`` if one was saved.
        """
        source = os.fspath(pretrained_model_name_or_path)
        if kwargs.get("custom_pipeline") is not None or (not os.path.isdir(source) and source.count("/") > 1):
            return super().from_pretrained(source, **kwargs)  # another class, or a path that does not exist
        folder = source if os.path.isdir(source) else os.fspath(cls.download(source, **kwargs))
        pipeline = super().from_pretrained(folder, **kwargs)
        pipeline.register_to_config(_name_or_path=source)
        # Stock Diffusers may have cached a repository's table without its config: to us that is none (and was logged).
        if folder == source or has_logvar(folder):
            pipeline.logvar = load_logvar(folder)
        return pipeline

    @classmethod
    def download(cls, pretrained_model_name: str, **kwargs: Any) -> str | os.PathLike[str]:
        """Bring a repository into the cache, as Diffusers does, and its ``logvar/`` too.

        Args:
            pretrained_model_name: the Hub id.
            **kwargs: as in ``DiffusionPipeline.download``.

        Returns:
            The snapshot's folder.
        """
        folder = super().download(pretrained_model_name, **kwargs)
        names = ("cache_dir", "token", "local_files_only", "force_download")
        fetch_logvar(pretrained_model_name, Path(folder).name, **{name: kwargs.get(name) for name in names})
        return folder

    @classmethod
    def from_pipe(cls, pipeline: DiffusionPipeline, **kwargs: Any) -> Any:
        """Build one on another pipeline's components, sharing them.

        Args:
            pipeline: e.g. a stock ``DDPMPipeline``.
            **kwargs: as in ``DiffusionPipeline.from_pipe``.

        Returns:
            The new pipeline; from one of ours it takes ``logvar`` along.
        """
        new = super().from_pipe(pipeline, **kwargs)
        if isinstance(pipeline, DDPMExtPipeline) and isinstance(new, DDPMExtPipeline):
            new.logvar = pipeline.logvar
        return new


class _Record:
    """Keeps CompVis' intermediates during one call."""

    def __init__(self, log_every_t: int | None, steps: int, start: Tensor) -> None:
        self.log_every_t = log_every_t
        self.last = steps - 1
        self.intermediates: list[Tensor] | None = None if log_every_t is None else [start]
        self.pred_x0: list[Tensor] | None = None if log_every_t is None else []

    def add(self, i: int, sample: Tensor, result: Any) -> None:
        """Note the outcome of the i-th step taken, which is kept step K - 1 - i."""
        if self.intermediates is None or self.log_every_t is None:
            return
        left = self.last - i
        if left % self.log_every_t and left != self.last:
            return
        self.intermediates.append(sample)
        x0 = result.get("pred_original_sample")
        self.pred_x0 = None if x0 is None or self.pred_x0 is None else [*self.pred_x0, x0]


def as_ours(scheduler: Any) -> Any:
    """A plain DDPMScheduler as a `DDPMExtScheduler` with its config, anything else unchanged."""
    return DDPMExtScheduler.from_config(scheduler.config) if type(scheduler) is DDPMScheduler else scheduler


def _check_generators(generator: Any, batch_size: int) -> torch.Generator | list[torch.Generator] | None:
    if not isinstance(generator, list | tuple):
        return generator
    if len(generator) != batch_size:
        raise ValueError(
            f"generator is a list of {len(generator)}, but batch_size is {batch_size}; give one generator an image, "
            "or a single generator for all."
        )
    return list(generator)


def _check_finite(values: Tensor, what: str) -> None:
    if not bool(torch.isfinite(values).all()):
        raise ValueError(
            f"Values that are not finite (NaN or infinity) in {what}. The weights hold such values, or the network "
            "overflows in half precision: check the checkpoint, or load it with torch_dtype=torch.float32."
        )


for _class in (DDPMExtPipeline, DDPMExtScheduler):
    # A folder that names one of ours is looked up here by Diffusers.
    setattr(diffusers, _class.__name__, _class)
