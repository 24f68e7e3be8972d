"""`python -m diffusers_ddpm_ext`, the same as `ddpm-ext`: also behind `accelerate launch -m`."""

import sys

from diffusers_ddpm_ext.cli import main

if __name__ == "__main__":
    sys.exit(main())
