"""Run by test_upload in a separate process with HF_ENDPOINT at the loopback Hub: what a user does with the Hub."""

from __future__ import annotations

import json
import logging
import os
import sys
from pathlib import Path
from typing import Any

import torch
from diffusers import DDPMPipeline, DDPMScheduler, DiffusionPipeline, UNet2DConditionModel, UNet2DModel
from huggingface_hub import HfApi

from diffusers_ddpm_ext import DDPMExtPipeline, DDPMExtScheduler, UNet2DExtModel
from helpers.tiny import tiny_unet


def tried(call: Any) -> str:
    """The error's class and its ancestors, or "fine"."""
    try:
        call()
    except Exception as error:
        return " ".join(kind.__name__ for kind in type(error).__mro__)
    return "fine"


def pipeline_with(value: float) -> DDPMExtPipeline:
    """A pipeline whose logvar has one value for all steps."""
    pipeline = DDPMExtPipeline(tiny_unet(1), DDPMExtScheduler(num_train_timesteps=20, v_posterior=0.4))
    pipeline.logvar = torch.full((20,), value)
    return pipeline


def value_of(pipeline: DDPMExtPipeline) -> float | None:
    """That value."""
    return None if pipeline.logvar is None else float(pipeline.logvar[0])


def special_pipeline() -> DDPMExtPipeline:
    """A network that stock Diffusers cannot express, conditioned on classes."""
    unet = UNet2DExtModel(**tiny_unet(1).config | {"num_attention_heads": 2, "num_class_embeds": 4})
    return DDPMExtPipeline(unet, DDPMExtScheduler(num_train_timesteps=20), "adm", null_class_label=3)


def token_pipeline() -> DDPMExtPipeline:
    """Classes that become tokens of cross attention."""
    unet = UNet2DConditionModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        block_out_channels=(8, 8),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=4,
        cross_attention_dim=6,
        attention_head_dim=2,
    )
    pipeline = DDPMExtPipeline(unet, DDPMExtScheduler(num_train_timesteps=20), "crossattn")
    pipeline.class_embedder = torch.randn(5, 6)
    return pipeline


def main(root: Path) -> None:
    """Write facts to root/facts.json."""
    facts: dict[str, Any] = {}
    api = HfApi()
    load = DDPMExtPipeline.from_pretrained

    # one call saves and pushes, and a later push moves on; tags and commits stay readable
    pipeline_with(1.0).save_pretrained(root / "local", push_to_hub=True, repo_id="alice/saved", commit_message="one")
    api.create_tag("alice/saved", tag="v1")
    first = api.model_info("alice/saved").sha
    pipeline_with(2.0).push_to_hub("alice/saved", commit_message="two")
    facts["revisions"] = [value_of(load("alice/saved", revision=name)) for name in ("v1", first, "main")]
    facts["default"] = value_of(load("alice/saved"))
    facts["name_or_path"] = load("alice/saved").name_or_path
    os.chdir(root)
    pipeline_with(1.5).save_pretrained("alice-run", push_to_hub=True)
    facts["default_name"] = value_of(load("alice/alice-run"))

    # raw weights as a variant, pushed with the folder
    raw = tiny_unet(1)
    with torch.no_grad():
        raw.conv_in.bias.add_(1.0)
    pipeline_with(3.0).save_pretrained(root / "two_weights")
    raw.save_pretrained(root / "two_weights" / "unet", variant="raw")
    api.create_repo("alice/two-weights", exist_ok=True)
    api.upload_folder(repo_id="alice/two-weights", folder_path=root / "two_weights")
    loaded = {name: load("alice/two-weights", variant=name, cache_dir=root / str(name)) for name in (None, "raw")}
    bias = loaded["raw"].unet.conv_in.bias
    facts["variant"] = [bool(torch.equal(bias, raw.conv_in.bias)), value_of(loaded["raw"])]
    facts["variant_stock"] = bool(
        torch.equal(DDPMPipeline.from_pretrained("alice/two-weights", variant="raw").unet.conv_in.bias, bias)
    )

    # the cache: a second load from another cache folder, then with no network
    cache = root / "cache"
    facts["cache_dir"] = value_of(load("alice/saved", cache_dir=cache))
    offline = {"cache_dir": cache, "local_files_only": True}
    facts["stock_offline"] = tried(lambda: DDPMPipeline.from_pretrained("alice/saved", **offline))
    if facts["stock_offline"] == "fine":
        facts["local_files_only"] = value_of(load("alice/saved", **offline))
    downloaded = Path(DDPMExtPipeline.download("alice/saved", cache_dir=root / "cache2"))
    facts["downloaded"] = sorted(p.relative_to(downloaded).as_posix() for p in downloaded.rglob("*") if p.is_file())

    # a repository that stock cached first, read with no network: no table, and a log message about it
    if facts["stock_offline"] == "fine":
        records: list[str] = []
        handler = logging.Handler()
        handler.emit = lambda record: records.append(record.getMessage())  # type: ignore[method-assign]
        logging.getLogger("diffusers_ddpm_ext").addHandler(handler)
        DiffusionPipeline.from_pretrained("alice/saved", cache_dir=root / "stock_cache")
        unseen = load("alice/saved", cache_dir=root / "stock_cache", local_files_only=True)
        facts["unseen_logvar"] = [value_of(unseen), records]

    # a stock repository: no logvar, and that is asked only once
    DDPMPipeline(tiny_unet(1), DDPMScheduler(num_train_timesteps=20)).push_to_hub("alice/stock")
    facts["stock"] = [value_of(load("alice/stock")), value_of(load("alice/stock"))]
    facts["stock_scheduler"] = type(load("alice/stock").scheduler).__name__

    # a model without a table, pushed over one with
    pipeline_with(6.0).push_to_hub("alice/retrained")
    DDPMExtPipeline(tiny_unet(1), DDPMExtScheduler(num_train_timesteps=20)).push_to_hub("alice/retrained")
    facts["retrained"] = value_of(load("alice/retrained"))

    # a special network with classes and a table of class embeddings: ours opens it by its id, stock does not
    special = special_pipeline()
    special.push_to_hub("alice/special")
    again = load("alice/special")
    facts["special"] = [
        type(again.unet).__name__,
        all(torch.equal(a, b) for a, b in zip(special.unet.parameters(), again.unet.parameters(), strict=True)),
        again.config.conditioning_key,
        again.config.null_class_label,
    ]
    facts["special_stock"] = tried(lambda: UNet2DModel.from_pretrained("alice/special", subfolder="unet"))
    tokens = token_pipeline()
    tokens.push_to_hub("alice/tokens")
    facts["tokens"] = bool(torch.equal(load("alice/tokens").class_embedder, tokens.class_embedder))

    # private repositories and tokens
    pipeline_with(4.0).push_to_hub("alice/private", private=True)
    facts["private"] = value_of(load("alice/private", token="hf_reader", cache_dir=root / "private"))
    facts["private_no_token"] = tried(lambda: load("alice/private", token=False, cache_dir=root / "nobody"))
    facts["read_token"] = tried(lambda: pipeline_with(0.0).push_to_hub("alice/other", token="hf_reader"))
    facts["missing"] = tried(lambda: load("alice/missing"))
    (root / "facts.json").write_text(json.dumps(facts))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
