"""Another commit of this project to compare with, and whether this one is the worse."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from fairchem_equiformer.ops.native.sources import fingerprint

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).parents[1]
NATIVE = Path("fairchem_equiformer/ops/native")
KERNELS = NATIVE / "_kernels.so"

# How many times as much is not yet worse. What is counted does not vary.
LIMITS = {"seconds": 1.05, "peak_bytes": 1.05, "flop": 1.0, "saved_bytes": 1.0, "regions": 1.0}
# What is measured varies between rounds.
MEASURED = ("seconds", "peak_bytes")

Record = dict[str, Any]


@contextmanager
def checked_out(ref: str) -> Iterator[Path]:
    """Give a folder with the package of a commit, its kernels, and the benchmarks of this tree.

    Raises:
        SystemExit: git has no such commit, or its kernels cannot be built.
    """
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder) / "base"
        command(["git", "worktree", "add", "--quiet", "--detach", tree, ref], ROOT)
        try:
            with_kernels(tree)
            shutil.rmtree(tree / "benchmarks", ignore_errors=True)
            (tree / "benchmarks").symlink_to(ROOT / "benchmarks")
            yield tree
        finally:
            command(["git", "worktree", "remove", "--force", tree], ROOT)


def with_kernels(tree: Path) -> None:
    """Copy this tree's compiled kernels to another, or build those of other sources there.

    Where there are none here, or none to build there, each runs without.
    """
    sources = fingerprint(tree / NATIVE)
    if sources is None or not (ROOT / KERNELS).exists():
        return
    if sources == fingerprint(ROOT / NATIVE):
        for library in (ROOT / NATIVE).glob("_kernels*.so"):
            shutil.copy(library, tree / NATIVE)
        return
    print("building the kernels of the other commit (minutes)", file=sys.stderr)
    command([sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"], tree)
    if not (tree / KERNELS).exists():
        raise SystemExit(f"the kernels of {tree} were not built")


def command(arguments: list[str | Path], folder: Path) -> None:
    """Run a command, and end with what it said where it fails."""
    done = subprocess.run(arguments, cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        said = (done.stderr or done.stdout)[-4000:].strip()
        raise SystemExit(f"{' '.join(map(str, arguments))}:\n{said}")


def spread(rounds: list[float]) -> float:
    """Return the largest of some rounds over the smallest, less one."""
    return max(rounds) / max(min(rounds), 1e-9) - 1


def judged(base: Record, new: Record) -> tuple[list[str], list[str]]:
    """Compare two records of one row.

    Of what is measured, the median of the rounds' medians counts. Where the base's own rounds
    differ by more than the limit, nothing can be said.

    Returns:
        A sentence for each figure that got worse, and for each that could not be judged.
    """
    if "failure" in base:
        return [], [f"the base: {base['failure']}"]
    if "failure" in new:
        return [new["failure"]], []
    worse, unsure = [], []
    for name, limit in LIMITS.items():
        before, now = (
            median(record["rounds"][name]) if name in MEASURED else record.get(name)
            for record in (base, new)
        )
        if before is None or now is None:  # as regions without a C compiler
            continue
        said = f"{name} from {before:,.4g} to {now:,.4g}, {now / max(before, 1e-9) - 1:+.1%}"
        if name in MEASURED:
            noise = spread(base["rounds"][name])
            said += f" (the base's own rounds spread by {noise:.1%})"
            if noise > limit - 1:
                unsure.append(said)
                continue
        if now > limit * before:
            worse.append(said)
    return worse, unsure
