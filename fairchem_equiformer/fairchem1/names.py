"""Names by which configs and checkpoints ask for what this package adds to fairchem-core 1.10."""

from __future__ import annotations

from typing import Any

AUXILIARY_TASK_TRAINER = "fairchem_equiformer.AuxiliaryTaskTrainer"
GRADIENT_FORCES_TRAINER = "fairchem_equiformer.GradientForcesTrainer"
MD17_DATASET = "fairchem_equiformer.MD17Dataset"
NOISY_NODES_LMDB = "fairchem_equiformer.NoisyNodesLmdb"
QM9_DATASET = "fairchem_equiformer.QM9Dataset"

# What stands in configs and checkpoints from before 0.2. `fairchem_equiformer/data` and
# `fairchem_equiformer/trainer.py` keep these names importable.
_UNTIL_0_1 = {
    "fairchem_equiformer.trainer.AuxiliaryTaskTrainer": AUXILIARY_TASK_TRAINER,
    "fairchem_equiformer.data.noisy_nodes.NoisyNodesLmdb": NOISY_NODES_LMDB,
    "fairchem_equiformer.data.qm9.QM9Dataset": QM9_DATASET,
}


def todays_name(name: Any) -> Any:
    """The name that a class of this package has now; any other value as it is."""
    return _UNTIL_0_1.get(name, name) if isinstance(name, str) else name
