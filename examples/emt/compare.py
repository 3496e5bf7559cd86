"""Equiformer and EquiformerV2, with their ablations, trained in the same way: one table.

    python examples/emt/compare.py

Every model of ``versions.yml`` stands in the demo's config in place of its own and is trained on
the demo's data by `fairchem main`, two at a time. The table has errors on the four test sets
together, and below it stands what the publications found and whether it was found here. A run
that is stopped goes on where it was with ``--out`` and its folder.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean
from threading import Lock
from typing import TYPE_CHECKING, Any

import report
import run
import yaml
from fairchem.core.common.registry import registry

import fairchem_equiformer.fairchem1  # noqa: F401  # registers the models
from fairchem_equiformer.files import read_json, replacing, write_json

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

HERE = Path(__file__).resolve().parent
VERSIONS = HERE / "versions.yml"
SEEDS = (0, 1)
ECHO_SECONDS = 20.0  # between lines of progress of one training
# Of every training. A few steps show that all works; their errors mean nothing.
OPTIONS = ("--optim.max_epochs=3",)
SHORT_OPTIONS = ("--optim.max_epochs=1", "--dataset.train.train_split_settings.first_n=8")
START, END = "<!-- begin of the table -->", "<!-- end of the table -->"


@dataclass(frozen=True)
class Claim:
    """What a publication found: one model's error is below another's.

    Attributes:
        better: name of the one model in ``versions.yml``.
        worse: of the other.
        quantity: of which error, ``energy`` or ``forces``.
        published: the two errors, as printed.
        source: where.
    """

    better: str
    worse: str
    quantity: str
    published: tuple[str, str]
    source: str


POSTER = "poster, OC20 IS2RE, eV"
TABLE_1A = "EquiformerV2, Table 1a, S2EF-2M, meV/Å"
TABLE_6 = "EquiformerV2, Table 6, S2EF-2M, Lmax 2, meV/Å"
CLAIMS = (
    Claim("V1", "V1 linear messages", "energy", ("0.5489", "0.5555"), POSTER),
    Claim("V1 linear messages", "V1 dot product", "energy", ("0.5555", "0.5689"), POSTER),
    Claim("V2 gate, LN", "V2 gate, LN, no renorm", "energy", ("279", "286"), "Table 1a, meV"),
    Claim("V2 sep. S2, LN", "V2 gate, LN", "forces", ("20.77", "21.86"), TABLE_1A),
    Claim("V2", "V2 sep. S2, LN", "forces", ("20.46", "20.77"), TABLE_1A),
    Claim("V2", "V1", "forces", ("26.24", "27.57"), TABLE_6),
)


@dataclass(frozen=True)
class Result:
    """One training: errors on the test sets in eV and eV/Angstrom, and what it took."""

    model: str
    seed: int
    parameters: int
    energy: float
    forces: float
    seconds: float


@dataclass
class Comparison:
    """All trainings of a run: what they share, and how far they are."""

    folder: Path
    data: Path
    short: bool
    processes: int
    threads: int
    lock: Lock
    start: float
    done: int = 0
    count: int = 0

    @property
    def test_sets(self) -> Path:
        """Folder that holds the four test sets, see :func:`link_test_sets`."""
        return self.folder / "test_sets"

    def say(self, text: str) -> None:
        """Print a line with the minutes since the start and how many trainings are done."""
        minutes = (time.monotonic() - self.start) / 60
        with self.lock:
            print(f"{minutes:5.1f} min  {self.done:2d}/{self.count}  {text}", flush=True)


def read_versions(path: Path = VERSIONS) -> dict[str, dict[str, Any]]:
    """The `model` section of each entrant: its family's keys, and its own over them."""
    content = yaml.safe_load(path.read_text())
    families = content["families"] | {"V2": yaml.safe_load(run.CONFIG.read_text())["model"]}
    return {
        name: families[entrant["family"]] | entrant.get("changes", {})
        for name, entrant in content["models"].items()
    }


def parameters_of(model: Mapping[str, Any]) -> int:
    """How many parameters are trained."""
    keys = {key: value for key, value in model.items() if key != "name"}
    built = registry.get_model_class(model["name"])(**keys)
    return sum(p.numel() for p in built.parameters() if p.requires_grad)


def write_config(comparison: Comparison, name: str, model: Mapping[str, Any]) -> Path:
    """The demo's config with another model."""
    config = yaml.safe_load(run.CONFIG.read_text()) | {"model": dict(model)}
    path = comparison.folder / "configs" / f"{slug(name)}.yml"
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as unfinished:
        unfinished.write_text(yaml.safe_dump(config, sort_keys=False))
    return path


def slug(name: str) -> str:
    """A name that files can have."""
    return "-".join("".join(c if c.isalnum() else " " for c in name.lower()).split())


def train_and_test(
    comparison: Comparison, name: str, model: Mapping[str, Any], seed: int
) -> Result:
    """Train one model, and take its errors on the test sets.

    Raises:
        run.StepError: if a command failed; says where its output is.
    """
    path = comparison.folder / "results" / f"{slug(name)}-{seed}.json"
    if path.is_file():
        result = Result(**read_json(path, "compare.py"))
    else:
        config = write_config(comparison, name, model)
        label, start = f"{name}, seed {seed}", time.monotonic()
        identifier = f"{slug(name)}-{seed}"
        options = [*OPTIONS, *(SHORT_OPTIONS if comparison.short else ()), "--seed", str(seed)]
        options += [f"--dataset.train.src={comparison.data / 's2ef' / 'train'}"]
        options += [f"--dataset.val.src={comparison.data / 's2ef' / 'val_id'}"]
        fairchem(comparison, label, config, ("train", identifier, *options))
        seconds = time.monotonic() - start
        weights = comparison.folder / "checkpoints" / identifier / "best_checkpoint.pt"
        options = [f"--dataset.val.src={comparison.test_sets}", "--checkpoint", str(weights)]
        options += [f"--dataset.train.src={comparison.data / 's2ef' / 'train'}"]
        output = fairchem(comparison, label, config, ("validate", f"{identifier}-test", *options))
        errors = run.validation_errors(output)
        result = Result(name, seed, parameters_of(model), errors.energy, errors.forces, seconds)
        path.parent.mkdir(exist_ok=True)
        write_json(path, asdict(result))
    comparison.done += 1
    comparison.say(
        f"{name}, seed {seed}: forces {1e3 * result.forces:.1f} meV/Å, "
        f"energy {1e3 * result.energy:.0f} meV in {result.seconds:.0f} s of training"
    )
    return result


def link_test_sets(comparison: Comparison) -> None:
    """Put the four test sets into one folder, which all trainings are tested on."""
    comparison.test_sets.mkdir(parents=True, exist_ok=True)
    for index, split in enumerate(run.SPLITS):
        link = comparison.test_sets / f"data.{index:04d}.lmdb"
        if not link.is_symlink():
            link.symlink_to(comparison.data / "s2ef" / f"test_{split}" / "data.0000.lmdb")


def fairchem(comparison: Comparison, label: str, config: Path, call: tuple[str, ...]) -> str:
    """Run `fairchem main` with a mode, an id and options; show how far it is; return its output.

    Raises:
        run.StepError: it ended with an error.
    """
    mode, identifier, *options = call
    words = [sys.executable, "-m", "fairchem_equiformer", "main", "--mode", mode, "--cpu"]
    words += ["--config-yml", str(config), "--run-dir", str(comparison.folder)]
    words += ["--timestamp-id", identifier, *options]
    log = comparison.folder / "logs" / f"{identifier}.log"
    log.parent.mkdir(exist_ok=True)
    threads = {"OMP_NUM_THREADS": str(comparison.threads)}
    shown = 0.0
    with (
        log.open("w") as file,
        subprocess.Popen(
            words,
            cwd=run.ROOT,
            env=os.environ | threads,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
        ) as process,
    ):
        for line in process.stdout or ():
            file.write(line)
            text, _ = run.digest(line)
            if text and mode == "train" and time.monotonic() - shown > ECHO_SECONDS:
                shown = time.monotonic()
                comparison.say(f"{label}: {text}")
    output = log.read_text()
    if process.returncode != 0:
        tail = "\n".join(output.splitlines()[-15:])
        raise run.StepError(f"{label}: --mode {mode} failed; {log} ends with\n{tail}")
    return output


def table(results: Sequence[Result]) -> str:
    """Errors by model as a table of Markdown: mean over seeds and, behind ±, half their range."""
    lines = [
        "| model | parameters | forces, meV/Å | energy, meV | training, s |",
        "|---|---:|---:|---:|---:|",
    ]
    for name in Counter(result.model for result in results):
        mine = [result for result in results if result.model == name]
        forces, energy = (spread([getattr(r, key) for r in mine]) for key in ("forces", "energy"))
        lines.append(
            f"| {name} | {mine[0].parameters:,} | {1e3 * forces[0]:.1f} ± {1e3 * forces[1]:.1f} "
            f"| {1e3 * energy[0]:.0f} ± {1e3 * energy[1]:.0f} "
            f"| {mean(r.seconds for r in mine):.0f} |"
        )
    return "\n".join(lines)


def spread(values: Sequence[float]) -> tuple[float, float]:
    """Mean, and half of the range."""
    return mean(values), (max(values) - min(values)) / 2


def verdict(claim: Claim, results: Sequence[Result]) -> str:
    """Whether a claim was found here: `yes` or `no` where no seed of the one reaches the other."""
    better, worse = (
        [getattr(result, claim.quantity) for result in results if result.model == name]
        for name in (claim.better, claim.worse)
    )
    if max(better) < min(worse):
        return "yes"
    if min(better) > max(worse):
        return "no"
    return "undecided"


def claims_table(results: Sequence[Result]) -> str:
    """What the publications found, and whether it was found here, as a table of Markdown."""
    lines = [
        "| lower error | than | of | published | here | found |",
        "|---|---|---|---|---|---|",
    ]
    for claim in CLAIMS:
        here = [
            mean(getattr(r, claim.quantity) for r in results if r.model == name) * 1e3
            for name in (claim.better, claim.worse)
        ]
        lines.append(
            f"| {claim.better} | {claim.worse} | {claim.quantity} "
            f"| {' < '.join(claim.published)} ({claim.source}) "
            f"| {here[0]:.1f}, {here[1]:.1f} | {verdict(claim, results)} |"
        )
    return "\n".join(lines)


def constant_error(data: Path) -> report.Errors:
    """Of predicting the training set's means on the test sets, for comparison."""
    train = report.labels(report.read_dataset(data / "s2ef" / "train"))
    examples = [e for s in run.SPLITS for e in report.read_dataset(data / "s2ef" / f"test_{s}")]
    true = report.labels(examples)
    return report.errors(report.constant(train, true), true)


def summary(comparison: Comparison, results: Sequence[Result]) -> str:
    """Both tables, and what they were made with."""
    constant = constant_error(comparison.data)
    minutes = (time.monotonic() - comparison.start) / 60
    seeds = len({result.seed for result in results})
    return (
        f"{table(results)}\n\nMean absolute errors on the four test sets together; mean and half "
        f"the range of {seeds} training(s) each. The training set's means have "
        f"{1e3 * constant.forces:.0f} meV/Å and {1e3 * constant.energy:.0f} meV. All took "
        f"{minutes:.0f} minutes, {comparison.processes} trainings at a time on "
        f"{comparison.threads} thread(s) each.\n\n{claims_table(results)}\n"
    )


def write_into(document: Path, text: str) -> None:
    """Put a text between the two marks of a document.

    Raises:
        run.StepError: if the document does not have them.
    """
    before, mark, rest = document.read_text().partition(START)
    _, end, after = rest.partition(END)
    if not (mark and end):
        raise run.StepError(f"{document} has no lines {START} and {END}")
    with replacing(document) as unfinished:
        unfinished.write_text(f"{before}{START}\n{text}{END}{after}")


def compare(comparison: Comparison, seeds: Sequence[int]) -> str:
    """Train all, a few at a time, and return what came out of them.

    Raises:
        run.StepError: a training failed; the others that had begun are finished first.
    """
    models = read_versions()
    jobs = [(name, model, seed) for seed in seeds for name, model in models.items()]
    comparison.count = len(jobs)
    link_test_sets(comparison)
    with ThreadPoolExecutor(comparison.processes) as pool:
        futures = [pool.submit(train_and_test, comparison, *job) for job in jobs]
        try:
            results = [future.result() for future in futures]
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return summary(comparison, results)


def main() -> int:
    """Compare from the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--short", action="store_true", help="a few steps each: does all work?")
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS, help="trainings per model")
    parser.add_argument("--processes", type=int, default=2, help="trainings at a time")
    parser.add_argument("--threads", type=int, default=1, help="of each training")
    parser.add_argument("--out", type=Path, help="folder of this run; one that is there goes on")
    parser.add_argument("--document", type=Path, help="write the tables into it, too")
    args = parser.parse_args()
    runs = HERE / "runs"
    folder = (args.out or runs / time.strftime("versions-%Y-%m-%d-%H-%M-%S")).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    data = runs / "quick_data" if args.short else HERE / "data"
    comparison = Comparison(
        *(folder, data, args.short, args.processes, args.threads), Lock(), time.monotonic()
    )
    try:
        run.generate(run.Demo(folder, data, quick=args.short))
        text = compare(comparison, args.seeds[:1] if args.short else args.seeds)
        (folder / "summary.md").write_text(text)
        print(f"\n{text}\nwritten to {folder / 'summary.md'}")
        if args.document:
            write_into(args.document, text)
    except run.StepError as error:
        print(f"\ncompare-versions: error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
