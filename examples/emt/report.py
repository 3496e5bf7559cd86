"""Score a run of the demo against EMT's labels: a table and two pictures."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib as mpl
import numpy as np
import numpy.typing as npt
from ase.calculators.emt import EMT
from fairchem.core.datasets import LmdbDataset
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from fairchem_equiformer.leaderboard import metrics

mpl.use("Agg")
from matplotlib import pyplot as plt

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from torch_geometric.data import Data

Array = npt.NDArray[np.float64]

COLOURS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7")  # Okabe and Ito's, for every eye
STYLE: dict[Any, Any] = {
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "legend.frameon": False,
    "figure.constrained_layout.use": True,
    "savefig.dpi": 160,
}


@dataclass(frozen=True)
class Labels:
    """Energies [n] in eV and forces on free atoms [m, 3] in eV/Angstrom of a test set."""

    energy: Array
    forces: Array


@dataclass(frozen=True)
class Errors:
    """Mean absolute errors: energy in eV, force components of free atoms in eV/Angstrom."""

    energy: float
    forces: float


def read_dataset(folder: Path) -> list[Data]:
    """Read an LMDB dataset as fairchem does."""
    dataset = LmdbDataset({"src": str(folder)})
    return [dataset[index] for index in range(len(dataset))]


def labels(examples: Iterable[Data]) -> Labels:
    """Join the labels of S2EF examples."""
    examples = list(examples)
    return Labels(
        np.array([data.energy for data in examples]),
        np.concatenate([data.forces[data.fixed == 0].numpy() for data in examples]),
    )


def predictions(path: Path, examples: Sequence[Data]) -> Labels:
    """Read S2EF predictions in the order of the examples."""
    with np.load(path) as file:
        rows = {name: row for row, name in enumerate(file["ids"].tolist())}
        energy = file["energy"].reshape(len(rows)).astype(np.float64)
        forces = np.split(file["forces"].astype(np.float64), file["chunk_idx"])
    order = [rows[f"{data.sid}_{data.fid}"] for data in examples]
    return Labels(energy[order], np.concatenate([forces[row] for row in order]))


def constant(train: Labels, test: Labels) -> Labels:
    """Predict the training set's mean energy and mean force everywhere."""
    return Labels(
        np.full_like(test.energy, train.energy.mean()),
        np.broadcast_to(train.forces.mean(axis=0), test.forces.shape),
    )


def errors(predicted: Labels, true: Labels) -> Errors:
    """Compare predictions with labels."""
    return Errors(
        float(np.abs(predicted.energy - true.energy).mean()),
        float(np.abs(predicted.forces - true.forces).mean()),
    )


@dataclass(frozen=True)
class Score:
    """Errors on one set of structures: of the constant predictor and of the model."""

    name: str
    constant: Errors
    trained: Errors

    @property
    def better(self) -> float:
        """How many times smaller than the constant predictor's the force error is."""
        return self.constant.forces / self.trained.forces


@dataclass(frozen=True)
class RelaxationErrors:
    """Of relaxations with the model against those with EMT, over a test set.

    Attributes:
        score: what the leaderboards show: AFbT, ADwT and the error of the relaxed energy.
        constant: mean error in eV of the mean relaxed energy of the training set, for comparison.
        distance: mean distance of free atoms from EMT's relaxed structure in Angstrom.
        start: the same for the initial structures.
        start_adwt: ADwT of the initial structures.
    """

    score: metrics.Score
    constant: float
    distance: float
    start: float
    start_adwt: float


def relaxation_errors(
    trajectories: Path, examples: Sequence[Data], train: Sequence[Data]
) -> RelaxationErrors:
    """Compare the last frames of ``<sid>.traj`` with the relaxed structures of IS2RE examples."""
    relaxed = metrics.examine(trajectories, examples, EMT())
    mean = np.mean([data.energy_relaxed for data in train])
    start = []
    for data in examples:
        pos, target, cell = (x.double().numpy() for x in (data.pos, data.pos_relaxed, data.cell))
        start.append(metrics.distances(pos, target, cell[0])[data.fixed.numpy() == 0].mean())
    return RelaxationErrors(
        metrics.score(relaxed),
        constant=float(np.mean([abs(mean - data.energy_relaxed) for data in examples])),
        distance=float(np.mean([one.distance for one in relaxed])),
        start=float(np.mean(start)),
        start_adwt=metrics.average_within(start, metrics.DISTANCES),
    )


def score_table(scores: Iterable[Score]) -> str:
    """Tabulate the errors of energies and forces."""
    rows = []
    for score in scores:
        columns = (score.constant, score.trained)
        forces = [f"{1e3 * errors.forces:.0f}" for errors in columns]
        energy = [f"{1e3 * errors.energy:.0f}" for errors in columns]
        rows.append([score.name, *forces, f"{score.better:.1f} x", *energy])
    title = "Mean absolute errors on unseen structures: F, forces in meV/Å; E, energies in meV\n"
    header = ["", "F constant", "trained", "better", "E constant", "trained"]
    return title + _table(header, rows)


def relaxation_table(relaxed: Mapping[str, RelaxationErrors]) -> str:
    """Tabulate how relaxations with the model end."""
    rows = []
    for name, errors in relaxed.items():
        afbt = "-" if errors.score.afbt is None else f"{100 * errors.score.afbt:.0f}"
        energies = [f"{1e3 * value:.0f}" for value in (errors.constant, errors.score.energy_mae)]
        lengths = [f"{value:.2f}" for value in (errors.start, errors.distance)]
        shares = [f"{100 * value:.0f}" for value in (errors.start_adwt, errors.score.adwt)]
        rows.append([name, *energies, *lengths, *shares, afbt])
    title = (
        "Relaxations: E, MAE of the relaxed energy in meV; d, distance in Å from EMT's structure;\n"
        "ADwT, AFbT: structures in % with small distances and EMT forces (docs/leaderboards.md)\n"
    )
    header = ["", "E constant", "relaxed", "d initial", "relaxed", "ADwT initial", "relaxed"]
    return title + _table([*header, "AFbT"], rows)


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Align columns: the first to the left, numbers to the right."""
    widths = [max(len(row[column]) for row in (header, *rows)) for column in range(len(header))]
    lines = [
        "  ".join(
            cell.ljust(width) if column == 0 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in (header, *rows)
    ]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def plot_learning_curve(logs: Path, constants: Errors, path: Path) -> None:
    """Draw force and energy errors of training and validation against the step.

    Args:
        logs: folder of the TensorBoard events that fairchem wrote.
        constants: errors of the constant predictor on the validation set.
        path: the picture to write.
    """
    events = EventAccumulator(str(logs), size_guidance={"scalars": 0})
    events.Reload()
    panels = (
        ("forces_mae", "force MAE (meV/Å)", constants.forces),
        ("energy_mae", "energy MAE (meV)", constants.energy),
    )
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(1, 2, figsize=(9, 3.6))
        for axis, (metric, name, level) in zip(axes, panels, strict=True):
            train = events.Scalars(f"train/{metric}")
            val = events.Scalars(f"val/{metric}")
            axis.plot(*_curve(train), color="0.7", linewidth=0.8, label="training batches")
            axis.plot(*_curve(val), "o-", color=COLOURS[0], markersize=4, label="validation (EMA)")
            axis.axhline(1e3 * level, color=COLOURS[1], linestyle="--", label="constant predictor")
            axis.set(xlabel="step", ylabel=name, yscale="log")
            axis.yaxis.set_major_formatter("{x:.0f}")
            axis.yaxis.set_minor_formatter("{x:.0f}")
        axes[0].legend()
        _save(figure, path)


def _curve(scalars: Iterable[Any]) -> tuple[list[int], list[float]]:
    return [point.step for point in scalars], [1e3 * point.value for point in scalars]


def plot_parity(results: Mapping[str, tuple[Labels, Labels]], path: Path) -> None:
    """Draw predictions against labels.

    Args:
        results: of each test set, predictions and labels.
        path: the picture to write.
    """
    panels = (
        ("energy", "adsorption energy (eV)", "meV"),
        ("forces", "force component (eV/Å)", "meV/Å"),
    )
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(1, 2, figsize=(9, 4.4))
        for axis, (field, name, unit) in zip(axes, panels, strict=True):
            for colour, (split, (predicted, true)) in zip(COLOURS, results.items(), strict=False):
                x, y = getattr(true, field).ravel(), getattr(predicted, field).ravel()
                label = f"{split}, MAE {1e3 * np.abs(x - y).mean():.0f} {unit}"
                axis.plot(x, y, ".", color=colour, markersize=4, alpha=0.5, label=label)
            ends = axis.get_xlim()
            axis.plot(ends, ends, color="0.3", linewidth=0.8, zorder=0)
            axis.set(xlabel=f"EMT {name}", ylabel="EquiformerV2", aspect="equal")
            axis.legend(fontsize=8, markerscale=2)
        _save(figure, path)


def _save(figure: plt.Figure, path: Path) -> None:
    unfinished = path.with_suffix(f".partial{path.suffix}")
    figure.savefig(unfinished)
    plt.close(figure)
    unfinished.replace(path)
