"""UMA's architecture as a row of the benchmarks: at its size, and small enough to run."""

from __future__ import annotations

import warnings
from dataclasses import replace

import pytest
import torch

from benchmarks.context import CONTEXT
from benchmarks.instruments import counted
from tests.specs import spec_in

with warnings.catch_warnings():  # what fairchem's dependencies say while they are imported
    warnings.simplefilter("ignore")
    from benchmarks import uma


@pytest.fixture
def spec(tmp_path):
    return spec_in(tmp_path, "uma_s", "inference", atoms=9, batch=2)


def test_it_has_its_published_size(spec):
    parameters = sum(p.numel() for p in uma.Inference(spec).model.parameters())
    assert f"{parameters / 1e6:.0f}M" == CONTEXT["uma_s"].size


def test_energy_and_forces_of_a_batch(spec, monkeypatch):
    smaller = {"num_layers": 1, "sphere_channels": 16, "hidden_channels": 16, "edge_channels": 16}
    small = replace(CONTEXT["uma_s"], config=CONTEXT["uma_s"].config | smaller)
    monkeypatch.setitem(CONTEXT, "uma_s", small)
    work = uma.Inference(spec)
    outputs, counts = counted(work)
    atoms = len(work.data.pos)
    assert work.data.natoms.tolist() == [atoms // 2] * 2
    assert outputs["energy"].shape == (2,)
    assert outputs["forces"].shape == (atoms, 3)
    torch.testing.assert_close(outputs["forces"][: atoms // 2], outputs["forces"][atoms // 2 :])
    assert outputs["forces"].isfinite().all()
    assert outputs["forces"].any()
    assert not outputs["forces"].requires_grad
    assert counts["flop"] > 0
    assert counts["products"] > 0
