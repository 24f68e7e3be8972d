"""Where things are in the repository, for tests in any folder."""

from __future__ import annotations

import os
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1]
ROOT = TESTS.parent
GOLDEN = TESTS / "golden"
PYTHONPATH = os.pathsep.join([str(ROOT), str(TESTS)])  # for another process that imports the package and helpers
