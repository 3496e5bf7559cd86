"""Reading a checkpoint without running what is in it.

A checkpoint is a pickle, which may name any function of the machine and have it called. PyTorch's
restricted reader (``weights_only=True``) knows tensors and the plain types of Python. That is all
that fairchem-core 1.10 writes: configs are dicts, normalisers and element references are dicts of
tensors. Older releases also left numbers of NumPy among the metrics; these become numbers of Python
here, whatever NumPy is installed.
"""

from __future__ import annotations

import pickletools
import re
import threading
import zipfile
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import serialization

from fairchem_equiformer.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Iterator

_NUMBER = re.compile(r"[biuf][1248]")  # kind and bytes of a NumPy dtype
_REFUSED = re.compile(r"GLOBAL (\S+)")  # in PyTorch's message
_LOCK = threading.Lock()  # the classes that PyTorch allows are a list of the process


class CheckpointError(InputError):
    """A checkpoint that cannot be used. The message is one line, written for the user."""


class _Dtype:
    """Stands for ``numpy.dtype`` of a number, as pickles make it: name first, byte order later."""

    def __init__(self, name: str, *_: bool) -> None:
        if not _NUMBER.fullmatch(name):
            raise ValueError(f"a NumPy value of dtype {name!r}, which is no number")
        self.name = name

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        order = state[1]
        self.name = f"{'<' if order == '|' else order}{self.name}"


def _number(dtype: _Dtype, content: bytes) -> Any:
    return np.frombuffer(content, np.dtype(dtype.name))[0].item()


def _encode(text: str, encoding: str) -> bytes:
    return text.encode(encoding)


def _known_as(stand_in: Any, module: str, name: str) -> Any:
    """A stand-in under the name that a pickle asks for.

    PyTorch goes by these attributes, before 2.5 by these alone.
    """
    copy: Any = type(name, (stand_in,), {}) if isinstance(stand_in, type) else partial(stand_in)
    copy.__module__, copy.__name__, copy.__qualname__ = module, name, name
    return copy


# NumPy's modules were renamed in NumPy 2.
ALLOWED = [
    _known_as(_Dtype, "numpy", "dtype"),
    _known_as(_number, "numpy.core.multiarray", "scalar"),
    _known_as(_number, "numpy._core.multiarray", "scalar"),
    _known_as(_encode, "_codecs", "encode"),
]


@contextmanager
def _allowed(*classes: type) -> Iterator[None]:
    """Within, PyTorch's restricted reader takes these, the stand-ins, and nothing else."""
    with _LOCK:
        before = list(serialization.get_safe_globals())
        serialization.clear_safe_globals()
        serialization.add_safe_globals([*ALLOWED, *classes])
        try:
            yield
        finally:
            serialization.clear_safe_globals()
            serialization.add_safe_globals(before)


def read(path: str | Path, *, trusted: bool = False, mapped: bool = False) -> dict[str, Any]:
    """What a checkpoint holds, on the CPU.

    Args:
        path: the file.
        trusted: call whatever the file asks for, as ``torch.load(weights_only=False)`` does. Only
            for files from someone whose program you would run.
        mapped: leave tensors on disk until they are looked at, where the file's form allows it.

    Raises:
        CheckpointError: if there is no such file, it is no checkpoint, or it asks for a class or
            function other than those that checkpoints of fairchem need; names it.
    """
    content = read_object(path, trusted=trusted, mapped=mapped)
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: it holds {type(content).__name__}, not a checkpoint's dict")
    return content


def read_object(
    path: str | Path, *classes: type, trusted: bool = False, mapped: bool = False
) -> Any:
    """What a file of ``torch.save`` holds, on the CPU.

    Args:
        path: the file.
        classes: that it may ask for, and whose instances have no code of their own to run.
        trusted: see `read`.
        mapped: see `read`.

    Raises:
        CheckpointError: as `read`.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file (looked from {Path.cwd()})")
    try:
        # Old releases of torch wrote another format, which can be read but not mapped.
        mapped = mapped and zipfile.is_zipfile(path)
        if trusted:
            return torch.load(path, map_location="cpu", weights_only=False, mmap=mapped)
        with _allowed(*classes):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except Exception as error:
        raise CheckpointError(f"{path}: {_reason(path, error, trusted=trusted)}") from error


def _reason(path: Path, error: Exception, *, trusted: bool) -> str:
    """What is wrong with a file, without PyTorch's advice to read it unsafely."""
    text = " ".join(str(error).split())
    if not trusted:
        asked = _REFUSED.findall(text) or [name for name in _asked_for(path) if _is_foreign(name)]
        if asked:
            return (
                f"asks for {asked[0]}, which no checkpoint of fairchem needs: refused; if you trust"
                " where it comes from, read it with trusted=True (commands: --trusted,"
                " fairchem: --task.trusted=True)"
            )
        text = text.partition("WeightsUnpickler error: ")[2] or text
        text = text.partition(" Check the documentation")[0]
    return f"cannot be read ({text or type(error).__name__})"


def _is_foreign(name: str) -> bool:
    allowed = {f"{one.__module__}.{one.__name__}" for one in ALLOWED}
    return not name.startswith(("torch.", "collections.")) and name not in allowed


def _asked_for(path: Path) -> list[str]:
    """Names in a file's pickle, nothing of which is run; as far as it can be parsed."""
    found: list[str] = []
    with suppress(Exception):
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                (name,) = [name for name in archive.namelist() if name.endswith("data.pkl")]
                _collect(archive.read(name), found)
        else:
            _collect(path.read_bytes(), found)
    return found


def _collect(pickled: bytes, found: list[str]) -> None:
    strings, memo = [""], [""]  # pushed last; remembered, in the order in which they were
    for operation, argument, _ in pickletools.genops(pickled):
        if operation.name in ("GLOBAL", "INST"):
            found.append(str(argument).replace(" ", "."))
        elif operation.name == "STACK_GLOBAL":
            found.append(".".join(strings[-2:]))
        elif operation.name == "MEMOIZE":
            memo.append(strings[-1])
        elif operation.name in ("BINGET", "LONG_BINGET") and isinstance(argument, int):
            strings.append(memo[argument + 1] if argument + 1 < len(memo) else "")
        elif isinstance(argument, str):
            strings.append(argument)
