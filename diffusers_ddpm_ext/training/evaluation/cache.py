"""What `ddpm-ext evaluate` has measured so far, on the disk, for a command that is broken off."""

from __future__ import annotations

import time
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from diffusers_ddpm_ext.errors import warn
from diffusers_ddpm_ext.training.evaluation.validation_loss import Processes
from diffusers_ddpm_ext.utils.files import write_atomically

SECONDS_BETWEEN_SAVES = 30.0


class EvaluationCache:
    """Rows of this process on the disk, for a command that is broken off.

    Args:
        folder: where they go.
        fingerprint: of what is measured; pages of anything else are not read.
        processes: whose share they are.
    """

    def __init__(self, folder: Path, fingerprint: str, processes: Processes) -> None:
        self.path = folder / f".rows-{processes.rank}-of-{processes.world_size}.safetensors"
        self.fingerprint = fingerprint
        self.values: dict[str, Tensor] = {}
        self.saved = time.monotonic()
        self._read()

    def _read(self) -> None:
        try:
            with safe_open(self.path, "pt") as file:
                if (file.metadata() or {}).get("fingerprint") == self.fingerprint:
                    self.values = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except Exception:  # none, or damaged: it is measured again
            self.values = {}

    def known(self, batch: int) -> Tensor | None:
        """See `diffusers_ddpm_ext.training.evaluation.bound.BatchCache`."""
        return self.values.get(str(batch))

    def note(self, batch: int, values: Tensor) -> None:
        """See `diffusers_ddpm_ext.training.evaluation.bound.BatchCache`."""
        self.values[str(batch)] = values
        if time.monotonic() - self.saved > SECONDS_BETWEEN_SAVES:
            self.save()

    def save(self) -> None:
        """Write what is known, whole or not at all; a full disk is no reason to stop."""
        content = save(self.values, metadata={"fingerprint": self.fingerprint})
        try:
            write_atomically(self.path, lambda file: file.write(content))
        except OSError as error:
            warn(f"{self.path} could not be written ({error.strerror}); what is measured so far would be lost")
        self.saved = time.monotonic()

    def close(self) -> None:
        """The result stands: nothing is left to go on with."""
        for path in self.path.parent.glob(".rows-*-of-*.safetensors"):
            path.unlink(missing_ok=True)
