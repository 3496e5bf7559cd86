"""Neighbour search under periodic boundary conditions, in time linear in the number of atoms.

The edges are those of fairchem-core 1.10 (``radius_graph_pbc``), in its order. Its rule for the
neighbours of an atom, with all comparisons on squared distances in the precision of the positions:

* candidates are all images of all atoms within the cutoff, the boundary included;
* strict: the ``max_neighbors`` nearest of them;
* not strict: all up to the squared distance of the ``max_neighbors + 1``-th plus 0.01 Angstrom^2.

Crystals are full of equal distances, which rounding makes unequal here and there, so that the last
bit decides: a squared distance is computed by the very operations of fairchem. Where the strict
mode still has to choose among equals, fairchem takes those that ``torch.sort`` happens to put first
in a table of all distances within the cutoff. That sort is not stable on the CPU: its choice hangs
on the width of the table, which is the largest number of candidates of any atom in the batch. So
the same table is built and sorted, for the atoms that have such a tie, if there are any. This is
the only way in which the rest of a batch can change the edges of a structure.

The search around this is free to do as it likes. Atoms that may matter are copied into a shell
around their cell ("ghosts") and sorted into columns; each target looks through the columns around
it. It starts with a radius that should hold enough neighbours and asks again with a larger one for
the atoms that did not get them: far fewer pairs are looked at than there are within the cutoff, and
which radii are tried has no influence on the result. Unlike fairchem's, it does not depend on how
atoms are wrapped into the cell.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.nn.functional import pad

if TYPE_CHECKING:
    from collections.abc import Iterator

_Length = TypeVar("_Length", float, Tensor)

TIE_TOLERANCE = 0.01
"""Angstrom^2 by which the non-strict mode exceeds the first neighbour beyond ``max_neighbors``."""

ROUNDING = 32
"""Squared distances nearer than this times their last digit are equal: positions are rounded."""

_PAIRS_AT_ONCE = 1 << 18  # candidate pairs in flight: bounds the memory, about 100 bytes a pair
_SURPLUS = 2.0  # neighbours expected in the first radius, over those wanted
_GROWTH = 2.0  # of the radius from one round to the next
_COLUMNS = 2  # columns per search radius across, in x and in y
_LAYERS = 8  # layers per search radius along a column, in z
_MAX_BINS = 1 << 16  # per direction: keeps sort keys within 64 bits however far atoms are apart


class NeighborList(NamedTuple):
    """Directed edges, sorted by target, then source, then image."""

    source: Tensor  # [E] int64
    target: Tensor  # [E] int64
    image: Tensor  # [E, 3] int64, lattice vectors to add to the source's position
    cut: Tensor  # [A] int64, atoms whose nearest lost neighbour is as far as their farthest one


class _Edges(NamedTuple):
    source: Tensor  # [E] int64
    target: Tensor  # [E] int64
    image: Tensor  # [E, 3] int64


class _Rule(NamedTuple):
    cutoff: float
    max_neighbors: int
    strict: bool


@dataclass(frozen=True)
class _Atoms:
    """What all rounds of the search share."""

    pos: Tensor  # [N, 3] as given
    cell: Tensor  # [G, 3, 3] as given
    batch: Tensor  # [N] int64
    lattice: Tensor  # [G, 3, 3] float64, rows of directions that are not periodic are zero
    per_length: Tensor  # [G, 3] float64, 1 / spacing of the lattice planes; 0 if not periodic
    fractional: Tensor  # [N, 3] float64, about 0 to 1; 0 in directions that are not periodic
    wrapped: Tensor  # [N, 3] positions, those far outside their cell moved into it
    home: Tensor  # [N, 3] int64, pos = wrapped + home @ lattice
    unwrapped: bool  # some home is not zero
    images: float  # of a cell that fairchem's table of this batch has


class _Ghosts(NamedTuple):
    """Images of atoms within reach of the targets, ordered by atom, then by image."""

    atom: Tensor  # [M] int64
    image: Tensor  # [M, 3] int64, of the wrapped atom
    pos: Tensor  # [M, 3]


class _Columns(NamedTuple):
    """Ghosts sorted into columns along z, and where in them each target has to look."""

    ghost: Tensor  # [M] int64, ghosts in sorted order
    pos: Tensor  # [M, 3] of these
    start: Tensor  # [T, columns] int64, first place in that order
    length: Tensor  # [T, columns] int64


class _Pairs(NamedTuple):
    """Pairs within the cutoff, of each target all up to some radius at least."""

    row: Tensor  # [P] int64, ascending, index into the targets
    ghost: Tensor  # [P] int64
    distance_sqr: Tensor  # [P] Angstrom^2


def plane_spacings(cell: Tensor, pbc: Tensor) -> Tensor:
    """Distance between neighbouring lattice planes along each periodic direction.

    Args:
        cell: [G, 3, 3] Angstrom, lattice vectors as rows.
        pbc: [G, 3] bool.

    Returns:
        [G, 3] float64 on the CPU, Angstrom. Infinite where not periodic; zero in all periodic
        directions where the periodic vectors are linearly dependent.
    """
    cell, pbc = cell.cpu(), pbc.cpu()
    lattice, inverse = _lattice(cell, pbc)
    unit = torch.diag_embed(pbc.double())
    dependent = ((lattice @ inverse - unit).abs() > 1e-6).flatten(1).any(dim=1)
    spacing = 1 / torch.linalg.vector_norm(inverse, dim=1)
    spacing = torch.where(dependent.unsqueeze(1), 0.0, spacing)
    return torch.where(pbc, spacing, torch.inf)


@torch.no_grad()
def neighbor_list(
    pos: Tensor,
    cell: Tensor,
    pbc: Tensor,
    natoms: Tensor,
    *,
    cutoff: float,
    max_neighbors: int,
    strict: bool,
) -> NeighborList:
    """Find the neighbours of every atom among all periodic images; see the module for the rule.

    An atom is its own neighbour only through an image. Atoms at one point are found like others.

    Args:
        pos: [N, 3] Angstrom, atoms of a structure contiguous, finite, wrapped or not.
        cell: [G, 3, 3] Angstrom, lattice vectors as rows; those of directions that are not
            periodic are ignored, the others are linearly independent (`plane_spacings`).
        pbc: [G, 3] bool, periodic directions of each structure.
        natoms: [G] int64, atoms of each structure.
        cutoff: Angstrom.
        max_neighbors: Neighbours kept for an atom; zero or less keeps all.
        strict: Keep no more than that among equally distant ones.

    Returns:
        Edges sorted by target, then source, then image, and the atoms for which the strict mode
        chose among neighbours that are equally far, up to rounding.
    """
    if len(pos) == 0:
        nothing = natoms.new_empty(0)
        return NeighborList(nothing, nothing, natoms.new_empty(0, 3), nothing)
    rule = _Rule(cutoff, max_neighbors, strict)
    atoms = _prepare(pos, cell, pbc, natoms, cutoff)
    radius = _first_radius(atoms, pbc, natoms, rule)
    pending = torch.arange(len(pos), device=pos.device)
    found, cut, tied = [], [], []
    while len(pending) > 0:
        incomplete = []
        ghosts = _ghosts(atoms, pending, radius)
        for targets, pairs in _pairs(atoms, pending, ghosts, radius, cutoff):
            limit, tie, close = _limit(pairs, len(targets), rule)
            target_radius = radius[atoms.batch[targets]]
            complete = (limit <= target_radius**2) | (target_radius >= cutoff)
            incomplete.append(targets[~complete])
            # All that is equal up to rounding in one step: each makes the host wait for a GPU.
            close = torch.nonzero(complete & close).squeeze(1)
            cut.append(targets[close])
            tied.append(tie[close])
            limit = torch.where(complete & ~tie, limit, -1.0)
            chosen = torch.nonzero(pairs.distance_sqr <= limit[pairs.row]).squeeze(1)
            found.append(_edges(atoms, targets, ghosts, _in_order(pairs, ghosts, chosen)))
        pending = torch.cat(incomplete)
        radius = (radius * _GROWTH).clamp(max=cutoff)
    undecided = torch.cat(cut)
    if len(undecided) > 0:
        found += _break_ties(atoms, undecided[torch.cat(tied)], rule)
    source, target, image = (torch.cat(parts) for parts in zip(*found, strict=True))
    order = torch.argsort(target, stable=True)
    return NeighborList(source[order], target[order], image[order], undecided)


def _lattice(cell: Tensor, pbc: Tensor) -> tuple[Tensor, Tensor]:
    """Periodic lattice vectors (others zero) and their pseudo-inverse, [G, 3, 3] float64, CPU."""
    lattice = cell.detach().double() * pbc.unsqueeze(2)
    return lattice, torch.linalg.pinv(lattice)


def _prepare(pos: Tensor, cell: Tensor, pbc: Tensor, natoms: Tensor, cutoff: float) -> _Atoms:
    on_host = pbc.cpu()
    lattice, inverse = _lattice(cell.cpu(), on_host)
    per_length = torch.linalg.vector_norm(inverse, dim=1) * on_host
    repeats = torch.ceil(cutoff * per_length.amax(dim=0))
    lattice, inverse, per_length = (x.to(pos.device) for x in (lattice, inverse, per_length))
    batch = torch.repeat_interleave(natoms, output_size=len(pos))
    fractional = torch.einsum("ni,nij->nj", pos.double(), inverse[batch]) * pbc[batch]
    # Only atoms far outside are wrapped: for the others an image is the same before and after.
    home = torch.where((fractional - 0.5).abs() < 1, 0, fractional.floor())
    shift = torch.einsum("ni,nij->nj", home, lattice[batch])
    return _Atoms(
        pos=pos,
        cell=cell,
        batch=batch,
        lattice=lattice,
        per_length=per_length,
        fractional=fractional - home,
        wrapped=(pos - shift).to(pos.dtype),
        home=home.long(),
        unwrapped=bool(home.any()),
        images=(2 * repeats + 1).prod().item(),
    )


def _first_radius(atoms: _Atoms, pbc: Tensor, natoms: Tensor, rule: _Rule) -> Tensor:
    """Radius for the first round, [G] Angstrom, from the density of the space that has atoms."""
    if rule.max_neighbors <= 0:
        return atoms.wrapped.new_full((len(natoms),), rule.cutoff)
    extent = _segment(atoms.wrapped, "max", natoms) - _segment(atoms.wrapped, "min", natoms)
    occupied = (extent + 2).prod(dim=1)  # an atom takes about 1 Angstrom each way
    volume = torch.where(pbc.all(dim=1), torch.linalg.det(atoms.lattice).abs(), torch.inf)
    volume_per_atom = torch.minimum(occupied, volume) / natoms
    wanted = _SURPLUS * (rule.max_neighbors + 1)
    radius = (wanted * volume_per_atom * 3 / (4 * math.pi)).pow(1 / 3)
    return radius.nan_to_num(nan=rule.cutoff).clamp(max=rule.cutoff)


def _segment(values: Tensor, reduce: str, lengths: Tensor) -> Tensor:
    # A check that the lengths add up, which "unsafe" leaves out, would make the host wait.
    reduced: Tensor = torch.segment_reduce(values, reduce, lengths=lengths, axis=0, unsafe=True)
    return reduced


def _lengths(ascending: Tensor, groups: int) -> Tensor:
    """How often each number below `groups` occurs: [groups] int64. The host does not wait."""
    bounds = torch.arange(groups + 1, device=ascending.device)
    return torch.searchsorted(ascending.contiguous(), bounds).diff()


def widened(radius: _Length) -> _Length:
    """A little more than the radius: the distances that decide are rounded otherwise."""
    return 1.001 * radius + 0.01


def _pairs(
    atoms: _Atoms, targets: Tensor, ghosts: _Ghosts, radius: Tensor, cutoff: float
) -> Iterator[tuple[Tensor, _Pairs]]:
    """Look around the targets; yield bounded runs of them, in order, with their pairs."""
    reach = widened(radius)
    columns = _sort_into_columns(atoms, targets, ghosts, reach)
    itself = _places(ghosts, len(atoms.pos))
    for run in _runs(columns.length.sum(dim=1)):
        looked_at = columns._replace(start=columns.start[run], length=columns.length[run])
        pairs = _candidates(atoms, targets[run], looked_at, reach)
        if atoms.unwrapped:
            pairs = pairs._replace(distance_sqr=_exact(atoms, targets[run], ghosts, pairs))
        other = pairs.ghost != itself[targets[run]].index_select(0, pairs.row)
        near = torch.nonzero((pairs.distance_sqr <= cutoff * cutoff) & other).squeeze(1)
        yield targets[run], _Pairs(*(values.index_select(0, near) for values in pairs))


def _ghosts(atoms: _Atoms, targets: Tensor, radius: Tensor) -> _Ghosts:
    """All images of atoms in the parallelepiped around the targets, widened by the radius."""
    lengths = _lengths(atoms.batch[targets], len(radius))
    widening = widened(radius).unsqueeze(1) * atoms.per_length  # [G, 3]
    low = _segment(atoms.fractional[targets], "min", lengths) - widening
    high = _segment(atoms.fractional[targets], "max", lengths) + widening
    atom = torch.nonzero(lengths[atoms.batch] > 0).squeeze(1)
    graph, fractional = atoms.batch[atom], atoms.fractional[atom]
    first = torch.ceil(low[graph] - fractional).long()
    last = torch.floor(high[graph] - fractional).long()
    extent = (last - first + 1).clamp(min=0)  # [S, 3] images along each direction
    rank, owner = _enumerate(extent.prod(dim=1))
    size_b, size_c = extent[owner, 1], extent[owner, 2]
    place = torch.stack((rank // (size_b * size_c), rank // size_c % size_b, rank % size_c), dim=1)
    atom, image = atom[owner], first[owner] + place
    pos = atoms.wrapped[atom] + _image_offset(atoms, atoms.batch[atom], image)
    return _Ghosts(atom, image, pos.to(atoms.pos.dtype))


def _places(ghosts: _Ghosts, atoms: int) -> Tensor:
    """Where among the ghosts each atom is itself, [N] int64; -1 if it is not there."""
    itself = torch.nonzero((ghosts.image == 0).all(dim=1)).squeeze(1)
    return torch.full((atoms,), -1, device=itself.device).index_copy_(
        0, ghosts.atom[itself], itself
    )


def _enumerate(lengths: Tensor) -> tuple[Tensor, Tensor]:
    """Number the members of consecutive groups: rank within the group, and group, of each."""
    owner = torch.repeat_interleave(lengths)
    first = torch.cumsum(lengths, dim=0) - lengths
    return torch.arange(len(owner), device=owner.device) - first[owner], owner


def _sort_into_columns(atoms: _Atoms, targets: Tensor, ghosts: _Ghosts, reach: Tensor) -> _Columns:
    """Sort ghosts by structure, x, y and layer in z; find each target's stretch of each column."""
    graph, target_graph = atoms.batch[ghosts.atom], atoms.batch[targets]
    per_length = reach.new_tensor([_COLUMNS, _COLUMNS, _LAYERS]) / reach.unsqueeze(1)  # [G, 3]
    bins = ghosts.pos * per_length[graph]
    origin = bins.amin(dim=0) - _COLUMNS - 1  # leaves room beside the outermost columns
    bins = (bins - origin).clamp(max=_MAX_BINS).long()
    size_x, size_y, size_z = (bins.amax(dim=0) + _COLUMNS + 1).unbind()

    def key(graph: Tensor, x: Tensor, y: Tensor, z: Tensor) -> Tensor:
        return ((graph * size_x + x) * size_y + y) * size_z + z

    sorted_keys, order = torch.sort(key(graph, *bins.unbind(dim=1)))
    place = atoms.wrapped[targets] * per_length[target_graph] - origin
    x, y, _ = place.clamp(max=_MAX_BINS).long().unsqueeze(2).unbind(dim=1)  # [T, 1]
    z = place[:, 2:]
    low = (z - _LAYERS).clamp(min=0, max=_MAX_BINS).long()
    high = torch.minimum((z + _LAYERS).clamp(max=_MAX_BINS).long(), size_z - 1)
    step = torch.arange(-_COLUMNS, _COLUMNS + 1, device=reach.device)
    dx, dy = torch.cartesian_prod(step, step).unbind(dim=1)  # [columns]
    column = (target_graph.unsqueeze(1), x + dx, y + dy)
    start = torch.searchsorted(sorted_keys, key(*column, low))
    end = torch.searchsorted(sorted_keys, key(*column, high), right=True)
    return _Columns(order, ghosts.pos[order], start, end - start)


def _runs(sizes: Tensor) -> list[slice]:
    """Cut a list into runs whose sizes add up to about `_PAIRS_AT_ONCE`."""
    run = (torch.cumsum(sizes, dim=0) // _PAIRS_AT_ONCE).cpu()
    ends = torch.cumsum(torch.unique_consecutive(run, return_counts=True)[1], dim=0).tolist()
    return [slice(start, end) for start, end in zip([0, *ends[:-1]], ends, strict=True)]


def _candidates(atoms: _Atoms, targets: Tensor, columns: _Columns, reach: Tensor) -> _Pairs:
    """All pairs within reach."""
    length = columns.length.flatten()
    jump = columns.start.flatten() - torch.cumsum(length, dim=0) + length
    place = torch.repeat_interleave(jump, length)
    place += torch.arange(len(place), device=place.device)
    row = torch.repeat_interleave(columns.length.sum(dim=1), output_size=len(place))
    distance_sqr = _distance_sqr(atoms.wrapped[targets], row, columns.pos, place)
    limit = (reach**2)[atoms.batch[targets]].to(distance_sqr.dtype)
    near = torch.nonzero(distance_sqr <= limit.index_select(0, row)).squeeze(1)
    ghost = columns.ghost.index_select(0, place.index_select(0, near))
    return _Pairs(row.index_select(0, near), ghost, distance_sqr.index_select(0, near))


def _exact(atoms: _Atoms, targets: Tensor, ghosts: _Ghosts, pairs: _Pairs) -> Tensor:
    """Squared distances between positions as given, before any wrapping, [P] Angstrom^2."""
    target = targets[pairs.row]
    image = _given_image(atoms, target, ghosts, pairs.ghost)
    source = atoms.pos[ghosts.atom[pairs.ghost]] + _image_offset(atoms, atoms.batch[target], image)
    return _distance_sqr(atoms.pos, target, source, torch.arange(len(source), device=target.device))


def _given_image(atoms: _Atoms, target: Tensor, ghosts: _Ghosts, ghost: Tensor) -> Tensor:
    """Images between positions as given, before any wrapping, [P, 3] int64."""
    return ghosts.image[ghost] - atoms.home[ghosts.atom[ghost]] + atoms.home[target]


def _distance_sqr(pos: Tensor, row: Tensor, other: Tensor, other_row: Tensor) -> Tensor:
    """Squared distances, [P] Angstrom^2, summed in fairchem's order."""
    # A component at a time: torch gathers single numbers much faster than rows of three.
    x, y, z = (
        torch.square(a.index_select(0, row) - b.index_select(0, other_row))
        for a, b in zip(pos.T.contiguous(), other.T.contiguous(), strict=True)
    )
    return (x + y) + z


def _in_order(pairs: _Pairs, ghosts: _Ghosts, chosen: Tensor) -> _Pairs:
    """The chosen pairs in the order of the result: by target, source and image."""
    key = pairs.row[chosen] * len(ghosts.atom) + pairs.ghost[chosen]
    chosen = chosen[torch.argsort(key)]
    return _Pairs(*(values[chosen] for values in pairs))


def _edges(atoms: _Atoms, targets: Tensor, ghosts: _Ghosts, pairs: _Pairs) -> _Edges:
    target = targets[pairs.row]
    image = _given_image(atoms, target, ghosts, pairs.ghost)
    return _Edges(ghosts.atom[pairs.ghost], target, image)


def _image_offset(atoms: _Atoms, graph: Tensor, image: Tensor) -> Tensor:
    """``image @ cell``, [P, 3] Angstrom, to the last bit as fairchem's search has it.

    That multiplies every cell with a table of all images in one ``bmm``. Under 400 multiply-adds
    torch sums in order; above, the order is known only to the BLAS library, so it is asked. On a
    GPU that might round the cell to TF32 and move images by 0.01 Angstrom: there, too, in order.
    """
    image = image.to(atoms.cell.dtype)
    if atoms.cell.is_cuda or 9 * atoms.images < 400:
        return in_order(image, atoms.cell[graph])
    counts = _lengths(graph, len(atoms.cell)).tolist()
    offsets = []
    for cell, images in zip(atoms.cell, torch.split(image, counts), strict=True):
        table = pad(images, (0, 0, 0, max(0, 45 - len(images))))
        product = torch.bmm(cell.T.unsqueeze(0), table.T.unsqueeze(0))
        offsets.append(product[0].T[: len(images)])
    return torch.cat(offsets)


def in_order(image: Tensor, cell: Tensor) -> Tensor:
    """``image @ cell``, [..., 3] of [..., 3] and [..., 3, 3], summed from the first vector on."""
    a, b, c = cell.unbind(dim=-2)
    return (image[..., :1] * a + image[..., 1:2] * b) + image[..., 2:] * c


def _limit(pairs: _Pairs, rows: int, rule: _Rule) -> tuple[Tensor, Tensor, Tensor]:
    """As :func:`accepted`, for each of so many rows of pairs."""
    count = _lengths(pairs.row, rows)
    width, k = int(count.max()), rule.max_neighbors
    table = pairs.distance_sqr.new_empty(rows, 0)
    if 0 < k < width:
        table = _table(pairs, count, width)
    return accepted(table, k, strict=rule.strict)


def accepted(table: Tensor, k: int, *, strict: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Largest squared distance that each target accepts, and whether the strict rule cuts a tie.

    Args:
        table: [T, width] Angstrom^2, within the cutoff; infinite where there is no neighbour.
        k: ``max_neighbors``.
        strict: see the module.

    Returns:
        [T] Angstrom^2, infinite if all pairs are accepted; [T] bool, whether more accept it
        than may; [T] bool, whether more are that far up to rounding.
    """
    limit = table.new_full((len(table),), torch.inf)
    tie = torch.zeros_like(limit, dtype=torch.bool)
    if k <= 0 or table.shape[1] <= k:
        return limit, tie, tie
    nearest = torch.topk(table, k + 1, dim=1, largest=False).values
    full = nearest[:, k] < torch.inf
    if not strict:
        return torch.where(full, nearest[:, k] + TIE_TOLERANCE, limit), tie, tie
    last, lost = nearest[:, k - 1], nearest[:, k]
    rounding = ROUNDING * torch.finfo(last.dtype).eps
    return (
        torch.where(full, last, limit),
        full & (last == lost),
        full & (lost - last <= rounding * last),
    )


def _table(pairs: _Pairs, count: Tensor, width: int) -> Tensor:
    """Squared distances of each row side by side, [rows, width], filled up with infinity."""
    table = pairs.distance_sqr.new_full((len(count), width), torch.inf)
    first = torch.cumsum(count, dim=0) - count
    gap = torch.arange(len(count), device=count.device) * width - first
    place = torch.arange(len(pairs.row), device=count.device) + gap.index_select(0, pairs.row)
    table.view(-1).index_copy_(0, place, pairs.distance_sqr)
    return table


def _break_ties(atoms: _Atoms, tied: Tensor, rule: _Rule) -> list[_Edges]:
    """Edges of the targets where the strict rule has to choose among equals, as fairchem does."""
    if len(tied) == 0:
        return []
    everyone = torch.arange(len(atoms.batch), device=tied.device)
    is_tied = torch.zeros_like(everyone, dtype=torch.bool).index_fill_(0, tied, 1)
    radius = atoms.per_length.new_full((len(atoms.cell),), rule.cutoff)
    ghosts = _ghosts(atoms, everyone, radius)
    width, undecided = 0, []
    for targets, pairs in _pairs(atoms, everyone, ghosts, radius, rule.cutoff):
        width = max(width, int(torch.bincount(pairs.row, minlength=1).max()))
        mine = torch.nonzero(is_tied[targets].index_select(0, pairs.row)).squeeze(1)
        undecided.append((targets, _in_order(pairs, ghosts, mine)))
    decided = []
    for targets, pairs in undecided:
        _, row, count = torch.unique_consecutive(pairs.row, return_inverse=True, return_counts=True)
        table = _table(pairs._replace(row=row), count, width)
        nearest = torch.sort(table, dim=1).indices[:, : rule.max_neighbors]
        first = torch.cumsum(count, dim=0) - count
        chosen = (first.unsqueeze(1) + nearest).flatten().sort().values
        edges = _edges(atoms, targets, ghosts, _Pairs(*(values[chosen] for values in pairs)))
        decided.append(edges)
    return decided
