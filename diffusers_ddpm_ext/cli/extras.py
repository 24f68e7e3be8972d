"""Optional packages that commands need, and the message where one is missing."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.util import find_spec

from diffusers_ddpm_ext.errors import ConfigError

INSTALL_EXTRA = "pip install diffusers-ddpm-ext[{extra}]"
TRAIN_MODULES = {"accelerate": "accelerate", "matplotlib": "matplotlib", "yaml": "PyYAML"}
"""Module -> distribution: what every training run needs in addition to the base install."""


def require_modules(modules: Mapping[str, str], extra: str = "train") -> None:
    """Check that modules are installed, without importing them.

    Args:
        modules: name of the module -> name of its distribution.
        extra: of diffusers-ddpm-ext that installs them.

    Raises:
        ConfigError: one or more are missing; the message names the extra that brings them.
    """
    missing = [distribution for module, distribution in modules.items() if find_spec(module) is None]
    if missing:
        raise ConfigError(f"this command needs {', '.join(missing)}: {INSTALL_EXTRA.format(extra=extra)}")
