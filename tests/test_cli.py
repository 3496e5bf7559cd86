"""The command end to end: train, resume, predict, relax and submit.

Each way to start fairchem is tried in a process of its own, which finds a torch_sparse that cannot
be imported, as on a machine without it. What only needs a run has it in this process: to import
fairchem takes longer than all the rest.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from fairchem.core import _cli
from fairchem.core.common import utils
from fairchem.core.common.flags import flags
from fairchem.core.common.relaxation.ase_utils import OCPCalculator
from submitit import LocalExecutor

from fairchem_equiformer.fairchem1.cli import main
from fairchem_equiformer.ops.radial import RadialTables
from tests.conftest import make_atoms, make_tiny_config

SKIPPED = "fairchem models skipped: dimenet_plus_plus, gemnet, gemnet_gp, gemnet_oc, painn"
OURS = ("-m", "fairchem_equiformer", "main")
# As the script `fairchem` that fairchem-core installs; it takes no `main` by itself.
STOCK = ("-c", "import sys; from fairchem.core._cli import main; sys.exit(main())", "main")


@pytest.fixture(scope="session")
def workspace(tmp_path_factory, tiny_lmdb):
    """A folder with a config, and a torch_sparse that fails as a missing one does."""
    folder = tmp_path_factory.mktemp("run")
    (folder / "config.yml").write_text(yaml.safe_dump(make_tiny_config(tiny_lmdb)))
    (folder / "broken").mkdir()
    (folder / "broken" / "torch_sparse.py").write_text(
        "raise ModuleNotFoundError(\"No module named 'torch_sparse'\", name='torch_sparse')\n"
    )
    return folder


@pytest.fixture(scope="session")
def environment(workspace):
    paths = [str(workspace / "broken"), *filter(None, [os.environ.get("PYTHONPATH")])]
    return os.environ | {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}


def arguments(mode, name, *others):
    """Of a run in the workspace; its checkpoints and results lie in folders of this name."""
    options = ["--mode", mode, "--config-yml", "config.yml", "--cpu", "--timestamp-id", name]
    return [*options, *map(str, others)]


@pytest.fixture(scope="session")
def start(workspace, environment):
    """Run a program in a new process; what it printed."""

    def run(program, *args):
        command = [sys.executable, *program, *arguments(*args)]
        done = subprocess.run(
            command, cwd=workspace, env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
        return done.stdout

    return run


@pytest.fixture(scope="session")
def trained(workspace, start):
    """What a training run printed, and the folder of its checkpoints."""
    output = start(OURS, "train", "trained")
    return output, workspace / "checkpoints" / "trained"


def test_trains_without_torch_sparse_and_says_what_was_skipped(trained):
    output, folder = trained
    assert f"{SKIPPED} (No module named 'torch_sparse')" in output
    assert output.count("fairchem models skipped") == 1
    assert torch.load(folder / "checkpoint.pt", weights_only=False)["step"] == 4


@pytest.mark.long
def test_trains_on_two_ranks(start, workspace):
    output = start(OURS, "train", "ranks", "--num-gpus", 2)
    assert output.count(SKIPPED) == 2
    folder = workspace / "checkpoints" / "ranks"
    assert torch.load(folder / "checkpoint.pt", weights_only=False)["step"] == 2


def test_the_stock_command_predicts(workspace, start, trained):
    output = start(STOCK, "predict", "stock", "--checkpoint", trained[1] / "best_checkpoint.pt")
    assert SKIPPED in output
    with np.load(workspace / "results" / "stock" / "s2ef_predictions.npz") as results:
        assert results["ids"].tolist() == ["0_0", "1_0", "2_0", "3_0"]
        assert np.isfinite(results["forces"]).all()


def test_resuming_does_not_stretch_the_schedule(workspace, trained, monkeypatch):
    """fairchem turns epochs into steps in place, and saves the steps under the name of epochs."""
    monkeypatch.chdir(workspace)
    checkpoint = trained[1] / "checkpoint.pt"
    others = ("--checkpoint", checkpoint, "--optim.max_epochs=3", f"--run-dir={workspace}")
    assert main(arguments("train", "resumed", *others)) == 0
    before = torch.load(checkpoint, weights_only=False)
    after = torch.load(workspace / "checkpoints" / "resumed" / "checkpoint.pt", weights_only=False)
    schedules = [saved["config"]["optim"]["scheduler_params"] for saved in (before, after)]
    assert [schedule["epochs"] for schedule in schedules] == [4, 6]
    assert [schedule["warmup_epochs"] for schedule in schedules] == [1, 1]
    assert after["step"] == 6


def test_a_warm_up_shorter_than_a_step_takes_one(workspace, monkeypatch):
    monkeypatch.chdir(workspace)
    others = ("--optim.scheduler_params.warmup_epochs=0.01", f"--run-dir={workspace}")
    assert main(arguments("train", "short", *others)) == 0
    folder = workspace / "checkpoints" / "short"
    schedule = torch.load(folder / "checkpoint.pt", weights_only=False)["scheduler"]
    assert schedule["lr_lambdas"][0]["warmup_epochs"] == 1


def test_relaxes(workspace, trained, monkeypatch):
    monkeypatch.chdir(workspace)
    others = ("--checkpoint", trained[1] / "best_checkpoint.pt", f"--run-dir={workspace}")
    assert main(arguments("run-relaxations", "relaxed", *others)) == 0
    with np.load(workspace / "results" / "relaxed" / "relaxed_positions.npz") as results:
        assert results["ids"].tolist() == ["0", "1", "2", "3"]


def test_a_submitted_job_is_tolerant_too(workspace, environment, trained, monkeypatch):
    """submitit unpickles fairchem's Runner in a process that never saw our command."""
    monkeypatch.setattr(os, "environ", environment)
    monkeypatch.chdir(workspace)
    checkpoint = trained[1] / "best_checkpoint.pt"
    args, overrides = flags.get_parser().parse_known_args(
        arguments("validate", "job", "--checkpoint", checkpoint)
    )
    config = utils.build_config(args, overrides)
    executor = LocalExecutor(folder=workspace / "logs" / "%j")
    executor.update_parameters(timeout_min=5)
    job = executor.submit(_cli.Runner(), config)
    job.result()
    assert SKIPPED in job.stdout()


def test_calculator_reads_a_checkpoint_without_being_told_its_trainer(trained):
    atoms = make_atoms(0)
    atoms.calc = OCPCalculator(checkpoint_path=trained[1] / "best_checkpoint.pt", cpu=True)
    assert np.isfinite(atoms.get_potential_energy())
    assert atoms.get_forces().shape == (len(atoms), 3)


def test_calculator_freezes_its_weights_until_others_are_loaded(trained, monkeypatch):
    calculator = OCPCalculator(checkpoint_path=trained[1] / "best_checkpoint.pt", cpu=True)
    model, made = calculator.trainer.model, []

    def energy():
        return calculator.get_potential_energy(make_atoms(0))

    def of(weights, original=RadialTables.of):
        made.append(weights)
        return original(weights)

    monkeypatch.setattr(RadialTables, "of", of)
    first = energy()
    calls = len(made)
    calculator.reset()
    assert energy() == first
    assert len(made) == calls > 0
    model.load_state_dict({name: 1.5 * value for name, value in model.state_dict().items()})
    calculator.reset()
    second = energy()
    assert len(made) == 2 * calls
    assert second != first


@pytest.fixture
def handed_over(monkeypatch):
    """What the command hands to fairchem-core's, call by call."""
    calls = []
    monkeypatch.setattr(_cli, "main", lambda *args: calls.append(args))
    return calls


def test_a_leading_main_changes_nothing(workspace, handed_over):
    given = ["--mode", "train", "--config-yml", str(workspace / "config.yml"), "--cpu", "--seed=3"]
    given += ["--optim.batch_size=1"]
    assert [main(given), main(["main", *given])] == [0, 0]
    assert handed_over[0] == handed_over[1]
    args, overrides = handed_over[0]
    assert (args.mode, args.seed, overrides) == ("train", 3, ["--optim.batch_size=1"])


def test_arguments_of_the_process_are_the_default(workspace, handed_over, monkeypatch):
    config = str(workspace / "config.yml")
    monkeypatch.setattr(
        sys, "argv", ["fairchem", "main", "--mode", "train", "--config-yml", config, "--cpu"]
    )
    assert main() == 0
    assert handed_over[0][0].config_yml == Path(config)


def test_an_unknown_mode_is_left_to_the_parser(workspace, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["main", "--mode", "tarin", "--config-yml", str(workspace / "config.yml")])
    assert stopped.value.code == 2
    assert "invalid choice: 'tarin'" in capsys.readouterr().err


@pytest.fixture
def sweep(workspace, handed_over, tmp_path, monkeypatch, capsys):
    """Submit a sweep; its configs as fairchem-core makes them, or what is wrong with it."""
    monkeypatch.setattr(shutil, "which", lambda name: name)  # there is Slurm

    def run(content, *options):
        (tmp_path / "sweep.yml").write_text(content)
        config = str(workspace / "config.yml")
        given = ["--mode", "train", "--config-yml", config, "--cpu", "--identifier", "sweep"]
        given += ["--sweep-yml", str(tmp_path / "sweep.yml")]
        handed_over.clear()
        if main([*given, *options]):
            shown = capsys.readouterr().err
            assert shown.count("\n") == 1
            assert not handed_over
            return shown
        ((args, overrides),) = handed_over
        return _cli.create_grid(utils.build_config(args, overrides), args.sweep_yml)

    return run


def test_a_sweep_is_each_combination(sweep):
    """fairchem-core itself asks for collections.MutableMapping, gone since Python 3.10."""
    text = "optim: {lr_initial: [0.1, 0.2], scheduler_params: {warmup_epochs: [1]}}\nseed: [1, 2]\n"
    configs = sweep(text + "model.num_layers: [1]\n", "--submit")
    values = [(config["optim"]["lr_initial"], config["seed"]) for config in configs]
    assert values == [(0.1, 1), (0.1, 2), (0.2, 1), (0.2, 2)]
    assert [config["identifier"] for config in configs] == [f"sweep_run{i}" for i in range(4)]
    assert all(config["optim"]["scheduler_params"]["warmup_epochs"] == 1 for config in configs)
    assert configs[0]["optim"] is not configs[1]["optim"]


@pytest.mark.parametrize(
    ("content", "options", "wrong"),
    [
        ("seed: [1]", (), "--sweep-yml is read with --submit alone"),
        ("seed: [1]", ("--submit", "--timestamp-id", "a"), "the runs of a sweep cannot share one"),
        ("seed: 1", ("--submit",), "seed is 1, and a list of values is needed, such as [1]"),
        ("optim: {optimizer: AdamW}", ("--submit",), "optim.optimizer is 'AdamW', and a list"),
        ("seed: []", ("--submit",), "seed is [], and a list"),
        ("[1, 2]", ("--submit",), "it must map keys of the config to lists"),
        ("", ("--submit",), "it must map keys of the config to lists"),
        ("a: [", ("--submit",), "while parsing"),
        ("seed: [1]\nseed: [2]", ("--submit",), "seed"),
        ("optm.lr_initial: [1]", ("--submit",), "optm.lr_initial: the config has no section optm"),
        ("optim.lr_inital: [1]", ("--submit",), "run 0: "),
        ("optim.lr_inital: [1]", ("--submit",), "lr_initial"),
        ("model.name: [fairchem_equiformer.EquiformerV2, absent]", ("--submit",), "run 1: "),
    ],
)
def test_a_sweep_that_cannot_run_is_one_line(sweep, content, options, wrong):
    assert wrong in sweep(content, *options)
