"""The search of fixed sizes: the same edges as the search, or it tells why not."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import molecule
from hypothesis import given, settings
from hypothesis import strategies as st

from fairchem_equiformer.errors import StructureError
from fairchem_equiformer.graph import fixed_search, neighbors
from fairchem_equiformer.graph.batch import Batch
from fairchem_equiformer.graph.build import GraphConfig, build_graph, read_fields
from fairchem_equiformer.graph.fixed_search import Told, made_for, search
from tests.structures import slab_atoms
from tests.test_neighbors import CRYSTALS, structures

ALL = GraphConfig(max_radius=6.0, max_neighbors=12, enforce_max_neighbors_strictly=False)
NEAREST = GraphConfig(max_radius=6.0, max_neighbors=12)


@pytest.fixture(autouse=True)
def _as_on_a_gpu(monkeypatch):
    """Images are placed without matrix products, as on a GPU: the last bit decides among ties."""
    monkeypatch.setattr(fixed_search, "MOST_CANDIDATES", 1 << 18)
    monkeypatch.setattr(
        neighbors,
        "_image_offset",
        lambda atoms, graph, image: neighbors.in_order(
            image.to(atoms.cell.dtype), atoms.cell[graph]
        ),
    )


def batch_of(*structures: Atoms, dtype=torch.float32, **changes) -> Batch:
    batch = Batch(
        pos=torch.tensor(np.concatenate([s.positions for s in structures]), dtype=dtype),
        cell=torch.tensor(np.stack([s.cell.array for s in structures]), dtype=dtype),
        pbc=torch.tensor(np.stack([s.pbc for s in structures])),
        natoms=torch.tensor([len(s) for s in structures]),
        atomic_numbers=torch.tensor(np.concatenate([s.numbers for s in structures])),
    )
    return replace(batch, **changes)


def plan_for(batch: Batch, config: GraphConfig):
    return made_for(fields_of(batch, config), build_graph(batch, config), config)


def fields_of(batch: Batch, config: GraphConfig):
    return read_fields(batch, use_pbc=config.use_pbc)


def told_of(plan, batch: Batch, tags=None) -> Told:
    return Told(*search(plan, fields_of(batch, plan.config), tags)[1].tolist())


def assert_same(plan, batch: Batch) -> None:
    """The very numbers of the graph, in its order; what is filled in stands behind them."""
    expected = build_graph(batch, plan.config)
    found, told = search(plan, fields_of(batch, plan.config))
    told = Told(*told.tolist())
    assert told.reason == ""
    assert told.edges == expected.num_edges
    assert (found.num_nodes, found.num_edges, found.num_graphs) == plan.sizes
    for name in ("source", "target", "vector", "distance"):
        assert torch.equal(getattr(found, name)[: told.edges], getattr(expected, name)), name
    atoms, graphs = expected.num_nodes, expected.num_graphs
    for name, count in {"atomic_numbers": atoms, "batch": atoms, "natoms": graphs}.items():
        assert torch.equal(getattr(found, name)[:count], getattr(expected, name)), name
    assert torch.equal(found.target_ptr[: atoms + 1], expected.target_ptr)
    assert (found.target[told.edges :] >= atoms).all()


@settings(max_examples=50, deadline=None)
@given(
    parts=st.lists(structures(), min_size=1, max_size=3),
    pbc=st.tuples(st.booleans(), st.booleans(), st.booleans()),
    far=st.sampled_from([0, 0, 2]),
    cutoff=st.sampled_from([2.0, 4.0]),
    max_neighbors=st.sampled_from([0, 1, 4, 20, 100]),
    strict=st.booleans(),
    use_pbc=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
def test_any_structure(parts, pbc, far, cutoff, max_neighbors, strict, use_pbc, dtype):
    """Needles, plates, isolated atoms, a cell with many images of one atom, atoms outside it."""
    config = GraphConfig(cutoff, max_neighbors, strict, use_pbc)
    parts[0].pbc = pbc
    for part in parts[1:]:
        part.pbc = not all(pbc)
    batch = batch_of(*parts, dtype=dtype)
    batch.pos[::2] += far * batch.cell[0].sum(dim=0)
    plan = plan_for(batch, config)
    if plan is None:
        images = 2 * torch.ceil(cutoff / neighbors.plane_spacings(batch.cell, batch.pbc)) + 3
        pairs = len(batch.natoms) * batch.natoms.max() ** 2
        assert far or pairs * images.amax(dim=0).prod() > fixed_search.MOST_CANDIDATES
        return
    if told_of(plan, batch).ties:
        assert told_of(plan, batch).reason == "there are equally far neighbours to choose from"
        found = neighbors.neighbor_list(
            *fields_of(batch, config)[:4],
            cutoff=cutoff,
            max_neighbors=max_neighbors,
            strict=strict,
        )
        assert len(found.cut)
        return
    assert_same(plan, batch)


@pytest.mark.parametrize("max_neighbors", [1, 12, 20, 0])
@pytest.mark.parametrize("name", CRYSTALS)
def test_crystals(name, max_neighbors):
    """Where all that are equally far are kept."""
    config = GraphConfig(8.0, max_neighbors, enforce_max_neighbors_strictly=False)
    crystal = CRYSTALS[name].copy()
    crystal.pbc = True
    batch = batch_of(crystal)
    assert_same(plan_for(batch, config), batch)


def test_ties_are_told():
    batch = batch_of(CRYSTALS["fcc, cube"])
    assert told_of(plan_for(batch, NEAREST), batch).reason == ""  # twelve are nearest
    nine = replace(NEAREST, max_neighbors=9)
    told = told_of(plan_for(batch, nine), batch)
    assert told.reason == "there are equally far neighbours to choose from"
    assert not told.outgrown


@pytest.mark.parametrize("config", [ALL, NEAREST], ids=["all", "nearest"])
def test_a_plan_serves_what_is_much_alike(config):
    """Atoms move, a cell is strained, elements are others."""
    atoms = [slab_atoms(), slab_atoms("Pt", "CH3OH"), molecule("C2H6")]
    plan = plan_for(batch_of(*atoms), config)
    for seed in range(5):
        for one in atoms:
            one.rattle(0.03, seed=seed)
            one.set_cell(one.cell * 0.998, scale_atoms=True)
        batch = batch_of(*atoms)
        assert_same(plan, replace(batch, atomic_numbers=batch.atomic_numbers + 1))


def with_pos(batch, atom, value):
    pos = batch.pos.clone()
    pos[atom] = torch.as_tensor(value, dtype=pos.dtype)
    return replace(batch, pos=pos)


def numbered(batch, number):
    numbers = batch.atomic_numbers.double()
    numbers[3] = number
    return replace(batch, atomic_numbers=numbers)


def with_cell(batch, value):
    cell = batch.cell.clone()
    cell[0, 2, 2] = value
    return replace(batch, cell=cell)


WRONG = {
    "a position is NaN": lambda b: with_pos(b, 2, torch.nan),
    "a position is infinite": lambda b: with_pos(b, 2, torch.inf),
    "a number too large": lambda b: numbered(b, 90),
    "a number below zero": lambda b: numbered(b, -1),
    "not a number": lambda b: numbered(b, 1.5),
    "a cell is infinite": lambda b: with_cell(b, torch.inf),
    "a cell is NaN": lambda b: with_cell(b, torch.nan),
    "a cell without volume": lambda b: replace(b, cell=b.cell * torch.tensor([1, 0, 1])),
    "a lattice vector that ASE put in": lambda b: with_cell(b, 1.0),
    "two atoms on one point": lambda b: with_pos(b, 4, b.pos[3]),
    "an atom on an image": lambda b: with_pos(b, 4, b.pos[3] + b.cell[0, 0]),
}


@pytest.mark.parametrize("spoil", WRONG.values(), ids=WRONG.keys())
def test_wrong_input_is_told(spoil):
    batch = batch_of(slab_atoms(), slab_atoms("Pt", "CO"))
    plan = plan_for(batch, ALL)
    batch = spoil(batch)
    told = told_of(plan, batch)
    assert told.wrong or told.images
    with pytest.raises(StructureError):
        build_graph(batch, ALL)


def test_wrong_tags_are_told():
    batch = batch_of(slab_atoms())
    plan = plan_for(batch, ALL)
    tags = torch.zeros_like(batch.atomic_numbers)
    assert told_of(plan, batch, tags).reason == ""
    for tag in (-1, 3):
        tags[5] = tag
        told = told_of(plan, batch, tags)
        assert told.reason == "the input may be wrong"
        assert not told.outgrown


SKEW = torch.tensor([[1.0, 0.0, 0.0], [4.0, 1.0, 0.0], [0.0, 0.0, 1.0]])  # the same lattice
OUTGROWN = {
    "natoms or pbc changed": {
        "pbc": lambda b: replace(b, pbc=~b.pbc),
        "natoms": lambda b: replace(b, natoms=b.natoms + torch.tensor([1, -1])),
    },
    "the cell, or how far atoms spread, needs more images": {
        "cell": lambda b: replace(b, pos=b.pos * 0.6, cell=b.cell * 0.6),
        "skewed": lambda b: replace(b, cell=SKEW @ b.cell),
        "far": lambda b: with_pos(b, 0, b.pos[0] - 2 * b.cell[0, 0]),
    },
    "there are more edges than were provided for": {
        "nearer": lambda b: replace(b, pos=b.pos * torch.tensor([1.0, 1.0, 0.6])),
    },
}
CHANGES = [(reason, name) for reason, changes in OUTGROWN.items() for name in changes]


@pytest.mark.parametrize(("reason", "name"), CHANGES)
def test_what_has_outgrown_a_plan_is_told(reason, name):
    batch = batch_of(slab_atoms(), slab_atoms("Pt", "CO"))
    config = replace(ALL, max_neighbors=0)
    plan = plan_for(batch, config)
    assert_same(plan, batch)
    batch = OUTGROWN[reason][name](batch)
    told = told_of(plan, batch)
    assert reason in told.reason
    assert told.outgrown
    assert_same(plan_for(batch, config), batch)


def test_large_structures_have_no_plan(monkeypatch):
    batch = batch_of(slab_atoms())
    plan = plan_for(batch, ALL)
    candidates = plan.real.numel() * plan.real.shape[1] * len(plan.images)
    monkeypatch.setattr(fixed_search, "MOST_CANDIDATES", candidates)
    assert plan_for(batch, ALL)
    monkeypatch.setattr(fixed_search, "MOST_CANDIDATES", candidates - 1)
    assert plan_for(batch, ALL) is None
