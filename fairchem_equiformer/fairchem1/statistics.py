"""What a config should say of its training data: mean numbers of atoms and of neighbours.

    python -m fairchem_equiformer.fairchem1.statistics CONFIG [--key.subkey=value ...]

The model divides sums over atoms by the one and sums over neighbours by the other, so that they are
of order one. The defaults are OC20's. Neighbours are counted with the config's own cutoff, and the
lines are printed as they stand in a config.
"""

from __future__ import annotations

import argparse
import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from fairchem.core.common.registry import registry
from fairchem.core.common.utils import setup_imports
from fairchem.core.datasets import data_list_collater
from tqdm import tqdm

from fairchem_equiformer.checkpoints.names import EQUIFORMER
from fairchem_equiformer.errors import InputError
from fairchem_equiformer.fairchem1.preflight import read_config
from fairchem_equiformer.graph.build import build_graph
from fairchem_equiformer.models.config import ModelConfig
from fairchem_equiformer.models.config_v1 import EquiformerConfig

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch.utils.data import Dataset

Config = dict[str, Any]

STRUCTURES = 1000
"""Structures that are drawn by default."""


def measure(
    dataset: Dataset, model: ModelConfig | EquiformerConfig, count: int
) -> dict[str, float]:
    """Average over structures of a dataset, drawn with a fixed seed.

    Args:
        dataset: one of fairchem's.
        model: what tells who is a neighbour.
        count: how many structures, or fewer if there are fewer.

    Returns:
        ``avg_num_nodes``, atoms of a structure, and ``avg_degree``, neighbours of an atom.

    Raises:
        ValueError: for a structure that the model cannot work with.
    """
    size = len(dataset)  # type: ignore[arg-type]
    drawn = np.random.default_rng(0).choice(size, min(count, size), replace=False)
    atoms = edges = 0
    for index in tqdm(drawn.tolist(), desc="structures", leave=False):
        data = data_list_collater([dataset[index]], otf_graph=True)
        graph = build_graph(data, model.graph(otf=True))
        atoms += graph.num_nodes
        edges += len(graph.source)
    return {"avg_num_nodes": atoms / len(drawn), "avg_degree": edges / atoms}


def _model_keys(file: Path, config: Config) -> tuple[list[str], ModelConfig | EquiformerConfig]:
    """Where in a config the model's keys stand, and these."""
    model = config.get("model") or {}
    if "backbone" in model:
        where, keys = ["model", "backbone"], model["backbone"]
    elif model.get("name") == "hydra":
        raise InputError(
            f"{file}: model.backbone is missing: it comes from a checkpoint, and keeps the numbers "
            "that it was trained with"
        )
    else:
        where, keys = ["model"], model
    try:
        others = "name", "model", "finetune_config"
        own = {key: value for key, value in keys.items() if key not in others}
        first = EQUIFORMER.mean(str(keys.get("name")))
        return where, (EquiformerConfig if first else ModelConfig).from_keys(own)
    except ValueError as error:
        raise InputError(f"{file}: {'.'.join(where)}: {error}") from error


def _training_data(file: Path, config: Config) -> Dataset:
    train = (config.get("dataset") or {}).get("train") or {}
    if not train.get("src"):
        raise InputError(f"{file}: dataset.train.src is not set")
    return registry.get_dataset_class(train.get("format", "lmdb"))(train)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return its exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m fairchem_equiformer.fairchem1.statistics",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("config", type=Path, help="config with dataset.train and a model")
    parser.add_argument(
        "--structures",
        type=int,
        default=STRUCTURES,
        help="how many to draw at random (default: %(default)s)",
    )
    options, overrides = parser.parse_known_args(arguments)
    # Of no use to who runs the command, and printed for each file of each of fairchem's models.
    warnings.filterwarnings("ignore", "You are using `torch.load`", category=FutureWarning)
    setup_imports()
    try:
        config = read_config(options.config, overrides)
        where, model = _model_keys(options.config, config)
        found = measure(_training_data(options.config, config), model, options.structures)
    except (InputError, OSError, ValueError) as error:
        sys.stderr.write(f"statistics: error: {' '.join(str(error).split())}\n")
        return 2
    for depth, key in enumerate(where):
        sys.stdout.write(f"{'  ' * depth}{key}:\n")
    for key, value in found.items():
        sys.stdout.write(f"{'  ' * len(where)}{key}: {value:.5g}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
