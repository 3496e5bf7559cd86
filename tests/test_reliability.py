"""Trainings by the command that are damaged, interrupted or fed bad numbers, in this process."""

from __future__ import annotations

import pytest
import torch
import yaml
from fairchem.core.common import distutils
from fairchem.core.trainers import OCPTrainer

from fairchem_equiformer.fairchem1.cli import main
from tests.conftest import make_tiny_config

# Four structures, one a batch, and two epochs.
STEPS = 8


@pytest.fixture
def train(tmp_path, tiny_lmdb, monkeypatch):
    """Run a training of eight steps in a folder of its own; its exit status."""
    config = make_tiny_config(tiny_lmdb)
    config["model"] |= {"alpha_drop": 0.0, "drop_path_rate": 0.0, "proj_drop": 0.0}
    config["optim"] |= {"batch_size": 1, "checkpoint_every": 1, "eval_every": 100}
    del config["dataset"]["val"], config["dataset"]["test"], config["dataset"]["relax"]
    monkeypatch.chdir(tmp_path)

    def run(name, *options, **sections):
        (tmp_path / "config.yml").write_text(yaml.safe_dump({**config, **sections}))
        given = ["--mode", "train", "--config-yml", "config.yml", "--cpu", "--timestamp-id", name]
        try:
            return main([*given, f"--run-dir={tmp_path}", *options])
        except SystemExit as stopped:
            return stopped.code
        finally:
            distutils.cleanup()  # as the end of a process does

    run.config = config
    run.folder = lambda name: tmp_path / "checkpoints" / name
    run.saved = lambda name: torch.load(run.folder(name) / "checkpoint.pt", weights_only=False)
    return run


def assert_same_training(saved, expected):
    """Weights, averages and the state of optimizer and schedule, to the last bit."""
    assert saved["step"] == expected["step"] == STEPS
    assert saved["scheduler"]["last_epoch"] == expected["scheduler"]["last_epoch"]
    for name, value in expected["state_dict"].items():
        assert torch.equal(saved["state_dict"][name], value), name
    for one, other in zip(
        saved["ema"]["shadow_params"], expected["ema"]["shadow_params"], strict=True
    ):
        assert torch.equal(one, other)
    assert saved["optimizer"]["param_groups"] == expected["optimizer"]["param_groups"]


class CrashError(Exception):
    """Stands for a kill."""


@pytest.fixture
def crash(monkeypatch):
    """Let the next training crash once the checkpoint of a step is written."""

    def at(step):
        save = OCPTrainer.save

        def save_and_crash(trainer, *args, **kwargs):
            save(trainer, *args, **kwargs)
            if trainer.step == step:
                monkeypatch.setattr(OCPTrainer, "save", save)
                raise CrashError

        monkeypatch.setattr(OCPTrainer, "save", save_and_crash)

    return at


def test_a_resumed_training_is_that_of_an_uninterrupted_one(train, crash):
    assert train("whole") == 0
    for step in (3, 4):  # within an epoch, and at its end
        crash(step)
        with pytest.raises(CrashError):
            train(f"crashed{step}")
        assert train(f"crashed{step}") == 0
        assert_same_training(train.saved(f"crashed{step}"), train.saved("whole"))


def test_a_damaged_checkpoint_is_not_resumed_but_the_one_before(train, crash, caplog):
    crash(5)
    with pytest.raises(CrashError):
        train("damaged")
    path = train.folder("damaged") / "checkpoint.pt"
    content = bytearray(path.read_bytes())
    content[5000:5064] = bytes(64)
    path.write_bytes(content)
    assert train("damaged", "--checkpoint", str(path)) == 0
    messages = [record.getMessage() for record in caplog.records]
    (line,) = [message for message in messages if "the one before it" in message]
    assert str(path) in line
    assert "checkpoint.previous.pt" in line
    assert train.saved("damaged")["step"] == STEPS
