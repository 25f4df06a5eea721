"""The one exception type for what a user can put right. The commands print it as one line and exit
with status 1.
"""


class FiddlerError(Exception):
    """A mistake or a condition outside the program. The message, one line, says where, what, and
    how to fix it.
    """

    def __init__(self, message: str):
        super().__init__(" ".join(message.splitlines()))
