"""Forward passes on frozen weights that a GPU runs as one CUDA graph.

A pass is recorded for a number of atoms, edges and structures that is rounded up, and filled up
(graph/padding.py); on frozen weights (nn/frozen.py) it is run again for every batch that fits.
Where it cannot be recorded the model runs as ever, and the log says why.
"""

from __future__ import annotations

import logging
import os
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from torch import Tensor

from fairchem_equiformer.graph.build import Fields, GraphConfig, read_fields
from fairchem_equiformer.graph.edge_graph import EdgeGraph
from fairchem_equiformer.graph.fixed_search import Told, made_for
from fairchem_equiformer.graph.fixed_search import search as fixed_search
from fairchem_equiformer.graph.padding import Sizes, filled_up
from fairchem_equiformer.nn.frozen import kept
from fairchem_equiformer.nn.replay import (
    RECORDERS,
    Buffers,
    Key,
    Recorded,
    Recordings,
    Results,
    fill,
    say_once,
)

if TYPE_CHECKING:
    from collections.abc import Mapping

    from fairchem_equiformer.models.backbone import EquiformerV2Backbone

VARIABLE = "FAIRCHEM_EQUIFORMER_CUDA_GRAPHS"
"""``off`` in the environment: nothing is recorded."""

_LONGEST_REST = 1024  # batches
_TOLD = "told of the search"  # among the results of a pass that begins with positions
_FIELDS = ("source", "target", "vector", "distance", "atomic_numbers", "batch", "natoms")


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
    pos = getattr(data, "pos", None)
    replays = None
    if isinstance(pos, Tensor) and pos.device.type in RECORDERS and not model.training:
        replays = kept(base, "replays", base.sphere_embedding.weight.dtype, Replays)
    if replays is None:
        return model.of_graph(base.read(data), data)
    results = replays.of_positions(model, data)
    if results is not None:
        return results
    graph = base.read(data)
    for found in (replays.of_new_positions, replays.of_graph):
        results = found(model, data, graph)
        if results is not None:
            return results
    return model.of_graph(graph, data)


@dataclass
class _Search:
    """How recorded passes that begin with positions fared with batches of one kind."""

    misses: int = 0  # in a row
    rest: int = 0  # so many batches are left to the search outside

    def missed(self) -> None:
        """Leave the next batches alone: 0 after one miss, 1 after two, 3, 7, ..."""
        self.misses += 1
        self.rest = min(1 << (self.misses - 1), _LONGEST_REST) - 1


class Replays:
    """Recorded passes of one model, by what they were recorded for.

    They begin with the positions of a batch, or with its graph.
    """

    def __init__(self) -> None:
        self._recordings = Recordings()
        self._searches: dict[Key, _Search] = {}

    def of_positions(self, model: Predictor, data: Any) -> Results | None:
        """Results by a recorded pass that searches for neighbours itself.

        Returns:
            None where there is no such pass, or it found something amiss.
        """
        values = _positions(model.base, data)
        if values is None:
            return None
        kind = _kind(values)
        recorded, search = self._recordings.get(kind), self._searches.get(kind)
        if search is not None and search.rest:
            search.rest -= 1
            return None
        return None if recorded is None else self._searched(model, kind, recorded, values)

    def of_new_positions(self, model: Predictor, data: Any, graph: EdgeGraph) -> Results | None:
        """The same, by a pass that is recorded now.

        Returns:
            None where none can be, or none was asked for before.
        """
        values = _positions(model.base, data)
        sizes = Sizes.holding(graph.num_nodes, graph.num_edges, graph.num_graphs)
        if values is None or why_not(model.base, graph, sizes, data):
            return None
        kind = _kind(values)
        search = self._searches.setdefault(kind, _Search())
        again = self._recordings.asked_again(kind)
        if search.rest or not again or self._recordings.get(kind) is not None:
            return None
        plan = made_for(_fields_of(values), graph, _config(model.base))
        if plan is None:
            search.rest = sys.maxsize
            return None

        def function(buffers: Buffers) -> Results:
            whole, told = fixed_search(plan, _fields_of(buffers), buffers.get("tags"))
            return model.of_graph(whole, at_once=True) | {_TOLD: told}

        buffers = {name: value.clone() for name, value in values.items()}
        recorded = self._recordings.record(kind, function, buffers)
        return None if recorded is None else self._searched(model, kind, recorded, values)

    def _searched(
        self, model: Predictor, kind: Key, recorded: Recorded, values: dict[str, Tensor]
    ) -> Results | None:
        results = dict(recorded(values))
        told = results.pop(_TOLD)
        own = _own_rows(model, results, len(values["pos"]), len(values["natoms"]))
        found = Told(*told.tolist())  # the one time that the host waits for a GPU
        search = self._searches[kind]
        if not found.reason:
            search.misses = 0
            return own
        search.missed()
        say_once(logging.INFO, found.reason, "neighbours were searched for outside a CUDA graph")
        if found.outgrown:
            self._recordings.drop(kind)
        return None

    def of_graph(self, model: Predictor, data: Any, graph: EdgeGraph) -> Results | None:
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
        recorded = self._recordings.get(key)
        if recorded is None and self._recordings.asked_again(key):
            recorded = self._recordings.record(key, function, _buffers(graph, sizes))
        if recorded is None:
            return None
        return _own_rows(model, recorded(_values(graph)), graph.num_nodes, graph.num_graphs)


def _config(base: EquiformerV2Backbone) -> GraphConfig:
    return base.config.graph(otf=base.otf_graph)


def _positions(base: EquiformerV2Backbone, data: Any) -> dict[str, Tensor] | None:
    """What a pass that begins with positions reads of a batch; None if it cannot begin there."""
    config = _config(base)
    if not config.otf_graph or _why_not_this(data):
        return None
    values: dict[str, Tensor] = read_fields(data, use_pbc=config.use_pbc)._asdict()
    if config.use_tags:
        tags = getattr(data, "tags", None)
        if not isinstance(tags, Tensor):
            return None
        values["tags"] = tags
    return values


def _kind(values: dict[str, Tensor]) -> Key:
    return tuple((name, value.shape, value.dtype) for name, value in values.items())


def _fields_of(values: Mapping[str, Tensor]) -> Fields:
    return Fields(*(values[name] for name in Fields._fields))


def why_not(base: EquiformerV2Backbone, graph: EdgeGraph, sizes: Sizes, data: Any) -> str:
    """What keeps a pass from being recorded; empty if nothing does.

    Raises:
        ValueError: if the variable in the environment is neither on nor off.
    """
    reason = _why_not_this(data)
    if reason:
        return reason
    if base.node_share(graph) is not None:
        return "the atoms are spread over several processes"
    most = base.edges_at_once(graph.vector.device)
    if sizes.edges > most:
        return f"more than {most} edges are worked through in chunks"
    return ""


def _why_not_this(data: Any) -> str:
    """As :func:`why_not`, as far as no graph is needed."""
    choice = os.environ.get(VARIABLE, "on")
    if choice not in ("on", "off"):
        raise ValueError(f"{VARIABLE} is {choice!r}, it must be on or off")
    if choice == "off":
        return f"{VARIABLE} is off"
    if getattr(data, "denoising_pos_forward", False):
        return "the positions are noisy, and forces are read (DeNS)"
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


def _own_rows(model: Predictor, results: Results, atoms: int, graphs: int) -> Results:
    """Copies of the rows that belong to so many atoms and structures; one was filled in."""
    own = {}
    for name, value in results.items():
        rows = atoms
        if name not in model.atom_results():
            rows = len(value) // (graphs + 1) * graphs
        own[name] = value[:rows].clone()
    return own
