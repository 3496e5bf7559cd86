"""The EMT demo: its data, its checks of EvalAI files, and how it reports."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import molecule
from ase.calculators.emt import EMT
from ase.calculators.singlepoint import SinglePointCalculator
from fairchem.core.datasets import data_list_collater
from hypothesis import given
from hypothesis import strategies as st
from torch_geometric.data import Data

sys.path.insert(0, str(Path(__file__).parents[1] / "examples" / "emt"))

import generate
import report
import run

COUNTS = {"train": 2, "test_ood_both": 1}
SEED = 3


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("emt")
    assert generate.generate(folder, COUNTS, SEED)
    return folder


@pytest.fixture(scope="module", params=list(COUNTS))
def split(request):
    return request.param


def emt(example, positions):
    """EMT's energy and forces of an example's atoms elsewhere."""
    atoms = Atoms(
        example.atomic_numbers.numpy(), positions.numpy(), cell=example.cell[0].numpy(), pbc=True
    )
    atoms.calc = EMT()
    return atoms.get_potential_energy(), atoms.get_forces()


class TestPlan:
    @given(seed=st.integers(0, 2**31), count=st.integers(0, 150))
    def test_splits_hold_what_they_promise(self, seed, count):
        counts = dict.fromkeys(generate.FULL, count)
        systems = generate.plan(counts, seed)
        assert [system.sid for system in systems] == list(range(count * len(counts)))
        for system in systems:
            catalyst = system.metals in generate.HELD_OUT_ALLOYS
            adsorbate = system.adsorbate in generate.HELD_OUT_ADSORBATES
            assert catalyst == (system.split in ("test_ood_cat", "test_ood_both"))
            assert adsorbate == (system.split in ("test_ood_ads", "test_ood_both"))

    def test_every_element_is_trained_on(self):
        train = [s for s in generate.plan(generate.FULL, 0) if s.split == "train"]
        assert {metal for system in train for metal in system.metals} == set(generate.METALS)
        held_out = "".join(generate.HELD_OUT_ADSORBATES)
        assert set(held_out) <= set("".join(system.adsorbate for system in train))

    def test_depends_on_the_seed_alone(self):
        first = generate.plan(generate.FULL, 0)
        assert generate.plan(generate.FULL, 0) == first
        assert generate.plan(generate.FULL, 1) != first

    @given(st.integers(0, 1000))
    def test_kept_steps_rise_from_the_first_to_the_last(self, last):
        steps = generate.kept_steps(last)
        assert steps == sorted(set(steps))
        assert (steps[0], steps[-1]) == (0, last)


class TestData:
    def test_fields_are_those_of_oc20(self, data, split):
        for task in ("s2ef", "is2re"):
            for example in report.read_dataset(data / task / split):
                n = example.natoms
                types = {
                    "atomic_numbers": (torch.uint8, (n,)),
                    "tags": (torch.long, (n,)),
                    "fixed": (torch.int, (n,)),
                    "cell": (torch.float32, (1, 3, 3)),
                    "pos": (torch.float32, (n, 3)),
                }
                types |= (
                    {"forces": (torch.float32, (n, 3))}
                    if task == "s2ef"
                    else {"pos_relaxed": (torch.float32, (n, 3))}
                )
                found = {key: (example[key].dtype, tuple(example[key].shape)) for key in types}
                assert found == types
                assert isinstance(example.sid, int)
                assert isinstance(example.fid if task == "s2ef" else 0, int)
                assert isinstance(example["energy" if task == "s2ef" else "energy_relaxed"], float)

    def test_tags_and_fixed_atoms(self, data, split):
        for example in report.read_dataset(data / "is2re" / split):
            tags, fixed = example.tags, example.fixed
            assert tags.tolist() == [0] * 12 + [1] * 4 + [2] * (example.natoms - 16)
            assert fixed.tolist() == [1] * 8 + [0] * (example.natoms - 8)
            moved = (example.pos_relaxed - example.pos).abs().amax(dim=1) > 0
            assert torch.equal(moved, fixed == 0)

    def test_labels_are_emts(self, data, split):
        frames = report.read_dataset(data / "s2ef" / split)
        for sid in {frame.sid for frame in frames}:
            mine = [frame for frame in frames if frame.sid == sid]
            energies, forces = zip(*(emt(frame, frame.pos) for frame in mine), strict=True)
            references = np.array(energies) - [frame.energy for frame in mine]
            np.testing.assert_allclose(references, references[0], rtol=0, atol=1e-9)
            for frame, force in zip(mine, forces, strict=True):
                np.testing.assert_allclose(frame.forces, force, rtol=1e-6, atol=1e-6)

    def test_energies_are_relative_to_clean_slab_and_gas(self, data):
        system = generate.plan(COUNTS, SEED)[0]
        slab = generate.build_slab(system, np.random.default_rng([SEED, 0, 0]))
        generate.relax(slab, "slab")
        gas = generate.gas_references()
        example = report.read_dataset(data / "is2re" / "train")[0]
        symbols = Atoms(example.atomic_numbers[example.tags == 2].numpy()).symbols
        expected = emt(example, example.pos_relaxed)[0] - slab.get_potential_energy()
        expected -= sum(gas[symbol] for symbol in symbols)
        assert example.energy_relaxed == pytest.approx(expected, abs=1e-9)

    @pytest.mark.parametrize("name", ["H2", "N2", "H2O", "CO"])
    def test_gas_references_give_the_gases_no_energy(self, name):
        gas = molecule(name)
        generate.relax(gas, name)
        references = generate.gas_references()
        total = sum(references[symbol] for symbol in gas.symbols)
        assert gas.get_potential_energy() == pytest.approx(total, abs=1e-9)

    def test_relaxed_structure_is_the_last_frame_and_relaxed(self, data, split):
        frames = report.read_dataset(data / "s2ef" / split)
        for example in report.read_dataset(data / "is2re" / split):
            mine = sorted((f for f in frames if f.sid == example.sid), key=lambda f: f.fid)
            assert torch.equal(mine[0].pos, example.pos)
            assert torch.equal(mine[-1].pos, example.pos_relaxed)
            assert mine[-1].energy == example.energy_relaxed
            largest = mine[-1].forces[example.fixed == 0].norm(dim=1).max()
            assert largest < generate.FMAX * (1 + 1e-4)
            assert example.energy_relaxed < mine[0].energy

    def test_no_system_is_in_two_splits(self, data):
        sids = [{d.sid for d in report.read_dataset(data / "s2ef" / name)} for name in COUNTS]
        assert [len(names) for names in sids] == list(COUNTS.values())
        assert not set.intersection(*sids)

    def test_adsorbate_starts_clear_of_the_slab(self, data, split):
        for example in report.read_dataset(data / "is2re" / split):
            atoms = Atoms(
                example.atomic_numbers.numpy(),
                example.pos.numpy(),
                cell=example.cell[0].numpy(),
                pbc=True,
                tags=example.tags.numpy(),
            )
            assert generate.CONTACT < generate.nearest_contact(atoms) < generate.CONTACT + 0.1

    def test_batches_as_fairchem_reads_it(self, data):
        batch = data_list_collater(report.read_dataset(data / "s2ef" / "train"), otf_graph=True)
        assert batch.energy.dtype == torch.float32
        assert batch.cell.shape == (batch.num_graphs, 3, 3)
        assert batch.natoms.sum() == len(batch.pos)

    def test_metadata_counts_atoms(self, data, split):
        with np.load(data / "s2ef" / split / "metadata.npz") as file:
            natoms = file["natoms"].tolist()
        assert natoms == [d.natoms for d in report.read_dataset(data / "s2ef" / split)]

    def test_second_run_does_nothing(self, data, monkeypatch):
        monkeypatch.setattr(generate, "relax_all", pytest.fail)
        assert not generate.generate(data, COUNTS, SEED)

    @pytest.mark.parametrize(("counts", "seed"), [(COUNTS, SEED + 1), ({"train": 1}, SEED)])
    def test_other_data_are_made_anew(self, data, monkeypatch, tmp_path, counts, seed):
        manifest = (data / "manifest.json").read_text()
        (tmp_path / "manifest.json").write_text(manifest)
        monkeypatch.setattr(generate, "relax_all", lambda *_: [])
        assert generate.generate(tmp_path, counts, seed)
        assert json.loads((tmp_path / "manifest.json").read_text())["seed"] == seed

    def test_an_interrupted_run_is_not_taken_for_a_complete_one(self, monkeypatch, tmp_path):
        def interrupted(*_):
            raise KeyboardInterrupt

        monkeypatch.setattr(generate, "relax_all", interrupted)
        with pytest.raises(KeyboardInterrupt):
            generate.generate(tmp_path, COUNTS)
        assert not list(tmp_path.rglob("*"))

    def test_writing_leaves_no_partial_file(self, data):
        assert {path.name for path in data.rglob("*.*")} == {
            "data.0000.lmdb",
            "metadata.npz",
            "manifest.json",
        }

    def test_system_that_does_not_relax_is_named(self, monkeypatch):
        monkeypatch.setattr(generate, "MAX_STEPS", 1)
        monkeypatch.setattr(generate, "MAX_ATTEMPTS", 2)
        system = generate.System(7, "train", ("Cu", "Au"), "fcc111", "CO")
        with pytest.raises(generate.NotRelaxedError, match=r"system 7 \(CO on CuAu fcc111\)"):
            generate.relax_system(system, 0, {})


class TestReport:
    def test_predictions_are_matched_by_id(self, data, tmp_path):
        examples = report.read_dataset(data / "s2ef" / "train")
        shuffled = [examples[i] for i in np.random.default_rng(0).permutation(len(examples))]
        forces = [d.forces[d.fixed == 0].numpy() for d in shuffled]
        np.savez(
            tmp_path / "p.npz",
            ids=np.array([f"{d.sid}_{d.fid}" for d in shuffled]),
            energy=np.array([[d.energy] for d in shuffled]),
            forces=np.concatenate(forces),
            chunk_idx=np.cumsum([len(f) for f in forces])[:-1],
        )
        predicted = report.predictions(tmp_path / "p.npz", examples)
        errors = report.errors(predicted, report.labels(examples))
        assert errors == report.Errors(0.0, 0.0)

    def test_constant_predictor_knows_the_training_set_only(self):
        train = report.Labels(np.array([1.0, 3.0]), np.array([[0.0, 0, 2], [0, 0, 0]]))
        test = report.Labels(np.array([2.5]), np.array([[1.0, 0, 1], [0, 0, -2]]))
        errors = report.errors(report.constant(train, test), test)
        assert errors == report.Errors(0.5, pytest.approx(4 / 6))

    def test_relaxation_errors(self, tmp_path):
        """The fixed copper atom does not count; the free one is 0.2 away through the cell."""
        cell = torch.diag(torch.tensor([5.0, 5.0, 20.0]))
        data = Data(
            sid=4,
            atomic_numbers=torch.tensor([29, 1]),
            fixed=torch.tensor([1, 0]),
            cell=cell[None],
            pos=torch.tensor([[1.0, 1, 1], [0.5, 1, 3]]),
            pos_relaxed=torch.tensor([[1.0, 1, 1], [0.1, 1, 3]]),
            energy_relaxed=-1.0,
        )
        relaxed = Atoms("CuH", [[1, 1, 1], [4.9, 1, 3]], cell=cell.numpy(), pbc=True)
        relaxed.calc = SinglePointCalculator(relaxed, energy=-0.75)
        relaxed.write(tmp_path / "4.traj")
        found = report.relaxation_errors(tmp_path, [data], [Data(energy_relaxed=-3.0)])
        assert found.score.energy_mae == pytest.approx(0.25)
        assert found.constant == pytest.approx(2.0)
        assert found.distance == pytest.approx(0.2)
        assert found.start == pytest.approx(0.4)
        assert found.start_adwt == pytest.approx(99 / 490, abs=1.5 / 490)
        [line] = report.relaxation_table({"test_id": found}).splitlines()[-1:]
        afbt = f"{100 * found.score.afbt:.0f}"
        assert line.split() == ["test_id", "2000", "250", "0.40", "0.20", "20", "61", afbt]

    def test_table_shows_each_error_in_milli(self):
        score = report.Score("val_id", report.Errors(0.5, 0.12), report.Errors(0.05, 0.03))
        line = report.score_table([score]).splitlines()[-1]
        assert line.split() == ["val_id", "120", "30", "4.0", "x", "500", "50"]

    def test_pictures_are_written(self, tmp_path):
        labels = report.Labels(np.arange(4.0), np.arange(12.0).reshape(4, 3))
        report.plot_parity({"id": (labels, labels)}, tmp_path / "parity.png")
        assert [path.name for path in tmp_path.iterdir()] == ["parity.png"]


PREFIX = "2026-01-01 10:00:00 /some/where/ocp_trainer.py:194: (INFO): "


class TestRun:
    @pytest.mark.parametrize(
        ("line", "text"),
        [
            (
                PREFIX + "energy_mae: 2.22e-01, forces_mae: 9.82e-02, loss: 8.83e+00, "
                "lr: 1.00e-03, epoch: 1.50e+00, step: 3.00e+02",
                "step 300, epoch 1.50: force MAE 98 meV/Å, energy MAE 222 meV",
            ),
            (
                PREFIX + "energy_mae: 0.2225, forces_mae: 0.0982, loss: 8.8257, epoch: 1.0000",
                "validation: force MAE 98 meV/Å, energy MAE 222 meV",
            ),
            ("EMT relaxations:  10%|#   | 2/20 [00:03<00:12]", "EMT relaxations 2/20"),
            ("device 0: 100%|####| 6/6 [00:03<00:12]", "device 0 6/6"),
            ("50%|##   | 1/2 [00:03<00:12]", "batch 1/2"),
            (PREFIX + "17 0.032 0.210 0.045", "relaxation step 17, largest force 0.21 eV/Å"),
            (PREFIX + "Loading model: fairchem_equiformer.EquiformerV2", ""),
        ],
    )
    def test_digest_keeps_what_tells_of_progress(self, line, text):
        assert run.digest(line + "\n")[0] == text

    def test_last_validation_counts(self):
        lines = [
            PREFIX + "energy_mae: 0.9000, forces_mae: 0.8000, epoch: 1.0000",
            PREFIX + "energy_mae: 1.00e-01, forces_mae: 1.00e-01, epoch: 2.00e+00, step: 8.0e+00",
            PREFIX + "energy_mae: 0.2225, forces_mae: 0.0982, epoch: 2.0000",
            PREFIX + "energy_mae: 3.00e-01, forces_mae: 3.00e-01, epoch: 2.10e+00, step: 9.0e+00",
        ]
        assert run.validation_errors("\n".join(lines)) == report.Errors(0.2225, 0.0982)

    def test_output_without_validation_is_an_error(self):
        with pytest.raises(run.StepError, match="no line with `energy_mae`"):
            run.validation_errors("nothing")

    def test_failed_step_names_step_command_and_log(self, tmp_path, capsys):
        demo = run.Demo(tmp_path, tmp_path, quick=True)
        code = "print('out of luck'); raise SystemExit(3)"
        with pytest.raises(run.StepError) as failed:
            demo.step("train", [sys.executable, "-c", code])
        message = str(failed.value)
        log = tmp_path / "logs" / "train.log"
        assert "step `train` ended with status 3" in message
        assert str(log) in message
        assert log.read_text() == "out of luck\n"
        assert message.endswith("out of luck")
        assert "== train" in capsys.readouterr().out

    @pytest.mark.parametrize("long", [False, True])
    def test_only_the_long_demo_trains_for_longer(self, tmp_path, monkeypatch, long):
        commands = []
        monkeypatch.setattr(run.Demo, "step", lambda _self, _name, words: commands.append(words))
        monkeypatch.setattr(run.Demo, "checkpoint", lambda *_: None)
        run.train(run.Demo(tmp_path, tmp_path, long=long))
        assert [option in commands[0] for option in run.LONG_OPTIONS] == [long] * 3

    def test_missing_result_is_an_error(self, tmp_path):
        demo = run.Demo(tmp_path, tmp_path, quick=True)
        with pytest.raises(run.StepError, match=r"step `train` ended well but wrote no .*best"):
            demo.checkpoint("train")

    def test_goal_holds_for_known_catalysts_and_adsorbates_only(self):
        good, bad = (report.Errors(0.1, forces) for forces in (0.03, 0.04))
        constant = report.Errors(0.5, 0.1)
        run.check_goal([report.Score("val_id", constant, good), report.Score("x", constant, bad)])
        with pytest.raises(run.StepError, match=r"on test_id .* 2\.5 times smaller"):
            run.check_goal([report.Score("test_id", constant, bad)])

    @pytest.mark.long
    def test_whole_demo(self, tmp_path):
        command = [sys.executable, run.__file__, "--quick", "--runs", tmp_path]
        done = subprocess.run(command, capture_output=True, text=True, env=os.environ, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        [folder] = [path for path in tmp_path.iterdir() if path.name != "quick_data"]
        names = {path.name for path in folder.iterdir()}
        assert {"learning_curve.png", "parity.png", "summary.txt"} <= names
        submissions = {path.name for path in (folder / "submissions").glob("*.npz")}
        assert submissions == {f"{task}_submission.npz" for task in ("s2ef", "is2re", "is2rs")}
