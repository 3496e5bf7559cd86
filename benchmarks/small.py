"""Counts of a small model, in a process of its own: ``python -m benchmarks.small`` prints JSON.

:mod:`benchmarks.counts` starts it. Nothing here depends on time, nor on the processor.
"""

from __future__ import annotations

import itertools
import json
import logging
from typing import TYPE_CHECKING, Any

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks import regions
from benchmarks.instruments import Outputs, Work, counted
from benchmarks.slab import slab
from fairchem_equiformer.calculator import batch_of
from fairchem_equiformer.models.equiformer_v2 import EquiformerV2

if TYPE_CHECKING:
    from collections.abc import Callable

THREADS = 2
# The published models' layers, of widths that the kernels take, and several chunks of edges.
MODEL = {
    "max_neighbors": 12,
    "max_radius": 8.0,
    "num_layers": 1,
    "lmax_list": [4],
    "mmax_list": [2],
    "grid_resolution": 14,
    "sphere_channels": 64,
    "attn_hidden_channels": 32,
    "num_heads": 4,
    "attn_alpha_channels": 32,
    "attn_value_channels": 16,
    "ffn_hidden_channels": 64,
    "edge_channels": 64,
    "edges_per_chunk": 120,
    "norm_type": "layer_norm_sh",
    "use_grid_mlp": True,
}


class Inference(Work):
    """Energy and forces of one slab."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.model = EquiformerV2(**MODEL).eval()
        self.data = batch_of(slab(45), torch.device("cpu"), torch.float32)

    def forward(self) -> Outputs:
        """Predict."""
        with torch.no_grad():
            return self.model(self.data)


class Training(Inference):
    """A step without an optimizer."""

    def forward(self) -> Outputs:
        """Predict, recording."""
        self.model.zero_grad(set_to_none=True)
        return self.model(self.data)

    def finish(self, outputs: Outputs) -> None:
        """Differentiate a loss."""
        (outputs["energy"].sum() + outputs["forces"].square().sum()).backward()


def peak_of_tensors(call: Callable[[], object]) -> int:
    """Return the most bytes that tensors take at once, beyond those that are there already."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        call()
    events = [e for e in profiled.profiler.kineto_results.events() if e.name() == "[memory]"]
    events.sort(key=lambda event: event.start_ns())
    return max(itertools.accumulate(event.nbytes() for event in events))


def counts(work: Work) -> dict[str, Any]:
    """Return what one call costs, whatever the processor; tables of constants are made before."""
    work.finish(work.forward())
    outputs, found = counted(work)
    del outputs
    before = regions.counted(with_mkl=False)
    peak = peak_of_tensors(lambda: work.finish(work.forward()))
    found["peak_bytes"] = peak
    if before is not None:
        found["regions"] = regions.counted(with_mkl=False) - before
    return found


def main() -> None:
    """Count a forward pass and a training step."""
    logging.disable(logging.WARNING)
    torch.set_num_threads(THREADS)
    tasks = {"inference": Inference, "training": Training}
    print(json.dumps({name: counts(task()) for name, task in tasks.items()}))


if __name__ == "__main__":
    main()
