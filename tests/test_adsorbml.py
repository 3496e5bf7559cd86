"""AdsorbML: criteria, ranking, single points, scores, and all commands on two small pairs."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import ase.io
import numpy as np
import pytest
import torch
import yaml
from ase import Atoms
from ase.build import fcc111, molecule
from ase.calculators.calculator import Calculator
from ase.calculators.emt import EMT
from ase.calculators.vasp import Vasp
from ase.constraints import FixAtoms
from fairchem.core import OCPCalculator
from hypothesis import given
from hypothesis import strategies as st

from fairchem_equiformer.adsorbml import ranking, relaxation, score, single_points
from fairchem_equiformer.adsorbml.__main__ import main
from fairchem_equiformer.adsorbml.placements import Placement, read_placements
from fairchem_equiformer.adsorbml.ranking import Candidate, anomalies
from fairchem_equiformer.adsorbml.score import Reference
from fairchem_equiformer.adsorbml.single_points import SinglePoint
from fairchem_equiformer.errors import InputError
from fairchem_equiformer.fairchem1 import cli
from tests.conftest import make_data, make_tiny_config, write_lmdb

sys.path.insert(0, str(Path(__file__).parents[1] / "examples" / "emt"))

import adsorbml as demo
import run as emt_run

EMT_NAME = "ase.calculators.emt.EMT"


def clean_slab(size: int = 3) -> Atoms:
    """Copper, `size` and three layers; the lower two are below the surface and fixed."""
    slab = fcc111("Cu", (size, size, 3), vacuum=8.0, periodic=True)
    slab.info = {}
    slab.set_tags(np.where(slab.get_tags() == 1, 1, 0))
    slab.set_constraint(FixAtoms(mask=slab.get_tags() == 0))
    return slab


def with_co(height: float = 1.9, slab: Atoms | None = None) -> Atoms:
    """The slab with CO, C down, upright over a surface atom."""
    slab = clean_slab() if slab is None else slab
    co = molecule("CO")
    co.positions = [[0, 0, 1.15], [0, 0, 0]] if co.symbols[0] == "O" else [[0, 0, 0], [0, 0, 1.15]]
    co.set_tags(2)
    co.translate(slab.positions[slab.get_tags() == 1][-1] + [0, 0, height])
    return slab + co


class TestAnomalies:
    def judge(self, relaxed, initial=None, slab=None):
        return anomalies(with_co() if initial is None else initial, relaxed, slab)

    def test_none_on_an_unharmed_structure(self):
        assert self.judge(with_co()) == ()
        rattled = with_co()
        rattled.rattle(0.05, seed=1)
        assert self.judge(rattled, slab=clean_slab()) == ()

    def test_none_across_the_cell_boundary(self):
        relaxed = with_co()
        relaxed.positions[:, :2] += 0.3 * relaxed.cell.array[0, :2]
        relaxed.wrap()
        assert self.judge(relaxed) == ()

    def test_dissociated(self):
        relaxed = with_co()
        relaxed.positions[-1, :2] += 3.0  # O beside C
        relaxed.positions[-1, 2] -= 1.15
        assert self.judge(relaxed) == ("dissociated",)

    def test_a_bond_that_forms_in_the_adsorbate_counts_too(self):
        apart = with_co()
        apart.positions[-1, :2] += 3.0
        apart.positions[-1, 2] -= 1.15
        assert self.judge(with_co(), initial=apart) == ("dissociated",)

    # C and Cu: radii 0.76 and 1.32, so 1.5 x 2.08 + 0.6 = 3.72 Angstrom.
    @pytest.mark.parametrize(("height", "found"), [(3.6, ()), (3.8, ("desorbed",))])
    def test_desorbed(self, height, found):
        assert self.judge(with_co(height)) == found

    def test_reconstructed(self):
        relaxed = with_co()
        moved = int(np.flatnonzero(relaxed.get_tags() == 1)[0])
        relaxed.positions[moved, 2] += 3.5  # its bonds to the surface are longer than allowed
        assert "reconstructed" in self.judge(relaxed)

    def test_the_relaxed_clean_surface_is_what_counts(self):
        """A surface that is rebuilt without the adsorbate, too, is no anomaly."""
        slab = clean_slab()
        moved = int(np.flatnonzero(slab.get_tags() == 1)[0])
        slab.positions[moved, 2] += 3.5
        relaxed = with_co(slab=slab)
        assert "reconstructed" in self.judge(relaxed)
        assert "reconstructed" not in self.judge(relaxed, slab=slab)

    def test_intercalated(self):
        relaxed = with_co()
        below = relaxed.positions[relaxed.get_tags() == 0]
        carbon = int(np.flatnonzero(relaxed.symbols == "C")[0])
        shift = below[below[:, 2].argmax()] + [0, 0, 1.7] - relaxed.positions[carbon]
        relaxed.positions[-2:] += shift
        assert self.judge(relaxed) == ("intercalated",)

    def test_only_the_criteria_asked_for(self):
        relaxed = with_co(5.0)
        assert anomalies(with_co(), relaxed, None, ["dissociated", "reconstructed"]) == ()

    def test_not_finite(self):
        relaxed = with_co()
        relaxed.positions[3, 1] = np.nan
        assert self.judge(relaxed) == ("not finite",)

    def test_refuses_a_clean_surface_with_other_atoms(self):
        with pytest.raises(InputError, match=r"the clean surface is Cu26, .* is Cu27"):
            self.judge(with_co(), slab=clean_slab()[1:])


ENERGIES = st.floats(-5, 5).map(lambda energy: round(energy, 3))
CANDIDATES = st.lists(
    st.tuples(ENERGIES, st.sampled_from([(), (), ("desorbed",)])), min_size=1, max_size=8
).map(lambda rows: [Candidate(f"{i:03d}", e, reasons) for i, (e, reasons) in enumerate(rows)])


class TestSort:
    def test_valid_first_then_by_energy(self):
        candidates = [
            Candidate("a", 1.0),
            Candidate("b", -3.0, ("desorbed",)),
            Candidate("c", -1.0),
            Candidate("d", np.nan, ("not finite",)),
            Candidate("e", 1.0),
        ]
        pair = ranking.sort({"x": candidates})["x"]
        assert [one.name for one in pair.candidates] == ["c", "a", "e", "b", "d"]
        assert [one.name for one in pair.best(2)] == ["c", "a"]
        assert [one.name for one in pair.best(9)] == ["c", "a", "e"]

    @given(CANDIDATES, st.randoms(use_true_random=False))
    def test_the_order_of_placements_changes_nothing(self, candidates, random):
        shuffled = random.sample(candidates, len(candidates))
        assert ranking.sort({"x": candidates}) == ranking.sort({"x": shuffled})


def points(*energies):
    return [
        None if energy is None else SinglePoint(energy, scf_steps=10, seconds=2.0)
        for energy in energies
    ]


class TestScore:
    REFERENCE = {  # noqa: RUF012
        "a": Reference(-1.0, evaluations=300, scf_steps=6000, seconds=600.0),
        "b": Reference(-2.0, evaluations=100, scf_steps=2000, seconds=200.0),
    }

    def test_by_hand(self):
        best = {"a": points(-0.95, -1.2), "b": points(-1.8, -1.95), "other": points(-9.0)}
        first, second = (score.score(self.REFERENCE, best, k) for k in (1, 2))
        # a: 0.05 above counts; b: 0.2 above does not. 400 evaluations against 2, or 3 pairs' 3.
        assert (first.success, first.much_better, first.missing) == (0.5, 0.0, 0)
        assert first.speedup_evaluations == 400 / 2
        assert first.speedup_scf_steps == 8000 / 20
        assert first.speedup_seconds == 800 / 4
        # a: 0.2 below is much better; b: 0.05 above counts.
        assert (second.success, second.much_better) == (1.0, 0.5)
        assert second.speedup_evaluations == 400 / 4

    @pytest.mark.parametrize(
        ("energy", "success", "much_better"),
        [(0.125, 0, 0), (0.1, 1, 0), (0.0, 1, 0), (-0.1, 1, 0), (-0.125, 1, 1)],
    )
    def test_threshold(self, energy, success, much_better):
        found = score.score({"a": Reference(0.0)}, {"a": points(energy)}, 1)
        assert (found.success, found.much_better) == (success, much_better)

    def test_another_threshold(self):
        found = score.score({"a": Reference(0.0)}, {"a": points(-0.3)}, 1, threshold=0.25)
        assert (found.success, found.much_better) == (1, 1)
        found = score.score({"a": Reference(0.0)}, {"a": points(0.3)}, 1, threshold=0.5)
        assert (found.success, found.much_better) == (1, 0)

    @pytest.mark.parametrize("best", [{}, {"a": []}, {"a": points(None)}])
    def test_a_pair_without_an_energy_is_no_success(self, best):
        found = score.score({"a": Reference(1.0, evaluations=5)}, best, 1)
        assert found.success == 0
        assert found.missing == sum(map(len, best.values()))
        assert found.speedup_evaluations is None

    def test_unconverged_single_points_cost_but_do_not_count(self):
        best = {"a": [SinglePoint(None, scf_steps=300)]}
        found = score.score({"a": Reference(1.0, evaluations=5, scf_steps=3000)}, best, 1)
        assert (found.success, found.missing) == (0, 1)
        assert found.speedup_scf_steps == 10

    def test_unknown_costs_give_no_speedup(self):
        found = score.score({"a": Reference(1.0, evaluations=5)}, {"a": points(1.0)}, 1)
        assert found.speedup_evaluations == 5
        assert found.speedup_scf_steps is found.speedup_seconds is None

    @given(
        st.dictionaries(st.sampled_from("abc"), ENERGIES, min_size=1),
        st.dictionaries(st.sampled_from("abc"), st.lists(st.one_of(st.none(), ENERGIES))),
    )
    def test_success_grows_with_k_and_speedup_falls(self, known, energies):
        reference = {name: Reference(energy, evaluations=10) for name, energy in known.items()}
        best = {name: points(*row) for name, row in energies.items()}
        scores = [score.score(reference, best, k) for k in range(1, 6)]
        for one, more in pairwise(scores):
            assert one.success <= more.success
            assert one.much_better <= more.much_better <= more.success
            assert one.missing <= more.missing
            if one.speedup_evaluations is not None:
                assert one.speedup_evaluations >= more.speedup_evaluations

    def test_table_and_mean(self):
        best = {"a": points(-0.95, -1.2), "b": points(-1.8, -1.95)}
        scores = tuple(score.score(self.REFERENCE, best, k) for k in (1, 2))
        run = score.RunScore("ours", "GPU", 12.25, scores)
        assert run.success == 0.75
        lines = score.table([run], 2, 0.1).splitlines()
        assert lines[0] == (
            "ours: 2 pairs, 12.25 GPU-seconds per relaxation, "
            "success (within 0.1 eV) 75.0 % on average over k"
        )
        assert lines[-2] == "| 1 | 50.0 % | 0.0 % | 0 | 200 | 400 | 200 |"


class TestReadReference:
    def test_json(self, tmp_path):
        path = tmp_path / "reference.json"
        path.write_text(json.dumps({"a": {"energy": -1.0, "scf_steps": 7}}))
        assert score.read_reference(path) == {"a": Reference(-1.0, scf_steps=7)}

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("{}", "has no pair with a valid placement"),
            ('{"a": {"enrgy": 1}}', r"needs `energy`.*enrgy"),
            ("[1]", "needs `energy`"),
            ("{", "not JSON"),
        ],
    )
    def test_names_what_is_wrong(self, tmp_path, text, message):
        path = tmp_path / "reference.json"
        path.write_text(text)
        with pytest.raises(InputError, match=message) as raised:
            score.read_reference(path)
        assert str(path) in str(raised.value)


def write_placements(folder: Path, pairs=("CO_a", "CO_b"), count=3) -> Path:
    """Placements of CO at different heights and places, and the clean surface.

    No two distances are equal: which of equally far neighbours a model sees depends on the batch.
    """
    for pair in pairs:
        (folder / pair).mkdir(parents=True)
        ase.io.write(folder / pair / "slab.traj", clean_slab(2))
        for index in range(count):
            slab = clean_slab(2)
            slab.positions += np.random.default_rng(index).normal(scale=0.05, size=(12, 3))
            atoms = with_co(1.8 + 0.1 * index, slab)
            atoms.positions[-2:, 0] += 0.3 * index
            ase.io.write(folder / pair / f"{index}.traj", atoms)
    return folder


class TestReadPlacements:
    def test_folder(self, tmp_path):
        write_placements(tmp_path)
        found = read_placements(tmp_path)
        assert [(one.pair, one.name) for one in found] == [
            (pair, name) for pair in ("CO_a", "CO_b") for name in "012"
        ]
        atoms = found[1].atoms()
        assert atoms == ase.io.read(tmp_path / "CO_a" / "1.traj")
        assert atoms.constraints[0].index.tolist() == list(range(8))

    def test_frames_of_one_file(self, tmp_path):
        (tmp_path / "a").mkdir()
        ase.io.write(tmp_path / "a" / "all.extxyz", [with_co(1.8), with_co(2.0)])
        found = read_placements(tmp_path)
        assert [one.name for one in found] == ["all_0", "all_1"]
        assert found[1].atoms().positions == pytest.approx(with_co(2.0).positions, abs=1e-6)

    def test_atoms_below_the_surface_are_fixed_where_the_file_fixes_none(self, tmp_path):
        atoms = with_co()
        atoms.set_constraint()
        (tmp_path / "a").mkdir()
        ase.io.write(tmp_path / "a" / "x.traj", atoms)
        fixed = read_placements(tmp_path)[0].atoms().constraints[0].index
        assert fixed.tolist() == np.flatnonzero(atoms.get_tags() == 0).tolist()

    @pytest.mark.parametrize("suffix", ["json", "pkl"])
    def test_lmdb(self, tmp_path, suffix):
        entries = [make_data(index) for index in range(3)]
        for entry in entries:
            entry.tags = torch.tensor([0] * 4 + [1] * 4 + [2])
        write_lmdb(tmp_path / "data.lmdb", entries)
        mapping = {
            index: {"system_id": "p" if index else "q", "config_id": f"rand{index}"}
            for index in range(3)
        }
        path = tmp_path / f"mapping.{suffix}"
        path.write_bytes(
            json.dumps(mapping).encode() if suffix == "json" else pickle.dumps(mapping)
        )
        found = read_placements(tmp_path / "data.lmdb", path)
        assert [(one.pair, one.name) for one in found] == [
            ("p", "rand1"),
            ("p", "rand2"),
            ("q", "rand0"),
        ]
        atoms = found[0].atoms()
        assert atoms.positions == pytest.approx(entries[1].pos.numpy())
        assert atoms.get_tags().tolist() == entries[1].tags.tolist()
        assert (atoms.numbers == entries[1].atomic_numbers.numpy()).all()
        assert atoms.pbc.all()

    def test_names_what_is_wrong(self, tmp_path):
        with pytest.raises(InputError, match=r"no such folder of placements: .*nowhere"):
            read_placements(tmp_path / "nowhere")
        with pytest.raises(InputError, match="no placements"):
            read_placements(tmp_path)
        (tmp_path / "a").mkdir()
        (tmp_path / "a" / "x.traj").write_text("no trajectory")
        with pytest.raises(InputError, match=r"pair a: .*x\.traj: cannot be read"):
            read_placements(tmp_path)
        atoms = with_co()
        atoms.set_tags(1)
        ase.io.write(tmp_path / "a" / "x.traj", atoms)
        with pytest.raises(InputError, match=r"pair a, placement x: .* tags \[1\]"):
            read_placements(tmp_path)[0].atoms()
        ase.io.write(tmp_path / "a" / "x.extxyz", with_co())
        with pytest.raises(InputError, match="pair a has 2 placements named x"):
            read_placements(tmp_path)

    def test_sid_that_the_mapping_lacks(self, tmp_path, tiny_lmdb):
        path = tmp_path / "mapping.json"
        path.write_text(json.dumps({"0": {"system_id": "p", "config_id": "a"}}))
        with pytest.raises(InputError, match="entry 1 has the sid 1, which --mapping lacks"):
            read_placements(tiny_lmdb, path)


class Broken(Calculator):
    """Fails at every structure."""

    implemented_properties = ("energy", "forces")

    def calculate(self, *_):
        raise RuntimeError("no luck")


class TestCalculators:
    @pytest.mark.parametrize("name", ["EMT", "no.such.module", "ase.calculators.emt.ENT"])
    def test_names_what_is_no_calculator(self, name, tmp_path, capsys):
        write_placements(tmp_path / "in", count=1)
        run = str(tmp_path / "run")
        assert main(["relax", str(tmp_path / "in"), run, "--calculator", name]) == 2
        assert f"--calculator {name}: " in capsys.readouterr().err

    def test_names_the_placement_that_fails(self, tmp_path, capsys):
        write_placements(tmp_path / "in", count=1)
        name = f"{Broken.__module__}.Broken"
        run = str(tmp_path / "run")
        assert main(["relax", str(tmp_path / "in"), run, "--calculator", name]) == 2
        assert "pair CO_a, placement 0: cannot be relaxed: no luck" in capsys.readouterr().err


@pytest.fixture(scope="module")
def placements(tmp_path_factory):
    return write_placements(tmp_path_factory.mktemp("placements"))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, tiny_lmdb):
    """What `fairchem main --mode train` leaves after one epoch of a tiny model."""
    folder = tmp_path_factory.mktemp("training")
    config = folder / "config.yml"
    config.write_text(yaml.safe_dump(make_tiny_config(tiny_lmdb)))
    options = ["--cpu", f"--run-dir={folder}", "--timestamp-id=tiny", "--optim.max_epochs=1"]
    assert cli.main(["main", "--mode=train", f"--config-yml={config}", *options]) == 0
    return folder / "checkpoints" / "tiny" / "best_checkpoint.pt"


@pytest.fixture(scope="module")
def reference(tmp_path_factory, placements):
    """The folder of a reference by EMT, ranked."""
    run = tmp_path_factory.mktemp("reference")
    options = ["--calculator", EMT_NAME, "--fmax", "0.05"]
    assert main(["relax", str(placements), str(run), *options]) == 0
    assert main(["rank", str(placements), str(run), "--only-converged"]) == 0
    return run


@pytest.fixture(scope="module")
def run(tmp_path_factory, placements, checkpoint):
    """The folder of a few steps with the model, ranked."""
    run = tmp_path_factory.mktemp("run")
    options = ["--checkpoint", str(checkpoint), "--cpu", "--steps", "2", "--batch-size", "4"]
    assert main(["relax", str(placements), str(run), *options]) == 0
    assert main(["rank", str(placements), str(run)]) == 0
    return run


class TestCommands:
    def test_the_model_relaxes_in_batches(self, run, placements, checkpoint):
        """Each result belongs to its placement: energy and forces are the model's there."""
        calculator = OCPCalculator(checkpoint_path=checkpoint, cpu=True, seed=0)
        for placement in read_placements(placements):
            relaxed = relaxation.read_relaxed(run, placement)
            initial = placement.atoms()
            moved = np.linalg.norm(relaxed.atoms.positions - initial.positions, axis=1)
            assert moved[:8].max() == 0  # fixed
            assert moved[8:].max() > 1e-3
            again = relaxed.atoms.copy()
            again.calc = calculator
            assert again.get_potential_energy() == pytest.approx(
                relaxed.atoms.get_potential_energy(), abs=1e-4
            )
            assert again.get_forces() == pytest.approx(relaxed.atoms.get_forces(), abs=1e-4)
            assert relaxed.seconds > 0
            assert relaxed.evaluations is None
            assert relaxed.converged == (
                np.linalg.norm(relaxed.atoms.get_forces(), axis=1).max() < relaxation.FMAX
            )

    def test_the_model_relaxes_one_by_one(self, tmp_path, placements, checkpoint):
        """Through the calculator of ASE: its LBFGS, the same model."""
        options = ["--checkpoint", str(checkpoint), "--cpu", "--steps", "2", "--batch-size", "1"]
        assert main(["relax", str(placements), str(tmp_path), *options]) == 0
        settings = relaxation.read_settings(tmp_path)
        assert settings.by == f"{checkpoint}, one by one"
        calculator = OCPCalculator(checkpoint_path=checkpoint, cpu=True, seed=0)
        for placement in read_placements(placements):
            relaxed = relaxation.read_relaxed(tmp_path, placement)
            again = relaxed.atoms.copy()
            again.calc = calculator
            assert again.get_potential_energy() == pytest.approx(
                relaxed.atoms.get_potential_energy(), abs=1e-4
            )
            assert relaxed.evaluations == 3
        batches = [*options[:-1], "2"]
        assert main(["relax", str(placements), str(tmp_path), *batches]) == 2

    def test_a_calculator_relaxes_one_by_one(self, reference, placements):
        for placement in read_placements(placements):
            relaxed = relaxation.read_relaxed(reference, placement)
            again = relaxed.atoms.copy()
            again.calc = EMT()
            assert again.get_potential_energy() == pytest.approx(
                relaxed.atoms.get_potential_energy(), abs=1e-9
            )
            assert np.linalg.norm(again.get_forces(), axis=1).max() < 0.05
            assert relaxed.converged
            assert relaxed.evaluations > 3

    def test_goes_on_where_it_stopped(self, reference, placements, capsys):
        options = ["--calculator", EMT_NAME, "--fmax", "0.05"]
        file = reference / "relaxed" / "CO_b" / "2.traj"
        before = ase.io.read(file)
        file.unlink()
        assert main(["relax", str(placements), str(reference), *options]) == 0
        assert "1 placements relaxed, 5 were there" in capsys.readouterr().out
        assert ase.io.read(file).positions == pytest.approx(before.positions)

    def test_other_settings_need_another_folder(self, reference, placements, capsys):
        options = ["--calculator", EMT_NAME, "--steps", "7", "--fmax", "0.05"]
        assert main(["relax", str(placements), str(reference), *options]) == 2
        assert "holds relaxations with steps 300, now 7" in capsys.readouterr().err

    def test_shards_together_are_the_whole(self, placements, tmp_path):
        found = {}
        for run, shards in (("parts", ("1/2", "2/2")), ("whole", ("1/1",))):
            command = ["relax", str(placements), str(tmp_path / run), "--calculator", EMT_NAME]
            for shard in shards:
                assert main([*command, "--steps", "1", "--shard", shard]) == 0
            assert main(["rank", str(placements), str(tmp_path / run)]) == 0
            found[run] = ranking.read_ranking(tmp_path / run)
        parts, whole = found.values()
        assert parts.keys() == whole.keys()
        for name, pair in parts.items():
            expected = {one.name: pytest.approx(one.energy) for one in whole[name].candidates}
            assert {one.name: one.energy for one in pair.candidates} == expected

    def test_without_fairchem(self, tmp_path, placements, checkpoint):
        """A checkpoint relaxes, one by one, without fairchem-core; batches and LMDBs say why."""
        mapping = tmp_path / "mapping.json"
        mapping.write_text("{}")
        run = str(tmp_path / "run")
        model = ["relax", placements, run, "--checkpoint", checkpoint, "--cpu", "--steps", 1]
        commands = [
            model,
            ["rank", placements, run],
            [*model, "--batch-size", 4],
            ["rank", tmp_path / "data.lmdb", run, "--mapping", mapping],
        ]
        program = (
            "import json, sys; sys.modules['fairchem.core'] = None; import fairchem_equiformer;"
            "fairchem_equiformer.fairchem1_installed = lambda: False;"
            "from fairchem_equiformer.adsorbml.__main__ import main;"
            "print([main(command) for command in json.loads(sys.argv[1])])"
        )
        arguments = json.dumps([[str(word) for word in command] for command in commands])
        command = [sys.executable, "-W", "ignore", "-c", program, arguments]
        found = subprocess.run(command, capture_output=True, text=True, check=True)
        assert "6 placements relaxed" in found.stdout
        assert found.stdout.splitlines()[-1] == "[0, 0, 2, 2]", found.stderr
        assert "need fairchem-core 1.10, whose LBFGS relaxes batches" in found.stderr
        assert "are read by fairchem-core 1.10: pip install" in found.stderr

    def test_names_what_is_not_relaxed(self, placements, tmp_path, capsys):
        options = ["--calculator", EMT_NAME, "--steps", "1", "--shard", "1/2"]
        assert main(["relax", str(placements), str(tmp_path), *options]) == 0
        assert main(["rank", str(placements), str(tmp_path)]) == 2
        assert "pair CO_a, placement 1: not relaxed" in capsys.readouterr().err

    def test_reasons_are_reported(self, placements, tmp_path, capsys):
        options = ["--calculator", EMT_NAME, "--steps", "1"]
        assert main(["relax", str(placements), str(tmp_path), *options]) == 0
        assert main(["rank", str(placements), str(tmp_path), "--only-converged"]) == 0
        out = capsys.readouterr().out
        assert "6 placements of 2 pairs: 0 valid" in out
        assert "6 not converged" in out
        assert "without a valid placement: CO_a, CO_b" in out
        for pair in ranking.read_ranking(tmp_path).values():
            assert {one.reasons for one in pair.candidates} == {("not converged",)}

    def test_single_points_and_scores(self, run, reference, tmp_path, capsys):
        """The scores are those of EMT's energies of the relaxed structures, computed here."""
        command = ["single-points", str(run), "--best", "2", "--calculator", EMT_NAME]
        assert main(command) == 0
        assert main(command) == 0  # all there
        assert "0 energies computed" in capsys.readouterr().out
        options = ["--reference", str(reference), "--best", "2", "--out", str(tmp_path)]
        assert main(["score", str(run), *options]) == 0
        pairs, known = ranking.read_ranking(run), ranking.read_ranking(reference)
        found = json.loads((tmp_path / "scores.json").read_text())["runs"][0]
        for k in (1, 2):
            successes = []
            for name, pair in pairs.items():
                energies = []
                for one in pair.best(k):
                    atoms = ase.io.read(run / "relaxed" / name / f"{one.name}.traj")
                    atoms.calc = EMT()
                    energies.append(atoms.get_potential_energy())
                lowest = known[name].best(1)[0].energy
                successes.append(bool(energies) and min(energies) <= lowest + 0.1)
            assert found["scores"][k - 1]["success"] == np.mean(successes)
        evaluations = [one.evaluations for pair in known.values() for one in pair.candidates]
        count = sum(len(pair.best(1)) for pair in pairs.values())
        assert found["scores"][0]["speedup_evaluations"] == sum(evaluations) / count
        assert found["scores"][0]["missing"] == 0
        assert found["device"] == "CPU"
        assert (tmp_path / "scores.png").read_bytes().startswith(b"\x89PNG")
        assert (tmp_path / "scores.md").read_text().count("|\n") == 2 + 2

    def test_the_reference_against_itself(self, reference, tmp_path):
        """Its own best structures succeed with one single point each."""
        command = ["single-points", str(reference), "--best", "1", "--calculator", EMT_NAME]
        assert main(command) == 0
        options = ["--reference", str(reference), "--best", "1", "--out", str(tmp_path)]
        assert main(["score", str(reference), *options]) == 0
        found = json.loads((tmp_path / "scores.json").read_text())["runs"][0]
        assert found["scores"][0]["success"] == 1.0
        assert found["scores"][0]["much_better"] == 0.0

    def test_missing_files_in_one_line(self, tmp_path, placements, capsys):
        nowhere = str(tmp_path / "nowhere")
        for command, message in (
            (["rank", nowhere, nowhere], "no such folder of placements"),
            (["single-points", nowhere, "--vasp"], "ranking.json; `rank` writes it"),
            (["score", nowhere, "--reference", nowhere, "--out", nowhere], "no such file"),
            (["relax", str(placements), nowhere, "--checkpoint", nowhere, "--cpu"], "--checkpoint"),
        ):
            assert main(command) == 2
            error = capsys.readouterr().err
            assert message in error
            assert error.count("\n") == 1


OSZICAR = """\
       N       E                     dE             d eps       ncg     rms          rms(c)
DAV:   1     0.123456789012E+03    0.12346E+03   -0.12345E+04  1234   0.123E+03
DAV:   2    -0.104500000000E+02   -0.13391E+03   -0.13000E+03  1234   0.234E+02
RMM:   3    -0.104512345678E+02   {change}   -0.12345E-04  1234   0.345E-02
   1 F= -.10451235E+02 E0= -.10450001E+02  d E =-.104512E+02
"""


# ASE would rather find the path in its own file of settings.
@pytest.mark.filterwarnings("ignore:Loaded VASP_PP_PATH from environment")
class TestVasp:
    @pytest.fixture
    def potentials(self, tmp_path, monkeypatch):
        """Pseudopotential files where ASE looks for them; their content is not VASP's."""
        for symbol in ("Cu", "C", "O"):
            folder = tmp_path / "pp" / "potpaw_PBE" / symbol
            folder.mkdir(parents=True)
            (folder / "POTCAR").write_text(f"made up for {symbol}\n")
        monkeypatch.setenv("VASP_PP_PATH", str(tmp_path / "pp"))

    @pytest.mark.usefixtures("potentials")
    def test_inputs_read_back(self, reference):
        assert main(["single-points", str(reference), "--best", "1", "--vasp"]) == 0
        for name, pair in ranking.read_ranking(reference).items():
            (best,) = pair.best(1)
            folder = reference / "single_points" / name / best.name
            atoms = ase.io.read(folder / "POSCAR")
            relaxed = relaxation.read_relaxed(reference, Placement(name, best.name, Atoms)).atoms
            order = np.loadtxt(folder / "ase-sort.dat", dtype=int)[:, 0]  # by element
            assert sorted(order) == list(range(len(relaxed)))
            assert list(atoms.symbols) == list(relaxed.symbols[order])
            assert atoms.positions == pytest.approx(relaxed.positions[order], abs=1e-6)
            assert atoms.cell[:] == pytest.approx(relaxed.cell[:])
            calculator = Vasp(directory=str(folder))
            calculator.read_incar(str(folder / "INCAR"))
            for key, value in {"nsw": 0, "nelm": 300, "ispin": 1, "isif": 0}.items():
                assert calculator.int_params[key] == value
            assert calculator.float_params["encut"] == 350
            assert calculator.string_params["gga"] == "RP"
            assert (folder / "POTCAR").read_text().count("made up for") == 3
            points = (folder / "KPOINTS").read_text().splitlines()[3].split()
            sides = np.abs(relaxed.cell[:2]).max(axis=1)
            assert points == [f"{round(40 / side)}" for side in sides] + ["1"]

    def test_says_that_pseudopotentials_are_missing(self, reference, monkeypatch, capsys, tmp_path):
        monkeypatch.setenv("VASP_PP_PATH", str(tmp_path))
        run = tmp_path / "run"
        shutil.copytree(reference, run, ignore=shutil.ignore_patterns("single_points"))
        assert main(["single-points", str(run), "--best", "1", "--vasp"]) == 2
        assert "pair CO_a, placement " in (error := capsys.readouterr().err)
        assert "pseudopotential" in error.lower()

    @pytest.mark.parametrize(
        ("change", "nelm", "energy"),
        [("-0.12346E-05", 300, -10.450001), ("-0.12346E-01", 3, None), ("-0.1E-05", 3, -10.450001)],
    )
    def test_results(self, tmp_path, monkeypatch, change, nelm, energy):
        monkeypatch.setitem(single_points.SINGLE_POINT_FLAGS, "nelm", nelm)
        folder = tmp_path / "single_points" / "a" / "x"
        folder.mkdir(parents=True)
        (folder / "OSZICAR").write_text(OSZICAR.format(change=change))
        found = single_points.read_single_point(tmp_path, "a", "x")
        assert found == SinglePoint(energy, scf_steps=3)

    def test_none_yet(self, tmp_path):
        assert single_points.read_single_point(tmp_path, "a", "x") is None

    def test_a_file_that_is_no_result(self, tmp_path):
        folder = tmp_path / "single_points" / "a" / "x"
        folder.mkdir(parents=True)
        (folder / "OSZICAR").write_text("killed\n")
        with pytest.raises(InputError, match=r"a/x/OSZICAR: cannot be read"):
            single_points.read_single_point(tmp_path, "a", "x")


class TestOc20Dense:
    """On made files of the published form."""

    FILES = {  # noqa: RUF012
        "targets": {"1_2_3": [("rand0", -0.5), ("heur1", -0.75)], "4_5_6": [("rand2", 1.0)]},
        "ref_energies": {"1_2_3": -100.0, "4_5_6": -200.0},
        "compute": {
            "1_2_3": {
                "rand0": {"ionic": 30, "scf": 400},
                "heur1": {"ionic": 20, "scf": 300},
                "surface": {"ionic": 50, "scf": 900},
            },
            "4_5_6": {"rand2": {"ionic": 7, "scf": 80}},
        },
    }

    def write(self, folder, **changed):
        for name, content in (self.FILES | changed).items():
            (folder / f"oc20dense_{name}.pkl").write_bytes(pickle.dumps(content))

    def test_reference(self, tmp_path):
        """Total energies; the clean surface costs the model as much as DFT and does not count."""
        self.write(tmp_path)
        path = tmp_path / "reference.json"
        assert main(["oc20-dense", str(tmp_path), str(path)]) == 0
        assert score.read_reference(path) == {
            "1_2_3": Reference(-100.75, evaluations=50, scf_steps=700),
            "4_5_6": Reference(-199.0, evaluations=7, scf_steps=80),
        }

    def test_names_what_is_wrong(self, tmp_path, capsys):
        command = ["oc20-dense", str(tmp_path), str(tmp_path / "reference.json")]
        assert main(command) == 2
        assert "oc20dense_targets.pkl" in capsys.readouterr().err
        self.write(tmp_path, ref_energies={"1_2_3": -100.0})
        assert main(command) == 2
        assert "pair 4_5_6: not as expected" in capsys.readouterr().err
        assert not (tmp_path / "reference.json").exists()


class TestDemo:
    def test_placements(self, tmp_path):
        demo.write_placements(tmp_path, demo.SYSTEMS[:1], 2)
        found = read_placements(tmp_path)
        assert [(one.pair, one.name) for one in found] == [
            ("CO_on_Cu_fcc111", "000"),
            ("CO_on_Cu_fcc111", "001"),
        ]
        first, second = (one.atoms() for one in found)
        assert sorted(first.symbols[first.get_tags() == 2]) == ["C", "O"]
        assert np.abs(first.positions - second.positions).max() > 0.1
        slab = ase.io.read(tmp_path / "CO_on_Cu_fcc111" / "slab.traj")
        assert (slab.numbers == first.numbers[first.get_tags() != 2]).all()

    def test_takes_the_newest_checkpoint(self, tmp_path):
        assert demo.newest_checkpoint(tmp_path) is None
        paths = []
        for age, run in enumerate(("b", "c", "a")):  # neither the first name nor the last
            paths.append(tmp_path / run / "checkpoints" / "train" / "best_checkpoint.pt")
            paths[-1].parent.mkdir(parents=True)
            paths[-1].touch()
            os.utime(paths[-1], (1e9, 1e9 + age % 2))
        (tmp_path / "d" / "checkpoints" / "train").mkdir(parents=True)  # stopped before its first
        assert demo.newest_checkpoint(tmp_path) == paths[1]

    @pytest.mark.long
    def test_runs(self, tmp_path, checkpoint):
        demo.run(emt_run.Demo(tmp_path, tmp_path, quick=False), checkpoint, demo.SYSTEMS[:2], 2)
        content = json.loads((tmp_path / "scores.json").read_text())
        assert [len(run["scores"]) for run in content["runs"]] == [5, 5]

    @pytest.mark.long
    def test_several_processes_rank_alike(self, reference, placements):
        before = ranking.read_ranking(reference)
        options = ["--only-converged", "--processes", "2"]
        assert main(["rank", str(placements), str(reference), *options]) == 0
        assert ranking.read_ranking(reference) == before
