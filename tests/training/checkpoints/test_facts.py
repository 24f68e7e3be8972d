"""Checkpoints that were changed and sealed again: every checksum is right, and what no run writes is refused."""

from __future__ import annotations

import json
import random
import re
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState
from helpers.forged_checkpoints import forge_manifest, forge_state, forge_tensors, mutate, mutate_tensors
from helpers.runs import tiny_run

from diffusers_ddpm_ext.errors import ConfigError
from diffusers_ddpm_ext.training.checkpoints.folders import newest
from diffusers_ddpm_ext.training.checkpoints.manifest import DamagedCheckpoint, NewerCheckpointFormat, verify
from diffusers_ddpm_ext.training.config.train_config import TrainConfig
from diffusers_ddpm_ext.training.loop.resume import find_checkpoint, read_matching_snapshot
from diffusers_ddpm_ext.training.loop.setup import Setup, build_setup
from diffusers_ddpm_ext.training.trainer import train

SMALL = {
    "block_out_channels": [4, 8], "norm_num_groups": 2, "num_train_timesteps": 10, "max_train_steps": 2,
    "validation_steps": 1, "checkpointing_steps": 2, "num_preview_images": 1, "ddpm_num_inference_steps": 1,
    "timestep_sampler": "loss_second_moment",
}  # fmt: skip
BIAS = "denoiser.conv_in.bias"


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("original") / "run"
    train(tiny_run(folder, **SMALL))
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    return folder


@pytest.fixture(scope="module")
def setup(original: Path) -> Iterator[Setup]:
    yield build_setup(tiny_run(original, **SMALL, resume_from_checkpoint="latest"))
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


@pytest.fixture
def checkpoint(original: Path, tmp_path: Path) -> Path:
    shutil.copytree(original / "checkpoint-2", tmp_path / "checkpoint-2")
    return tmp_path / "checkpoint-2"


def resumed(setup: Setup, checkpoint: Path) -> None:
    read_matching_snapshot(setup, checkpoint.parent, verify(checkpoint))


def test_the_original_is_accepted(setup: Setup, checkpoint: Path):
    forge_state(checkpoint, lambda state: None)
    resumed(setup, checkpoint)


def put(*place, value):
    """A change that sets a value in a JSON object."""

    def change(state):
        for key in place[:-1]:
            state = state[key]
        state[place[-1]] = value

    return change


STATES = {
    "step below zero": (put("progress", "step", value=-2), r"progress\.step is -2"),
    "another step than the manifest's": (put("progress", "step", value=1), r"progress\.(step|samples)"),
    "a huge step": (put("progress", "step", value=10**15), r"progress\.samples"),
    "a step that is true": (put("progress", "step", value=True), r"progress\.step is True"),
    "epoch": (put("progress", "epoch", value=7), r"progress\.epoch is 7"),
    "epoch below zero": (put("progress", "epoch", value=-1), r"progress\.epoch is -1"),
    "samples": (put("progress", "samples", value=99), r"progress\.samples is 99"),
    "seed": (put("progress", "seed", value=3), r"progress\.seed is 3"),
    "no processes": (put("progress", "world_size", value=0), r"progress\.world_size is 0"),
    "metrics of no size": (put("progress", "records", "metrics_size", value=-5), r"metrics_size is -5"),
    "an unknown record": (put("progress", "records", "added", value=1), r"records has 'added', .* does not know"),
    "an unknown task": (put("progress", "records", "todo", value=["dance"]), "dance"),
    "a task 100,000 times": (put("progress", "records", "todo", value=["validation"] * 100_000), "todo"),
    "recoveries": (put("progress", "records", "recoveries", value="many"), r"recoveries is 'many'"),
    "a thread for every atom": (put("progress", "records", "threads", "count", value=10**9), r"threads\.count is 10"),
    "half a core": (put("progress", "records", "threads", "cores", value=0.5), r"threads\.cores is 0\.5"),
    "no threads": (put("progress", "records", "threads", value={}), "exactly a count and cores"),
    "stopped early, perhaps": (put("progress", "records", "stopped_early", value=2), "stopped_early"),
    "the best of the future": (put("progress", "monitor", "best", value={"step": 9, "value": 0.1}), "step is 9"),
    "the best is no number": (put("progress", "monitor", "best", value={"step": 1, "value": float("nan")}), "finite"),
    "patience below zero": (put("progress", "monitor", "stale", value=-1), "stale is -1"),
    "a monitor without a name": (lambda state: state["progress"]["monitor"].pop("name"), "name"),
    "learning rate": (put("numbers", "groups", 0, "lr", value=10.0), r"learning rates \[10\.0"),
    "learning rate of the schedule": (put("numbers", "lr_scheduler", "base_lrs", value=[1.0, 1.0]), "base_lrs"),
    "last learning rate": (put("numbers", "lr_scheduler", "_last_lr", value=[0.1]), "_last_lr"),
    "infinite rate": (put("numbers", "lr_scheduler", "base_lrs", value=[float("inf"), 1.0]), "base_lrs"),
    "epoch of the schedule": (put("numbers", "lr_scheduler", "last_epoch", value=-1), "last_epoch is -1"),
    "steps of the schedule": (put("numbers", "lr_scheduler", "_step_count", value=7), "_step_count is 7"),
    "betas": (put("numbers", "groups", 0, "betas", value=[0.0, 0.0]), r"groups\[0\]\.betas"),
    "weight decay": (put("numbers", "groups", 0, "weight_decay", value=-1e6), r"groups\[0\]\.weight_decay"),
    "epsilon as text": (put("numbers", "groups", 1, "eps", value="1e-8"), r"groups\[1\]\.eps"),
    "no parameters": (put("numbers", "groups", 0, "params", value=[]), "optimizer"),
    "a group is missing": (lambda state: state["numbers"]["groups"].pop(), "another optimizer"),
    "EMA updates below zero": (put("numbers", "ema", "num_updates", value=-3), "num_updates is -3"),
    "EMA updates of a million years": (put("numbers", "ema", "num_updates", value=10**15), "num_updates is 10"),
    "EMA decay above 1": (put("numbers", "ema", "decay", value=1.5), "decay is 1.5"),
    "EMA decay of another run": (put("numbers", "ema", "decay", value=0.5), "decay is 0.5"),
    "a slot of a list": (put("numbers", "slots", value={BIAS: {"step": [1]}}), "slots"),
    "nested 200-fold": (put("progress", "versions", value=json.loads("[" * 200 + "]" * 200)), "nested"),
    "a number of 30 digits": (put("progress", "samples", value=10**30), "31 digits"),
    "another option": (put("progress", "config", "beta_end", value=0.5), "--beta_end"),
    "other images": (put("progress", "data_fingerprint", value="0"), "images"),
}  # fmt: skip


@pytest.mark.parametrize("case", STATES)
def test_facts_that_no_run_writes_are_named(case: str, setup: Setup, checkpoint: Path):
    change, match = STATES[case]
    forge_state(checkpoint, change)
    with pytest.raises(ConfigError, match=match) as refusal:
        resumed(setup, checkpoint)
    assert str(refusal.value).startswith("--resume_from_checkpoint")
    assert "\n" not in str(refusal.value)


def fill(name: str, value: float):
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors[name] = torch.full_like(tensors[name], value)

    return change


TENSORS = {
    "NaN weights": ("model.safetensors", fill(BIAS, float("nan"))),
    "infinite weights": ("model.safetensors", fill(BIAS, float("-inf"))),
    "NaN in the EMA": ("ema.safetensors", fill("conv_in.bias", float("nan"))),
    "NaN moments": ("optimizer.safetensors", fill(f"{BIAS}.exp_avg", float("nan"))),
    "negative squares": ("optimizer.safetensors", fill(f"{BIAS}.exp_avg_sq", -1.0)),
    "steps below zero": ("optimizer.safetensors", fill(f"{BIAS}.step", -1.0)),
    "steps of the future": ("optimizer.safetensors", fill(f"{BIAS}.step", 50.0)),
    "half a step": ("optimizer.safetensors", fill(f"{BIAS}.step", 0.5)),
    "a moment is missing": ("optimizer.safetensors", lambda tensors: tensors.pop(f"{BIAS}.exp_avg_sq")),
    "counts of the sampler": ("model.safetensors", fill("timestep_sampler.counts", 99)),
    "complex weights": ("model.safetensors", lambda tensors: tensors.update({BIAS: tensors[BIAS] * 1j})),
}  # fmt: skip


@pytest.mark.parametrize("case", TENSORS)
def test_tensors_that_no_run_writes_are_named(case: str, setup: Setup, checkpoint: Path):
    name, change = TENSORS[case]
    forge_tensors(checkpoint, name, change)
    with pytest.raises(ConfigError, match=name.replace(".", r"\.")):
        resumed(setup, checkpoint)


MANIFESTS = {
    "another step": put("step", value=3),
    "step below zero": put("step", value=-1),
    "a file elsewhere": lambda content: content["files"].update({"../../etc/passwd": {"size": 1, "sha256": "0" * 64}}),
    "a name of 300 bytes": lambda content: content["files"].update({"n" * 300: {"size": 1, "sha256": "0" * 64}}),
    "a size of 10^30": lambda content: content["files"]["state.json"].update(size=10**30),
    "no object of files": put("files", value=[]),
    "nested": put("facts", value=json.loads('{"a":' * 900 + "1" + "}" * 900)),
}


@pytest.mark.parametrize("case", MANIFESTS)
def test_manifests_that_no_run_writes_are_damage(case: str, checkpoint: Path):
    forge_manifest(checkpoint, MANIFESTS[case])
    with pytest.raises(DamagedCheckpoint, match="checkpoint-2"):
        verify(checkpoint)
    assert newest(checkpoint.parent).checkpoint is None


def refusal_of(setup: Setup, run: Path) -> str:
    """The message of the refusal to resume; empty without one. Any other exception is a failure."""
    try:
        found = find_checkpoint(run, "latest")
        assert found is not None
        read_matching_snapshot(setup, run, found)
    except ConfigError as error:
        return str(error)
    return ""


def check_mutations(count: int, seed: int, setup: Setup, original: Path, folder: Path) -> tuple[int, int]:
    """Mutate a checkpoint so many times; the numbers of refused and of accepted ones.

    An accepted one may differ in what no result depends on: sizes, versions, options of the implementation. It may
    lack an option with its default, as checkpoints of versions without that option do, or have one that is null, and
    have an optimizer's option of another version of PyTorch.
    """
    options = json.loads((original / "checkpoint-2" / "state.json").read_text(encoding="utf-8"))["progress"]["config"]
    defaults = {name: value for section in vars(TrainConfig()).values() for name, value in vars(section).items()}
    plain = json.loads(json.dumps(defaults, default=str))
    unset = {f"delete {('progress', 'config', name)}" for name in options if plain.get(name, ...) == options[name]}
    unset.add("add None to ('progress', 'config')")
    harmless = (
        "metrics_size",
        "world_size",
        "versions",
        "recoveries",
        "stopped_early",
        "todo",
        "slots",
        "monitor",
        "threads",
    )
    harmless += ("foreach", "fused", "capturable", "differentiable", "format", "manifest", "added", "num_updates")
    chance, refused, accepted = random.Random(seed), 0, 0
    for number in range(count):
        run = folder / str(number)
        shutil.copytree(original / "checkpoint-2", run / "checkpoint-2")
        checkpoint, what = run / "checkpoint-2", ""
        kind = number % 4
        if kind < 2:
            forge_state(checkpoint, lambda state: what_of(mutate(state, chance)))
        elif kind == 2:
            name = chance.choice(["model", "ema", "optimizer"])
            forge_tensors(checkpoint, f"{name}.safetensors", lambda tensors: what_of(mutate_tensors(tensors, chance)))
        else:
            forge_manifest(checkpoint, lambda content: what_of("manifest " + mutate(content, chance)))
        what = LAST[-1]
        refusal = refusal_of(setup, run)
        refused, accepted = refused + bool(refusal), accepted + (not refusal)
        assert "\n" not in refusal, what
        is_harmless = what in unset or re.match(r"add .* to \('numbers', 'groups', \d+\)", what)
        assert refusal or is_harmless or any(word in what for word in harmless), what
        shutil.rmtree(run)
    return refused, accepted


LAST: list[str] = []


def what_of(change: str) -> None:
    """Keep the description of the last mutation."""
    LAST.append(change)


def test_mutations_of_a_sealed_checkpoint(setup: Setup, original: Path, tmp_path: Path):
    refused, _ = check_mutations(48, 0, setup, original, tmp_path)
    assert refused > 30


@pytest.mark.slow
def test_many_mutations_of_a_sealed_checkpoint(setup: Setup, original: Path, tmp_path: Path):
    refused, _ = check_mutations(600, 1, setup, original, tmp_path)
    assert refused > 400


def test_other_options_may_come_with_allow_config_change(setup: Setup, checkpoint: Path):
    """Rates and decay then follow the new options; what is impossible in any run is refused all the same."""
    changed = replace(setup.config.checkpoint, allow_config_change=True)
    free = replace(setup, config=replace(setup.config, checkpoint=changed))
    forge_state(checkpoint, put("numbers", "groups", 0, "lr", value=10.0))
    resumed(free, checkpoint)
    forge_state(checkpoint, put("numbers", "ema", "num_updates", value=-3))
    with pytest.raises(ConfigError, match="num_updates"):
        resumed(free, checkpoint)


def test_a_newer_format_is_no_damage(checkpoint: Path):
    forge_manifest(checkpoint, put("format", value=2))
    with pytest.raises(NewerCheckpointFormat):
        verify(checkpoint)
