"""Inference on weights that do not change: what a module makes of its weights alone is made once.

That is the sums of SO(2) weights, the tables of the radial functions and the folded layers of the
grid MLP. They are kept only where somebody knows that the weights stay as they are, and says so by
:class:`FrozenWeights`: a relaxation, or a calculator. Elsewhere each forward pass makes them anew,
since ``parameter.data.copy_()``, as fairchem's moving average does it, leaves no trace to look for.

What is kept belongs to the ``FrozenWeights``, by the module that made it: modules, parameters and
checkpoints know nothing of it, and other models are not affected.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

T = TypeVar("T")

_Made = dict[nn.Module, dict[Hashable, Any]]

_in_use: ContextVar[_Made | None] = ContextVar("made of frozen weights", default=None)


class FrozenWeights:
    """What was made of the weights of one model.

    It is dropped if a parameter was replaced or changed in place, except through ``.data``. A copy,
    or what is unpickled, begins empty.
    """

    def __init__(self) -> None:
        self._made: _Made = {}
        self._state: list[tuple[int, int, int]] = []
        # As long as these live, no other tensor has their ids or their storages' addresses.
        self._seen: list[tuple[nn.Parameter, Tensor]] = []

    def __reduce__(self) -> tuple[type[FrozenWeights], tuple[()]]:
        return FrozenWeights, ()

    @contextmanager
    def used_by(self, model: nn.Module) -> Iterator[None]:
        """Within, forward passes of this model use what they find and keep what they make."""
        parameters = list(model.parameters())
        state = [(id(p), p.data_ptr(), p._version) for p in parameters]  # noqa: SLF001
        if state != self._state:
            self._made = {module: {} for module in model.modules()}
            self._seen = [(p, p.detach()) for p in parameters]
            self._state = state
        token = _in_use.set(self._made)
        try:
            yield
        finally:
            _in_use.reset(token)


def kept(module: nn.Module, name: str, dtype: torch.dtype, make: Callable[[], T]) -> T | None:
    """What ``make()`` returned when it was first called; None where the weights may change.

    Args:
        module: whose weights ``make`` reads, and nothing else.
        name: of what it makes, among what this module makes.
        dtype: of the result.
        make: is called without gradients.
    """
    made = (_in_use.get() or {}).get(module)
    if made is None or torch.is_grad_enabled():
        return None
    device = next(module.parameters()).device.type
    autocast = torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device)
    key = (name, dtype, autocast)
    if key not in made:
        made[key] = make()
    found: T = made[key]
    return found


def once(module: nn.Module, name: str, dtype: torch.dtype, make: Callable[[], T]) -> T:
    """As :func:`kept`, and ``make()`` where the weights may change."""
    found = kept(module, name, dtype, make)
    return make() if found is None else found
