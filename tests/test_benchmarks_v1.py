"""Equiformer (V1) against e3nn's way of computing it: the same numbers, in less memory."""

from __future__ import annotations

import json

import pytest
import torch
import yaml

from benchmarks import compare, e3nn_equiformer, equiformer_v1, instruments, measure
from benchmarks.e3nn_equiformer import E3nnEquiformer
from benchmarks.measure import batch_of
from fairchem_equiformer import Equiformer
from tests.tolerances import TOLERANCES, assert_close

TINY = {
    "num_layers": 2,
    "irreps_node_embedding": "32x0e+16x1e",
    "irreps_head": "8x0e+4x1e",
    "num_heads": 2,
    "irreps_mlp_mid": "32x0e+16x1e",
    "irreps_feature": "16x0e",
    "alpha_drop": 0.0,
}
WITH_PARITY = {
    "irreps_node_embedding": "8x0e+4x0o+4x1e+4x1o+2x2e+2x2o",
    "irreps_sh": "1x0e+1x1o+1x2e",
    "irreps_head": "4x0e+2x1o+2x2e",
    "irreps_mlp_mid": "8x0e+4x1e+4x1o",
}
VARIANTS = {
    "nonlinear": {},
    "linear": {"nonlinear_message": False},
    "dot product": {"attention": "dot_product"},
    "parity": WITH_PARITY,
    "dot product, parity": WITH_PARITY | {"attention": "dot_product"},
}


@pytest.fixture(autouse=True)
def _of_this_dtype():
    """e3nn's modules have constants of the default dtype that they were made under."""
    e3nn_equiformer.product_module.cache_clear()


@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS.keys())
def test_equals_a_model_made_of_e3nn(variant):
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        found = []
        for cls in (Equiformer, E3nnEquiformer):
            torch.manual_seed(0)
            model = cls(**TINY | variant | {"edges_per_chunk": 40})
            data = batch_of(13, 1)
            data.pos, data.cell = data.pos.double(), data.cell.double()
            energy = model(data)["energy"]
            energy.sum().backward()
            gradients = {name: p.grad for name, p in model.named_parameters()}
            found.append({"energy": energy, **gradients})
    finally:
        torch.set_default_dtype(default)
    ours, expected = found
    assert ours.keys() == expected.keys()
    for name, value in expected.items():
        assert_close(ours[name], value, "formula", torch.float64, name)


def test_what_e3nn_is_not_compared_with():
    with pytest.raises(ValueError, match="only energies, without dropout"):
        E3nnEquiformer(**TINY | {"alpha_drop": 0.1})


def test_the_same_numbers_with_less_kept(tmp_path, monkeypatch):
    def run_here(spec, *_):
        return json.loads(json.dumps(measure.measure(spec)))

    monkeypatch.setattr(compare, "run_child", run_here)
    monkeypatch.setattr(instruments, "gemm_rate", lambda *_: 1e10)
    config = tmp_path / "tiny.yml"
    config.write_text(yaml.safe_dump({"model": TINY | {"name": "fairchem_equiformer.Equiformer"}}))
    command = ["--tasks", "training", "--models", str(config), "--sizes", "45", "--rounds", "1"]
    quick = ["--seconds", "0", "--threads", str(torch.get_num_threads()), "--out", str(tmp_path)]
    e3nn, ours = equiformer_v1.main([*command, *quick])

    assert (e3nn["implementation"], ours["implementation"]) == ("e3nn", "equiformer")
    assert ours["difference"]["energy"] < TOLERANCES["outputs"][torch.float32]
    assert ours["difference"]["gradient"] < TOLERANCES["gradients"][torch.float32]
    assert e3nn["saved_bytes"] > 5 * ours["saved_bytes"]
