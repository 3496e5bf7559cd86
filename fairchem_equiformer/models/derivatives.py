"""Forces and stress as derivatives of a model's energy."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from fairchem_equiformer.errors import StructureError
from fairchem_equiformer.graph.edge_graph import EdgeGraph

# What the graph is made from, see graph/build.py.
_FIELDS = (
    *("pos", "cell", "natoms", "atomic_numbers", "pbc", "sid", "tags"),
    *("edge_index", "cell_offsets", "neighbors"),
)


def with_derivatives(
    build: Callable[[Any], EdgeGraph],
    predict: Callable[[EdgeGraph], dict[str, Tensor]],
    data: Any,
    of_all: Callable[[EdgeGraph, Tensor], Tensor],
    *,
    stress: bool,
) -> dict[str, Tensor]:
    """Outputs of a model, and its energy's derivatives by the positions and by a strain.

    They can be differentiated again where gradients are enabled.

    Args:
        build: from a batch to its graph.
        predict: from the graph to outputs with ``energy`` [B].
        data: the batch; it stays as it is.
        of_all: from the part of a derivative that this process found to the whole.
        stress: whether to compute it.

    Returns:
        The outputs; ``forces`` [N, 3], minus the derivative by the positions; with ``stress``,
        ``stress`` [B, 9], the derivative by the strain over the cell's volume; zero where the cell
        lacks a vector, as a molecule's may.

    Raises:
        StructureError: as ``build``, or for a stress without a ``cell`` in the batch.
    """
    again = torch.is_grad_enabled()
    with torch.inference_mode(mode=False), torch.enable_grad(), _autocast_without_cache(data):
        own = _copy(data)
        graph = build(own)
        variables = [own.pos]
        if stress:
            volume = _volume(own.cell)
            strain = own.pos.new_zeros(graph.num_graphs, 3, 3).requires_grad_()
            variables.append(strain)
            graph = _strained(graph, strain)
        outputs = predict(graph)
        total = outputs["energy"].sum()
        parts = torch.autograd.grad(total, variables, create_graph=again)
        gradients = [of_all(graph, part) for part in parts]
    outputs["forces"] = -gradients[0]
    if stress:
        outputs["stress"] = gradients[1].flatten(1) / volume[:, None]
    return outputs if again else {key: value.detach() for key, value in outputs.items()}


def _autocast_without_cache(data: Any) -> torch.autocast:
    """Autocast as it is; but what it casts in the forward pass has no gradients in the backward."""
    device = getattr(getattr(data, "pos", None), "device", torch.device("cpu")).type
    dtype, enabled = torch.get_autocast_dtype(device), torch.is_autocast_enabled(device)
    return torch.autocast(device, dtype, enabled, cache_enabled=False)


def _copy(data: Any) -> SimpleNamespace:
    """The fields of a batch, with positions that derivatives can be taken by."""

    def copy(value: Any) -> Any:
        return value.clone() if isinstance(value, Tensor) else value

    own = SimpleNamespace(**{name: copy(getattr(data, name, None)) for name in _FIELDS})
    if own.pos is not None and not own.pos.requires_grad:
        own.pos.requires_grad_()
    return own


def _volume(cell: Tensor | None) -> Tensor:
    """Of each structure [B]; where a vector is missing, it ends in a vacuum without end."""
    if cell is None:
        raise StructureError("the batch has no field 'cell', over whose volume a stress is taken")
    volume: Tensor = torch.linalg.det(cell.reshape(-1, 3, 3)).abs()
    return volume.masked_fill(volume == 0, torch.inf)


def _strained(graph: EdgeGraph, strain: Tensor) -> EdgeGraph:
    """The graph with strained edges; of the strain only what is symmetric, the rest is a turn."""
    symmetric = (strain + strain.transpose(1, 2)) / 2
    of_edge = symmetric[graph.batch[graph.target]]
    vector = graph.vector + torch.bmm(graph.vector[:, None], of_edge)[:, 0]
    return replace(graph, vector=vector, distance=vector.norm(dim=-1))
