"""From a checkpoint to the files of the leaderboards: the files, their validator, the scores."""

from __future__ import annotations

import argparse
import json

import ase.io
import numpy as np
import pytest
import torch
import yaml
from ase import Atoms
from ase.calculators.calculator import Calculator, all_changes
from ase.calculators.singlepoint import SinglePointCalculator
from ase.constraints import FixAtoms
from fairchem.core.common import distutils
from fairchem.core.modules.evaluator import Evaluator
from fairchem.core.scripts import make_submission_file
from hypothesis import given, settings
from hypothesis import strategies as st
from torch_geometric.data import Data

from fairchem_equiformer.errors import InputError
from fairchem_equiformer.fairchem1 import cli, relaxation
from fairchem_equiformer.leaderboard import form, metrics, split, systems
from fairchem_equiformer.leaderboard.__main__ import main
from fairchem_equiformer.leaderboard.form import Form
from tests.conftest import make_atoms, make_data, make_tiny_config, write_lmdb

# fairchem calls ASE by an old name when it writes a frame.
pytestmark = pytest.mark.filterwarnings("ignore:Please use atoms.calc = calc:FutureWarning")

FORMS = [Form(dataset, task) for dataset, tasks in form.TASKS.items() for task in tasks]
ROWS = {"7_0": 2, "7_11": 3, "12_4": 1}  # in a file's order


def arrays(kind, rows=ROWS):
    """What a right file of a form holds, with random numbers."""
    rng = np.random.default_rng(0)
    content = {}
    for name in kind.splits:
        content[f"{name}_ids"] = np.array(list(rows))
        if "energy" in form.FIELDS[kind.task]:
            content[f"{name}_energy"] = rng.normal(size=len(rows)).astype(np.float32)
        if kind.task in form.PER_ATOM:
            values = rng.normal(size=(sum(rows.values()), 3)).astype(np.float32)
            content[f"{name}_{form.PER_ATOM[kind.task]}"] = values
            content[f"{name}_chunk_idx"] = np.cumsum(list(rows.values()))[:-1]
    return content


def against(kind, rows=ROWS):
    return dict.fromkeys(kind.splits, rows)


def check(path, content, kind, rows):
    np.savez(path, **content)
    return list(form.problems(path, kind, rows))


def changed(key, function):
    """A change of one array, by a function that returns another or changes it in place."""

    def change(content):
        result = function(content[key])
        content[key] = content[key] if result is None else result

    return change


def put(index, value):
    def function(array):
        array[index] = value

    return function


S2EF, IS2RE, IS2RS = (Form("OC20", task) for task in form.TASKS["OC20"])
# A change; what is said of it with the test set at hand; and without, if anything else.
DAMAGE = [
    (S2EF, lambda c: c.pop("ood_ads_forces"), ["ood_ads_forces: missing"], ...),
    (S2EF, lambda c: c.pop("id_ids"), ["id_ids: missing"], ...),
    (IS2RE, lambda c: c.update(x=np.zeros(1)), ["x: no key of IS2RE of OC20"], ...),
    (
        IS2RE,
        changed("id_ids", put(1, "7_0")),
        ["id_ids: 1 of 3 repeated, as '7_0'", "id_ids: 1 of the test set's 3 missing, as '7_11'"],
        ["id_ids: 1 of 3 repeated, as '7_0'"],
    ),
    (
        IS2RS,
        changed("id_ids", put(1, "8_0")),
        [
            "id_ids: 1 of the test set's 3 missing, as '7_11'",
            "id_ids: 1 of 3 not in the test set, as '8_0'",
        ],
        [],
    ),
    (
        IS2RE,
        lambda c: c.update(id_ids=c["id_ids"][:2], id_energy=c["id_energy"][:2]),
        ["id_ids: 1 of the test set's 3 missing, as '12_4'"],
        [],
    ),
    (
        S2EF,
        changed("id_ids", lambda _: np.array([7, 8, 9])),
        ["id_ids: int64 of shape (3,), not a flat array of strings"],
        ...,
    ),
    (
        S2EF,
        changed("id_ids", lambda a: a.astype(object)),
        ["id_ids: cannot be read (Object arrays cannot be loaded"],
        ...,
    ),
    (
        S2EF,
        changed("id_energy", lambda a: a[:, None]),
        ["id_energy: shape (3, 1), not (3,); energies must be flat"],
        ...,
    ),
    (IS2RE, changed("id_energy", lambda a: a[:2]), ["id_energy: shape (2,), not (3,)"], ...),
    (
        S2EF,
        changed("id_energy", np.float16),
        ["id_energy: type float16, not float32 or float64"],
        ...,
    ),
    (
        S2EF,
        changed("id_forces", lambda a: a.astype(int)),
        ["id_forces: type int64, not float16 or float32 or float64"],
        ...,
    ),
    (
        S2EF,
        changed("id_forces", lambda a: a[1:]),
        ["id_forces: shape (5, 3), not (6, 3)"],
        ["id_chunk_idx: '12_4' would have rows 5 to 5 of 5"],
    ),
    (S2EF, changed("id_forces", lambda a: a[:, :2]), ["id_forces: shape (6, 2), not (6, 3)"], ...),
    (S2EF, changed("id_forces", lambda _: np.float32(1)), ["id_forces: shape ()"], ...),
    (
        S2EF,
        changed("id_forces", put((4, 2), np.nan)),
        ["id_forces: 1 of 6 rows not finite, the first is row 4: nan for id '7_11'"],
        ...,
    ),
    (
        IS2RE,
        changed("ood_both_energy", put(2, -np.inf)),
        ["ood_both_energy: 1 of 3 rows not finite, the first is row 2: -inf for id '12_4'"],
        ...,
    ),
    (
        IS2RS,
        changed("id_chunk_idx", put(0, 1)),
        ["id_chunk_idx: row 1 after the atoms of '7_0', which by the test set end at row 2"],
        [],
    ),
    (
        IS2RS,
        changed("id_chunk_idx", put(0, 5)),
        ["id_chunk_idx: row 5 after the atoms of '7_0'"],
        ["id_chunk_idx: '7_11' would have rows 5 to 5 of 6"],
    ),
    (
        IS2RS,
        changed("id_chunk_idx", lambda a: np.append(a, 6)),
        ["id_chunk_idx: 3 cuts, where 3 ids take 2"],
        ...,
    ),
    (
        IS2RS,
        changed("id_chunk_idx", np.float64),
        ["id_chunk_idx: float64 of shape (2,), not a flat array of integers"],
        ...,
    ),
]


class TestForm:
    @pytest.mark.parametrize("kind", FORMS, ids=str)
    @pytest.mark.parametrize("dtype", [np.float32, np.float64])
    def test_right_files_have_no_problems(self, kind, dtype, tmp_path):
        content = {
            k: v.astype(dtype) if v.dtype.kind == "f" else v for k, v in arrays(kind).items()
        }
        assert content.keys() == kind.keys
        assert form.guess(content) == kind
        for rows in ({}, against(kind)):
            assert check(tmp_path / "file.npz", content, kind, rows) == []

    def test_forces_may_be_fairchems_default_half_precision(self, tmp_path):
        content = arrays(S2EF)
        changed("id_forces", np.float16)(content)
        assert check(tmp_path / "file.npz", content, S2EF, against(S2EF)) == []

    @pytest.mark.parametrize(("kind", "change", "compared", "alone"), DAMAGE)
    def test_damage_is_named(self, kind, change, compared, alone, tmp_path):
        content = arrays(kind)
        change(content)
        expected = {True: compared, False: compared if alone is ... else alone}
        for known, messages in expected.items():
            found = check(tmp_path / "file.npz", content, kind, against(kind) if known else {})
            assert len(found) == len(messages)
            for problem, message in zip(found, messages, strict=True):
                assert problem.startswith(message)
                assert "\n" not in problem

    @pytest.mark.parametrize("content", [b"", b"PK\x03\x04nothing", b"not a zip"])
    def test_other_files_are_refused(self, content, tmp_path):
        (tmp_path / "file.npz").write_bytes(content)
        with pytest.raises(InputError, match=r"file\.npz is no \.npz file"):
            form.keys_of(tmp_path / "file.npz")

    def test_a_single_array_is_refused(self, tmp_path):
        np.save(tmp_path / "file.npy", np.zeros(3))
        with pytest.raises(InputError, match=r"is no \.npz file"):
            form.keys_of(tmp_path / "file.npy")

    @given(cut=st.floats(0.01, 0.99))
    @settings(deadline=None, max_examples=25)
    def test_files_cut_off_are_refused(self, cut, tmp_path_factory):
        path = tmp_path_factory.mktemp("cut") / "file.npz"
        np.savez_compressed(path, **arrays(S2EF))
        whole = path.read_bytes()
        path.write_bytes(whole[: int(cut * len(whole))])
        with pytest.raises(InputError):
            list(form.problems(path, S2EF, {}))

    @given(place=st.floats(0, 1, exclude_max=True), byte=st.integers(1, 255), packed=st.booleans())
    @settings(deadline=None, max_examples=60)
    def test_a_damaged_byte_does_not_pass(self, place, byte, packed, tmp_path_factory):
        """It is named, or refuses the whole file, or is one that numpy does not read."""
        path = tmp_path_factory.mktemp("damaged") / "file.npz"
        content = arrays(IS2RS)
        (np.savez_compressed if packed else np.savez)(path, **content)
        damaged = bytearray(path.read_bytes())
        damaged[int(place * len(damaged))] ^= byte
        path.write_bytes(damaged)
        try:
            found = list(form.problems(path, IS2RS, against(IS2RS)))
        except InputError:
            return
        if not found:
            with np.load(path) as file:
                assert all(np.array_equal(file[key], value) for key, value in content.items())

    @given(data=st.data())
    @settings(deadline=None, max_examples=60)
    def test_any_order_passes_and_any_one_change_does_not(self, data, tmp_path_factory):
        """The test set has the ids of the file; values, cuts, ids or order then change in one."""
        kind = data.draw(st.sampled_from(FORMS))
        counts = data.draw(st.lists(st.integers(1, 4), min_size=2, max_size=6))
        rows = {f"{sid}_1": count for sid, count in enumerate(counts)}
        order = data.draw(st.permutations(list(rows)))
        content = arrays(kind, {name: rows[name] for name in order})
        path = tmp_path_factory.mktemp("any") / "file.npz"
        assert check(path, content, kind, against(kind, rows)) == []

        key = data.draw(st.sampled_from(sorted(content)))
        index = tuple(data.draw(st.integers(0, size - 1)) for size in content[key].shape)
        if key.endswith("ids"):
            content[key][index] = "x"
        elif key.endswith("chunk_idx"):
            content[key][index] += data.draw(st.sampled_from([-1, 1]))
        else:
            content[key][index] = data.draw(st.sampled_from([np.nan, np.inf, -np.inf]))
        found = check(path, content, kind, against(kind, rows))
        assert found
        assert all(problem.startswith(f"{key}: ") for problem in found)

    @pytest.mark.parametrize("dataset", form.SPLITS)
    def test_fairchems_script_makes_the_same_but_for_flat_energies(self, dataset, tmp_path):
        kind = Form(dataset, "S2EF")
        content = arrays(kind)
        sources = {name: str(tmp_path / f"{name}.npz") for name in kind.splits}
        for name, path in sources.items():
            pieces = {field: content[f"{name}_{field}"] for field in form.FIELDS["S2EF"]}
            pieces["energy"] = pieces["energy"][:, None]  # as the trainer leaves them
            np.savez(path, **pieces)
        out = tmp_path / "out.npz"
        options = {"dataset": dataset, "out_path": str(out), "is2re_relaxations": False}
        make_submission_file.main(argparse.Namespace(**sources, **options))
        assert list(form.problems(out, kind, against(kind))) == [
            f"{name}_energy: shape (3, 1), not (3,); energies must be flat" for name in kind.splits
        ]


ADWT = "positions_average_distance_within_threshold"


class Pull(Calculator):
    """A force of the given length on each atom, in a direction that differs from atom to atom."""

    implemented_properties = ("energy", "forces")

    def __init__(self, lengths):
        super().__init__()
        self.lengths = np.array(lengths)

    def calculate(self, atoms, properties, system_changes=all_changes):
        super().calculate(atoms, properties, system_changes)
        directions = np.eye(3)[np.arange(len(atoms)) % 3]
        self.results = {"energy": 0.0, "forces": self.lengths[:, None] * directions}


CELL = np.array([[5.0, 0, 0], [2.0, 4.0, 0], [0, 0, 20.0]])


def validation_system(sid, pos_relaxed, energy_relaxed):
    """Two fixed atoms and two free ones."""
    return Data(
        sid=sid,
        pos=torch.zeros(4, 3),
        atomic_numbers=torch.tensor([29, 29, 29, 1], dtype=torch.uint8),
        fixed=torch.tensor([1, 1, 0, 0]),
        pos_relaxed=torch.tensor(pos_relaxed, dtype=torch.float32),
        energy_relaxed=energy_relaxed,
    )


def write_trajectory(folder, data, positions, energy):
    atoms = Atoms("Cu3H", positions, cell=CELL, pbc=True, constraint=FixAtoms([0, 1]))
    atoms.calc = SinglePointCalculator(atoms, energy=energy, forces=np.zeros((4, 3)))
    start = atoms.copy()
    start.calc = SinglePointCalculator(start, energy=99.0, forces=np.ones((4, 3)))
    ase.io.write(folder / f"{data.sid}.traj", [start, atoms])


HOME = np.array([[0, 0, 1], [1, 1, 1], [2, 1, 3], [0.1, 0.1, 4]])


class TestMetrics:
    def test_by_hand(self, tmp_path):
        """One free atom 0.2 away through the cell's side, the other 0.1: 0.15 on average."""
        data = validation_system(3, HOME, -1.0)
        away = [[9, 9, 9], [9, 9, 9], [0, 0, 0.1], CELL[0] + CELL[1] - [0.2, 0, 0]]
        moved = HOME + np.array(away)
        write_trajectory(tmp_path, data, moved, -0.985)
        # The larger forces are on fixed atoms.
        [one] = metrics.examine(tmp_path, [data], Pull([7.0, 8.0, 0.0355, 0.0455]))
        assert one.sid == "3"
        assert one.energy_error == pytest.approx(0.015)
        assert one.distance == pytest.approx(0.15, abs=1e-6)
        assert one.fmax == pytest.approx(0.0455)

    def test_averages_by_hand(self):
        """Of 490 distances 0.010, ..., 0.499 those above 0.1505 and of 390 forces likewise."""
        ends = [(0.015, 0.1505, 0.0455), (-0.025, 0.6, 0.5), (0.005, 0.0, 0.0), (-0.1, 0.0, 0.4)]
        scored = metrics.score([metrics.Relaxed("x", *end) for end in ends])
        assert scored.systems == 4
        assert scored.energy_mae == pytest.approx((0.015 + 0.025 + 0.005 + 0.1) / 4)
        assert scored.energy_within_threshold == 0.5
        assert scored.adwt == pytest.approx((349 + 0 + 490 + 490) / (4 * 490))
        assert scored.afbt == pytest.approx((354 + 0 + 390 + 0) / (4 * 390))

    @given(
        seeds=st.lists(st.integers(0, 1000), min_size=1, max_size=5),
        size=st.floats(0.0, 1.0),
    )
    @settings(deadline=None, max_examples=25)
    def test_as_fairchems_evaluator(self, seeds, size, tmp_path_factory):
        folder = tmp_path_factory.mktemp("t")
        systems_, predicted = [], []
        for sid, seed in enumerate(seeds):
            rng = np.random.default_rng([sid, seed])
            systems_.append(validation_system(sid, rng.normal(size=(4, 3)), rng.normal()))
            away = rng.uniform(-size, size, (4, 3)) + rng.integers(-1, 2, (4, 3)) @ CELL
            predicted.append(systems_[-1].pos_relaxed.double().numpy() + away)
            energy = systems_[-1].energy_relaxed + rng.normal(scale=0.02)
            write_trajectory(folder, systems_[-1], predicted[-1], energy)
        ours = metrics.score(found := metrics.examine(folder, systems_))

        shared = {
            "cell": torch.tensor(CELL).expand(len(seeds), 3, 3),
            "pbc": torch.tensor([True, True, True]),
            "natoms": torch.full((len(seeds),), 2),
        }
        positions = torch.tensor(np.concatenate([one[2:] for one in predicted]))
        wanted = torch.cat([one.pos_relaxed.double()[2:] for one in systems_])
        theirs = Evaluator("is2rs").eval(
            {"positions": positions, **shared}, {"positions": wanted, **shared}
        )
        assert ours.adwt == pytest.approx(theirs[ADWT]["metric"])
        errors = torch.tensor([one.energy_error for one in found])
        theirs = Evaluator("is2re").eval({"energy": errors}, {"energy": torch.zeros(len(seeds))})
        assert ours.energy_mae == pytest.approx(theirs["energy_mae"]["metric"])
        assert ours.energy_within_threshold == theirs["energy_within_threshold"]["metric"]
        assert ours.afbt is None

    def test_a_damaged_trajectory_is_named(self, tmp_path):
        data = validation_system(3, HOME, -1.0)
        with pytest.raises(split.FailedError, match=r"cannot read .*3\.traj .*remove it"):
            metrics.examine(tmp_path, [data])
        (tmp_path / "3.traj").write_bytes(b"- of Ulm")
        with pytest.raises(split.FailedError, match=r"cannot read .*3\.traj .*remove it"):
            metrics.examine(tmp_path, [data])

    def test_another_systems_trajectory_is_named(self, tmp_path):
        data = validation_system(3, HOME, -1.0)
        write_trajectory(tmp_path, data, HOME, 0.0)
        data.atomic_numbers[3] = 8
        with pytest.raises(split.FailedError, match=r"3\.traj has other atoms than system 3"):
            metrics.examine(tmp_path, [data])

    def test_a_failing_calculator_is_an_error_of_one_line(self, tmp_path):
        data = validation_system(3, HOME, -1.0)
        write_trajectory(tmp_path, data, HOME, 0.0)
        with pytest.raises(InputError, match=r"^system 3: no single point by the calculator: .*3"):
            metrics.examine(tmp_path, [data], Pull([1.0, 2.0, 3.0]))  # four atoms

    def test_test_sets_have_nothing_to_compare_with(self, tmp_path):
        data = validation_system(3, HOME, -1.0)
        del data.pos_relaxed
        with pytest.raises(InputError, match="system 3 has no relaxed structure or energy"):
            metrics.examine(tmp_path, [data])


FRAMES = {"id": 3, "ood_ads": 2, "ood_cat": 1, "ood_both": 2, "ood": 2}


def structure(sid, fid=None):
    """A copper slab with one to three hydrogen atoms; labels are EMT's, where there are any."""
    data = make_data(100 * sid + (fid or 0))
    extra = sid % 3
    for key in ("fid", "energy", "forces", "energy_relaxed", "pos_relaxed"):
        del data[key]
    lift = torch.tensor([[0.0, 0.0, 1.4]])
    data.pos = torch.cat([data.pos, *(data.pos[-1:] + (i + 1) * lift for i in range(extra))])
    for key in ("atomic_numbers", "tags", "fixed"):
        data[key] = torch.cat([data[key], data[key][-1:].repeat(extra)])
    data.natoms = len(data.pos)
    data.sid = sid
    if fid is not None:
        data.fid = fid
    return data


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    """Test sets without labels, a config and a checkpoint of a few steps."""
    folder = tmp_path_factory.mktemp("board")
    sid = 0
    for name, count in FRAMES.items():
        frames, starts = [], []
        for _ in range(count):
            sid += 1
            frames += [structure(sid, fid) for fid in (0, 11)]
            starts.append(structure(sid))
        write_lmdb(folder / "s2ef" / name / "data.lmdb", frames)
        write_lmdb(folder / "is2re" / name / "data.lmdb", starts)
    write_lmdb(folder / "train.lmdb", [make_data(index) for index in range(4)])
    config = make_tiny_config(folder / "train.lmdb")
    config["optim"]["max_epochs"] = 1
    config["task"]["relaxation_fmax"] = 0.0  # the model knows nothing: its forces are small
    config["task"]["relax_opt"]["alpha"] = 0.1
    config["dataset"] = {part: config["dataset"][part] for part in ("train", "val")}
    (folder / "config.yml").write_text(yaml.safe_dump(config))
    words = ["--mode", "train", "--config-yml", str(folder / "config.yml"), "--cpu"]
    assert cli.main([*words, "--run-dir", str(folder), "--timestamp-id", "trained"]) == 0
    return folder


@pytest.fixture
def here(monkeypatch):
    """Runs of `fairchem` stay in this process, to save its start; what was run is returned."""
    modes = []

    def start(words):
        modes.append(words[words.index("--mode") + 1])
        return cli.main(list(words))

    monkeypatch.setattr(split, "start", start)
    return modes


def run(workspace, out, name, *options, parts=("s2ef", "is2re")):
    words = ["run", "--split", name, "--out", out, "--config-yml", workspace / "config.yml"]
    words += ["--checkpoint", workspace / "checkpoints" / "trained" / "best_checkpoint.pt"]
    for part in parts:
        words += [f"--{part}", workspace / part / name]
    return main([str(word) for word in (*words, "--cpu", *options)])


def sources(workspace, part, dataset="OC20"):
    return [f"{name}={workspace / part / name}" for name in form.SPLITS[dataset]]


class TestBoards:
    def test_all_files_of_oc20(self, workspace, here, tmp_path, capsys):
        for name in form.SPLITS["OC20"]:
            assert run(workspace, tmp_path, name) == 0
        assert here == ["predict", "run-relaxations"] * 4
        assert main(["collect", str(tmp_path)]) == 0
        for task, part in (("s2ef", "s2ef"), ("is2re", "is2re"), ("is2rs", "is2re")):
            path = tmp_path / f"{task}_submission.npz"
            capsys.readouterr()
            words = ["validate", str(path), "--against", *sources(workspace, part)]
            assert main(words) == 0
            output = capsys.readouterr().out
            assert f"would be accepted as {task.upper()} of OC20: id " in output
            assert "not compared" not in output
        assert {p.name for p in tmp_path.iterdir() if p.is_file()} == {
            f"{task}_submission.npz" for task in ("s2ef", "is2re", "is2rs")
        }
        self.check_is2re(workspace, tmp_path)

    def check_is2re(self, workspace, out):
        """Energies are those of the positions: predicted there, they come out again."""
        with np.load(out / "is2rs_submission.npz") as file:
            cut = np.split(file["id_pos"], file["id_chunk_idx"])
            pos = dict(zip(file["id_ids"].tolist(), cut, strict=True))
        with np.load(out / "is2re_submission.npz") as file:
            energy = dict(zip(file["id_ids"].tolist(), file["id_energy"].tolist(), strict=True))
        moved = []
        for data in systems.read(str(workspace / "is2re" / "id")):
            place = torch.tensor(pos[str(data.sid)])
            moved.append((place - data.pos).abs().amax())
            assert torch.equal(place[data.fixed == 1], data.pos[data.fixed == 1])
            data.pos = place
            write_lmdb(out / "relaxed" / "data.lmdb", [data])
            words = ["main", "--mode", "predict", "--cpu", "--run-dir", str(out)]
            words += ["--config-yml", str(workspace / "config.yml"), "--timestamp-id", "relaxed"]
            checkpoint = workspace / "checkpoints" / "trained" / "best_checkpoint.pt"
            words += ["--checkpoint", str(checkpoint), f"--dataset.test.src={out / 'relaxed'}"]
            assert cli.main(words) == 0
            with np.load(out / "results" / "relaxed" / "s2ef_predictions.npz") as file:
                assert file["energy"].item() == pytest.approx(energy[str(data.sid)], abs=1e-4)
        assert max(moved) > 0.01

    def test_files_of_oc22(self, workspace, here, tmp_path, capsys):
        options = ["--num-gpus", "1", "--dataset.train.format=oc22_lmdb"]
        for name in form.SPLITS["OC22"]:
            assert run(workspace, tmp_path, name, *options, parts=["s2ef"]) == 0
        assert here == ["predict"] * 2
        assert main(["collect", str(tmp_path), "--dataset", "OC22"]) == 0
        path = tmp_path / "s2ef_submission.npz"
        words = ["--format", "oc22_lmdb", "--against", *sources(workspace, "s2ef", "OC22")]
        assert main(["validate", str(path), *words]) == 0
        assert "accepted as S2EF of OC22: id 6, ood 4\n" in capsys.readouterr().out
        with np.load(path) as file:
            assert file["ood_energy"].shape == (4,)

    @pytest.mark.parametrize(
        ("dataset", "expected"),
        [
            ({"train": {"format": "oc22_lmdb"}}, "oc22_lmdb"),
            ({"train": {"format": "oc22_lmdb"}, "relax": {"format": "lmdb"}}, "lmdb"),
            ({"train": {"format": "x"}, "relax": {"use_train_settings": False}}, "lmdb"),
            ({"train": None}, "lmdb"),
        ],
    )
    def test_the_format_of_data_is_the_trainers(self, dataset, expected):
        assert systems.format_of({"dataset": dataset}, "relax") == expected

    def test_what_is_complete_is_not_run_again(self, workspace, here, tmp_path):
        assert run(workspace, tmp_path, "ood_cat") == 0
        del here[:]
        assert run(workspace, tmp_path, "ood_cat") == 0
        assert here == []

    @pytest.mark.usefixtures("here")
    def test_an_interrupted_relaxation_goes_on(self, workspace, tmp_path, monkeypatch):
        """The first of two batches is kept; the results are those of an uninterrupted run."""
        batches = []
        relax = relaxation.LBFGS.run

        def interrupted(optimizer, *args, **kwargs):
            batches.append(optimizer.optimizable.batch.sid.tolist())
            if len(batches) == 2:
                raise KeyboardInterrupt
            return relax(optimizer, *args, **kwargs)

        monkeypatch.setattr(relaxation.LBFGS, "run", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run(workspace, tmp_path / "halves", "id", parts=["is2re"])
        distutils.cleanup()  # as the end of the process would
        folder = tmp_path / "halves" / "id"
        assert not (folder / split.RELAXED).exists()
        done = [path.stem for path in (folder / "trajectories").glob("*.traj")]
        assert sorted(done) == sorted(map(str, batches[0]))
        (folder / "trajectories" / f"{batches[1][0]}.traj").touch()  # begun, without a frame
        assert run(workspace, tmp_path / "halves", "id", parts=["is2re"]) == 0
        assert batches[2:] == batches[1:2]

        assert run(workspace, tmp_path / "whole", "id", parts=["is2re"]) == 0
        with (
            np.load(folder / split.RELAXED) as halves,
            np.load(tmp_path / "whole" / "id" / split.RELAXED) as whole,
        ):
            assert halves.files == whole.files
            for key in halves.files:
                assert np.array_equal(halves[key], whole[key])

    def test_systems_left_out_are_an_error(self, workspace, here, tmp_path, capsys):
        options = ["--task.num_relaxation_batches=1"]
        assert run(workspace, tmp_path, "id", *options, parts=["is2re"]) == 1
        assert "1 of 3 systems have no trajectory" in capsys.readouterr().err
        assert here == ["run-relaxations"]

    def test_a_failing_fairchem_is_an_error(self, workspace, tmp_path, monkeypatch, capsys):
        monkeypatch.setattr(split, "start", lambda _: 3)
        assert run(workspace, tmp_path, "id") == 1
        assert "fairchem --mode predict ended with status 3" in capsys.readouterr().err

    def test_input_that_gave_no_results_is_forgotten(self, workspace, here, tmp_path):
        assert run(workspace, tmp_path, "id", parts=["s2ef"]) == 0
        assert run(workspace, tmp_path, "id", "--is2re", tmp_path / "nowhere", parts=[]) == 2
        assert run(workspace, tmp_path, "id", parts=["is2re"]) == 0
        assert here == ["predict", "run-relaxations"]

    def test_training_data_are_not_needed(self, workspace, here, tmp_path):
        config = yaml.safe_load((workspace / "config.yml").read_text())
        for part in ("train", "val"):
            config["dataset"][part]["src"] = "nowhere"
        (tmp_path / "config.yml").write_text(yaml.safe_dump(config))
        options = ["--config-yml", tmp_path / "config.yml"]
        assert run(workspace, tmp_path, "id", *options) == 0
        assert run(workspace, tmp_path / "with", "id") == 0
        assert here == ["predict", "run-relaxations"] * 2
        for piece in (split.S2EF, split.RELAXED):
            with (
                np.load(tmp_path / "id" / piece) as without,
                np.load(tmp_path / "with" / "id" / piece) as with_them,
            ):
                for key in with_them.files:
                    assert np.array_equal(without[key], with_them[key])

    def test_results_of_other_input_are_not_taken_over(self, workspace, here, tmp_path, capsys):
        assert run(workspace, tmp_path, "ood_cat", parts=["s2ef"]) == 0
        for options, key in (
            (["--task.relaxation_steps=3"], "config.task.relaxation_steps was 2, now 3"),
            (["--s2ef", workspace / "s2ef" / "id"], "sources.s2ef.src was"),
            (["--checkpoint", workspace / "checkpoints/trained/checkpoint.pt"], "checkpoint was"),
        ):
            assert run(workspace, tmp_path, "ood_cat", *options, parts=["s2ef"]) == 2
            assert f"holds results of other input: {key}" in capsys.readouterr().err
        # What only decides on speed may change, and the other half of the work may come later.
        assert run(workspace, tmp_path, "ood_cat", "--optim.eval_batch_size=1") == 0
        assert here == ["predict", "run-relaxations"]

    def test_test_sets_of_two_models_are_not_joined(self, workspace, here, tmp_path, capsys):
        assert run(workspace, tmp_path, "id", parts=["s2ef"]) == 0
        record = json.loads((tmp_path / "id" / split.RECORD).read_text())
        record["checkpoint"] = "another"
        (tmp_path / "ood").mkdir()
        (tmp_path / "ood" / split.RECORD).write_text(json.dumps(record))
        assert main(["collect", str(tmp_path), "--dataset", "OC22"]) == 2
        assert "id and ood are of two models: checkpoint was" in capsys.readouterr().err
        assert here == ["predict"]

    def test_missing_test_sets_are_named(self, workspace, here, tmp_path, capsys):
        assert main(["collect", str(tmp_path)]) == 2
        assert "has no results of id, ood_ads, ood_cat, ood_both" in capsys.readouterr().err
        assert run(workspace, tmp_path, "ood_cat", parts=["s2ef"]) == 0
        assert main(["collect", str(tmp_path)]) == 2
        message = capsys.readouterr().err
        assert "has no s2ef.npz of id, ood_ads, ood_both" in message
        assert "run --split id --s2ef SRC" in message
        assert here == ["predict"]

    def test_a_file_that_would_be_refused_is_not_written(self, workspace, here, tmp_path, capsys):
        for name in form.SPLITS["OC22"]:
            assert run(workspace, tmp_path, name, parts=["s2ef"]) == 0
        assert len(here) == 2
        path = tmp_path / "ood" / split.S2EF
        with np.load(path) as file:
            content = dict(file)
        content["forces"][1, 1] = np.nan
        np.savez(path, **content)
        assert main(["collect", str(tmp_path), "--dataset", "OC22"]) == 2
        assert "ood_forces: 1 of 22 rows not finite" in capsys.readouterr().err
        del content["forces"]  # as of a model of energies
        np.savez(path, **content)
        assert main(["collect", str(tmp_path), "--dataset", "OC22"]) == 2
        assert "would be refused: ood_forces: missing" in capsys.readouterr().err
        assert not list(tmp_path.glob("*.npz"))
        assert not list(tmp_path.glob(".*"))

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            (["--run-dir=x"], "--run-dir is set by this command"),
            (["--submit"], "--submit is set by this command"),
            (["--dataset.test.src=x"], "--dataset.test.src is set by this command"),
            (["--checkpoint", "nowhere.pt"], "--checkpoint: no such file: nowhere.pt"),
            (["--config-yml", "nowhere.yml"], "--config-yml: no such file: nowhere.yml"),
            (["nonsense"], "cannot read the argument 'nonsense'"),
            (["--is2re", "nowhere"], "no LMDB: nowhere"),
        ],
    )
    def test_bad_input_is_named(self, workspace, here, tmp_path, capsys, options, message):
        assert run(workspace, tmp_path, "id", *options, parts=["is2re"]) == 2
        error = capsys.readouterr().err
        assert f"leaderboard: error: {message}" in error
        assert here == []

    def test_nothing_to_do_is_an_error(self, workspace, tmp_path, capsys):
        assert run(workspace, tmp_path, "id", parts=[]) == 2
        assert "give --s2ef SRC, --is2re SRC or both" in capsys.readouterr().err

    def test_two_systems_of_one_name_are_refused(self, workspace, here, tmp_path, capsys):
        write_lmdb(tmp_path / "twins" / "data.lmdb", [structure(4), structure(5), structure(4)])
        options = ["--is2re", tmp_path / "twins"]
        assert run(workspace, tmp_path, "id", *options, parts=[]) == 2
        assert "two systems share the id 4" in capsys.readouterr().err
        assert here == []

    def test_in_a_process_of_its_own(self, workspace, tmp_path):
        assert run(workspace, tmp_path, "ood_cat", parts=["s2ef"]) == 0
        with np.load(tmp_path / "ood_cat" / split.S2EF) as file:
            assert file["ids"].tolist() == ["6_0", "6_11"]


class TestCommand:
    def test_validate_lists_every_problem(self, tmp_path, capsys):
        content = arrays(IS2RE)
        content["id_energy"][1] = np.nan
        del content["ood_ads_energy"]
        path = tmp_path / "file.npz"
        np.savez(path, **content)
        assert main(["validate", str(path)]) == 1
        lines = capsys.readouterr().out.splitlines()
        assert [line.removeprefix(f"{path}: ") for line in lines] == [
            "ood_ads_energy: missing",
            "id_energy: 1 of 3 rows not finite, the first is row 1: nan for id '7_11'",
            "would be refused as IS2RE of OC20, 2 problems",
        ]

    def test_validate_says_what_it_did_not_compare(self, tmp_path, capsys):
        np.savez(tmp_path / "file.npz", **arrays(IS2RE))
        assert main(["validate", str(tmp_path / "file.npz")]) == 0
        assert capsys.readouterr().out == (
            f"{tmp_path / 'file.npz'}: would be accepted as IS2RE of OC20: id 3, ood_ads 3, "
            "ood_cat 3, ood_both 3; not compared with data: id, ood_ads, ood_cat, ood_both "
            "(--against)\n"
        )

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            (["--dataset", "OC22", "--task", "IS2RS"], "OC22 has no leaderboard of IS2RS"),
            (["--against", "ood=x"], "OC20 has no test set 'ood'"),
            (["--against", "id=nowhere"], "no LMDB: nowhere"),
            (["--against", "id=x", "--format", "xyz"], "cannot read x as xyz"),
        ],
    )
    def test_validate_names_bad_input(self, tmp_path, capsys, options, message):
        np.savez(tmp_path / "file.npz", **arrays(IS2RE))
        assert main(["validate", str(tmp_path / "file.npz"), *options]) == 2
        assert message in capsys.readouterr().err

    @pytest.mark.parametrize("options", [["--against", "id"], ["--against", "id=x", "id=y"], ["x"]])
    def test_bad_options_end_in_usage(self, options):
        with pytest.raises(SystemExit) as ended:
            main(["validate", "file.npz", *options])
        assert ended.value.code == 2

    def test_metrics_makes_a_table_and_a_file(self, tmp_path, capsys):
        """The reference is where the model ends, at EMT's own forces."""
        data = make_data(5)
        atoms = make_atoms(5)
        write_lmdb(tmp_path / "val" / "data.lmdb", [data])
        atoms.calc = SinglePointCalculator(atoms, energy=data.energy + 0.01)
        atoms.write(tmp_path / "5.traj")
        words = ["metrics", "--trajectories", f"val={tmp_path}", "--reference"]
        words += [f"val={tmp_path / 'val'}", "--calculator", "ase.calculators.emt.EMT"]
        assert main([*words, "--json", str(tmp_path / "scores.json")]) == 0
        forces = data.forces[data.fixed == 0].norm(dim=1).max().item()
        scores = json.loads((tmp_path / "scores.json").read_text())["val"]
        [one] = scores["relaxed"]
        assert one["fmax"] == pytest.approx(forces, rel=1e-5)
        assert one["energy_error"] == pytest.approx(0.01, abs=1e-5)
        assert scores["adwt"] == 1.0
        row = capsys.readouterr().out.splitlines()[-1].split()
        assert row == ["val", "1", "10", "100.0", "100.0", f"{100 * scores['afbt']:.1f}"]

    def test_metrics_needs_pairs(self, capsys):
        assert main(["metrics", "--trajectories", "a=x", "--reference", "b=y"]) == 2
        assert "need the same names" in capsys.readouterr().err
