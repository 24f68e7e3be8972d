"""Structure-aware mutations of what a conversion reads, each ending in one sentence: YAML, flags, conversion.json."""

from __future__ import annotations

import copy
import json
import random
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import yaml
from helpers.conversion_cases import BASE, FOLDER, content

from diffusers_ddpm_ext.compvis.architecture import translate_unet
from diffusers_ddpm_ext.compvis.config.ddpm import read_compvis_config
from diffusers_ddpm_ext.compvis.config.openai import read_flags
from diffusers_ddpm_ext.compvis.config.recipe import recipe
from diffusers_ddpm_ext.compvis.convert import convert_compvis
from diffusers_ddpm_ext.compvis.save import compvis_config
from diffusers_ddpm_ext.utils.yaml_io import load_compvis_yaml

VALUES: tuple[Any, ...] = (
    None, True, 0, -1, 1, 2.5, 10**6, 10**9, 10**19, 10**400, -0.0, 1e308, float("nan"), float("inf"), "", "None", "5",
    "1e-4", "1e999", "${a.b}", "\ud800", "\x1b[31m", "x" * 3000, [], [1], [[]], [1] * 2000, ["a", None], {}, {"a": 1},
    {1: 2}, {"target": 3}, {"target": "a.B", "params": []}, [True, False],
)  # fmt: skip
MUTATIONS = 700


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path of every value inside of one."""
    entries = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in entries:
        yield (*path, key)
        yield from places(inner, (*path, key))


def mutated(original: dict[str, Any], rng: random.Random) -> dict[str, Any]:
    """A copy with one to three values replaced, deleted, moved or added."""
    result = copy.deepcopy(original)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        path = rng.choice(list(places(result)) or [("a",)])
        place: Any = result
        for step in path[:-1]:
            place = place[step]
        kind = rng.random()
        if kind < 0.7 or not result:
            place[path[-1]] = copy.deepcopy(rng.choice(VALUES))
        elif kind < 0.8:
            del place[path[-1]]
        elif kind < 0.9 and isinstance(place, dict):
            place[rng.choice(("x", "target", "params", 3, "params.x", "\u202e"))] = copy.deepcopy(rng.choice(VALUES))
        else:
            place[path[-1]] = copy.deepcopy(original)
    return result


def check(read: Callable[[], Any], what: Any) -> bool:
    """Whether it is read; otherwise a ValueError of one line, and in any case within seconds."""
    start = time.monotonic()
    try:
        read()
        message = ""
    except ValueError as error:
        message = str(error)
    assert "\n" not in message, what
    assert len(message) < 2500, (message[:300], what)
    assert time.monotonic() - start < 20, what
    return not message


def test_configurations():
    rng = random.Random(0)
    cases = [content(case) for case in ("ema", "concat", "latent_logvar", "hybrid")]
    accepted = 0
    for index in range(MUTATIONS):
        config = mutated(cases[index % len(cases)], rng)

        def read(config: dict[str, Any] = config) -> None:
            recipe(read_compvis_config(config))

        accepted += check(read, config)

        def convert(config: dict[str, Any] = config) -> None:
            with torch.device("meta"):
                translate_unet(read_compvis_config(config, for_training=False).unet_params).build()

        check(convert, config)
    assert 0.02 * MUTATIONS < accepted < 0.9 * MUTATIONS, "neither all right nor all wrong"


@pytest.mark.parametrize("seed", range(3))
def test_texts_of_yaml(seed, tmp_path):
    """Bytes replaced, deleted, repeated; anchors, tags and deep nesting put in."""
    rng = random.Random(seed)
    original = (FOLDER / "ema.yaml").read_bytes()
    pieces = (b"&a ", b"*a", b"<<: *a", b"!!python/object:os.system ", b"[" * 3000, b"{a: " * 500, b"\xff", b"\0",
              b"- ", b": ", b"'", b"\xef\xbb\xbf", b"\t", b"!!binary x", b"9" * 5000, b"2020-01-01", b"\r\n", b"? ",
              b"\xed\xa0\x80")  # fmt: skip
    path = tmp_path / "m.yaml"
    for _ in range(150):
        at = rng.randrange(len(original))
        text = original[:at] + rng.choice(pieces) + original[at + rng.choice((0, 0, 1, 40)) :]
        path.write_bytes(text)
        check(lambda: read_compvis_config(path), text)


@pytest.mark.parametrize(
    "text",
    [
        "model: {target: a.DDPM, params: {unet_config: {target: a.UNetModel, params: {"
        + ", ".join(f"k{i}: 1" for i in range(60000))
        + "}}}}",
        "a: &a [1]\n" + "".join(f"b{i}: &b{i} [{', '.join([f'*b{i - 1}' if i else '*a'] * 10)}]\n" for i in range(9)),
        "model:\n" + "".join(" " * (i + 1) + f"k{i}:\n" for i in range(700)),
        "# " + "*" * 500_000 + "\nmodel: {target: 3}\n",
        "x: " + "7" * 4000,
    ],
)
def test_yaml_that_would_take_long(text, tmp_path):
    (tmp_path / "m.yaml").write_text(text)
    assert not check(lambda: load_compvis_yaml(tmp_path / "m.yaml")["model"]["target"], text[:80]) or text[0] in "#m"


def test_flags():
    rng = random.Random(0)
    flags = {"family": "guided", "image_size": 64, "num_channels": 32, "num_res_blocks": 1, "channel_mult": "1,2",
             "attention_resolutions": "16,8", "learn_sigma": True, "diffusion_steps": 100, "dropout": 0.1,
             "class_cond": False, "noise_schedule": "cosine", "num_head_channels": 16,
             "use_fp16": "False"}  # fmt: skip
    accepted = 0
    for _ in range(MUTATIONS):
        changed = {str(key): value for key, value in mutated(flags, rng).items()}
        accepted += check(lambda changed=changed: translate_unet(read_flags(changed).unet_params), changed)
    assert 0.02 * MUTATIONS < accepted < 0.9 * MUTATIONS


def test_conversion_reports(tmp_path):
    rng = random.Random(0)
    converted = convert_compvis(FOLDER / "ema.ckpt", FOLDER / "ema.yaml")
    converted.save(tmp_path)
    pipeline = converted.pipeline
    report = converted.report.as_json()
    report = {name: report[name] for name in ("format", "facts")}
    expected = compvis_config(pipeline)["model"]["params"]["unet_config"]
    for _ in range(300):
        facts = mutated(report, rng).get("facts")
        pipeline.compvis_facts = facts if isinstance(facts, dict) else None

        def export() -> None:
            config = compvis_config(pipeline)["model"]["params"]["unet_config"]
            network, ours = translate_unet(config["params"]), translate_unet(expected["params"])
            assert network.config["block_out_channels"] == ours.config["block_out_channels"], "never another network"
            yaml.safe_dump(config)

        check(export, pipeline.compvis_facts)
    for text in (
        "",
        "[",
        "3",
        "null",
        "[]",
        '{"facts": []}',
        "[" * 10_000,
        '{"facts": {"a": NaN}}',
        '{"facts": 1' + "0" * 5000,
    ):
        (tmp_path / "conversion.json").write_text(text)
        assert not check(lambda: compvis_config(tmp_path), text)
    assert json.loads(json.dumps(BASE)) == BASE
