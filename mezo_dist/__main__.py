"""`python -m mezo_dist` is the command `mezo-dist`, in the form that torchrun starts."""

import os
import sys
from typing import NoReturn

from mezo_dist.cli import main


def run() -> NoReturn:
    """Run the command, and end the process with its status.

    A rank that ends with an error is still connected to the others, for it cannot wait for them to leave together. If
    the interpreter took down the threads of these connections, that would abort the process now and then, and its
    status would be lost. So it ends at once, when all has been said.
    """
    status = main()
    distributed = sys.modules.get("torch.distributed")
    if status and distributed is not None and distributed.is_initialized():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)


if __name__ == "__main__":
    run()
