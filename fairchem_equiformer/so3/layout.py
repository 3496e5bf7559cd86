"""The one definition of how spherical-harmonic coefficients are ordered.

Conventions are those of e3nn: real harmonics about the y axis, l = 1 ordered (x, y, z).

*l-major*: node features. Coefficient (l, m) with -l <= m <= l sits at ``l**2 + l + m``.

*m-major*: edge features in the edge-aligned frame, truncated at abs(m) <= mmax. First m = 0 for
l = 0..lmax; then, for each m = 1..mmax, +m for l = m..lmax followed by -m for l = m..lmax.
An SO(2) linear layer mixes within one m, so each of its operands is a contiguous slice.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache, cached_property


@dataclass(frozen=True)
class Layout:
    """Coefficient order for degrees ``lmin..lmax`` and orders ``|m| <= mmax``.

    ``lmin > 0`` describes features of which only some degrees are needed, such as the l = 1 output
    of a force head.

    Raises:
        ValueError: unless 0 <= lmin <= lmax and 0 <= mmax <= lmax.
    """

    lmax: int
    mmax: int
    lmin: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.lmin <= self.lmax:
            msg = f"degrees must satisfy 0 <= lmin <= lmax, got {self.lmin} and {self.lmax}"
            raise ValueError(msg)
        if not 0 <= self.mmax <= self.lmax:
            msg = f"mmax must be between 0 and lmax = {self.lmax}, got mmax = {self.mmax}"
            raise ValueError(msg)

    def num_degrees(self, m: int) -> int:
        """Number of degrees that have order ``m``."""
        return self.lmax + 1 - max(m, self.lmin)

    @cached_property
    def m_major(self) -> tuple[tuple[int, int], ...]:
        """(l, m) of each row, in m-major order."""
        rows = []
        for order in range(self.mmax + 1):
            for m in (order, -order) if order else (0,):
                rows += [(degree, m) for degree in range(max(order, self.lmin), self.lmax + 1)]
        return tuple(rows)

    @property
    def num_rows(self) -> int:
        """Number of m-major rows."""
        return len(self.m_major)

    @cached_property
    def order_slices(self) -> tuple[slice, ...]:
        """Rows of each order m = 0..mmax; for m > 0 the +m rows come first, then the -m rows."""
        slices = []
        start = 0
        for m in range(self.mmax + 1):
            stop = start + self.num_degrees(m) * (2 if m else 1)
            slices.append(slice(start, stop))
            start = stop
        return tuple(slices)

    @property
    def num_coefficients(self) -> int:
        """Number of l-major coefficients, all orders included."""
        return (self.lmax + 1) ** 2 - self.lmin**2

    @cached_property
    def l_major(self) -> tuple[tuple[int, int], ...]:
        """(l, m) of each coefficient, in l-major order."""
        degrees = range(self.lmin, self.lmax + 1)
        return tuple((degree, m) for degree in degrees for m in range(-degree, degree + 1))

    @cached_property
    def rows_in_l_major(self) -> tuple[int, ...]:
        """Position in the l-major order of each m-major row."""
        return tuple(degree**2 + degree + m - self.lmin**2 for degree, m in self.m_major)

    @cached_property
    def truncation_rescale(self) -> tuple[float, ...]:
        """Factor per l-major coefficient that makes up for the orders |m| > mmax left out.

        sqrt((2l + 1) / (2 mmax + 1)) for l > mmax, else 1 (eSCN, Passaro & Zitnick 2023).
        """
        kept = 2 * self.mmax + 1
        return tuple(max(1.0, (2 * degree + 1) / kept) ** 0.5 for degree, _ in self.l_major)


@cache
def layout(lmax: int, mmax: int, lmin: int = 0) -> Layout:
    """Cached :class:`Layout`."""
    return Layout(lmax, mmax, lmin)


def degree_slices(lmax: int) -> tuple[slice, ...]:
    """l-major slice of each degree 0..lmax."""
    return tuple(slice(degree**2, (degree + 1) ** 2) for degree in range(lmax + 1))
