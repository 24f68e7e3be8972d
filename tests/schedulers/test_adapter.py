"""Any Diffusers scheduler samples our models: as in Diffusers, or with converted outputs, or with an error."""

from __future__ import annotations

import inspect
import logging

import diffusers
import numpy as np
import pytest
import torch
from diffusers import (
    ConfigMixin,
    DDIMScheduler,
    DDPMScheduler,
    EulerDiscreteScheduler,
    LMSDiscreteScheduler,
    ModelMixin,
    SchedulerMixin,
)
from diffusers.configuration_utils import register_to_config
from diffusers.schedulers.scheduling_ddim import DDIMSchedulerOutput
from diffusers.utils.outputs import BaseOutput
from helpers.tiny import tiny_unet

from diffusers_ddpm_ext import DDPMExtPipeline, DDPMExtScheduler
from diffusers_ddpm_ext.schedulers import adapter

NAMES = sorted(kind.__name__ for kind in DDPMScheduler().compatibles)
NATIVES = ("epsilon", "sample", "v_prediction")
ANCESTRAL_OR_KDPM2 = [name for name in NAMES if "Ancestral" in name or "KDPM2" in name]
SCALED = [  # what they walk on is not what the network takes
    name for name in NAMES if "Euler" in name or "KDPM2" in name or name.startswith(("Heun", "LMS", "DPMSolverSDE"))
]
# Some stock schedulers hand their tensors to numpy in ways that numpy 2 deprecates; torchsde has its own habits.
pytestmark = [
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:__array_wrap__ must accept:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:Should have ta<=t0 but got:UserWarning"),
    pytest.mark.filterwarnings("ignore:Should have tb<=t1 but got:UserWarning"),
]


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def swapped(pipeline, name, **changes):
    """What a user writes."""
    pipeline.scheduler = getattr(diffusers, name).from_config(pipeline.scheduler.config, **changes)
    return pipeline


def ours(unet=None, **config):
    pipeline = DDPMExtPipeline(unet or tiny_unet(), DDPMExtScheduler(**config))
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def in_stock(unet, scheduler, count, generator, batch=2, **step_kwargs):
    """The loop of Diffusers' documentation, written out."""
    scheduler.set_timesteps(count)
    if "generator" in inspect.signature(scheduler.step).parameters:
        step_kwargs["generator"] = generator
    channels, size = unet.config.in_channels, unet.config.sample_size
    x = torch.randn((batch, channels, size, size), generator=generator) * scheduler.init_noise_sigma
    with torch.no_grad():
        for t in scheduler.timesteps:
            x = scheduler.step(unet(scheduler.scale_model_input(x, t), t).sample, t, x, **step_kwargs).prev_sample
    return x


class Said(BaseOutput):
    sample: torch.Tensor


class TanhNetwork(ModelMixin, ConfigMixin):
    """One network, x0 = tanh(unet), with each prediction type as its output; counts its calls.

    Between two steps log sigma is interpolated, as Diffusers' schedulers do.
    """

    @register_to_config
    def __init__(self, native="sample", twice=False, in_channels=3, out_channels=3, sample_size=8):
        super().__init__()
        self.unet, self.calls = tiny_unet(), 0
        abar = DDPMExtScheduler(rescale_betas_zero_snr=native != "epsilon").schedule.alphas_cumprod
        self.set_table(abar)

    def set_table(self, abar):
        abar = np.maximum(abar, 2.0**-24)
        self.log_sigma = 0.5 * np.log((1 - abar) / abar)

    def forward(self, xt, t, return_dict=True, class_labels=None):
        self.calls += 1
        abar = 1 / (1 + float(np.exp(2 * np.interp(float(t), np.arange(1000), self.log_sigma))))
        root, rest = abar**0.5, (1 - abar) ** 0.5
        x0 = self.unet(xt, t).sample.tanh()
        eps = (xt - root * x0) / rest
        out = {"sample": x0, "epsilon": eps, "v_prediction": root * eps - rest * x0}[self.config.native]
        out = torch.cat([out, torch.rand_like(out) * 50], dim=1) if self.config.twice else out
        return Said(sample=out) if return_dict else (out,)


# ---------------------------------------------------------------------- as stock


@pytest.mark.parametrize("native", NATIVES)
@pytest.mark.parametrize("name", NAMES)
def test_as_stock_wherever_stock_works(name, native):
    pipeline = swapped(ours(tiny_unet(), prediction_type=native), name)
    extra = {"noise_sampler_seed": 5} if name == "DPMSolverSDEScheduler" else {}
    theirs = getattr(diffusers, name).from_config(pipeline.scheduler.config, **extra)
    pipeline.scheduler = getattr(diffusers, name).from_config(pipeline.scheduler.config, **extra)
    images = pipeline(2, seeded(), 12, "latent").images
    try:
        stock = in_stock(pipeline.unet, theirs, 12, seeded())
    except (NotImplementedError, ValueError):  # of stock's: this prediction type is not known to it
        assert native == "sample"
        assert (
            name in {"DPMSolverSDEScheduler", "EDMEulerScheduler", "PNDMScheduler"} or "Ances" in name or "KD" in name
        )
        return
    if name == "EDMEulerScheduler":  # uses its own noise levels
        assert not torch.allclose(images, stock, atol=0.1)
    elif name == "DDPMScheduler":
        assert torch.allclose(images, stock, atol=1e-4)
    else:
        assert torch.equal(images, stock)


@pytest.mark.parametrize("spacing", ["leading", "linspace", "trailing"])
@pytest.mark.parametrize(
    "name", ["DDIMScheduler", "EulerDiscreteScheduler", "DPMSolverMultistepScheduler", "UniPCMultistepScheduler"]
)
def test_spacing_is_that_of_the_config_in_memory_and_on_disk(name, spacing, tmp_path):
    """In stock a swap in memory forgets what is a default: it starts at 999, and at 980 once saved and loaded."""
    pipeline = swapped(ours(timestep_spacing=spacing), name)
    peer = getattr(diffusers, name)(timestep_spacing=spacing)
    peer.set_timesteps(10)
    pipeline(1, seeded(), 10, "latent")
    assert pipeline.scheduler.timesteps.tolist() == peer.timesteps.tolist()
    pipeline.save_pretrained(tmp_path)
    loaded = DDPMExtPipeline.from_pretrained(tmp_path)
    assert type(loaded.scheduler).__name__ == name
    loaded.scheduler.set_timesteps(10)
    assert loaded.scheduler.timesteps.tolist() == peer.timesteps.tolist()


@pytest.mark.parametrize(
    ("name", "calls"), [("PNDMScheduler", 59), ("HeunDiscreteScheduler", 99), ("DDIMScheduler", 50)]
)
def test_network_calls_are_reported(name, calls):
    network = TanhNetwork("v_prediction")
    pipeline = swapped(ours(network, prediction_type="v_prediction", rescale_betas_zero_snr=True), name)
    pipeline(1, seeded(), 50, "latent")
    assert pipeline.num_network_calls == network.calls == calls


# ---------------------------------------------------------------------- conversion of the output


@pytest.mark.parametrize("name", NAMES)
def test_one_network_with_three_prediction_types(name):
    """eps, x0 and v are one statement: the images are the same. PNDM extrapolates what it is handed: eps differs."""
    result = {}
    for native in NATIVES:
        pipeline = swapped(ours(TanhNetwork(native), prediction_type=native), name)
        pipeline.unet.set_table(pipeline.trained_scheduler.schedule.alphas_cumprod)
        result[native] = pipeline(2, seeded(), 20, "latent").images
        assert float(result[native].std()) < 1
    assert torch.allclose(result["sample"], result["v_prediction"], atol=1e-3)
    if name != "PNDMScheduler":
        assert torch.allclose(result["sample"], result["epsilon"], atol=1e-3)


@pytest.mark.parametrize("native", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("name", [name for name in NAMES if name != "DDPMScheduler"])
def test_a_learned_variance_reaches_no_sampler_that_cannot_use_it(name, native):
    """Huge numbers in the second half of the channels: the images are those of a network without it."""
    plain = swapped(ours(TanhNetwork(native), prediction_type=native), name)
    learned = swapped(
        ours(TanhNetwork(native, twice=True), prediction_type=native, variance_type="learned_range"), name
    )
    for pipeline in (plain, learned):
        pipeline.unet.set_table(pipeline.trained_scheduler.schedule.alphas_cumprod)
    a, b = (pipeline(2, seeded(), 10, "latent").images for pipeline in (plain, learned))
    assert torch.equal(a, b)


def test_a_learned_variance_reaches_a_step_that_uses_it():
    unet = tiny_unet(3, 6)
    pipeline = swapped(ours(unet, variance_type="learned_range"), "DDPMParallelScheduler")
    stock = in_stock(unet, diffusers.DDPMParallelScheduler.from_config(pipeline.scheduler.config), 10, seeded())
    assert torch.equal(pipeline(2, seeded(), 10, "latent").images, stock)


@pytest.mark.parametrize("name", NAMES)
def test_zero_terminal_snr_is_passed_on(name):
    """Eight classes know nothing of it and would drop it silently."""
    config = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}
    pipeline = swapped(ours(TanhNetwork("v_prediction"), **config), name)
    images = pipeline(2, seeded(), 20, "latent").images
    peer = swapped(ours(TanhNetwork("sample"), prediction_type="sample", rescale_betas_zero_snr=True), name)
    assert torch.allclose(images, peer(2, seeded(), 20, "latent").images, atol=2e-3)
    sampler = adapter.adapt_scheduler(pipeline.scheduler, pipeline.trained_scheduler)
    table = getattr(sampler.scheduler, "alphas_cumprod", None)
    if table is None:
        assert sampler.scheduler.config.sigma_max == pytest.approx(4096, rel=1e-3)
    else:
        assert float(table[-1]) <= 2.0**-23
    back = DDPMExtScheduler.from_config(pipeline.scheduler.config)
    assert back.schedule.betas.tobytes() == DDPMExtScheduler(**config).schedule.betas.tobytes()


def test_a_short_chain():
    for name in ("DDIMScheduler", "EulerAncestralDiscreteScheduler", "KDPM2DiscreteScheduler", "EDMEulerScheduler"):
        pipeline = swapped(ours(prediction_type="sample", num_train_timesteps=20, beta_end=0.4), name)
        assert torch.isfinite(pipeline(1, seeded(), 5, "latent").images).all()


def test_the_noise_of_a_seeded_class_comes_from_the_generators():
    """DPMSolverSDE has no ``generator``: image i still depends on generator i alone."""
    pipeline = swapped(ours(prediction_type="v_prediction"), "DPMSolverSDEScheduler")
    both = pipeline(2, [seeded(1), seeded(2)], 5, "latent").images
    alone = pipeline(1, [seeded(2)], 5, "latent").images
    assert torch.allclose(both[1:], alone, atol=1e-4)
    assert not torch.allclose(alone, pipeline(1, [seeded(3)], 5, "latent").images, atol=1e-2)
    assert pipeline.scheduler.config.noise_sampler_seed is None


# ---------------------------------------------------------------------- what step takes


def test_eta_and_other_arguments_of_step():
    pipeline = swapped(ours(), "DDIMScheduler")
    peer = DDIMScheduler.from_config(pipeline.scheduler.config)
    images = pipeline(2, seeded(), 10, "latent", eta=1.0).images
    assert torch.equal(images, in_stock(pipeline.unet, peer, 10, seeded(), eta=1.0))
    swapped(pipeline, "LMSDiscreteScheduler")
    peer = LMSDiscreteScheduler.from_config(pipeline.scheduler.config)
    images = pipeline(2, seeded(), 10, "latent", step_kwargs={"order": 2}).images
    assert torch.equal(images, in_stock(pipeline.unet, peer, 10, seeded(), order=2))


@pytest.mark.parametrize(
    ("name", "kwargs", "message"),
    [
        (
            "EulerDiscreteScheduler",
            {"eta": 1.0},
            r"EulerDiscreteScheduler.step takes no eta; it takes s_churn, s_tmin",
        ),
        ("DDIMScheduler", {"step_kwargs": {"order": 2}}, r"DDIMScheduler.step takes no order; it takes eta"),
        ("PNDMScheduler", {"eta": 0.5}, r"takes no eta; it takes nothing more"),
    ],
)
def test_unknown_arguments_of_step(name, kwargs, message):
    with pytest.raises(ValueError, match=message):
        swapped(ours(), name)(1, num_inference_steps=4, **kwargs)


# ---------------------------------------------------------------------- rejected before the network is called


def assert_rejected(pipeline, match):
    calls = pipeline.unet.calls
    with pytest.raises(ValueError, match=match) as caught:
        pipeline(1, seeded(), 10, "latent")
    assert pipeline.unet.calls == calls == 0
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", [name for name in NAMES if name != "EDMEulerScheduler"])
@pytest.mark.parametrize("native", NATIVES)
def test_other_betas(name, native):
    pipeline = swapped(ours(TanhNetwork(native), prediction_type=native, beta_schedule="scaled_linear"), name)
    assert_rejected(
        swapped(pipeline, name, beta_schedule="linear"), r"other betas than this model was trained with \(alphas_c"
    )
    assert_rejected(
        swapped(pipeline, name, beta_schedule="scaled_linear", num_train_timesteps=500), "has 500 training steps"
    )


@pytest.mark.parametrize("name", [name for name in NAMES if name != "EDMEulerScheduler"])
def test_a_dropped_rescaling(name):
    pipeline = ours(TanhNetwork("v_prediction"), prediction_type="v_prediction", rescale_betas_zero_snr=True)
    config = dict(pipeline.scheduler.config) | {"rescale_betas_zero_snr": False}
    pipeline.scheduler = getattr(diffusers, name).from_config(config)
    assert_rejected(pipeline, "other betas")


@pytest.mark.parametrize("name", NAMES)
def test_another_prediction_type(name):
    assert_rejected(
        swapped(ours(TanhNetwork("v_prediction"), prediction_type="v_prediction"), name, prediction_type="epsilon"),
        "has prediction_type='epsilon', but this model predicts 'v_prediction'",
    )


@pytest.mark.parametrize("name", SCALED)
@pytest.mark.parametrize("native", NATIVES)
def test_an_input_that_is_not_scaled(name, native, monkeypatch):
    kind = getattr(diffusers, name)
    unscaled = type(name, (kind,), {"scale_model_input": lambda self, sample, t: self._init_step_index(t) or sample})
    monkeypatch.setattr(diffusers, name, unscaled)
    monkeypatch.setattr(adapter, "_TRIAL_RESULTS", {})
    assert_rejected(swapped(ours(TanhNetwork(native), prediction_type=native), name), "cannot sample this model")


@pytest.mark.parametrize("name", ["EulerAncestralDiscreteScheduler", "KDPM2DiscreteScheduler", "PNDMScheduler"])
def test_a_missing_conversion_of_the_output_is_found(name, monkeypatch):
    monkeypatch.setattr(adapter.SchedulerAdapter, "convert_output", lambda self, output, *others: output)
    monkeypatch.setattr(adapter, "_TRIAL_RESULTS", {})
    assert_rejected(swapped(ours(TanhNetwork("sample"), prediction_type="sample"), name), "cannot sample this model")


@pytest.mark.parametrize(
    ("name", "match"),
    [
        ("FlowMatchEulerDiscreteScheduler", "is for flow matching"),
        ("DDIMInverseScheduler", "from images to noise"),
        ("DPMSolverMultistepInverseScheduler", "from images to noise"),
        ("LCMScheduler", "the network's input has mean"),
    ],
)
def test_samplers_of_other_models(name, match):
    assert_rejected(swapped(ours(TanhNetwork("epsilon")), name), match)


@pytest.mark.parametrize("name", ["DPMSolverMultistepScheduler", "DEISMultistepScheduler", "UniPCMultistepScheduler"])
def test_flow_sigmas(name):
    assert_rejected(
        swapped(ours(TanhNetwork("epsilon")), name, use_flow_sigmas=True),
        "with use_flow_sigmas=True samples flow-match",
    )


def test_options_of_a_class_are_kept():
    for name, options in [
        ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++", "use_karras_sigmas": True}),
        ("EulerDiscreteScheduler", {"use_karras_sigmas": True, "timestep_spacing": "trailing"}),
        ("UniPCMultistepScheduler", {"solver_order": 3}),
    ]:
        pipeline = swapped(ours(), name, **options)
        peer = getattr(diffusers, name).from_config(pipeline.scheduler.config)
        assert torch.equal(pipeline(2, seeded(), 10, "latent").images, in_stock(pipeline.unet, peer, 10, seeded()))


# ---------------------------------------------------------------------- entry points


def test_a_scheduler_handed_to_from_pretrained(tmp_path):
    ours(beta_schedule="scaled_linear").save_pretrained(tmp_path)
    right = EulerDiscreteScheduler.from_pretrained(tmp_path, subfolder="scheduler")
    pipeline = DDPMExtPipeline.from_pretrained(tmp_path, scheduler=right)
    assert pipeline.scheduler is right
    assert torch.isfinite(pipeline(1, seeded(), 4, "latent").images).all()
    pipeline = DDPMExtPipeline.from_pretrained(tmp_path, scheduler=EulerDiscreteScheduler())
    with pytest.raises(ValueError, match="other betas than this model was trained with"):
        pipeline(1, seeded(), 4, "latent")


def test_the_scheduler_is_not_changed():
    pipeline = swapped(ours(prediction_type="sample"), "EulerAncestralDiscreteScheduler")
    given, config = pipeline.scheduler, dict(pipeline.scheduler.config)
    pipeline(1, seeded(), 4, "latent")
    assert pipeline.scheduler is given
    assert dict(given.config) == config
    assert len(given.timesteps) == 4


def test_a_start_in_the_middle_of_the_chain_warns(caplog):
    """600 steps of 1000: DPM-Solver's leading spacing starts at step 600, from noise without a trace of the image."""
    pipeline = swapped(ours(), "DPMSolverMultistepScheduler")
    with caplog.at_level(logging.WARNING):
        pipeline(1, seeded(), 10, "latent")
        assert not [record for record in caplog.records if "starts from pure noise" in record.message]
        pipeline(1, seeded(), 600, "latent")
    assert "starts from pure noise at step 600 of 1000, where the model expects 16% of the image" in caplog.text


class Unknown(SchedulerMixin, ConfigMixin):
    """DDIM in ten lines, by nobody we know."""

    init_noise_sigma, order = 1.0, 1
    wrong = 1.0

    @register_to_config
    def __init__(self, num_train_timesteps=1000, beta_start=1e-4, beta_end=0.02, prediction_type="epsilon"):
        self.alphas_cumprod = (1 - torch.linspace(beta_start, beta_end, num_train_timesteps)).cumprod(0)

    def set_timesteps(self, num_inference_steps, device=None):
        self.timesteps = torch.arange(0, 1000, 1000 // num_inference_steps).flip(0)

    def scale_model_input(self, sample, timestep):
        return sample

    def step(self, model_output, timestep, sample):
        if self.config.prediction_type != "epsilon":
            raise NotImplementedError(self.config.prediction_type)
        abar = self.alphas_cumprod[timestep]
        after = timestep - 1000 // len(self.timesteps)
        left = self.alphas_cumprod[after] if after >= 0 else torch.tensor(1.0)
        x0 = (sample - (1 - abar).sqrt() * model_output * self.wrong) / abar.sqrt()
        return DDIMSchedulerOutput(prev_sample=left.sqrt() * x0 + (1 - left).sqrt() * model_output)


class Wrong(Unknown):
    wrong = 0.8


def test_an_unknown_scheduler_class():
    pipeline = ours()
    theirs = ours()
    theirs.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config, clip_sample=False)
    pipeline.scheduler = Unknown.from_config(pipeline.scheduler.config)
    images = pipeline(1, seeded(), 10, "latent").images
    assert torch.allclose(images, theirs(1, seeded(), 10, "latent").images, rtol=1e-2, atol=1e-2)
    network = ours(TanhNetwork("epsilon"))
    network.scheduler = Wrong.from_config(network.scheduler.config)
    assert_rejected(network, "Wrong cannot sample this model")


def test_guidance_and_other_samplers():
    """The network's output is guided first and then converted: at scale 1 nothing changes."""
    from diffusers import UNet2DModel

    unet = UNet2DModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        block_out_channels=(8, 8),
        layers_per_block=1,
        norm_num_groups=4,
        down_block_types=("DownBlock2D",) * 2,
        up_block_types=("UpBlock2D",) * 2,
        num_class_embeds=3,
    )
    scheduler = DDPMExtScheduler(prediction_type="sample")
    pipeline = DDPMExtPipeline(unet, scheduler, conditioning_key="adm", null_class_label=2)
    pipeline.set_progress_bar_config(disable=True)
    swapped(pipeline, "EulerAncestralDiscreteScheduler")
    plain, guided = (pipeline(1, seeded(), 4, "latent", class_labels=1, guidance_scale=s).images for s in (1.0, 2.0))
    assert not torch.allclose(plain, guided, atol=1e-4)
    same = pipeline(1, seeded(), 4, "latent", class_labels=1, negative_class_labels=1, guidance_scale=2.0).images
    assert torch.allclose(plain, same, atol=1e-4)
