"""Errors meant for the person at the keyboard, as opposed to bugs of ours."""


class UserError(ValueError):
    """Something the user can mend. The message says what is wrong, where (setting or file), and how to fix it.

    The command line prints the message without a traceback and exits with status 2; any other exception is a bug
    and keeps its traceback.
    """
