"""Everything that this package changes in fairchem-core 1.10, each with its reason.

`install` makes the changes; ``FAIRCHEM_EQUIFORMER_PATCHES=off`` in the environment leaves
fairchem-core as it is. What was there before is the attribute ``original`` of what replaced it.
"""

from __future__ import annotations

import atexit
import importlib
import inspect
import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from fairchem.core.common.registry import registry
from fairchem.core.trainers import OCPTrainer
from torch import distributed

from fairchem_equiformer import patches_wanted
from fairchem_equiformer.fairchem1 import guard, resuming, saving, slurm, sweeps, trajectories
from fairchem_equiformer.fairchem1.models import no_weight_decay_of_hydra
from fairchem_equiformer.fairchem1.relaxation import frozen_calculate, last_frame_lbfgs

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable
    from pathlib import Path

logger = logging.getLogger(__name__)

# What fairchem-core saves as `config["trainer"]` for its own trainers of forces and energies.
TASKS_SAVED_AS_TRAINERS = ("s2ef", "is2re")

_tried: set[Path] = set()


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
    _apply(AFTER_THE_MODELS)
    if skipped:
        logger.info(
            "fairchem models skipped: %s",
            "; ".join(f"{', '.join(sorted(names))} ({why})" for why, names in skipped.items()),
        )


def _module_name(path: Path, project_root: Path) -> str:
    """Dotted name of a file below the folder of the `fairchem` namespace."""
    return ".".join((project_root.name, *path.relative_to(project_root).with_suffix("").parts))


def _a_step_to_warm_up(original: Any) -> type:
    class CosineLRLambda(original):
        def __init__(self, scheduler_params: dict[str, Any]) -> None:
            steps = max(scheduler_params["warmup_epochs"], 1)  # by now in steps
            super().__init__({**scheduler_params, "warmup_epochs": steps})

    return CosineLRLambda


_ended: list[Any] = []  # gloo's groups, freed after all else
atexit.register(_ended.clear)


def _group_outlives_the_model(original: Any) -> Any:
    def cleanup() -> None:
        several = distributed.is_initialized() and distributed.get_world_size() > 1
        if several and distributed.get_backend() == distributed.Backend.GLOO:
            group: Any = distributed.group.WORLD
            _ended.append(group._get_backend(torch.device("cpu")))  # noqa: SLF001
        original()

    return cleanup


def _our_command(original: Any) -> Any:
    def main(args: argparse.Namespace | None = None, override_args: list[str] | None = None) -> Any:
        if args is not None:
            return original(args, override_args)
        from fairchem_equiformer.fairchem1 import cli  # noqa: PLC0415  # it imports this file

        return cli.main()

    return main


@dataclass(frozen=True)
class Patch:
    """One name that is given another value.

    Attributes:
        module: that holds it.
        name: of a function or class in it, or of a method as ``Class.method``.
        reason: what goes wrong without.
        replace: makes the new value of the old one.
    """

    module: str
    name: str
    reason: str
    replace: Callable[[Any], Any]

    def apply(self) -> None:
        """Make the change, unless it has been made."""
        owner: Any = importlib.import_module(self.module)
        *path, name = self.name.split(".")
        for part in path:
            owner = getattr(owner, part)
        present = getattr(owner, name, None)
        original = getattr(present, "original", present)
        replacement = self.replace(original)
        replacement.original = original
        static = isinstance(inspect.getattr_static(owner, name, None), staticmethod)
        setattr(owner, name, staticmethod(replacement) if static else replacement)


PATCHES = (
    Patch(
        "fairchem.core.common.utils",
        "_import_local_file",
        "fairchem-core imports each of its models when it starts, and stops if one cannot be"
        " imported; GemNet and others need torch-sparse, which this model does not.",
        lambda _: import_local_file,
    ),
    Patch(
        "fairchem.core.common.relaxation.ml_relaxation",
        "LBFGS",
        "Trajectories of run-relaxations lack the last frame of converged systems, off which"
        " relaxed energies are read; ranks write into each other's; NaN counts as converged, any"
        " error as a lack of memory; each step puts moving averages in place of the weights.",
        last_frame_lbfgs,
    ),
    Patch(
        "fairchem.core.trainers.ocp_trainer",
        "check_traj_files",
        "A relaxation that is run again leaves what it finds relaxed out of its results.",
        trajectories.never_skipped,
    ),
    Patch(
        "fairchem.core.trainers.ocp_trainer",
        "ml_relax",
        "The same; and what is relaxed is asked batch by batch, which change with the ranks.",
        trajectories.only_the_rest,
    ),
    Patch(
        "fairchem.core.tasks.task",
        "RelaxationTask.run",
        "A trajectory of another system, found on one rank, ends in a traceback.",
        guard.in_one_line,
    ),
    Patch(
        "fairchem.core.common.relaxation.ase_utils",
        "OCPCalculator.calculate",
        "What is made of weights alone is made once, since nobody trains a calculator's weights.",
        frozen_calculate,
    ),
    Patch(
        "fairchem.core.models.base",
        "HydraModel.no_weight_decay",
        "hydra goes by parameter names and asks neither backbone nor heads, so that norms of"
        " EquiformerV2 decay, which they do not in the flat model. Other backbones are not"
        " affected.",
        no_weight_decay_of_hydra,
    ),
    *(
        Patch(
            module,
            "save_checkpoint",
            "A checkpoint is written over the one before: killed meanwhile, or on a full disk, a"
            " run has neither; and the message does not say that the disk is full.",
            lambda _: saving.save_checkpoint,
        )
        for module in (
            "fairchem.core.trainers.base_trainer",
            "fairchem.core.modules.normalization._load_utils",
        )
    ),
    Patch(
        "fairchem.core.trainers.base_trainer",
        "BaseTrainer.load_checkpoint",
        "torch compares no checksums, so that damaged weights are loaded; and checkpoints are saved"
        " before the schedule's step, so that a resumed training lags one behind.",
        saving.load_newest_good,
    ),
    Patch(
        "fairchem.core.trainers.base_trainer",
        "BaseTrainer._get_timestamp",
        "The time goes through a float32, so that runs that start within two minutes get one id;"
        " the later one then resumes the earlier.",
        resuming.unique_id,
    ),
    Patch(
        "fairchem.core.common.distutils",
        "cleanup",
        "On the CPU, one run of ten on several ranks hangs at its end: the model, freed last, frees"
        " the group, and waits with Python's lock for a thread of gloo that waits for the lock."
        " Freed by Python, the group waits without. NCCL's is as it was.",
        _group_outlives_the_model,
    ),
    Patch(
        "fairchem.core.tasks.task",
        "BaseTask.setup",
        "A checkpoint found under a run's id is resumed whatever the config now says.",
        resuming.resume_only_the_same,
    ),
    Patch(
        "fairchem.core.tasks.task",
        "TrainTask.run",
        "One NaN among the labels makes all weights NaN, and names no structure; signals lose all"
        " that followed the last checkpoint.",
        guard.guarded,
    ),
    Patch(
        "fairchem.core.common.distutils",
        "setup",
        "In a Slurm job fairchem-core asks for a GPU and NCCL, with --cpu too.",
        slurm.ranks_on_cpus,
    ),
)
# Their modules import all of fairchem-core's EquiformerV2: slow, so not before they are needed.
AFTER_THE_MODELS = (
    Patch(
        "fairchem.core.models.equiformer_v2.trainers.lr_scheduler",
        "CosineLRLambda",
        "The schedule divides by a warm-up that is given in epochs and rounds to no step on little"
        " data: 0.01 epochs are none if an epoch has fewer than 100.",
        _a_step_to_warm_up,
    ),
)
# Where fairchem-core's program is imported, and only there: it is of no use to a calculator.
OF_THE_COMMAND = (
    Patch(
        "fairchem.core._cli",
        "main",
        "`fairchem main ...`, as fairchem-core's own messages have it, is refused; and what is"
        " missing (a file, a key, a field of the data) ends in a traceback.",
        _our_command,
    ),
    Patch(
        "fairchem.core._cli",
        "Runner.checkpoint",
        "A job that is preempted before its training has begun stops with an AttributeError, or"
        " saves weights of no step over the checkpoint that it should go on from.",
        slurm.begin_again,
    ),
    Patch(
        "fairchem.core._cli",
        "AutoExecutor",
        "A job asks Slurm for GPUs, with --cpu too, and is refused where there are none.",
        slurm.without_gpus,
    ),
    Patch(
        "fairchem.core._cli",
        "create_grid",
        "It asks `collections` for MutableMapping, which Python 3.10 has no more; takes a text for"
        " a list of letters; and meets a section that the config lacks with a KeyError.",
        sweeps.read,
    ),
)


def install() -> None:
    """Make the changes in this process; idempotent, and cheap once fairchem-core is imported.

    Beside `PATCHES`, the registry learns that the tasks which fairchem-core saves where it later
    looks for a trainer mean its trainer (`OCPCalculator(checkpoint_path=...)` stops otherwise).

    Raises:
        ValueError: for another value of the variable than ``on`` and ``off``.
    """
    if not patches_wanted():
        return
    _apply(PATCHES)
    for name in TASKS_SAVED_AS_TRAINERS:
        registry.register_trainer(name)(OCPTrainer)


def exchange_the_command() -> None:
    """Let fairchem-core's program, started without arguments of its own, be ours (``cli.py``)."""
    _apply(OF_THE_COMMAND)


def _apply(patches: tuple[Patch, ...]) -> None:
    for patch in patches:
        patch.apply()
