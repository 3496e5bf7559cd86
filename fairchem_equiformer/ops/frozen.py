"""Inference on weights that do not change: what is made of weights alone is made once.

That is the sums of SO(2) weights, the tables of the radial functions and the folded layers of the
grid MLP. They are kept only where somebody knows that the weights stay as they are: in a relaxation
and in an ``OCPCalculator`` (relaxation.py). Elsewhere each forward pass makes them anew, since
``parameter.data.copy_()``, as fairchem's moving average does it, leaves no trace to look for.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

T = TypeVar("T")

_made: ContextVar[dict[Hashable, Any] | None] = ContextVar("made", default=None)


class FrozenWeights:
    """What was made of the weights of one model.

    It is dropped if a parameter was replaced or changed in place, except through ``.data``.
    """

    def __init__(self) -> None:
        self._made: dict[Hashable, Any] = {}
        self._state: list[tuple[int, int]] = []

    @contextmanager
    def used_by(self, model: nn.Module) -> Iterator[None]:
        """Within, forward passes of the model use what they find and keep what they make."""
        state = [(p.data_ptr(), p._version) for p in model.parameters()]  # noqa: SLF001
        if state != self._state:
            self._made.clear()
            self._state = state
        token = _made.set(self._made)
        try:
            yield
        finally:
            _made.reset(token)


def once(make: Callable[[], T], name: str, dtype: torch.dtype, *weights: Tensor) -> T:
    """Return ``make()``, or with frozen weights what it returned before.

    Args:
        make: reads weights and nothing else.
        name: of what it makes.
        dtype: of the result.
        weights: parameters or parts of them, which tell layers apart.
    """
    made = _made.get()
    if made is None or torch.is_grad_enabled():
        return make()
    device = weights[0].device.type
    autocast = torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device)
    key = (name, dtype, autocast, *((w.data_ptr(), w.shape, w.stride()) for w in weights))
    if key not in made:
        made[key] = make()
    found: T = made[key]
    return found
