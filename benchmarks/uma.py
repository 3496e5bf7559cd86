"""One measurement of UMA's architecture in the environment of fairchem-core 2.x.

:mod:`benchmarks.compare` starts ``python -m benchmarks.uma SPEC.json``, as it does
:mod:`benchmarks.measure` in the environment of 1.10. The weights are random.
"""

from __future__ import annotations

from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import torch
from fairchem.core.datasets.atomic_data import AtomicData, atomicdata_list_to_batch
from fairchem.core.models.base import HydraModelV2
from fairchem.core.models.uma.escn_md import MLP_EFS_Head, eSCNMDBackbone
from fairchem.core.units.mlip_unit.api.inference import InferenceSettings

from benchmarks.context import CONTEXT
from benchmarks.instruments import Outputs, Work, measured, run
from benchmarks.slab import SEED, slab

if TYPE_CHECKING:
    from benchmarks.spec import Spec

HEAD = "energy_and_forces"


def batch_of(atoms: int, copies: int) -> AtomicData:
    """Return ``copies`` of the slab as fairchem-core 2.x gives them to a model."""
    structure = slab(atoms)
    structure.info.update(charge=0, spin=0)
    keys = ["charge", "spin"]
    one = AtomicData.from_ase(structure, task_name="oc20", r_data_keys=keys)
    return atomicdata_list_to_batch([one.clone() for _ in range(copies)])


class Inference(Work):
    """Energy, and forces as its gradient, by the fastest of its ways on a CPU."""

    def __init__(self, spec: Spec) -> None:
        torch.manual_seed(SEED)
        backbone = eSCNMDBackbone(**CONTEXT[spec.implementation].config)
        heads = {HEAD: MLP_EFS_Head(backbone, wrap_property=False)}
        self.model = HydraModelV2(backbone, heads).eval()
        self.data = batch_of(spec.atoms, spec.batch)
        fast = InferenceSettings(
            execution_mode="umas_fast_pytorch", activation_checkpointing=False, merge_mole=False
        )
        self.model.prepare_for_inference(self.data, fast)

    def forward(self) -> Outputs:
        """Predict."""
        with torch.no_grad():  # around the gradient that it takes itself
            found = self.model(self.data.clone())[HEAD]
        return {name: found[name] for name in ("energy", "forces")}


def measure(spec: Spec) -> dict[str, Any]:
    """Write the results of one measurement and return its record."""
    _, record = measured(Inference, spec)
    return record | {name: version(name) for name in ("torch", "fairchem-core")}


if __name__ == "__main__":
    run(measure)
