"""A model with what puts its results into units."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fairchem_equiformer.checkpoints.reading import CheckpointError
from fairchem_equiformer.ops.segments import segment_sum
from fairchem_equiformer.so3.rank2 import symmetric_tensor

if TYPE_CHECKING:
    from fairchem_equiformer.checkpoints.checkpoint import Checkpoint

TARGETS = ("energy", "forces", "stress")


class Potential(nn.Module):
    """Energies, forces and stresses of a batch, as fairchem-core 1.10's trainers predict them.

    Forces of fixed atoms are not set to zero, here as there.

    Args:
        checkpoint: whose model and units these are.

    Attributes:
        model: in plain PyTorch; its results are normalised.
        outputs: which of energy, forces and stress it predicts.

    Raises:
        CheckpointError: if it predicts none of them, or the weights do not belong to the config.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        super().__init__()
        found = {name: checkpoint.outputs[name] for name in TARGETS if name in checkpoint.outputs}
        if not found:
            raise CheckpointError(
                f"{checkpoint.path}: it predicts {', '.join(checkpoint.outputs) or 'nothing'}:"
                f" neither of {', '.join(TARGETS)}"
            )
        self.model = checkpoint.model()
        self.config = checkpoint.model_config
        self.outputs = tuple(found)
        self._outputs = found
        self._normalizers = checkpoint.normalizers
        self._references = [name for name in found if name in checkpoint.references]
        for name in self._references:
            self.register_buffer(f"{name}_references", checkpoint.references[name])

    def forward(self, batch: Any) -> dict[str, Tensor]:
        """Predict.

        Args:
            batch: any object with the fields of a batch, see
                :func:`~fairchem_equiformer.graph.build.build_graph`.

        Returns:
            Of these what ``outputs`` says: ``energy`` [B] in eV, ``forces`` [N, 3] in eV/Angstrom,
            ``stress`` [B, 3, 3] in eV/Angstrom^3 with the sign of ASE's.

        Raises:
            ValueError: for bad input, naming the structure and the value.
        """
        results = self.model(batch)
        shapes = {"energy": (-1,), "forces": (-1, 3), "stress": (-1, 3, 3)}
        predicted = {}
        for target, output in self._outputs.items():
            parts = [results[part] for part in output.parts]
            if len(parts) == 1:
                value = parts[0]
            else:
                value = symmetric_tensor(*map(self._in_units, output.parts, parts))
            value = self._in_units(target, value).reshape(shapes[target])
            predicted[target] = self._with_references(target, value, batch)
        return predicted

    def _in_units(self, name: str, value: Tensor) -> Tensor:
        normalizer = self._normalizers.get(name)
        return value if normalizer is None else value * normalizer.std + normalizer.mean

    def _with_references(self, target: str, value: Tensor, batch: Any) -> Tensor:
        if target not in self._references:
            return value
        references = self.get_buffer(f"{target}_references")
        numbers = batch.atomic_numbers.long()
        natoms = torch.as_tensor(batch.natoms, device=value.device)
        graph = torch.repeat_interleave(natoms, output_size=len(numbers))
        return value + segment_sum(references[numbers].to(value), graph, len(value))
