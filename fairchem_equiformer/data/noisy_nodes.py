"""The name of ``fairchem1.data.noisy_nodes`` in configs and checkpoints from before 0.2."""

from fairchem_equiformer.fairchem1.data.noisy_nodes import NoisyNodesLmdb

__all__ = ["NoisyNodesLmdb"]
