"""Errors that are the user's to mend."""


class InputError(Exception):
    """Input that a command cannot start with. The message is one line, written for the user."""


class StructureError(ValueError, AssertionError):
    """A batch of structures that the model cannot work with; the message names which, and where.

    An AssertionError, too, since fairchem's own models check atomic numbers by assertion: who
    handles theirs handles ours.
    """
