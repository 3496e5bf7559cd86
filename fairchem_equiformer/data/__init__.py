"""The names of ``fairchem1.data`` in configs and checkpoints from before 0.2."""
