"""Memory of a training, and of a relaxation, over thousands of steps: it stays where it was.

    python -m tests.long_runs --steps 2000

Each is a fork of this process, by the `fairchem` command and with a tiny model. The peak of the
resident set after the first tenth of the steps may not be more than 2% above that within it.
"""

from __future__ import annotations

import argparse
import functools
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fairchem.core.trainers import OCPTrainer

from fairchem_equiformer.fairchem1 import relaxation
from tests.ranks import command, prepare, relax_once, warm_up

if TYPE_CHECKING:
    from collections.abc import Callable

GROWTH = 0.02


def resident() -> int:
    """Bytes of this process in memory (Linux)."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096


def watch(owner: Any, method: str, file: Path) -> Callable[[], None]:
    """Let the resident set be noted after each call of a method."""
    original = getattr(owner, method)

    def watching() -> None:
        log = file.open("w", buffering=1)

        @functools.wraps(original)
        def watched(*args: Any, **settings: Any) -> Any:
            result = original(*args, **settings)
            log.write(f"{resident()}\n")
            return result

        setattr(owner, method, watched)

    return watching


def growth(file: Path, steps: int) -> float:
    """Of the peak after the first tenth of the steps over that within it."""
    sizes = [int(line) for line in file.read_text().splitlines()]
    assert len(sizes) >= steps, f"{len(sizes)} of {steps} steps: see {file.parent}"
    first = len(sizes) // 10
    grown = max(sizes[first:]) / max(sizes[:first]) - 1
    print(
        f"{file.stem}: {len(sizes)} steps, {max(sizes[:first]) / 1e6:.0f} MB in the first tenth, "
        f"{max(sizes[first:]) / 1e6:.0f} MB after it: {grown:+.2%}"
    )
    return grown


def main() -> None:
    """Run both."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--steps", type=int, default=2000)
    steps = parser.parse_args().steps
    warm_up()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        prepare(folder)
        training, relaxing = folder / "training.txt", folder / "relaxation.txt"
        epochs = f"--optim.max_epochs={-(-steps // 2)}"  # of two steps
        status = command(
            folder,
            "flat",
            "train",
            epochs,
            f"--optim.checkpoint_every={steps // 10}",
            "--optim.eval_every=1000000",
            "--print-every=100",
            before=watch(OCPTrainer, "_backward", training),
        )
        assert status == 0, (folder / "flat.train.log").read_text()[-3000:]
        found = [growth(training, steps)]
        longer = f"--task.relaxation_steps={steps}", "--task.relaxation_fmax=1e-30"
        few = "--optim.eval_batch_size=6"
        before = watch(relaxation.LBFGS, "step", relaxing)
        status = relax_once(folder, "long", *longer, few, before=before)
        assert status == 0, (folder / "long.run-relaxations.log").read_text()[-3000:]
        found.append(growth(relaxing, steps))
        assert max(found) <= GROWTH, found


if __name__ == "__main__":
    main()
