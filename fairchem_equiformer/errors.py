"""Errors that are the user's to mend."""


class InputError(Exception):
    """Input that a command cannot start with. The message is one line, written for the user."""
