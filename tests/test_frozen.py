"""Inference on frozen weights: the same bits, with less done."""

from __future__ import annotations

import copy
import pickle
import weakref

import pytest
import torch

from fairchem_equiformer.nn.frozen import FrozenWeights
from fairchem_equiformer.ops import edge_attention, radial
from tests.models import ours
from tests.structures import three_slabs

ACTIVATIONS = pytest.mark.parametrize(
    "changes",
    [
        {},
        {"use_gate_act": True, "use_grid_mlp": False},
        {"use_sep_s2_act": False},
        {"distance_function": "learnable_gaussian"},
    ],
    ids=["grid MLP", "gate", "S2 grid MLP", "learned Gaussians"],
)


@pytest.fixture
def made(monkeypatch):
    """Counts what is made of weights."""
    calls = []
    for of in (edge_attention.SO2Weights, radial.RadialTables):
        original = of.of
        count = lambda *args, original=original: calls.append(0) or original(*args)  # noqa: E731
        monkeypatch.setattr(of, "of", staticmethod(count))
    return calls


def predict(model):
    with torch.no_grad():
        return model(three_slabs())


def assert_same_bits(found, expected):
    assert all(torch.equal(found[key], expected[key]) for key in expected)


@ACTIVATIONS
def test_same_bits_made_once(changes, made):
    model = ours(**changes)
    expected = predict(model)
    once = len(made)
    frozen = FrozenWeights()
    for _ in range(3):
        with frozen.used_by(model):
            assert_same_bits(predict(model), expected)
    assert len(made) == 2 * once
    predict(model)
    assert len(made) == 3 * once


@ACTIVATIONS
def test_changed_weights_are_seen(changes):
    model, other = ours(**changes), ours(**changes)
    frozen = FrozenWeights()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    with frozen.used_by(model):
        before = predict(model)
    model.load_state_dict(other.state_dict())
    with frozen.used_by(model):
        after = predict(model)
    assert_same_bits(after, predict(other))
    assert not torch.equal(before["energy"], after["energy"])


@pytest.mark.parametrize("change", ["parameter", "module", "data"])
def test_replaced_weights_are_seen(change):
    model, other, frozen = ours(), ours(), FrozenWeights()
    with frozen.used_by(model):
        before = predict(model)
    layer, new = model.blocks[0].ga.so2_conv_1, other.blocks[0].ga.so2_conv_1
    if change == "parameter":
        layer.fc_m0.weight = new.fc_m0.weight
    elif change == "module":
        layer.fc_m0 = new.fc_m0
    else:
        layer.fc_m0.weight.data = new.fc_m0.weight.data
    with frozen.used_by(model):
        after = predict(model)
    assert_same_bits(after, predict(model))
    assert not torch.equal(before["energy"], after["energy"])


def test_outside_nothing_is_kept():
    """fairchem's moving averages come and go through `.data`, which leaves no trace."""
    model = ours()
    with FrozenWeights().used_by(model):
        before = predict(model)
    for parameter in model.parameters():
        parameter.data.mul_(1.1)
    after = predict(model)
    assert not torch.equal(before["energy"], after["energy"])


def test_another_precision_within():
    model, frozen = ours(), FrozenWeights()

    def reduced():
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return predict(model)

    expected, expected_reduced = predict(model), reduced()
    with frozen.used_by(model):
        assert_same_bits(predict(model), expected)
        assert_same_bits(reduced(), expected_reduced)
        assert_same_bits(predict(model), expected)


def test_gradients_within():
    model = ours()

    def gradients():
        out = model(three_slabs())
        return torch.autograd.grad(out["energy"].sum() + out["forces"].sum(), model.parameters())

    with FrozenWeights().used_by(model):
        predict(model)
        found = gradients()
    assert all(map(torch.equal, found, gradients()))


def test_the_address_of_a_weight_is_not_used_again():
    """What tells weights apart is where they are, so that has to stay theirs as long as it counts.

    The allocator gives the memory of a freed tensor to the next one of its size.
    """
    model, frozen = ours(), FrozenWeights()
    weight = model.blocks[0].ffn.so3_linear_2.weight
    memory = weight.detach().numpy().copy()
    alive = weakref.ref(memory)
    weight.data = torch.from_numpy(memory)
    with frozen.used_by(model):
        before = predict(model)
    weight.data = 1.5 * weight.data
    del memory
    assert alive() is not None
    with frozen.used_by(model):
        after = predict(model)
    assert alive() is None
    assert_same_bits(after, predict(model))
    assert not torch.equal(before["energy"], after["energy"])


def test_another_model_within_is_not_frozen():
    model, other = ours(), ours()
    with FrozenWeights().used_by(model):
        before = predict(other)
        for parameter in other.parameters():
            parameter.data.mul_(1.1)
        after = predict(other)
    assert not torch.equal(before["energy"], after["energy"])


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda one: pickle.loads(pickle.dumps(one))])
def test_copies_begin_empty(copied, made):
    model, frozen = ours(), FrozenWeights()
    with frozen.used_by(model):
        expected = predict(model)
    count = len(made)
    twin, twins = copied((model, frozen))
    with twins.used_by(twin):
        assert_same_bits(predict(twin), expected)
    assert len(made) == 2 * count


def test_what_is_kept_is_no_part_of_the_model():
    model = ours()
    before = set(model.state_dict()), set(vars(model.blocks[0].ga))
    with FrozenWeights().used_by(model):
        predict(model)
        assert (set(model.state_dict()), set(vars(model.blocks[0].ga))) == before


def test_nothing_kept_after_an_error():
    model, frozen = ours(), FrozenWeights()
    with pytest.raises(ArithmeticError), frozen.used_by(model):
        raise ArithmeticError
    before = predict(model)
    for parameter in model.parameters():
        parameter.data.mul_(1.1)
    assert not torch.equal(before["energy"], predict(model)["energy"])
