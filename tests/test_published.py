"""Each published checkpoint's class and keys: fairchem-core 1.10 writes it, and predicts the same.

The weights are random: the files themselves could not be had. Everyday tests cut width and depth.
"""

from __future__ import annotations

import copy
import json
from importlib import resources
from pathlib import Path
from typing import Any

import pytest
import torch
from fairchem.core import models as stock_models
from fairchem.core.common.utils import setup_imports

from fairchem_equiformer import checkpoints
from fairchem_equiformer.checkpoints import __main__ as command
from fairchem_equiformer.checkpoints.checkpoint import understand
from fairchem_equiformer.checkpoints.published import PUBLISHED
from fairchem_equiformer.fairchem1 import convert
from fairchem_equiformer.models import DeNSBackbone
from tests.stock_checkpoints import (
    OUTPUTS,
    STRESS,
    content_of,
    grids_of,
    save,
    stock_predictions,
)
from tests.structures import batch_of, slab
from tests.tolerances import assert_close

CUT = {
    "num_layers": 2,
    "sphere_channels": 8,
    "attn_hidden_channels": 8,
    "num_heads": 2,
    "attn_alpha_channels": 8,
    "attn_value_channels": 4,
    "ffn_hidden_channels": 8,
    "edge_channels": 8,
}
DENS = "fairchem.core.models.equiformer_v2.equiformer_v2_dens."
# As the published configs have them.
STRESS_HEAD = {"output_name": "stress", "use_source_target_embedding": True, "decompose": True}
MATERIALS: dict[str, Any] = {
    "energy": {"module": "equiformer_v2_energy_head"},
    "forces": {"module": "equiformer_v2_force_head"},
    "stress": {"module": "rank2_symmetric_head", **STRESS_HEAD},
}
DENOISING: dict[str, Any] = {
    "energy": {"module": DENS + "DeNSScalarHead", "use_denoising": True},
    "forces": {"module": DENS + "DeNSVectorHead"},
    "stress": {"module": DENS + "DeNSRank2Head", **STRESS_HEAD, "use_denoising": False},
}
# A name that fairchem's configs of ODAC23 had for some of these files.
OLD_KEYS = {"avg_num_nodes": "norm_scale_nodes", "avg_degree": "norm_scale_degree"}

pytestmark = pytest.mark.filterwarnings("ignore:equiformer_v2_:DeprecationWarning")
every_one = pytest.mark.parametrize("one", PUBLISHED, ids=[one.file for one in PUBLISHED])


@pytest.fixture(scope="module", autouse=True)
def _registered():
    setup_imports()


def section(one, changes) -> dict[str, Any]:
    """Its config's section `model`."""
    keys = {**one.keys, **changes}
    if one.form == "flat":
        return {"name": "equiformer_v2", **keys}
    dens = one.backbone_class is DeNSBackbone
    return {
        "name": "hydra",
        "pass_through_head_outputs": True,
        "otf_graph": True,
        "backbone": {"model": DENS + "EqV2DeNSBackbone" if dens else "equiformer_v2_backbone"}
        | keys,
        "heads": copy.deepcopy(DENOISING if dens else MATERIALS),
    }


def content(one, changes) -> dict[str, Any]:
    """What fairchem-core 1.10 writes of such a model."""
    model = section(one, changes)
    outputs = {name: (OUTPUTS | {"stress": STRESS})[name] for name in one.outputs}
    return content_of(model, outputs)


def assert_predicts_the_same(one, path, batch):
    expected = stock_predictions(path, batch)
    with torch.no_grad():
        found = checkpoints.load(path).potential()(batch.clone())
    assert tuple(found) == one.outputs
    assert set(expected) == set(found)
    for target, value in found.items():
        assert_close(value.flatten(), expected[target].flatten(), "outputs", name=target)


@every_one
def test_cut(one, tmp_path):
    path = save(content(one, CUT), tmp_path / one.file)
    assert_predicts_the_same(one, path, batch_of(slab("Cu", "CO", 1), slab("Fe", "NH3", 2)))


@pytest.mark.long
@every_one
def test_full_width(one, tmp_path):
    path = save(content(one, {}), tmp_path / one.file)
    checkpoint = checkpoints.load(path)
    assert sum(value.numel() for value in checkpoint.weights.values()) == one.parameters
    assert one.is_like(checkpoint)
    assert_predicts_the_same(one, path, batch_of(slab("Cu", "CO", 1)))


@pytest.mark.parametrize("file", ["Equiformer_V2_Large.pt", "Equiformer_V2_Direct.pt"])
def test_old_keys_of_odac(file, tmp_path):
    """fairchem-core 1.10 refuses them; the numbers are those of today's keys."""
    (one,) = [one for one in PUBLISHED if one.file == file]
    saved = content(one, CUT)
    today = checkpoints.load(save(saved, tmp_path / "today.pt"))
    model = saved["config"]["model"]
    saved["config"]["model"] = {OLD_KEYS.get(key, key): value for key, value in model.items()}
    path = save(saved, tmp_path / "old.pt")
    found = checkpoints.load(path)
    assert found.backbone == today.backbone
    with grids_of(model):
        converted = convert.convert(checkpoints.read(path), "fairchem_equiformer")
    assert converted["config"]["model"] == model | {"name": "fairchem_equiformer.EquiformerV2"}
    batch = batch_of(slab("Cu", "CO", 1))
    with torch.no_grad():
        energy, expected = (c.potential()(batch.clone())["energy"] for c in (found, today))
    assert torch.equal(energy, expected)


def test_references_of_oc22_in_the_model(tmp_path):
    """Its published config adds them in prediction (`use_energy_lin_ref`)."""
    (one,) = [one for one in PUBLISHED if one.data == "OC22"]
    saved = content(one, {**CUT, "use_energy_lin_ref": True})
    del saved["elementrefs"]["energy"]
    path = save(saved, tmp_path / one.file)
    assert_predicts_the_same(one, path, batch_of(slab("Cu", "CO", 1)))


def test_dens_converts_there_and_back(tmp_path):
    """Its force encoding, too, though prediction does not read forces."""
    (one,) = [one for one in PUBLISHED if one.file == "eqV2_dens_31M_mp.pt"]
    saved = content(one, CUT)
    read = checkpoints.read(save(saved, tmp_path / "a.pt"))
    with grids_of(saved["config"]["model"]):
        ours = convert.convert(read, "fairchem_equiformer")
        back = convert.convert(ours, "fairchem")
    assert ours["config"]["model"]["heads"]["forces"] == {
        "module": "fairchem_equiformer.DeNSForceHead"
    }
    assert "backbone.force_embedding.weight" in ours["state_dict"]
    assert back["config"]["model"]["backbone"]["model"] == "equiformer_v2_dens_backbone"
    assert back["state_dict"].keys() == saved["state_dict"].keys()
    for name, value in saved["state_dict"].items():
        assert torch.equal(back["state_dict"][name], value), name


def test_the_table_is_fairchems():
    """Names and addresses are those of fairchem-core 1.10's model registry, all of them."""
    text = (resources.files(stock_models) / "pretrained_models.json").read_text()
    registry = {name: value for name, value in json.loads(text).items() if "Equiformer" in name}
    assert {one.name for one in PUBLISHED} == set(registry)
    assert len(PUBLISHED) == 17
    for one in PUBLISHED:
        entry = registry[one.name]
        if "url" in entry:
            assert entry["url"] == f"https://{one.source}"
            assert entry["url"].endswith(f"/{one.file}")
        else:
            assert (entry["repo_id"], entry["filename"]) == (one.source, one.file)


def test_what_a_checkpoint_looks_like():
    """Those that differ by their weights alone look like each other."""
    alike = {}
    for one in PUBLISHED:
        saved = {"state_dict": {}, "config": {"model": section(one, {})}}
        found = understand(saved, Path("mine.pt"))
        alike[one.file] = {other.file for other in PUBLISHED if other.is_like(found)}
        assert one.file in alike[one.file]
    materials = {"eqV2_31M_omat.pt", "eqV2_31M_omat_mp_salex.pt", "eqV2_31M_mp.pt"}
    assert alike["eqV2_31M_mp.pt"] == materials
    assert alike["eqV2_dens_31M_mp.pt"] == {"eqV2_dens_31M_mp.pt"}
    assert alike["Equiformer_V2_Direct.pt"] == {"Equiformer_V2_Direct.pt"}
    assert alike["eq2_31M_ec4_allmd.pt"] == {"eq2_31M_ec4_allmd.pt"}


class TestCommand:
    def test_lists_them(self, capsys):
        assert command.main([]) == 0
        lines = capsys.readouterr().out.splitlines()
        for one, line in zip(PUBLISHED, lines[1:18], strict=True):
            assert line.startswith(one.file)
            assert f"{one.parameters:,}" in line
            assert one.name in line

    def test_describes_one(self, tmp_path, capsys):
        one = next(one for one in PUBLISHED if one.backbone_class is DeNSBackbone)
        saved = content(one, CUT)
        path = save(saved, tmp_path / "mine.pt")
        assert command.main([str(path)]) == 0
        text = capsys.readouterr().out
        assert "hydra (backbone and heads), with DeNS" in text
        assert "2 blocks, Lmax 4, Mmax 2, 8 channels" in text
        assert "20 neighbours within 12 Angstrom, atomic numbers up to 95" in text
        assert "energy (mean -0.7, std 24.9; references of 119 elements)" in text
        assert "stress_isotropic: mean -0.12, std 0.35" in text
        assert "none of the published ones" in text

    def test_references_that_are_not_added(self, tmp_path, capsys):
        (one,) = [one for one in PUBLISHED if one.data == "OC22"]
        path = save(content(one, CUT), tmp_path / "mine.pt")
        assert command.main([str(path)]) == 0
        assert "use_energy_lin_ref" in capsys.readouterr().out

    def test_refuses_in_one_line(self, tmp_path, capsys):
        path = tmp_path / "a.pt"
        assert command.main([str(path)]) == 2
        assert capsys.readouterr().err.startswith(f"checkpoints: error: {path}: no such file")
