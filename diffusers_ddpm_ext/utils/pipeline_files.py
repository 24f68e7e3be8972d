"""Which files of a folder belong to the pipeline saved in it, and which are somebody else's.

A pipeline owns what `save_pretrained`, a run's export, and the commands that describe one model (fit-variance,
evaluate, convert, push) write. A user's README, notes and pictures, a run's checkpoints and a ``.git`` are not owned.
"""

from __future__ import annotations

import filecmp
import re
from collections.abc import Iterable
from pathlib import Path

from diffusers_ddpm_ext.errors import ConfigError
from diffusers_ddpm_ext.utils.input_files import read_json

MODEL_INDEX = "model_index.json"
COMPONENTS = ("unet", "scheduler")
NETWORKS = ("unet", "vae", "vqvae", "text_encoder", "bert", "image_encoder", "concat_encoder")
"""Components with weights: the network, the first stage and the text encoder each in one of their slots, and encoders
of pictures, where the pipeline names them."""
TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json"),
    *("merges.txt", "vocab.txt", "spiece.model", "sentencepiece.bpe.model", "tokenizer.model"),
)
NETWORK_RECORDS = ("ema.json",)
"""Files about the weights, valid with any scheduler."""
STEPS_RECORD = "steps_fit.json"
RESULTS = (
    "variance_fit.json",
    STEPS_RECORD,
    "conversion.json",
    "proof.json",
    "card/samples.npz",
    "card/samples.png",
    "evaluation/evaluation.json",
    "evaluation/steps.csv",
    "evaluation/steps.png",
    *(f"plots/{name}.png" for name in ("schedule", "weights", "logvar", "steps", "variance", "timesteps")),
)
"""Results about the weights and the scheduler together."""
TABLES = tuple(
    f"{folder}/{name}"
    for folder in ("logvar", "class_embedder")
    for name in ("config.json", "diffusion_pytorch_model.safetensors")
)
CONFIGS = (
    "config.json",
    "scheduler_config.json",
    "preprocessor_config.json",
    "processor_config.json",
    "generation_config.json",
)
_WEIGHTS = re.compile(
    r"(?:diffusion_pytorch_model|pytorch_model|model)"  # Diffusers' and Transformers' names
    r"(?:\.(?P<first>[\w.-]+?))?(?:-\d{5}-of-\d{5})?(?:\.(?P<second>[\w.-]+?))?\.(?:safetensors|bin|flashpack)"
    r"(?:(?:\.(?P<third>[\w.-]+?))?\.index(?:\.(?P<fourth>[\w.-]+?))?\.json)?"
)


def is_weights(name: str) -> bool:
    """Whether a file's name is that of weights, of one of their shards, or of the index of these."""
    return _WEIGHTS.fullmatch(name) is not None


def weights_variant(name: str) -> str | None:
    """The variant in the name of a file of weights; None for the default ones."""
    match = _WEIGHTS.fullmatch(name)
    return None if match is None else next((part for part in match.groups() if part), None)


def owned_files(folder: Path) -> set[str]:
    """Files of the pipeline in a folder, relative, with ``/``; none where the folder has no pipeline.

    Args:
        folder: it need not exist.
    """
    single = (MODEL_INDEX, *NETWORK_RECORDS, *RESULTS, *TABLES)
    files = {name for name in single if _is_file(folder / name)}
    for component in component_folders(folder):
        place = folder / component
        names = [path.name for path in place.iterdir() if _is_file(path)] if place.is_dir() else []
        own = TOKENIZER_FILES if component == "tokenizer" else ()
        files |= {f"{component}/{name}" for name in names if name in (*CONFIGS, *own) or is_weights(name)}
    return files


def component_folders(folder: Path) -> Iterable[str]:
    """Folders of the components: ours, and those that the ``model_index.json`` of another pipeline names."""
    try:
        index = read_json(folder / MODEL_INDEX)
    except ConfigError:
        index = {}
    named = [key for key, value in index.items() if isinstance(value, list)] if isinstance(index, dict) else []
    return dict.fromkeys((*COMPONENTS, *(name for name in named if name.isidentifier())))


def _is_file(path: Path) -> bool:
    return path.is_file() or path.is_symlink()


def files_to_keep(folder: Path, draft: Path, variant: str | None) -> set[str]:
    """The files of a folder's pipeline that also belong to the one that is being saved over it.

    The other variants of the weights and the EMA's record stay where the network is the same: its configuration and,
    unless a variant is added, its default weights. Results stay where first stage and scheduler are the same, too.
    Tables never stay: a pipeline without one has none.

    Args:
        folder: with the old pipeline.
        draft: the new one.
        variant: of the weights in the draft.
    """
    owned = owned_files(folder)
    weights = {
        network: {name for name in owned if name.startswith(f"{network}/") and is_weights(Path(name).name)}
        for network in NETWORKS
    }
    same = {network for network in weights if _is_same_network(folder, draft, network, weights[network], variant)}
    if "unet" not in same:
        return set()
    kept = {name for network in same for name in weights[network] if _variant(name) != variant} | set(NETWORK_RECORDS)
    has_default = any(_variant(name) is None for name in weights["unet"])
    configs = (MODEL_INDEX, "scheduler/scheduler_config.json")
    if has_default and len(same) == len(weights) and all(_same_json(folder, draft, name) for name in configs):
        kept |= set(RESULTS)
    return kept & owned


def _is_same_network(folder: Path, draft: Path, network: str, weights: set[str], variant: str | None) -> bool:
    """Whether two folders have the same network, or none, as far as the draft's weights can say."""
    if not weights and not (draft / network).exists():
        return True
    default = [name for name in weights if _variant(name) is None]
    return _same_json(folder, draft, f"{network}/config.json") and (
        variant is not None or all(_same_file(folder / name, draft / name) for name in default)
    )


def _variant(name: str) -> str | None:
    return weights_variant(name.rpartition("/")[2])


def _same_file(one: Path, other: Path) -> bool:
    return other.is_file() and filecmp.cmp(one, other, shallow=False)


def _same_json(folder: Path, draft: Path, name: str) -> bool:
    """Whether a file has the same content but for what Diffusers notes about itself."""
    try:
        old, new = (read_json(place / name) for place in (folder, draft))
    except ConfigError:
        return False
    notes = ("_name_or_path", "_diffusers_version")
    return isinstance(old, dict) and {k: v for k, v in old.items() if k not in notes} == {
        k: v for k, v in new.items() if k not in notes
    }
