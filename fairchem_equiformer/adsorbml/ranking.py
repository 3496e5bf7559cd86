"""Leaves out invalid relaxed structures and sorts the others by energy.

The criteria are those of AdsorbML, computed by the code that was published with the Open Catalyst
datasets, `DetectTrajAnomaly` of fairchem-data-oc. Atoms are bonded if their distance is below
m (r_1 + r_2) + 0.6 Angstrom, with covalent radii r, m = 1 where nothing else is said (0.6 is twice
the skin of ASE's neighbour lists, which that code leaves at its default):

    dissociated     the bonds within the adsorbate are not those of the initial structure
    desorbed        no bond from the adsorbate to the surface, with m = 1.5
    reconstructed   a bond within the surface that the relaxed clean surface has not even at
                    m = 1.5, or the other way round
    intercalated    a bond from the adsorbate to an atom below the surface (tag 0)

The figures in the papers of AdsorbML and EquiformerV2 have the first three; `intercalated` came
later. Two relaxations into the same minimum are both kept, as there.
"""

from __future__ import annotations

from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from functools import partial
from multiprocessing import get_context
from typing import TYPE_CHECKING

import numpy as np
from tqdm import tqdm

from fairchem_equiformer.adsorbml.placements import ADSORBATE, Placement, read_slab
from fairchem_equiformer.adsorbml.relaxation import read_relaxed
from fairchem_equiformer.errors import InputError
from fairchem_equiformer.files import read_json, write_json

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence
    from pathlib import Path

    from ase import Atoms

CRITERIA = {
    "dissociated": "is_adsorbate_dissociated",
    "desorbed": "is_adsorbate_desorbed",
    "reconstructed": "has_surface_changed",
    "intercalated": "is_adsorbate_intercalated",
}
NOT_FINITE, NOT_CONVERGED = "not finite", "not converged"


@dataclass(frozen=True)
class Candidate:
    """A relaxed placement as the ranking sees it.

    Attributes:
        name: of the placement.
        energy: relaxed energy in eV.
        reasons: why it is invalid; none if it is valid.
        seconds: the relaxation took, on its device.
        evaluations: of energy and forces in the relaxation, if they were counted.
        converged: whether the relaxation reached its largest force.
    """

    name: str
    energy: float
    reasons: tuple[str, ...] = ()
    seconds: float = 0.0
    evaluations: int | None = None
    converged: bool = True


@dataclass(frozen=True)
class Pair:
    """All placements of a pair, the valid ones first and by energy."""

    name: str
    candidates: tuple[Candidate, ...] = field(default=())

    def best(self, k: int) -> tuple[Candidate, ...]:
        """The at most `k` valid placements of lowest energy."""
        return tuple(one for one in self.candidates if not one.reasons)[:k]


def anomalies(
    initial: Atoms, relaxed: Atoms, slab: Atoms | None, criteria: Iterable[str] = CRITERIA
) -> tuple[str, ...]:
    """Names of the criteria by which a relaxed structure is invalid.

    Args:
        initial: before the relaxation, with tags.
        relaxed: after it.
        slab: the relaxed clean surface, its atoms in the order of `initial`; without it, the
            surface of `initial` stands in.
        criteria: which to apply.

    Raises:
        InputError: if fairchem-data-oc is missing, or the clean surface has other atoms.
    """
    try:
        from fairchem.data.oc.utils import DetectTrajAnomaly  # noqa: PLC0415
    except ImportError as error:
        raise InputError(
            f"{error}; the criteria need it: pip install 'fairchem-equiformer[adsorbml]'"
        ) from error
    if not np.isfinite(relaxed.positions).all():
        return (NOT_FINITE,)
    if slab is not None:
        expected = initial.numbers[initial.get_tags() != ADSORBATE]
        if not np.array_equal(slab.numbers, expected):
            raise InputError(
                f"the clean surface is {slab.symbols}, that of the placement is "
                f"{initial[initial.get_tags() != ADSORBATE].symbols}; atoms and order must agree"
            )
    detector = DetectTrajAnomaly(initial, relaxed, initial.get_tags(), final_slab_atoms=slab)
    return tuple(
        name for name in CRITERIA if name in criteria and getattr(detector, CRITERIA[name])()
    )


def sort(pairs: Mapping[str, Iterable[Candidate]]) -> dict[str, Pair]:
    """Sort the placements of each pair: valid before invalid, then by energy, then by name."""

    def key(one: Candidate) -> tuple[bool, float, str]:
        return bool(one.reasons), one.energy if np.isfinite(one.energy) else np.inf, one.name

    return {
        name: Pair(name, tuple(sorted(candidates, key=key)))
        for name, candidates in sorted(pairs.items())
    }


def rank(
    placements: Sequence[Placement],
    run: Path,
    slabs: str,
    criteria: Sequence[str] = tuple(CRITERIA),
    only_converged: bool = False,
    processes: int = 1,
) -> dict[str, Pair]:
    """Judge and sort the relaxed placements of a folder, and write ``ranking.json`` there.

    Args:
        placements: the initial structures.
        run: folder with their relaxations.
        slabs: pattern of the files with clean surfaces, as `read_slab` takes it.
        criteria: which of `CRITERIA` to apply.
        only_converged: whether relaxations that ran out of steps are invalid, too.
        processes: how many to judge at a time.

    Raises:
        InputError: if a placement is not relaxed yet, or something cannot be read.
    """
    judge = partial(
        _judge, run=run, slabs=slabs, criteria=tuple(criteria), only_converged=only_converged
    )
    bar = partial(tqdm, total=len(placements), desc="judging", unit="system")
    if processes == 1:
        candidates = list(bar(map(judge, placements)))
    else:
        # "spawn" leaves behind the threads that torch may have started in this process
        with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
            candidates = list(bar(pool.map(judge, placements, chunksize=16)))
    grouped: dict[str, list[Candidate]] = {one.pair: [] for one in placements}
    for placement, candidate in zip(placements, candidates, strict=True):
        grouped[placement.pair].append(candidate)
    pairs = sort(grouped)
    write_json(
        run / "ranking.json",
        {name: [asdict(one) for one in pair.candidates] for name, pair in pairs.items()},
    )
    return pairs


def read_ranking(run: Path) -> dict[str, Pair]:
    """Read what `rank` wrote.

    Raises:
        InputError: if it is not there.
    """
    content = read_json(run / "ranking.json", "rank")
    return {
        name: Pair(
            name, tuple(Candidate(**{**one, "reasons": tuple(one["reasons"])}) for one in ones)
        )
        for name, ones in content.items()
    }


def summary(pairs: Mapping[str, Pair]) -> str:
    """How many placements are valid, how many not and why, and which pairs have none."""
    candidates = [one for pair in pairs.values() for one in pair.candidates]
    reasons = Counter(reason for one in candidates for reason in one.reasons)
    valid = sum(not one.reasons for one in candidates)
    lines = [f"{len(candidates)} placements of {len(pairs)} pairs: {valid} valid"]
    lines += [f"  {count:6d} {reason}" for reason, count in reasons.most_common()]
    if unconverged := sum(not one.converged for one in candidates):
        lines.append(f"  {unconverged:6d} ran out of steps (valid or not)")
    if empty := [name for name, pair in pairs.items() if not pair.best(1)]:
        lines.append(f"  without a valid placement: {', '.join(empty)}")
    return "\n".join(lines)


def _judge(
    placement: Placement, run: Path, slabs: str, criteria: tuple[str, ...], only_converged: bool
) -> Candidate:
    relaxed = read_relaxed(run, placement)
    if relaxed is None:
        raise InputError(f"{placement}: not relaxed in {run}; run `relax` again, which goes on")
    energy = relaxed.atoms.get_potential_energy()
    initial, slab = placement.atoms(), read_slab(slabs, placement.pair)
    try:
        reasons = anomalies(initial, relaxed.atoms, slab, criteria)
    except InputError as error:
        raise InputError(f"{placement}: {error}") from error
    if not np.isfinite(energy):
        reasons = (NOT_FINITE,)
    if only_converged and not relaxed.converged:
        reasons = (*reasons, NOT_CONVERGED)
    return Candidate(
        placement.name, energy, reasons, relaxed.seconds, relaxed.evaluations, relaxed.converged
    )
