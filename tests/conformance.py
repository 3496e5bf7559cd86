"""What every model of this package holds to. A new model inherits `Conformance` and passes.

A subclass says how its model is made (`build`), and what its outputs are: of structures (`SYSTEM`),
or vectors of atoms (`VECTORS`). All else follows.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn
from torch_geometric.data import Batch, Data

from tests.models import gradients, random_loss
from tests.structures import batch_of, in_double, moved, single_atom, slab, three_slabs
from tests.tolerances import assert_all_close

Outputs = dict[str, Tensor]


def predict(model: nn.Module, data: Batch) -> Outputs:
    with torch.no_grad():
        return model(data.clone())


def in_float64(model: nn.Module, structure: Data) -> Outputs:
    """Prediction in float64, where rounding of distances does not hide an error."""
    return predict(model.double(), in_double(batch_of(structure)))


def assert_same_bits(out: Outputs, expected: Outputs) -> None:
    assert out.keys() == expected.keys()
    for key, value in expected.items():
        assert torch.equal(out[key], value), key


class Conformance:
    """Tests of one model, inherited by a class named ``Test...``."""

    # Outputs, and of those of structures the numbers that each has.
    SYSTEM: ClassVar[dict[str, tuple[int, ...]]] = {"energy": ()}
    VECTORS: ClassVar[tuple[str, ...]] = ("forces",)
    # Of the outputs of structures: whether two copies have twice the value.
    EXTENSIVE: ClassVar[tuple[str, ...]] = ("energy",)

    def build(self, **changes: Any) -> nn.Module:
        """The model with random weights, in evaluation mode unless ``changes`` are for training."""
        raise NotImplementedError

    def wide_data(self) -> Batch:
        """Three structures of unlike metals, cells, adsorbates and sizes."""
        return three_slabs()

    def rows(self, key: str, structures: int, atoms: int) -> tuple[int, ...]:
        return (atoms, 3) if key in self.VECTORS else (structures, *self.SYSTEM[key])

    # contract

    def test_shapes_and_types(self):
        out = predict(self.build(), self.wide_data())
        assert out.keys() == {*self.SYSTEM, *self.VECTORS}
        for key, value in out.items():
            assert tuple(value.shape) == self.rows(key, 3, 36), key
            assert value.dtype == torch.float32
            assert value.any(), f"{key} is zero"

    @pytest.mark.parametrize("dtype", [torch.uint8, torch.int64, torch.float32])
    def test_atomic_numbers_of_any_type(self, dtype):
        model, data = self.build(), self.wide_data()
        expected = predict(model, data)
        data.atomic_numbers = data.atomic_numbers.to(dtype)
        assert_same_bits(predict(model, data), expected)

    def test_leaves_the_batch_as_it_is(self):
        model, data = self.build(), self.wide_data()
        before = {key: value.clone() for key, value in data if torch.is_tensor(value)}
        keys = set(data.keys())
        with torch.no_grad():
            model(data)
        assert set(data.keys()) == keys
        assert all(torch.equal(data[key], value) for key, value in before.items())

    def test_float64(self):
        """It differs from float32 by rounding; that it is all of it, the symmetries below show."""
        model, data = self.build(), self.wide_data()
        single = predict(model, data)
        double = predict(model.double(), in_double(data))
        assert {value.dtype for value in double.values()} == {torch.float64}
        assert_all_close(single, double, "all in float32")

    def test_every_parameter_gets_a_gradient(self):
        """Data-parallel training waits for all of them, at every step."""
        for data in (self.wide_data(), batch_of(single_atom())):
            grads = gradients(self.build(), data)
            assert [name for name, grad in grads.items() if grad is None] == []
            assert all(grad.isfinite().all() for grad in grads.values())

    # determinism

    def test_two_calls_give_the_same_bits(self):
        model, data = self.build(), self.wide_data()
        assert_same_bits(predict(model, data), predict(model, data))

    def test_gradients_or_none_give_the_same_bits(self):
        model, data = self.build(), self.wide_data()
        assert_same_bits(model(data.clone()), predict(model, data))

    def test_two_backward_passes_give_the_same_bits(self):
        model, data = self.build(), self.wide_data()
        first = {name: grad.clone() for name, grad in gradients(model, data).items()}
        assert_same_bits(gradients(model, data), first)

    # symmetry: a structure is the same whatever it comes with, wherever and however it is listed

    def test_alone_or_in_a_batch(self):
        structures = [slab("Cu", "CO", 1), slab("Pt", "CH3OH", 2), slab("Ni", "H2O", 3)]
        model = self.build()
        together = predict(model, batch_of(*structures))
        sizes = [structure.natoms for structure in structures]
        for index, structure in enumerate(structures):
            part = {key: together[key][index : index + 1] for key in self.SYSTEM}
            part |= {key: together[key].split(sizes)[index] for key in self.VECTORS}
            assert_all_close(part, predict(model, batch_of(structure)), "outputs")

    def test_order_of_atoms(self):
        structure, model = slab("Pt", "CH3OH"), self.build()
        order = torch.randperm(structure.natoms)
        permuted = structure.clone()
        for key in ("pos", "atomic_numbers", "tags", "fixed"):
            permuted[key] = structure[key][order]
        expected = predict(model, batch_of(structure))
        for key in self.VECTORS:
            expected[key] = expected[key][order]
        assert_all_close(predict(model, batch_of(permuted)), expected, "outputs")

    def test_translation(self):
        structure, model = in_double(slab("Pt", "CH3OH")), self.build()
        shifted = moved(structure, shift=torch.tensor([0.75, -1.25, 2.5]))
        assert_all_close(in_float64(model, shifted), in_float64(model, structure), "outputs")

    def test_positions_outside_the_cell(self):
        """Each atom moved by lattice vectors of its own, up to two cells away."""
        structure, model = in_double(slab("Pt", "CH3OH")), self.build()
        cells = torch.randint(-2, 3, (structure.natoms, 3)).double()
        unwrapped = moved(structure, shift=cells @ structure.cell[0])
        assert_all_close(in_float64(model, unwrapped), in_float64(model, structure), "outputs")

    def test_supercell(self):
        """Twice the cell holds twice the energy, with the same vectors on both copies."""
        structure, model = in_double(slab("Pt", "CH3OH")), self.build()
        double = structure.clone()
        double.pos = torch.cat([structure.pos, structure.pos + structure.cell[0, 0]])
        for key in ("atomic_numbers", "tags", "fixed"):
            double[key] = structure[key].repeat(2)
        double.natoms = 2 * structure.natoms
        double.cell = structure.cell * torch.tensor([2.0, 1.0, 1.0])[:, None]
        expected = in_float64(model, structure)
        for key in self.EXTENSIVE:
            expected[key] = 2 * expected[key]
        for key in self.VECTORS:
            expected[key] = expected[key].repeat(2, 1)
        assert_all_close(in_float64(model, double), expected, "outputs")

    # few atoms, or none

    def test_single_atom(self):
        out = predict(self.build(), batch_of(single_atom()))
        assert all(value.isfinite().all() for value in out.values())
        for key in self.VECTORS:
            assert not out[key].any(), key

    def test_no_structure(self):
        full = batch_of(slab())
        fields = ("pos", "cell", "atomic_numbers", "natoms", "tags", "batch")
        empty = Batch(**{key: full[key][:0] for key in fields}, sid=[])
        out = self.build()(empty)
        for key, value in out.items():
            assert tuple(value.shape) == self.rows(key, 0, 0), key
        random_loss(out).backward()

    # errors name the structure by its place and sid, the atom, and the value

    def refused(self, change) -> str:
        bad = slab("Pt", "CH3OH", sid=4711)
        change(bad)
        model, good = self.build(), slab("Cu", "CO", 1)
        with pytest.raises(ValueError, match=r"sid 4711") as error:
            model(batch_of(good, bad))
        assert "structure 1 " in str(error.value)
        predict(model, batch_of(good))  # and the model still works
        return str(error.value)

    @pytest.mark.parametrize("number", [90, 118, -1])
    def test_atomic_number_out_of_range(self, number):
        def change(data):
            data.atomic_numbers[3] = number

        message = self.refused(change)
        assert "atom 3:" in message
        assert str(number) in message
        assert "max_num_elements" in message

    @pytest.mark.parametrize("value", [math.nan, math.inf])
    def test_position_not_finite(self, value):
        def change(data):
            data.pos[5, 1] = value

        message = self.refused(change)
        assert "atom 5" in message
        assert str(value) in message

    def test_cell_not_finite(self):
        def change(data):
            data.cell[0, 2, 2] = math.nan

        assert "nan" in self.refused(change)

    def test_degenerate_cell(self):
        def change(data):
            data.cell[0, 1] = data.cell[0, 0]

        assert "degenerate" in self.refused(change)

    def test_two_atoms_on_one_point(self):
        def change(data):
            data.pos[2] = data.pos[6]

        message = self.refused(change)
        assert "atom 2" in message
        assert "atom 6" in message

    def test_missing_field(self):
        data = self.wide_data()
        del data.cell
        with pytest.raises(ValueError, match="'cell'"):
            self.build()(data)
