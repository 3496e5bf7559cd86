"""A step of the calculator against the model's forward pass: ``python -m benchmarks.calculator``.

The calculator gets the slab a little displaced each time, as in a relaxation; the two take turns.
The weights are random. Prints the median of each in seconds, and their ratio.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import torch
from fairchem.core.common.utils import load_config

from benchmarks.measure import slab
from fairchem_equiformer import EquiformerCalculator, checkpoints, models
from fairchem_equiformer.calculator import batch_of

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

CONFIG = Path(__file__).parents[1] / "configs/oc20/all_md/eqv2_31M.yml"


def write_checkpoint(config: Path, path: Path) -> None:
    """A checkpoint of the config's model as it begins."""
    torch.manual_seed(0)
    model = dict(load_config(config)[0]["model"])
    weights = models.EquiformerV2(**{key: model[key] for key in model if key != "name"})
    torch.save({"config": {"model": model}, "state_dict": weights.state_dict()}, path)


def seconds(call: Callable[[], Any]) -> float:
    """How long one call takes."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def main(arguments: Sequence[str] | None = None) -> tuple[float, float]:
    """Run the command; return seconds of forward pass and step."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", type=Path, default=CONFIG, help="default: 31M")
    parser.add_argument("--atoms", type=int, default=45, help="default: %(default)s")
    parser.add_argument("--repeat", type=int, default=9, help="default: %(default)s")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "checkpoint.pt"
        write_checkpoint(options.config, path)
        checkpoint = checkpoints.load(path)
    model = checkpoint.model().eval()
    atoms = slab(options.atoms)
    atoms.set_constraint()
    atoms.calc = EquiformerCalculator(checkpoint, device="cpu")

    batch = batch_of(atoms, torch.device("cpu"), torch.float32)

    def forward() -> None:
        with torch.no_grad():
            model(batch)

    def step() -> None:
        atoms.rattle(1e-3, seed=0)
        atoms.get_forces()

    step()
    times = [(seconds(step), seconds(forward)) for _ in range(options.repeat)]
    steps, forwards = (median(column) for column in zip(*times, strict=True))
    print(f"forward {forwards:.4f} s, step {steps:.4f} s, ratio {steps / forwards:.3f}")
    return forwards, steps


if __name__ == "__main__":
    main()
