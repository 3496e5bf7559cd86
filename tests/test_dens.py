"""DeNS: equal to fairchem's own, and trained by fairchem's own trainer."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import yaml
from fairchem.core.common.registry import registry
from fairchem.core.models.equiformer_v2 import equiformer_v2_dens  # noqa: F401  # registers it
from fairchem.core.models.equiformer_v2.equiformer_v2 import EquiformerV2Backbone as StockBackbone
from fairchem.core.models.equiformer_v2.trainers.dens_trainer import DenoisingForcesTrainer
from fairchem.core.trainers import OCPTrainer

from fairchem_equiformer import convert as convert_command
from fairchem_equiformer import models
from fairchem_equiformer.checkpoints.checkpoint import without_prefix
from fairchem_equiformer.fairchem1 import cli, convert
from fairchem_equiformer.so3.frames import edge_rotation_matrices
from tests.conftest import make_tiny_config
from tests.models import KEYS, fix_roll, results
from tests.stock_checkpoints import build
from tests.structures import batch_of, noisy, single_atom, slab, three_slabs
from tests.tolerances import assert_all_close, assert_close, relative_error

STRESS = {"use_source_target_embedding": True, "decompose": True, "use_denoising": False}
STOCK_HEADS: dict[str, Any] = {
    "energy": {"module": "eqV2_DeNS_scalar_head", "use_denoising": True},
    "forces": {"module": "eqV2_DeNS_vector_head"},
    "stress": {"module": "dens_rank2_symmetric_head", "output_name": "stress", **STRESS},
}


def section(heads=None, **keys):
    """A config's section `model` of fairchem's own classes."""
    return {
        "name": "hydra",
        "pass_through_head_outputs": True,
        "backbone": {"model": "equiformer_v2_dens_backbone", **KEYS, **keys},
        "heads": copy.deepcopy(STOCK_HEADS if heads is None else heads),
    }


def pair(**changes):
    """fairchem's model with our edge frames, and ours on its weights."""
    stock_section = section(**changes)
    theirs = build(stock_section)
    fix_roll(theirs.backbone)
    own_section = convert._rename(stock_section, "fairchem_equiformer")
    own = registry.get_model_class(own_section.pop("name"))(**own_section)
    assert type(own.backbone).__module__ == "fairchem_equiformer.fairchem1.models"
    order = [[name for name, _ in model.named_parameters()] for model in (theirs, own)]
    assert order[0] == order[1]
    own.load_state_dict(theirs.state_dict(), strict=True)
    return theirs, own


def assert_same(theirs, own, data):
    (expected, reference), (got, gradients) = results(theirs, data), results(own, data)
    assert_all_close(got, expected, "outputs")
    for name, value in reference.items():
        if value is None:
            assert gradients[name] is None or not gradients[name].any(), name
        else:  # of sphharm_norm see test_hydra.py
            kind = "gradients that cancel" if "sphharm_norm" in name else "gradients"
            assert_close(gradients[name], value, kind, name=name)


BATCHES = {
    "clean": three_slabs,
    "noisy": lambda: noisy(three_slabs()),
    "noisy in part": lambda: noisy(three_slabs(), mask=0.5),
    "atom alone": lambda: noisy(batch_of(single_atom("Pt", 2), slab("Cu", "CO", 1))),
}


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"use_noise_schedule_sigma_encoding": True, "weight_init": "uniform"},
        {"use_force_encoding": False},
    ],
    ids=str,
)
def test_equals_fairchems(changes, batch):
    assert_same(*pair(**changes), BATCHES[batch]())


def test_heads_without_denoising():
    heads = copy.deepcopy(STOCK_HEADS)
    heads["energy"] |= {"use_denoising": False, "reduce": "mean"}
    heads["stress"]["use_denoising"] = True
    theirs, own = pair(heads=heads)
    assert_same(theirs, own, BATCHES["noisy"]())
    assert not own(BATCHES["noisy"]())["energy"].any()
    assert own(three_slabs())["energy"].all()


def test_forces_matter_in_noisy_steps_only():
    _, own = pair()
    clean, other = three_slabs(), BATCHES["noisy"]()
    other.denoising_pos_forward = False
    with torch.no_grad():
        assert torch.equal(own(clean)["energy"], own(other.clone())["energy"])
        other.denoising_pos_forward = True
        assert relative_error(own(other)["energy"], own(three_slabs())["energy"]) > 1e-3


@pytest.mark.parametrize("field", ["forces", "sigmas"])
def test_missing_fields_are_named(field):
    model = models.DeNSBackbone(**KEYS, use_noise_schedule_sigma_encoding=True)
    batch = BATCHES["noisy"]()
    del batch[field]
    with pytest.raises(ValueError, match=f"no field '{field}'"):
        model(batch)


def test_unknown_key():
    with pytest.raises(ValueError, match="did you mean 'num_layers'"):
        models.DeNSBackbone(num_layer=2)


def test_decays_what_the_model_without_dens_does():
    _, own = pair(use_noise_schedule_sigma_encoding=True)
    names = own.no_weight_decay()
    assert {"backbone.force_embedding.bias", "backbone.norm.affine_weight"} <= names
    assert "backbone.force_embedding.weight" not in names


@pytest.fixture(scope="module")
def train(tmp_path_factory, tiny_lmdb):
    """Train by `fairchem main` with fairchem's DeNS trainer; return the folder of checkpoints."""
    folder = tmp_path_factory.mktemp("dens")

    def run(model, noise, name, epochs, checkpoint=None):
        config = make_tiny_config(tiny_lmdb)
        config |= {"trainer": "equiformerv2_dens", "model": model}
        config["optim"] |= {
            "use_denoising_pos": True,
            "denoising_pos_params": {"prob": 0.5, **noise},
            "denoising_pos_coefficient": 10,
        }
        path = folder / f"{name}.yml"
        path.write_text(yaml.safe_dump(config))
        given = ["main", "--mode=train", f"--config-yml={path}", f"--run-dir={folder}", "--cpu"]
        given += [f"--timestamp-id={name}", "--seed=3", f"--optim.max_epochs={epochs}"]
        given += [f"--checkpoint={checkpoint}"] if checkpoint else []
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(folder)
            # The noise is the same if fairchem draws no rolls, and both start after the weights.
            patch.setattr(StockBackbone, "_init_edge_rot_mat", no_roll)
            patch.setattr(DenoisingForcesTrainer, "train", seeded(DenoisingForcesTrainer.train))
            assert cli.main(given) == 0
        return folder / "checkpoints" / name

    return run


def no_roll(_, data, edge_index, vector):  # noqa: ARG001
    return edge_rotation_matrices(vector).to(vector.dtype)


def seeded(train):
    def run(trainer, *arguments, **options):
        trainer.set_seed(7)
        train(trainer, *arguments, **options)

    return run


def load(path):
    return torch.load(path, weights_only=False)


NOISES = {
    "fixed": {"fixed_noise_std": True, "std": 0.1},
    "schedule": {"std_low": 0.05, "std_high": 0.2, "num_steps": 5, "corrupt_ratio": 0.5},
}


@pytest.mark.parametrize("noise", [pytest.param("fixed", marks=pytest.mark.long), "schedule"])
def test_trains_as_fairchems(noise, train, tmp_path, monkeypatch):
    """Four steps of fairchem's model, then four more by each; half of them are noisy."""
    heads = {name: STOCK_HEADS[name] for name in ("energy", "forces")}
    schedule = noise == "schedule"
    stock_section = section(heads, use_noise_schedule_sigma_encoding=schedule)
    folder = train(stock_section, NOISES[noise], f"{noise}-stock", 2)
    start, converted = folder / "checkpoint.pt", tmp_path / "ours.pt"
    assert convert_command.main([str(start), str(converted)]) == 0
    own_section = load(converted)["config"]["model"]
    assert own_section["backbone"]["model"] == "fairchem_equiformer.DeNSBackbone"
    back = convert.convert(load(converted), "fairchem")
    assert back["config"]["model"] == load(start)["config"]["model"]
    assert all(torch.equal(back["state_dict"][k], v) for k, v in load(start)["state_dict"].items())

    steps = []
    clean = OCPTrainer._forward
    monkeypatch.setattr(
        OCPTrainer,
        "_forward",
        lambda trainer, batch: (
            steps.append(models.dens.is_denoising(batch)) or clean(trainer, batch)
        ),
    )
    theirs = load(train(stock_section, NOISES[noise], f"{noise}-on", 4, start) / "checkpoint.pt")
    assert set(steps) == {True, False}
    own = load(train(own_section, NOISES[noise], f"{noise}-ours", 4, converted) / "checkpoint.pt")
    assert own["step"] == theirs["step"] == 8
    names = [name for name, _ in build(stock_section).named_parameters()]
    begun, ended, ours = (
        torch.cat([without_prefix(checkpoint["state_dict"])[name].flatten() for name in names])
        for checkpoint in (load(start), theirs, own)
    )
    assert (ended - begun).norm() > 1e-4 * begun.norm()
    assert (ours - ended).norm() < 3e-3 * (ended - begun).norm()
