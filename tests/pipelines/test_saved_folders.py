"""A saved folder in stock Diffusers without this package, and in ours with all its keys.

Stock classes load it in a process in which ``diffusers_ddpm_ext`` cannot be imported; Hub ids go through the real
client to a Hub on the loopback.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler
from helpers.hub_server import LoopbackHub
from helpers.loading_cases import CASES, Findings, images_of, keys_of, repo_of
from helpers.paths import PYTHONPATH, TESTS
from helpers.tiny import tiny_unet

from diffusers_ddpm_ext import DDPMExtPipeline, DDPMExtScheduler

SOURCES = ("folder", "id")
STOCK_PIPELINES = ("DDPMPipeline", "DiffusionPipeline")


@dataclass
class LoadingResults:
    """Results of the loading processes, and the folder that has all saved pipelines."""

    root: Path
    ours: Findings
    stock: Findings
    pushed: dict[str, dict[str, bytes]]


def build(case: str) -> DDPMExtPipeline:
    """The pipeline of a case, with a logvar."""
    config = {"variance_type": "learned"} if case == "learned" else CASES[case]
    scheduler = DDPMExtScheduler(**config)
    pipeline = DDPMExtPipeline(tiny_unet(1, 2 if case == "learned" else 1), scheduler)
    steps = scheduler.config.num_train_timesteps
    pipeline.logvar = torch.randn(steps, generator=torch.Generator().manual_seed(steps))
    return pipeline


def stock_config(case: str) -> dict:
    """The case as DDPMScheduler supports it: the closer of its two variances, betas where it has no name."""
    config = dict(CASES[case])
    if case == "sqrt":
        config["trained_betas"] = np.sqrt(np.linspace(1e-4, 0.02, 1000)).tolist()
    if "trained_betas" in config:
        config["num_train_timesteps"] = len(config["trained_betas"])
    v_posterior = config.pop("v_posterior", None)
    if v_posterior is not None:
        config["variance_type"] = "fixed_small" if np.mean(v_posterior) < 0.5 else "fixed_large"
    for name in ("v_decoder", "optimal_timesteps"):
        config.pop(name, None)
    return config


def run(script: str, root: Path, environment: dict[str, str]) -> Findings:
    """One process over all cases."""
    stem = root / Path(script).stem
    command = [sys.executable, str(TESTS / "helpers" / script), str(root / "saved"), str(stem)]
    ran = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert ran.returncode == 0, f"{script} failed:\n{ran.stderr[-4000:]}"
    return Findings.read(stem)


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> LoadingResults:
    root = tmp_path_factory.mktemp("loading")
    for case in (*CASES, "learned"):
        build(case).save_pretrained(root / "saved" / case)
    with LoopbackHub() as hub:
        base = {**os.environ, "OMP_NUM_THREADS": "1"}
        base.pop("PYTHONPATH", None)
        with_us = {**base, **hub.environment(str(root / "home_ours")), "PYTHONPATH": PYTHONPATH}
        ours = run("loading_ours.py", root, with_us)
        stock = run("loading_stock.py", root, {**base, **hub.environment(str(root / "home_stock"), token=None)})
        pushed = {case: hub.files(repo_of(case)) for case in (*CASES, "learned")}
    return LoadingResults(root, ours, stock, pushed)


def test_stock_process_cannot_import_this_package(results):
    assert results.stock.facts["import"].startswith("ModuleNotFoundError")


@pytest.mark.parametrize("loader", STOCK_PIPELINES)
@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("case", CASES)
def test_stock_pipelines_load_the_folder(results, case, source, loader):
    result = results.stock.facts[f"{case}/{source}/{loader}"]
    assert (result["class"], result["scheduler"]) == ("DDPMPipeline", "DDPMScheduler")
    peer = DDPMScheduler(**stock_config(case))
    assert {key: result["keys"][key] for key in keys_of(peer)} == keys_of(peer)
    assert np.array_equal(results.stock.arrays[f"{case}/{source}/{loader}/betas"], peer.betas.numpy())
    expected = images_of(DDPMPipeline(tiny_unet(1), peer))
    assert np.abs(results.stock.arrays[f"{case}/{source}/{loader}/images"] - expected).max() <= 1e-4


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("case", CASES)
def test_stock_keeps_our_keys_without_using_them(results, case, source):
    keys = keys_of(build(case).scheduler)
    for loader in STOCK_PIPELINES:
        assert results.stock.facts[f"{case}/{source}/{loader}"]["keys"] == keys
    assert results.stock.facts[f"{case}/{source}/DDPMScheduler"] == keys


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("case", CASES)
def test_stock_loads_scheduler_and_network_separately(results, case, source):
    """The scheduler, as its own and as another class, and the network."""
    betas = DDPMScheduler(**stock_config(case)).betas.numpy()
    for loader in ("DDPMScheduler", "DDIMScheduler"):
        assert np.array_equal(results.stock.arrays[f"{case}/{source}/{loader}/betas"], betas)
    assert results.stock.facts[f"{case}/{source}/unet"] == tiny_unet(1).num_parameters()


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("case", [*CASES, "learned"])
def test_our_pipeline_restores_everything(results, case, source):
    original = build(case)
    result = results.ours.facts[f"{case}/{source}"]
    assert (result["class"], result["scheduler"]) == ("DDPMExtPipeline", "DDPMExtScheduler")
    assert result["keys"] == keys_of(original.scheduler)
    assert results.ours.facts[f"{case}/{source}/scheduler"] == original.scheduler.to_json_string()
    assert np.array_equal(results.ours.arrays[f"{case}/{source}/logvar"], original.logvar.numpy())
    assert np.array_equal(results.ours.arrays[f"{case}/{source}/betas"], original.scheduler.betas.numpy())
    assert np.abs(results.ours.arrays[f"{case}/{source}/images"] - images_of(original)).max() <= 1e-4


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("case", CASES)
def test_generic_pipeline_class_loads_the_stock_classes(results, case, source):
    """DiffusionPipeline reads model_index.json, whether or not this package is imported."""
    assert results.ours.facts[f"{case}/{source}/generic"] == ["DDPMPipeline", "DDPMScheduler"]


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("case", CASES)
def test_our_pipeline_loads_what_stock_saved_again(results, case, source):
    """Our keys survive a stock load and save; files that stock does not know, the logvar, do not."""
    pipeline = DDPMExtPipeline.from_pretrained(results.root / "saved_by_stock" / source / case)
    assert type(pipeline.scheduler) is DDPMExtScheduler
    assert keys_of(pipeline.scheduler) == keys_of(build(case).scheduler)
    assert pipeline.logvar is None


@pytest.mark.parametrize("case", CASES)
def test_saved_files(results, case):
    """model_index.json is frozen: stock names, not the pipeline's origin; our keys are in the scheduler."""
    for files in (results.pushed[case], read_folder(results.root / "saved" / case)):
        index = json.loads(files["model_index.json"])
        assert index.pop("_diffusers_version")
        assert index == {
            "_class_name": "DDPMPipeline",
            "scheduler": ["diffusers", "DDPMScheduler"],
            "unet": ["diffusers", "UNet2DModel"],
        }
        assert json.loads(files["scheduler/scheduler_config.json"])["v_posterior"] == CASES[case].get("v_posterior")
        assert {name for name in files if name not in ("README.md", ".gitattributes")} == {
            "model_index.json",
            "scheduler/scheduler_config.json",
            "unet/config.json",
            "unet/diffusion_pytorch_model.safetensors",
            "logvar/config.json",
            "logvar/diffusion_pytorch_model.safetensors",
        }


@pytest.mark.parametrize("source", SOURCES)
def test_stock_refuses_learned_variances(results, source):
    """Stock would sample NaN: its classes refuse, and with this package the generic class loads ours."""
    for loader in STOCK_PIPELINES:
        refusal = results.stock.facts[f"learned/{source}/{loader}"]
        assert "Error" in refusal
        assert "DDPMExt" in refusal or "UNet2DExtModel" in refusal
    assert "Error" in results.stock.facts[f"learned/{source}/unet"]
    assert results.ours.facts[f"learned/{source}/generic"] == ["DDPMExtPipeline", "DDPMExtScheduler"]


def test_fixed_large_log_is_recorded_with_our_class(tmp_path):
    DDPMExtPipeline(tiny_unet(1), DDPMExtScheduler(variance_type="fixed_large_log")).save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert (index["_class_name"], index["scheduler"]) == (
        "diffusers_ddpm_ext.DDPMExtPipeline",
        ["diffusers", "DDPMExtScheduler"],
    )
    assert DDPMExtPipeline.from_pretrained(tmp_path).scheduler.config.variance_type == "fixed_large_log"


def test_save_again_keeps_everything(results, tmp_path):
    """Loading and saving with our class: no path of the first folder, the same keys, the same table."""
    first = DDPMExtPipeline.from_pretrained(results.root / "saved" / "v_posterior_04")
    first.save_pretrained(tmp_path)
    files, expected = read_folder(tmp_path), read_folder(results.root / "saved" / "v_posterior_04")
    unet = json.loads(files.pop("unet/config.json"))
    unet.pop("_name_or_path")  # Diffusers' own habit with models
    assert unet == json.loads(expected.pop("unet/config.json"))
    assert files == expected


def test_logvar_is_saved_and_removed_with_the_pipeline(tmp_path):
    """A pipeline without one does not inherit that of an older one in the same folder."""
    pipeline = build("plain")
    pipeline.save_pretrained(tmp_path)
    pipeline.logvar = None
    pipeline.save_pretrained(tmp_path)
    assert DDPMExtPipeline.from_pretrained(tmp_path).logvar is None
    assert not (tmp_path / "logvar").exists()


def test_raw_weights_next_to_the_default_ones(tmp_path):
    """EMA weights are the default files, raw ones variant="raw"; logvar comes with both."""
    pipeline = build("plain")
    raw = tiny_unet(1)
    with torch.no_grad():
        raw.conv_in.bias.add_(1.0)
    pipeline.save_pretrained(tmp_path)
    raw.save_pretrained(tmp_path / "unet", variant="raw")
    for variant, unet in ((None, pipeline.unet), ("raw", raw)):
        loaded = DDPMExtPipeline.from_pretrained(tmp_path, variant=variant)
        assert torch.equal(loaded.unet.conv_in.bias, unet.conv_in.bias)
        assert torch.equal(loaded.logvar, pipeline.logvar)
        assert torch.equal(
            DDPMPipeline.from_pretrained(tmp_path, variant=variant).unet.conv_in.bias, unet.conv_in.bias
        )


def test_other_schedulers_are_recorded_as_themselves(tmp_path):
    from diffusers import DDIMScheduler

    DDPMExtPipeline(tiny_unet(1), DDIMScheduler()).save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert (index["_class_name"], index["scheduler"]) == ("DDPMPipeline", ["diffusers", "DDIMScheduler"])
    assert type(DDPMExtPipeline.from_pretrained(tmp_path).scheduler) is DDIMScheduler
    assert type(DDPMPipeline.from_pretrained(tmp_path).scheduler) is DDIMScheduler


def test_our_pipeline_loads_a_stock_folder(tmp_path):
    stock = DDPMPipeline(tiny_unet(1), DDPMScheduler(beta_schedule="squaredcos_cap_v2", num_train_timesteps=50))
    stock.save_pretrained(tmp_path)
    pipeline = DDPMExtPipeline.from_pretrained(tmp_path)
    assert type(pipeline.scheduler) is DDPMExtScheduler
    assert pipeline.logvar is None
    assert np.abs(images_of(pipeline) - images_of(stock)).max() <= 1e-4


def test_scheduler_passed_to_from_pretrained(tmp_path):
    """It replaces the saved one."""
    from diffusers import DDIMScheduler

    build("given_betas").save_pretrained(tmp_path)
    scheduler = DDIMScheduler.from_pretrained(tmp_path, subfolder="scheduler")
    pipeline = DDPMExtPipeline.from_pretrained(tmp_path, scheduler=scheduler)
    assert pipeline.scheduler is scheduler
    assert torch.equal(pipeline.logvar, build("given_betas").logvar)


def test_path_that_does_not_exist(tmp_path):
    with pytest.raises(ValueError, match="neither a valid local path nor a valid repo id"):
        DDPMExtPipeline.from_pretrained(tmp_path / "nowhere")


def test_saving_over_a_file(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="which is a file"):
        build("plain").save_pretrained(tmp_path / "file")


def read_folder(folder: Path) -> dict[str, bytes]:
    """Path below the folder -> bytes."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
