"""Success rate and speed-up against a reference that relaxed all placements by DFT.

Of a pair, E_ref is the lowest relaxed energy of the reference's valid placements and E_k the lowest
single-point energy of the model's best k. As in AdsorbML (Lan et al. 2023):

    success         E_k <= E_ref + 0.1 eV; a pair with nothing valid or computed is no success
    much better     E_k < E_ref - 0.1 eV, a part of the successes
    speed-up        cost of all relaxations of the reference / cost of the single points of the
                    best k, summed over pairs; the model's own time is not in it, but beside it

Cost is counted in evaluations of energy and forces (AdsorbML's ionic steps), in electronic steps
(the paper's figure) where the calculator tells them, and in seconds where they are known.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

import numpy as np

from fairchem_equiformer.adsorbml.ranking import read_ranking
from fairchem_equiformer.adsorbml.relaxation import read_settings
from fairchem_equiformer.adsorbml.single_points import SinglePoint, read_single_point
from fairchem_equiformer.errors import InputError
from fairchem_equiformer.files import read_json, replacing

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence
    from pathlib import Path

    from fairchem_equiformer.adsorbml.ranking import Pair

THRESHOLD = 0.1  # eV
LARGEST_K = 5


@dataclass(frozen=True)
class Reference:
    """What DFT alone finds in a pair, and what that costs.

    Attributes:
        energy: lowest relaxed energy in eV.
        evaluations: of energy and forces, in the relaxations of all placements.
        scf_steps: electronic steps in these, where they are known.
        seconds: CPU-seconds of these, where they are known.
    """

    energy: float
    evaluations: int | None = None
    scf_steps: int | None = None
    seconds: float | None = None


@dataclass(frozen=True)
class Score:
    """How well the best `k` do over all pairs of the reference.

    Attributes:
        k: how many single points a pair.
        success: share of pairs that succeed.
        much_better: share of pairs more than the threshold below the reference.
        missing: single points that are not computed yet or did not converge.
        speedup_evaluations: reference's evaluations over ours, if known.
        speedup_scf_steps: the same of electronic steps, if known.
        speedup_seconds: the same of seconds, if known.
    """

    k: int
    success: float
    much_better: float
    missing: int
    speedup_evaluations: float | None
    speedup_scf_steps: float | None
    speedup_seconds: float | None


@dataclass(frozen=True)
class RunScore:
    """Scores of one folder of relaxations.

    Attributes:
        name: of the folder.
        device: ``GPU`` or ``CPU``.
        seconds: of the device per relaxation, mean over all placements.
        scores: for k = 1, 2, ...
    """

    name: str
    device: str
    seconds: float
    scores: tuple[Score, ...]

    @property
    def success(self) -> float:
        """Success rate, mean over k, as in figure 5 of EquiformerV2's paper."""
        return float(np.mean([score.success for score in self.scores]))


def score(
    reference: Mapping[str, Reference],
    best: Mapping[str, Sequence[SinglePoint | None]],
    k: int,
    threshold: float = THRESHOLD,
) -> Score:
    """Score the best `k` of each pair.

    Args:
        reference: of each pair.
        best: single points of each pair, best predicted energy first; None where one is missing.
        k: how many of these count.
        threshold: a success is at most so much above the reference, in eV.
    """
    success = much_better = missing = 0
    computed: list[SinglePoint] = []
    for pair, known in reference.items():
        points = best.get(pair, ())[:k]
        missing += sum(point is None or point.energy is None for point in points)
        computed += [point for point in points if point is not None]
        lowest = min(
            (point.energy for point in points if point is not None and point.energy is not None),
            default=np.inf,
        )
        success += lowest - known.energy <= threshold
        much_better += lowest - known.energy < -threshold

    def speedup(cost: str) -> float | None:
        return _ratio(
            [getattr(known, cost) for known in reference.values()],
            [getattr(point, cost) for point in computed],
        )

    return Score(
        k,
        success / len(reference),
        much_better / len(reference),
        missing,
        speedup("evaluations"),
        speedup("scf_steps"),
        speedup("seconds"),
    )


def score_run(
    run: Path, reference: Mapping[str, Reference], largest_k: int, threshold: float = THRESHOLD
) -> RunScore:
    """Score the single points of a folder for k = 1 to `largest_k`.

    Raises:
        InputError: if it has no ranking, or no pair in common with the reference.
    """
    pairs = read_ranking(run)
    if not pairs.keys() & reference.keys():
        raise InputError(
            f"{run} has no pair of the reference: {next(iter(pairs))!r}, ... "
            f"against {next(iter(reference))!r}, ..."
        )
    best = {
        name: [read_single_point(run, name, one.name) for one in pair.best(largest_k)]
        for name, pair in pairs.items()
    }
    seconds = [one.seconds for pair in pairs.values() for one in pair.candidates]
    return RunScore(
        run.name,
        read_settings(run).device,
        float(np.mean(seconds)),
        tuple(score(reference, best, k, threshold) for k in range(1, largest_k + 1)),
    )


def read_reference(path: Path) -> dict[str, Reference]:
    """Read a reference: a folder relaxed and ranked by a calculator, or a JSON file.

    The file maps the name of each pair to the fields of `Reference`; only `energy` is required, in
    eV on the scale of the single points.

    Raises:
        InputError: if it is neither, or holds no pair.
    """
    if path.is_dir():
        reference = {
            name: known
            for name, pair in read_ranking(path).items()
            if (known := _reference(pair)) is not None
        }
    else:
        try:
            reference = {
                name: Reference(**fields) for name, fields in read_json(path, "rank").items()
            }
        except (AttributeError, TypeError) as error:
            raise InputError(
                f"{path}: each pair needs `energy`, and may have `evaluations`, `scf_steps` and "
                f"`seconds` ({error})"
            ) from error
    if not reference:
        raise InputError(f"--reference: {path} has no pair with a valid placement")
    return reference


def _reference(pair: Pair) -> Reference | None:
    """Best and cost of a pair whose placements were all relaxed by a calculator."""
    best = pair.best(1)
    if not best:
        return None
    counts = [one.evaluations for one in pair.candidates]
    return Reference(
        best[0].energy,
        None if None in counts else sum(count for count in counts if count is not None),
        seconds=sum(one.seconds for one in pair.candidates),
    )


def _ratio(ours: Iterable[float | None], theirs: Iterable[float | None]) -> float | None:
    above, below = list(ours), list(theirs)
    if None in above or None in below or not sum(filter(None, below)):
        return None
    return float(sum(filter(None, above)) / sum(filter(None, below)))


def table(runs: Sequence[RunScore], pairs: int, threshold: float) -> str:
    """The scores in Markdown, one table a run."""
    blocks = []
    for run in runs:
        title = (
            f"{run.name}: {pairs} pairs, {run.seconds:.2f} {run.device}-seconds per relaxation, "
            f"success (within {threshold:g} eV) {_percent(run.success)} on average over k"
        )
        lines = [
            title,
            "",
            "| k | success | much better | missing | speed-up: evaluations | SCF steps | seconds |",
            "|---:|---:|---:|---:|---:|---:|---:|",
        ]
        lines += [
            f"| {one.k} | {_percent(one.success)} | {_percent(one.much_better)} | {one.missing} | "
            f"{_times(one.speedup_evaluations)} | {_times(one.speedup_scf_steps)} | "
            f"{_times(one.speedup_seconds)} |"
            for one in run.scores
        ]
        blocks.append("\n".join(lines))
    return "\n\n".join(blocks)


def to_json(
    runs: Sequence[RunScore], reference: Mapping[str, Reference], threshold: float
) -> dict[str, object]:
    """All scores and the reference, for other programs."""
    return {
        "threshold": threshold,
        "runs": [asdict(run) | {"mean_success": run.success} for run in runs],
        "reference": {name: asdict(known) for name, known in reference.items()},
    }


def plot(runs: Sequence[RunScore], path: Path) -> None:
    """Draw success against seconds per relaxation: a bar over k, a point at the mean."""
    import matplotlib as mpl  # noqa: PLC0415  # only here

    mpl.use("Agg")
    from matplotlib import pyplot as plt  # noqa: PLC0415

    figure, axis = plt.subplots(figsize=(5.6, 3.8), layout="constrained")
    for index, run in enumerate(runs):
        colour = f"C{index}"
        rates = [100 * one.success for one in run.scores]
        axis.plot([run.seconds] * len(rates), rates, "_-", color=colour, alpha=0.6, markersize=10)
        for height in sorted(set(rates)):
            ks = [one.k for one in run.scores if 100 * one.success == height]
            text = f"k = {ks[0]}" if len(ks) == 1 else f"k = {ks[0]} to {ks[-1]}"
            axis.annotate(
                text, (run.seconds, height), (6, -3), textcoords="offset points", fontsize=8
            )
        axis.plot(
            run.seconds, 100 * run.success, "o", color=colour, label=f"{run.name} ({run.device})"
        )
    devices = " or ".join(sorted({f"{run.device}-seconds" for run in runs}))
    axis.set_xscale("log", subs=(2, 5))
    axis.set(
        xlabel=f"{devices} per relaxation",
        ylabel="success rate (%)",
        ylim=(-5, 105),
    )
    axis.margins(x=0.25)  # room for what stands beside the points
    axis.xaxis.set_major_formatter("{x:g}")
    axis.xaxis.set_minor_formatter("{x:g}")
    axis.grid(alpha=0.25)
    axis.legend(frameon=False, title="mean over k")
    with replacing(path) as partial:
        figure.savefig(partial, format=path.suffix[1:], dpi=160)
    plt.close(figure)


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def _times(ratio: float | None) -> str:
    return "-" if ratio is None else f"{ratio:,.3g}"
