"""One way to relax all slabs of a file, in a process of its own: see benchmarks/relaxations.py.

``python -m benchmarks.relax_by WAY SETTINGS.json`` prints its :class:`Result` as JSON. A way
imports what it needs and nothing else, since no environment has all of it.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ase.io
import numpy as np
import torch

if TYPE_CHECKING:
    from ase import Atoms

# Of OC20's configs: first guess of the curvature in eV/Angstrom^2, longest step in Angstrom.
ALPHA, LONGEST_STEP = 70.0, 0.04


@dataclass(frozen=True)
class Settings:
    """What all ways have in common.

    Attributes:
        slabs: file of ASE with the structures and their fixed atoms.
        checkpoint: of the model.
        fmax: largest force in eV/Angstrom at which a relaxation ends.
        steps: at most so many.
        batch: structures at a time, where there is more than one.
        threads: of PyTorch.
    """

    slabs: str
    checkpoint: str
    fmax: float
    steps: int
    batch: int
    threads: int


@dataclass
class Result:
    """What a way took.

    Attributes:
        calls: of the model, whatever the size of the batch.
        evaluations: structures in all these calls.
        seconds: of the relaxations alone.
        energies: of the relaxed slabs in eV.
        converged: of the slabs, whether no force on a free atom is above `fmax`.
    """

    calls: int = 0
    evaluations: int = 0
    seconds: float = 0.0
    energies: list[float] = field(default_factory=list)
    converged: list[bool] = field(default_factory=list)

    def add(self, batch: Any) -> None:
        """Count one call of the model."""
        self.calls += 1
        self.evaluations += len(batch.natoms)

    @contextmanager
    def timed(self) -> Iterator[None]:
        """Count and time what is done within; what came before was to warm up."""
        self.calls = self.evaluations = 0
        start = time.perf_counter()
        yield
        self.seconds = time.perf_counter() - start

    def end(self, energy: float, forces: Any, slab: Atoms, fmax: float) -> None:
        """Note how the relaxation of one slab ended."""
        sizes = np.linalg.norm(np.asarray(forces)[free_atoms(slab)], axis=1)
        self.energies.append(float(energy))
        self.converged.append(bool(sizes.max() <= fmax))


def free_atoms(slab: Atoms) -> Any:
    """Whether each atom may move: [N] bool."""
    free = np.ones(len(slab), dtype=bool)
    free[slab.constraints[0].index] = False
    return free


def by_ase(settings: Settings, slabs: list[Atoms], result: Result) -> None:
    """One after the other: EquiformerCalculator and ASE's LBFGS."""
    from ase.optimize import LBFGS  # noqa: PLC0415

    from fairchem_equiformer import EquiformerCalculator  # noqa: PLC0415

    _count_frozen(result)
    calculator = EquiformerCalculator(settings.checkpoint, device="cpu")
    calculator.get_potential_energy(slabs[0])
    calculator.reset()
    with result.timed():
        for slab in slabs:
            slab.calc = calculator
            optimizer = LBFGS(slab, logfile=None, maxstep=LONGEST_STEP, memory=50, alpha=ALPHA)
            optimizer.run(fmax=settings.fmax, steps=settings.steps)
            forces = slab.get_forces(apply_constraint=False)
            result.end(slab.get_potential_energy(), forces, slab, settings.fmax)


def by_fairchem(settings: Settings, slabs: list[Atoms], result: Result) -> None:
    """In batches that wait for their slowest: fairchem-core 1.10's LBFGS, as in OC20's configs."""
    from fairchem_equiformer.adsorbml import batches, relaxation  # noqa: PLC0415

    common = relaxation.Settings(settings.checkpoint, "CPU", settings.steps, settings.fmax)
    relaxer = batches.ModelRelaxer(Path(settings.checkpoint), None, common)
    relaxer._trainer.model.register_forward_pre_hook(  # noqa: SLF001
        lambda _, inputs: result.add(inputs[0])
    )
    with result.timed():
        relaxed = [
            one
            for start in range(0, len(slabs), settings.batch)
            for one in relaxer(slabs[start : start + settings.batch])
        ]
    for one, slab in zip(relaxed, slabs, strict=True):
        forces = one.atoms.get_forces(apply_constraint=False)
        result.end(one.atoms.get_potential_energy(), forces, slab, settings.fmax)


def by_torch_sim(
    name: str, options: dict[str, Any]
) -> Callable[[Settings, list[Atoms], Result], None]:
    """Swapped in flight: torch-sim's optimizer of this name, as many structures at a time."""

    def relax(settings: Settings, slabs: list[Atoms], result: Result) -> None:
        import torch_sim  # noqa: PLC0415
        from torch_sim.autobatching import InFlightAutoBatcher  # noqa: PLC0415
        from torch_sim.constraints import FixAtoms  # noqa: PLC0415  # not in torch-sim 0.3

        from fairchem_equiformer.torch_sim import EquiformerModel  # noqa: PLC0415

        _count_frozen(result)
        model = EquiformerModel(settings.checkpoint, device="cpu")
        first = np.cumsum([0, *map(len, slabs[:-1])])
        fixed = [
            slab.constraints[0].index + start for slab, start in zip(slabs, first, strict=True)
        ]
        state = torch_sim.io.atoms_to_state(slabs, model.device, model.dtype)
        state.constraints = [FixAtoms(atom_idx=torch.as_tensor(np.concatenate(fixed)))]
        model(state[[0]])
        atoms_at_once = settings.batch * max(map(len, slabs))
        with result.timed():
            relaxed = torch_sim.optimize(
                state,
                model,
                optimizer=torch_sim.Optimizer[name],
                init_kwargs=options,
                convergence_fn=torch_sim.generate_force_convergence_fn(force_tol=settings.fmax),
                autobatcher=InFlightAutoBatcher(
                    model, memory_scales_with="n_atoms", max_memory_scaler=atoms_at_once
                ),
                max_steps=settings.steps,
                steps_between_swaps=1,
                max_step=LONGEST_STEP,
            )
        forces = relaxed.forces.split([len(slab) for slab in slabs])
        for energy, force, slab in zip(relaxed.energy, forces, slabs, strict=True):
            result.end(energy, force, slab, settings.fmax)

    return relax


WAYS = {
    "ASE, one by one": by_ase,
    "fairchem-core 1.10, batches": by_fairchem,
    "torch-sim, LBFGS": by_torch_sim("lbfgs", {"alpha": ALPHA}),
    "torch-sim, FIRE": by_torch_sim("fire", {}),
}


def _count_frozen(result: Result) -> None:
    """Count the calls of calculator and torch-sim model."""
    from fairchem_equiformer.checkpoints.frozen import FrozenPotential  # noqa: PLC0415

    predict = FrozenPotential.__call__

    def counted(self: FrozenPotential, batch: Any) -> Any:
        result.add(batch)
        return predict(self, batch)

    FrozenPotential.__call__ = counted  # type: ignore[method-assign]


def main() -> None:
    """Relax, and print the result."""
    way, file = sys.argv[1:]
    settings = Settings(**json.loads(Path(file).read_text()))
    torch.set_num_threads(settings.threads)
    result = Result()
    WAYS[way](settings, ase.io.read(settings.slabs, ":"), result)
    print(json.dumps(asdict(result)))


if __name__ == "__main__":
    main()
