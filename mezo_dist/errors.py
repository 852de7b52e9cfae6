"""Errors meant for the person at the keyboard, as opposed to bugs of ours."""


class UserError(ValueError):
    """Something the user can mend. The message says what is wrong, where (setting or file), and how to fix it.

    The command line prints the message without a traceback and exits with `exit_status`; any other exception is a bug
    and keeps its traceback.
    """

    exit_status = 2
    """Starting the same again cannot help. Launchers may retry on others."""


class Stopped(Exception):
    """The run was asked to stop and did, with everything on disk. The command line exits with ``status``."""

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status
