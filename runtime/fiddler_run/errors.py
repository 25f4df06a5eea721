"""The one exception type for what a user can put right. The commands print it as one line and exit with status 1."""


class FiddlerError(Exception):
    """A mistake or a condition outside the program. The message says where, what, and how to fix it."""


def first_line(error: Exception) -> str:
    """Of what an error of another library says; its type, if that is nothing."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
