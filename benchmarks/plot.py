"""Time and memory against the number of atoms: ``python -m benchmarks.plot results.jsonl``."""

from __future__ import annotations

import argparse
from collections import defaultdict
from pathlib import Path

import matplotlib as mpl

mpl.use("Agg")

import matplotlib.pyplot as plt

from benchmarks.table import model_of, read_ledger

COLORS = {
    "stock": "tab:gray",
    "ours": "tab:blue",
    "ours_bf16": "tab:pink",
    "escn": "tab:orange",
    "gemnet_oc": "tab:green",
    "esen": "tab:red",
    "uma_s": "tab:olive",
    "base": "tab:cyan",
    "equiformer": "tab:purple",
    "e3nn": "tab:brown",
}
MARKERS = {"inference": "o", "training": "s", "neighbors": "^", "relaxation": "v"}


def draw_scaling(ledger: Path, picture: Path) -> Path:
    """Draw what a ledger has of single structures of several sizes; of equal ones the newest.

    Args:
        ledger: File of JSON lines that :mod:`benchmarks.compare` wrote.
        picture: File to write, of a format that matplotlib knows by its suffix.

    Returns:
        ``picture``.
    """
    points: dict[tuple[str, str, str], dict[int, tuple[float, float]]] = defaultdict(dict)
    for record in read_ledger(ledger):
        if record["copies"] == 1 and "failure" not in record:
            curve = record["task"], model_of(record), record["implementation"]
            figures = record["seconds"], record["peak_bytes"] / 1e9
            points[curve][record["atoms"]] = figures

    figure, axes = plt.subplots(1, 2, figsize=(10, 4.2), layout="constrained")
    for (task, model, implementation), by_atoms in sorted(points.items()):
        atoms = sorted(by_atoms)
        if len(atoms) == 1:
            continue  # no curve; the table has it
        for axis, values in zip(axes, zip(*(by_atoms[n] for n in atoms), strict=True), strict=True):
            axis.plot(
                atoms,
                values,
                marker=MARKERS[task],
                color=COLORS[implementation],
                linestyle="-" if task == "inference" else "--",
                label=f"{implementation}, {model} {task}",
            )
    for axis, title in zip(axes, ("time of a call / s", "peak memory / GB"), strict=True):
        axis.set(xscale="log", yscale="log", xlabel="atoms", title=title)
        axis.grid(visible=True, which="both", alpha=0.2)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    partial = picture.with_stem(f".{picture.stem}")
    figure.savefig(partial, dpi=150)
    plt.close(figure)
    partial.rename(picture)
    return picture


def main() -> None:
    """Draw the ledger named on the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.plot", description=__doc__)
    parser.add_argument("ledger", type=Path)
    parser.add_argument("-o", "--picture", type=Path, default=Path("scaling.png"))
    options = parser.parse_args()
    print(draw_scaling(options.ledger, options.picture))


if __name__ == "__main__":
    main()
