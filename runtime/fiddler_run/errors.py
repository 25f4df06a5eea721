"""The exception type for user errors. The commands print it in one line and exit with status 1."""


class FiddlerError(Exception):
    """A user error, or a condition outside the program.

    The message is one line. It says where, what, and how to fix it.
    """

    def __init__(self, message: str):
        super().__init__(" ".join(message.splitlines()))
