"""Results of an interrupted evaluation on the disk, so that it can resume."""

from __future__ import annotations

import time
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from diffusers_ddpm_ext.errors import warn
from diffusers_ddpm_ext.training.evaluation.processes import Processes
from diffusers_ddpm_ext.utils.files import write_atomically
from diffusers_ddpm_ext.utils.input_files import open_input

SECONDS_BETWEEN_SAVES = 30.0


class EvaluationCache:
    """The batches that this process has evaluated, written to the disk from time to time.

    Args:
        folder: where the file is written.
        fingerprint: of what is evaluated; a file with another fingerprint is ignored.
        processes: that share the evaluation; each has its own file.
    """

    def __init__(self, folder: Path, fingerprint: str, processes: Processes) -> None:
        self.path = folder / f".rows-{processes.rank}-of-{processes.world_size}.safetensors"
        self.fingerprint = fingerprint
        self.values: dict[str, Tensor] = {}
        self.saved = time.monotonic()
        try:
            open_input(self.path).close()  # a named pipe would wait forever
            with safe_open(self.path, "pt") as file:
                if (file.metadata() or {}).get("fingerprint") == fingerprint:
                    self.values = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except Exception:  # missing or damaged: it is evaluated again
            self.values = {}

    def get(self, batch: int, rows: int) -> Tensor | None:
        """The values of a batch of so many rows, (rows, 2); None if they are missing or damaged."""
        values = self.values.get(str(batch))
        if values is None or values.shape != (rows, 2) or not values.is_floating_point():
            return None
        return values if bool(values.isfinite().all()) else None

    def put(self, batch: int, values: Tensor) -> None:
        """Add the values of a batch, and save the file if the last save is long enough ago."""
        self.values[str(batch)] = values
        if time.monotonic() - self.saved > SECONDS_BETWEEN_SAVES:
            self.save()

    def save(self) -> None:
        """Write the file atomically; if that fails, warn and continue."""
        content = save(self.values, metadata={"fingerprint": self.fingerprint})
        try:
            write_atomically(self.path, lambda file: file.write(content))
        except OSError as error:
            warn(f"{self.path} could not be written ({error.strerror}); an interrupted evaluation could not resume")
        self.saved = time.monotonic()

    def delete(self) -> None:
        """Delete the files of all processes, once the result is written."""
        for path in self.path.parent.glob(".rows-*-of-*.safetensors"):
            path.unlink(missing_ok=True)
