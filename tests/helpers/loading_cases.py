"""Schedules whose saved folders every class must load, and what is recorded after loading one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "scaled_linear_v": {
        "beta_schedule": "scaled_linear",
        "beta_start": 0.0015,
        "beta_end": 0.0195,
        "prediction_type": "v_prediction",
    },
    "cosine_x0": {"beta_schedule": "squaredcos_cap_v2", "prediction_type": "sample"},
    "v_posterior_1": {"v_posterior": 1.0},
    "v_posterior_04": {"v_posterior": 0.4},
    "sqrt": {"beta_schedule": "sqrt"},
    "fitted": {
        "num_train_timesteps": 20,
        "v_posterior": np.linspace(0.9, 0.2, 20).tolist(),
        "v_decoder": np.linspace(0.5, 0.1, 20).tolist(),
        "optimal_timesteps": {"2": [19, 3], "3": [19, 9, 0]},
    },
    "given_betas": {"trained_betas": np.linspace(2e-4, 0.08, 200).tolist()},
}
STEPS = 5


def repo_of(case: str) -> str:
    """Hub id of a case."""
    return f"alice/{case.replace('_', '-')}"


def images_of(pipeline: Any) -> np.ndarray:
    """Two images of five steps, always from the same noise."""
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(11)
    return pipeline(2, generator=generator, num_inference_steps=STEPS, output_type="np").images


def keys_of(scheduler: Any) -> dict[str, Any]:
    """The config without the entries that every class writes about itself."""
    return {key: value for key, value in json.loads(scheduler.to_json_string()).items() if key[0] != "_"}


class Findings:
    """Facts recorded by a process, as JSON, and its images."""

    def __init__(self) -> None:
        self.facts: dict[str, Any] = {}
        self.arrays: dict[str, np.ndarray] = {}

    def pipeline(self, loader: str, pipeline: Any) -> None:
        """Record the classes of a loaded pipeline and the images it draws."""
        self.facts[loader] = {
            "class": type(pipeline).__name__,
            "scheduler": type(pipeline.scheduler).__name__,
            "keys": keys_of(pipeline.scheduler),
        }
        self.arrays[f"{loader}/betas"] = np.asarray(pipeline.scheduler.betas)
        self.arrays[f"{loader}/images"] = images_of(pipeline)

    def error(self, loader: str, call: Any) -> None:
        """Record the error of a loader."""
        try:
            call()
        except Exception as error:
            self.facts[loader] = f"{type(error).__name__}: {error}"
        else:
            self.facts[loader] = "opened"

    def write(self, stem: Path) -> None:
        """Save as ``stem.json`` and ``stem.npz``."""
        stem.with_suffix(".json").write_text(json.dumps(self.facts))
        np.savez(stem.with_suffix(".npz"), **self.arrays)

    @classmethod
    def read(cls, stem: Path) -> Findings:
        """Load what `write` saved."""
        findings = cls()
        findings.facts = json.loads(stem.with_suffix(".json").read_text())
        findings.arrays = dict(np.load(stem.with_suffix(".npz")))
        return findings
