"""Set before any test imports torch: threads that wait for each other sleep, as the command line has it too."""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
