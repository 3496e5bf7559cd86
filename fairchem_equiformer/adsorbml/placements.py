"""Placements of adsorbates on surfaces, to begin with: what is read, and what it must hold.

A folder has one sub-folder a pair of adsorbate and surface, and in it files that ASE reads:

    placements/CO_on_Cu111/slab.traj    the clean surface, relaxed (not required)
    placements/CO_on_Cu111/000.traj     a placement; a file of many frames is 000_0, 000_1, ...

An LMDB of OC20's form (OC20-Dense) comes with a mapping of its `sid` to pair and placement.
"""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ase.io
import numpy as np
from ase import Atoms
from ase.constraints import FixAtoms
from tqdm import tqdm

from fairchem_equiformer.checkpoints.pickled import read_pickle
from fairchem_equiformer.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Callable

    from fairchem.core.datasets import LmdbDataset

BELOW_SURFACE, SURFACE, ADSORBATE = 0, 1, 2  # tags of atoms in the Open Catalyst datasets
SLAB = "slab"  # name of the file with a pair's clean surface


@dataclass(frozen=True)
class Placement:
    """One initial structure, read when it is needed.

    Attributes:
        pair: name of its adsorbate-surface pair.
        name: its own name within the pair.
        read: reads it from its file.
    """

    pair: str
    name: str
    read: Callable[[], Atoms]

    def __str__(self) -> str:
        return f"pair {self.pair}, placement {self.name}"

    def atoms(self) -> Atoms:
        """The structure, with tags and with fixed atoms.

        Where a file fixes none, the atoms below the surface (tag 0) are, as in OC20.

        Raises:
            InputError: if it cannot be read, or no atom has an adsorbate's tag.
        """
        atoms = _read(self.read, str(self))
        tags = set(atoms.get_tags().tolist())
        if not tags <= {BELOW_SURFACE, SURFACE, ADSORBATE} or not {SURFACE, ADSORBATE} <= tags:
            raise InputError(
                f"{self}: its atoms have the tags {sorted(tags)}, and need OC20's: 0 below the "
                "surface, 1 at the surface, 2 in the adsorbate; .traj, .extxyz and .json keep tags"
            )
        if not any(isinstance(constraint, FixAtoms) for constraint in atoms.constraints):
            atoms.set_constraint(FixAtoms(mask=atoms.get_tags() == BELOW_SURFACE))
        return atoms


def read_placements(
    source: Path, mapping: Path | None = None, *, trusted: bool = False
) -> list[Placement]:
    """Find all placements, sorted by pair and name.

    Args:
        source: a folder with a sub-folder a pair, or an LMDB (a file, or a folder of them).
        mapping: for an LMDB, JSON or a pickle such as ``oc20dense_mapping.pkl``:
            ``{sid: {"system_id": pair, "config_id": name}}``.
        trusted: of that pickle, see :func:`~fairchem_equiformer.checkpoints.pickled.read_pickle`.

    Raises:
        InputError: if there is nothing, or two placements share a name.
    """
    if mapping is not None:
        placements = _from_lmdb(source, _read_mapping(mapping, trusted=trusted))
    elif source.is_dir():
        placements = _from_folder(source)
    else:
        raise InputError(
            f"no such folder of placements: {source}; an LMDB needs --mapping with names of pairs"
        )
    if not placements:
        raise InputError(f"{source}: no placements; a folder holds them as PAIR/PLACEMENT.traj")
    names = Counter((one.pair, one.name) for one in placements)
    for (pair, name), count in names.items():
        if count > 1:
            raise InputError(
                f"{source}: pair {pair} has {count} placements named {name}; give each its own name"
            )
        if bad := [part for part in (pair, name) if part != part.strip(".") or "/" in part]:
            raise InputError(f"{source}: the name {bad[0]!r} cannot be that of a file; rename it")
    return sorted(placements, key=lambda one: (one.pair, one.name))


def read_slab(pattern: str, pair: str) -> Atoms | None:
    """Read a pair's clean surface, the last frame of its file; None if there is none.

    Args:
        pattern: path with ``{pair}`` for its name and an optional ``*``.
        pair: the name.

    Raises:
        InputError: if several files fit, or the one cannot be read.
    """
    path = Path(pattern.replace("{pair}", pair))
    found = sorted(path.parent.glob(path.name))
    if len(found) > 1:
        raise InputError(f"pair {pair}: {len(found)} clean surfaces, {found[0]} and {found[1]}")
    return _read(partial(ase.io.read, found[0]), f"pair {pair}: {found[0]}") if found else None


def _read(read: Callable[[], Any], what: str) -> Any:
    try:
        return read()
    except InputError:
        raise
    except Exception as error:  # whatever the readers of ASE's formats raise
        reason = " ".join(str(error).split()) or type(error).__name__
        raise InputError(f"{what}: cannot be read ({reason})") from error


def _from_folder(folder: Path) -> list[Placement]:
    placements = []
    for file in sorted(folder.glob("*/[!.]*")):
        if file.stem == SLAB or not file.is_file():
            continue
        pair = file.parent.name
        count = _read(partial(_count_frames, file), f"pair {pair}: {file}")
        for index in range(count):
            name = file.stem if count == 1 else f"{file.stem}_{index}"
            placements.append(Placement(pair, name, partial(ase.io.read, file, index)))
    return placements


def _count_frames(file: Path) -> int:
    return sum(1 for _ in ase.io.iread(file, ":"))


def _read_mapping(path: Path, *, trusted: bool) -> dict[str, tuple[str, str]]:
    """Pair and name of each sid."""
    if not path.is_file():
        raise InputError(f"--mapping: no such file: {path}")
    if path.suffix == ".pkl":
        content = read_pickle(path, trusted=trusted)
    else:
        content = _read(lambda: json.loads(path.read_bytes()), f"--mapping: {path}")
    try:
        return {
            str(sid): (str(entry["system_id"]), str(entry["config_id"]))
            for sid, entry in content.items()
        }
    except (AttributeError, KeyError, TypeError) as error:
        raise InputError(
            f"--mapping: {path}: it must map each sid to a system_id and a config_id ({error!r})"
        ) from error


def _from_lmdb(source: Path, mapping: dict[str, tuple[str, str]]) -> list[Placement]:
    dataset = _read(partial(_open, source), f"{source}")
    placements = []
    for index in tqdm(range(len(dataset)), desc="reading sids", unit="system"):
        sid = str(dataset[index].sid)
        if sid not in mapping:
            raise InputError(f"{source}: entry {index} has the sid {sid}, which --mapping lacks")
        pair, name = mapping[sid]
        placements.append(Placement(pair, name, partial(_read_entry, source, index)))
    return placements


@cache  # in each process: an open LMDB cannot travel between them
def _open(source: Path) -> LmdbDataset:
    try:
        from fairchem.core.datasets import LmdbDataset  # noqa: PLC0415
    except ImportError as error:
        raise InputError(
            f"{source}: {error}; LMDBs of OC20's form are read by fairchem-core 1.10: "
            "pip install 'fairchem-equiformer[fairchem1]'"
        ) from error
    return LmdbDataset({"src": str(source)})


def _read_entry(source: Path, index: int) -> Atoms:
    data = _open(source)[index]
    return Atoms(
        data.atomic_numbers.numpy().astype(int),
        data.pos.numpy(),
        tags=np.asarray(data.tags, dtype=int),
        cell=data.cell.numpy().reshape(3, 3),
        pbc=True,
        constraint=FixAtoms(mask=data.fixed.numpy() == 1),
    )
