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
from torch import nn

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
        self._model: nn.Module | None = None
        self._state: list[int] = []
        # Of all modules. Walking through them anew would take half a millisecond at each call.
        self._parts: list[dict[str, nn.Module | None]] = []
        self._parameters: list[dict[str, nn.Parameter | None]] = []
        # As long as these live, no other object has their ids or their storages' addresses.
        self._seen: list[object] = []

    def __reduce__(self) -> tuple[type[FrozenWeights], tuple[()]]:
        return FrozenWeights, ()

    @contextmanager
    def used_by(self, model: nn.Module) -> Iterator[None]:
        """Within, forward passes of this model use what they find and keep what they make."""
        if model is not self._model or self._state_now() != self._state:
            self._look_at(model)
        token = _in_use.set(self._made)
        try:
            yield
        finally:
            _in_use.reset(token)

    def _look_at(self, model: nn.Module) -> None:
        """Begin anew, on the weights as they are."""
        modules = list(model.modules())
        self._model = model
        self._made = {module: {} for module in modules}
        self._parts = [module._modules for module in modules]  # noqa: SLF001
        self._parameters = [module._parameters for module in modules]  # noqa: SLF001
        parameters = list(model.parameters())
        self._seen = [*modules, *parameters, *(p.detach() for p in parameters)]
        self._state = self._state_now()

    def _state_now(self) -> list[int]:
        """Which modules and parameters there are, and where and how often changed these are."""
        state = [id(part) for parts in self._parts for part in parts.values()]
        for parameters in self._parameters:
            for p in parameters.values():
                if p is not None:
                    state += (id(p), p.data_ptr(), p._version)  # noqa: SLF001
        return state


def kept(module: nn.Module, name: str, dtype: torch.dtype, make: Callable[[], T]) -> T | None:
    """What ``make()`` returned when it was first called; None where the weights may change.

    Args:
        module: whose weights ``make`` reads, and nothing else.
        name: of what it makes, among what this module makes.
        dtype: of the result.
        make: is called without gradients.
    """
    if torch.compiler.is_compiling():  # a graph that outlives the weights must not hold them
        return None
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
