"""`python -m mezo_dist.assets` lists and fetches demo models and data."""

import sys

from mezo_dist.assets.registry import main

if __name__ == "__main__":
    sys.exit(main())
