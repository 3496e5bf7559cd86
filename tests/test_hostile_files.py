"""No file that this package reads by itself has anything called, unless somebody trusts it."""

from __future__ import annotations

import ast
import pickle
from pathlib import Path

import lmdb
import numpy as np
import pytest
import torch
import yaml
from fairchem.core import _cli
from fairchem.core.common import distutils

from fairchem_equiformer.adsorbml.batches import ModelRelaxer
from fairchem_equiformer.adsorbml.oc20_dense import read_oc20_dense
from fairchem_equiformer.adsorbml.placements import read_placements
from fairchem_equiformer.adsorbml.relaxation import Settings
from fairchem_equiformer.checkpoints.pickled import loads, read_pickle
from fairchem_equiformer.errors import InputError
from fairchem_equiformer.fairchem1 import lmdb_files
from fairchem_equiformer.fairchem1.cli import main
from fairchem_equiformer.fairchem1.data import qm9
from fairchem_equiformer.leaderboard import collect, form
from tests.conftest import make_tiny_config

ROOT = Path(__file__).parents[1]
SOURCES = ("fairchem_equiformer", "benchmarks", "examples", "startup")

# Calls that run what a file asks for; a value is the keyword that makes one safe, and how.
UNSAFE = {
    "torch.load": ("weights_only", True),
    "numpy.load": ("allow_pickle", False),
    "yaml.load": None,
    "yaml.load_all": None,
    "yaml.full_load": None,
    "yaml.unsafe_load": None,
    "torch.jit.load": None,
    "torch.hub.load": None,
    "torch.package.PackageImporter": None,
    "pandas.read_pickle": None,
    "joblib.load": None,
    "runpy.run_path": None,
    "shelve.open": None,
    "eval": None,
    "exec": None,
    **{
        f"{module}.{name}": None
        for module in ("pickle", "marshal", "dill", "cloudpickle")
        for name in ("load", "loads", "Unpickler")
    },
}
SAFE_IF_MISSING = {"numpy.load"}  # since NumPy 1.16.3
ALLOWED = {
    ("fairchem_equiformer/checkpoints/reading.py", "torch.load"): "only with trusted=True",
    ("fairchem_equiformer/checkpoints/pickled.py", "pickle.loads"): "only with trusted=True",
    ("fairchem_equiformer/checkpoints/pickled.py", "pickle.Unpickler"): "finds plain data alone",
    ("benchmarks/precision.py", "pickle.loads"): "the demo's own data: an LMDB holds pickles",
}


def unsafe_calls(source):
    """Names of the calls (and base classes) in a program that run what a file asks for."""
    tree = ast.parse(source)
    defined = {}  # names as they are written -> as they are defined
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                written = alias.asname or alias.name.partition(".")[0]
                defined[written] = alias.name if alias.asname else written
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                defined[alias.asname or alias.name] = f"{node.module}.{alias.name}"

    def is_unsafe(node):
        first, *others = ast.unparse(node).split(".")
        node.name = ".".join([defined.get(first, first), *others])
        return node.name in UNSAFE

    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef):
            yield from (base.name for base in node.bases if is_unsafe(base))
        elif isinstance(node, ast.Call) and is_unsafe(node.func) and not is_made_safe(node):
            yield node.func.name


def is_made_safe(call):
    keyword = UNSAFE[call.func.name]
    if keyword is None:
        return False
    name, safe = keyword
    given = [one.value for one in call.keywords if one.arg == name]
    if not given:
        return call.func.name in SAFE_IF_MISSING
    return isinstance(given[0], ast.Constant) and given[0].value is safe


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("import torch\ntorch.load(f)", ["torch.load"]),
        ("import torch as t\nt.load(f, weights_only=False)", ["torch.load"]),
        ("import torch\ntorch.load(f, weights_only=trusted)", ["torch.load"]),
        ("import torch\ntorch.load(f, weights_only=True)", []),
        ("import numpy as np\nnp.load(f)", []),
        ("import numpy as np\nnp.load(f, allow_pickle=True)", ["numpy.load"]),
        ("from pickle import loads as read\nread(f)", ["pickle.loads"]),
        ("import pickle\nclass A(pickle.Unpickler): ...", ["pickle.Unpickler"]),
        ("import yaml\nyaml.load(f, Loader=yaml.Loader)", ["yaml.load"]),
        ("import yaml\nyaml.safe_load(f)", []),
        ("import torch.jit\ntorch.jit.load(f)", ["torch.jit.load"]),
    ],
)
def test_unsafe_calls_are_found(source, found):
    assert list(unsafe_calls(source)) == found


def test_no_other_file_is_read_unsafely():
    files = [path for folder in SOURCES for path in (ROOT / folder).rglob("*.py")]
    found = {
        (str(path.relative_to(ROOT)), name)
        for path in files
        for name in unsafe_calls(path.read_text())
    }
    assert found == set(ALLOWED)


class Hostile:
    """A value whose pickle makes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.fixture
def struck(tmp_path):
    """The file that is there once something hostile has run."""
    return tmp_path / "struck"


REFUSED = r"asks for \S+, which"


@pytest.mark.parametrize("protocol", range(6))
def test_pickles_of_plain_data(protocol):
    plain = {"a": [1, 2.5, None, (True, "b")], "s": {1, 2}, "n": np.float64(0.5), "b": b"\xff"}
    assert loads(pickle.dumps(plain, protocol=protocol)) == plain


@pytest.mark.parametrize("protocol", range(6))
def test_hostile_pickle(struck, tmp_path, protocol):
    path = tmp_path / "a.pkl"
    path.write_bytes(pickle.dumps({"a": Hostile(struck)}, protocol=protocol))
    with pytest.raises(InputError, match=f"{path}: .*{REFUSED}"):
        read_pickle(path)
    assert not struck.exists()
    read_pickle(path, trusted=True)
    assert struck.exists()


def test_hostile_mapping_and_reference_of_adsorbml(struck, tmp_path):
    for name in ("mapping", "oc20dense_targets", "oc20dense_ref_energies", "oc20dense_compute"):
        (tmp_path / f"{name}.pkl").write_bytes(pickle.dumps({"0": Hostile(struck)}))
    with pytest.raises(InputError, match=REFUSED):
        read_placements(tmp_path, tmp_path / "mapping.pkl")
    with pytest.raises(InputError, match=REFUSED):
        read_oc20_dense(tmp_path)
    assert not struck.exists()


def test_hostile_checkpoint_of_adsorbml(struck, tmp_path):
    """In batches fairchem-core reads it, without a check."""
    path = tmp_path / "a.pt"
    torch.save({"state_dict": Hostile(struck), "config": {}}, path)
    settings = Settings("a", "CPU", steps=1, fmax=1.0)
    with pytest.raises(InputError, match=REFUSED):
        ModelRelaxer(path, None, settings)
    assert not struck.exists()
    with pytest.raises(InputError, match="cannot be used"):
        ModelRelaxer(path, None, settings, trusted=True)
    assert struck.exists()


def test_hostile_length_of_an_lmdb(struck, tmp_path):
    path = tmp_path / "data.lmdb"
    with lmdb.open(str(path), subdir=False, map_size=2**20) as env, env.begin(write=True) as write:
        write.put(b"length", pickle.dumps(Hostile(struck)))
    with pytest.raises(InputError, match=REFUSED):
        lmdb_files.check([path], None)
    assert not struck.exists()


def test_hostile_numbers_of_atoms(struck, tmp_path, tiny_lmdb):
    path = tmp_path / "metadata.npz"
    np.savez(path, natoms=np.array([Hostile(struck)] * 4))
    with pytest.raises(InputError, match=r"metadata\.npz cannot be read"):
        lmdb_files.check([tiny_lmdb], path)
    assert not struck.exists()


def test_hostile_predictions(struck, tmp_path):
    kind = form.Form("OC20", "IS2RE")
    hostile = np.array([Hostile(struck)])
    path = tmp_path / "a.npz"
    np.savez(path, **dict.fromkeys(kind.keys, hostile))
    problems = list(form.problems(path, kind, {}))
    assert len(problems) == len(kind.keys)
    assert all("cannot be read (Object arrays cannot be loaded" in line for line in problems)
    folder = tmp_path / kind.splits[0]
    folder.mkdir()
    np.savez(folder / collect.PIECES[kind.task], ids=hostile)
    with pytest.raises(InputError, match="ids: Object arrays cannot be loaded"):
        collect._collect_task(tmp_path, kind)
    assert not struck.exists()


def test_hostile_molecules_of_qm9(struck, tmp_path):
    (tmp_path / "raw").mkdir()
    torch.save([{"z": Hostile(struck)}], tmp_path / "raw" / "qm9_v3.pt")
    with pytest.raises(OSError, match=r"qm9_v3\.pt is damaged"):
        qm9.prepare(tmp_path)
    assert not struck.exists()


@pytest.fixture
def fairchem(tmp_path, tiny_lmdb, monkeypatch, capsys):
    """The command on the tiny config, with other keys of it; status and what it printed."""
    monkeypatch.chdir(tmp_path)

    def run(*options, mode="train", **sections):
        config = make_tiny_config(tiny_lmdb)
        config["model"] |= sections.pop("model", {})
        Path("config.yml").write_text(yaml.safe_dump(config | sections))
        given = ["--mode", mode, "--config-yml", "config.yml", "--cpu", f"--run-dir={tmp_path}"]
        try:
            status = main([*given, *options])
        except SystemExit as stopped:
            status = stopped.code
        finally:
            distutils.cleanup()
        return status, capsys.readouterr().err

    return run


@pytest.mark.parametrize("key", ["--checkpoint", "finetune_config.starting_checkpoint"])
def test_hostile_checkpoint_of_the_command(struck, tmp_path, fairchem, monkeypatch, key):
    monkeypatch.setattr(_cli, "main", lambda *_: None)
    path = tmp_path / "a.pt"
    torch.save({"state_dict": {}, "config": {}, "more": Hostile(struck)}, path)
    given = {} if key == "--checkpoint" else {"finetune_config": {"starting_checkpoint": str(path)}}
    options = ["--checkpoint", str(path)] if key == "--checkpoint" else []
    status, shown = fairchem(*options, model=given)
    assert status == 2
    assert shown.count("\n") == 1
    assert f"{key}: {path}: asks for " in shown
    assert "--task.trusted=True" in shown
    assert not struck.exists()
    assert fairchem(*options, "--task.trusted=True", model=given)[0] == 0
    assert struck.exists()


def test_hostile_checkpoint_of_a_run_that_is_resumed(struck, tmp_path, fairchem, caplog):
    """It lies where the run would have written its own."""
    path = tmp_path / "checkpoints" / "a" / "checkpoint.pt"
    path.parent.mkdir(parents=True)
    torch.save({"state_dict": {}, "config": {}, "more": Hostile(struck)}, path)
    assert fairchem("--timestamp-id", "a")[0] == 2
    assert f"{path}: asks for " in caplog.text
    assert not struck.exists()
