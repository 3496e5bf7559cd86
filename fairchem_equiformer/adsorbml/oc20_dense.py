"""The reference that AdsorbML's authors published: DFT on OC20-Dense, 1,000 pairs.

Its archive ``oc20_dense_mappings.tar.gz`` holds pickles, of which three are read here:

    oc20dense_targets.pkl         {pair: [(placement, adsorption energy in eV), ...]}
    oc20dense_ref_energies.pkl    {pair: energy of clean surface and gas-phase adsorbate in eV}
    oc20dense_compute.pkl         {pair: {placement: {"ionic": steps, "scf": steps}, ...}}
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fairchem_equiformer.adsorbml.score import Reference
from fairchem_equiformer.checkpoints.pickled import read_pickle
from fairchem_equiformer.errors import InputError

if TYPE_CHECKING:
    from pathlib import Path

CLEAN_SURFACE = "surface"  # among the placements of `compute`; the model needs it relaxed, too


def read_oc20_dense(folder: Path, *, trusted: bool = False) -> dict[str, Reference]:
    """Energy and cost of each pair, on the scale of VASP's total energies.

    Args:
        folder: with the three pickles.
        trusted: see :func:`~fairchem_equiformer.checkpoints.pickled.read_pickle`.

    Raises:
        InputError: if one is missing or is not as above.
    """
    targets, references, compute = (
        _read(folder / f"oc20dense_{name}.pkl", trusted=trusted)
        for name in ("targets", "ref_energies", "compute")
    )

    def reference(pair: str) -> Reference:
        try:
            lowest = min(energy for _, energy in targets[pair]) + references[pair]
            counts = [count for name, count in compute[pair].items() if name != CLEAN_SURFACE]
            return Reference(
                float(lowest),
                evaluations=sum(int(count["ionic"]) for count in counts),
                scf_steps=sum(int(count["scf"]) for count in counts),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise InputError(f"{folder}: pair {pair}: not as expected ({error!r})") from error

    return {str(pair): reference(pair) for pair in targets}


def _read(path: Path, *, trusted: bool) -> dict[Any, Any]:
    if not path.is_file():
        raise InputError(f"no such file: {path}; docs/adsorbml.md tells where to get it")
    content = read_pickle(path, trusted=trusted)
    if not isinstance(content, dict):
        raise InputError(f"{path}: holds a {type(content).__name__}, not a dictionary of pairs")
    return content
