"""Forward passes that are recorded on frozen weights and run again; tests/tape.py is the GPU."""

from __future__ import annotations

import logging
from contextlib import nullcontext

import pytest
import torch
from ase.build import bulk
from fairchem.core.common.relaxation import ml_relaxation
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.overrides import TorchFunctionMode

from fairchem_equiformer import EquiformerCalculator, checkpoints
from fairchem_equiformer.errors import StructureError
from fairchem_equiformer.graph import fixed_search
from fairchem_equiformer.graph.edge_graph import EdgeGraph
from fairchem_equiformer.graph.neighbors import neighbor_list
from fairchem_equiformer.graph.padding import Sizes, bucket, filled_up
from fairchem_equiformer.models import (
    EnergyHead,
    EquiformerV2Hydra,
    ForceHead,
    StressHead,
)
from fairchem_equiformer.models import recorded as recorded_module
from fairchem_equiformer.nn import replay
from fairchem_equiformer.nn.frozen import FrozenWeights
from fairchem_equiformer.ops.native import loader
from tests.models import KEYS, ours, scatter_weights
from tests.structures import batch_of, from_atoms, slab, slab_atoms, three_slabs
from tests.tape import record_tape
from tests.tolerances import assert_all_close, assert_close


@pytest.fixture
def recordings(monkeypatch):
    """Has the CPU record; gives what was recorded so far."""
    made = []

    def record(function):
        made.append(function)
        return record_tape(function)

    monkeypatch.setattr(loader, "library", lambda: None)  # a tape sees PyTorch's operations alone
    monkeypatch.setitem(replay.RECORDERS, "cpu", record)
    monkeypatch.setattr(replay, "_said", set())
    return made


ALL_EQUAL = {"enforce_max_neighbors_strictly": False}  # so many edges, or some more or less


def hydra():
    heads = {
        "energy": (EnergyHead, {}),
        "forces": (ForceHead, {}),
        "stress": (StressHead, {"decompose": True, "use_source_target_embedding": True}),
        "whole": (StressHead, {"output_name": "whole"}),
    }
    return scatter_weights(EquiformerV2Hydra(KEYS | ALL_EQUAL, heads))


MODELS = {
    "flat": lambda: ours(**ALL_EQUAL),
    "gate": lambda: ours(
        use_gate_act=True, use_grid_mlp=False, norm_type="rms_norm_sh", **ALL_EQUAL
    ),
    "tags, learned Gaussians": lambda: ours(
        use_tag_embedding=True, distance_function="learnable_gaussian", **ALL_EQUAL
    ),
    "hydra": hydra,
}


def displaced(data, scale=0.05, seed=0):
    """The batch with its atoms displaced."""
    generator = torch.Generator().manual_seed(seed)
    data = data.clone()
    data.pos += scale * torch.randn(data.pos.shape, generator=generator)
    return data


@torch.no_grad()
def predict(model, data):
    return model(data)


# Filled-up graphs


@settings(deadline=None, max_examples=50)
@given(st.integers(0, 10**6))
def test_buckets_waste_an_eighth_at_most(count):
    size = bucket(count)
    assert count <= size <= max(16 * ((count + 15) // 16), 9 * count / 8)
    assert bucket(size) == size


def random_graph(degrees, graphs, seed):
    """Atoms with so many random neighbours."""
    generator = torch.Generator().manual_seed(seed)
    degrees = torch.tensor(degrees)
    atoms, edges = len(degrees), int(degrees.sum())
    vector = torch.randn(edges, 3, generator=generator, dtype=torch.float64)
    batch = torch.randint(graphs, (atoms,), generator=generator).sort().values
    return EdgeGraph(
        source=torch.randint(atoms, (edges,), generator=generator),
        target=torch.repeat_interleave(degrees),
        target_ptr=torch.cat([torch.zeros(1, dtype=torch.int64), degrees.cumsum(0)]),
        vector=vector,
        distance=vector.norm(dim=1),
        atomic_numbers=torch.randint(1, 80, (atoms,), generator=generator),
        batch=batch,
        natoms=torch.bincount(batch, minlength=graphs),
        tags=torch.randint(3, (atoms,), generator=generator),
    )


def wide(graph, sizes):
    """The graph in the first rows of larger tensors; beyond stands what no index may be."""
    rows = dict.fromkeys(("source", "target", "vector", "distance"), sizes.edges)
    rows |= dict.fromkeys(("atomic_numbers", "batch", "tags"), sizes.atoms)
    rows |= {"natoms": sizes.graphs, "target_ptr": sizes.atoms + 1}
    tensors = {}
    for name, count in rows.items():
        value = getattr(graph, name)
        poison = torch.nan if value.is_floating_point() else torch.iinfo(value.dtype).max
        tensors[name] = value.new_full((count, *value.shape[1:]), poison)
        tensors[name][: len(value)] = value
    return EdgeGraph(**tensors)


GRAPHS = st.lists(st.integers(0, 30), min_size=1, max_size=12)


@settings(deadline=None, max_examples=50)
@given(GRAPHS, st.integers(1, 3))
def test_a_filled_up_graph_is_one(degrees, graphs):
    graph = random_graph(degrees, graphs, seed=0)
    sizes = Sizes.holding(graph.num_nodes, graph.num_edges, graphs)
    counts = torch.tensor(graph.num_nodes), torch.tensor(graph.num_edges)
    whole = filled_up(wide(graph, sizes), *counts)
    assert (whole.num_nodes, whole.num_edges, whole.num_graphs) == sizes
    for name in ("source", "target", "vector", "distance", "atomic_numbers", "batch", "tags"):
        value = getattr(graph, name)
        assert torch.equal(getattr(whole, name)[: len(value)], value)
    assert torch.equal(whole.natoms[:-1], graph.natoms)
    # Edges filled in are between atoms filled in, and everything is as in any graph.
    assert (whole.source[graph.num_edges :] >= graph.num_nodes).all()
    assert (whole.target[graph.num_edges :] >= graph.num_nodes).all()
    assert (whole.source < sizes.atoms).all()
    assert (whole.target.diff() >= 0).all()
    degree = torch.bincount(whole.target, minlength=sizes.atoms)
    assert degree[graph.num_nodes :].max() <= 33
    assert torch.equal(whole.target_ptr.diff(), degree)
    assert whole.target_ptr[0] == 0
    assert torch.equal(torch.bincount(whole.batch, minlength=sizes.graphs), whole.natoms)


@pytest.fixture(scope="module")
def exact():
    torch.manual_seed(0)
    return ours(num_layers=1, use_tag_embedding=True).double().eval()


@settings(deadline=None, max_examples=20)
@given(degrees=GRAPHS, graphs=st.integers(1, 3), further=st.integers(0, 40))
def test_what_is_filled_in_changes_nothing(exact, degrees, graphs, further):
    graph = random_graph(degrees, graphs, seed=1)
    sizes = Sizes.holding(graph.num_nodes + further, graph.num_edges + 3 * further, graphs)
    counts = torch.tensor(graph.num_nodes), torch.tensor(graph.num_edges)
    with torch.no_grad():
        expected = exact.of_graph(graph)
        found = exact.of_graph(filled_up(wide(graph, sizes), *counts), at_once=True)
    own = {"energy": found["energy"][:graphs], "forces": found["forces"][: graph.num_nodes]}
    assert_all_close(own, expected, "outputs")


# Replays


@pytest.fixture(params=["from positions", "from the graph"])
def begin(request, monkeypatch):
    """Where recorded passes begin."""
    if request.param == "from the graph":
        monkeypatch.setattr(fixed_search, "MOST_CANDIDATES", 0)
    return request.param


@pytest.mark.usefixtures("begin")
@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS.keys())
def test_a_replay_gives_what_the_model_gives(make, recordings):
    model, frozen = make().eval(), FrozenWeights()
    batches = [displaced(three_slabs(), 0.2, seed) for seed in range(2, 6)]
    counts = {model.base.read(data).num_edges for data in batches}
    assert len({bucket(count) for count in counts}) == 1 < len(counts)
    for call, data in enumerate(batches):
        expected = predict(model, data)
        with frozen.used_by(model):
            found = predict(model, data)
        assert_all_close(found, expected, "outputs")
        assert len(recordings) == (call > 0)


@pytest.mark.usefixtures("begin")
def test_results_belong_to_the_caller(recordings):
    model, frozen = ours().eval(), FrozenWeights()
    with frozen.used_by(model):
        results = [predict(model, displaced(three_slabs(), seed=seed)) for seed in range(4)]
    assert recordings
    for seed, found in enumerate(results):
        assert_all_close(found, predict(model, displaced(three_slabs(), seed=seed)), "outputs")


def test_other_sizes_are_other_recordings(recordings):
    model, frozen = ours().eval(), FrozenWeights()
    small, large = batch_of(slab("Cu", "CO")), three_slabs()
    with frozen.used_by(model):
        for data in (small, large, small, large, small, large):
            found = predict(model, data)
            assert_all_close(found, model.of_graph(model.read(data)), "outputs")
    assert len(recordings) == 2


def test_few_are_held(recordings, monkeypatch):
    monkeypatch.setattr(replay, "_MOST", 1)
    model, frozen = ours().eval(), FrozenWeights()
    small, large = batch_of(slab("Cu", "CO")), three_slabs()
    with frozen.used_by(model):
        for data in (small, small, large, large, small):
            predict(model, data)
    assert len(recordings) == 3


def test_changed_weights_are_seen(recordings):
    model, other, frozen = ours().eval(), ours().eval(), FrozenWeights()
    data = three_slabs()

    def twice():
        with frozen.used_by(model):
            return [predict(model, data) for _ in range(2)][-1]

    before = twice()
    model.load_state_dict(other.state_dict())
    assert_all_close(twice(), predict(other, data), "outputs")
    assert not torch.allclose(before["energy"], predict(other, data)["energy"])
    model.blocks[1] = ours().blocks[1].eval()
    assert_all_close(twice(), predict(model, data), "outputs")
    model.double()
    data.pos, data.cell = data.pos.double(), data.cell.double()
    assert_all_close(twice(), predict(model, data), "outputs")
    assert len(recordings) == 4


def test_precisions_apart(recordings):
    model, frozen = ours().eval(), FrozenWeights()
    data = three_slabs()
    for dtype in (torch.float32, torch.bfloat16, torch.float32):
        for _ in range(2):
            with torch.autocast("cpu", dtype=dtype, enabled=dtype == torch.bfloat16):
                expected = predict(model, data)
                with frozen.used_by(model):
                    found = predict(model, data)
            assert_all_close(found, expected, "outputs", dtype)
    assert len(recordings) == 2


# Passes that begin with positions


class Searched:
    """A model on frozen weights, and how often the search outside was asked for."""

    def __init__(self, monkeypatch, **changes):
        self.model = ours(num_layers=1, **changes).eval()
        self.outside = 0
        self._frozen = FrozenWeights()
        read = self.model.read

        def count(data):
            self.outside += 1
            return read(data)

        monkeypatch.setattr(self.model, "read", count)

    def __call__(self, data):
        """How often the search outside was asked for now; results are compared with it."""
        before = self.outside
        with self._frozen.used_by(self.model):
            found = predict(self.model, data)
        asked = self.outside - before
        assert_all_close(found, predict(self.model, data), "outputs")
        return asked


def test_the_search_is_recorded_too(recordings, monkeypatch):
    searched = Searched(monkeypatch, use_tag_embedding=True)
    asked = [searched(displaced(three_slabs(), seed=seed)) for seed in range(5)]
    assert asked == [1, 1, 0, 0, 0]
    strained = three_slabs()
    strained.cell *= 1.01
    strained.atomic_numbers += 1
    strained.tags += 1
    assert searched(strained) == 0
    assert len(recordings) == 1


def test_wrong_input_is_named_by_the_search_outside(recordings, monkeypatch):
    searched = Searched(monkeypatch)
    for _ in range(3):
        searched(three_slabs())
    for name, value, message in (
        ("pos", torch.nan, r"structure 1 of the batch \(sid 12\), atom 2.*not finite"),
        ("atomic_numbers", 90, r"structure 1 of the batch \(sid 12\), atom 2.*out of range"),
    ):
        wrong = three_slabs()
        wrong[name][12] = value
        with pytest.raises(StructureError, match=message):
            searched(wrong)
        assert searched(three_slabs()) == 0
    wrong = three_slabs()
    wrong.pos[12] = wrong.pos[13]
    with pytest.raises(StructureError, match="atom 2 and atom 3 are on one point"):
        searched(wrong)
    assert len(recordings) == 1


def test_what_has_outgrown_a_recording_is_recorded_anew(recordings, monkeypatch, caplog):
    caplog.set_level(logging.INFO)
    searched = Searched(monkeypatch, max_neighbors=100)
    near, far = batch_of(slab()), batch_of(slab())
    far.pbc, near.pbc = torch.tensor([[True, True, False]]), torch.tensor([[True] * 3])
    assert [searched(data) for data in (far, far, far, near, near, far)] == [1, 1, 0, 1, 0, 1]
    assert len(recordings) == 3
    assert "outside a CUDA graph: natoms or pbc changed" in says(caplog)[0]


def test_ties_are_left_to_the_search_outside(recordings, monkeypatch, caplog):
    """And after some in a row it is no longer tried at each batch."""
    caplog.set_level(logging.INFO)
    searched = Searched(monkeypatch, max_neighbors=9)
    crystal = from_atoms(bulk("Ni", "fcc", a=3.52, cubic=True))
    loose, tied = batch_of(displaced(crystal)), batch_of(crystal)
    assert [searched(data) for data in (loose, loose, loose)] == [1, 1, 0]
    assert [searched(tied) for _ in range(8)] == [1] * 8
    # Tried at the first, second, fourth and eighth; now seven are left out.
    assert [searched(loose) for _ in range(9)] == [1] * 7 + [0, 0]
    assert len(recordings) == 2  # from positions, and from the graph
    assert says(caplog)[0].endswith("there are equally far neighbours to choose from")


def test_given_edges_are_not_searched_for(recordings, monkeypatch):
    searched = Searched(monkeypatch, otf_graph=False)
    data = three_slabs()
    edges = neighbor_list(data.pos, data.cell, torch.ones(3, 3).bool(), data.natoms, **RULE)
    data.edge_index = torch.stack((edges.source, edges.target))
    data.cell_offsets, data.neighbors = edges.image, torch.zeros(3)
    assert [searched(data) for _ in range(3)] == [1, 1, 1]
    assert len(recordings) == 1


RULE = {"cutoff": 4.0, "max_neighbors": 5, "strict": True}


# Of tensors' shapes, mostly; the addresses of weights are read at each step, see nn/frozen.py.
FREE = {"__get__", "__len__", "dim", "size", "_set_grad_enabled", "data_ptr"}


class Host(TorchFunctionMode):
    """Counts what the host asks of PyTorch, and what makes it wait; not in a replay."""

    WAITS = ("tolist", "item", "__bool__", "__int__", "__float__", "__index__", "cpu", "nonzero")

    def __init__(self):
        super().__init__()
        self.calls, self.waits = [], []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        name = func.__name__
        if name not in FREE:
            self.calls.append(name)
        counted = "output_size" in (kwargs or {})
        if name in self.WAITS or (name == "repeat_interleave" and not counted):
            self.waits.append(name)
        return func(*args, **(kwargs or {}))


@pytest.fixture
def host(monkeypatch):
    """Counts the host's calls within; a CUDA graph is one of them."""
    counter, modes = Host(), torch.overrides._get_current_function_mode_stack

    def record(function):
        replay_tape, results = record_tape(function)

        def uncounted():
            calls, waits = len(counter.calls), len(counter.waits)
            replay_tape()
            del counter.calls[calls:], counter.waits[waits:]
            if counter in modes():
                counter.calls.append("replay")

        return uncounted, results

    monkeypatch.setitem(replay.RECORDERS, "cpu", record)
    return counter


@pytest.mark.usefixtures("recordings")
def test_the_host_waits_once(host, begin):
    """For what is told of the search; and it asks for little."""
    model, frozen, data = ours(num_layers=1).eval(), FrozenWeights(), batch_of(slab())
    with frozen.used_by(model):
        for seed in range(3):
            predict(model, displaced(data, seed=seed))
        with host:
            predict(model, data)
    if begin == "from positions":
        assert host.waits == ["tolist"]
        assert len(host.calls) < 30
    else:
        assert len(host.waits) > 20
        assert len(host.calls) > 300


@pytest.mark.usefixtures("recordings")
def test_a_calculator_asks_for_little(host, tmp_path):
    """Of a step of a relaxation or of molecular dynamics."""
    atoms = slab_atoms()
    atoms.calc = EquiformerCalculator(
        checkpoint_of(ours(num_layers=1), tmp_path / "checkpoint.pt"), device="cpu"
    )
    for seed in range(3):
        atoms.get_forces()
        atoms.rattle(0.01, seed=seed)
    with host:
        atoms.get_forces()
    assert host.waits == ["tolist", "cpu", "cpu", "item"]  # by the second there is all to be had
    assert len(host.calls) < 40


# Who uses it


def checkpoint_of(model, path):
    config = {"model": {"name": "equiformer_v2", **KEYS, "num_layers": 1}}
    torch.save({"config": config, "state_dict": model.state_dict()}, path)
    return checkpoints.load(path)


def test_a_calculator_records(recordings, tmp_path):
    checkpoint = checkpoint_of(ours(num_layers=1), tmp_path / "checkpoint.pt")

    def steps():
        atoms = slab_atoms()
        atoms.calc = EquiformerCalculator(checkpoint, device="cpu")
        for _ in range(3):
            yield torch.tensor(atoms.get_forces())
            atoms.rattle(0.01, seed=0)

    found = list(steps())
    assert len(recordings) == 1
    replay.RECORDERS.pop("cpu")
    for forces, expected in zip(found, steps(), strict=True):
        assert_close(forces, expected, "outputs", torch.float32)


class Trainer:
    """What a relaxation asks of fairchem's trainers."""

    device = torch.device("cpu")
    ema = None

    def __init__(self, model):
        self.model = model

    def predict(self, batch, **_):
        return predict(self.model, batch)


def test_a_relaxation_records(recordings):
    model = ours(num_layers=1).eval()
    options = {"maxstep": 0.04, "memory": 50, "damping": 1.0, "alpha": 70.0, "traj_dir": None}

    def relaxed():
        batch = three_slabs()
        batch.fixed = torch.zeros(len(batch.pos), dtype=torch.int64)
        return ml_relaxation.ml_relax(batch, Trainer(model), 4, 0.0, options)

    found = relaxed()
    assert len(recordings) == 1
    replay.RECORDERS.pop("cpu")
    expected = relaxed()
    assert_close(found.pos, expected.pos, "outputs")
    assert not torch.equal(found.pos, three_slabs().pos)


# What is not recorded


def says(caplog):
    return [record.getMessage() for record in caplog.records if "CUDA graph" in record.message]


def not_recorded(model, data, recordings, times=3):
    frozen = FrozenWeights()
    expected = predict(model, data)
    with frozen.used_by(model):
        for _ in range(times):
            assert_all_close(predict(model, data), expected, "outputs")
    assert not recordings


def test_an_error_is_named_and_the_model_runs_on(recordings, monkeypatch, caplog):
    asked = []

    def refuse(function):  # noqa: ARG001
        asked.append(0)
        raise RuntimeError("out of graphs")

    monkeypatch.setitem(replay.RECORDERS, "cpu", refuse)
    not_recorded(ours().eval(), three_slabs(), recordings, times=5)
    assert len(asked) == 1
    assert len(says(caplog)) == 1
    assert "out of graphs" in says(caplog)[0]


@pytest.mark.usefixtures("recordings")
def test_a_read_of_the_host_is_such_an_error(monkeypatch, caplog):
    model, frozen = ours().eval(), FrozenWeights()
    expected = predict(model, three_slabs())
    of_graph = model.of_graph

    def reads(graph, data=None, *, at_once=False):
        assert graph.natoms[0] > 0
        return of_graph(graph, data, at_once=at_once)

    monkeypatch.setattr(model, "of_graph", reads)
    with frozen.used_by(model):
        for _ in range(3):
            assert_all_close(predict(model, three_slabs()), expected, "outputs")
    assert "not permitted" in says(caplog)[0]


def test_many_edges_are_left_to_chunks(recordings, caplog):
    caplog.set_level(logging.INFO)
    not_recorded(ours(edges_per_chunk=100).eval(), three_slabs(), recordings)
    assert says(caplog)[0].endswith("more than 100 edges are worked through in chunks")
    assert len(says(caplog)) == 1


def test_it_can_be_turned_off(recordings, monkeypatch, caplog):
    caplog.set_level(logging.INFO)
    monkeypatch.setenv(recorded_module.VARIABLE, "off")
    not_recorded(ours().eval(), three_slabs(), recordings)
    assert len(says(caplog)) == 1


@pytest.mark.usefixtures("recordings")
def test_a_misspelt_choice_is_refused(monkeypatch):
    monkeypatch.setenv(recorded_module.VARIABLE, "of")
    model = ours().eval()
    with FrozenWeights().used_by(model), pytest.raises(ValueError, match="'of', it must be on or"):
        predict(model, three_slabs())


@pytest.mark.parametrize("why", ["weights that may change", "training", "gradients"])
def test_nothing_is_recorded_with(why, recordings):
    model, frozen = ours().eval(), FrozenWeights()
    frozen = nullcontext() if why == "weights that may change" else frozen.used_by(model)
    with frozen, torch.set_grad_enabled(why == "gradients"):
        model.train(why == "training")
        for _ in range(3):
            model(three_slabs())
    assert not recordings


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS.keys())
def test_a_cuda_graph_gives_what_the_model_gives(make, caplog):
    model, frozen = make().eval().cuda(), FrozenWeights()
    for seed in range(4):
        data = displaced(three_slabs(), 0.2, seed).to("cuda")
        expected = predict(model, data)
        with frozen.used_by(model):
            found = predict(model, data)
        assert_all_close(found, expected, "outputs")
    assert not says(caplog)
