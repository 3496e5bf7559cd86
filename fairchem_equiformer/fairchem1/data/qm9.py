"""QM9 (Ramakrishnan et al., 2014) for fairchem's trainers: 130,831 molecules, twelve properties.

torch_geometric downloads and reads the data. What a training adds to them is Equiformer's: the
partition, and energies counted from those of the free atoms.
"""

from __future__ import annotations

import logging
from functools import cache, cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple
from zipfile import BadZipFile

import numpy as np
import torch
from fairchem.core.datasets._utils import rename_data_object_keys
from fairchem.core.datasets.base_dataset import BaseDataset
from torch import Tensor
from torch.hub import download_url_to_file
from torch_geometric import datasets
from torch_geometric.data import Data, extract_zip
from torch_geometric.datasets.qm9 import atomrefs
from tqdm import tqdm

from fairchem_equiformer.checkpoints.reading import read_object
from fairchem_equiformer.fairchem1.data.noisy_nodes import corrupt, item_generator, noise_of
from fairchem_equiformer.fairchem1.data.partition import SPLITS, choice, partition

logger = logging.getLogger(__name__)

TARGETS = ("mu", "alpha", "homo", "lumo", "gap", "r2", "zpve", "u0", "u", "h", "g", "cv")
"""Properties in the order of torch_geometric's columns. Units: D (mu), a0^3 (alpha), a0^2 (r2),
cal/(mol K) (cv), eV (the others)."""

ELEMENTS = (1, 6, 7, 8, 9)
"""Atomic numbers in QM9. The model sees their place in this list, and has five elements."""

NUM_MOLECULES = 130_831
NUM_TRAIN, NUM_VAL = 110_000, 10_000

# torch_geometric's names for the molecules that it publishes, and for what it makes of them.
RAW = "qm9_v3.pt"
PROCESSED = Path("processed", "data_v3.pt")


class Molecules(NamedTuple):
    """All of QM9: M molecules with A atoms, in the order of the GDB-9 numbers."""

    pos: Tensor  # [A, 3], Angstrom
    elements: Tensor  # [A], places in ELEMENTS
    first_atom: Tensor  # [M + 1]
    properties: Tensor  # [M, 19], the first twelve columns are TARGETS
    names: list[str]  # gdb_1, gdb_2, ...


class QM9Dataset(BaseDataset):
    """One part of QM9: `format: fairchem_equiformer.fairchem1.data.qm9.QM9Dataset`.

    Keys of the config, beside those that fairchem has for every dataset:

    - `src`: the folder, as torch_geometric's QM9 lays it out. If the data are not there, they are
      downloaded.
    - `split`: train, val or test.
    - `target`: one of `TARGETS`. The energies u0, u, h and g are counted from those of the free
      atoms, which makes them the negative atomization energies; `atom_energies` has what was
      subtracted.
    - `num_train`, `num_val`: sizes of the partition, by default Equiformer's 110,000 and 10,000;
      the rest are for testing.
    - `key_mapping`: other names for fields of an entry, as for fairchem's datasets; the flat models
      call `energy` what is `target` here.
    - `noisy_nodes`: the keys of
      :class:`~fairchem_equiformer.fairchem1.data.noisy_nodes.NoisyNodes`. It stands under
      `train_split_settings`, which fairchem hands to the training set alone.

    An entry has pos [n, 3] in Angstrom, atomic_numbers [n] (places in `ELEMENTS`), natoms,
    fixed [n] (no atom is), sid (gdb_1, ...), target [1] and denoising [n, 3]: by how much the noise
    moved each atom, in units of its standard deviation, NaN for atoms that it did not move.

    Raises:
        ValueError: for an impossible value of a key, naming the key.
        OSError: if the data are not there and cannot be made.
    """

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__(config)
        split = choice("split", config.get("split"), SPLITS)
        target = choice("target", config.get("target"), TARGETS)
        if len(self.paths) != 1:
            raise ValueError(f"src is {config.get('src')!r}, it must be one folder")
        self.noise = noise_of(config)
        self.molecules = read(self.paths[0])
        sizes = config.get("num_train", NUM_TRAIN), config.get("num_val", NUM_VAL)
        self.members = partition(len(self.molecules.names), *sizes)[split]
        self.num_samples = len(self.members)
        self.values = _values(self.molecules, target)

    @cached_property
    def _metadata(self) -> dict[str, np.ndarray]:
        """Sizes, by which fairchem spreads the molecules over GPUs."""
        return {"natoms": self.molecules.first_atom.diff().numpy()[self.members]}

    def __getitem__(self, index: int) -> Data:
        member = self.members[index]
        first, last = self.molecules.first_atom[member : member + 2].tolist()
        pos = self.molecules.pos[first:last].clone()
        denoising = torch.full_like(pos, torch.nan)
        if self.noise is not None:
            clean = pos
            pos, moved = corrupt(clean, self.noise, item_generator(index))
            denoising[moved] = (pos - clean)[moved] / self.noise.std
        entry = Data(
            pos=pos,
            atomic_numbers=self.molecules.elements[first:last],
            natoms=last - first,
            fixed=torch.zeros(last - first),
            sid=self.molecules.names[member],
            target=self.values[member : member + 1],
            denoising=denoising,
        )
        return rename_data_object_keys(entry, self.config.get("key_mapping") or {})


def atom_energies(target: str) -> Tensor:
    """Energies of the free atoms, in eV, that are subtracted from a target.

    Returns:
        [5] in the order of `ELEMENTS`, in double precision; zeros where nothing is subtracted.
    """
    nothing = [0.0] * len(ELEMENTS)
    return torch.tensor(atomrefs.get(TARGETS.index(target), nothing), dtype=torch.float64)


def _values(molecules: Molecules, target: str) -> Tensor:
    """A property of each molecule [M].

    In double precision until the atoms' energies are gone: a total is ten thousand eV, and to
    subtract eighteen numbers from it in single precision leaves an error of 2 meV, a third of the
    published one.
    """
    molecule = torch.repeat_interleave(molecules.first_atom.diff())
    atoms = atom_energies(target)[molecules.elements]
    values = molecules.properties[:, TARGETS.index(target)].double()
    return values.index_add(0, molecule, atoms, alpha=-1).float()


@cache
def read(src: Path) -> Molecules:
    """All molecules in a folder. Several parts of one folder share them.

    Raises:
        OSError: if the data are not there and cannot be made.
        ValueError: if they are of another kind than QM9.
    """
    prepare(src)
    found = _QM9(str(src))
    if len(found) != NUM_MOLECULES:
        logger.warning(
            "%s holds %d molecules; with other than QM9's %d the partition is not the paper's",
            src,
            len(found),
            NUM_MOLECULES,
        )
    places = torch.full((int(found.z.max()) + 1,), -1)
    known = [number for number in ELEMENTS if number < len(places)]
    places[known] = torch.arange(len(known))
    elements, first_atom = places[found.z], found.slices["z"]
    if (elements < 0).any():
        atom = int((elements < 0).nonzero()[0])
        molecule = int(torch.searchsorted(first_atom, atom, right=True)) - 1
        raise ValueError(
            f"src: {src}: {found.name[molecule]} has an atom of atomic number "
            f"{int(found.z[atom])}; QM9 has {', '.join(map(str, ELEMENTS))} only"
        )
    return Molecules(found.pos, elements, first_atom, found.y, found.name)


def prepare(src: Path) -> None:
    """Download and process QM9 into a folder, unless it is there.

    A file that the user has put into `raw` is taken instead of a download. The work is done in a
    folder inside; what is moved to its place is complete. A download is not kept.

    Raises:
        OSError: if that is not possible; the message says which files to put where.
    """
    if (src / PROCESSED).is_file():
        return
    logger.info("making QM9 in %s, which is done once", src)
    try:
        (src / "processed").mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(dir=src, prefix="unfinished-") as folder:
            unfinished = Path(folder)
            if (src / "raw" / RAW).is_file():
                (unfinished / "raw").symlink_to((src / "raw").absolute())
            _QM9(folder)
            (unfinished / PROCESSED).rename(src / PROCESSED)
    except (OSError, BadZipFile) as error:
        reason = " ".join(str(error).split())
        raise OSError(
            f"src: no QM9 in {src}, and making it failed ({reason}). By hand: download "
            f"{datasets.QM9.processed_url} and unpack {RAW} from it into {src / 'raw'}"
        ) from error


class _QM9(datasets.QM9):
    """torch_geometric's class, always from the file of molecules that it publishes.

    By itself it does so only where RDKit is not installed; where it is, it makes the same molecules
    from the original files, which come from two other servers.
    """

    @property
    def has_download(self) -> bool:
        return not Path(self.processed_paths[0]).is_file()

    @property
    def raw_file_names(self) -> list[str]:
        return [RAW]

    def download(self) -> None:
        archive = Path(self.raw_dir, "qm9.zip")
        logger.info("downloading %s", self.processed_url)
        download_url_to_file(self.processed_url, str(archive))
        extract_zip(str(archive), self.raw_dir, log=False)
        archive.unlink()

    def load(self, path: str, data_cls: type[Data] = Data) -> None:
        """As it was, but of plain data; torch_geometric runs what a file asks for."""
        read_object(path, Data, mapped=True)
        super().load(path, data_cls)

    def process(self) -> None:
        logger.info("reading %s, which takes some minutes", RAW)
        try:
            molecules = torch.load(self.raw_paths[0], weights_only=True)
        except Exception as error:  # of many kinds, by where a file is damaged
            raise OSError(f"{RAW} is damaged: {error!r}") from error
        self.save([Data(**molecule) for molecule in tqdm(molecules)], self.processed_paths[0])
