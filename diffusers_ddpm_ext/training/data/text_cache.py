"""Cache of the embeddings of captions: in files where they are too large for memory, once for every later run.

Encoder, tokenizer and captions determine its content. Files, manifest and lock are those of the cache of latents: an
embedding is stored as a mean of one channel.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor

from diffusers_ddpm_ext.training.data.cache_building import CacheJob, open_cache
from diffusers_ddpm_ext.training.data.cache_folder import CacheFolder, CacheKind
from diffusers_ddpm_ext.training.data.cache_manifest import name_of_key
from diffusers_ddpm_ext.training.data.caption_encoder import CaptionEncoder
from diffusers_ddpm_ext.training.data.posterior import Posterior
from diffusers_ddpm_ext.training.data.posterior_files import RecordFormat, StoredPosteriors
from diffusers_ddpm_ext.training.distributed import fail_together

OPTION = "--cache_text_embeddings"
FORMAT = 1
CAPTIONS_PER_CHUNK = 8


@dataclass(frozen=True)
class StoredEmbeddings:
    """Embeddings of all captions in the files of a complete cache."""

    files: StoredPosteriors

    def load(self, numbers: Tensor) -> Tensor:
        """Return the embeddings of captions (b,), (b, T, width), float32, on the CPU.

        Raises:
            RunError: an embedding is damaged.
        """
        return self.files.load(numbers, torch.zeros(len(numbers), dtype=torch.int64)).mean[:, 0]


def cache_embeddings(parent: str, encoder: CaptionEncoder, accelerator: Accelerator) -> StoredEmbeddings:
    """Open the cache of a run's captions; encode what it lacks. Collective call: every process must make it.

    Args:
        parent: each cache has a folder of its own in it.
        encoder: of the run, frozen, on this process's device, with its captions.
        accelerator: of the run.

    Raises:
        ConfigError: the folder cannot be used; in one process.
        RunError: the cache cannot be completed (a full disk); in one process.
    """
    with fail_together(accelerator):
        job = _job(Path(parent), encoder)
    return StoredEmbeddings(open_cache(job, accelerator))


def _job(parent: Path, encoder: CaptionEncoder) -> CacheJob:
    table = encoder.table
    assert table is not None
    key: dict[str, Any] = {
        "format": FORMAT,
        "kind": "captions",
        "text_encoder": encoder.content_hash,
        "captions": table.fingerprint,
        "count": len(table),
    }
    name = name_of_key(key)
    layout = RecordFormat(name, 1, (1, *encoder.shape), "float32")
    way_out = f"use {OPTION} false"
    kind = CacheKind(f"{OPTION}: the folder", "caption", "embedding", way_out, way_out)

    def records(numbers: np.ndarray) -> Iterator[list[np.ndarray]]:
        for start in range(0, len(numbers), CAPTIONS_PER_CHUNK):
            chunk = torch.from_numpy(numbers[start : start + CAPTIONS_PER_CHUNK])
            tokens = zip(chunk.tolist(), encoder.encode_numbers(chunk), strict=True)
            yield [layout.encode(number, Posterior(values[None, None])) for number, values in tokens]

    return CacheJob(CacheFolder(parent, key, layout, len(table), kind), records)
