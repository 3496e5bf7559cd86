"""A CUDA graph on a CPU: operations run once more on the tensors they were recorded with."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

if TYPE_CHECKING:
    from collections.abc import Callable


class Tape(TorchDispatchMode):
    """Remembers every operation on tensors, with the tensors themselves.

    Python does not run again in a replay: sizes, branches and numbers stay as they were recorded.
    What would make the host wait for numbers of a GPU raises, as it does in the midst of a capture.
    """

    def __init__(self):
        super().__init__()
        self._operations = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = str(func)
        if name.split(".")[1] in ("_local_scalar_dense", "nonzero", "equal", "unique_consecutive"):
            raise RuntimeError(f"operation not permitted when stream is capturing: {name}")
        out = func(*args, **(kwargs or {}))
        self._operations.append((func, args, kwargs or {}, out))
        return out

    @torch.autocast("cpu", enabled=False)  # casts are on the tape
    def replay(self):
        for func, args, kwargs, out in self._operations:
            if is_view(func):
                continue
            again = func(*args, **kwargs)
            for old, new in zip(tensors(out), tensors(again), strict=True):
                if old is not new:
                    old.copy_(new)


def is_view(func):
    """Whether the result is the argument's memory, not written to."""
    aliases = [returned.alias_info for returned in func._schema.returns]
    return any(alias is not None and not alias.is_write for alias in aliases)


def tensors(tree):
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


def record_tape(function: Callable):
    """A recorder as nn/replay.py takes one."""
    function()
    with Tape() as tape:
        results = function()
    return tape.replay, results
