"""The weights in one network's folder, examined without building the network: complete, readable, finite."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from diffusers_ddpm_ext.errors import ConfigError, printable
from diffusers_ddpm_ext.utils.input_files import JsonObject, file_name, read_json_object
from diffusers_ddpm_ext.utils.pipeline_files import is_weights, weights_variant
from diffusers_ddpm_ext.utils.tensor_files import StoredTensor, first_not_finite, read_tensor_headers

MAX_NAMED = 60


@dataclass(frozen=True)
class StoredWeights:
    """The default weights of a network.

    Attributes:
        tensors: by name.
        not_read: files of weights that only torch reads, by name: pickles.
    """

    tensors: dict[str, StoredTensor]
    not_read: list[str]

    @property
    def num_parameters(self) -> int:
        """Number of values of all tensors."""
        return sum(tensor.count for tensor in self.tensors.values())


def read_stored_weights(folder: Path) -> StoredWeights:
    """Read the headers of all weights of a folder, and check that every value is finite, also of other variants.

    Raises:
        ConfigError: there are none, a file or a shard is missing or damaged, or a value is NaN or infinity.
    """
    names = sorted(path.name for path in folder.iterdir() if is_weights(path.name))
    if not names:
        raise ConfigError(f"{file_name(folder)} has no weights (safetensors)")
    by_file = {}
    for name in names:
        if name.endswith(".safetensors"):
            by_file[name] = read_tensor_headers(folder / name)
            wrong = first_not_finite(folder / name, by_file[name])
            if wrong is not None:
                where = f"{file_name(folder / name)}, {printable(wrong, MAX_NAMED)}"
                raise ConfigError(f"{where}: its weights are not finite (NaN or infinity)")
    tensors: dict[str, StoredTensor] = {}
    for name in names:
        if weights_variant(name) is not None:
            continue
        if name.endswith(".index.json"):
            tensors |= _of_shards(read_json_object(folder / name), by_file)
        elif name in by_file:
            tensors |= by_file[name]
    return StoredWeights(tensors, [name for name in names if name.endswith((".bin", ".flashpack"))])


def _of_shards(index: JsonObject, by_file: Mapping[str, dict[str, StoredTensor]]) -> dict[str, StoredTensor]:
    """The tensors that the index of shards names."""
    shards = index.object("weight_map")
    tensors = {}
    for name in shards.content:
        file = shards.string(name)
        if name not in by_file.get(file, {}):
            raise ConfigError(
                f"{index.name} names {printable(name, MAX_NAMED)} in {printable(file, MAX_NAMED)}, which has no such"
                " tensor: copy the folder again"
            )
        tensors[name] = by_file[file][name]
    return tensors
