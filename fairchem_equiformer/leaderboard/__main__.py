r"""From a checkpoint to the files of the Open Catalyst leaderboards.

    python -m fairchem_equiformer.leaderboard run --split id --config-yml C --checkpoint F \
        --s2ef SRC --is2re SRC --out FOLDER [options of fairchem: --cpu, --num-gpus 4, ...]
    ... and so for ood_ads, ood_cat and ood_both; then
    python -m fairchem_equiformer.leaderboard collect FOLDER
    python -m fairchem_equiformer.leaderboard validate FILE [--against id=SRC ...]
    python -m fairchem_equiformer.leaderboard metrics --trajectories id=FOLDER --reference id=SRC \
        --calculator ase.calculators.emt.EMT

`run` and `collect` can be interrupted and run again: what is complete is kept. `COMMAND --help` has
the options of each.
"""

from __future__ import annotations

import argparse
import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fairchem_equiformer.calculator import make_calculator
from fairchem_equiformer.errors import InputError
from fairchem_equiformer.files import write_json
from fairchem_equiformer.leaderboard import form, metrics, systems
from fairchem_equiformer.leaderboard.collect import collect
from fairchem_equiformer.leaderboard.split import FailedError, Split

if TYPE_CHECKING:
    from collections.abc import Sequence

_FORMAT = "of the data, e.g. oc22_lmdb (default: %(default)s)"

EXIT_REFUSED = 1  # by `validate`, or a step failed
EXIT_BAD_INPUT = 2  # as argparse


def run(args: argparse.Namespace, options: Sequence[str]) -> int:
    """Predict and relax one test set."""
    if args.s2ef is None and args.is2re is None:
        raise InputError("run: give --s2ef SRC, --is2re SRC or both")
    work = Split(args.out / args.split, args.config_yml, args.checkpoint, tuple(options))
    if args.s2ef is not None:
        _say(f"wrote {work.predict(args.s2ef)}")
    if args.is2re is not None:
        _say(f"wrote {work.relax(args.is2re)}")
    return 0


def join(args: argparse.Namespace) -> int:
    """Write the files of all tasks."""
    for path in collect(args.folder, args.dataset):
        _say(f"{path} ({path.stat().st_size / 1e6:.1f} MB) would be accepted")
    return 0


def validate(args: argparse.Namespace) -> int:
    """Say what is wrong with a file, one line each, or that it would be accepted."""
    keys = form.keys_of(args.file)
    guessed = form.guess(keys)
    kind = form.Form(args.dataset or guessed.dataset, args.task or guessed.task)
    if kind.task not in form.TASKS[kind.dataset]:
        raise InputError(f"{kind.dataset} has no leaderboard of {kind.task}")
    if unknown := sorted(args.against.keys() - set(kind.splits)):
        raise InputError(f"--against: {kind.dataset} has no test set {unknown[0]!r}")
    rows = {split: systems.rows(kind.task, src, args.format) for split, src in args.against.items()}
    count = 0
    for problem in form.problems(args.file, kind, rows):
        _say(f"{args.file}: {problem}")
        count += 1
    name = f"{kind.task} of {kind.dataset}"
    if count:
        _say(f"{args.file}: would be refused as {name}, {count} problems")
        return EXIT_REFUSED
    counts = ", ".join(f"{split} {n}" for split, n in form.count(args.file, kind).items())
    unseen = [split for split in kind.splits if split not in rows]
    note = f"; not compared with data: {', '.join(unseen)} (--against)" if unseen else ""
    _say(f"{args.file}: would be accepted as {name}: {counts}{note}")
    return 0


def evaluate(args: argparse.Namespace) -> int:
    """Score relaxations of systems whose relaxed structures are known."""
    if args.trajectories.keys() != args.reference.keys():
        raise InputError("metrics: --trajectories and --reference need the same names")
    single_point = None if args.calculator is None else make_calculator(args.calculator)
    results = {}
    for name, folder in args.trajectories.items():
        reference = systems.read(args.reference[name], args.format)
        results[name] = metrics.examine(Path(folder), reference, single_point)
    _say(metrics.table({name: metrics.score(found) for name, found in results.items()}))
    if args.json is not None:
        write_json(args.json, metrics.as_json(results))
    return 0


class _Named(argparse.Action):
    """Collects options of the form NAME=VALUE in a dictionary."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        found = dict(getattr(namespace, self.dest))
        for value in [values] if isinstance(values, str) else values:
            name, equals, rest = value.partition("=")
            if not (name and equals and rest):
                parser.error(f"{option_string}: {value!r} is not of the form NAME=VALUE")
            if name in found:
                parser.error(f"{option_string}: {name} is given twice")
            found[name] = rest
        setattr(namespace, self.dest, found)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m fairchem_equiformer.leaderboard",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True)

    one = commands.add_parser("run", help=run.__doc__, allow_abbrev=False)
    splits = sorted({split for names in form.SPLITS.values() for split in names})
    one.add_argument("--split", required=True, choices=splits, help="the test set")
    one.add_argument("--config-yml", required=True, type=Path, help="config of the model")
    one.add_argument("--checkpoint", required=True, type=Path, help="its best_checkpoint.pt")
    one.add_argument("--s2ef", metavar="SRC", help="S2EF data to predict")
    one.add_argument("--is2re", metavar="SRC", help="IS2RE data to relax")
    one.add_argument("--out", required=True, type=Path, help="folder for all test sets")

    two = commands.add_parser("collect", help=join.__doc__)
    two.add_argument("folder", type=Path, help="the --out of `run`")
    two.add_argument(
        "--dataset", choices=form.SPLITS, default="OC20", help="whose form (default: %(default)s)"
    )

    three = commands.add_parser("validate", help=validate.__doc__)
    three.add_argument("file", type=Path, help="a .npz as the leaderboard would get it")
    three.add_argument(
        "--dataset", choices=form.SPLITS, help="whose form (default: guessed from the file's keys)"
    )
    three.add_argument(
        "--task", choices=form.FIELDS, help="of the leaderboard (default: guessed likewise)"
    )
    three.add_argument(
        "--against", nargs="+", action=_Named, default={}, metavar="SPLIT=SRC",
        help="data of a test set, to compare ids and numbers of atoms with",
    )  # fmt: skip
    three.add_argument("--format", default="lmdb", help=_FORMAT)

    four = commands.add_parser("metrics", help=evaluate.__doc__)
    four.add_argument(
        "--trajectories", nargs="+", action=_Named, default={}, metavar="NAME=FOLDER",
        required=True, help="relaxations with the model, <sid>.traj",
    )  # fmt: skip
    four.add_argument(
        "--reference", nargs="+", action=_Named, default={}, metavar="NAME=SRC",
        required=True, help="IS2RE data with relaxed structures",
    )  # fmt: skip
    four.add_argument("--format", default="lmdb", help=_FORMAT)
    four.add_argument(
        "--calculator",
        metavar="NAME",
        help="for AFbT: what labelled the data, a dotted name such as ase.calculators.emt.EMT",
    )
    four.add_argument(
        "--json", type=Path, help="file to write the scores to, and those of each system"
    )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run from the command line.

    Returns:
        The exit status: 0, 1 if a step failed or a file would be refused, 2 for bad input.
    """
    parser = _parser()
    args, others = parser.parse_known_args(argv)
    if others and args.command != "run":
        parser.error(f"unknown arguments: {' '.join(others)}")
    warnings.filterwarnings("ignore", "You are using `torch.load`", category=FutureWarning)
    commands = {"collect": join, "validate": validate, "metrics": evaluate}
    try:
        return run(args, others) if args.command == "run" else commands[args.command](args)
    except (InputError, FailedError) as error:
        print(f"leaderboard: error: {error}", file=sys.stderr)  # noqa: T201
        return EXIT_REFUSED if isinstance(error, FailedError) else EXIT_BAD_INPUT


def _say(text: str) -> None:
    print(text, flush=True)  # noqa: T201


if __name__ == "__main__":
    sys.exit(main())
