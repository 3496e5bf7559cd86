"""The files that the Open Catalyst leaderboards take, and what is wrong with one.

A file is an .npz whose keys begin with a test set, ``id_``, ``ood_ads_``, ``ood_cat_`` and
``ood_both_`` for OC20, ``id_`` and ``ood_`` for OC22:

=====  ==========================================================================================
S2EF   ``ids`` "sid_fid", ``energy`` [N] in eV, ``forces`` [free atoms of all, 3] in eV/Angstrom,
       ``chunk_idx``
IS2RE  ``ids`` "sid", ``energy`` [N] in eV
IS2RS  ``ids`` "sid", ``pos`` [atoms of all, fixed ones too, 3] in Angstrom, ``chunk_idx``
=====  ==========================================================================================

``chunk_idx`` [N - 1] holds the rows at which ``numpy.split`` cuts the array of atoms. Keys, ids and
shapes are those of fairchem-core's predictions, relaxed positions and ``make_submission_file``. A
server loads them without pickle and wants the energies flat (issue 663 of fairchem). Half precision
is refused here and not there: at 10 eV it rounds energies to 8 meV, at 20 Angstrom positions to
0.02. Of forces it keeps three digits, which is fairchem's default.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from fairchem_equiformer.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator, Mapping
    from pathlib import Path

Array = npt.NDArray[np.generic]
Rows = dict[str, int]  # of each id of a test set, the number of its rows in the array of atoms

SPLITS = {"OC20": ("id", "ood_ads", "ood_cat", "ood_both"), "OC22": ("id", "ood")}
TASKS = {"OC20": ("S2EF", "IS2RE", "IS2RS"), "OC22": ("S2EF", "IS2RE")}
FIELDS = {
    "S2EF": ("ids", "energy", "forces", "chunk_idx"),
    "IS2RE": ("ids", "energy"),
    "IS2RS": ("ids", "pos", "chunk_idx"),
}
PER_ATOM = {"S2EF": "forces", "IS2RS": "pos"}
DTYPES = {
    "energy": ("float32", "float64"),
    "pos": ("float32", "float64"),
    "forces": ("float16", "float32", "float64"),
}


@dataclass(frozen=True)
class Form:
    """One kind of file: "OC20" or "OC22", and a task of ``TASKS``."""

    dataset: str
    task: str

    @property
    def splits(self) -> tuple[str, ...]:
        """The test sets."""
        return SPLITS[self.dataset]

    @property
    def keys(self) -> set[str]:
        """All keys of a file."""
        return {f"{split}_{field}" for split in self.splits for field in FIELDS[self.task]}


def guess(keys: Collection[str]) -> Form:
    """The form that a file with such keys is most likely meant to have."""
    tasks = [task for task, field in PER_ATOM.items() if any(k.endswith(f"_{field}") for k in keys)]
    oc22 = {"ood_ids", "ood_energy", "ood_forces"} & set(keys)  # in OC20, ood_ads_ids and so on
    return Form("OC22" if oc22 else "OC20", tasks[0] if tasks else "IS2RE")


def keys_of(path: Path) -> list[str]:
    """The keys of an .npz file.

    Raises:
        InputError: if it is none.
    """
    if not path.is_file():
        raise InputError(f"no such file: {path}")
    try:
        with path.open("rb") as opened, np.load(opened) as file:
            return list(file.files)
    except Exception as error:  # whatever numpy meets in a damaged file, or one of another kind
        raise InputError(f"{path} is no .npz file, or not all of one ({error})") from error


def problems(path: Path, form: Form, rows: Mapping[str, Rows]) -> Iterator[str]:
    """Say in one line each what a server would refuse or score wrongly, split by split.

    Args:
        path: the .npz file.
        form: what it is meant to be.
        rows: of each test set to compare with, its ids and their rows (`systems.rows`). Without a
            test set, what a file says is only compared with itself.

    Raises:
        InputError: if the file is no .npz file.
    """
    present = set(keys_of(path))
    for key in sorted(form.keys - present):
        yield f"{key}: missing"
    for key in sorted(present - form.keys):
        yield f"{key}: no key of {form.task} of {form.dataset}"
    with np.load(path) as file:
        for split in form.splits:
            arrays: dict[str, Array] = {}
            for field in FIELDS[form.task]:
                key = f"{split}_{field}"
                if key not in present:
                    continue
                try:
                    arrays[field] = _array(file, key)
                except Exception as error:  # noqa: BLE001  # zipfile, zlib and numpy have many
                    yield f"{key}: cannot be read ({' '.join(str(error).split())})"
            if "ids" in arrays:
                for problem in _split_problems(arrays, form.task, rows.get(split)):
                    yield f"{split}_{problem}"


def _array(file: Mapping[str, Array], key: str) -> Array:
    array = file[key]
    if not isinstance(array, np.ndarray):  # bytes: numpy does not know the entry as its own
        raise TypeError("no array of numpy")
    return array


def _split_problems(
    arrays: Mapping[str, Array], task: str, rows: Mapping[str, int] | None
) -> Iterator[str]:
    """What is wrong within a test set; its ids are there."""
    ids = arrays["ids"]
    if ids.ndim != 1 or ids.dtype.kind != "U":
        yield f"ids: {ids.dtype} of shape {ids.shape}, not a flat array of strings"
        return
    names = ids.tolist()
    id_problems = list(_id_problems(names, rows))
    yield from id_problems
    if "energy" in arrays:
        yield from _value_problems("energy", arrays["energy"], (len(names),), names.__getitem__)
    field = PER_ATOM.get(task, "")
    if field not in arrays:
        return
    total = len(arrays[field]) if arrays[field].ndim else 0
    ends = None  # of each id, the row after its last
    if rows is not None and names and not id_problems:
        ends = np.cumsum([rows[name] for name in names])
        total = int(ends[-1])
    if "chunk_idx" in arrays and arrays[field].ndim:
        problem = _cut_problem(arrays["chunk_idx"], names, total, ends)
        if problem is not None:
            yield f"chunk_idx: {problem}"
        elif ends is None:
            ends = np.append(arrays["chunk_idx"], total)

    def owner(row: int) -> str:
        return "?" if ends is None else names[int(np.searchsorted(ends, row, side="right"))]

    yield from _value_problems(field, arrays[field], (total, 3), owner)


def _id_problems(names: list[str], rows: Mapping[str, int] | None) -> Iterator[str]:
    if not names:
        yield "ids: none"
    counts = Counter(names)
    if again := [name for name, count in counts.items() if count > 1]:
        yield f"ids: {len(names) - len(counts)} of {len(names)} repeated, {_examples(again)}"
    if rows is None:
        return
    if missing := [name for name in rows if name not in counts]:
        yield f"ids: {len(missing)} of the test set's {len(rows)} missing, {_examples(missing)}"
    if unknown := [name for name in counts if name not in rows]:
        yield f"ids: {len(unknown)} of {len(names)} not in the test set, {_examples(unknown)}"


def _examples(names: list[str]) -> str:
    more = ", ..." if len(names) > 3 else ""
    return f"as {', '.join(map(repr, names[:3]))}{more}"


def _cut_problem(cuts: Array, names: list[str], total: int, ends: Array | None) -> str | None:
    if cuts.ndim != 1 or cuts.dtype.kind not in "iu":
        return f"{cuts.dtype} of shape {cuts.shape}, not a flat array of integers"
    if len(cuts) != max(len(names) - 1, 0):
        return f"{len(cuts)} cuts, where {len(names)} ids take {max(len(names) - 1, 0)}"
    if ends is not None:
        wrong = np.flatnonzero(cuts != ends[:-1])
        if len(wrong):
            first = wrong[0]
            return (
                f"row {cuts[first]} after the atoms of {names[first]!r}, "
                f"which by the test set end at row {ends[first]}"
            )
        return None
    bounds = np.concatenate([[0], cuts.astype(np.int64), [total]])
    wrong = np.flatnonzero(np.diff(bounds) <= 0)
    if len(names) and len(wrong):
        first = wrong[0]
        return f"{names[first]!r} would have rows {bounds[first]} to {bounds[first + 1]} of {total}"
    return None


def _value_problems(
    field: str, values: Array, shape: tuple[int, ...], owner: Callable[[int], str]
) -> Iterator[str]:
    """What is wrong with numbers; `owner` tells the id of a row."""
    if values.shape != shape:
        flat = "; energies must be flat" if field == "energy" and values.ndim != 1 else ""
        yield f"{field}: shape {values.shape}, not {shape}{flat}"
        return
    if values.dtype.name not in DTYPES[field]:
        yield f"{field}: type {values.dtype}, not {' or '.join(DTYPES[field])}"
    if values.dtype.kind != "f":
        return
    finite = np.isfinite(values)
    if not finite.all():
        bad = np.flatnonzero(~finite.reshape(len(values), -1).all(axis=1))
        number = values[bad[0]][~finite[bad[0]]].flat[0]
        yield (
            f"{field}: {len(bad)} of {len(values)} rows not finite, the first is row {bad[0]}: "
            f"{number} for id {owner(int(bad[0]))!r}"
        )


def count(path: Path, form: Form) -> dict[str, int]:
    """Number of ids of each test set in a file without problems."""
    with np.load(path) as file:
        return {split: len(file[f"{split}_ids"]) for split in form.splits}
