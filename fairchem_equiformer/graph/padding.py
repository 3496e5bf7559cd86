"""Graphs of fixed sizes, for a forward pass that is recorded once and run again on other edges.

What a recorded pass reads has the same shapes every time: a graph is filled up with edges between
atoms that do not exist, in a structure of their own. They are no real atom's neighbours, so that
real atoms' sums have the same terms in the same order.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from fairchem_equiformer.graph.edge_graph import EdgeGraph

_STEP = 16  # the least
_SPREAD = 256  # one atom more for so many edges: none gets more than 32 of those filled in


def bucket(count: int) -> int:
    """The size that a count is filled up to: at most an eighth more, or the next multiple of 16."""
    step = max(_STEP, 1 << max(0, (count - 1).bit_length() - 4))
    return math.ceil(count / step) * step


class Sizes(NamedTuple):
    """Of a filled-up graph."""

    atoms: int
    edges: int
    graphs: int

    @classmethod
    def holding(cls, atoms: int, edges: int, graphs: int) -> Sizes:
        """Sizes for a graph of these, with an atom and a structure at least to fill up with."""
        most = bucket(edges)
        return cls(bucket(atoms + 1 + most // _SPREAD), most, graphs + 1)


def filled_up(graph: EdgeGraph, atoms: Tensor, edges: Tensor) -> EdgeGraph:
    """A graph of which only the first atoms and edges count, made valid as a whole.

    The host waits for nothing, and reads no number.

    Args:
        graph: of the sizes wanted. Beyond the counts its tensors may hold anything; its
            ``target_ptr`` is not read.
        atoms: [] int64, how many count; fewer than there are.
        edges: [] int64.
    """
    device = graph.source.device
    atom = torch.arange(graph.num_nodes, device=device)
    real = atom < atoms
    beyond = torch.arange(graph.num_edges, device=device) - edges
    made_up = beyond >= 0
    share = (graph.num_edges - edges) // (graph.num_nodes - atoms) + 1
    end = atoms + beyond.clamp(min=0) // share
    target = torch.where(made_up, end, graph.target)
    bounds = torch.arange(graph.num_nodes + 1, device=device)
    rest = (graph.num_nodes - atoms).reshape(1)
    return replace(
        graph,
        source=torch.where(made_up, end, graph.source),
        target=target,
        target_ptr=torch.searchsorted(target, bounds),
        vector=torch.where(made_up[:, None], 1.0, graph.vector),
        distance=torch.where(made_up, math.sqrt(3), graph.distance),
        atomic_numbers=torch.where(real, graph.atomic_numbers, 0),
        batch=torch.where(real, graph.batch, graph.num_graphs - 1),
        natoms=torch.cat([graph.natoms[:-1], rest]),
        tags=None if graph.tags is None else torch.where(real, graph.tags, 0),
    )
