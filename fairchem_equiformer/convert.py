"""Checkpoints of EquiformerV2 from one framework into the form of another.

    python -m fairchem_equiformer.convert eq2_31M_ec4_allmd.pt eqv2_31M.pt
    python -m fairchem_equiformer.convert --to fairchem eqv2_31M.pt theirs.pt

Weights, EMA, optimizer, scheduler, normalisers and element references stay. What changes is the
names of classes in the config, the tables that fairchem's models save beside their parameters, and,
in the hydra form, the order of the optimizer's state: there fairchem exempts other parameters from
weight decay.
"""

from __future__ import annotations

import argparse
import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from fairchem_equiformer import checkpoints
from fairchem_equiformer.errors import InputError
from fairchem_equiformer.files import replacing

if TYPE_CHECKING:
    from collections.abc import Sequence

FORMS = ("fairchem_equiformer", "fairchem")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return its exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m fairchem_equiformer.convert",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("source", type=Path, help="checkpoint to read")
    parser.add_argument("target", type=Path, help="file to write; must not exist")
    parser.add_argument(
        "--to",
        choices=FORMS,
        default=FORMS[0],
        help="whose classes the new config names (default: %(default)s)",
    )
    parser.add_argument(
        "--trusted",
        action="store_true",
        help="run whatever the checkpoint, a pickle, asks for: only for a source you trust",
    )
    options = parser.parse_args(arguments)
    # Of no use to who runs the command, and printed for each file of each of fairchem's models.
    warnings.filterwarnings("ignore", "You are using `torch.load`", category=FutureWarning)
    from fairchem_equiformer.fairchem1 import convert  # noqa: PLC0415  # slow to import

    try:
        converted = convert.convert(
            _read(options.source, options.target, trusted=options.trusted), options.to
        )
    except InputError as error:
        text = str(error).removeprefix(f"{options.source}: ")
        sys.stderr.write(f"convert: error: {options.source}: {text}\n")
        return 2
    with replacing(options.target) as partial:
        torch.save(converted, partial)
    sys.stdout.write(f"{options.target}: model {convert.summary(converted)}\n")
    return 0


def _read(path: Path, target: Path, *, trusted: bool) -> dict[str, Any]:
    if target.exists():
        raise InputError(f"{target} exists: name a file that does not")
    return checkpoints.read(path, trusted=trusted)


if __name__ == "__main__":
    sys.exit(main())
