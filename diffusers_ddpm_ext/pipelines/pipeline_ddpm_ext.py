"""DDPMExtPipeline: CompVis' ``p_sample_loop`` as a Diffusers pipeline.

A reader without this package opens the saved folder as ``DDPMPipeline`` and ``DDPMScheduler``; `DDPMExtPipeline` turns
the stock scheduler back into ours, with all its keys (see `serialization`).

Source: [DDPM] Ho et al. 2020, algorithm 2.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from diffusers import (
    AutoencoderDC,
    AutoencoderKL,
    AutoencoderTiny,
    DDPMScheduler,
    ImagePipelineOutput,
    SchedulerMixin,
    UNet2DConditionModel,
    UNet2DModel,
    VQModel,
)
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from torch import Tensor, nn

from diffusers_ddpm_ext.models.conditioning import Conditioning
from diffusers_ddpm_ext.models.evaluation_mode import evaluation_mode
from diffusers_ddpm_ext.models.latent_scale import SLOTS
from diffusers_ddpm_ext.models.spatial_rescaler import SpatialRescaler
from diffusers_ddpm_ext.models.unet_2d_ext import UNet2DExtModel
from diffusers_ddpm_ext.pipelines.call_arguments import (
    CALLBACK_TENSORS,
    CallSettings,
    StepCallback,
    check_finite_samples,
    check_network,
    check_scheduler,
    checked_batch_size,
    checked_generators,
    checked_sample_shape,
    checked_scaling_factor,
    checked_step_kwargs,
)
from diffusers_ddpm_ext.pipelines.call_preparation import CallPreparation
from diffusers_ddpm_ext.pipelines.call_state import PipelineCall, StepNoise, running_call
from diffusers_ddpm_ext.pipelines.class_names import read_class_names
from diffusers_ddpm_ext.pipelines.condition_encoders import ENCODER_COMPONENTS, ConditionEncodersMixin, checked_alias
from diffusers_ddpm_ext.pipelines.first_stage_mixin import FirstStageMixin, check_concat_through_vae, check_same_scale
from diffusers_ddpm_ext.pipelines.guidance import ConditionArguments, Labels, prepare_guidance
from diffusers_ddpm_ext.pipelines.prompts import Prompts, split_first_argument
from diffusers_ddpm_ext.pipelines.sampling_loop import Intermediates, SamplingLoop
from diffusers_ddpm_ext.pipelines.serialization import SavedPipeline
from diffusers_ddpm_ext.pipelines.stock_layout import needs_guard
from diffusers_ddpm_ext.pipelines.stock_text import with_stock_offset
from diffusers_ddpm_ext.schedulers.scheduling_ddpm_ext import DDPMExtScheduler
from diffusers_ddpm_ext.utils.checks import checked_integer
from diffusers_ddpm_ext.utils.pixel_format import PixelFormat
from diffusers_ddpm_ext.utils.vocabulary import NamedTimesteps
from diffusers_ddpm_ext.utils.wrappers import has_inner_wrappers, network_class, unwrap

logger = logging.getLogger(__name__)

OTHER_NAMES = {"vqvae": "vae", "bert": "text_encoder"}
"""Components of stock pipelines -> their names here."""


@dataclass
class DDPMExtPipelineOutput(ImagePipelineOutput):
    """Output of a call of `DDPMExtPipeline`.

    Attributes:
        images: list of PIL images, or an array (B, H, W, C) in [0, 1] for "np", a tensor (B, C, H, W) in [0, 1] for
            "pt", an array (B, H, W, C) in the dtype and range of the training data for "array". For "latent" what the
            network denoises: the first stage's latents, in its scale, or images in data units, unclipped. Of a model
            of latents without its first stage these are returned for "np" and "pt" too.
        intermediates: with ``log_every_t``, CompVis' list: x_T, then the sample after each logged step, each
            (B, C, H, W) in data units on the pipeline's device. None otherwise. With a first stage they are latents
            (``decode_latents``), and so is ``pred_x0``.
        pred_x0: with ``log_every_t``, the clean images predicted at the logged steps, so that ``pred_x0[k]`` belongs
            to ``intermediates[k + 1]``. None also where the scheduler does not report its prediction.
    """

    intermediates: list[Tensor] | None = None
    pred_x0: list[Tensor] | None = None


class DDPMExtPipeline(CallPreparation, FirstStageMixin, ConditionEncodersMixin, SavedPipeline):
    """Samples images from a diffusion model ([DDPM] algorithm 2), with the steps of CompVis' ``DDPM``.

    Args:
        unet: network from (B, C, H, W) and a timestep to (B, C, H, W), or to (B, 2C, H, W) with learned variances.
            With concatenated inputs it becomes a `UNet2DExtModel`, which stock Diffusers refuses: it would sample the
            model without them, and without an error.
        scheduler: any Diffusers scheduler. A plain ``DDPMScheduler`` becomes a `DDPMExtScheduler` with its config,
            here and whenever one is assigned to ``pipeline.scheduler``; other classes are kept, and the network's
            output is converted for them (`diffusers_ddpm_ext.schedulers.adapter`).
        conditioning_key: how conditions reach the network (`diffusers_ddpm_ext.models.conditioning`). With None, a
            network with class embeddings or cross attention gets these (``adm``, ``crossattn``, ``crossattn-adm``),
            another is unconditional.
        use_positional_encodings: whether the network's last two input channels are the pixels' coordinates.
        null_class_label: the class that stands for no class, in guidance.
        id2label: names of classes by their numbers (in JSON the numbers are texts), for ``class_labels="Food"``.
        latent_scaling_factor: for a model whose samples are latents of a first stage (an autoencoder), which is not
            part of the pipeline: the factor that its latents were multiplied with. With ``vae`` the scale is that of
            its configuration, and this one must be the same. None: the samples are images, or those of ``vae``.
        concat_through_vae: for a model that takes a concatenated picture through its first stage: "mode" is
            `FirstStage.encode_condition`, not scaled, "sample" is ``encode_images``. It says how ``concat_inputs`` are
            to be made, which a call takes as the network does.
        pixel_format: dtype and range of the training data, a `PixelFormat` or what its ``to_dict`` returns, for
            ``output_type="array"``. None: 8-bit images.
        vae: the first stage: an ``AutoencoderKL``, ``VQModel``, ``AutoencoderTiny`` or ``AutoencoderDC`` whose
            latents the network denoises. It computes in float32.
        vqvae: another name of ``vae``, that of ``LDMPipeline``; afterwards the component is ``vae``.
        text_encoder: makes the tokens of cross attention from prompts; see
            `diffusers_ddpm_ext.models.text_encoder.TextEncoder` for the classes. It computes in float32.
        tokenizer: of ``text_encoder``; without one a call takes ``input_ids`` instead of prompts.
        bert: another name of ``text_encoder``, that of ``LDMTextToImagePipeline``.
        concat_encoder: a `SpatialRescaler`, which makes ``concat_inputs`` from ``concat_images``.
        image_encoder: a ``CLIPVisionModelWithProjection`` or ``CLIPVisionModel``, whose embeddings of ``image`` are
            class labels (where the network projects these) or the only token of cross attention.
        feature_extractor: the image processor of ``image_encoder``, for PIL images.

    Raises:
        ValueError: an argument is of the wrong kind, names classes that the network does not have, or is a first stage
            or an encoder of another model.
    """

    model_cpu_offload_seq = "text_encoder->image_encoder->concat_encoder->unet->vae"
    _optional_components: ClassVar[list[str]] = [*SLOTS, *ENCODER_COMPONENTS]
    _callback_tensor_inputs: ClassVar[list[str]] = list(CALLBACK_TENSORS)

    def __init__(
        self,
        unet: UNet2DModel | UNet2DConditionModel,
        scheduler: SchedulerMixin,
        conditioning_key: str | None = None,
        use_positional_encodings: bool = False,
        null_class_label: int | None = None,
        id2label: Mapping[int, str] | Mapping[str, str] | None = None,
        latent_scaling_factor: float | None = None,
        concat_through_vae: str | None = None,  # Diffusers checks values against this, and fails on a Literal
        pixel_format: PixelFormat | Mapping[str, Any] | None = None,
        # Each class by name: Diffusers' from_pipe takes over no other.
        vae: AutoencoderKL | VQModel | AutoencoderTiny | AutoencoderDC | None = None,
        vqvae: AutoencoderKL | VQModel | AutoencoderTiny | AutoencoderDC | None = None,
        # Of Transformers, which is not imported for models without text: any class, checked where it is assigned.
        text_encoder: nn.Module | None = None,
        tokenizer: Any = None,
        bert: nn.Module | None = None,
        concat_encoder: SpatialRescaler | None = None,
        image_encoder: nn.Module | None = None,
        feature_extractor: Any = None,
    ) -> None:
        super().__init__()
        check_network(unet)
        check_scheduler(scheduler)
        self._logvar: Tensor | None = None
        self._class_embedder: Tensor | None = None
        self._last_call = PipelineCall()
        if isinstance(conditioning_key, nn.Module):
            raise ValueError(
                f"conditioning_key is {type(conditioning_key).__name__}; pass a first stage by its name: "
                "DDPMExtPipeline(unet, scheduler, vae=vae)."
            )
        conditioning_key = own_conditioning_key(unet) if conditioning_key is None else conditioning_key
        self._conditioning = Conditioning(conditioning_key, use_positional_encodings)
        scheduler = as_ours(scheduler)
        settings = {
            "conditioning_key": conditioning_key,
            "use_positional_encodings": use_positional_encodings or None,
            "null_class_label": null_class_label,
            "id2label": {str(number): name for number, name in read_class_names(id2label).items()} or None,
            "latent_scaling_factor": checked_scaling_factor(latent_scaling_factor),
            "concat_through_vae": concat_through_vae,
        }
        vae = checked_alias("vae", vae, "vqvae", vqvae)
        encoders = {
            "text_encoder": checked_alias("text_encoder", text_encoder, "bert", bert),
            "tokenizer": tokenizer,
            "concat_encoder": concat_encoder,
            "image_encoder": image_encoder,
            "feature_extractor": feature_extractor,
        }
        check_same_scale(settings["latent_scaling_factor"], vae)
        if vae is not None:
            settings["latent_scaling_factor"] = None
        check_concat_through_vae(concat_through_vae, self._conditioning, settings["latent_scaling_factor"], vae)
        is_plain = type(unet) is UNet2DModel and not has_inner_wrappers(unet)  # others are guarded when they are saved
        if is_plain and needs_guard(scheduler, settings):
            unet = UNet2DExtModel.from_unet(unet)
        self.register_modules(unet=unet, scheduler=scheduler, **dict.fromkeys(self._optional_components))
        # Settings at their defaults are left out, so that the folder of an unconditional model is a stock one.
        self.register_to_config(**{name: value for name, value in settings.items() if value is not None})
        _check_classes(null_class_label, self.class_names, self.num_classes)
        for name, component in ({"vae": vae} | encoders).items():
            if component is not None:
                setattr(self, name, component)
        self.pixel_format = pixel_format
        self._match_stock_offset()

    def __setattr__(self, name: str, value: Any) -> None:
        """Assign an attribute; a stock scheduler becomes ours, ``vqvae`` is ``vae``, and ``bert`` ``text_encoder``.

        Without its first stage a pipeline returns latents; with one it decodes them.
        """
        if name in OTHER_NAMES and value is not None:
            name = OTHER_NAMES[name]
        if name == "vae":
            self._assign_first_stage(value)
        if name in ENCODER_COMPONENTS:
            self._assign_encoder(name, value)
        if name == "unet":
            check_network(value)
        if name == "scheduler":
            check_scheduler(value)
            is_stock = type(value) is DDPMScheduler
            value = as_ours(value)
            # The config of a stock scheduler counts as the training schedule only if there is no other.
            is_trained = not is_stock or "_trained_scheduler" not in self.__dict__
            if is_trained and isinstance(value, DDPMExtScheduler):
                self._trained_scheduler = value
        super().__setattr__(name, value)
        if name in ("scheduler", "tokenizer") and value is not None:
            self._match_stock_offset()

    # ------------------------------------------------------------------ sampling

    @torch.no_grad()
    def __call__(
        self,
        batch_size: int | str | Sequence[str] = 1,
        generator: torch.Generator | list[torch.Generator] | None = None,
        num_inference_steps: int | None = None,
        output_type: str | None = "pil",
        return_dict: bool = True,
        log_every_t: int | None = None,
        temperature: float = 1.0,
        callback_on_step_end: Callable[..., dict[str, Any]] | PipelineCallback | MultiPipelineCallbacks | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        latents: Tensor | None = None,
        timesteps: Sequence[int] | np.ndarray | Tensor | NamedTimesteps | None = None,
        class_labels: Labels | None = None,
        concat_inputs: Tensor | Sequence[Tensor] | None = None,
        encoder_hidden_states: Tensor | Sequence[Tensor] | None = None,
        guidance_scale: float = 1.0,
        guidance_interval: tuple[float, float] | None = None,
        negative_class_labels: Labels | None = None,
        negative_concat_inputs: Tensor | Sequence[Tensor] | None = None,
        negative_encoder_hidden_states: Tensor | Sequence[Tensor] | None = None,
        optimal_timesteps: bool = False,
        eta: float | None = None,
        step_kwargs: Mapping[str, Any] | None = None,
        prompt: str | Sequence[str] | None = None,
        negative_prompt: str | Sequence[str] | None = None,
        num_images_per_prompt: int = 1,
        input_ids: Tensor | Sequence[Sequence[int]] | None = None,
        negative_input_ids: Tensor | Sequence[Sequence[int]] | None = None,
        prompt_embeds: Tensor | Sequence[Tensor] | None = None,
        negative_prompt_embeds: Tensor | Sequence[Tensor] | None = None,
        concat_images: Tensor | Sequence[Tensor] | None = None,
        image: Any = None,
    ) -> DDPMExtPipelineOutput | tuple[Any, ...]:
        """Sample a batch of images.

        Args:
            batch_size: number of images; at 1, as many as the conditions are for. Or the prompts:
                ``pipeline("a cat")``, ``pipeline(["a cat", "a dog"])``.
            generator: source of all noise, or a list with one per image: then image i depends only on generator i,
                regardless of the batch.
            num_inference_steps: number K of sampling steps out of the T training steps. None uses all T.
            output_type: "pil", "np", "pt", "array" (the values of the training data, in its dtype and range:
                `PixelFormat.from_model`), or "latent" (the sample in the model's units, as the scheduler left it).
            return_dict: whether to return a `DDPMExtPipelineOutput` or a tuple of its fields that are not None.
            log_every_t: with n, the output also has ``intermediates`` and ``pred_x0`` for each sampling step i,
                counted from K - 1 down to 0, with ``i % n == 0`` or ``i == K - 1`` (CompVis' ``log_every_t``).
            temperature: factor on the noise of each step, not on the starting noise (CompVis' ``temperature``). Other
                values than 1 need a scheduler whose ``step`` takes ``variance_noise`` and adds it.
            callback_on_step_end: called as ``callback(pipeline, i, t, tensors)`` after each step, i counting up from
                0; ``latents`` in the dict it returns replaces the sample.
            callback_on_step_end_tensor_inputs: tensors for the callback: "latents" (the sample), "model_output" (as
                passed to ``step``), "model_input" (the sample as passed to the network).
            latents: the starting noise, (batch_size, C, H, W), standard normal; None draws it.
            timesteps: the timesteps to use, descending, instead of ``num_inference_steps``. Or which K steps:
                "samples", those that `ddpm-ext fit-steps` found best for the scheduler's class; "bound", those of
                `ddpm-ext fit-variance`, for any class; "even", those of the scheduler's spacing.
            class_labels: one class for all images or one per image, each a number or a name of ``id2label``; floating,
                (B, width), for a projected embedding.
                With a ``class_embedder`` they replace ``encoder_hidden_states``.
            concat_inputs: (B, c, H, W), in data units, concatenated to the network's input; a list is concatenated
                along the channels.
            encoder_hidden_states: (B, tokens, width) of cross attention; a list is concatenated along the tokens.
            guidance_scale: s of ``u + s (c - u)``, with c the network's output with the conditions and u without; 1
                is c alone, and one network call instead of two.
            guidance_interval: lowest and highest timestep of the training schedule at which there is guidance.
            negative_class_labels: instead of the null class.
            negative_concat_inputs: instead of zeros; with a text encoder instead of the ``concat_inputs``.
            negative_encoder_hidden_states: instead of zeros, of the null class, or of the empty prompt.
            optimal_timesteps: use the K timesteps that `ddpm-ext fit-variance` found best for the bound, from the
                scheduler's config, instead of evenly spaced ones.
            eta: for schedulers whose ``step`` has it: 0 is deterministic, 1 as noisy as DDPM.
            step_kwargs: further arguments of the scheduler's ``step``, by name (``s_noise``, ``s_churn``, ...).
            prompt: one text for all images or one per image.
            negative_prompt: instead of the empty prompt, in guidance.
            num_images_per_prompt: images of each prompt, one after the other.
            input_ids: (B, T), the tokens of prompts as numbers, instead of ``prompt``.
            negative_input_ids: instead of those of the empty prompt.
            prompt_embeds: another name of ``encoder_hidden_states``.
            negative_prompt_embeds: another name of ``negative_encoder_hidden_states``.
            concat_images: (B, c, H, W), floating, of which ``concat_encoder`` makes ``concat_inputs``.
            image: for ``image_encoder``: a PIL image, a list of them, or (B, 3, H, W) in [-1, 1].

        Returns:
            `DDPMExtPipelineOutput`, or a tuple whose first entry is the images.

        Raises:
            ValueError: an argument is out of its range, the model does not fit, the scheduler cannot sample it, or
                the samples are not finite.
        """
        settings = CallSettings.checked(output_type, log_every_t, temperature, guidance_scale, guidance_interval)
        batch_size, prompt = split_first_argument(batch_size, prompt, self.text_encoder_stage is not None)
        batch_size = checked_batch_size(batch_size)
        prompts = Prompts(prompt, input_ids, prompt_embeds, encoder_hidden_states)
        negative_prompts = Prompts(
            negative_prompt, negative_input_ids, negative_prompt_embeds, negative_encoder_hidden_states, "negative_"
        )
        conditions = self._encoded(ConditionArguments(class_labels, concat_inputs), prompts, concat_images, image)
        negative = self._encoded(ConditionArguments(negative_class_labels, negative_concat_inputs), negative_prompts)
        batch_size, conditions, negative = self._repeated(batch_size, num_images_per_prompt, conditions, negative)
        generators = checked_generators(generator, batch_size)
        callback = StepCallback.checked(callback_on_step_end, callback_on_step_end_tensor_inputs)
        shape = checked_sample_shape(batch_size, self.channels, self._network.config.sample_size)
        self._check_pictures(settings.output_type)
        device = self._execution_device
        step_arguments = checked_step_kwargs(step_kwargs, eta)
        sampler = self._sampler(step_arguments, settings.temperature)
        denoise = prepare_guidance(
            self._model(device), conditions, negative, batch_size, settings.guidance_scale, settings.guidance_interval
        )
        chosen = self.chosen_timesteps(num_inference_steps, timesteps, optimal_timesteps)
        sampler = self._set_timesteps(sampler, num_inference_steps, chosen, device)
        steps = sampler.scheduler.timesteps
        warning = "" if chosen is not None else sampler.late_start_warning()
        if warning:
            logger.warning(warning)
        sample = self._initial_sample(shape, generators, latents, sampler, device)
        noise = StepNoise(generators, settings.temperature, step_arguments)
        sampler = sampler.with_noise_seed(generators)
        call = PipelineCall(settings.guidance_scale, len(steps))
        with running_call(self, call), evaluation_mode(self.unet):
            intermediates = Intermediates(settings.log_every_t, len(steps), sample)
            sample = SamplingLoop(sampler, denoise, noise, callback, intermediates)(self, call, sample)
        check_finite_samples(sample, "the samples")
        output = DDPMExtPipelineOutput(
            self._as_images(sample, settings.output_type), intermediates.samples, intermediates.pred_x0
        )
        self.maybe_free_model_hooks()
        return output if return_dict else output.to_tuple()

    def _match_stock_offset(self) -> None:
        """Give the scheduler the ``steps_offset`` of ``StableDiffusionPipeline``, where that samples this model."""
        if self.__dict__.get("tokenizer") is None:
            return
        scheduler = with_stock_offset(self.parts)
        if scheduler is not self.scheduler:
            self.scheduler = scheduler


def as_ours(scheduler: Any) -> Any:
    """A plain DDPMScheduler as a `DDPMExtScheduler` with its config, anything else unchanged."""
    return DDPMExtScheduler.from_config(scheduler.config) if type(scheduler) is DDPMScheduler else scheduler


def own_conditioning_key(unet: Any) -> str | None:
    """The conditions that a network takes by its configuration alone; None for an unconditional one."""
    config: Any = unwrap(unet).config
    classes = config.get("num_class_embeds") is not None or config.get("class_embed_type") is not None
    if issubclass(network_class(unet), UNet2DConditionModel):
        return "crossattn-adm" if classes else "crossattn"
    return "adm" if classes else None


def _check_classes(null_class_label: Any, names: Mapping[int, str], num_classes: int | None) -> None:
    if null_class_label is not None:
        null = checked_integer("null_class_label", null_class_label)
        if null < 0 or (num_classes is not None and null >= num_classes):
            allowed = "0 or more" if num_classes is None else f"in 0..{num_classes - 1}"
            raise ValueError(f"null_class_label is {null}; it must be {allowed}.")
    if names and num_classes is not None and max(names) >= num_classes:
        raise ValueError(f"id2label names class {max(names)}; the model has the classes 0..{num_classes - 1}.")
