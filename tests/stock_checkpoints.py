"""Checkpoints with random weights as fairchem-core 1.10 writes them, and its predictions."""

from __future__ import annotations

import copy
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import torch
from fairchem.core import OCPCalculator
from fairchem.core.common.registry import registry
from fairchem.core.modules.normalization.element_references import LinearReferences
from fairchem.core.modules.normalization.normalizer import Normalizer

from tests.models import fix_roll, scatter_weights, used_grids

if TYPE_CHECKING:
    from contextlib import AbstractContextManager
    from pathlib import Path

    from torch import Tensor, nn
    from torch_geometric.data import Batch

OUTPUTS: dict[str, Any] = {
    "energy": {"level": "system", "property": "energy"},
    "forces": {"level": "atom", "property": "forces"},
}
STRESS: dict[str, Any] = {
    "level": "system",
    "property": "stress",
    "decomposition": {
        "stress_isotropic": {"irrep_dim": 0},
        "stress_anisotropic": {"irrep_dim": 2},
    },
}
NORMALIZERS = {
    "energy": (-0.7, 24.9),
    "forces": (0.0, 0.58),
    "stress_isotropic": (-0.12, 0.35),
    "stress_anisotropic": (0.01, 0.06),
}


def build(model: dict[str, Any]) -> nn.Module:
    """The model of a config's section, every weight random."""
    keys = copy.deepcopy(model)
    with grids_of(model):
        return scatter_weights(registry.get_model_class(keys.pop("name"))(**keys))


def grids_of(model: dict[str, Any]) -> AbstractContextManager[None]:
    """Within, fairchem makes only the tables that the model of this section uses."""
    keys = model.get("backbone", model)
    if "lmax_list" not in keys:  # fine-tuned: where a start is read, its tables are made
        return nullcontext()
    return used_grids(*keys["lmax_list"], *keys["mmax_list"])


def content_of(model: dict[str, Any], outputs: dict[str, Any] | None = None) -> dict[str, Any]:
    """What a trainer's `save` puts into best_checkpoint.pt."""
    outputs = copy.deepcopy(OUTPUTS if outputs is None else outputs)
    targets = [part for key, value in outputs.items() for part in value.get("decomposition", [key])]
    references = LinearReferences(torch.randn(119) * 3)
    return {
        "state_dict": build(model).state_dict(),
        "normalizers": {
            target: Normalizer(*map(torch.tensor, NORMALIZERS[target])).state_dict()
            for target in targets
        },
        "elementrefs": {"energy": references.state_dict()},
        "config": {
            "task": {},
            "trainer": "ocp",
            "model": copy.deepcopy(model),
            "outputs": outputs,
            "optim": {},
            "loss_functions": [{target: {"fn": "mae", "coefficient": 1}} for target in targets],
            "evaluation_metrics": {"metrics": {}},
            "dataset": {"src": "data"},
            "cmd": {"seed": 0},
            "amp": False,
        },
        "val_metrics": {"forces_mae": {"total": 3.5, "numel": 7, "metric": 0.5}},
        "amp": None,
    }


def save(content: dict[str, Any], path: Path) -> Path:
    """Write it, and return its name."""
    torch.save(content, path)
    return path


def stock_predictions(path: Path, batch: Batch) -> dict[str, Tensor]:
    """By fairchem's own calculator, its edge frames without a roll."""
    with grids_of(torch.load(path, weights_only=False)["config"]["model"]):
        trainer = OCPCalculator(checkpoint_path=path, trainer="ocp", cpu=True).trainer
    fix_roll(getattr(trainer.model, "backbone", trainer.model))
    return dict(trainer.predict(batch.clone(), per_image=False, disable_tqdm=True))
