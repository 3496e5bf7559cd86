"""From a fairchem batch to the edge list of the ops, with every check of the input on the way.

A batch is a torch-geometric ``Batch`` or ``Data`` with the fields that fairchem's datasets write:
``pos``, ``cell``, ``natoms``, ``atomic_numbers``, and optionally ``pbc``, ``sid``, ``edge_index``,
``cell_offsets``, ``neighbors``, ``tags``. Input that the model cannot work with ends in a
``StructureError`` that names the structure, the atom and the value.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from fairchem_equiformer.errors import StructureError
from fairchem_equiformer.graph.edge_graph import EdgeGraph
from fairchem_equiformer.graph.neighbors import (
    NeighborList,
    in_order,
    neighbor_list,
    plane_spacings,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

logger = logging.getLogger(__name__)

NUM_TAGS = 3
"""OC20's: bulk, surface, adsorbate."""

MIN_DISTANCE = 0.01
"""Atoms closer than this (Angstrom) are on one point; fairchem silently leaves out their edge."""

MIN_PLANE_SPACING = 0.05
"""Lattice planes closer than this (Angstrom) make a cell degenerate."""


@dataclass(frozen=True)
class GraphConfig:
    """Which edges a model reads, by the names of its config keys."""

    max_radius: float  # Angstrom
    max_neighbors: int  # kept for an atom; zero or less keeps all
    # Keep no more among equally distant ones. Otherwise also those within 0.01 Angstrom^2 of the
    # first one left out, and that one.
    enforce_max_neighbors_strictly: bool = True
    # Periodic directions are those of `data.pbc`, all three if there is none; False ignores cell
    # and images.
    use_pbc: bool = True
    # Search structures one by one, so that ties between equally far neighbours do not depend on the
    # rest of the batch; slower for many small ones.
    use_pbc_single: bool = False
    # False takes `edge_index`, `cell_offsets` and `neighbors` from the batch if it has them
    # (`max_neighbors` is then not applied).
    otf_graph: bool = True
    max_num_elements: int = 90  # atomic numbers run from 0 to this, excluded
    use_tags: bool = False  # whether the model reads `tags`


def build_graph(data: Any, config: GraphConfig) -> EdgeGraph:
    """Check a batch and find its edges: those of fairchem-core 1.10's ``generate_graph``.

    Where this is more general than fairchem: structures of one batch may differ in ``pbc``, atoms
    need not be wrapped into the cell, an empty batch gives an empty graph. Without ``use_pbc``
    fairchem asks torch-cluster, which keeps any ``max_neighbors`` neighbours closer than the
    cutoff; here it is the nearest ones, by the same rule as with ``use_pbc``. Edges are built in
    the precision of the positions also under autocast: half precision would move images by
    0.01 Angstrom. Gradients flow from ``vector`` and ``distance`` to ``pos`` and ``cell``.

    Args:
        data: The batch: any object with the fields above.
        config: Which edges, and which of the fields.

    Returns:
        Edges sorted by target, then source, then image; given edges keep their order otherwise.

    Raises:
        StructureError: A field is missing or of another shape than the others say; an atomic number
            is out of range; a position or cell is not finite; a lattice vector is missing or
            degenerate in a periodic direction; two atoms, or an atom and an image, are on one
            point; no structure has an atom.
    """
    with torch.autocast(device_type=_field(data, "pos").device.type, enabled=False):
        structures = _read(data, use_pbc=config.use_pbc)
        _check_atoms(structures, config.max_num_elements)
        tags = _tags(data, structures) if config.use_tags else None
        edges = None if config.otf_graph else _given_edges(data, structures, config.use_pbc)
        if edges is None:
            _check_cells(structures)
            search = partial(
                neighbor_list,
                cutoff=config.max_radius,
                max_neighbors=config.max_neighbors,
                strict=config.enforce_max_neighbors_strictly,
            )
            if config.use_pbc_single:
                edges = _one_by_one(search, structures)
            else:
                edges = search(structures.pos, structures.cell, structures.pbc, structures.natoms)
            _warn_of_cut_ties(structures, edges.cut)
        return _edge_graph(structures, edges, tags)


def _tags(data: Any, structures: _Structures) -> Tensor:
    """Tags of the batch's atoms: [N] int64."""
    tags = getattr(data, "tags", None)
    if tags is None:
        raise StructureError(
            "the batch has no field 'tags', which use_tag_embedding: True reads: for each atom"
            " 0 (bulk), 1 (surface) or 2 (adsorbate)"
        )
    _check_shape("tags", tags, (len(structures.pos),))
    whole: Tensor = tags.long()
    unknown = (whole != tags) | (whole < 0) | (whole >= NUM_TAGS)
    if unknown.any():
        atom = int(unknown.nonzero()[0])
        raise StructureError(
            f"{structures.atom_name(atom)}: tag {tags[atom].item()} is out of range; the embedding"
            f" of use_tag_embedding: True has 0 to {NUM_TAGS - 1}"
        )
    return whole


@dataclass(frozen=True)
class _Structures:
    """The fields of a batch, in the shapes they should have."""

    pos: Tensor  # [N, 3]
    cell: Tensor  # [G, 3, 3], zero without periodicity
    pbc: Tensor  # [G, 3] bool
    natoms: Tensor  # [G] int64
    atomic_numbers: Tensor  # [N] as given
    batch: Tensor  # [N] int64
    sids: list[Any]  # as many as the batch has

    def name(self, graph: int) -> str:
        """What a message calls a structure: its place in the batch and, if it has one, its sid."""
        known = graph < len(self.sids) and self.sids[graph] != ""  # fairchem 2's for "none"
        sid = f" (sid {self.sids[graph]})" if known else ""
        return f"structure {graph} of the batch{sid}"

    def atom_in_structure(self, atom: int) -> int:
        return atom - int(self.natoms[: self.batch[atom]].sum())

    def atom_name(self, atom: int) -> str:
        return f"{self.name(int(self.batch[atom]))}, atom {self.atom_in_structure(atom)}"


def _read(data: Any, *, use_pbc: bool) -> _Structures:
    fields = read_fields(data, use_pbc=use_pbc)
    batch = torch.repeat_interleave(fields.natoms)
    _check_shape("pos", fields.pos, (len(batch), 3))
    _check_shape("atomic_numbers", fields.atomic_numbers, (len(batch),))
    sid = getattr(data, "sid", None)
    sids = sid.reshape(-1).tolist() if isinstance(sid, torch.Tensor) else sid
    sids = sids if isinstance(sids, list) else [sids] if sids is not None else []
    return _Structures(*fields, batch, sids)


class Fields(NamedTuple):
    """What a batch says of its structures, in the shapes it should have but for the atoms."""

    pos: Tensor  # [N, 3]
    cell: Tensor  # [G, 3, 3], zero without periodicity
    pbc: Tensor  # [G, 3] bool
    natoms: Tensor  # [G] int64
    atomic_numbers: Tensor  # [N] as given


def read_fields(data: Any, *, use_pbc: bool) -> Fields:
    """Read them without waiting for a GPU.

    Raises:
        StructureError: if one is missing, or cells or pbc are not as many as structures.
    """
    pos, numbers = _field(data, "pos"), _field(data, "atomic_numbers")
    natoms = torch.as_tensor(_field(data, "natoms"), device=pos.device).reshape(-1).long()
    graphs = len(natoms)
    if not use_pbc:
        cell = pos.new_zeros(graphs, 3, 3)
        return Fields(pos, cell, torch.zeros_like(cell[:, 0], dtype=torch.bool), natoms, numbers)
    cell = _field(data, "cell")
    cell = cell.unsqueeze(0) if cell.dim() == 2 else cell
    _check_shape("cell", cell, (graphs, 3, 3))
    pbc = getattr(data, "pbc", None)
    if pbc is None:
        pbc = torch.ones(3, device=pos.device)
    pbc = torch.as_tensor(pbc).to(pos.device).bool().reshape(-1, 3)
    pbc = pbc.expand(graphs, 3) if len(pbc) == 1 else pbc
    _check_shape("pbc", pbc, (graphs, 3))
    return Fields(pos, cell, pbc, natoms, numbers)


def _field(data: Any, name: str) -> Any:
    value = getattr(data, name, None)
    if value is None:
        raise StructureError(f"the batch has no field {name!r}, which the graph is made from")
    return value


def _check_shape(name: str, value: Tensor, shape: tuple[int, ...]) -> None:
    if tuple(value.shape) != shape:
        raise StructureError(
            f"field {name!r} of the batch has shape {tuple(value.shape)};"
            f" its natoms ask for {shape} (atoms or structures first)"
        )


def _check_atoms(structures: _Structures, max_num_elements: int) -> None:
    if len(structures.natoms) > 0 and len(structures.pos) == 0:
        raise StructureError(f"{structures.name(0)} has no atoms, nor has any other of the batch")
    numbers = structures.atomic_numbers
    whole = numbers.long()
    unknown = (whole != numbers) | (whole < 0) | (whole >= max_num_elements)
    lost = ~torch.isfinite(structures.pos).all(dim=1)
    broken = ~torch.isfinite(structures.cell).flatten(1).all(dim=1)
    if not torch.stack((unknown.any(), lost.any(), broken.any())).any():
        return
    if unknown.any():
        atom = int(unknown.nonzero()[0])
        raise StructureError(
            f"{structures.atom_name(atom)}: atomic number {numbers[atom].item()} is out of range;"
            f" this model knows 0 to {max_num_elements - 1} (max_num_elements: {max_num_elements})"
        )
    if lost.any():
        atom = int(lost.nonzero()[0])
        raise StructureError(
            f"{structures.atom_name(atom)}: position {structures.pos[atom].tolist()} is not finite"
        )
    graph = int(broken.nonzero()[0])
    raise StructureError(
        f"{structures.name(graph)}: cell {structures.cell[graph].tolist()} is not finite"
    )


def _check_cells(structures: _Structures) -> None:
    spacings = plane_spacings(structures.cell, structures.pbc)
    _check_completed(structures, spacings)
    spacing = spacings.amin(dim=1)
    degenerate = spacing < MIN_PLANE_SPACING
    if degenerate.any():
        graph = int(degenerate.nonzero()[0])
        raise StructureError(
            f"{structures.name(graph)}: cell {structures.cell[graph].tolist()} is degenerate:"
            f" its lattice planes are {spacing[graph]:.3g} Angstrom apart in a periodic direction"
            f" (pbc {structures.pbc[graph].tolist()}). Give it a cell with a volume, or set pbc"
            " (or use_pbc in the model's config) to False"
        )


def _check_completed(structures: _Structures, spacings: Tensor) -> None:
    """No lattice vector is one that fairchem's converter (ASE's `complete`) put in for none.

    That is one of 1 Angstrom at right angles to the others, nearer than atoms come to each other.
    """
    unit = (spacings - 1).abs() < 1e-6
    if not unit.any():
        return
    unit &= (structures.cell.norm(dim=2).cpu() - 1).abs() < 1e-6
    if unit.any():
        graph = int(unit.any(dim=1).nonzero()[0])
        raise StructureError(
            f"{structures.name(graph)}: no lattice vector in a periodic direction (pbc"
            f" {structures.pbc[graph].tolist()}): 1 Angstrom was put in its place, the cell is"
            f" {structures.cell[graph].tolist()}. Give it a cell, or set pbc to False there"
        )


def _given_edges(data: Any, structures: _Structures, use_pbc: bool) -> NeighborList | None:
    """Edges that the batch brings along; None, and a line in the log, if it has none."""
    names = ("edge_index", "cell_offsets", "neighbors") if use_pbc else ("edge_index",)
    missing = [name for name in names if getattr(data, name, None) is None]
    if missing:
        logger.warning(
            "otf_graph is False, but the batch has no %s: finding its edges instead",
            ", ".join(missing),
        )
        return None
    source, target = data.edge_index
    image = data.cell_offsets if use_pbc else source.new_zeros(len(source), 3)
    _check_shape("cell_offsets", image, (len(source), 3))
    atoms = len(structures.pos)
    outside = (data.edge_index < 0) | (data.edge_index >= atoms)
    if outside.any():
        edge = int(outside.any(dim=0).nonzero()[0])
        raise StructureError(
            f"edge {edge} of the batch joins atoms {int(source[edge])} and {int(target[edge])},"
            f" but it has atoms 0 to {atoms - 1} only"
        )
    across = structures.batch[source] != structures.batch[target]
    if across.any():
        edge = int(across.nonzero()[0])
        raise StructureError(
            f"edge {edge} of the batch joins {structures.atom_name(int(source[edge]))}"
            f" and {structures.atom_name(int(target[edge]))}: not the same structure"
        )
    broken = (image != image.long()).any(dim=1)
    if broken.any():
        edge = int(broken.nonzero()[0])
        raise StructureError(
            f"edge {edge} of the batch, to {structures.atom_name(int(target[edge]))}, has"
            f" cell_offsets {image[edge].tolist()}: not whole numbers"
        )
    image = image.long()
    itself = (source == target) & (image == 0).all(dim=1)
    order = torch.argsort(target, stable=True)
    order = order[~itself[order]]
    return NeighborList(source[order], target[order], image[order], cut=target[:0])


def _one_by_one(search: Callable[..., NeighborList], structures: _Structures) -> NeighborList:
    first, found = 0, []
    for graph, pos in enumerate(torch.split(structures.pos, structures.natoms.tolist())):
        one = slice(graph, graph + 1)
        edges = search(pos, structures.cell[one], structures.pbc[one], structures.natoms[one])
        source, target, image, cut = edges
        found.append((source + first, target + first, image, cut + first))
        first += len(pos)
    return NeighborList(*(torch.cat(parts) for parts in zip(*found, strict=True)))


_warned: set[str] = set()  # what this process has been told


def _warn_of_cut_ties(structures: _Structures, cut: Tensor) -> None:
    """Say once that a crystal's neighbours are chosen among equals, and what to do."""
    if len(cut) == 0 or "ties" in _warned:
        return
    cut = cut[structures.pbc[structures.batch[cut]].any(dim=1)]
    if len(cut) == 0:
        return
    _warned.add("ties")
    graph = int(structures.batch[cut[0]])
    atoms = int((structures.batch[cut] == graph).sum())
    logger.warning(
        "max_neighbors cuts between equally far neighbours of %d of the %d atoms of %s. Which of"
        " them stay is then a matter of rounding: a perfect crystal's energy can change by some"
        " 10 meV when it is moved, turned or repeated. For crystals, train with"
        " enforce_max_neighbors_strictly: False, which keeps all of them; a model trained with"
        " True, as those of OC20 for slabs, keeps True. This is said once",
        atoms,
        int(structures.natoms[graph]),
        structures.name(graph),
    )


def _image_offset(image: Tensor, cell: Tensor) -> Tensor:
    """``image @ cell``, [E, 3] Angstrom, rounded as fairchem does it.

    But not on a GPU, where a matrix product may be rounded to TF32: that moves images by 0.01
    Angstrom.
    """
    if not cell.is_cuda:
        return torch.bmm(image.unsqueeze(1), cell).squeeze(1)
    return in_order(image, cell)


def vectors(pos: Tensor, cell: Tensor, edges: NeighborList) -> Tensor:
    """From each edge's target to its source, [E, 3] Angstrom.

    Args:
        pos: [N, 3] Angstrom.
        cell: [E, 3, 3] Angstrom, of each edge's structure.
        edges: between these atoms.
    """
    offset = _image_offset(edges.image.to(cell.dtype), cell).to(pos.dtype)
    return pos[edges.source] - pos[edges.target] + offset


def _edge_graph(structures: _Structures, edges: NeighborList, tags: Tensor | None) -> EdgeGraph:
    pos, target = structures.pos, edges.target
    vector = vectors(pos, structures.cell[structures.batch[target]], edges)
    distance = vector.norm(dim=-1)
    _check_distances(structures, edges, distance)
    atoms = torch.arange(len(pos) + 1, device=target.device)
    return EdgeGraph(
        source=edges.source,
        target=target,
        target_ptr=torch.searchsorted(target.contiguous(), atoms),
        vector=vector,
        distance=distance,
        atomic_numbers=structures.atomic_numbers.long(),
        batch=structures.batch,
        natoms=structures.natoms,
        tags=tags,
    )


def _check_distances(structures: _Structures, edges: NeighborList, distance: Tensor) -> None:
    too_close = distance <= MIN_DISTANCE
    if not too_close.any():
        return
    edge = int(too_close.nonzero()[0])
    source = structures.atom_in_structure(int(edges.source[edge]))
    image = tuple(int(n) for n in edges.image[edge])
    other = f"the image {image} of atom {source}" if any(image) else f"atom {source}"
    raise StructureError(
        f"{structures.atom_name(int(edges.target[edge]))} and {other} are on one point:"
        f" {distance[edge].item():.3g} Angstrom apart"
    )
