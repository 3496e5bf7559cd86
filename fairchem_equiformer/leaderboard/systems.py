"""What a dataset tells of its systems: names, numbers of atoms, positions."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from fairchem.core.common.registry import registry
from tqdm import tqdm

from fairchem_equiformer.errors import InputError
from fairchem_equiformer.fairchem1.names import todays_name
from fairchem_equiformer.fairchem1.preflight import LMDB_FORMATS

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from torch_geometric.data import Data

Array = npt.NDArray[np.float64]


def read(src: str, dataset_format: str = "lmdb") -> Iterator[Data]:
    """Read a dataset as fairchem does, behind a progress bar.

    Args:
        src: what a config calls `dataset.test.src`: a file or folder of data.
        dataset_format: what a config calls `dataset.train.format`.

    Raises:
        InputError: if there is no such dataset.
    """
    path = Path(src)
    if todays_name(dataset_format) in LMDB_FORMATS and not (
        path.is_file() or any(path.glob("*.lmdb"))
    ):
        raise InputError(f"no LMDB: {src} (looked from {Path.cwd()})")
    try:
        dataset = registry.get_dataset_class(dataset_format)({"src": src})
    except Exception as error:  # of LMDB, ASE or fairchem
        raise InputError(f"cannot read {src} as {dataset_format}: {error}") from error
    for index in tqdm(range(len(dataset)), desc=f"reading {src}", unit="system", leave=False):
        yield dataset[index]


def name(data: Data, *, frame: bool) -> str:
    """The id that fairchem gives a system: "sid", or "sid_fid" of a frame that has a number."""
    sid = _plain(data.sid)
    return f"{sid}_{_plain(data.fid)}" if frame and "fid" in data else str(sid)


def _plain(value: Any) -> Any:
    return value.item() if isinstance(value, torch.Tensor) else value


def free_atoms(data: Data) -> npt.NDArray[np.bool_]:
    """Which atoms [N] may move."""
    return np.asarray(data.fixed) == 0


def rows(task: str, src: str, dataset_format: str = "lmdb") -> dict[str, int]:
    """Of each id of a test set, the number of its rows in the per-atom array of a task's file.

    That is the number of free atoms for S2EF and of all atoms for IS2RS. IS2RE has no such array;
    the numbers are those of IS2RS.

    Raises:
        InputError: if the dataset cannot be read or two of its systems share an id.
    """
    found: dict[str, int] = {}
    for data in read(src, dataset_format):
        key = name(data, frame=task == "S2EF")
        if key in found:
            raise InputError(f"{src}: two systems share the id {key}; give each system its own")
        found[key] = int(free_atoms(data).sum()) if task == "S2EF" else len(data.pos)
    return found


def fold(vectors: Array, cell: Array) -> Array:
    """Vectors [N, 3] less the lattice vectors that bring their fractions into [-0.5, 0.5].

    The convention of fairchem's evaluator; in a very oblique cell it is not always the shortest.
    """
    fractions = np.linalg.solve(cell.T, vectors.T).T
    return (fractions - fractions.round()) @ cell


def format_of(config: Mapping[str, Any], split: str) -> str:
    """Format of the data that a config reads as `dataset.test` or `dataset.relax`."""
    dataset = config["dataset"]
    own, train = (dataset.get(part) or {} for part in (split, "train"))
    shared = train if own.get("use_train_settings", True) else {}
    return own.get("format") or shared.get("format") or "lmdb"
