"""What PyTorch would do on a GPU, seen without one.

Tensors without numbers, which say that they are on a GPU, go through the model forward and back:
whatever would make the host wait for their numbers raises.
"""

from __future__ import annotations

import sys
from contextlib import nullcontext
from dataclasses import fields, is_dataclass, replace
from types import SimpleNamespace

import pytest
import torch
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    FakeTensor,
    FakeTensorMode,
)
from torch.utils._mode_utils import no_dispatch
from torch.utils._python_dispatch import TorchDispatchMode

from fairchem_equiformer import Equiformer, EquiformerV2
from fairchem_equiformer.graph.build import GraphConfig, build_graph, read_fields
from fairchem_equiformer.graph.edges import prepare_edges
from fairchem_equiformer.graph.fixed_search import made_for, search
from fairchem_equiformer.graph.padding import filled_up
from fairchem_equiformer.models import EnergyHead, EquiformerV2Hydra, ForceHead, StressHead
from fairchem_equiformer.models.backbone import Embedding
from fairchem_equiformer.models.dens import DeNSBackbone, DeNSEnergyHead, DeNSForceHead
from fairchem_equiformer.models.readouts import forces, sum_energy
from fairchem_equiformer.nn.edge_inputs import EdgeInputs
from fairchem_equiformer.nn.irreps.edges import irreps_edges
from fairchem_equiformer.ops.segments import add_rows, segment_sum, take
from tests.models import KEYS
from tests.structures import three_slabs
from tests.tolerances import assert_close

OPTIONS = {
    "separable grid MLP": {},
    "gate": {"use_gate_act": True, "use_grid_mlp": False, "norm_type": "rms_norm_sh"},
    "S2": {"use_sep_s2_act": False, "use_grid_mlp": False, "norm_type": "layer_norm"},
}


VECTORS = ("vector", "distance")
V1 = {
    "max_neighbors": 12,
    "max_radius": 6.0,
    "num_layers": 1,
    "irreps_node_embedding": "16x0e+16x1e",
    "irreps_head": "16x0e+16x1e",
    "num_heads": 2,
    "irreps_mlp_mid": "16x0e+16x1e",
    "irreps_feature": "16x0e+16x1e",
    "edge_channels": 16,
    "num_distance_basis": 16,
    "use_tag_embedding": False,
    "regress_forces": True,
    "alpha_drop": 0.2,
    "drop_path_rate": 0.2,
}
V1_OPTIONS = {
    "MLP attention": {},
    "dot product": {"attention": "dot_product", "distance_function": "exponential_normal"},
    "linear messages": {
        "nonlinear_message": False,
        "smooth_cutoff": True,
        "distance_function": "bessel",
    },
}


@pytest.fixture(autouse=True)
def _pretended_tables_are_forgotten():
    yield
    for name, module in list(sys.modules.items()):
        if name.startswith("fairchem_equiformer."):
            for found in vars(module).values():
                if hasattr(found, "cache_clear"):
                    found.cache_clear()


class NothingFromTheHost(TorchDispatchMode):
    """Refuses tensors made of Python's numbers: a copy to the device, for which the host waits."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.lift_fresh.default:  # a single number is the kernel's argument
            assert args[0].ndim == 0, "a tensor made of Python's numbers"
        return func(*args, **(kwargs or {}))


def moved(thing, move):
    """A dataclass or a tuple with all of its tensors moved."""
    if isinstance(thing, torch.Tensor):
        return move(thing)
    if is_dataclass(thing):
        return replace(
            thing, **{f.name: moved(getattr(thing, f.name), move) for f in fields(thing)}
        )
    if isinstance(thing, tuple):
        parts = [moved(part, move) for part in thing]
        return type(thing)(*parts) if hasattr(thing, "_fields") else tuple(parts)
    return thing


def prepared(dtype, **changes):
    """A model, and the edges of a batch in several chunks."""
    model = EquiformerV2(**{**KEYS, "num_layers": 1, **changes}).eval().to(dtype)
    graph = build_graph(three_slabs(), model.config.graph(otf=True))
    channels = model.config.sphere_channels
    edges = prepare_edges(
        graph, model.config.layout, channels, dtype, max_edges=2 * graph.num_edges // 3
    )
    assert len(edges.chunks) == 2
    return model, graph, edges


def run(model, graph, edges):
    """All of the model after the search for neighbours."""
    inputs = EdgeInputs(edges, model.distance_expansion.basis())
    x = model.edge_degree_embedding(inputs)
    for block in model.blocks:
        x = block(x, inputs)
    embedding = Embedding(model.norm(x), graph, inputs)
    return sum_energy(model.energy_block, embedding), forces(model.force_block, embedding)


@pytest.fixture
def pretended(monkeypatch):
    """Gives a function that takes from a tensor its numbers."""
    monkeypatch.setattr(FakeTensor, "is_cuda", True)
    mode = FakeTensorMode(allow_non_fake_inputs=True)  # the tables that there are already
    with mode:
        yield lambda tensor: torch.empty_strided(
            tensor.shape, tensor.stride(), dtype=tensor.dtype, requires_grad=tensor.requires_grad
        )


def pretend_on(model, pretended):
    """Take from a model its numbers."""
    for module in model.modules():
        for held in (module._parameters, module._buffers):
            held.update({key: pretended(value) for key, value in held.items() if value is not None})


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_the_host_does_not_wait_for_a_gpu(options, pretended):
    with no_dispatch():
        model, graph, edges = prepared(torch.float64, **options)
    pretend_on(model, pretended)
    graph, edges = moved(graph, pretended), moved(edges, pretended)
    for guard in (nullcontext(), NothingFromTheHost()):  # the first time makes the tables
        with guard:
            energy, force = run(model, graph, edges)
            (energy.sum() + force.sum()).backward()
    assert energy.shape == (3,)
    untouched = {name for name, p in model.named_parameters() if p.grad is None}
    assert untouched == {"sphere_embedding.weight"}  # nothing else was left out


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_the_host_does_not_wait_in_a_recorded_pass(options, pretended):
    """From a graph of fixed sizes on: models/recorded.py."""
    heads = {"energy": (EnergyHead, {}), "forces": (ForceHead, {}), "stress": (StressHead, {})}
    with no_dispatch():
        model = EquiformerV2Hydra({**KEYS, "num_layers": 1, **options}, heads).eval().double()
        graph = build_graph(three_slabs(), model.backbone.config.graph(otf=True))
        graph = replace(graph, **{name: getattr(graph, name).double() for name in VECTORS})
        counts = torch.tensor(graph.num_nodes - 1), torch.tensor(graph.num_edges - 20)
        model.of_graph(graph)  # makes the tables
    pretend_on(model, pretended)
    graph, counts = moved(graph, pretended), moved(counts, pretended)
    with NothingFromTheHost(), torch.no_grad():
        found = model.of_graph(filled_up(graph, *counts), at_once=True)
    assert found["stress"].shape == (9, 3)


HEADS = {
    "stress": {"stress": (StressHead, {"edge_level_mlp": True, "decompose": True})},
    "stress of atoms": {"stress": (StressHead, {"edge_level_mlp": False})},
    "clean": {"energy": (DeNSEnergyHead, {}), "forces": (DeNSForceHead, {})},
    "noisy": {"energy": (DeNSEnergyHead, {}), "forces": (DeNSForceHead, {})},
    "partly noisy": {
        "energy": (DeNSEnergyHead, {"use_denoising": False}),
        "f": (DeNSForceHead, {}),
    },
}


@pytest.mark.parametrize(("kind", "heads"), HEADS.items(), ids=HEADS.keys())
def test_the_host_does_not_wait_in_a_training_step_of_other_heads(kind, heads, pretended):
    """Stresses, and DeNS's steps."""
    backbone = {} if "stress" in kind else {"backbone_class": DeNSBackbone}
    noise = None
    with no_dispatch():
        keys = {**KEYS, "num_layers": 1}
        if backbone:
            keys["use_noise_schedule_sigma_encoding"] = True
        model = EquiformerV2Hydra(keys, heads, *backbone.values()).double()
        graph = build_graph(three_slabs(), model.backbone.config.graph(otf=True))
        graph = replace(graph, **{name: getattr(graph, name).double() for name in VECTORS})
        atoms = graph.num_nodes
        if "noisy" in kind:
            noise = SimpleNamespace(denoising_pos_forward=True, noise_mask=None)
            noise.forces, noise.sigmas = torch.randn(atoms, 3), torch.rand(atoms, 1)
        if kind == "partly noisy":
            noise.noise_mask = torch.arange(atoms) % 3 > 0
        model.of_graph(graph, noise)  # makes the tables
    pretend_on(model, pretended)
    graph = moved(graph, pretended)
    if noise is not None:
        vars(noise).update({key: moved(value, pretended) for key, value in vars(noise).items()})
    with NothingFromTheHost():
        found = model.of_graph(graph, noise, at_once=True)
        sum(value.sum() for value in found.values()).backward()
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize("changes", V1_OPTIONS.values(), ids=V1_OPTIONS.keys())
def test_the_host_does_not_wait_in_equiformer_v1(changes, pretended):
    """From its edges on, in chunks; and all edges at once from the graph on."""
    with no_dispatch():
        model = Equiformer(**V1 | changes).double()
        graph = build_graph(three_slabs(), model.config.graph(otf=True))
        graph = replace(graph, **{name: getattr(graph, name).double() for name in VECTORS})
        made = {"smooth_within": 6.0} if model.config.smooth_cutoff else {}
        arguments = graph, 1, model.distance_expansion, torch.float64
        edges = irreps_edges(*arguments, max_edges=2 * graph.num_edges // 3, **made)
        assert len(edges.chunks) == 2
        model.of_graph(graph)  # makes the tables
    pretend_on(model, pretended)
    edges = moved(edges, lambda tensor: pretended(tensor.detach()))
    graph = moved(graph, pretended)
    with NothingFromTheHost():
        x = model._embed(graph, edges)
        for block in model.blocks:
            x = block(x, edges)
        x = model.norm(x)
        results = [model.energy_head(x), *(h(x, edges) for h in model.vector_heads.values())]
        sum(result.sum() for result in results).backward()
        sum(result.sum() for result in model.of_graph(graph).values()).backward()
    assert all(p.grad is not None for p in model.parameters())


def test_the_host_does_not_wait_in_a_recorded_search(pretended):
    """From positions on: graph/fixed_search.py."""
    config = GraphConfig(max_radius=6.0, max_neighbors=12)
    with no_dispatch():
        fields = read_fields(three_slabs(), use_pbc=True)
        plan = made_for(fields, build_graph(three_slabs(), config), config)
    plan, fields = moved(plan, pretended), moved(fields, pretended)
    tags = fields.atomic_numbers.long()
    with NothingFromTheHost(), torch.no_grad():
        graph, told = search(plan, fields, tags)
    assert (graph.num_nodes, graph.num_edges, graph.num_graphs) == plan.sizes
    assert told.shape == (6,)


def test_a_wait_is_noticed(pretended):
    x = pretended(torch.ones(3))
    with pytest.raises(DataDependentOutputException):
        x.sum().item()
    for make in (lambda: x[[0, 2]], lambda: x.new_tensor([1.0]), lambda: torch.tensor([1, 2])):
        with NothingFromTheHost(), pytest.raises(AssertionError, match="Python's numbers"):
            make()


class PretendedCuda(torch.Tensor):
    """A tensor of the host that takes the way of one on a GPU."""

    @property
    def is_cuda(self):
        return True


@pytest.mark.parametrize("segments", [[], [2, 2, 4], [0, 0, 1, 5, 5]])
def test_sums_by_the_way_that_a_gpu_takes(segments):
    segment = torch.tensor(segments, dtype=torch.int64)
    values = torch.randn(len(segments), 3, 2)
    expected = segment_sum(values, segment, 6)
    assert_close(segment_sum(values.as_subclass(PretendedCuda), segment, 6), expected, "segments")
    total = torch.ones(6, 3, 2)
    add_rows(total.as_subclass(PretendedCuda), segment, values)
    assert_close(total - 1, expected, "segments")


def test_taking_by_the_way_that_a_gpu_takes():
    x, index = torch.randn(4, 3, 2, requires_grad=True), torch.tensor([0, 2, 2])
    for dim in (0, 1):
        expected, found = take(x, dim, index), take(x.as_subclass(PretendedCuda), dim, index)
        assert torch.equal(found, expected)
        wanted, got = (torch.autograd.grad(y.square().sum(), x)[0] for y in (expected, found))
        assert_close(got, wanted, "segments")


class NoProductsInFloat32(TorchDispatchMode):
    """Refuses what a GPU may round to TF32."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket.__name__ in ("mm", "bmm", "addmm", "baddbmm"):
            assert args[-1].dtype == torch.float64, f"{func} in {args[-1].dtype}"
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("max_radius", [6.0, 12.0])  # few images, and a table of many
def test_edges_are_made_without_products_that_tf32_rounds(max_radius, monkeypatch):
    """TF32 keeps 10 bits: the end of a cell of 30 Angstrom would move by 0.01."""
    config = GraphConfig(max_radius=max_radius, max_neighbors=12)
    expected = build_graph(three_slabs(), config)
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    with NoProductsInFloat32():
        found = build_graph(three_slabs(), config)
        fields = read_fields(three_slabs(), use_pbc=True)
        recorded, _ = search(made_for(fields, found, config), fields)
    assert torch.equal(found.source, expected.source)
    assert torch.equal(found.target, expected.target)
    assert (found.vector - expected.vector).abs().max() < 1e-5  # Angstrom; sums of another order
    assert torch.equal(recorded.vector[: found.num_edges], found.vector)
