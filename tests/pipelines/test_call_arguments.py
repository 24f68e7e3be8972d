"""What a pipeline is made of and called with: refused in one sentence, or right where the meaning is plain."""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler, UNet2DConditionModel, UNet2DModel
from diffusers.training_utils import EMAModel
from helpers.tiny import tiny_unet
from torch.nn import DataParallel
from torch.optim.swa_utils import AveragedModel

from diffusers_ddpm_ext import DDPMExtPipeline, DDPMExtScheduler, LitEMA

NAN, INFINITY = float("nan"), float("inf")


def quiet(pipeline: DDPMExtPipeline) -> DDPMExtPipeline:
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def class_unet(classes: int = 4, dropout: float = 0.0, **config: Any) -> UNet2DModel:
    torch.manual_seed(0)
    return UNet2DModel(
        8, 1, 1, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4, dropout=dropout,
        down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2, num_class_embeds=classes, **config,
    ).eval()  # fmt: skip


@pytest.fixture(scope="module")
def plain() -> DDPMExtPipeline:
    return quiet(DDPMExtPipeline(tiny_unet(1), DDPMExtScheduler(num_train_timesteps=20)))


@pytest.fixture(scope="module")
def conditional() -> DDPMExtPipeline:
    names = {0: "Food", 1: "a, b", 2: "Naïve café"}
    scheduler = DDPMExtScheduler(num_train_timesteps=20)
    return quiet(DDPMExtPipeline(class_unet(), scheduler, null_class_label=3, id2label=names))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"batch_size": "a cat"}, "batch_size is 'a cat'.*takes no prompt"),
        ({"batch_size": "4"}, "batch_size"),
        ({"batch_size": 2.0}, "batch_size"),
        ({"batch_size": True}, "batch_size"),
        ({"batch_size": None}, "batch_size"),
        ({"batch_size": ["a cat", "a dog"]}, "batch_size"),
        ({"batch_size": 10**12}, "smaller batch"),
        ({"generator": 0}, "generator=0"),
        ({"generator": [None]}, r"generator\[0\]"),
        ({"generator": "cpu"}, "generator='cpu'"),
        ({"generator": [torch.Generator(), 1], "batch_size": 2}, r"generator\[1\]"),
        ({"output_type": ["pil"]}, "output_type"),
        ({"output_type": "PIL"}, "output_type"),
        ({"output_type": None}, "output_type"),
        ({"log_every_t": 2.5}, "log_every_t"),
        ({"log_every_t": "5"}, "log_every_t"),
        ({"temperature": "hot"}, "temperature"),
        ({"temperature": NAN}, "temperature"),
        ({"temperature": [1, 2]}, "temperature"),
        ({"guidance_scale": "7"}, "guidance_scale"),
        ({"guidance_scale": None}, "guidance_scale"),
        ({"num_inference_steps": "5"}, "num_inference_steps"),
        ({"num_inference_steps": 2.5}, "num_inference_steps"),
        ({"num_inference_steps": True}, "num_inference_steps"),
        ({"timesteps": [19.5, 3.7]}, "whole"),
        ({"timesteps": [NAN]}, "whole"),
        ({"timesteps": ["19"]}, "whole"),
        ({"timesteps": []}, "whole"),
        ({"timesteps": 7}, "whole"),
        ({"timesteps": [[9, 3], [2]]}, "whole"),
        ({"timesteps": torch.tensor([9.0, 2.5])}, "whole"),
        ({"guidance_interval": 5}, "guidance_interval"),
        ({"guidance_interval": ("a", "b")}, "guidance_interval"),
        ({"guidance_interval": (9, 3)}, "guidance_interval"),
        ({"guidance_interval": (None, 3)}, "guidance_interval"),
        ({"eta": "0"}, "eta"),
        ({"step_kwargs": ["eta"]}, "step_kwargs"),
        ({"callback_on_step_end": 3}, "callback_on_step_end"),
        ({"callback_on_step_end_tensor_inputs": "latents"}, "tensor_inputs"),
        ({"callback_on_step_end_tensor_inputs": [1]}, "tensor_inputs"),
        ({"latents": torch.full((1, 1, 8, 8), NAN)}, "latents has values"),
        ({"latents": torch.full((1, 1, 8, 8), INFINITY)}, "latents has values"),
        ({"latents": torch.zeros(1, 1, 8, 8, dtype=torch.long)}, "latents must be a floating"),
        ({"latents": torch.zeros(1, 1, 8, 8, dtype=torch.complex64)}, "latents must be a floating"),
        ({"latents": np.zeros((1, 1, 8, 8))}, "latents must be a tensor"),
        ({"latents": torch.zeros(1, 8, 8)}, "latents has shape"),
        ({"class_labels": 1}, "class_labels"),
    ],
)  # fmt: skip
def test_a_wrong_argument_is_one_sentence_about_it(plain, arguments, words):
    with pytest.raises(ValueError, match=words) as error:
        plain(num_inference_steps=2, **arguments) if not {"num_inference_steps", "timesteps"} & set(
            arguments
        ) else plain(**arguments)
    assert "\n" not in str(error.value)
    assert "weights" not in str(error.value).replace("pipeline", "")


@pytest.mark.parametrize(
    "returned", [3, "latents", {"latents": None}, {"latents": torch.zeros(2)}, {"latents": np.zeros((1, 1, 8, 8))}]
)
def test_what_a_callback_returns_is_checked(plain, returned):
    with pytest.raises(ValueError, match="callback_on_step_end returned"):
        plain(num_inference_steps=2, callback_on_step_end=lambda *args: returned)


@pytest.mark.parametrize(
    ("labels", "words"),
    [
        ("Foot", "did you mean"),
        ("food", "did you mean"),
        (["Food", "Fodo"], "did you mean"),
        (4, r"0\.\.3"),
        (-1, r"0\.\.3"),
        (1.0, "integers"),
        ([0, 1.5], "integers"),
        (True, "number or name"),
        ([None], "number or name"),
        ([], "number or name"),
        ([[0, 1], [2]], "number or name"),
        ([[0, 1]], "one class per sample"),
        ({"Food"}, "number or name"),
        (10**30, "number or name"),
        (torch.tensor([True]), "integers"),
    ],
)
def test_wrong_class_labels(conditional, labels, words):
    for name in ("class_labels", "negative_class_labels"):
        arguments = {name: labels}
        if name != "class_labels":
            arguments |= {"class_labels": 0, "guidance_scale": 2.0}
        with pytest.raises(ValueError, match=words):
            conditional(num_inference_steps=2, **arguments)


@pytest.mark.parametrize(
    ("labels", "numbers"),
    [
        ("Food", [0]),
        (["Food", 2], [0, 2]),
        (["a, b", "Naïve café"], [1, 2]),
        (("Food", "a", 3), [0, 1, 3]),
        (np.array([2, 0]), [2, 0]),
        (np.array(["Food", "b"]), [0, 1]),
        (torch.tensor(2), [2]),
        (np.int64(1), [1]),
    ],
)
def test_classes_by_name_are_those_by_number(conditional, labels, numbers):
    images = []
    for each in (labels, torch.tensor(numbers)):
        generator = torch.Generator().manual_seed(0)
        out = conditional(class_labels=each, generator=generator, num_inference_steps=2, output_type="pt")
        images.append(out.images)
    assert len(images[0]) == len(numbers)
    assert torch.equal(images[0], images[1])


def test_names_are_kept_in_the_folder(conditional, tmp_path):
    conditional.save_pretrained(tmp_path)
    loaded = DDPMExtPipeline.from_pretrained(tmp_path)
    assert loaded.class_names == {0: "Food", 1: "a, b", 2: "Naïve café"}
    assert DDPMExtPipeline.from_pipe(loaded).class_names == loaded.class_names
    loaded.save_pretrained(tmp_path / "again")
    assert DDPMExtPipeline.from_pretrained(tmp_path / "again").class_names == loaded.class_names


@pytest.mark.parametrize(
    "names", [{4: "x"}, {-1: "x"}, {0: ""}, {0: 5}, {"zero": "x"}, ["Food"], "Food", {0: "x", "0": "y"}]
)
def test_wrong_names(names):
    with pytest.raises(ValueError, match="id2label"):
        DDPMExtPipeline(class_unet(), DDPMExtScheduler(), id2label=names)


@pytest.mark.parametrize(
    ("unet", "scheduler", "words"),
    [
        (DDPMScheduler(), tiny_unet(1), r"DDPMExtPipeline\(unet, scheduler\)"),
        (None, DDPMScheduler(), "unet is None"),
        (tiny_unet(1), None, "scheduler is None"),
        (tiny_unet(1), DDPMScheduler, "DDPMScheduler()"),
        (tiny_unet(1), "ddim", "scheduler is 'ddim'"),
        (tiny_unet(1), tiny_unet(1), "unet, scheduler"),
        (LitEMA(tiny_unet(1)), DDPMScheduler(), "LitEMA; that is an average"),
        (EMAModel(tiny_unet(1).parameters()), DDPMScheduler(), "EMAModel; that is an average"),
        (UNet2DModel, DDPMScheduler(), "pass a Diffusers network"),
        ("runs/digits", DDPMScheduler(), "pass a Diffusers network"),
        (torch.nn.Linear(2, 2), DDPMScheduler(), "pass a Diffusers network"),
    ],
)
def test_wrong_components(unet, scheduler, words):
    with pytest.raises(ValueError, match=words):
        DDPMExtPipeline(unet, scheduler)


def test_wrong_components_assigned_later(plain):
    with pytest.raises(ValueError, match="LitEMA"):
        plain.unet = LitEMA(tiny_unet(1))
    with pytest.raises(ValueError, match="scheduler is None"):
        plain.scheduler = None


def test_no_scheduler_given_is_that_of_the_folder(plain, tmp_path):
    plain.save_pretrained(tmp_path)
    loaded = DDPMExtPipeline.from_pretrained(tmp_path, scheduler=None)
    assert loaded.scheduler.config.num_train_timesteps == 20


@pytest.mark.parametrize("value", [NAN, INFINITY, 1e30])
@pytest.mark.parametrize("name", ["encoder_hidden_states", "concat_inputs"])
def test_conditions_that_are_not_finite_are_named(name, value):
    """1e30 only overflows in half precision, in which the network runs."""
    key, channels = ("crossattn", 1) if name == "encoder_hidden_states" else ("concat", 2)
    network: Any = tiny_unet(channels, 1)
    if name == "encoder_hidden_states":
        network = UNet2DConditionModel(
            8, 1, 1, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4, cross_attention_dim=8,
            attention_head_dim=4, down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        )  # fmt: skip
    pipeline = quiet(DDPMExtPipeline(network.half(), DDPMExtScheduler(), conditioning_key=key))
    shape = (1, 2, 8) if key == "crossattn" else (1, 1, 8, 8)
    with pytest.raises(ValueError, match=f"{name} has values"):
        pipeline(num_inference_steps=1, **{name: torch.full(shape, value)})


# ------------------------------------------------------------------ networks that say themselves what they take


def test_a_stock_class_conditional_network_takes_labels(tmp_path):
    pipeline = quiet(DDPMExtPipeline(class_unet(3), DDPMScheduler(num_train_timesteps=20)))
    assert pipeline(class_labels=[0, 2], num_inference_steps=2, output_type="np").images.shape[0] == 2
    with pytest.raises(ValueError, match="class_labels is missing"):
        pipeline(num_inference_steps=2)
    pipeline.save_pretrained(tmp_path)
    assert DDPMExtPipeline.from_pretrained(tmp_path).conditioning.conditioning_key == "adm"


def test_a_callback_changes_the_guidance_scale():
    """Also from 1, without guidance at the start; `guidance_scale` tells it after the call."""
    pipeline = quiet(DDPMExtPipeline(class_unet(4), DDPMScheduler(num_train_timesteps=20), null_class_label=3))

    def images(**arguments: Any) -> torch.Tensor:
        generator = torch.Generator().manual_seed(0)
        return pipeline(class_labels=1, generator=generator, timesteps=[9, 4, 0], output_type="pt", **arguments).images

    def add(pipe: DDPMExtPipeline, i: int, t: Any, tensors: dict) -> dict:
        pipe._guidance_scale += 1.0
        return tensors

    for start in (1.0, 2.0):
        changed = images(guidance_scale=start, callback_on_step_end=add)
        assert pipeline.guidance_scale == start + pipeline.num_timesteps == start + 3
        assert pipeline.do_classifier_free_guidance
        assert not torch.equal(changed, images(guidance_scale=start))
        assert pipeline.guidance_scale == start


# ------------------------------------------------------------------ the state of a call belongs to the call


def test_dropout_is_off_and_the_mode_restored():
    network = class_unet(4, dropout=0.5)
    pipeline = quiet(DDPMExtPipeline(network, DDPMExtScheduler(num_train_timesteps=20)))

    def images() -> torch.Tensor:
        generator = torch.Generator().manual_seed(0)
        return pipeline(class_labels=1, generator=generator, num_inference_steps=3, output_type="pt").images

    expected = images()
    network.train()
    network.mid_block.eval()
    modes = [module.training for module in network.modules()]
    assert torch.equal(images(), expected)
    assert [module.training for module in network.modules()] == modes
    with pytest.raises(RuntimeError, match="stop"):
        pipeline(class_labels=1, num_inference_steps=2, callback_on_step_end=stop)
    assert [module.training for module in network.modules()] == modes


def stop(*args: Any) -> None:
    raise RuntimeError("stop")


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # Diffusers with NumPy 2
@pytest.mark.parametrize("scheduler", [DDPMExtScheduler, DDIMScheduler, DPMSolverMultistepScheduler])
def test_threads_on_one_pipeline_get_the_pictures_of_a_single_one(scheduler):
    """Each with its own number of steps, in a network left in train mode with dropout."""
    config = DDPMExtScheduler(num_train_timesteps=50).config
    network = class_unet(4, dropout=0.3).train()
    pipeline = quiet(DDPMExtPipeline(network, DDPMExtScheduler.from_config(config)))
    pipeline.scheduler = scheduler.from_config(config)

    def images(count: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(count)
        return pipeline(
            class_labels=count % 4, generator=generator, num_inference_steps=count, output_type="pt"
        ).images

    counts = [2, 3, 5, 7, 11]
    expected = {count: images(count) for count in counts}
    actual: dict[int, list[torch.Tensor]] = {count: [] for count in counts}
    threads = [
        threading.Thread(target=lambda count=count: actual[count].extend(images(count) for _ in range(3)))
        for count in counts
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for count in counts:
        assert len(actual[count]) == 3
        assert all(torch.equal(each, expected[count]) for each in actual[count])
    assert all(module.training for module in network.modules())


def test_stopping_one_call_leaves_the_others_running(plain):
    """A call inside a callback of another, and another thread, have their own state."""
    counts = []

    def inner(pipe: DDPMExtPipeline, i: int, t: Any, tensors: dict) -> dict:
        if i == 0:
            pipe(num_inference_steps=5, output_type="pt", callback_on_step_end=interrupt)
            counts.append(pipe.num_timesteps)
        return tensors

    def interrupt(pipe: DDPMExtPipeline, i: int, t: Any, tensors: dict) -> dict:
        pipe._interrupt = True
        return tensors

    plain(num_inference_steps=3, output_type="pt", callback_on_step_end=inner)
    assert counts == [3]
    assert (plain.num_timesteps, plain.num_network_calls, plain.interrupt) == (3, 3, False)
    assert len(plain.scheduler.timesteps) == 5  # of the call that began last


@pytest.mark.parametrize("wrap", [DataParallel, AveragedModel])
def test_a_wrapped_network_samples(wrap):
    """The wrapper has no `config`, `dtype` and `device`."""
    images = []
    for network in (tiny_unet(1), wrap(tiny_unet(1))):
        pipeline = quiet(DDPMExtPipeline(network, DDPMExtScheduler()))
        generator = torch.Generator().manual_seed(0)
        images.append(pipeline(2, generator, num_inference_steps=3, output_type="pt").images)
    assert torch.equal(images[0], images[1])
