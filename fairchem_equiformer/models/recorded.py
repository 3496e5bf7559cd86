"""Forward passes on frozen weights that a GPU runs as one CUDA graph.

A pass is recorded for a number of atoms, edges and structures that is rounded up, and filled up
(graph/padding.py); on frozen weights (nn/frozen.py) it is run again for every batch that fits.
Where it cannot be recorded the model runs as ever, and the log says why.
"""

from __future__ import annotations

import logging
import os
from collections import OrderedDict
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from fairchem_equiformer.graph.edge_graph import EdgeGraph
from fairchem_equiformer.graph.padding import Sizes, filled_up
from fairchem_equiformer.nn.frozen import kept
from fairchem_equiformer.nn.replay import (
    RECORDERS,
    Buffers,
    Recorded,
    Results,
    fill,
    say_once,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from fairchem_equiformer.models.backbone import EquiformerV2Backbone

VARIABLE = "FAIRCHEM_EQUIFORMER_CUDA_GRAPHS"
"""``off`` in the environment: nothing is recorded."""

_MOST = 8  # recorded passes of one model: each holds the memory of a forward pass
_FIELDS = ("source", "target", "vector", "distance", "atomic_numbers", "batch", "natoms")
Key = tuple[object, ...]


class Predictor(Protocol):
    """A model whose results follow from a graph."""

    training: bool

    @property
    def base(self) -> EquiformerV2Backbone:
        """What all heads share."""

    def of_graph(self, graph: EdgeGraph, data: Any = None, *, at_once: bool = False) -> Results:
        """Results by name; all edges in one chunk where ``at_once``."""

    def atom_results(self) -> set[str]:
        """Names of results with a row for each atom; others have as many for each structure."""


def predict(model: Predictor, data: Any) -> Results:
    """Results of a model for a batch, from a recorded pass where there can be one.

    Args:
        model: a :class:`Predictor`, and a module.
        data: the batch.

    Raises:
        StructureError: for bad input, a ValueError that names structure and value.
    """
    base = model.base
    graph = base.read(data)
    if graph.source.device.type in RECORDERS and not model.training:
        dtype = base.sphere_embedding.weight.dtype
        replays = kept(base, "replays", dtype, Replays)
        if replays is not None:
            results = replays.of_graph(model, graph, data)
            if results is not None:
                return results
    return model.of_graph(graph, data)


class Replays:
    """Recorded passes of one model, by what they were recorded for.

    A pass is recorded when it is asked for the second time: single points are not worth it.
    """

    def __init__(self) -> None:
        self._recorded: OrderedDict[Key, Recorded] = OrderedDict()
        self._seen: set[Key] = set()
        self._failed = False

    def of_graph(self, model: Predictor, graph: EdgeGraph, data: Any) -> Results | None:
        """Results for a graph, or None where the model has to run as ever."""
        sizes = Sizes.holding(graph.num_nodes, graph.num_edges, graph.num_graphs)
        reason = why_not(model.base, graph, sizes, data)
        if reason:
            say_once(logging.INFO, reason)
            return None

        def function(buffers: Buffers) -> Results:
            whole = filled_up(_graph_of(buffers), buffers["atoms"], buffers["edges"])
            return model.of_graph(whole, at_once=True)

        key = (sizes, graph.tags is not None)
        recorded = self._recording(key, function, lambda: _buffers(graph, sizes))
        if recorded is None:
            return None
        return _own_rows(model, recorded(_values(graph)), graph, sizes)

    def _recording(
        self,
        key: Key,
        function: Callable[[Buffers], Results],
        buffers: Callable[[], Buffers],
    ) -> Recorded | None:
        """What was recorded under this key, by now if it is asked for again."""
        key = (*key, torch.get_float32_matmul_precision())
        if key in self._recorded:
            self._recorded.move_to_end(key)
            return self._recorded[key]
        if self._failed or key not in self._seen:
            self._seen.add(key)
            return None
        made = buffers()
        record = RECORDERS[made["atoms"].device.type]
        try:
            recorded = Recorded(function, made, record)
        except RuntimeError as error:
            self._failed = True
            say_once(logging.WARNING, f"recording one failed: {error}")
            return None
        self._recorded[key] = recorded
        if len(self._recorded) > _MOST:
            self._recorded.popitem(last=False)
        return recorded


def why_not(base: EquiformerV2Backbone, graph: EdgeGraph, sizes: Sizes, data: Any) -> str:
    """What keeps a pass from being recorded; empty if nothing does.

    Raises:
        ValueError: if the variable in the environment is neither on nor off.
    """
    choice = os.environ.get(VARIABLE, "on")
    if choice not in ("on", "off"):
        raise ValueError(f"{VARIABLE} is {choice!r}, it must be on or off")
    if choice == "off":
        return f"{VARIABLE} is off"
    if base.node_share(graph) is not None:
        return "the atoms are spread over several processes"
    if getattr(data, "denoising_pos_forward", False):
        return "the positions are noisy, and forces are read (DeNS)"
    most = base.edges_at_once(graph.vector.device)
    if sizes.edges > most:
        return f"more than {most} edges are worked through in chunks"
    return ""


def _values(graph: EdgeGraph) -> dict[str, Tensor | int]:
    """What is written to the buffers for a graph."""
    values = {name: getattr(graph, name) for name in _FIELDS}
    tags = {} if graph.tags is None else {"tags": graph.tags}
    return values | tags | {"atoms": graph.num_nodes, "edges": graph.num_edges}


def _buffers(graph: EdgeGraph, sizes: Sizes) -> Buffers:
    """Buffers of these sizes that hold a graph."""
    rows = {
        **dict.fromkeys(("source", "target", "vector", "distance"), sizes.edges),
        **dict.fromkeys(("atomic_numbers", "batch", "tags"), sizes.atoms),
        "natoms": sizes.graphs,
    }
    made = {}
    for name, value in _values(graph).items():
        if isinstance(value, Tensor):
            made[name] = value.new_zeros(rows[name], *value.shape[1:])
        else:
            made[name] = graph.natoms.new_zeros(())
    fill(made, _values(graph))
    return made


def _graph_of(buffers: Buffers) -> EdgeGraph:
    """The buffers as a graph; only what counts of it is one."""
    tensors = {name: buffers[name] for name in _FIELDS}
    return EdgeGraph(target_ptr=buffers["atoms"], tags=buffers.get("tags"), **tensors)


def _own_rows(model: Predictor, results: Results, graph: EdgeGraph, sizes: Sizes) -> Results:
    """Copies of the rows that belong to the graph's own atoms and structures."""
    own = {}
    for name, value in results.items():
        rows = graph.num_nodes
        if name not in model.atom_results():
            rows = len(value) // sizes.graphs * graph.num_graphs
        own[name] = value[:rows].clone()
    return own
