"""Sizes of the published models' blocks."""

from __future__ import annotations

from dataclasses import dataclass

from fairchem_equiformer.so3.layout import Layout, layout


@dataclass(frozen=True)
class Sizes:
    """Of a published model's attention and feed-forward network."""

    name: str
    lmax: int
    mmax: int
    blocks: int
    channels: int = 128
    hidden: int = 64
    heads: int = 8
    alpha_channels: int = 64
    value_channels: int = 16
    ffn_hidden: int = 128
    resolution: int = 18

    @property
    def layout(self) -> Layout:
        """Of the edge frame."""
        return layout(self.lmax, self.mmax)

    @property
    def entries(self) -> int:
        """Numbers of a compact rotation."""
        return sum(2 * degree + 1 for degree, _ in self.layout.m_major)

    @property
    def weights(self) -> int:
        """Radial weights of an edge and channel."""
        return sum(self.layout.num_degrees(m) for m in range(self.mmax + 1))


SIZES = {
    "31M": Sizes("31M", 4, 2, 8),
    "83M": Sizes("83M", 6, 2, 12),
    "153M": Sizes("153M", 6, 3, 20),
}
