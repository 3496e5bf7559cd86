"""The graph of a batch is fairchem's, and bad input is named."""

from __future__ import annotations

import logging

import numpy as np
import pytest
import torch
from ase.build import add_adsorbate, bulk, fcc111, molecule
from fairchem.core.models.base import GraphModelMixin
from fairchem.core.preprocessing import AtomsToGraphs
from torch_geometric.data import Batch

from fairchem_equiformer.errors import StructureError
from fairchem_equiformer.graph import build as graph_module
from fairchem_equiformer.graph.build import GraphConfig, build_graph
from tests.structures import rutile

SETTINGS = {
    "max_radius": 6.0,
    "max_neighbors": 12,
    "enforce_max_neighbors_strictly": True,
    "use_pbc": True,
    "use_pbc_single": False,
    "otf_graph": True,
    "max_num_elements": 90,
}


def slab(metal="Cu", size=(2, 2, 3)):
    atoms = fcc111(metal, size, vacuum=6)
    add_adsorbate(atoms, molecule("CH3OH"), 2.0, "ontop")
    atoms.rattle(0.05, seed=1)
    return atoms


def batch_of(*structures):
    """What fairchem's data loader makes of structures."""
    convert = AtomsToGraphs(r_edges=False, r_pbc=False)
    graphs = [convert.convert(atoms) for atoms in structures]
    for i, graph in enumerate(graphs):
        graph.sid = 1000 + i
    return Batch.from_data_list(graphs)


@pytest.fixture
def batch():
    return batch_of(slab(), slab("Pt", (3, 2, 2)), bulk("Cu"))


def graph_of(batch, **changes):
    return build_graph(batch, GraphConfig(**{**SETTINGS, **changes}))


class Stock(GraphModelMixin):
    use_pbc = True
    use_pbc_single = False
    otf_graph = False


def stock_graph(batch, **changes):
    settings = {**SETTINGS, **changes}
    del settings["max_num_elements"]
    settings["cutoff"] = settings.pop("max_radius")
    return Stock().generate_graph(batch, **settings)


def assert_same(ours, stock):
    """Bit for bit, in the same order."""
    assert torch.equal(torch.stack((ours.source, ours.target)), stock.edge_index)
    assert torch.equal(ours.vector, stock.edge_distance_vec)
    assert torch.equal(ours.distance, stock.edge_distance)
    assert torch.equal(ours.atomic_numbers, stock.atomic_numbers_full)
    assert torch.equal(ours.batch, stock.batch_full)


@pytest.fixture
def warnings(monkeypatch, caplog):
    """What the log warns of, as in a process that has not been told anything."""
    monkeypatch.setattr(graph_module, "_warned", set())
    caplog.set_level(logging.WARNING)
    return caplog


@pytest.mark.parametrize("single", [True, False])
def test_a_crystal_whose_ties_are_cut_is_named_once(warnings, single):
    for _ in range(2):
        graph_of(batch_of(slab(), rutile()), max_neighbors=20, use_pbc_single=single)
    (message,) = warnings.messages
    assert "of 2 of the 6 atoms of structure 1 of the batch (sid 1001)" in message
    assert "enforce_max_neighbors_strictly: False" in message


@pytest.mark.parametrize(
    ("atoms", "changes"),
    [
        (rutile(), {"enforce_max_neighbors_strictly": False}),
        (rutile(), {"use_pbc": False, "max_neighbors": 3}),
        (slab(), {}),
        (molecule("CH4"), {"max_neighbors": 2}),
    ],
    ids=["all are kept", "not periodic", "rattled slab", "molecule"],
)
def test_where_no_tie_of_a_crystal_is_cut_nothing_is_said(warnings, atoms, changes):
    if not atoms.cell:
        atoms.center(vacuum=5)
    data = batch_of(atoms)
    data.pbc = torch.tensor(atoms.pbc)
    graph_of(data, **{"max_neighbors": 20, **changes})
    assert warnings.messages == []


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("single", [True, False])
def test_graph_is_fairchems(batch, strict, single):
    changes = {"enforce_max_neighbors_strictly": strict, "use_pbc_single": single}
    assert_same(graph_of(batch, **changes), stock_graph(batch, **changes))


def test_single_search_does_not_see_the_rest_of_the_batch():
    # Perfect crystals: which of many equal distances are kept hangs on the size of a table.
    crystals = [fcc111("Cu", (2, 2, 3), vacuum=6), bulk("Ni", cubic=True), bulk("Fe")]
    changes = {"use_pbc_single": True, "max_radius": 8.0, "max_neighbors": 20}
    together = graph_of(batch_of(*crystals), **changes)
    assert_same(together, stock_graph(batch_of(*crystals), **changes))
    alone = [graph_of(batch_of(atoms), **changes).vector for atoms in crystals]
    assert torch.equal(together.vector, torch.cat(alone))


def test_edges_of_an_atom_are_where_the_pointer_says(batch):
    graph = graph_of(batch)
    assert graph.num_nodes == len(batch.pos)
    assert graph.num_edges == graph.target_ptr[-1] == len(graph.source)
    assert graph.num_graphs == 3
    for atom in range(graph.num_nodes):
        edges = slice(*graph.target_ptr[atom : atom + 2].tolist())
        assert (graph.target[edges] == atom).all()


def test_given_edges_are_used_in_fairchems_order(batch):
    found = stock_graph(batch)
    shuffled = torch.randperm(len(found.edge_distance))
    # fairchem wants edges together by structure; within one any order will do.
    shuffled = shuffled[batch.batch[found.edge_index[1][shuffled]].argsort(stable=True)]
    batch.edge_index = found.edge_index[:, shuffled]
    batch.cell_offsets = found.cell_offsets[shuffled]
    batch.neighbors = found.neighbors
    given = stock_graph(batch, otf_graph=False, max_radius=1.0)
    by_target = given.edge_index[1].argsort(stable=True)
    graph = graph_of(batch, otf_graph=False, max_radius=1.0)
    assert torch.equal(graph.source, given.edge_index[0][by_target])
    assert torch.equal(graph.target, given.edge_index[1][by_target])
    assert torch.equal(graph.vector, given.edge_distance_vec[by_target])
    assert torch.equal(graph.distance, given.edge_distance[by_target])


def test_an_atoms_given_edge_to_itself_is_left_out(batch):
    batch.edge_index = torch.tensor([[0, 1], [0, 0]])
    batch.cell_offsets = torch.zeros(2, 3)
    batch.neighbors = torch.tensor([2, 0, 0])
    graph = graph_of(batch, otf_graph=False)
    assert graph.source.tolist() == [1]
    assert graph.target.tolist() == [0]


@pytest.mark.parametrize("use_pbc", [True, False])
def test_missing_edges_are_found_and_it_says_so(batch, use_pbc, caplog):
    with caplog.at_level(logging.WARNING):
        graph = graph_of(batch, otf_graph=False, use_pbc=use_pbc)
    assert "edge_index" in caplog.text
    assert torch.equal(graph.vector, graph_of(batch, use_pbc=use_pbc).vector)


def test_without_pbc_cell_and_images_do_not_matter(batch):
    graph = graph_of(batch, use_pbc=False)
    assert torch.equal(graph.vector, batch.pos[graph.source] - batch.pos[graph.target])
    del batch.cell
    assert torch.equal(graph_of(batch, use_pbc=False).vector, graph.vector)
    batch.edge_index = torch.stack((graph.source, graph.target))
    assert torch.equal(graph_of(batch, use_pbc=False, otf_graph=False).vector, graph.vector)


def test_pbc_of_each_structure_counts():
    atoms = slab()
    mixed = batch_of(atoms, atoms)
    mixed.pbc = torch.tensor([True, True, True, False, False, False])  # as torch-geometric joins it
    graph = graph_of(mixed)
    periodic, isolated = graph_of(batch_of(atoms)), graph_of(batch_of(atoms), use_pbc=False)
    assert torch.equal(graph.vector, torch.cat((periodic.vector, isolated.vector)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gradients_reach_positions_and_cell(batch, dtype):
    batch.pos = batch.pos.to(dtype).requires_grad_()
    batch.cell = batch.cell.to(dtype).requires_grad_()
    graph = graph_of(batch)
    assert graph.vector.dtype == graph.distance.dtype == dtype
    pos, cell = torch.autograd.grad(graph.distance.sum(), (batch.pos, batch.cell))
    # Under a strain of 1 + e all distances grow by that factor.
    growth = (pos * batch.pos).sum() + (cell * batch.cell).sum()
    torch.testing.assert_close(growth, graph.distance.sum())


def test_half_precision_stays_out(batch):
    expected = graph_of(batch)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        graph = graph_of(batch)
    assert torch.equal(graph.vector, expected.vector)


def test_sizes_that_need_care():
    lone = graph_of(batch_of(molecule("H", cell=np.eye(3) * 50)))
    assert lone.target_ptr.tolist() == [0, 0]

    far = molecule("H2O", cell=np.eye(3) * 50)
    far.positions[1] += 20
    assert graph_of(batch_of(far)).target_ptr.tolist() == [0, 1, 1, 2]

    nothing = batch_of(bulk("Cu"))
    nothing.pos, nothing.atomic_numbers = nothing.pos[:0], nothing.atomic_numbers[:0]
    nothing.natoms, nothing.cell = torch.tensor([], dtype=torch.long), nothing.cell[:0]
    for use_pbc in (True, False):
        empty = graph_of(nothing, use_pbc=use_pbc)
        assert (empty.num_nodes, empty.num_edges, empty.num_graphs) == (0, 0, 0)

    one_without = graph_of(batch_of(slab()[:0], bulk("Cu")))
    assert (one_without.num_nodes, one_without.num_graphs) == (1, 2)


def change(field, index, value):
    def apply(batch):
        setattr(batch, field, getattr(batch, field).float())
        getattr(batch, field)[index] = value

    return apply


def move_onto(batch, shift):
    first = int(batch.natoms[0])
    batch.pos[first + 3] = batch.pos[first + 1] + torch.tensor(shift) @ batch.cell[1] + 1e-3


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (change("atomic_numbers", 20, 90), r"1 of the batch \(sid 1001\), atom \d: .*90.* 0 to 89"),
        (change("atomic_numbers", 1, -1), r"0 of the batch \(sid 1000\), atom 1: .* -1.* range"),
        (change("atomic_numbers", 2, 6.5), r"atom 2: atomic number 6\.5"),
        (change("atomic_numbers", 2, torch.nan), r"atom 2: atomic number nan"),
        (
            change("pos", (2, 1), torch.nan),
            r"sid 1000\), atom 2: position \[.*nan.*\] is not finite",
        ),
        (change("pos", (20, 0), torch.inf), r"sid 1001\), atom \d: position \[inf"),
        (change("cell", (2, 0, 0), torch.nan), r"sid 1002\): cell \[\[nan.*not finite"),
        (change("cell", 1, 0.0), r"sid 1001\): cell .* is degenerate: .* 0 Angstrom apart"),
        (change("cell", (0, 2, 2), 1e-3), r"sid 1000\): cell .* is degenerate: .* 0.001 Angstrom"),
        (lambda b: move_onto(b, (0.0, 0.0, 0.0)), r"sid 1001\), atom 1 and atom 3 are on one"),
        (lambda b: move_onto(b, (1.0, 0.0, 0.0)), r"atom 1 and the image \(-1, 0, 0\) of atom 3"),
        (lambda b: setattr(b, "pos", None), r"no field 'pos'"),
        (lambda b: setattr(b, "cell", None), r"no field 'cell'"),
        (lambda b: setattr(b, "natoms", b.natoms + 1), r"'pos' of the batch has shape .* natoms"),
        (lambda b: setattr(b, "cell", b.cell[:2]), r"'cell' of the batch has shape \(2, 3, 3\)"),
        (lambda b: setattr(b, "pbc", torch.ones(2, 3)), r"'pbc' of the batch has shape \(2, 3\)"),
    ],
)
def test_bad_input_is_named(batch, spoil, message):
    spoil(batch)
    with pytest.raises(StructureError, match=message):
        graph_of(batch)


@pytest.mark.parametrize(
    ("edge_index", "message"),
    [
        ([[0, 500], [1, 2]], r"edge 1 of the batch joins atoms 500 and 2, .* atoms 0 to \d+ only"),
        ([[0, -1], [1, 2]], r"edge 1 of the batch joins atoms -1 and 2"),
        (
            [[0, 20], [1, 2]],
            r"edge 1 .* \(sid 1001\), atom \d and .* \(sid 1000\), atom 2: not the",
        ),
    ],
)
def test_bad_given_edges_are_named(batch, edge_index, message):
    batch.edge_index = torch.tensor(edge_index)
    batch.cell_offsets = torch.zeros(2, 3)
    batch.neighbors = torch.tensor([2, 0, 0])
    with pytest.raises(ValueError, match=message):
        graph_of(batch, otf_graph=False)


def test_bad_given_images_are_named(batch):
    batch.edge_index = torch.tensor([[0, 3], [1, 2]])
    batch.cell_offsets = torch.tensor([[0.0, 0.0, 0.0], [0.5, 0.0, 0.0]])
    batch.neighbors = torch.tensor([2, 0, 0])
    message = r"edge 1 .* \(sid 1000\), atom 2, has cell_offsets \[0\.5, 0\.0, 0\.0\]"
    with pytest.raises(ValueError, match=message):
        graph_of(batch, otf_graph=False)


@pytest.mark.parametrize("sid", [None, ["a", "b", "c"], torch.tensor([7, 8, 9])])
def test_structures_are_named_with_or_without_a_sid(batch, sid):
    batch.sid = sid
    batch.pos[-1] = torch.nan
    name = "" if sid is None else rf" \(sid {sid[2]}\)"
    with pytest.raises(ValueError, match=rf"^structure 2 of the batch{name}, atom 0: "):
        graph_of(batch)


def without_vectors(count):
    """A periodic structure that lacks its last lattice vectors."""
    atoms = slab()
    atoms.pbc = True
    atoms.cell[3 - count :] = 0
    return atoms


@pytest.mark.parametrize("count", [1, 2, 3])
def test_a_periodic_structure_without_a_cell_is_named(count):
    """fairchem's converter puts in vectors of 1 Angstrom: the model would see a dense crystal."""
    batch = batch_of(slab(), without_vectors(count))
    message = r"structure 1 of the batch \(sid 1001\): no lattice vector in a periodic direction"
    with pytest.raises(StructureError, match=message):
        graph_of(batch)
    batch.pbc = torch.tensor([[True] * 3, [True] * (3 - count) + [False] * count])
    assert graph_of(batch).num_graphs == 2


def test_planes_of_a_crystal_may_be_1_angstrom_apart():
    skew = bulk("Fe")
    skew.set_cell([[3, 0, 0], [0, 3, 0], [1.5, 1.5, 1.0]])
    assert graph_of(batch_of(skew)).num_graphs == 1


def test_a_batch_of_structures_without_atoms_is_named():
    empty = batch_of(slab()[:0], slab()[:0])
    with pytest.raises(StructureError, match=r"structure 0 of the batch \(sid 1000\) has no atoms"):
        graph_of(empty)


def test_bad_input_is_what_fairchems_models_raise_too(batch):
    """They check atomic numbers by `assert`."""
    batch.atomic_numbers[0] = 90
    for kind in (ValueError, AssertionError):
        with pytest.raises(kind, match="atomic number 90"):
            graph_of(batch)
