"""fairchem-core 1.10 on the golden checkpoints: its own model, and this package's in its place."""

from __future__ import annotations

import pytest
import torch
from fairchem.core import OCPCalculator
from fairchem.core.models.equiformer_v2 import equiformer_v2, equiformer_v2_deprecated

from fairchem_equiformer.fairchem1.convert import convert
from fairchem_equiformer.models.load_hooks import is_derived
from fairchem_equiformer.so3.frames import edge_rotation_matrices
from tests import golden

# fairchem's own classes are deprecated in favour of each other.
pytestmark = pytest.mark.filterwarnings(
    "ignore:.*class is deprecated in favor of:DeprecationWarning"
)


@pytest.fixture(scope="module")
def calculators(tmp_path_factory):
    """fairchem's calculator by form and by whose classes run; it reads no moving averages."""
    folder = tmp_path_factory.mktemp("golden")
    made = {}
    for form in golden.FORMS:
        content = torch.load(golden.checkpoint(form), weights_only=True)
        if averages := (content.pop("ema", None) or {}).get("shadow_params"):
            names = [name for name in content["state_dict"] if not is_derived(name)]
            content["state_dict"] |= dict(zip(names, averages, strict=True))
        # Of Equiformer fairchem has none: it is ours as it is.
        own = content if form == "equiformer" else convert(content, "fairchem_equiformer")
        for whose, whole in {"fairchem": content, "fairchem_equiformer": own}.items():
            path = folder / f"{form} {whose}.pt"
            torch.save(whole, path)
            made[form, whose] = OCPCalculator(checkpoint_path=path, cpu=True)
    return made


def check(calculator, name, form):
    atoms = golden.structure(name)
    atoms.calc = calculator
    atoms.get_potential_energy()
    for key, expected in golden.predicted(name, form).items():
        assert golden.error(calculator.results[key], expected) < golden.TOLERANCE, key


@pytest.mark.parametrize(("form", "name"), golden.EVERY)
def test_our_model(form, name, calculators):
    check(calculators[form, "fairchem_equiformer"], name, form)


@pytest.mark.parametrize("name", ["CO on Cu", "ethanol without a cell"])
@pytest.mark.parametrize("form", ["flat", "hydra"])
def test_fairchems_model(form, name, calculators, monkeypatch):
    """What was written is what it predicts, with edge frames that have no roll."""

    def frames(_self, _data, _edge_index, vector):
        return edge_rotation_matrices(vector).to(vector.dtype)

    for module in (equiformer_v2.EquiformerV2Backbone, equiformer_v2_deprecated.EquiformerV2):
        monkeypatch.setattr(module, "_init_edge_rot_mat", frames)
    check(calculators[form, "fairchem"], name, form)


def test_checkpoints_are_small():
    """They are part of the repository."""
    assert sum(path.stat().st_size for path in golden.DATA.iterdir()) < 1_000_000
