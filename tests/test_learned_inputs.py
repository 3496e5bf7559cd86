"""The learned radial basis and the tag embedding: formulas, gradients, names, errors."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from fairchem.core.models.equiformer_v2.gaussian_rbf import GaussianRadialBasisLayer
from torch.autograd import gradcheck

from fairchem_equiformer.graph.edges import prepare_edges
from fairchem_equiformer.nn.radial import LearnableGaussianSmearing
from fairchem_equiformer.ops.edge_attention import edge_attention
from fairchem_equiformer.ops.edge_degree import edge_degree_embedding
from fairchem_equiformer.ops.radial import LearnedGaussians, gaussians
from fairchem_equiformer.so3.layout import layout
from tests import reference
from tests.models import gradients, ours
from tests.reference import Parameters
from tests.structures import batch_of, from_atoms, single_atom, slab, slab_atoms, three_slabs
from tests.test_ops import (
    CASES,
    CHANNELS,
    CUTOFF,
    DOUBLE,
    GRAPH,
    features,
    make_graph,
    on,
    radial_parameters,
    radial_weights,
)
from tests.test_ops import gradients as gradients_of
from tests.tolerances import assert_all_close, assert_close

NUM_BASIS = 9
LEARNED = {"distance_function": "learnable_gaussian", "num_distance_basis": 16}
CPU = torch.device("cpu")
dtypes = pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)


def scattered_basis(dtype: torch.dtype = DOUBLE) -> LearnableGaussianSmearing:
    """A basis off its initial values, with one negative deviation."""
    module = LearnableGaussianSmearing(CUTOFF, NUM_BASIS).double()
    with torch.no_grad():
        module.weight.fill_(0.8)
        module.bias.fill_(0.1)
        module.std[0, 2] *= -1
    return module.to(dtype)


class _Basis(LearnableGaussianSmearing):
    forward = LearnableGaussianSmearing.basis


def basis_with(parameters: Parameters) -> LearnedGaussians:
    """The basis as a function of its parameters, which may be among others."""
    module = _Basis(CUTOFF, NUM_BASIS)
    own = {name: parameters[name] for name, _ in module.named_parameters()}
    return torch.func.functional_call(module, own, ())


def assert_same_values_and_gradients(found, expected, actual_leaves, leaves, op, dtype):
    assert_close(found, expected.to(found), op, dtype)
    grads, wanted = gradients_of(found, actual_leaves), gradients_of(expected, leaves)
    for name, grad in grads.items():
        assert_close(grad, wanted[name], op, dtype, name)


class TestBasis:
    def test_is_a_set_of_normal_densities(self):
        module, distance = scattered_basis(), torch.linspace(0, 1.2 * CUTOFF, 301, dtype=DOUBLE)
        expected = reference.learnable_gaussians(CUTOFF, dict(module.named_parameters()))(distance)
        assert_close(gaussians(distance, module.basis()), expected, "radial")

    def test_equals_fairchems_with_its_parameters(self):
        stock, ours = GaussianRadialBasisLayer(128, 5.0), LearnableGaussianSmearing(5.0)
        ours.load_state_dict(stock.state_dict())
        names = [(name, p.shape) for name, p in ours.named_parameters()]
        assert names == [(name, p.shape) for name, p in stock.named_parameters()]
        distance = torch.linspace(0, 5, 100)
        assert_close(gaussians(distance, ours.basis()), stock(distance), "radial")

    def test_starts_as_equiformers(self):
        module = LearnableGaussianSmearing(5.0)
        assert sum(p.numel() for p in module.parameters()) == 258
        assert 0 <= module.mean.min() < 0.1
        assert 0.9 < module.mean.max() <= 1
        assert 1 / 128 <= module.std.min() < 0.1
        assert 0.9 < module.std.max() <= 1
        assert (module.weight.item(), module.bias.item()) == (1, 0)


class TestOps:
    """Values and gradients of every weight and of the basis, against autograd in float64."""

    @dtypes
    @pytest.mark.parametrize("max_edges", [None, 3])
    def test_edge_degree_embedding(self, dtype, max_edges):
        graph, module = make_graph(GRAPH), scattered_basis()
        leaves = on(CPU, radial_parameters(NUM_BASIS, 4 * CHANNELS, embeddings=True))
        leaves |= dict(module.named_parameters())
        basis = reference.learnable_gaussians(CUTOFF, leaves)
        expected = reference.edge_degree(graph, basis, leaves, {}, 3, 1)

        own = {n: p.detach().to(dtype).requires_grad_() for n, p in leaves.items()}
        edges = prepare_edges(graph, layout(3, 1), CHANNELS, dtype, max_edges=max_edges)
        basis = basis_with(own)
        found = edge_degree_embedding(edges, basis, radial_weights(own), 1.0)
        assert_same_values_and_gradients(found, expected, own, leaves, "edge_degree", dtype)

    @dtypes
    @pytest.mark.parametrize("name", ["separable s2", "gate, no orders"])
    def test_edge_attention(self, dtype, name):
        case, graph = replace(CASES[name], num_basis=NUM_BASIS), make_graph(GRAPH)
        leaves = on(CPU, case.parameters() | {"x": features(case.layout, graph.num_nodes)})
        leaves |= dict(scattered_basis().named_parameters())
        basis = reference.learnable_gaussians(CUTOFF, leaves)
        expected = reference.attention(leaves["x"], graph, basis, leaves, {}, case.sizes, None)

        own = {n: p.detach().to(dtype).requires_grad_() for n, p in leaves.items()}
        edges = prepare_edges(graph, case.layout, CHANNELS, dtype, max_edges=4)
        basis = basis_with(own)
        found = edge_attention(own["x"], edges, basis, case.weights(own), case.spec)
        assert_same_values_and_gradients(found, expected, own, leaves, "edge_attention", dtype)

    def test_gradcheck(self):
        case, graph = replace(CASES["lowest"], num_basis=NUM_BASIS), make_graph([2, 0, 1])
        parameters, x = case.parameters(), features(case.layout, graph.num_nodes)
        edges = prepare_edges(graph, case.layout, CHANNELS, DOUBLE, max_edges=2)
        leaves = dict(scattered_basis().named_parameters())

        def op(*tensors):
            basis = basis_with(dict(zip(leaves, tensors, strict=True)))
            return edge_attention(x, edges, basis, case.weights(parameters), case.spec)

        assert gradcheck(op, tuple(leaves.values()), fast_mode=True, check_undefined_grad=False)

    def test_the_fixed_gaussians_bits_do_not_depend_on_the_learned_ones_being_there(self):
        """A basis of parameters takes the same route only where there is one."""
        weights = radial_weights(radial_parameters(NUM_BASIS, 4, embeddings=False))
        assert weights.including(ours().distance_expansion.basis()) is weights
        assert weights.including(scattered_basis().basis()).slope is not None


class TestModel:
    def test_activation_checkpoint_gives_the_same_gradients(self):
        plain, saving = ours(**LEARNED), ours(**LEARNED, activation_checkpoint=True)
        saving.load_state_dict(plain.state_dict())
        data = three_slabs()
        wanted, found = gradients(plain, data), gradients(saving, data)
        assert_all_close(found, wanted, "made again")
        assert all(wanted[f"distance_expansion.{n}"].abs().max() > 0 for n in ("mean", "std"))

    def test_the_basis_and_only_it_joins_what_weight_decay_leaves_alone(self):
        plain, learned = ours(), ours(**LEARNED, use_tag_embedding=True)
        new = learned.no_weight_decay() - plain.no_weight_decay()
        kinds = ("mean", "std", "weight", "bias")
        assert new == {f"distance_expansion.{kind}" for kind in kinds}

    def test_other_models_keep_their_parameters(self):
        plain, learned = ours(), ours(**LEARNED, use_tag_embedding=True)
        new = ("distance_expansion.", "tag_embedding.")
        old = [name for name, _ in learned.named_parameters() if not name.startswith(new)]
        assert old == [name for name, _ in plain.named_parameters()]

    def test_a_checkpoint_with_another_number_of_gaussians_is_explained(self):
        other = ours(**{**LEARNED, "num_distance_basis": 12})
        with pytest.raises(ValueError, match="num_distance_basis: checkpoint 12, config 16"):
            ours(**LEARNED).load_state_dict(other.state_dict())

    def test_an_atom_alone_is_no_problem(self):
        grads = gradients(ours(**LEARNED, use_tag_embedding=True), batch_of(single_atom()))
        assert all(grad is not None and grad.isfinite().all() for grad in grads.values())


class TestTags:
    def test_change_the_result(self):
        model, data = ours(use_tag_embedding=True), three_slabs()
        plain = model(data)["energy"]
        data.tags[-1] = 2
        changed = model(data)["energy"]
        assert torch.equal(plain[:-1], changed[:-1])
        assert not torch.equal(plain[-1:], changed[-1:])

    def test_are_asked_for(self):
        data = three_slabs()
        del data.tags
        with pytest.raises(ValueError, match="no field 'tags', which use_tag_embedding"):
            ours(use_tag_embedding=True)(data)
        assert ours()(data)["energy"].isfinite().all()

    @pytest.mark.parametrize("tag", [-1, 3])
    def test_out_of_range_name_structure_and_atom(self, tag):
        bad = from_atoms(slab_atoms(), sid=31)
        bad.tags[4] = tag
        with pytest.raises(ValueError, match=rf"structure 1 .*sid 31.*atom 4: tag {tag} is out"):
            ours(use_tag_embedding=True)(batch_of(slab(), bad))
