"""Equiformer (V1) fine-tuned from a checkpoint, with heads that start anew."""

from __future__ import annotations

import pytest
import torch
import yaml

from fairchem_equiformer import checkpoints
from fairchem_equiformer.errors import InputError
from fairchem_equiformer.fairchem1 import cli
from fairchem_equiformer.fairchem1.models import Equiformer
from tests.conftest import TINY_MODEL
from tests.test_equiformer_v1 import KEYS
from tests.tolerances import assert_close

ENERGIES = KEYS | {"regress_forces": False}
NAME = "fairchem_equiformer.Equiformer"


def save(model, config, path, **content):
    state = {f"module.{name}": value for name, value in model.state_dict().items()}
    torch.save({"config": {"model": config}, "state_dict": state, **content}, path)
    return path


@pytest.fixture
def start(tmp_path):
    """Of energies alone."""
    return save(Equiformer(**ENERGIES), {"name": NAME, **ENERGIES}, tmp_path / "start.pt")


def starting(path):
    return {"finetune_config": {"starting_checkpoint": str(path)}}


def test_heads_start_anew(start):
    """And one that the checkpoint lacks is there."""
    tuned = Equiformer(**KEYS, **starting(start)).state_dict()
    saved = checkpoints.load(start).weights
    others = {name for name in tuned if name.startswith(("energy_head.", "vector_heads."))}
    assert {name.split(".")[1] for name in others} >= {"linear_1", "forces"}
    assert set(saved) - others == set(tuned) - others
    for name in set(tuned) - others:
        assert torch.equal(tuned[name], saved[name]), name
    name = "energy_head.linear_1.weight"
    assert not torch.equal(tuned[name], saved[name])


def test_the_averages_are_taken(tmp_path):
    model = Equiformer(**KEYS)
    averages = [torch.full_like(p, 0.25) for p in model.parameters()]
    path = save(model, {"name": NAME, **KEYS}, tmp_path / "ema.pt", ema={"shadow_params": averages})
    tuned = Equiformer(**KEYS, **starting(path))
    assert (tuned.atom_embedding.weight == 0.25).all()


def test_what_it_wrote_predicts_without_the_start(start, tmp_path):
    tuned = Equiformer(**KEYS, **starting(start))
    config = {"name": NAME, **KEYS, **starting(start)}
    path = save(tuned, config, tmp_path / "tuned.pt")
    start.unlink()
    found = checkpoints.load(path)
    assert found.backbone == KEYS
    for name, value in found.model().state_dict().items():
        assert torch.equal(value, tuned.state_dict()[name]), name


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_layers": 3}, r"start\.pt: .*num_layers: checkpoint \d, config 3"),
        ({"finetune_config": {"override": {}}}, "model.finetune_config has override; .*starting"),
        ({"finetune_config": {"starting_checkpoint": "gone.pt"}}, "gone.pt: no such file"),
    ],
)
def test_refused(start, changes, message):
    with pytest.raises(InputError, match=message) as error:
        Equiformer(**KEYS | starting(start) | changes)
    assert "\n" not in str(error.value)


def test_another_model_is_refused(tmp_path):
    torch.save({"config": {"model": TINY_MODEL}, "state_dict": {}}, tmp_path / "v2.pt")
    with pytest.raises(InputError, match=r"v2\.pt holds EquiformerV2, from which Equiformer"):
        Equiformer(**KEYS, **starting(tmp_path / "v2.pt"))


def test_trains_by_the_command(start, tiny_config, tmp_path):
    """Energies and forces from a start of energies; nothing but the heads is far from it."""
    tiny_config["model"] = {"name": NAME, **KEYS, **starting(start)}
    tiny_config["optim"] |= {"max_epochs": 1, "lr_initial": 1e-5, "ema_decay": 0.9}
    config = tmp_path / "config.yml"
    config.write_text(yaml.safe_dump(tiny_config))
    options = ["--cpu", f"--run-dir={tmp_path}", "--timestamp-id=tuned", "--optim.eval_every=1"]
    assert cli.main(["--mode=train", f"--config-yml={config}", *options]) == 0
    tuned = checkpoints.load(tmp_path / "checkpoints/tuned/best_checkpoint.pt")
    saved = checkpoints.load(start)
    assert any(name.startswith("vector_heads.forces.") for name in tuned.weights)
    for name in ("atom_embedding.weight", "blocks.0.ga.source.weight.0e"):
        assert not torch.equal(tuned.weights[name], saved.weights[name])
        assert_close(tuned.weights[name], saved.weights[name], "after 8 steps")
