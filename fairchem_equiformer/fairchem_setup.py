"""What fairchem-core 1.10 needs put right before it runs here.

fairchem-core imports each of its models when it starts, and those of others need packages that
this one does not (torch-sparse, torch-cluster): `import_local_file` lets them be missing. It saves
the name of a task where it later looks for that of a trainer: `install` makes both known. Its
trajectories of relaxations lack the last frame, and weights are prepared anew at each step:
`install` puts `relaxation.LBFGS` and `relaxation.calculate` in place. And its
cosine schedule divides by a warm-up that may round to no step: `_take_a_step_to_warm_up`.
"""

from __future__ import annotations

import importlib
import logging
from typing import TYPE_CHECKING, Any

from fairchem.core.common import utils
from fairchem.core.common.registry import registry
from fairchem.core.common.relaxation import ml_relaxation
from fairchem.core.common.relaxation.ase_utils import OCPCalculator
from fairchem.core.trainers import OCPTrainer

from fairchem_equiformer.relaxation import LBFGS, calculate

if TYPE_CHECKING:
    from pathlib import Path

logger = logging.getLogger(__name__)

# What fairchem-core saves as `config["trainer"]` for its own trainers of forces and energies.
TASKS_SAVED_AS_TRAINERS = ("s2ef", "is2re")

_tried: set[Path] = set()


def install() -> None:
    """Make fairchem-core in this process tolerant; idempotent, and cheap once it is imported.

    Covers `fairchem.core.common.utils.setup_imports` whoever has imported it by name, and
    `OCPCalculator(checkpoint_path=...)` on checkpoints of the `equiformerv2_*` trainers, and the
    trajectories of `--mode run-relaxations`.
    """
    utils._import_local_file = import_local_file  # noqa: SLF001
    for name in TASKS_SAVED_AS_TRAINERS:
        registry.register_trainer(name)(OCPTrainer)
    ml_relaxation.LBFGS = LBFGS
    OCPCalculator.calculate = calculate


def import_local_file(path: Path, *, project_root: Path) -> None:
    """Import one Python file of fairchem-core; of its models, those that can be imported.

    The first file of a model brings in all of them, so that one line can name those skipped.

    Args:
        path: The file, below `project_root`.
        project_root: The folder of the `fairchem` namespace, as fairchem-core's own function
            of this name takes it.

    Raises:
        ImportError: If a file that belongs to no model cannot be imported.
    """
    models = project_root / "core" / "models"
    if not path.is_relative_to(models):
        importlib.import_module(_module_name(path, project_root))
        return
    if path in _tried:
        return
    skipped: dict[str, set[str]] = {}  # reason -> models
    for file in sorted(models.rglob("*.py")):
        _tried.add(file)
        try:
            importlib.import_module(_module_name(file, project_root))
        except (ImportError, OSError) as error:  # OSError: a compiled library for another torch
            model = file.relative_to(models).parts[0].removesuffix(".py")
            skipped.setdefault(str(error), set()).add(model)
    _take_a_step_to_warm_up()
    if skipped:
        logger.info(
            "fairchem models skipped: %s",
            "; ".join(f"{', '.join(sorted(names))} ({why})" for why, names in skipped.items()),
        )


def _take_a_step_to_warm_up() -> None:
    """Let the warm-up of the cosine schedule be shorter than a step, as it is on little data.

    It is given in epochs; 0.01 of them are no step if an epoch has fewer than 100.
    """
    # Not at the top: it imports fairchem's own EquiformerV2, which is slow and prints a warning.
    from fairchem.core.models.equiformer_v2.trainers import lr_scheduler  # noqa: PLC0415

    class CosineLRLambda(lr_scheduler.CosineLRLambda):
        def __init__(self, scheduler_params: dict[str, Any]) -> None:
            steps = max(scheduler_params["warmup_epochs"], 1)  # by now in steps
            super().__init__({**scheduler_params, "warmup_epochs": steps})

    lr_scheduler.CosineLRLambda = CosineLRLambda


def _module_name(path: Path, project_root: Path) -> str:
    """Dotted name of a file below the folder of the `fairchem` namespace."""
    return ".".join((project_root.name, *path.relative_to(project_root).with_suffix("").parts))
