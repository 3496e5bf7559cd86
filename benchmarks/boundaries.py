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
