"""Where a component is: in its own folder, in a pipeline's, or in a repository of either."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from diffusers_ddpm_ext.errors import ConfigError, printable
from diffusers_ddpm_ext.utils.input_files import file_name, read_json_object
from diffusers_ddpm_ext.utils.pipeline_files import MODEL_INDEX


def find_component(folder: Path, subfolder: str | None, slots: Sequence[str], what: str) -> Path:
    """The folder of a component inside another one, which may be its own.

    Args:
        folder: of the component or of a pipeline.
        subfolder: where in it the component is; None looks for it.
        slots: its names in a pipeline.
        what: it is, for a message.

    Raises:
        ConfigError: there is no such folder, or the pipeline has no such component.
    """
    if subfolder is not None:
        if os.path.isabs(subfolder) or ".." in Path(subfolder).parts:
            raise ConfigError(f"subfolder is {printable(subfolder)}; it must be a folder inside {file_name(folder)}")
        if not (folder / subfolder).is_dir():
            raise ConfigError(f"{file_name(folder)} has no folder {printable(subfolder)}: correct the subfolder")
        return folder / subfolder
    if not (folder / MODEL_INDEX).is_file():
        return folder
    index = read_json_object(folder / MODEL_INDEX)
    slot = next((name for name in slots if any(index.list(name, []))), None)
    if slot is None:
        raise ConfigError(
            f"{file_name(folder)} is a pipeline without a {what} ({' or '.join(slots)}): give another folder, or the "
            f"{what}'s own"
        )
    if not (folder / slot).is_dir():
        raise ConfigError(f"{file_name(folder)} has no folder {slot}, which its {MODEL_INDEX} names: copy it again")
    return folder / slot


@contextmanager
def as_hub_error(source: str) -> Iterator[None]:
    """Re-raise what Hugging Face's client raises about a repository as a ConfigError of one line."""
    try:
        yield
    except ConfigError:
        raise
    except (OSError, ValueError) as error:
        reason = printable(" ".join(str(error).split()).split(". ")[0], 300)
        raise ConfigError(
            f"{printable(source)} is not a folder on this machine and cannot be loaded from the Hub: check the name, "
            f"the network and, for a private repository, `hf auth whoami` ({reason})"
        ) from None
