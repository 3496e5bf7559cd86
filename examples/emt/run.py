"""The demo: data, training, validation, predictions, relaxations and EvalAI files, checked.

    python examples/emt/run.py

Every step is a command that can be run by hand, and is printed; its full output is in a log file.
All results of a run are in one folder below ``examples/emt/runs``. The data are made once.
"""

from __future__ import annotations

import argparse
import os
import re
import shlex
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import report
import torch

from fairchem_equiformer.leaderboard import split as results
from fairchem_equiformer.leaderboard.form import SPLITS as ALL_SPLITS

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
CONFIG = HERE / "eqv2_emt.yml"
SPLITS = ALL_SPLITS["OC20"]
LEADERBOARD = (sys.executable, "-m", "fairchem_equiformer.leaderboard")
GOAL = 3.0  # times better than the constant predictor, force MAE on unseen structures
LONG_OPTIONS = ("--optim.max_epochs=6", "--optim.batch_size=8", "--optim.lr_initial=0.004")
# No largest force is below 0, so every relaxation takes its three steps.
QUICK_OPTIONS = (
    "--optim.max_epochs=1",
    "--task.relaxation_steps=3",
    "--task.relaxation_fmax=0.0",
)
LEARNING_CURVE, PARITY = "learning_curve.png", "parity.png"
ECHO_SECONDS = 5.0  # between lines of progress, where they cannot overwrite each other


class StepError(Exception):
    """A step of the demo failed; the message says which, and where to look."""


@dataclass
class Demo:
    """One run: where it writes, and what its commands have in common."""

    folder: Path
    data: Path
    quick: bool = False
    long: bool = False
    seconds: dict[str, float] = field(default_factory=dict)

    def step(self, name: str, command: Sequence[str | Path]) -> str:
        """Run a command, show a digest of its output and return the whole output.

        Raises:
            StepError: it ended with an error.
        """
        words = [str(word) for word in command]
        log = self.folder / "logs" / f"{name}.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        print(f"\n== {name}\n{shlex.join(_readable(word) for word in words)}", flush=True)
        start = time.monotonic()
        status = _stream(words, log)
        self.seconds[name] = time.monotonic() - start
        output = log.read_text()
        if status != 0:
            tail = "\n".join(output.splitlines()[-15:])
            raise StepError(
                f"step `{name}` ended with status {status}\n  command: {shlex.join(words)}\n"
                f"  log:     {log}, which ends with\n{tail}"
            )
        return output

    def fairchem(self, name: str, mode: str, *options: str, weights: Path | None = None) -> str:
        """Run `fairchem main` on the demo's config; its results go to folders called `name`."""
        command: list[str | Path] = [*_fairchem(), "main", "--mode", mode, "--config-yml", CONFIG]
        command += ["--run-dir", self.folder, "--timestamp-id", name]
        if weights is not None:
            command += ["--checkpoint", weights]
        return self.step(name, [*command, *self.common_options(), *options])

    def common_options(self) -> list[str]:
        """What every run of `fairchem` is told: the device, and in short runs the data."""
        options = [] if torch.cuda.is_available() else ["--cpu"]
        if self.quick:
            options += [f"--dataset.train.src={self.data / 's2ef/train'}", *QUICK_OPTIONS]
            options += [f"--dataset.val.src={self.data / 's2ef/val_id'}"]
        return options

    @property
    def submissions(self) -> Path:
        """Where results on the test sets go, and the files made of them."""
        return self.folder / "submissions"

    def produced(self, step: str, path: Path) -> Path:
        """Return `path`, which a step must have written.

        Raises:
            StepError: it is not there.
        """
        if not path.exists():
            raise StepError(f"step `{step}` ended well but wrote no {path}")
        return path

    def checkpoint(self, step: str) -> Path:
        """Weights of the best validation of a training step."""
        return self.produced(step, self.folder / "checkpoints" / step / "best_checkpoint.pt")


def generate(demo: Demo) -> None:
    """Make the data, unless they are there."""
    quick = ["--quick"] if demo.quick else []
    demo.step("generate", [sys.executable, HERE / "generate.py", "--out", demo.data, *quick])


def train(demo: Demo) -> Path:
    """Train and return the best checkpoint."""
    demo.fairchem("train", "train", *(LONG_OPTIONS if demo.long else ()))
    return demo.checkpoint("train")


def validate(demo: Demo, weights: Path) -> report.Errors:
    """Validate the trained model on unseen structures of known catalysts and adsorbates."""
    return validation_errors(demo.fairchem("validate", "validate", weights=weights))


def predict_and_relax(demo: Demo, weights: Path) -> None:
    """Predict the four S2EF test sets and relax the four IS2RE test sets."""
    for split in SPLITS:
        data = [f"--{task}={demo.data / task / f'test_{split}'}" for task in ("s2ef", "is2re")]
        command = [*LEADERBOARD, "run", "--split", split, *data, "--out", demo.submissions]
        command += ["--config-yml", CONFIG, "--checkpoint", weights, *demo.common_options()]
        demo.step(f"test_{split}", command)


def submit(demo: Demo) -> list[Path]:
    """Make the EvalAI files of the three tasks, which are checked before they are written."""
    demo.step("submit", [*LEADERBOARD, "collect", demo.submissions])
    names = [f"{task}_submission.npz" for task in ("s2ef", "is2re", "is2rs")]
    return [demo.produced("submit", demo.submissions / name) for name in names]


def score(demo: Demo, trained: report.Errors) -> list[report.Score]:
    """Compare the model with the constant predictor on unseen structures, and draw the pictures.

    Args:
        demo: the run.
        trained: errors of the trained model on the validation set.

    Returns:
        The errors on the validation set, then on each test set.
    """
    s2ef = demo.data / "s2ef"
    train = report.labels(report.read_dataset(s2ef / "train"))
    true = report.labels(report.read_dataset(s2ef / "val_id"))
    constant = report.errors(report.constant(train, true), true)
    logs = demo.folder / "logs" / "tensorboard" / "train"
    report.plot_learning_curve(logs, constant, demo.folder / LEARNING_CURVE)
    scores = [report.Score("val_id", constant, trained)]
    pairs = {}
    for split in SPLITS:
        path = demo.submissions / split / results.S2EF
        examples = report.read_dataset(s2ef / f"test_{split}")
        true, made = report.labels(examples), report.predictions(path, examples)
        constant = report.errors(report.constant(train, true), true)
        scores.append(report.Score(f"test_{split}", constant, report.errors(made, true)))
        pairs[split] = made, true
    report.plot_parity(pairs, demo.folder / PARITY)
    return scores


def score_relaxations(demo: Demo) -> dict[str, report.RelaxationErrors]:
    """Compare relaxations with the model with those with EMT."""
    is2re = demo.data / "is2re"
    train = report.read_dataset(is2re / "train")
    return {
        f"test_{split}": report.relaxation_errors(
            demo.submissions / split / results.TRAJECTORIES,
            report.read_dataset(is2re / f"test_{split}"),
            train,
        )
        for split in SPLITS
    }


def run(demo: Demo) -> None:
    """Do all steps and print what came out of them.

    Raises:
        StepError: a step failed, or the trained model is not good enough.
    """
    generate(demo)
    weights = train(demo)
    trained = validate(demo, weights)
    predict_and_relax(demo, weights)
    files = submit(demo)
    scores = score(demo, trained)
    relaxed = score_relaxations(demo)
    files += [demo.folder / LEARNING_CURVE, demo.folder / PARITY, weights]
    summary = (
        f"{report.score_table(scores)}\n\n{report.relaxation_table(relaxed)}\n\n"
        f"{_list_files(files)}\n\n{_list_times(demo.seconds)}\n"
    )
    (demo.folder / "summary.txt").write_text(summary)
    print(f"\n{summary}")
    if not demo.quick:
        check_goal(scores)


def check_goal(scores: Sequence[report.Score]) -> None:
    """Compare the force errors with the demo's promise.

    Raises:
        StepError: on a set with known catalysts and adsorbates, the model is less than ``GOAL``
            times better than the constant predictor.
    """
    for result in scores:
        if result.name in ("val_id", "test_id") and result.better < GOAL:
            raise StepError(
                f"step `train`: on {result.name} the force error is {result.better:.1f} times "
                f"smaller than the constant predictor's; {GOAL:.0f} times was expected"
            )


def _list_files(files: Sequence[Path]) -> str:
    lines = [f"{path.stat().st_size / 1e3:8.0f} kB  {_readable(str(path))}" for path in files]
    return "\n".join(["Files written", *lines])


def _list_times(seconds: Mapping[str, float]) -> str:
    lines = [f"{taken:8.0f} s   {step}" for step, taken in seconds.items()]
    return "\n".join([f"Time of each step, {sum(seconds.values()):.0f} s in all", *lines])


def validation_errors(output: str) -> report.Errors:
    """Read the last validation from fairchem's output.

    Raises:
        StepError: there is none.
    """
    # Training prints its metrics as 1.23e-01, validation as 0.1234.
    found = re.findall(r"energy_mae: (\d+\.\d+), forces_mae: (\d+\.\d+),", output)
    if not found:
        raise StepError("fairchem's output has no line with `energy_mae` and `forces_mae`")
    return report.Errors(*(float(value) for value in found[-1]))


def digest(line: str) -> tuple[str, bool]:
    """Shorten a line of output to what tells of progress, or to nothing.

    Returns:
        The text, and whether it is worth keeping on the screen.
    """
    line = re.sub(r"^[\d-]+ [\d:]+ \S+:\d+: \(\w+\): ", "", line.strip())
    metrics = dict(re.findall(r"(\w+): (-?[\d.]+(?:e[+-]\d+)?)(?:,|$)", line))
    if {"epoch", "energy_mae", "forces_mae"} <= metrics.keys():
        text = "force MAE {:.0f} meV/Å, energy MAE {:.0f} meV".format(
            *(1e3 * float(metrics[key]) for key in ("forces_mae", "energy_mae"))
        )
        if "step" in metrics:
            return (
                f"step {float(metrics['step']):.0f}, epoch {float(metrics['epoch']):.2f}: {text}",
                False,
            )
        return f"validation: {text}", True
    if bar := re.match(r"(?:(.+): +)?(\d+)%\|.*\| (\d+/\d+) \[", line):
        return f"{bar[1] or 'batch'} {bar[3]}", False
    if re.fullmatch(r"\d+( \d+\.\d{3})+", line):
        step, *forces = line.split()
        return f"relaxation step {step}, largest force {max(map(float, forces)):.2f} eV/Å", False
    return "", False


def _stream(words: Sequence[str], log: Path) -> int:
    """Run a command, copy its output to a file, show a digest and return its exit status."""
    on_screen = sys.stdout.isatty()
    shown = 0.0
    with (
        log.open("w") as file,
        subprocess.Popen(
            words,
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
        ) as process,
    ):
        for line in process.stdout or ():
            file.write(line)
            text, keep = digest(line)
            if not text:
                continue
            if keep:
                print(f"\r\033[K   {text}" if on_screen else f"   {text}", flush=True)
            elif on_screen:
                print(f"\r\033[K   {text}", end="", flush=True)
            elif time.monotonic() - shown > ECHO_SECONDS:
                shown = time.monotonic()
                print(f"   {text}", flush=True)
    if on_screen:
        print("\r\033[K", end="")
    return process.returncode


def _fairchem() -> list[str]:
    """The `fairchem` command beside this Python, or the module that it calls."""
    command = Path(sys.executable).with_name("fairchem")
    return [str(command)] if command.exists() else [sys.executable, "-m", "fairchem_equiformer"]


def _readable(word: str) -> str:
    """Shorten the absolute paths in a word to ones from the repository's root, where we run."""
    return word.replace(f"{ROOT}{os.sep}", "")


def main() -> int:
    """Run the demo from the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--quick", action="store_true", help="a few systems and steps, for tests")
    size.add_argument("--long", action="store_true", help="train for longer, to smaller errors")
    parser.add_argument("--runs", type=Path, default=HERE / "runs", help="where runs are kept")
    args = parser.parse_args()
    folder = args.runs.resolve() / time.strftime("%Y-%m-%d-%H-%M-%S")
    folder.mkdir(parents=True)
    data = args.runs.resolve() / "quick_data" if args.quick else HERE / "data"
    try:
        run(Demo(folder, data, args.quick, args.long))
    except StepError as error:
        print(f"\ndemo: error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
