"""Paths of a channel-wise ("depth-wise") tensor product of irreps, and their coupling coefficients.

A path takes irrep a of the features, irrep b of an edge's harmonics and makes one irrep c of each
channel of a. Degrees obey |a - b| <= c <= a + b, and the parity of c is the product of the two.
Conventions are those of e3nn, with ``irrep_normalization="component"`` and
``path_normalization="none"``: a path's coefficients are sqrt(2 l_c + 1) times Wigner's 3j symbols.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cache
from typing import NamedTuple

import torch
from e3nn import o3
from torch import Tensor

from fairchem_equiformer.so3.irreps import Place, places

MAX_DEGREE = 11  # e3nn has harmonics to this degree


class Path(NamedTuple):
    """One path, by positions among the irreps of features, harmonics and result."""

    feature: int
    harmonic: int
    out: int
    channel: int  # its first one among those of the result's irrep


@dataclass(frozen=True)
class DepthwisePaths:
    """All paths of one product; made by :func:`depthwise_paths`.

    Weights stand path by path, one for each channel. Irreps of the result are sorted by degree,
    even ones first; each stands there once, with the channels of its paths one after the other.
    """

    irreps_in: o3.Irreps
    irreps_sh: o3.Irreps  # of one channel each
    irreps_out: o3.Irreps
    paths: tuple[Path, ...]
    names: tuple[str, str, str]  # of the irreps
    weight_slices: tuple[slice, ...] = field(compare=False)  # of each path
    coupling_slices: tuple[slice, ...] = field(compare=False)  # columns of couplings()
    places_in: tuple[Place, ...] = field(compare=False)
    places_sh: tuple[Place, ...] = field(compare=False)
    places_out: tuple[Place, ...] = field(compare=False)

    @property
    def weight_numel(self) -> int:
        """Number of weights: one for each path and channel."""
        return self.weight_slices[-1].stop if self.paths else 0

    def couplings(self, dtype: torch.dtype, device: torch.device) -> Tensor:
        """What the harmonics are multiplied with to give each path's matrix.

        Returns:
            [irreps_sh.dim, sum over paths of dim_c dim_a]; a path's columns are its matrix
            [dim_c, dim_a], row by row.
        """
        return _couplings(self, dtype, device)


def _slices(sizes: Iterable[int]) -> tuple[slice, ...]:
    found, start = [], 0
    for size in sizes:
        found.append(slice(start, start + size))
        start += size
    return tuple(found)


@cache
def depthwise_paths(
    irreps_in: o3.Irreps, irreps_sh: o3.Irreps, irreps_wanted: o3.Irreps
) -> DepthwisePaths:
    """Every path from features and harmonics to one of the wanted irreps, or to invariants.

    Args:
        irreps_in: of the features.
        irreps_sh: of the harmonics, one channel of each.
        irreps_wanted: which irreps are wanted; their numbers of channels do not matter. 0e always
            is: invariants are what attention and gates are made of.

    Raises:
        ValueError: if harmonics have several channels.
    """
    for mul, ir in irreps_sh:
        if mul != 1:
            raise ValueError(f"harmonics are {irreps_sh}: of {ir} there must be one channel")
    found = [
        (a, b, mul, ir)
        for a, (mul, ir_in) in enumerate(irreps_in)
        for b, (_, ir_sh) in enumerate(irreps_sh)
        for ir in ir_in * ir_sh
        if ir in irreps_wanted or ir == o3.Irrep(0, 1)
    ]
    order = sorted({ir for *_, ir in found}, key=lambda ir: (ir.l, -ir.p))
    channels = dict.fromkeys(order, 0)
    paths = []
    for a, b, mul, ir in found:
        paths.append(Path(a, b, order.index(ir), channels[ir]))
        channels[ir] += mul
    irreps_out = o3.Irreps([(channels[ir], ir) for ir in order])
    read = [irreps_in[path.feature] for path in paths]
    return DepthwisePaths(
        irreps_in,
        irreps_sh,
        irreps_out,
        tuple(paths),
        names=(str(irreps_in), str(irreps_sh), str(irreps_out)),
        weight_slices=_slices(mul for mul, _ in read),
        coupling_slices=_slices(
            ir.dim * irreps_out[path.out].ir.dim for (_, ir), path in zip(read, paths, strict=True)
        ),
        places_in=places(irreps_in),
        places_sh=places(irreps_sh),
        places_out=places(irreps_out),
    )


@cache
def _couplings(paths: DepthwisePaths, dtype: torch.dtype, device: torch.device) -> Tensor:
    harmonics = paths.irreps_sh.slices()
    width = paths.coupling_slices[-1].stop if paths.paths else 0
    with torch.inference_mode(mode=False):  # it outlives the mode that it is made in
        table = torch.zeros(paths.irreps_sh.dim, width, dtype=torch.float64)
        for path, columns in zip(paths.paths, paths.coupling_slices, strict=True):
            irreps = (
                paths.irreps_in[path.feature].ir,
                paths.irreps_sh[path.harmonic].ir,
                paths.irreps_out[path.out].ir,
            )
            symbols = o3.wigner_3j(*(ir.l for ir in irreps), dtype=torch.float64)  # [a, b, c]
            block = symbols.permute(1, 2, 0).flatten(1) * irreps[2].dim ** 0.5
            table[harmonics[path.harmonic], columns] = block
        return table.to(dtype=dtype, device=device)
