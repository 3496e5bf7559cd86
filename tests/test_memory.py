"""What is kept for the backward pass, and what the allocator does with freed memory."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks

from fairchem_equiformer.nn.norm import NORMS
from fairchem_equiformer.ops import allocator
from fairchem_equiformer.ops.s2_activation import s2_activation
from fairchem_equiformer.so3.grid import GridSpec
from fairchem_equiformer.so3.layout import layout


def bytes_kept(function, *inputs):
    """Bytes that autograd keeps of a call, each storage once, parameters and inputs included."""
    kept = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with saved_tensors_hooks(keep, lambda tensor: tensor):
        result = function(*inputs)
    assert result.requires_grad
    return sum(kept.values())


@pytest.mark.parametrize("kind", NORMS)
def test_a_norm_keeps_its_input_alone(kind):
    norm = NORMS[kind](3, 8)
    x = torch.randn(50, 16, 8, requires_grad=True)
    parameters = sum(p.untyped_storage().nbytes() for p in norm.parameters())
    assert bytes_kept(norm, x) <= x.untyped_storage().nbytes() + parameters


def test_the_grid_is_not_kept():
    x = torch.randn(50, 9, 16, requires_grad=True)
    sphere = GridSpec(layout(2, 2))
    assert bytes_kept(s2_activation, x, sphere) == x.untyped_storage().nbytes()


# The file by itself: importing the package imports fairchem, which takes seconds.
FAULTS = """
import resource, runpy, sys
import torch
runpy.run_path(sys.argv[1])["keep_freed_memory"]()
faults = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt
def chunk():
    parts = [torch.ones(5 * 2**20 // 4) for _ in range(8)]
    del parts
chunk()
before = faults()
for _ in range(20):
    chunk()
print(faults() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's allocator")
def test_memory_that_a_chunk_freed_serves_the_next():
    """40 MiB are 10,240 pages, each of which the system clears if it gets them back in between."""
    faults = {}
    for choice in allocator.CHOICES:
        command = [sys.executable, "-c", FAULTS, allocator.__file__]
        environment = {**os.environ, allocator.VARIABLE: choice}
        faults[choice] = int(subprocess.check_output(command, env=environment))
    assert 5 * faults["keep"] < faults["system"], faults


def test_another_choice_of_the_allocator(monkeypatch):
    monkeypatch.setenv(allocator.VARIABLE, "none")
    with pytest.raises(ValueError, match="ALLOCATOR is 'none', it must be keep or system"):
        allocator.keep_freed_memory.__wrapped__()
