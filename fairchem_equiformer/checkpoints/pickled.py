"""Pickles that hold plain data, read without calling what else they may ask for."""

from __future__ import annotations

import collections
import io
import pickle
from pathlib import Path
from typing import Any

from fairchem_equiformer.checkpoints import reading
from fairchem_equiformer.errors import InputError

# Beside what pickles write without a name: None, numbers, text, lists, tuples and dicts.
_PLAIN = {
    ("builtins", "set"): set,
    ("__builtin__", "set"): set,  # protocols before 3
    ("builtins", "frozenset"): frozenset,
    ("__builtin__", "frozenset"): frozenset,
    ("collections", "OrderedDict"): collections.OrderedDict,
}


class _Plain(pickle.Unpickler):
    """Python's reader, which finds the names above and numbers of NumPy, and no others."""

    def find_class(self, module: str, name: str) -> Any:
        known = _PLAIN | {(one.__module__, one.__name__): one for one in reading.ALLOWED}
        if (module, name) not in known:
            raise pickle.UnpicklingError(
                f"asks for {module}.{name}, which plain data do not need: refused; read it with "
                "trusted=True (commands: --trusted) if you trust where it comes from"
            )
        return known[module, name]


def loads(content: bytes) -> Any:
    """What a pickle holds: plain data.

    Raises:
        pickle.UnpicklingError: if it asks for any other class or function; names it.
    """
    return _Plain(io.BytesIO(content)).load()


def read_pickle(path: Path, *, trusted: bool = False) -> Any:
    """What a file holds: plain data, or anything if it is trusted.

    Args:
        path: the file.
        trusted: call whatever the file asks for. Only for files from someone whose program you
            would run.

    Raises:
        InputError: if it cannot be read, or asks for what plain data do not need.
    """
    try:
        content = path.read_bytes()
        return pickle.loads(content) if trusted else loads(content)  # noqa: S301  # if trusted
    except Exception as error:  # damaged pickles raise anything
        reason = " ".join(str(error).split()) or type(error).__name__
        raise InputError(f"{path}: cannot be read ({reason})") from error
