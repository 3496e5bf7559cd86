"""The neighbour search finds fairchem's edges, in its order, at a cost linear in the atoms."""

from __future__ import annotations

import ase
import numpy as np
import pytest
import torch
from ase.build import add_adsorbate, bulk, fcc100, fcc111, hcp0001, molecule
from fairchem.core.common.utils import radius_graph_pbc
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch_geometric.data import Data

from fairchem_equiformer.graph import neighbors
from fairchem_equiformer.graph.neighbors import neighbor_list, plane_spacings
from tests.structures import rutile

PERIODIC = (True, True, True)


def slab(size=(2, 2, 3), rattle=0.05):
    atoms = fcc111("Cu", size, vacuum=6)
    add_adsorbate(atoms, molecule("CH3CH2OH"), 2.0, "ontop")
    if rattle:
        atoms.rattle(rattle, seed=1)
    return atoms


def turned(atoms):
    """The same crystal in a general orientation: no component of its vectors is zero."""
    atoms = atoms.copy()
    atoms.rotate(37, (1, 2, 3), rotate_cell=True)
    return atoms


# Nothing but ties: every shell of every atom is at one distance, up to rounding.
CRYSTALS = {
    "fcc, one atom": bulk("Cu", "fcc", a=3.61),
    "fcc, one atom, turned": turned(bulk("Cu", "fcc", a=3.61)),
    "fcc, cube": bulk("Ni", "fcc", a=3.52, cubic=True),
    "bcc, one atom": bulk("Fe", "bcc", a=2.87),
    "bcc, one atom, turned": turned(bulk("Fe", "bcc", a=2.87)),
    "bcc, supercell": bulk("Fe", "bcc", a=2.87, cubic=True) * (2, 2, 1),
    "diamond": bulk("Si", "diamond", a=5.43),
    "rock salt, turned": turned(bulk("NaCl", "rocksalt", a=5.64)),
    "fcc slab": fcc100("Pt", (2, 2, 3), vacuum=8),
    "hcp slab": hcp0001("Ru", (2, 2, 3), vacuum=6),
    "slab with adsorbate": slab(rattle=0),
}


def batch_of(*structures, dtype=torch.float32):
    return Data(
        pos=torch.tensor(np.concatenate([s.positions for s in structures]), dtype=dtype),
        cell=torch.tensor(np.stack([s.cell.array for s in structures]), dtype=dtype),
        natoms=torch.tensor([len(s) for s in structures]),
    )


def fairchem_edges(batch, cutoff, max_neighbors, strict):
    edge_index, image, _ = radius_graph_pbc(batch, cutoff, max_neighbors, strict)
    return torch.cat((edge_index.T, image.long()), dim=1)  # [E, 5]


def neighbours(batch, cutoff, max_neighbors, strict, pbc=PERIODIC):
    pbc = torch.tensor(pbc).expand(len(batch.natoms), 3)
    return neighbor_list(
        batch.pos,
        batch.cell,
        pbc,
        batch.natoms,
        cutoff=cutoff,
        max_neighbors=max_neighbors,
        strict=strict,
    )


def our_edges(*args, **options):
    found = neighbours(*args, **options)
    return torch.cat((found.source[:, None], found.target[:, None], found.image), dim=1)


def fairchem_pairs(batch, cutoff):
    """How many pairs fairchem's search holds in memory at once."""
    spacing = plane_spacings(batch.cell, torch.ones(len(batch.natoms), 3, dtype=torch.bool))
    images = (2 * torch.ceil(cutoff / spacing.amin(dim=0)) + 1).prod().item()
    return images * (batch.natoms**2).sum().item()


def all_distances(batch, cutoff, images):
    """Distances of all pairs within the cutoff, straight from the definition: {edge: distance}."""
    found = {}
    for n in np.ndindex(*(2 * i + 1 for i in images)):
        image = np.array(n) - images
        shift = torch.tensor(image, dtype=batch.cell.dtype) @ batch.cell[0]
        separation = batch.pos[None] + shift - batch.pos[:, None]  # [target, source, 3]
        distance = separation.norm(dim=2)
        for target, source in (distance <= cutoff).nonzero().tolist():
            if source != target or image.any():
                found[(source, target, *image)] = distance[target, source].item()
    return found


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("max_neighbors", [1, 5, 12, 20, 50, 0])
@pytest.mark.parametrize("name", CRYSTALS)
def test_crystals_have_fairchems_edges(name, max_neighbors, strict):
    batch = batch_of(CRYSTALS[name])
    args = (batch, 8.0, max_neighbors, strict)
    assert torch.equal(our_edges(*args), fairchem_edges(*args))


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("cutoff", [3.0, 6.0, 12.0])
def test_a_batch_of_all_has_fairchems_edges(cutoff, strict):
    few = cutoff == 12.0  # fairchem's table for all of them would take many GB
    batch = batch_of(*list(CRYSTALS.values())[: 3 if few else None], *([] if few else [slab()]))
    args = (batch, cutoff, 20, strict)
    assert torch.equal(our_edges(*args), fairchem_edges(*args))


@st.composite
def structures(draw):
    """Cells from cubes to needles, plates and skewed ones, tiny to large, with a few atoms."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    lengths = [draw(st.sampled_from([1.5, 3.0, 6.0, 15.0, 60.0])) for _ in range(3)]
    skew = draw(st.sampled_from([0.0, 0.3, 2.0]))
    cell = np.diag(lengths)
    cell[1, 0], cell[2, :2] = skew * lengths[0], skew * np.array(lengths[:2])
    cell += rng.normal(scale=0.05, size=(3, 3))
    natoms = draw(st.integers(1, 6))
    return ase.Atoms(f"H{natoms}", scaled_positions=rng.random((natoms, 3)), cell=cell)


@settings(max_examples=40, deadline=None)
@given(
    batch=st.lists(structures(), min_size=1, max_size=3),
    cutoff=st.sampled_from([2.0, 4.0]),
    max_neighbors=st.sampled_from([1, 4, 20, 100]),
    strict=st.booleans(),
)
def test_any_cell_has_fairchems_edges(batch, cutoff, max_neighbors, strict):
    batch = batch_of(*batch)
    assume(fairchem_pairs(batch, cutoff) < 1e6)
    args = (batch, cutoff, max_neighbors, strict)
    assert torch.equal(our_edges(*args), fairchem_edges(*args))


@settings(max_examples=30, deadline=None)
@given(
    atoms=structures(),
    seed=st.integers(0, 2**32 - 1),
    far=st.sampled_from([1, 3, 1000]),
    max_neighbors=st.sampled_from([0, 10]),
)
def test_wrapping_moves_images_and_nothing_else(atoms, seed, far, max_neighbors):
    # Not strict: an atom's own images come in pairs at one distance.
    home = torch.tensor(np.random.default_rng(seed).integers(-far, far + 1, (len(atoms), 3)))
    batch = batch_of(atoms, dtype=torch.float64)
    edges = our_edges(batch, 4.0, max_neighbors, False)
    batch.pos = batch.pos + home.double() @ batch.cell[0]
    moved = our_edges(batch, 4.0, max_neighbors, False)
    moved[:, 2:] += home[moved[:, 0]] - home[moved[:, 1]]
    assert torch.equal(moved, edges)


def test_unwrapped_atoms_have_fairchems_edges_where_it_has_all():
    # A large cell: fairchem's images reach as far as the atoms that are a little outside.
    atoms = slab((5, 5, 2))
    atoms.positions += 1.6 * atoms.cell[0]
    batch = batch_of(atoms)
    for strict in (True, False):
        args = (batch, 4.0, 8, strict)
        assert torch.equal(our_edges(*args), fairchem_edges(*args))


@pytest.mark.parametrize("shift", [0.0, 0.3])
def test_cut_ties_are_told(shift):
    """Also of a crystal moved by 0.3 Angstrom, where rounding has made equals unequal."""
    crystal, disordered = rutile(), slab()
    crystal.translate(shift)
    batch = batch_of(disordered, crystal)
    metal = [len(disordered), len(disordered) + 1]  # oxygen's 20th and 21st are not equally far
    assert neighbours(batch, 8.0, 20, strict=True).cut.tolist() == metal
    assert len(neighbours(batch, 8.0, 20, strict=False).cut) == 0
    assert len(neighbours(batch, 8.0, 0, strict=True).cut) == 0


@pytest.mark.parametrize("strict", [True, False])
def test_the_rest_of_the_batch_does_not_matter(strict):
    alone = [slab(), turned(slab((2, 3, 2))), bulk("Cu") * (1, 1, 5), slab((4, 4, 3))]
    for i, atoms in enumerate(alone):
        atoms.rattle(0.1, seed=i)
    together = our_edges(batch_of(*alone), 12.0, 20, strict)
    first = 0
    for atoms in alone:
        here = (together[:, 1] >= first) & (together[:, 1] < first + len(atoms))
        expected = our_edges(batch_of(atoms), 12.0, 20, strict)
        expected[:, :2] += first
        assert torch.equal(together[here], expected)
        first += len(atoms)


@pytest.mark.parametrize(
    "pbc",
    [(True, True, False), (False, True, False), (True, False, True), (False, False, False)],
)
@pytest.mark.parametrize("strict", [True, False])
def test_directions_that_are_not_periodic_have_no_images(pbc, strict):
    batch = batch_of(turned(slab()), slab((3, 2, 2)))
    batch.pbc = torch.tensor([pbc, pbc])
    args = (batch, 6.0, 12, strict)
    assert torch.equal(our_edges(*args, pbc), fairchem_edges(*args))


def test_directions_that_are_not_periodic_need_no_lattice_vector():
    batch = batch_of(slab())
    pbc = (True, True, False)
    expected = our_edges(batch, 6.0, 12, True, pbc)
    batch.cell[:, 2] = 0
    assert torch.equal(our_edges(batch, 6.0, 12, True, pbc), expected)


def test_structures_of_a_batch_may_be_periodic_in_different_directions():
    batch = batch_of(slab(), slab())
    natoms = int(batch.natoms[0])
    edges = our_edges(batch, 6.0, 12, True, [PERIODIC, (False, False, False)])
    isolated = edges[edges[:, 1] >= natoms] - torch.tensor([natoms, natoms, 0, 0, 0])
    assert torch.equal(isolated, our_edges(batch_of(slab()), 6.0, 12, True, (False,) * 3))
    assert torch.equal(edges[edges[:, 1] < natoms], our_edges(batch_of(slab()), 6.0, 12, True))


@pytest.mark.parametrize("name", ["fcc, cube", "slab with adsorbate"])
def test_double_precision_agrees_with_the_definition(name):
    batch = batch_of(CRYSTALS[name], dtype=torch.float64)
    batch.pos += 0.05 * torch.randn_like(batch.pos)
    expected = all_distances(batch, 5.0, images=(3, 3, 3))
    assert set(map(tuple, our_edges(batch, 5.0, 0, True).tolist())) == set(expected)

    k = 7
    nearest = set()
    for atom in range(len(batch.pos)):
        mine = sorted((d, edge) for edge, d in expected.items() if edge[1] == atom)
        nearest.update(edge for _, edge in mine[:k])
    assert set(map(tuple, our_edges(batch, 5.0, k, True).tolist())) == nearest


def test_atoms_at_one_point_are_neighbours_but_no_atom_is_its_own():
    atoms = ase.Atoms("H2", positions=np.ones((2, 3)), cell=np.eye(3) * 50)
    assert our_edges(batch_of(atoms), 5.0, 20, True).tolist() == [[1, 0, 0, 0, 0], [0, 1, 0, 0, 0]]


def test_a_lone_atom_and_no_atoms_have_no_edges():
    lone = ase.Atoms("H", cell=np.eye(3) * 50)
    assert our_edges(batch_of(lone), 12.0, 20, True).shape == (0, 5)
    nothing = Data(
        pos=torch.zeros(0, 3), cell=torch.zeros(0, 3, 3), natoms=torch.zeros(0, dtype=torch.long)
    )
    assert our_edges(nothing, 12.0, 20, True).shape == (0, 5)


def test_a_structure_without_atoms_leaves_the_others_alone():
    batch = batch_of(slab(), slab())
    batch.natoms = torch.tensor([0, len(slab()), len(slab()), 0])
    batch.cell = batch.cell[[0, 0, 1, 1]]
    expected = our_edges(batch_of(slab(), slab()), 6.0, 12, True)
    assert torch.equal(our_edges(batch, 6.0, 12, True), expected)


def test_distance_of_atoms_far_apart_costs_no_memory():
    atoms = ase.Atoms("H4", positions=[(0, 0, 0), (1, 0, 0), (1e6, 0, 3e5), (1e6, 1, 3e5)])
    edges = our_edges(batch_of(atoms), 2.0, 20, True, pbc=(False,) * 3)
    assert edges[:, :2].tolist() == [[1, 0], [0, 1], [3, 2], [2, 3]]


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("_PAIRS_AT_ONCE", 1),
        ("_PAIRS_AT_ONCE", 1000),
        ("_SURPLUS", 0.1),
        ("_SURPLUS", 1e6),
        ("_COLUMNS", 1),
        ("_LAYERS", 1),
        ("_MAX_BINS", 3),
    ],
)
@pytest.mark.parametrize("strict", [True, False])
def test_how_it_searches_does_not_change_what_it_finds(monkeypatch, setting, value, strict):
    batch = batch_of(slab(rattle=0), CRYSTALS["fcc, one atom, turned"], slab((3, 2, 2)))
    expected = our_edges(batch, 6.0, 12, strict)
    monkeypatch.setattr(neighbors, setting, value)
    assert torch.equal(our_edges(batch, 6.0, 12, strict), expected)


@pytest.mark.gpu
@pytest.mark.parametrize("strict", [True, False])
def test_gpu_finds_the_same(strict):
    batch = batch_of(slab(), turned(slab((3, 2, 2))), slab((8, 8, 4)))
    expected = our_edges(batch, 12.0, 20, strict)
    pbc = torch.ones(3, 3, dtype=torch.bool, device="cuda")
    settings = {"cutoff": 12.0, "max_neighbors": 20, "strict": strict}
    found = neighbor_list(batch.pos.cuda(), batch.cell.cuda(), pbc, batch.natoms.cuda(), **settings)
    found = torch.cat((found.source[:, None], found.target[:, None], found.image), dim=1)
    assert torch.equal(found.cpu(), expected)


class TensorSizes(TorchDispatchMode):
    """The largest number of elements of any result, and the sum over all of them."""

    def __init__(self):
        super().__init__()
        self.largest = self.total = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for result in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(result, torch.Tensor):
                self.largest = max(self.largest, result.numel())
                self.total += result.numel()
        return out


@pytest.mark.parametrize("rattle", [0.05, 0.0])
def test_cost_is_linear_in_the_atoms(rattle):
    sizes = []
    for n in (14, 28):
        batch = batch_of(slab((n, n, 2), rattle))
        with TensorSizes() as size:
            our_edges(batch, 12.0, 20, True)
        sizes.append((len(batch.pos), size))
    (few, small), (many, large) = sizes
    assert large.total / many < 1.1 * small.total / few
    # A run of pairs is what there is most of, its last target's included.
    assert large.largest < 1.5 * neighbors._PAIRS_AT_ONCE


def test_plane_spacings():
    cell = torch.eye(3).repeat(4, 1, 1) * torch.tensor([2.0, 3.0, 4.0])
    cell[1, 1] = torch.tensor([2.0, 3.0, 0.0])  # sheared: spacing of the first kind shrinks
    cell[2, 1] = cell[2, 0]  # flat
    pbc = torch.tensor([PERIODIC, PERIODIC, PERIODIC, (False, True, False)])
    inf, shrunk = torch.inf, 6 / 13**0.5
    expected = [[2, 3, 4], [shrunk, 3, 4], [0, 0, 0], [inf, 3, inf]]
    torch.testing.assert_close(
        plane_spacings(cell, pbc), torch.tensor(expected, dtype=torch.float64)
    )
