"""AdsorbML: relax placements of adsorbates, rank them, compute the best few by DFT, score.

    python -m fairchem_equiformer.adsorbml relax placements run --checkpoint best_checkpoint.pt
    python -m fairchem_equiformer.adsorbml rank placements run
    python -m fairchem_equiformer.adsorbml single-points run --vasp
    python -m fairchem_equiformer.adsorbml score run --reference reference.json --out scores

docs/adsorbml.md describes the folders. A command that was interrupted goes on where it stopped.
"""

from __future__ import annotations

import argparse
import sys
import warnings
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from fairchem_equiformer import fairchem1_installed
from fairchem_equiformer.adsorbml import ranking, relaxation, score, single_points
from fairchem_equiformer.adsorbml.oc20_dense import read_oc20_dense
from fairchem_equiformer.adsorbml.placements import SLAB, read_placements
from fairchem_equiformer.calculator import EquiformerCalculator, make_calculator
from fairchem_equiformer.errors import InputError
from fairchem_equiformer.files import replacing, write_json

if TYPE_CHECKING:
    from collections.abc import Sequence

BATCH_SIZE = 16


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return its exit status."""
    options = _parser().parse_args(arguments)
    # Of no use to who runs the command, and printed for several of fairchem's files.
    warnings.filterwarnings("ignore", "You are using `torch.load`", category=FutureWarning)
    try:
        options.command(options)
    except InputError as error:
        sys.stderr.write(f"adsorbml: error: {error}\n")
        return 2
    return 0


def _relax(options: argparse.Namespace) -> None:
    index, count = options.shard
    placements = read_placements(options.placements, options.mapping, trusted=options.trusted)[
        index - 1 :: count
    ]
    relaxer = _calculator_relaxer(options) if options.calculator else _model_relaxer(options)
    # One by one, a calculator loses nothing if it is interrupted, and its failure has one name.
    one_by_one = isinstance(relaxer, relaxation.CalculatorRelaxer)
    batch_size = 1 if one_by_one else options.batch_size or BATCH_SIZE
    done = relaxation.relax(placements, options.run, relaxer, batch_size)
    _say(f"{options.run}: {done} placements relaxed, {len(placements) - done} were there")


def _calculator_relaxer(options: argparse.Namespace) -> relaxation.Relaxer:
    settings = relaxation.Settings(options.calculator, "CPU", options.steps, options.fmax)
    return relaxation.CalculatorRelaxer(make_calculator(options.calculator), settings)


def _model_relaxer(options: argparse.Namespace) -> relaxation.Relaxer:
    """In batches where fairchem-core 1.10 is there, unless --batch-size is 1; else one by one."""
    checkpoint, config_yml = options.checkpoint, options.config_yml
    for option, path in (("--checkpoint", checkpoint), ("--config-yml", config_yml)):
        if path is not None and not path.is_file():
            raise InputError(f"{option}: no such file: {path}")
    if not options.cpu and not torch.cuda.is_available():
        raise InputError("this machine has no GPU that PyTorch can use; add --cpu")
    device = "CPU" if options.cpu else "GPU"
    by = str(checkpoint.resolve())
    batches = fairchem1_installed() and options.batch_size != 1
    if batches:
        from fairchem_equiformer.adsorbml.batches import ModelRelaxer  # noqa: PLC0415

        settings = relaxation.Settings(by, device, options.steps, options.fmax)
        return ModelRelaxer(checkpoint, config_yml, settings, trusted=options.trusted)
    if config_yml is not None or (options.batch_size or 1) > 1:
        raise InputError(
            "--batch-size above 1 and --config-yml need fairchem-core 1.10, whose LBFGS relaxes"
            " batches: pip install 'fairchem-equiformer[fairchem1]', or leave them out"
        )
    settings = relaxation.Settings(f"{by}, one by one", device, options.steps, options.fmax)
    calculator = EquiformerCalculator(
        checkpoint, device="cpu" if options.cpu else "cuda", trusted=options.trusted
    )
    return relaxation.CalculatorRelaxer(calculator, settings)


def _rank(options: argparse.Namespace) -> None:
    pairs = ranking.rank(
        read_placements(options.placements, options.mapping, trusted=options.trusted),
        options.run,
        options.slabs or str(options.placements / "{pair}" / f"{SLAB}.*"),
        options.criteria,
        options.only_converged,
        options.processes,
    )
    _say(ranking.summary(pairs))


def _single_points(options: argparse.Namespace) -> None:
    pairs = ranking.read_ranking(options.run)
    if options.vasp:
        count = single_points.write_vasp(options.run, pairs, options.best)
        _say(f"{options.run / 'single_points'}: input of VASP for {count} structures; run it there")
    else:
        count = single_points.compute(options.run, pairs, options.best, options.calculator)
        _say(f"{options.run / 'single_points'}: {count} energies computed")


def _score(options: argparse.Namespace) -> None:
    reference = score.read_reference(options.reference)
    runs = [
        score.score_run(run, reference, options.best, options.threshold) for run in options.runs
    ]
    text = score.table(runs, len(reference), options.threshold)
    write_json(options.out / "scores.json", score.to_json(runs, reference, options.threshold))
    with replacing(options.out / "scores.md") as partial:
        partial.write_text(f"{text}\n")
    score.plot(runs, options.out / "scores.png")
    _say(f"{text}\n\nwritten: scores.json, scores.md and scores.png in {options.out}")
    if unknown := {name for run in options.runs for name in ranking.read_ranking(run)} - set(
        reference
    ):
        _say(f"not scored, as the reference has no valid placement: {', '.join(sorted(unknown))}")


def _oc20_dense(options: argparse.Namespace) -> None:
    reference = read_oc20_dense(options.mappings, trusted=options.trusted)
    write_json(options.reference, {name: asdict(known) for name, known in reference.items()})
    _say(f"{options.reference}: {len(reference)} pairs")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m fairchem_equiformer.adsorbml",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(required=True, metavar="command")

    relax = commands.add_parser("relax", help="relax all placements")
    _add_placements(relax)
    relax.add_argument("run", type=Path, help="folder to write to")
    by = relax.add_mutually_exclusive_group(required=True)
    by.add_argument("--checkpoint", type=Path, help="of EquiformerV2, e.g. best_checkpoint.pt")
    by.add_argument(
        "--calculator",
        metavar="NAME",
        help="any calculator of ASE, by its dotted name: ase.calculators.emt.EMT",
    )
    relax.add_argument(
        "--batch-size",
        type=_positive,
        help="with a checkpoint: above 1, fairchem-core 1.10 relaxes batches; 1, ASE relaxes one"
        f" by one (default: {BATCH_SIZE} where fairchem-core 1.10 is installed, else 1)",
    )
    relax.add_argument(
        "--config-yml",
        type=Path,
        help="config of the model, in batches (default: the checkpoint's)",
    )
    relax.add_argument("--cpu", action="store_true", help="relax on the CPU, not on a GPU")
    relax.add_argument(
        "--steps",
        type=_positive,
        default=relaxation.STEPS,
        help="of LBFGS at most (default: %(default)s)",
    )
    relax.add_argument(
        "--fmax",
        type=float,
        default=relaxation.FMAX,
        help="largest force at which a relaxation ends, eV/Å (default: %(default)s)",
    )
    relax.add_argument(
        "--shard",
        type=_shard,
        default=(1, 1),
        metavar="I/N",
        help="every Nth placement only; N processes, one for each I, share the work of N GPUs "
        "(default: 1/1, all)",
    )
    relax.set_defaults(command=_relax)

    rank = commands.add_parser("rank", help="leave out invalid structures, sort the others")
    _add_placements(rank)
    rank.add_argument("run", type=Path, help="folder with relaxations")
    rank.add_argument(
        "--slabs",
        metavar="PATTERN",
        help=f"files of clean surfaces (default: PLACEMENTS/{{pair}}/{SLAB}.*)",
    )
    rank.add_argument(
        "--criteria",
        type=_criteria,
        default=tuple(ranking.CRITERIA),
        help="what makes a structure invalid (default: " + ",".join(ranking.CRITERIA) + ")",
    )
    rank.add_argument(
        "--only-converged",
        action="store_true",
        help="leave out relaxations that ran out of steps (for a reference)",
    )
    rank.add_argument(
        "--processes", type=_positive, default=1, help="that share the work (default: %(default)s)"
    )
    rank.set_defaults(command=_rank)

    points = commands.add_parser("single-points", help="compute the best few, or let VASP do it")
    points.add_argument("run", type=Path, help="folder with a ranking")
    points.add_argument(
        "--best",
        type=_positive,
        default=score.LARGEST_K,
        metavar="K",
        help="how many of each pair, the lowest first (default: %(default)s)",
    )
    how = points.add_mutually_exclusive_group(required=True)
    how.add_argument(
        "--calculator", metavar="NAME", help="dotted name, e.g. ase.calculators.emt.EMT"
    )
    how.add_argument("--vasp", action="store_true", help="write VASP's input, with OC20's settings")
    points.set_defaults(command=_single_points)

    scores = commands.add_parser("score", help="success rate and speed-up against a reference")
    scores.add_argument(
        "runs", type=Path, nargs="+", metavar="run", help="folder with a ranking and single points"
    )
    scores.add_argument(
        "--reference", type=Path, required=True, help="folder relaxed by a calculator, or JSON"
    )
    scores.add_argument(
        "--best",
        type=_positive,
        default=score.LARGEST_K,
        metavar="K",
        help="score the best 1 to K (default: %(default)s)",
    )
    scores.add_argument(
        "--threshold",
        type=float,
        default=score.THRESHOLD,
        metavar="EV",
        help="a success is at most so far above the reference, eV (default: %(default)s)",
    )
    scores.add_argument("--out", type=Path, required=True, help="folder to write to")
    scores.set_defaults(command=_score)

    dense = commands.add_parser("oc20-dense", help="make the reference of OC20-Dense")
    dense.add_argument("mappings", type=Path, help="folder of oc20_dense_mappings.tar.gz, unpacked")
    dense.add_argument("reference", type=Path, help="JSON file to write")
    _add_trusted(dense)
    dense.set_defaults(command=_oc20_dense)
    return parser


def _add_placements(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("placements", type=Path, help="folder PAIR/PLACEMENT.traj, or an LMDB")
    parser.add_argument(
        "--mapping", type=Path, help="for an LMDB: JSON or pickle, sid to system_id and config_id"
    )
    _add_trusted(parser)


def _add_trusted(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--trusted",
        action="store_true",
        help="run whatever a checkpoint or pickle asks for when it is read",
    )


def _positive(text: str) -> int:
    if (number := int(text)) < 1:
        raise argparse.ArgumentTypeError("must be 1 or more")
    return number


def _shard(text: str) -> tuple[int, int]:
    index, count = (int(part) for part in text.split("/"))
    if not 1 <= index <= count:
        raise argparse.ArgumentTypeError(
            f"{text}: the first is 1/{count}, the last {count}/{count}"
        )
    return index, count


def _criteria(text: str) -> tuple[str, ...]:
    names = tuple(text.split(","))
    if unknown := set(names) - ranking.CRITERIA.keys():
        raise argparse.ArgumentTypeError(f"unknown: {', '.join(sorted(unknown))}")
    return names


def _say(text: str) -> None:
    sys.stdout.write(f"{text}\n")


if __name__ == "__main__":
    sys.exit(main())
