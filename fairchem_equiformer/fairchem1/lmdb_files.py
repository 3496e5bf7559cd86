"""Looks whether LMDB files are whole before they are opened.

LMDB maps a file into memory. What lies beyond the end of one that was cut short is a bus error,
which ends the process without a word.
"""

from __future__ import annotations

import pickle
import re
import struct
from typing import TYPE_CHECKING, Any

import lmdb
import numpy as np

from fairchem_equiformer.checkpoints import pickled
from fairchem_equiformer.errors import InputError

if TYPE_CHECKING:
    from pathlib import Path

# lmdb.h and mdb.c, format version 1: a page begins with a header; the first two pages hold a meta
# record each, and that of the later transaction counts.
PAGE_HEADER = 16
MAGIC = 0xBEEFC0DE
PAGE_SIZE = struct.Struct("<I")  # at 24 of the meta record
LAST_PAGE = struct.Struct("<QQ")  # last page and transaction, at 120
META_SIZE = 136
SHARD = re.compile(r"(.*?)(\d{4,})\.lmdb")  # data.0007.lmdb


def check(paths: list[Path], metadata: Path | None) -> None:
    """Check files that make one dataset.

    Args:
        paths: the files, in order.
        metadata: the `metadata.npz` that belongs to them, if there is one.

    Raises:
        InputError: if a file is damaged or missing, or holds other entries than it says.
    """
    _check_numbers(paths)
    count = sum(_check_file(path) for path in paths)
    if metadata is not None and metadata.is_file():
        _check_metadata(metadata, count)


def _check_numbers(paths: list[Path]) -> None:
    """Files that are numbered, are so without a gap."""
    numbers: dict[str, list[int]] = {}
    for path in paths:
        if match := SHARD.fullmatch(path.name):
            numbers.setdefault(match[1], []).append(int(match[2]))
    for stem, found in numbers.items():
        if missing := sorted(set(range(min(found), max(found) + 1)) - set(found)):
            names = ", ".join(f"{stem}{number:04}.lmdb" for number in missing[:5])
            more = f" and {len(missing) - 5} more" if len(missing) > 5 else ""
            raise InputError(
                f"{names}{more} is missing between the others in {paths[0].parent}; copy it, or "
                "rename the others if it is left out on purpose"
            )


def _check_file(path: Path) -> int:
    """Number of entries of a file that is whole."""
    size = path.stat().st_size
    if not size:
        raise InputError(f"{path} is empty; copy or make it again")
    with path.open("rb") as file:
        first = file.read(PAGE_HEADER + META_SIZE)
        if len(first) < PAGE_HEADER + META_SIZE or _number("<I", first, 0) != MAGIC:
            raise InputError(f"{path} is no LMDB file")
        page = PAGE_SIZE.unpack_from(first, PAGE_HEADER + 24)[0]
        file.seek(page)
        second = file.read(PAGE_HEADER + META_SIZE)
    metas = [
        LAST_PAGE.unpack_from(meta, PAGE_HEADER + 120)
        for meta in (first, second)
        if len(meta) == PAGE_HEADER + META_SIZE
    ]
    last, _ = max(metas, key=lambda meta: meta[1])
    if size < (last + 1) * page:
        raise InputError(
            f"{path} is cut short: it has {size} bytes, and its header says {(last + 1) * page}; "
            "copy it again"
        )
    return _count(path)


def _number(form: str, meta: bytes, offset: int) -> int:
    return struct.unpack_from(form, meta, PAGE_HEADER + offset)[0]


def _count(path: Path) -> int:
    """Number of entries, by the key `length` if there is one; the last of them must be there."""
    try:
        with (
            lmdb.open(
                str(path), subdir=False, readonly=True, lock=False, readahead=False, max_readers=1
            ) as env,
            env.begin() as transaction,
        ):
            entries = env.stat()["entries"]
            length: Any = transaction.get(b"length")
            if length is None:
                return entries
            count = int(pickled.loads(length))
            held = transaction.get(f"{count - 1}".encode()) is not None
    except (lmdb.Error, pickle.UnpicklingError, ValueError, TypeError, EOFError) as error:
        raise InputError(f"{path} cannot be read ({error}); copy or make it again") from error
    if count > entries - 1 or (count and not held):
        raise InputError(
            f"{path} holds {entries - 1} entries, and its key `length` says {count}: it was not "
            "written to the end; make it again"
        )
    return count


def _check_metadata(path: Path, count: int) -> None:
    """The numbers of atoms, by which batches are balanced, are those of these entries."""
    try:
        with np.load(path) as content:
            natoms = content["natoms"]
    except (OSError, ValueError, KeyError, EOFError) as error:
        raise InputError(f"{path} cannot be read ({error}); make it again or remove it") from error
    if len(natoms) != count:
        raise InputError(
            f"{path} describes {len(natoms)} structures, and the .lmdb files beside it hold "
            f"{count}: a file is missing or too many, or {path.name} is of other data"
        )
