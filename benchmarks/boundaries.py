"""The functions of this package that benchmarks look into, wrapped from outside.

The package has no hooks for it. A function is named by its module, or by a class in it, and by the
name under which its callers find it; :func:`wrapped` puts another in its place for a while.
"""

from __future__ import annotations

import sys
from contextlib import ExitStack, contextmanager
from inspect import getattr_static
from typing import TYPE_CHECKING, Any, NamedTuple
from unittest import mock

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

PACKAGE = "fairchem_equiformer"


class Boundary(NamedTuple):
    """A function: ``owner`` is a module below the package, ``module`` or ``module:Class``."""

    owner: str
    name: str


def find(boundary: Boundary) -> Any | None:
    """Return the module or class that has the function; None where nobody has imported it."""
    module, _, name = boundary.owner.partition(":")
    owner = sys.modules.get(f"{PACKAGE}.{module}")
    if owner is not None and name:
        owner = getattr(owner, name, None)
    return owner if hasattr(owner, boundary.name) else None


@contextmanager
def wrapped(
    boundaries: Sequence[Boundary], wrap: Callable[[Boundary, Callable[..., Any]], Any]
) -> Iterator[None]:
    """Replace each function that is there by what ``wrap`` makes of it.

    Those of another version of the package may be missing, and those of a process that measures
    another model all are.
    """
    with ExitStack() as stack:
        for boundary in boundaries:
            owner = find(boundary)
            if owner is not None:
                replacement = wrap(boundary, getattr(owner, boundary.name))
                # In a class, so that neither it nor its first argument is bound once more.
                if isinstance(owner, type) and not _is_method(owner, boundary.name):
                    replacement = staticmethod(replacement)
                stack.enter_context(mock.patch.object(owner, boundary.name, replacement))
        yield


def _is_method(owner: type, name: str) -> bool:
    """Whether a class has a function that takes an instance."""
    return not isinstance(getattr_static(owner, name), (classmethod, staticmethod))


class SO2Layers:
    """Which of an attention layer's two SO(2) layers some weights belong to, and their size."""

    MADE = Boundary("ops.edge_attention:_Convolutions", "of")

    def __init__(self) -> None:
        self._known: dict[int, tuple[str, int]] = {}
        self._alive: list[Any] = []  # so that no address comes again

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Within, look at all weights that are made."""
        with wrapped([self.MADE], self._watch):
            yield

    def _watch(self, _: Boundary, make: Callable[..., Any]) -> Callable[..., Any]:
        def watched(weights: Any, *arguments: Any, **keywords: Any) -> Any:
            made = make(weights, *arguments, **keywords)
            self._alive.append(made)
            layers = {"1": (made.first, weights.conv_1), "2": (made.second, weights.conv_2)}
            for name, (layer, (zero, *orders)) in layers.items():
                # Of m > 0 (A over B), of which complex products make three.
                products = zero.numel() + sum(3 * order.numel() // 2 for order in orders)
                self._known[id(layer)] = name, products
            return made

        return watched

    def of(self, arguments: Sequence[Any]) -> tuple[str, int]:
        """Return the layer ("1", "2", or "" if unknown) whose weights are among the arguments.

        And the multiplications that an edge takes.
        """
        return next((self._known[id(a)] for a in arguments if id(a) in self._known), ("", 0))
