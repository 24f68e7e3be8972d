"""The published configurations: each becomes the network that it should, or is refused by name."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
import torch
from helpers import published_models
from helpers.paths import ROOT

from diffusers_ddpm_ext.compvis.architecture import translate_unet
from diffusers_ddpm_ext.compvis.config.ddpm import read_compvis_config

FACTS: dict[str, dict[str, Any]] = json.loads((ROOT / "tests" / "golden" / "released_models.json").read_text())
# Sizes that Hugging Face and the papers give for these networks, in millions.
PUBLISHED = {
    "celebahq-ldm-vq-4": 274,
    "cin256-v2": 401,
    "txt2img-1p4B-eval": 872,
    "v1-inference": 860,
    "v2-inference": 866,
}


def content(facts: dict[str, Any]) -> dict[str, Any]:
    params: dict[str, Any] = {"unet_config": {"target": f"ldm.{facts['network']}", "params": facts["unet"]}}
    params |= {name: facts[name] for name in ("conditioning_key", "concat_mode") if name in facts}
    if "cond_stage" in facts:
        stage = facts["cond_stage"]
        params["cond_stage_config"] = stage if stage.startswith("__") else {"target": f"ldm.{stage}"}
    return {"model": {"target": f"ldm.{facts['target']}", "params": params}}


@pytest.mark.parametrize("name", FACTS)
def test_released(name):
    facts = FACTS[name]
    if "refused" in facts:
        with pytest.raises(ValueError, match=facts["refused"]):
            read_compvis_config(content(facts))
        return
    config = read_compvis_config(content(facts))
    network = translate_unet(config.unet_params, conditioning_key=config.conditioning_key)
    with torch.device("meta"):
        built = network.build()
    count = sum(parameter.numel() for parameter in built.parameters())
    assert [network.class_name, count, config.conditioning_key] == facts["expected"]
    published = next((size for model, size in PUBLISHED.items() if name.endswith(model)), None)
    assert published is None or round(count / 1e6) == published


def test_the_page_has_a_row_for_each():
    page = (ROOT / "docs" / "released-models.md").read_text()
    for name, facts in FACTS.items():
        row = next(line for line in page.splitlines() if f"| `{name}` |" in line)
        draws = row.split("|")[6].strip()
        assert draws.startswith("yes") != ("refused" in facts)
        assert draws.startswith("yes") == (name in published_models.facts()), "compared with the original's pictures"
        assert ("refused" in row) == ("refused" in facts)
        assert "refused" in facts or f"`{facts['expected'][0]}`" in row
    assert not re.search(r"\bneeds\b|not yet", page), "without its reason"
