"""Trainers: for energies with an auxiliary task, and for forces that are the energy's gradient."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fairchem.core.models.equiformer_v2.trainers.energy_trainer import EquiformerV2EnergyTrainer
from fairchem.core.models.equiformer_v2.trainers.forces_trainer import EquiformerV2ForcesTrainer
from fairchem.core.modules.normalization.normalizer import create_normalizer

from fairchem_equiformer.errors import StoppedError

if TYPE_CHECKING:
    from torch import Tensor
    from torch_geometric.data import Batch


class AuxiliaryTaskTrainer(EquiformerV2EnergyTrainer):
    """fairchem's ``equiformerv2_energy``, where a loss' coefficient may change over the training.

    ``coefficient: [15, 1]`` begins at 15 and falls linearly to 1: at a step it is 15 - 14 step /
    (steps of all epochs). It depends on the step alone, which a checkpoint has, so that a training
    that is resumed goes on where it stopped.

    Raises:
        ValueError: for a coefficient that is neither a number nor a list of two.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        # fairchem calls trainers that it does not know "ocp"; this is its name for those of
        # energies, in checkpoints and as the beginning of is2re_predictions.npz.
        super().__init__(*args, **{**kwargs, "name": "is2re"})

    def load_loss(self) -> None:
        """Build the losses, and keep which of their coefficients change."""
        super().load_loss()
        self._changing = []
        for target, info in self.loss_functions:
            ends = info["coefficient"]
            if type(ends) in (int, float):
                continue
            numbers = isinstance(ends, list) and all(type(end) in (int, float) for end in ends)
            if not (numbers and len(ends) == 2):
                raise ValueError(
                    f"loss_functions: {target}: coefficient is {ends!r}, it must be a number, or "
                    "two in a list: at the beginning and at the end of the training"
                )
            self._changing.append((info, *ends))

    def _compute_loss(self, out: dict[str, Tensor], batch: Batch) -> Tensor:
        steps = self.config["optim"]["max_epochs"] * len(self.train_loader)
        progress = min(self.step / steps, 1)
        for info, first, last in self._changing:
            info["coefficient"] = first + (last - first) * progress
        return super()._compute_loss(out, batch)


class GradientForcesTrainer(EquiformerV2ForcesTrainer):
    """fairchem's ``equiformerv2_forces``, for models whose forces are the energy's gradient.

    The gradient of a scaled energy is a scaled force: forces are scaled as the energy is, whatever
    the config says of the energy. It says nothing of the forces.

    Raises:
        StoppedError: if the config has a normaliser of the forces.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        # As above, but of forces: the beginning of s2ef_predictions.npz.
        super().__init__(*args, **{**kwargs, "name": "s2ef"})

    def load_references_and_normalizers(self) -> None:
        """Read or fit fairchem's, and add that of the forces."""
        super().load_references_and_normalizers()
        if "forces" in self.normalizers:
            raise StoppedError(
                "dataset.train.transforms.normalizer has `forces`, which this trainer scales as"
                " the energy: delete it"
            )
        if energy := self.normalizers.get("energy"):
            scale = energy.rmsd.item()
            self.normalizers["forces"] = create_normalizer(mean=0.0, rmsd=scale).to(self.device)
