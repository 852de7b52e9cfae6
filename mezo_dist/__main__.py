"""`python -m mezo_dist` is the command `mezo-dist`, in the form that torchrun starts."""

import os
import select
import sys
from typing import NoReturn

from mezo_dist.cli import main

BROKEN_PIPE = 128 + 13
"""The status that a shell reports of a process that SIGPIPE has ended."""


def run() -> NoReturn:
    """Run the command, and end the process with its status.

    A rank that ends with an error is still connected to the others, for it cannot wait for them to leave together. If
    the interpreter took down the threads of these connections, that would abort the process now and then, and its
    status would be lost. So it ends at once, when all has been said.

    Where nobody reads the output any more (``mezo-dist train --help | head``), the process ends without a word, as
    others do; a run goes on with ``--output.if_exists=resume``.
    """
    try:
        status = _status()
        sys.stdout.flush()
    except BrokenPipeError:
        if not _is_unread(sys.stdout.fileno()):  # another pipe
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what is still to be flushed
        status = BROKEN_PIPE
    distributed = sys.modules.get("torch.distributed")
    if status and distributed is not None and distributed.is_initialized():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)


def _status() -> int:
    """That of the command; argparse and rich end the process in their own way."""
    try:
        return main()
    except SystemExit as end:
        if isinstance(end.code, str):
            raise
        return end.code or 0


def _is_unread(output: int) -> bool:
    """Whether a file descriptor is a pipe without a reader."""
    poll = select.poll()
    poll.register(output, 0)
    return any(event & select.POLLERR for _, event in poll.poll(0))


if __name__ == "__main__":
    run()
