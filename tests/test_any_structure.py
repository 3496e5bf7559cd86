"""Any structure gives finite numbers, or an error that names it."""

from __future__ import annotations

import signal
from contextlib import contextmanager
from functools import cache

import numpy as np
import pytest
import torch
from ase import Atoms
from fairchem.core.models.base import HydraModel
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st

from fairchem_equiformer import EquiformerV2
from fairchem_equiformer.errors import StructureError
from fairchem_equiformer.graph.build import GraphConfig, build_graph
from tests.conftest import TINY_MODEL
from tests.models import scatter_weights
from tests.structures import batch_of, from_atoms, single_atom

EXAMPLES = 2 * settings.default.max_examples  # 200; with --hypothesis-profile=soak 2,000
HANGS = 300  # seconds that no example takes on any machine

KEYS = {key: value for key, value in TINY_MODEL.items() if key != "name"}
HEADS = {
    "energy": {"module": "fairchem_equiformer.EnergyHead"},
    "forces": {"module": "fairchem_equiformer.ForceHead"},
}


@cache
def model(form):
    torch.manual_seed(0)
    if form == "flat":
        made = EquiformerV2(**KEYS)
    else:
        backbone = {"model": "fairchem_equiformer.EquiformerV2Backbone", **KEYS}
        made = HydraModel(backbone=backbone, heads=HEADS, pass_through_head_outputs=True)
    return scatter_weights(made).eval()


@contextmanager
def an_end():
    """Raises in what does not come to one."""

    def stop(*_):
        raise AssertionError(f"no end after {HANGS} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(HANGS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


@st.composite
def structures(draw):
    """Cells from needle to pancake, sheared and left-handed; atoms in them, outside, far away."""
    count = draw(st.integers(1, 200))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    lengths = [10 ** draw(st.floats(-0.3, 2.2)) for _ in range(3)]  # 0.5 to 160 Angstrom
    shear = np.eye(3)
    for row, column in ((1, 0), (2, 0), (2, 1)):
        shear[row, column] = draw(st.floats(-3, 3))
    cell = np.diag(lengths) @ shear @ np.linalg.qr(rng.normal(size=(3, 3)))[0]
    if draw(st.booleans()):
        cell = cell[[1, 0, 2]]  # of the other hand
    cells_away = draw(st.sampled_from([0, 0, 1, 20]))
    fractional = rng.random((count, 3)) + rng.integers(-cells_away, cells_away + 1, (count, 3))
    pos = fractional @ cell
    far = rng.random(count) < draw(st.sampled_from([0.0, 0.0, 0.1]))
    pos[far] += 50 * rng.normal(size=(int(far.sum()), 3))
    most = draw(st.sampled_from([89, 89, 89, 118]))  # the model knows 90, from 0
    atoms = Atoms(rng.integers(1, most + 1, count), pos, cell=cell)
    data = from_atoms(atoms, sid=7)
    data.pbc = torch.tensor([[draw(st.booleans()) for _ in range(3)]])
    return data


def edges(data, **keys):
    """Of a batch, by target, source and image."""
    graph = build_graph(data, GraphConfig(max_radius=6.0, max_neighbors=8, **keys))
    return graph.target, graph.source, graph.vector


@settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck))
@given(structures(), st.sampled_from(["flat", "hydra"]), st.booleans())
def test_any_structure_gives_numbers_or_a_clear_error(data, form, strict):
    batch = batch_of(single_atom(), data)
    try:
        with torch.no_grad(), an_end():
            found = edges(batch, enforce_max_neighbors_strictly=strict)
            one_by_one = edges(batch, enforce_max_neighbors_strictly=strict, use_pbc_single=True)
            out = model(form)(batch)
    except StructureError as error:
        event("an error")
        assert "structure 1 of the batch (sid 7)" in str(error)  # noqa: PT017  # not in all
        return
    event("numbers")
    assert all(torch.equal(*pair) for pair in zip(found, one_by_one, strict=True))
    assert out["energy"].shape[0] == 2
    assert out["forces"].shape == batch.pos.shape
    assert out["energy"].isfinite().all()
    assert out["forces"].isfinite().all()


def test_what_does_not_end_is_noticed(monkeypatch):
    monkeypatch.setattr("tests.test_any_structure.HANGS", 1)
    with pytest.raises(AssertionError, match="no end"), an_end():
        signal.pause()
