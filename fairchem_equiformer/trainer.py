"""The name of ``fairchem1.trainer`` in configs and checkpoints from before 0.2."""

from fairchem_equiformer.fairchem1.trainer import AuxiliaryTaskTrainer

__all__ = ["AuxiliaryTaskTrainer"]
