"""How well molecular dynamics with a trained model keeps its energy: ``python -m benchmarks.nve``.

Trains a small Equiformer on frames of an elastic molecule (``benchmarks.molecule``) by `fairchem
main` with a config of MD17, once with forces that are the energy's gradient and once with forces
from a head of their own. Then runs velocity Verlet at constant energy with each, in float64, and
prints a table: how fast the total energy drifts, and how much it fluctuates, by step size.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
from ase import units
from ase.md.verlet import VelocityVerlet

from benchmarks import molecule
from fairchem_equiformer.calculator import EquiformerCalculator

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ase import Atoms

Array = npt.NDArray[np.float64]

ROOT = Path(__file__).parents[1]
CONFIG = ROOT / "configs" / "md17" / "lmax_2" / "ethanol.yml"
KELVIN = 300.0
# The architecture of the config, at a size that trains in minutes on two cores.
OPTIONS = (
    "--model.num_layers=1",
    "--model.irreps_node_embedding=32x0e+16x1e+8x2e",
    "--model.irreps_head=8x0e+4x1e+2x2e",
    "--model.irreps_mlp_mid=64x0e+32x1e+16x2e",
    "--model.irreps_feature=64x0e",
    "--model.edge_channels=32",
    "--optim.num_workers=0",
    "--optim.lr_initial=0.005",
    "--optim.scheduler_params.warmup_epochs=1",
    "--dataset.train.num_train=400",
    "--dataset.train.num_val=50",
)
FRAMES = 500
FORCES = {"gradient of the energy": False, "head of their own": True}  # model.direct_forces


@dataclass(frozen=True)
class Motion:
    """Energies of one run at constant energy.

    Attributes:
        femtoseconds: of a step.
        total: potential and kinetic energy [steps + 1] in eV, before the first step and after each.
        atoms: how many there are.
    """

    femtoseconds: float
    total: Array
    atoms: int

    @property
    def drift(self) -> float:
        """Slope of the total energy in meV per atom and picosecond: a line through all steps."""
        picoseconds = np.arange(len(self.total)) * self.femtoseconds / 1000
        slope = np.polyfit(picoseconds, self.total, 1)[0]
        return float(1000 * slope / self.atoms)

    @property
    def fluctuation(self) -> float:
        """Root mean square distance of the total energy from that line, in meV per atom."""
        steps = np.arange(len(self.total))
        rest = self.total - np.polyval(np.polyfit(steps, self.total, 1), steps)
        return float(1000 * np.sqrt((rest**2).mean()) / self.atoms)

    @property
    def change(self) -> float:
        """From the first tenth of the run to the last, in meV per atom."""
        tenth = max(len(self.total) // 10, 1)
        change = self.total[-tenth:].mean() - self.total[:tenth].mean()
        return float(1000 * change / self.atoms)


def move(atoms: Atoms, steps: int, femtoseconds: float, *, kelvin: float = KELVIN) -> Motion:
    """Run velocity Verlet from velocities of a temperature, the same at each call.

    Args:
        atoms: with a calculator; they move.
        steps: of the run.
        femtoseconds: of a step.
        kelvin: temperature of the velocities at first. Half of it goes into vibrations.
    """
    molecule.heat(atoms, kelvin, seed=0)
    dynamics = VelocityVerlet(atoms, femtoseconds * units.fs)
    total = [atoms.get_total_energy()]
    dynamics.attach(lambda: total.append(atoms.get_total_energy()))
    dynamics.run(steps)
    return Motion(femtoseconds, np.array(total[-steps - 1 :]), len(atoms))


def train(folder: Path, *options: str) -> Path:
    """Train on frames of the molecule by `fairchem main`.

    Args:
        folder: for data and results.
        options: further overrides of the config.

    Returns:
        The checkpoint.

    Raises:
        RuntimeError: if the training failed; says where its output is.
    """
    data = folder / "md17"
    if not (data / "md17_ethanol.npz").exists():
        molecule.write(data / "md17_ethanol.npz", molecule.frames(molecule.elastic(), FRAMES))
    name = f"run-{len(list(folder.glob('*.log')))}"
    command = [sys.executable, "-m", "fairchem_equiformer", "main", "--mode", "train", "--cpu"]
    command += ["--config-yml", str(CONFIG), "--run-dir", str(folder), "--timestamp-id", name]
    command += [f"--dataset.{split}.src={data}" for split in ("train", "val")]
    log = folder / f"{name}.log"
    with log.open("w") as file:
        done = subprocess.run(
            [*command, "--seed", "0", *OPTIONS, *options],
            cwd=ROOT,
            env=os.environ,
            stdout=file,
            stderr=subprocess.STDOUT,
            check=False,
        )
    if done.returncode != 0:
        raise RuntimeError(f"training failed, see {log}")
    return folder / "checkpoints" / name / "best_checkpoint.pt"


def force_error(calculator: EquiformerCalculator, frames: int = 50) -> float:
    """Mean absolute error on frames that were not trained on, in meV/Angstrom."""
    arrays = molecule.frames(molecule.elastic(), frames, seed=1)
    atoms = molecule.elastic()
    atoms.calc = calculator
    errors = []
    for positions, forces in zip(arrays["R"], arrays["F"], strict=True):
        atoms.positions = positions
        errors.append(np.abs(atoms.get_forces() - forces * molecule.KCAL_PER_MOL).mean())
    return float(1000 * np.mean(errors))


def compare(folder: Path, steps: int, sizes: Sequence[float], epochs: int) -> str:
    """Train both models, run all step sizes, and return the table."""
    header = "| forces | MAE, meV/Å | step, fs | time, ps | drift, meV/atom/ps | fluctuation, "
    lines = [f"{header}meV/atom |", "|---|---:|---:|---:|---:|---:|"]
    for name, direct in FORCES.items():
        options = (f"--optim.max_epochs={epochs}", f"--model.direct_forces={direct}")
        print(f"training: forces are the {name}", file=sys.stderr, flush=True)
        calculator = EquiformerCalculator(train(folder, *options), dtype="float64", device="cpu")
        error = force_error(calculator)
        for femtoseconds in sizes:
            start = time.monotonic()
            atoms = molecule.elastic()
            atoms.calc = calculator
            motion = move(atoms, steps, femtoseconds)
            seconds = time.monotonic() - start
            print(f"{steps} steps of {femtoseconds} fs: {seconds:.0f} s", file=sys.stderr)
            lines.append(
                f"| {name} | {error:.0f} | {femtoseconds} | {steps * femtoseconds / 1000:.1f} "
                f"| {motion.drift:+.4f} | {motion.fluctuation:.4f} |"
            )
    return "\n".join(lines)


def main() -> None:
    """Compare from the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=10_000, help="of each run")
    parser.add_argument("--sizes", type=float, nargs="+", default=[0.25, 0.5, 1.0], help="in fs")
    parser.add_argument("--epochs", type=int, default=30, help="of each training")
    parser.add_argument("--out", type=Path, help="keep data, checkpoints and logs in this folder")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.out or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        print(compare(folder.resolve(), args.steps, args.sizes, args.epochs))


if __name__ == "__main__":
    main()
