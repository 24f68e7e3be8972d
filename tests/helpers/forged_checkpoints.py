"""Checkpoints with changed content whose checksums are right, as somebody makes them who knows the format."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from diffusers_ddpm_ext.training.checkpoints.manifest import add_checksum, digest_file, encode_manifest

Path_ = tuple[Any, ...]
VALUES: list[Any] = [
    None, True, False, 0, 1, -1, 2, 10**18, 10**25, -(10**19), 1.5, -0.5, 1e308, math.nan, math.inf, "", "x", "\ud800",
    "1", [], {}, [1], [None], {"a": 1}, [[[[]]]], "validation", "a" * 300, "\x1b[31m",
]  # fmt: skip


def seal(checkpoint: Path) -> None:
    """Write the manifest again, with the files as they are."""
    step = json.loads((checkpoint / "manifest.json").read_text())["step"]
    files = {}
    for path in checkpoint.iterdir():
        if path.name != "manifest.json":
            with open(path, "rb", buffering=0) as file:
                files[path.name] = digest_file(file)
    (checkpoint / "manifest.json").write_bytes(encode_manifest(step, files))


def forge_state(checkpoint: Path, change: Callable[[Any], object]) -> None:
    """Change ``state.json``, and seal the checkpoint."""
    state = json.loads((checkpoint / "state.json").read_text())
    change(state)
    (checkpoint / "state.json").write_text(json.dumps(state))
    seal(checkpoint)


def forge_tensors(checkpoint: Path, name: str, change: Callable[[dict[str, Tensor]], object]) -> None:
    """Change a file of tensors and their table in ``state.json``, and seal the checkpoint."""
    tensors = load_file(checkpoint / name)
    change(tensors)
    save_file({key: tensor.clone() for key, tensor in tensors.items()}, checkpoint / name, metadata={"format": "pt"})
    table = {key: [str(t.dtype).removeprefix("torch."), list(t.shape)] for key, t in tensors.items()}
    forge_state(checkpoint, lambda state: state["tensors"].update({name: table}))


def forge_manifest(checkpoint: Path, change: Callable[[Any], object]) -> None:
    """Change the manifest, with its own checksum right."""
    content = json.loads((checkpoint / "manifest.json").read_text())
    del content["sha256"]
    change(content)
    (checkpoint / "manifest.json").write_bytes(add_checksum(json.dumps(content, indent=1).encode()))


def places(value: Any, above: Path_ = ()) -> Iterator[Path_]:
    """Every key and index of a JSON value."""
    entries = value.items() if isinstance(value, dict) else enumerate(value[:3]) if isinstance(value, list) else ()
    for key, item in entries:
        yield (*above, key)
        yield from places(item, (*above, key))


def mutate(value: Any, chance: random.Random) -> str:
    """Change one place of a JSON value; every part of it is as likely as a large table."""
    every = list(places(value))
    part = chance.choice(sorted({place[:3] for place in every}, key=str))
    place = chance.choice([each for each in every if each[:3] == part])
    holder = value
    for key in place[:-1]:
        holder = holder[key]
    kind, old = chance.choice(["set", "set", "set", "delete", "add"]), holder[place[-1]]
    if kind == "delete":
        del holder[place[-1]]
        return f"delete {place}"
    new = chance.choice(VALUES)
    if isinstance(old, int | float) and not isinstance(old, bool) and chance.random() < 0.5:
        new = chance.choice([old + 1, old - 1, -old, old * 2, old / 3])
    if kind == "add" and isinstance(holder, dict):
        holder["added"] = new
        return f"add {new!r:.60} to {place[:-1]}"
    if repr(new) == repr(old) or {repr(new), repr(old)} == {"0.0", "-0.0"}:  # an equal number, with the same results
        return mutate(value, chance)
    holder[place[-1]] = new
    return f"{place}: {old!r:.60} -> {new!r:.60}"


def mutate_tensors(tensors: dict[str, Tensor], chance: random.Random) -> str:
    """Change one tensor into something that no run writes."""
    name = chance.choice(sorted(tensors))
    tensor, kind = tensors[name].clone(), chance.choice(["nan", "inf", "shape", "dtype", "delete", "add"])
    if kind in ("nan", "inf") and tensor.is_floating_point():
        tensor.view(-1)[chance.randrange(tensor.numel())] = float(kind)
    elif kind == "delete":
        del tensors[name]
        return f"delete {name}"
    elif kind == "add":
        tensors[f"{name}x"] = tensor
        return f"add {name}x"
    elif kind == "shape":
        tensor = tensor.reshape(-1).repeat(2)
    else:
        tensor = tensor.to(chance.choice([torch.complex64, torch.float16, torch.int32]))
    tensors[name] = tensor
    return f"{kind} {name}"
