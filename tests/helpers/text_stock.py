"""Run by test_text_folders where this package cannot be imported: stock Diffusers draws from prompts."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
from loading_stock import Blocker


def main(folders: Path, stem: Path) -> None:
    """Load by the pipeline's own class and by the generic one; list tensors that Transformers does not find."""
    sys.meta_path.insert(0, Blocker())
    import diffusers
    import transformers
    from text_folder_cases import CASES, pictures_of

    arrays: dict[str, Any] = {}
    facts: dict[str, Any] = {"transformers": transformers.__version__}
    for case, (name, kind, _) in CASES.items():
        for loader in (getattr(diffusers, name), diffusers.DiffusionPipeline)[0 if case == "clip" else 1 :]:
            pipeline = loader.from_pretrained(str(folders / case))
            arrays[f"{case}/{loader.__name__}"] = pictures_of(pipeline)
        facts[case] = type(pipeline).__name__
        slot = "bert" if kind == "bert" else "text_encoder"
        encoder = type(getattr(pipeline, slot))
        info = encoder.from_pretrained(folders / case / slot, output_loading_info=True)[1]
        facts[f"{case}/missing"] = sorted(info["missing_keys"]) + sorted(info["unexpected_keys"])
        facts[f"{case}/tokens"] = pipeline.tokenizer(["a red cat"], padding="max_length", max_length=8).input_ids
    try:
        diffusers.DiffusionPipeline.from_pretrained(str(folders / "ours"))
        facts["ours"] = "opened"
    except Exception as error:
        facts["ours"] = f"{type(error).__name__}: {error}"
    stem.with_suffix(".json").write_text(json.dumps(facts))
    np.savez(stem.with_suffix(".npz"), **arrays)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
