"""Second-rank tensors from node features and edges: fairchem's ``rank2_symmetric_head``.

For an edge from j to i with vector r, and Y(r) its solid harmonics, normalised:

    e_ij = LN( sum over (l, m) of Norm(Y(r))_lm (x_j, x_i)_lm )

Each component T of the tensor is the mean over an atom's edges of T(r) e_ij, and a multi-layer
perceptron on the channels, which may also come before the mean. The components are

- isotropic: 1, and anisotropic: the five harmonics of degree 2 (``decompose``);
- or the nine products of r with itself.

As in fairchem, non-linearity and bias act on each component by itself: with more than one layer,
only the isotropic part turns exactly with the structure.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from fairchem_equiformer.nn.norm import NORMS
from fairchem_equiformer.nn.recompute import recomputed
from fairchem_equiformer.ops.harmonics import spherical_harmonics
from fairchem_equiformer.ops.segments import Chunk, in_single, segment_sum, take

if TYPE_CHECKING:
    from fairchem_equiformer.ops.edges import Edges

_NO_ATOMS = Chunk(slice(0, 0), slice(0, 0), slice(0, 0))


class _Components(nn.Module):
    """The perceptrons, under fairchem's names."""

    def __init__(self, channels: int, num_layers: int, *, decompose: bool) -> None:
        super().__init__()
        self.decompose = decompose
        if decompose:
            self.scalar_MLP = _perceptron(channels, num_layers)
            self.irrep2_MLP = _perceptron(channels, num_layers)
        else:
            self.r2tensor_MLP = _perceptron(channels, num_layers)

    def forward(self, vector: Tensor) -> list[tuple[Tensor, nn.Module]]:
        """Components of each edge [E, T] and the perceptron they go through."""
        if self.decompose:
            harmonics = spherical_harmonics([2], vector, normalize=True)
            ones = torch.ones_like(vector[:, :1])
            return [(ones, self.scalar_MLP), (harmonics, self.irrep2_MLP)]
        products = vector[:, :, None] * vector[:, None]
        return [(products.flatten(1), self.r2tensor_MLP)]


def _perceptron(channels: int, num_layers: int) -> nn.Sequential:
    hidden = [nn.Linear(channels, channels) for _ in range(num_layers - 1)]
    layers = [layer for linear in hidden for layer in (linear, nn.SiLU())]
    return nn.Sequential(*layers, nn.Linear(channels, 1))


class Rank2Readout(nn.Module):
    """Components of a second-rank tensor for each atom.

    Args:
        lmax: of the node features.
        channels: of the node features.
        norm_type: key of :data:`~fairchem_equiformer.nn.norm.NORMS`, for the harmonics.
        decompose: isotropic and anisotropic part instead of nine products.
        edge_level: perceptron on edges, before the mean over an atom's edges.
        num_layers: of the perceptron.
        both_ends: read the features of both atoms of an edge, not the target's alone.
    """

    def __init__(
        self,
        lmax: int,
        channels: int,
        norm_type: str,
        *,
        decompose: bool,
        edge_level: bool,
        num_layers: int,
        both_ends: bool,
    ) -> None:
        super().__init__()
        self.degrees = list(range(lmax + 1))
        self.edge_level = edge_level
        self.both_ends = both_ends
        width = 2 * channels if both_ends else channels
        self.sphharm_norm = NORMS[norm_type](lmax, 1)
        self.xedge_layer_norm = nn.LayerNorm(width)
        self.block = _Components(width, num_layers, decompose=decompose)

    def components(self, x: Tensor, edges: Edges) -> list[Tensor]:
        """One tensor [rows, T] for each perceptron, T its components; zero without edges.

        Args:
            x: [N, (lmax + 1)^2, C] features of all atoms.
            edges: sorted by target.
        """
        keep = torch.is_grad_enabled() and x.requires_grad
        vector = edges.vector.to(x.dtype)
        if edges.chunk_table is not None:  # a compiler decides what is kept
            ends = edges.source, edges.target
            return self._of_edges(x, vector, ends, edges.first_row, edges.target_ptr.diff())
        chunks = []
        for chunk in edges.chunks or (_NO_ATOMS,):
            if keep:  # of a chunk's edges nothing is kept for the backward pass
                part = recomputed(self._chunk, x, edges, vector, chunk, random=False)
            else:
                part = self._chunk(x, edges, vector, chunk)
            chunks.append(part)
        return [torch.cat(parts) for parts in zip(*chunks, strict=True)]

    def _chunk(self, x: Tensor, edges: Edges, vector: Tensor, chunk: Chunk) -> list[Tensor]:
        ends = edges.source[chunk.edges], edges.target[chunk.edges]
        degree = edges.target_ptr[chunk.rows.start : chunk.rows.stop + 1].diff()
        return self._of_edges(x, vector[chunk.edges], ends, chunk.nodes.start, degree)

    def _of_edges(
        self, x: Tensor, vector: Tensor, ends: tuple[Tensor, Tensor], first: int, degree: Tensor
    ) -> list[Tensor]:
        """Of atoms from the first on, with all of their edges; ``degree`` [n] is their number."""
        messages = self._messages(x, vector, *ends)
        segment, num_nodes = ends[1] - first, degree.shape[0]
        count = degree.clamp(min=1)[:, None, None]

        def mean(values: Tensor) -> Tensor:
            return segment_sum(values, segment, num_nodes) / count

        found = []
        for factors, perceptron in self.block(vector):
            values = factors[:, :, None] * messages[:, None]  # [e, T, W]
            if self.edge_level:
                values = mean(in_single(perceptron(values)))
            else:
                values = in_single(perceptron(mean(in_single(values))))
            found.append(values[:, :, 0])
        return found

    def _messages(self, x: Tensor, vector: Tensor, source: Tensor, target: Tensor) -> Tensor:
        """Node features read along the edge: [e, W]."""
        harmonics = spherical_harmonics(self.degrees, vector, normalize=False)
        factors = self.sphharm_norm(harmonics[:, :, None]).transpose(1, 2)  # [e, 1, K]
        ends = (source, target) if self.both_ends else (target,)
        read = [torch.bmm(factors, take(x, 0, end))[:, 0] for end in ends]
        messages: Tensor = self.xedge_layer_norm(torch.cat(read, dim=1))
        return messages
