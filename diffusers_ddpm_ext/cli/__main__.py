"""`python -m diffusers_ddpm_ext.cli`, the same as `ddpm-ext`."""

import sys

from diffusers_ddpm_ext.cli.dispatch import main

if __name__ == "__main__":
    sys.exit(main())
