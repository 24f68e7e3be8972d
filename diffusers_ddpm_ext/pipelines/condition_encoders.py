"""The text and image encoders of a `DDPMExtPipeline`: their components, checked where they are assigned."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn

from diffusers_ddpm_ext.models.spatial_rescaler import SpatialRescaler
from diffusers_ddpm_ext.models.text_encoder import TextEncoder
from diffusers_ddpm_ext.models.text_kinds import ENCODER_SLOTS, VISION_KIND
from diffusers_ddpm_ext.pipelines.guidance import ConditionArguments, context_width
from diffusers_ddpm_ext.pipelines.image_conditions import encode_image
from diffusers_ddpm_ext.pipelines.pipeline_attributes import PipelineAttributes
from diffusers_ddpm_ext.pipelines.prompts import Prompts, checked_images_per_prompt
from diffusers_ddpm_ext.utils.checks import describe
from diffusers_ddpm_ext.utils.wrappers import network_class, unwrap

ENCODER_COMPONENTS = (*ENCODER_SLOTS, "tokenizer", "concat_encoder", "image_encoder", "feature_extractor")
"""Components that make conditions; all are optional."""
FLOAT32_COMPONENTS = ("vae", "vqvae", *ENCODER_SLOTS, "concat_encoder", "image_encoder")
"""Networks that compute in float32, whatever the precision of the denoising network."""
VISION_CLASSES = VISION_KIND.classes


class ConditionEncodersMixin(PipelineAttributes, DiffusionPipeline):
    """What a pipeline knows about the components that make its conditions."""

    @property
    def text_encoder_stage(self) -> TextEncoder | None:
        """The text encoder with its tokenizer; None for a pipeline without one."""
        encoder, tokenizer = self.__dict__.get("text_encoder"), self.__dict__.get("tokenizer")
        if encoder is None:
            return None
        stage: TextEncoder | None = self.__dict__.get("_text_encoder_stage")
        if stage is None or stage.encoder is not unwrap(encoder) or stage.tokenizer is not tokenizer:
            stage = TextEncoder(encoder, tokenizer)
            self.__dict__["_text_encoder_stage"] = stage
        return stage

    def _assign_encoder(self, name: str, value: Any) -> None:
        """Check and record what one of `ENCODER_COMPONENTS` becomes; the attribute itself is set afterwards.

        Raises:
            ValueError: it is of another kind, or does not fit the network.
        """
        if name not in self.__dict__:  # in the constructor, which assigns it again
            return
        if value is None:
            if name == "text_encoder" and self.__dict__.get("tokenizer") is not None:
                self.tokenizer = None
            if name == "image_encoder" and self.__dict__.get("feature_extractor") is not None:
                self.feature_extractor = None
            self.register_to_config(**{name: (None, None)})
            return
        getattr(self, f"_check_{name}")(value)
        # Diffusers would keep the entry of a component that was None.
        self.register_to_config(**{name: library_and_class(value)})

    def _check_text_encoder(self, value: Any) -> None:
        stage = TextEncoder(value, self.__dict__.get("tokenizer"))
        self._check_takes("text_encoder", "encoder_hidden_states")
        width = context_width(self._network.config)
        if width is not None and stage.width != width:
            raise ValueError(
                f"text_encoder has tokens of width {stage.width}, but the network's cross attention takes "
                f"{width}; they are of different models."
            )

    def _check_tokenizer(self, value: Any) -> None:
        encoder = self.__dict__.get("text_encoder")
        if encoder is None:
            raise ValueError("tokenizer is given without a text_encoder, which would take its tokens: give both.")
        TextEncoder(encoder, value)

    def _check_concat_encoder(self, value: Any) -> None:
        if not isinstance(value, nn.Module) or network_class(value) is not SpatialRescaler:
            raise ValueError(f"concat_encoder is {describe(value)}; it must be a SpatialRescaler.")
        self._check_takes("concat_encoder", "concat_inputs")
        network: Any = unwrap(value)
        room = (
            self._network.config.in_channels
            - self.channels
            - (2 if self.config.get("use_positional_encodings") else 0)
        )
        if network.channels != room:
            raise ValueError(
                f"concat_encoder makes {network.channels} channels, but the network takes {room} besides those of the "
                "sample; they are of different models."
            )

    def _check_image_encoder(self, value: Any) -> None:
        name = network_class(value).__name__ if isinstance(value, nn.Module) else describe(value)
        if name not in VISION_CLASSES:
            raise ValueError(f"image_encoder is {name}; it must be one of {', '.join(VISION_CLASSES)}.")
        if not {"encoder_hidden_states", "class_labels"} & set(self._conditioning.required):
            self._check_takes("image_encoder", "encoder_hidden_states")

    def _check_feature_extractor(self, value: Any) -> None:
        if not callable(value) or isinstance(value, nn.Module | type):
            raise ValueError(f"feature_extractor is {describe(value)}; it must be an image processor of Transformers.")
        if self.__dict__.get("image_encoder") is None:
            raise ValueError("feature_extractor is given without an image_encoder, for which it is: give both.")

    def _check_takes(self, component: str, condition: str) -> None:
        if condition not in self._conditioning.required:
            raise ValueError(
                f"{component} is given, but conditioning_key {self._conditioning.conditioning_key} has no "
                f"{condition}, which it makes."
            )

    # ------------------------------------------------------------------ the conditions of a call

    def _encoded(
        self, arguments: ConditionArguments, prompts: Prompts, concat_images: Any = None, image: Any = None
    ) -> ConditionArguments:
        """Conditions as the network takes them, from what a call has besides labels and concatenated inputs."""
        stage, takes_tokens = self.text_encoder_stage, "encoder_hidden_states" in self._conditioning.required
        context = prompts.tokens(stage, takes_tokens)
        if context is None and stage is not None and not prompts.prefix:
            way = "prompt" if stage.tokenizer is not None else "input_ids"
            raise ValueError(f'{way} is missing: this model is conditioned on text ("" is the empty prompt).')
        name = "encoder_hidden_states" if prompts.name is None else prompts.name
        arguments = replace(arguments, encoder_hidden_states=context, context_name=name)
        if concat_images is not None:
            if arguments.concat_inputs is not None:
                raise ValueError("concat_images and concat_inputs are both given; give one of them.")
            arguments = replace(arguments, concat_inputs=self._encode_concat_images(concat_images))
        return arguments if image is None else self._with_image(arguments, image)

    def _with_image(self, arguments: ConditionArguments, image: Any) -> ConditionArguments:
        """The conditions with embeddings of pictures: as labels where the network projects these, or as one token."""
        encoder = self.__dict__.get("image_encoder")
        if encoder is None:
            raise ValueError(
                "image is given, but this pipeline has no image_encoder: pass its embeddings, as class_labels or "
                "prompt_embeds."
            )
        as_labels = "class_labels" in self._conditioning.required and self._model(self.device).num_classes is None
        name = "class_labels" if as_labels else "encoder_hidden_states"
        if getattr(arguments, name) is not None:
            raise ValueError(f"image and {name} are both given, and the embeddings of image are the {name}: give one.")
        embeds = encode_image(encoder, self.__dict__.get("feature_extractor"), image, self._execution_device)
        config = self._network.config
        width = config.get("projection_class_embeddings_input_dim") if as_labels else context_width(config)
        if width is not None and embeds.shape[1] != width:
            raise ValueError(
                f"image_encoder makes embeddings of width {embeds.shape[1]}, but the network takes {width} as {name}: "
                "make them yourself, and pass them."
            )
        if as_labels:
            return replace(arguments, class_labels=embeds)
        return replace(arguments, encoder_hidden_states=embeds[:, None], context_name="image")

    def _repeated(
        self, batch_size: int, times: Any, conditions: ConditionArguments, negative: ConditionArguments
    ) -> tuple[int, ConditionArguments, ConditionArguments]:
        """Batch size and conditions of a call, with ``num_images_per_prompt``."""
        size = conditions.batch_size
        times = checked_images_per_prompt(times, conditions.encoder_hidden_states is not None)
        if times > 1:
            if batch_size not in (1, size * times):
                raise ValueError(
                    f"batch_size is {batch_size}, but {size} prompts with num_images_per_prompt {times} are "
                    f"{size * times} images: leave batch_size out."
                )
            return size * times, conditions.repeated(times, size), negative.repeated(times, size)
        return (size if batch_size == 1 else batch_size), conditions, negative

    @torch.no_grad()
    def _encode_concat_images(self, images: Any) -> Tensor:
        """Pictures as ``concat_inputs``."""
        encoder = self.__dict__.get("concat_encoder")
        if encoder is None:
            raise ValueError(
                "concat_images is given, but this pipeline has no concat_encoder: pass concat_inputs, as the network "
                "takes them."
            )
        if isinstance(images, list | tuple) and images and all(isinstance(image, Tensor) for image in images):
            images = torch.cat(list(images)) if images[0].ndim == 4 else torch.stack(list(images))
        network: Any = unwrap(encoder)
        if not isinstance(images, Tensor) or not images.is_floating_point():
            raise ValueError(
                f"concat_images is {describe(images)}; it must be a floating tensor (B, "
                f"{network.config.in_channels}, height, width)."
            )
        with torch.autocast(self._execution_device.type, enabled=False):
            if network.dtype != torch.float32:
                network.float()
            tensor: Tensor = encoder(images.float().to(self._execution_device))
        return tensor


def library_and_class(component: Any) -> tuple[str, str]:
    """What ``model_index.json`` says of a component: the library and the class, as stock Diffusers finds them."""
    cls = network_class(component) if isinstance(component, nn.Module) else type(component)
    parts = cls.__module__.split(".")
    if parts[0] == "transformers":
        return "transformers", cls.__name__
    if parts[:2] == ["diffusers", "pipelines"]:
        return parts[2], cls.__name__
    return "diffusers", cls.__name__


def checked_alias(name: str, value: Any, other_name: str, other: Any) -> Any:
    """The one of two values that is not None, of two names of one component.

    Raises:
        ValueError: both are given.
    """
    if value is not None and other is not None:
        raise ValueError(f"{name} and {other_name} are both given; they are two names of one component: give one.")
    return other if value is None else value


def float32_dtypes(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of Diffusers' ``from_pretrained`` that load first stage and encoders in float32."""
    dtypes = {key: kwargs[key] for key in ("torch_dtype", "dtype") if isinstance(kwargs.get(key), torch.dtype)}
    return {
        key: {"default": dtype} | dict.fromkeys(FLOAT32_COMPONENTS, torch.float32) for key, dtype in dtypes.items()
    }
