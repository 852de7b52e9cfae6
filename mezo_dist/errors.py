"""Errors meant for the person at the keyboard, as opposed to bugs of ours, and how text from files is shown to them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator


class UserError(ValueError):
    """Something the user can mend. The message says what is wrong, where (setting or file), and how to fix it.

    The command line prints the message without a traceback and exits with `exit_status`; any other exception is a bug
    and keeps its traceback.
    """

    exit_status = 2
    """Starting the same again cannot help. Launchers may retry on others."""


class LostRankError(Exception):
    """Another rank stopped, or did not answer in time. What is wrong is in that rank's own message.

    It is no `UserError`, so that whoever explains those (a snapshot or an export that failed) lets it pass: it ends
    this rank, too. The command line prints the message without a traceback.
    """

    exit_status = 75
    """A temporary failure (sysexits.h): starting again, with output.if_exists=resume, goes on where the run was."""


class Stopped(BaseException):
    """The run was asked to stop and did, with everything on disk. The command line exits with ``status``.

    Like `KeyboardInterrupt`, it can come while any code runs, and no ``except Exception`` may take it for that code's
    fault.
    """

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


@contextlib.contextmanager
def needs(package: str, what: str) -> Iterator[None]:
    """Context manager around the imports of something that may not be installed.

    Args:
        package: what pip installs, with an extra perhaps: ``mezo_dist[peft]``.
        what: the setting, or the thing, that cannot do without it.

    Raises:
        UserError: it cannot be imported; the message has the command that installs it.
    """
    try:
        yield
    except ImportError as error:
        raise UserError(f"{what}: not installed, or broken ({error}): pip install '{package}'") from error


def printable(text: str, keep: str = "") -> str:
    r"""The text with an escape, such as ``\x1b``, in place of every character that is not visible.

    Names in a foreign file may hold control sequences that clear the screen, retitle the terminal or forge a line of
    output. All that is shown and comes from a file passes through here.

    Args:
        text: what is to be shown.
        keep: characters that are left as they are all the same, such as a newline in a text of several lines.
    """
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c in keep else c.encode("unicode_escape").decode() for c in text)
