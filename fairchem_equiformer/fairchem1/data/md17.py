"""MD17 (Chmiela et al., 2017) for fairchem's trainers: molecular dynamics of small molecules.

Energies and forces of DFT along one trajectory per molecule, in kcal/mol, as their authors publish
them. What a training adds is Equiformer's: the partition. Here they are in eV and Angstrom.
"""

from __future__ import annotations

import logging
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple
from zipfile import BadZipFile

import numpy as np
import torch
from ase.units import kcal, mol
from fairchem.core.datasets.base_dataset import BaseDataset
from torch import Tensor
from torch.hub import download_url_to_file
from torch_geometric import datasets
from torch_geometric.data import Data

from fairchem_equiformer.fairchem1.data.partition import SPLITS, choice, partition

logger = logging.getLogger(__name__)

MOLECULES = (
    "aspirin",
    "benzene",
    "ethanol",
    "malonaldehyde",
    "naphthalene",
    "salicylic_acid",
    "toluene",
    "uracil",
)
NUM_TRAIN, NUM_VAL = 950, 50
KCAL_PER_MOL = kcal / mol
"""In eV."""

# What the arrays of a file hold, in kcal/mol and Angstrom: M frames of n atoms.
ARRAYS = {"E": "energies [M] or [M, 1]", "F": "forces [M, n, 3]", "R": "positions [M, n, 3]"}


class Frames(NamedTuple):
    """Some frames of one molecule's trajectory: m of them, n atoms."""

    numbers: Tensor  # [n], atomic numbers
    pos: Tensor  # [m, n, 3], Angstrom
    energy: Tensor  # [m], eV, counted from the mean of the training set
    forces: Tensor  # [m, n, 3], eV/Angstrom


class MD17Dataset(BaseDataset):
    """One part of a molecule's trajectory: `format: fairchem_equiformer.MD17Dataset`.

    Keys of the config, beside those that fairchem has for every dataset:

    - `src`: the folder with the authors' files, such as `md17_aspirin.npz`. If the molecule's is
      not there, it is downloaded.
    - `molecule`: one of `MOLECULES`.
    - `split`: train, val or test.
    - `num_train`, `num_val`: sizes of the partition, by default Equiformer's 950 and 50; the rest
      are for testing.

    An entry has pos [n, 3] in Angstrom, atomic_numbers [n], natoms, fixed [n] (no atom is), sid
    (aspirin_0, ... in the order of the file), energy [1] in eV and forces [n, 3] in eV/Angstrom.
    Energies are counted from `mean_energy`, the mean of the training set.

    Raises:
        ValueError: for an impossible value of a key, naming the key.
        OSError: if the data are not there and cannot be downloaded, or are damaged.
    """

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__(config)
        self.molecule = choice("molecule", config.get("molecule"), MOLECULES)
        split = choice("split", config.get("split"), SPLITS)
        if len(self.paths) != 1:
            raise ValueError(f"src is {config.get('src')!r}, it must be one folder")
        sizes = config.get("num_train", NUM_TRAIN), config.get("num_val", NUM_VAL)
        path = prepare(self.paths[0], self.molecule)
        self.mean_energy, self.members, self.frames = read(path, split, *sizes)
        self.num_samples = len(self.members)

    @cached_property
    def _metadata(self) -> dict[str, np.ndarray]:
        """Sizes, by which fairchem spreads the frames over GPUs."""
        return {"natoms": np.full(self.num_samples, len(self.frames.numbers))}

    def __getitem__(self, index: int) -> Data:
        natoms = len(self.frames.numbers)
        return Data(
            pos=self.frames.pos[index].clone(),
            atomic_numbers=self.frames.numbers,
            natoms=natoms,
            fixed=torch.zeros(natoms),
            sid=f"{self.molecule}_{self.members[index]}",
            energy=self.frames.energy[index : index + 1],
            forces=self.frames.forces[index],
        )


def read(path: Path, split: str, num_train: int, num_val: int) -> tuple[float, np.ndarray, Frames]:
    """One part of the partition of a file.

    The mean goes in double precision: a total of aspirin is -17,600 eV, and single precision rounds
    that to 2 meV, a third of the published error.

    Returns:
        The training set's mean energy in eV, which is subtracted; the frames' places in the file
        [m]; and the frames.

    Raises:
        ValueError: if a part would be empty.
        OSError: if the file is damaged or of another kind, with what is wrong.
    """
    arrays = _arrays(path)
    energies = arrays["E"].astype(np.float64).reshape(-1) * KCAL_PER_MOL
    parts = partition(len(energies), num_train, num_val)
    members = parts[split]
    mean = float(energies[parts["train"]].mean())
    frames = Frames(
        numbers=torch.as_tensor(arrays["z"].astype(np.int64)),
        pos=torch.as_tensor(arrays["R"][members], dtype=torch.float32),
        energy=torch.as_tensor(energies[members] - mean, dtype=torch.float32),
        forces=torch.as_tensor(arrays["F"][members] * KCAL_PER_MOL, dtype=torch.float32),
    )
    for name, values in {"R": frames.pos, "E": frames.energy, "F": frames.forces}.items():
        finite = values.reshape(len(members), -1).isfinite().all(dim=1)
        if not finite.all():
            frame = members[int((~finite).nonzero()[0])]
            raise OSError(f"{path}: {name} of frame {frame} is not finite: download it again")
    return mean, members, frames


def _arrays(path: Path) -> dict[str, np.ndarray]:
    """The arrays of a file, of shapes that belong together.

    Raises:
        OSError: if that is not what it holds.
    """
    try:
        with path.open("rb") as opened, np.load(opened) as file:
            arrays = {name: file[name] for name in (*ARRAYS, "z") if name in file}
    except (OSError, ValueError, BadZipFile, EOFError) as error:
        reason = " ".join(str(error).split())
        raise OSError(f"{path} cannot be read ({reason}): delete it, or download it") from error
    if missing := [name for name in (*ARRAYS, "z") if name not in arrays]:
        raise OSError(
            f"{path} has no array {', '.join(missing)}: a file of MD17 has z, atomic numbers [n], "
            + ", ".join(f"{name}, {content}" for name, content in ARRAYS.items())
        )
    frames, atoms = arrays["E"].size, arrays["z"].size
    for name in ("F", "R"):
        if arrays[name].shape != (frames, atoms, 3):
            raise OSError(
                f"{path}: {name} has shape {list(arrays[name].shape)}, where E has {frames} frames "
                f"and z {atoms} atoms: [{frames}, {atoms}, 3] was expected"
            )
    return arrays


def url(molecule: str) -> str:
    """Where a molecule's trajectory is downloaded from."""
    name = datasets.MD17.file_names[molecule.replace("_", " ")]
    return f"{datasets.MD17.gdml_url}/{name}"


def prepare(src: Path, molecule: str) -> Path:
    """The file of a molecule, downloaded unless it is there.

    The download has another name until it is complete and was read.

    Raises:
        OSError: if there is none and it cannot be downloaded; says which file to put where.
    """
    path = src / url(molecule).rpartition("/")[2]
    if path.is_file():
        return path
    logger.info("downloading %s, which is done once", url(molecule))
    try:
        src.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(dir=src, prefix="unfinished-") as folder:
            unfinished = Path(folder, path.name)
            download_url_to_file(url(molecule), str(unfinished))
            _arrays(unfinished)
            unfinished.rename(path)
    except OSError as error:
        reason = " ".join(str(error).split())
        raise OSError(
            f"src: no {path.name} in {src}, and downloading it failed ({reason}). By hand: "
            f"download {url(molecule)} into {src}"
        ) from error
    return path
