"""Errors that are the user's to mend."""


class InputError(Exception):
    """Input that a command cannot start with. The message is one line, written for the user."""


class StructureError(ValueError, AssertionError):
    """A batch of structures that the model cannot work with; the message names which, and where.

    An AssertionError, too, since fairchem's own models check atomic numbers by assertion: who
    handles theirs handles ours.
    """


class StoppedError(Exception):
    """A run that cannot go on. The message is one line, written for the user.

    Attributes:
        status: with which the process ends.
    """

    def __init__(self, message: str, status: int = 1) -> None:
        super().__init__(message)
        self.status = status
