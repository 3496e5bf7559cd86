"""Fixtures: predict units of the golden checkpoints, each made once."""

from __future__ import annotations

import os
import warnings

import pytest
import torch

from tests import golden

with warnings.catch_warnings():  # what fairchem's dependencies say while they are imported
    warnings.simplefilter("ignore")
    from fairchem_equiformer.fairchem2 import load_predict_unit

# The machines that run the tests have two cores; more threads than cores would only wait.
torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "2")))


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def unit():
    """The predict unit of a golden checkpoint, by its form."""
    made = {}

    def get(form):
        if form not in made:
            made[form] = load_predict_unit(golden.checkpoint(form), device="cpu")
        return made[form]

    return get
