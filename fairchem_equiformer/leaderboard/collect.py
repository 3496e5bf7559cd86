"""Join the test sets of a folder in the files that the leaderboards take."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import numpy as np

from fairchem_equiformer.errors import InputError
from fairchem_equiformer.files import replacing
from fairchem_equiformer.leaderboard import form, split, systems

if TYPE_CHECKING:
    from pathlib import Path

    import numpy.typing as npt

PIECES = {"S2EF": split.S2EF, "IS2RE": split.RELAXED, "IS2RS": split.RELAXED}
SOURCES = {split.S2EF: "s2ef", split.RELAXED: "is2re"}


def collect(folder: Path, dataset: str) -> list[Path]:
    """Write ``<task>_submission.npz`` of each task that all test sets have results of.

    Args:
        folder: with a folder of each test set, as `split.Split` leaves it.
        dataset: "OC20" or "OC22".

    Raises:
        InputError: results are missing, are of several models, or would be refused.
    """
    splits = form.SPLITS[dataset]
    _check_model(folder, splits)
    written = []
    for task in form.TASKS[dataset]:
        piece = PIECES[task]
        absent = [name for name in splits if not (folder / name / piece).exists()]
        if len(absent) == len(splits):
            continue
        if absent:
            raise InputError(
                f"{task}: {folder} has no {piece} of {', '.join(absent)}; make it by "
                f"`run --split {absent[0]} --{SOURCES[piece]} SRC`"
            )
        written.append(_collect_task(folder, form.Form(dataset, task)))
    if not written:
        raise InputError(
            f"{folder} has no results of {', '.join(splits)}; make them by `run`, once for each"
        )
    return written


def _check_model(folder: Path, splits: tuple[str, ...]) -> None:
    """All test sets have results of one checkpoint under one config."""
    first: tuple[str, dict[str, Any]] | None = None
    for name in splits:
        path = folder / name / split.RECORD
        if not path.exists():
            continue
        record = {key: json.loads(path.read_text())[key] for key in ("checkpoint", "config")}
        first = first or (name, record)
        if differing := split.differing(first[1], record):
            raise InputError(f"{folder}: {first[0]} and {name} are of two models: {differing}")


def _collect_task(folder: Path, kind: form.Form) -> Path:
    piece = PIECES[kind.task]
    arrays: dict[str, npt.NDArray[np.generic]] = {}
    rows = {}
    for name in kind.splits:
        with np.load(folder / name / piece) as file:
            # A field that the model does not predict is reported as missing below.
            for field in set(form.FIELDS[kind.task]) & set(file.files):
                # fairchem's energies are [N, 1]
                try:
                    array = file[field]
                except Exception as error:  # zipfile, zlib and numpy have many
                    reason = " ".join(str(error).split())
                    raise InputError(f"{folder / name / piece}: {field}: {reason}") from error
                arrays[f"{name}_{field}"] = array.ravel() if field == "energy" else array
        record = json.loads((folder / name / split.RECORD).read_text())
        source = record["sources"][SOURCES[piece]]
        rows[name] = systems.rows(kind.task, source["src"], source["format"])
    path = folder / f"{kind.task.lower()}_submission.npz"
    with replacing(path) as partial:
        np.savez_compressed(partial, **arrays)
        if found := list(form.problems(partial, kind, rows)):
            more = f" (and {len(found) - 1} more)" if len(found) > 1 else ""
            raise InputError(f"{path} would be refused: {found[0]}{more}")
    return path
