"""Noisy Nodes and the loss of targets that not every atom has."""

from __future__ import annotations

import functools

import numpy as np
import pytest
import torch
from fairchem.core.datasets import data_list_collater
from fairchem.core.datasets.base_dataset import create_dataset
from fairchem.core.modules.loss import DDPLoss
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from fairchem_equiformer.fairchem1.data.noisy_nodes import NoisyNodes, NoisyNodesLmdb, corrupt
from fairchem_equiformer.fairchem1.loss import MaskedMAE
from tests.conftest import make_data, write_lmdb

STD = 0.3
collate = functools.partial(data_list_collater, otf_graph=True)
OC20 = {"std": STD, "probability": 0.5, "interpolate": True}
FORMAT = "fairchem_equiformer.NoisyNodesLmdb"


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


class TestCorrupt:
    @settings(deadline=None, max_examples=30)
    @given(
        seed=st.integers(0, 2**32),
        atoms=st.integers(0, 20),
        probability=st.floats(0, 1),
        ratio=st.floats(0, 1),
    )
    def test_moves_the_chosen_atoms_and_no_others(self, seed, atoms, probability, ratio):
        pos = torch.randn(atoms, 3, generator=rng(1))
        movable = torch.rand(atoms, generator=rng(2)) < 0.5
        noise = NoisyNodes(STD, probability, ratio)
        moved, chosen = corrupt(pos, noise, rng(seed), movable=movable)
        assert not (chosen & ~movable).any()
        assert torch.equal((moved != pos).any(dim=1), chosen)
        again, _ = corrupt(pos, noise, rng(seed), movable=movable)
        assert torch.equal(moved, again)

    def test_is_normal_noise_around_a_point_on_the_way(self):
        """x = f x0 + (1 - f) x_relaxed + noise, f of each atom uniform."""
        atoms = 20_000
        pos, relaxed = torch.zeros(atoms, 3), torch.tensor([10.0, 20.0, 0.0]).expand(atoms, 3)
        moved, _ = corrupt(pos, NoisyNodes(STD, 1.0, interpolate=True), rng(), relaxed=relaxed)
        share = moved[:, 0] / 10
        np.testing.assert_allclose([share.mean(), share.var()], [1 / 2, 1 / 12], atol=0.01)
        across = moved[:, 1] - 2 * moved[:, 0]  # noise alone: the f of an atom is one for x, y, z
        np.testing.assert_allclose(across.std(), STD * 5**0.5, rtol=0.02)
        np.testing.assert_allclose([moved[:, 2].mean(), moved[:, 2].std()], [0, STD], atol=0.01)

    def test_has_the_probabilities_asked_for(self):
        noise, pos = NoisyNodes(STD, 0.5, 0.25), torch.zeros(20, 3)
        drawn = [corrupt(pos, noise, rng(seed))[1] for seed in range(2000)]
        corrupted = [chosen for chosen in drawn if chosen.any()]  # 0.3 % have none by chance
        assert abs(len(corrupted) / 2000 - 0.5) < 0.04
        assert abs(torch.stack(corrupted).double().mean() - 0.25) < 0.02

    def test_names_a_bad_value(self):
        with pytest.raises(ValueError, match=r"probability is 1\.5, it must be from 0 to 1"):
            NoisyNodes(STD, 1.5)
        with pytest.raises(ValueError, match="interpolate is True, but there are no relaxed"):
            corrupt(torch.zeros(2, 3), NoisyNodes(STD, 1.0, interpolate=True), rng())


def make_entry(index: int):
    """A slab with an adsorbate whose atoms with tags 1 and 2 move when it relaxes."""
    data = make_data(index)
    step = 0.2 * torch.randn(data.pos.shape, generator=rng(index))
    data.tags = torch.tensor([0, 0, 0, 0, 1, 1, 1, 1, 2])
    data.pos_relaxed = data.pos + step * (data.tags > 0)[:, None]
    data.y_relaxed = data.energy_relaxed
    return data


@pytest.fixture(scope="module")
def src(tmp_path_factory):
    path = tmp_path_factory.mktemp("is2re") / "data.lmdb"
    return str(write_lmdb(path, [make_entry(index) for index in range(12)]))


@pytest.fixture
def make(src):
    def make(split: str, noise: dict | None = OC20):
        splits = {"train": {"noisy_nodes": noise, "no_shuffle": True}, "val": {"no_shuffle": True}}
        return create_dataset({"format": FORMAT, "src": src, "splits": splits}, split)

    return make


class TestDataset:
    def test_validation_has_the_structures_as_they_are(self, make):
        for index, data in enumerate(make("val")):
            entry, moving = make_entry(index), make_entry(index).tags > 0
            assert torch.equal(data.pos, entry.pos)
            wanted = entry.pos_relaxed - entry.pos
            torch.testing.assert_close(data.displacement[moving], wanted[moving])
            assert data.displacement[~moving].isnan().all()

    def test_training_leads_from_the_noised_to_the_relaxed_positions(self, make):
        clean = 0
        for index, data in enumerate(make("train")):
            entry, moving = make_entry(index), make_entry(index).tags > 0
            arrived = data.pos + data.displacement
            torch.testing.assert_close(arrived[moving], entry.pos_relaxed[moving])
            assert data.displacement[~moving].isnan().all()
            assert torch.equal(data.pos[~moving], entry.pos[~moving])
            noised = (data.pos != entry.pos).any(dim=1)
            assert noised[moving].all() or not noised.any()
            clean += not noised.any()
        assert 0 < clean < 12

    @pytest.mark.parametrize("workers", [0, 2])
    def test_noise_follows_the_seed_and_differs_between_epochs(self, make, workers):
        def epochs(seed):
            torch.manual_seed(seed)
            loader = DataLoader(make("train"), 4, num_workers=workers, collate_fn=collate)
            return [torch.cat([batch.pos for batch in loader]) for _ in range(2)]

        first, again, other = epochs(0), epochs(0), epochs(1)
        assert torch.equal(first[0], again[0])
        assert torch.equal(first[1], again[1])
        assert not torch.equal(first[0], first[1])
        assert not torch.equal(first[0], other[0])

    def test_structures_get_noise_of_their_own_at_the_same_seed(self, make):
        """Processes of a parallel training have one seed, and read different structures."""
        moved = []
        for index in (0, 1):
            torch.manual_seed(0)
            dataset = make("train", {"std": STD, "probability": 1.0})
            moved.append(dataset[index].pos - make_entry(index).pos)
        assert (moved[0] - moved[1])[4:].abs().max() > 0.01

    def test_a_jump_across_the_cell_is_taken_back(self, tmp_path):
        entry = make_entry(0)
        wanted = (entry.pos_relaxed - entry.pos)[4:]
        entry.pos_relaxed[8] += entry.cell[0, 0] - 2 * entry.cell[0, 1]
        src = write_lmdb(tmp_path / "data.lmdb", [entry])
        data = NoisyNodesLmdb({"src": str(src)})[0]
        torch.testing.assert_close(data.displacement[4:], wanted, atol=1e-5, rtol=0)

    def test_test_sets_need_no_relaxed_positions(self, tmp_path):
        entry = make_entry(0)
        del entry.pos_relaxed, entry.y_relaxed
        src = str(write_lmdb(tmp_path / "data.lmdb", [entry]))
        assert "displacement" not in NoisyNodesLmdb({"src": src})[0]
        with pytest.raises(ValueError, match=r"data.lmdb: structure 0 \(sid 0\): no pos_relaxed"):
            NoisyNodesLmdb({"src": src, "noisy_nodes": OC20})[0]

    def test_a_structure_without_tags_is_named(self, tmp_path):
        entry = make_entry(3)
        entry.tags = None
        src = str(write_lmdb(tmp_path / "data.lmdb", [entry]))
        with pytest.raises(ValueError, match=r"structure 0 \(sid 3\): a displacement needs tags"):
            NoisyNodesLmdb({"src": src})[0]

    def test_an_unknown_key_is_named(self, src):
        with pytest.raises(ValueError, match=r"noisy_nodes: .*'sigma'"):
            NoisyNodesLmdb({"src": src, "noisy_nodes": {"std": STD, "sigma": 1}})


def random_labels(atoms: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Predictions, and targets of which some rows are NaN."""
    generator = rng(seed)
    pred, target = torch.randn(2, atoms, 3, generator=generator)
    target[torch.rand(atoms, generator=generator) < 0.5] = torch.nan
    return pred.requires_grad_(), target


class TestMaskedMAE:
    @pytest.mark.parametrize("reduction", ["mean", "sum", None])
    def test_is_the_mean_over_labelled_entries(self, reduction):
        pred, target = random_labels(9, 0)
        loss = DDPLoss("masked_mae", reduction)(pred, target, torch.tensor([9]))
        there = ~target.isnan()
        torch.testing.assert_close(loss, (pred - target)[there].abs().mean())
        loss.backward()
        wanted = torch.where(there, (pred - target).sign() / there.sum(), 0.0)
        torch.testing.assert_close(pred.grad, wanted)

    def test_without_any_label_is_zero_with_a_gradient(self):
        pred = torch.randn(4, 3, requires_grad=True)
        target = torch.full((4, 3), torch.nan)
        loss = DDPLoss("masked_mae", None)(pred, target, torch.tensor([4]))
        loss.backward()
        assert loss.item() == 0
        assert torch.equal(pred.grad, torch.zeros(4, 3))

    def test_has_the_registered_name(self):
        assert isinstance(DDPLoss("masked_mae", None).loss_fn, MaskedMAE)
