"""Checkpoints of EquiformerV2 from one framework into the form of another.

    python -m fairchem_equiformer.convert eq2_31M_ec4_allmd.pt eqv2_31M.pt
    python -m fairchem_equiformer.convert --to fairchem eqv2_31M.pt theirs.pt
    python -m fairchem_equiformer.convert --to fairchem2 eq2_31M_ec4_allmd.pt inference.pt

Weights, EMA, optimizer, scheduler, normalisers and element references stay. What changes is the
names of classes in the config, the tables that fairchem's models save beside their parameters, and,
in the hydra form, the order of the optimizer's state: there fairchem exempts other parameters from
weight decay.

An inference checkpoint of fairchem-core 2, which is written where that is installed, keeps of this
what predicts: the averaged weights, normalisers and element references.
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

FORMS = ("fairchem_equiformer", "fairchem", "fairchem2")


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
        "--dataset",
        help="with --to fairchem2, the task_name there: oc20, omat, odac, ... (default: omat for a"
        " model with stress, else oc20)",
    )
    parser.add_argument(
        "--trusted",
        action="store_true",
        help="run whatever the checkpoint, a pickle, asks for: only for a source you trust",
    )
    options = parser.parse_args(arguments)
    # Of no use to who runs the command, and printed for each file of each of fairchem's models.
    warnings.filterwarnings("ignore", "You are using `torch.load`", category=FutureWarning)
    try:
        converted, summary = _converted(options)
    except (InputError, ImportError) as error:  # ImportError: needs the other fairchem-core
        text = str(error).removeprefix(f"{options.source}: ")
        sys.stderr.write(f"convert: error: {options.source}: {text}\n")
        return 2
    with replacing(options.target) as partial:
        torch.save(converted, partial)
    sys.stdout.write(f"{options.target}: model {summary}\n")
    return 0


def _converted(options: argparse.Namespace) -> tuple[Any, str]:
    """The new checkpoint, and the names of its model."""
    if options.target.exists():
        raise InputError(f"{options.target} exists: name a file that does not")
    # Both are slow to import, and each needs its own fairchem-core.
    if options.to == "fairchem2":
        from fairchem_equiformer import fairchem2  # noqa: PLC0415

        inference = fairchem2.convert(
            options.source, dataset=options.dataset, trusted=options.trusted
        )
        heads = ", ".join(head["module"] for head in inference.model_config["heads"].values())
        return inference, f"{inference.model_config['_target_']} with {heads}"
    from fairchem_equiformer.fairchem1 import convert  # noqa: PLC0415

    content = checkpoints.read(options.source, trusted=options.trusted)
    checkpoint = convert.convert(content, options.to, options.source.parent)
    return checkpoint, convert.summary(checkpoint)


if __name__ == "__main__":
    sys.exit(main())
