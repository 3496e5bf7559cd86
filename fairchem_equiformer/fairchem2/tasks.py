"""Print the tasks of a converted checkpoint for a config that fine-tunes it.

    python -m fairchem_equiformer.fairchem2.tasks start.pt > configs/fairchem2/tasks/start.yaml
    fairchem -c configs/fairchem2/finetune.yaml tasks=start start=start.pt ...

A head that is trained on needs the normaliser and the element references that it was trained with.
Losses are those of OC20's trainings, or with stress those of OMat24's fine-tuning on MPtrj.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fairchem.core.units.mlip_unit.api.inference import MLIPInferenceCheckpoint
from omegaconf import OmegaConf

from fairchem_equiformer.checkpoints.reading import read_object
from fairchem_equiformer.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Sequence

CATALYSTS = {"energy": ("MAELoss", 4.0), "forces": ("L2NormLoss", 100.0)}
MATERIALS = {
    "energy": ("PerAtomMAELoss", 2.5),
    "forces": ("L2NormLoss", 10.0),
    "stress": ("MAELoss", 1.0),
}
METRICS = {"energy": ["mae", "per_atom_mae"], "forces": ["mae", "cosine_similarity"]}


def tasks_file(checkpoint: MLIPInferenceCheckpoint) -> dict[str, Any]:
    """What stands in a file of ``configs/fairchem2/tasks``, as a dict."""
    tasks: Any = OmegaConf.to_container(OmegaConf.create(list(checkpoint.tasks_config)))
    names = [task["name"] for task in tasks]
    losses = MATERIALS if "stress" in names else CATALYSTS
    for task in tasks:
        name = task["name"]
        if name not in losses:
            raise InputError(f"no loss is known for its task {name!r}")
        loss, coefficient = losses[name]
        task["loss_fn"] = {
            "_target_": "fairchem.core.modules.loss.DDPMTLoss",
            "loss_fn": {"_target_": f"fairchem.core.modules.loss.{loss}"},
            "coefficient": coefficient,
        }
        task["metrics"] = METRICS.get(name, ["mae"])
        task["datasets"] = ["${dataset_name}"]
    dataset = checkpoint.tasks_config[0]["datasets"][0]
    return {
        "dataset_name": dataset,
        "train_datasets": {dataset: "${train_dataset}"},
        "val_datasets": {dataset: "${val_dataset}"},
        "tasks": tasks,
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return its exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m fairchem_equiformer.fairchem2.tasks",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "checkpoint", type=Path, help="converted by python -m fairchem_equiformer.convert"
    )
    parser.add_argument(
        "--trusted",
        action="store_true",
        help="run whatever the checkpoint, a pickle, asks for: only for a source you trust",
    )
    options = parser.parse_args(arguments)
    try:
        content = tasks_file(_read(options.checkpoint, trusted=options.trusted))
    except InputError as error:
        text = str(error).removeprefix(f"{options.checkpoint}: ")
        sys.stderr.write(f"tasks: error: {options.checkpoint}: {text}\n")
        return 2
    sys.stdout.write(f"# @package _global_\n{OmegaConf.to_yaml(content)}")
    return 0


def _read(path: Path, *, trusted: bool) -> MLIPInferenceCheckpoint:
    content = read_object(path, MLIPInferenceCheckpoint, trusted=trusted)
    if not isinstance(content, MLIPInferenceCheckpoint):
        raise InputError(
            "not a checkpoint of fairchem-core 2.x: make one of it by"
            " python -m fairchem_equiformer.convert --to fairchem2"
        )
    return content


if __name__ == "__main__":
    sys.exit(main())
