"""The name of ``fairchem1.data.qm9`` in configs and checkpoints from before 0.2."""

from fairchem_equiformer.fairchem1.data.qm9 import QM9Dataset

__all__ = ["QM9Dataset"]
