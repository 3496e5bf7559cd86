"""A checkpoint as calculators use it: nothing is trained, so much is made once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fairchem_equiformer.checkpoints.checkpoint import Checkpoint, load
from fairchem_equiformer.nn.frozen import FrozenWeights

PRECISIONS = ("float32", "float64", "bfloat16")


class FrozenPotential:
    """Energies, forces and stresses of batches, from weights that stay as they are.

    Args:
        checkpoint: the file, or what :func:`~fairchem_equiformer.checkpoints.load` made of it.
        device: by default the GPU if there is one, else the CPU.
        dtype: ``float32``; ``float64``, for which the compiled kernels are not; or ``bfloat16``:
            matrix products in it and all else in float32, as under PyTorch's autocast. A name, or
            PyTorch's dtype.
        trusted: see :func:`~fairchem_equiformer.checkpoints.read`.

    Attributes:
        device: of batches and results.
        dtype: of positions and cells: float32 or float64.
        outputs: which of energy, forces and stress it predicts.

    Raises:
        CheckpointError: if the checkpoint cannot be used.
        ValueError: for another dtype.
    """

    def __init__(
        self,
        checkpoint: str | Path | Checkpoint,
        *,
        device: str | torch.device | None = None,
        dtype: str | torch.dtype = "float32",
        trusted: bool = False,
    ) -> None:
        precision = str(dtype).removeprefix("torch.")
        if precision not in PRECISIONS:
            raise ValueError(f"dtype is {dtype!r}, it must be {', '.join(PRECISIONS)}")
        if not isinstance(checkpoint, Checkpoint):
            checkpoint = load(checkpoint, trusted=trusted)
        if device is None:
            device = "cuda" if torch.cuda.is_available() else "cpu"
        self.device = torch.device(device)
        self.dtype = torch.float64 if precision == "float64" else torch.float32
        self._reduced = precision == "bfloat16"
        self._potential = checkpoint.potential(device=self.device, dtype=self.dtype)
        self.outputs = self._potential.outputs
        self._frozen = FrozenWeights()

    def __call__(self, batch: Any) -> dict[str, Tensor]:
        """As :meth:`~fairchem_equiformer.checkpoints.Potential.forward`, without gradients."""
        products = torch.autocast(self.device.type, torch.bfloat16, enabled=self._reduced)
        with torch.no_grad(), self._frozen.used_by(self._potential), products:
            predicted: dict[str, Tensor] = self._potential(batch)
        return predicted
