"""Set before any test imports torch: one thread each, since the tests run in two processes (see pyproject.toml)."""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # threads that wait for each other sleep
os.environ.setdefault("OMP_NUM_THREADS", "1")
