"""`python -m mezo_dist` is the command `mezo-dist`, in the form that torchrun starts."""

import sys

from mezo_dist.cli import main

if __name__ == "__main__":
    sys.exit(main())
