"""Make and check the files that EvalAI's Open Catalyst challenge takes.

fairchem's own ``make_submission_file`` joins the results of the four test sets. What it leaves to
do: energies come out with shape (N, 1), which the server refuses, and nothing is checked.

Every key starts with a split, ``id``, ``ood_ads``, ``ood_cat`` or ``ood_both``:

=====  ==========================================================================================
S2EF   ``_ids`` "sid_fid", ``_energy`` (N,), ``_forces`` (free atoms of all, 3), ``_chunk_idx``
IS2RE  ``_ids`` "sid", ``_energy`` (N,)
IS2RS  ``_ids`` "sid", ``_pos`` (atoms of all, 3), ``_chunk_idx``
=====  ==========================================================================================

``_chunk_idx`` (N - 1,) holds the rows at which ``numpy.split`` cuts a per-atom array.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    import numpy.typing as npt

SPLITS = ("id", "ood_ads", "ood_cat", "ood_both")
PROPERTIES = {"S2EF": ("energy", "forces"), "IS2RE": ("energy",), "IS2RS": ("pos",)}


class SubmissionError(ValueError):
    """A file that the server would refuse or score wrongly."""


def script_command(task: str, sources: Mapping[str, Path], out: Path) -> list[str]:
    """Return the command that joins results with fairchem's script.

    Args:
        task: "S2EF", "IS2RE" or "IS2RS".
        sources: of each split the file of results; for IS2RE the folder of trajectories, whose
            last frames have the relaxed energies.
        out: the .npz file to write.
    """
    command = [sys.executable, "-m", "fairchem.core.scripts.make_submission_file"]
    for split in SPLITS:
        command += [f"--{split.replace('_', '-')}", str(sources[split])]
    if task == "IS2RE":
        command.append("--is2re-relaxations")
    return [*command, "--out-path", str(out)]


def flatten_energies(path: Path) -> None:
    """Rewrite a file's energies of shape (N, 1) as (N,)."""
    with np.load(path) as file:
        arrays = dict(file)
    for split in SPLITS:
        key = f"{split}_energy"
        arrays[key] = arrays[key].reshape(len(arrays[key]))
    unfinished = path.with_suffix(".partial")
    with unfinished.open("wb") as file:
        np.savez_compressed(file, **arrays)
    unfinished.replace(path)


def check(path: Path, task: str, rows: Mapping[str, Mapping[str, int]]) -> None:
    """Check keys, ids, shapes, types and values of a file.

    Args:
        path: the .npz file.
        task: "S2EF", "IS2RE" or "IS2RS".
        rows: of each split, the number of per-atom rows that belong to each id of the test set:
            free atoms for S2EF, all atoms for IS2RS.

    Raises:
        SubmissionError: naming the file, the key and what is wrong.
    """
    with np.load(path) as file:
        arrays = dict(file)
    names = ["ids", *PROPERTIES[task]] + ([] if task == "IS2RE" else ["chunk_idx"])
    expected = {f"{split}_{name}" for split in SPLITS for name in names}
    if arrays.keys() != expected:
        raise SubmissionError(
            f"{path}: missing keys {sorted(expected - arrays.keys())}, "
            f"unknown keys {sorted(arrays.keys() - expected)}"
        )
    try:
        for split in SPLITS:
            _check_split({name: arrays[f"{split}_{name}"] for name in names}, split, rows[split])
    except SubmissionError as error:
        raise SubmissionError(f"{path}: {error}") from None


def _check_split(
    arrays: Mapping[str, npt.NDArray[np.generic]], split: str, rows: Mapping[str, int]
) -> None:
    ids = arrays["ids"].tolist()
    if repeated := len(ids) - len(set(ids)):
        raise SubmissionError(f"{split}_ids: {repeated} of {len(ids)} are repeated")
    if unlike := sorted(set(ids) ^ rows.keys()):
        raise SubmissionError(
            f"{split}_ids: {len(unlike)} differ from the test set's, the first is {unlike[0]!r}"
        )
    counts = [rows[name] for name in ids]
    if "energy" in arrays:
        _check_numbers(f"{split}_energy", arrays["energy"], (len(ids),))
    for name in ("forces", "pos"):
        if name in arrays:
            _check_numbers(f"{split}_{name}", arrays[name], (sum(counts), 3))
    if "chunk_idx" in arrays and not np.array_equal(arrays["chunk_idx"], np.cumsum(counts)[:-1]):
        raise SubmissionError(
            f"{split}_chunk_idx: does not cut the rows where the atoms of ids end"
        )


def _check_numbers(key: str, values: npt.NDArray[np.generic], shape: tuple[int, ...]) -> None:
    if values.shape != shape:
        raise SubmissionError(f"{key}: shape {values.shape}, not {shape}")
    if values.dtype not in (np.float32, np.float64):
        raise SubmissionError(f"{key}: type {values.dtype}, not float32 or float64")
    if not np.isfinite(values).all():
        where = tuple(int(i) for i in np.argwhere(~np.isfinite(values))[0])
        raise SubmissionError(f"{key}: {values[where]} at {where}")
