"""The search for neighbours with every size known beforehand, to be recorded with a forward pass.

For small structures, of which a GPU looks at all pairs and images in less time than a host takes
to ask it once. No shape follows from a number, so that the host reads none: how many edges there
are, and what is not as it was expected, is told in one small tensor after the results. Whoever
reads there that something is amiss does the step again by :mod:`~fairchem_equiformer.graph.build`,
which finds the same edges in the same order, names errors, and chooses among ties.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from fairchem_equiformer.graph.build import (
    MIN_DISTANCE,
    NUM_TAGS,
    Fields,
    GraphConfig,
    vectors,
)
from fairchem_equiformer.graph.edge_graph import EdgeGraph
from fairchem_equiformer.graph.neighbors import NeighborList, accepted, in_order, widened
from fairchem_equiformer.graph.padding import Sizes, filled_up

MOST_CANDIDATES = 1 << 22
"""Pairs and images looked at: some 40 bytes each, 170 MB in all."""

_SPARE = 0.1  # of a cell, by which atoms may spread further before more images are needed


class Told(NamedTuple):
    """What is told of a search: the number of edges, and whether there is something amiss."""

    edges: int
    wrong: int  # input, perhaps
    changed: int  # natoms or pbc
    images: int
    beyond: int  # edges
    ties: int

    @property
    def outgrown(self) -> bool:
        """Whether the search was made for other structures."""
        return not self.wrong and bool(self.changed or self.images or self.beyond)

    @property
    def reason(self) -> str:
        """Why the graph is not the batch's; empty if it is."""
        reasons = {
            "the input may be wrong": self.wrong,
            "natoms or pbc changed": self.changed,
            "the cell, or how far atoms spread, needs more images": self.images,
            "there are more edges than were provided for": self.beyond,
            "there are equally far neighbours to choose from": self.ties,
        }
        return ", ".join(reason for reason, so in reasons.items() if so)


@dataclass(frozen=True)
class Plan:
    """What a search of fixed sizes is made for."""

    config: GraphConfig
    sizes: Sizes  # of the filled-up graph
    pbc: Tensor  # [G, 3] bool
    natoms: Tensor  # [G] int64
    batch: Tensor  # [N] int64
    member: Tensor  # [G, n] int64, atoms of each structure; filled up with some atom
    real: Tensor  # [G, n] bool, false where filled up
    images: Tensor  # [I, 3] int64, in ascending order
    reach: Tensor  # [3] float64, the most lattice vectors in each direction


def made_for(fields: Fields, graph: EdgeGraph, config: GraphConfig) -> Plan | None:
    """What a search for this batch, and others much like it, has to provide for.

    Args:
        fields: of the batch.
        graph: of the batch.
        config: of the model.

    Returns:
        None if the batch is too large.
    """
    first = graph.natoms.cumsum(0) - graph.natoms
    place = torch.arange(int(graph.natoms.max()), device=first.device)
    real = place < graph.natoms[:, None]
    member = torch.where(real, first[:, None] + place, first[:, None]).clamp(
        max=graph.num_nodes - 1
    )
    needed, _ = _images_needed(fields, member, graph.batch, config.max_radius, fields.pbc)
    reach = torch.floor((needed + _SPARE).amax(dim=0)) * fields.pbc.any(dim=0)
    if not real.numel() * len(place) * float((2 * reach + 1).prod()) <= MOST_CANDIDATES:
        return None
    steps = (torch.arange(-most, most + 1, device=first.device) for most in reach.long().tolist())
    return Plan(
        config=config,
        sizes=Sizes.holding(graph.num_nodes, graph.num_edges, graph.num_graphs),
        pbc=fields.pbc.clone(),
        natoms=graph.natoms.clone(),
        batch=graph.batch,
        member=member,
        real=real,
        images=torch.cartesian_prod(*steps).reshape(-1, 3),
        reach=reach,
    )


def search(plan: Plan, fields: Fields, tags: Tensor | None = None) -> tuple[EdgeGraph, Tensor]:
    """Find the edges of a batch. The host reads nothing.

    Args:
        plan: for a batch of as many atoms and structures.
        fields: of the batch; whatever numbers they hold.
        tags: [N], where the model reads them.

    Returns:
        The graph, filled up to the plan's sizes, and [6] int64, which :class:`Told` reads.
    """
    with torch.autocast(fields.pos.device.type, enabled=False):
        config = plan.config
        candidates = _squared_distances(plan, fields)
        k, strict = config.max_neighbors, config.enforce_max_neighbors_strictly
        limit, tie, _ = accepted(candidates, k, strict=strict)
        chosen = (candidates <= limit[:, None]) & (candidates < torch.inf)
        count, place = _places(chosen, plan.sizes.edges)
        edges = _edges(plan, place)
        vector = vectors(fields.pos, fields.cell[plan.batch[edges.target]], edges)
        graph = _graph(plan, fields, edges, vector, tags)
        beyond = torch.arange(plan.sizes.edges, device=count.device) >= count
        close = (graph.distance <= MIN_DISTANCE) & ~beyond
        needed, spacing = _images_needed(
            fields, plan.member, plan.batch, config.max_radius, plan.pbc
        )
        told = {
            "edges": count,
            "wrong": _wrong(fields, tags, spacing, config) | close.any(),
            "changed": (fields.natoms != plan.natoms).any() | (fields.pbc != plan.pbc).any(),
            "images": ~(needed.floor() <= plan.reach).all(),
            "beyond": count > plan.sizes.edges,
            "ties": tie.any(),
        }
        atoms, most = torch.full_like(count, len(fields.pos)), plan.sizes.edges
        graph = filled_up(graph, atoms, count.clamp(max=most))
        return graph, torch.stack([told[name].long() for name in Told._fields])


def _images_needed(
    fields: Fields, member: Tensor, batch: Tensor, cutoff: float, pbc: Tensor
) -> tuple[Tensor, Tensor]:
    """Lattice vectors between an atom and the images that may be its neighbours.

    Returns:
        [G, 3] float64; and the distance between lattice planes, [G, 3] Angstrom, infinite in
        directions that are not periodic.
    """
    lattice = fields.cell.double() * pbc.unsqueeze(2)
    # By cofactors, since the host waits for PyTorch's inverse. Where not periodic it is zero.
    gram = lattice @ lattice.mT + torch.diag_embed((~pbc).double())
    a, b, c = gram.unbind(dim=1)
    cofactors = torch.stack([b.cross(c, dim=1), c.cross(a, dim=1), a.cross(b, dim=1)], dim=2)
    inverse = lattice.mT @ (cofactors / (a * cofactors[:, :, 0]).sum(dim=1)[:, None, None])
    per_length = torch.linalg.vector_norm(inverse, dim=1)
    fractional = torch.bmm(fields.pos.double()[:, None], inverse[batch])[:, 0][member]
    spread = fractional.amax(dim=1) - fractional.amin(dim=1)
    return widened(cutoff) * per_length + spread, 1 / per_length


def _squared_distances(plan: Plan, fields: Fields) -> Tensor:
    """From each atom to all images, [G n, n I] Angstrom^2, infinite where they are no neighbours.

    By the operations of :mod:`~fairchem_equiformer.graph.neighbors`, since the last bit decides.
    """
    own = fields.pos[plan.member]  # [G, n, 3]
    offset = in_order(plan.images.to(fields.cell.dtype), fields.cell[:, None])  # [G, I, 3]
    ghosts = (own[:, :, None] + offset[:, None]).to(own.dtype).flatten(1, 2)  # [G, n I, 3]
    x, y, z = (
        torch.square(a[:, :, None] - b[:, None])
        for a, b in zip(own.unbind(dim=2), ghosts.unbind(dim=2), strict=True)
    )
    distance_sqr = (x + y) + z  # [G, n, n I]
    place = torch.arange(own.shape[1], device=own.device)
    home = (plan.images == 0).all(dim=1)
    itself = ((place[:, None] == place)[:, :, None] & home).flatten(1)  # [n, n I]
    allowed = ((plan.images == 0) | plan.pbc[:, None]).all(dim=2)  # [G, I]
    there = (plan.real[:, :, None] & allowed[:, None]).flatten(1)  # [G, n I]
    near = distance_sqr <= plan.config.max_radius * plan.config.max_radius
    near &= ~itself & plan.real[:, :, None] & there[:, None]
    return torch.where(near, distance_sqr, torch.inf).flatten(0, 1)


def _places(chosen: Tensor, most: int) -> tuple[Tensor, Tensor]:
    """How many are chosen, [] int64; and where the first ones are, [most] int64, in order."""
    so_far = torch.cumsum(chosen.flatten(), dim=0)
    wanted = torch.arange(1, most + 1, device=chosen.device)
    return so_far[-1], torch.searchsorted(so_far, wanted).clamp(max=len(so_far) - 1)


def _edges(plan: Plan, place: Tensor) -> NeighborList:
    """Edges at places of the flattened table [G n, n I]."""
    most, images = plan.member.shape[1], len(plan.images)
    row = place // (most * images)
    source = place // images % most
    return NeighborList(
        source=plan.member[row // most, source],
        target=plan.member[row // most, row % most],
        image=plan.images[place % images],
        cut=place[:0],
    )


def _graph(
    plan: Plan, fields: Fields, edges: NeighborList, vector: Tensor, tags: Tensor | None
) -> EdgeGraph:
    """Of the plan's sizes; edges beyond their number, and atoms, hold anything that can be read."""
    sizes, config = plan.sizes, plan.config
    further = (0, sizes.atoms - len(fields.pos))
    numbers = fields.atomic_numbers.long().clamp(0, config.max_num_elements - 1)
    return EdgeGraph(
        source=edges.source,
        target=edges.target,
        target_ptr=edges.target,  # made by filled_up
        vector=vector,
        distance=vector.norm(dim=-1),
        atomic_numbers=pad(numbers, further),
        batch=pad(plan.batch, further),
        natoms=pad(plan.natoms, (0, sizes.graphs - len(plan.natoms))),
        tags=None if tags is None else pad(tags.long().clamp(0, NUM_TAGS - 1), further),
    )


def _wrong(fields: Fields, tags: Tensor | None, spacing: Tensor, config: GraphConfig) -> Tensor:
    """Whether the checks of :mod:`~fairchem_equiformer.graph.build` may find something, [] bool."""
    finite = fields.pos.isfinite().all() & fields.cell.isfinite().all()
    unit = ((spacing - 1).abs() < 1e-6).any()
    wrong = ~finite | unit | _out_of_range(fields.atomic_numbers, config.max_num_elements)
    return wrong if tags is None else wrong | _out_of_range(tags, NUM_TAGS)


def _out_of_range(numbers: Tensor, end: int) -> Tensor:
    whole = numbers.long()
    return ((whole != numbers) | (whole < 0) | (whole >= end)).any()
