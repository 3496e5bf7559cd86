"""The `fairchem` command: that of fairchem-core, with this package's models and clear errors."""

from __future__ import annotations

import sys
import warnings
from typing import TYPE_CHECKING

from fairchem.core import _cli
from fairchem.core.common.flags import flags
from fairchem.core.common.utils import setup_logging
from submitit.core.utils import FailedJobError, FailedSubmissionError
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

from fairchem_equiformer import patches_wanted
from fairchem_equiformer.errors import InputError, StoppedError
from fairchem_equiformer.fairchem1 import patches, preflight
from fairchem_equiformer.fairchem1.signals import SIGNALLED

if TYPE_CHECKING:
    from argparse import Namespace

EXIT_BAD_INPUT = 2  # as argparse


def main(argv: list[str] | None = None) -> int:
    """Run fairchem-core's program.

    Everything is fairchem-core's own but for a leading `main`, which is dropped, and the input,
    which is checked before the run starts. Importing this package has registered its models.

    Args:
        argv: Arguments without the program's name; those of the process if not given.

    Returns:
        The exit status: 0, 2 for input that a run cannot start with, 128 and its number for a
        signal, or 1.
    """
    argv = sys.argv[1:] if argv is None else argv
    parser = flags.get_parser()
    parser.prog = "fairchem"
    parser.epilog = (
        "`fairchem main ...` is the same as `fairchem ...`. Any value of the config can be changed "
        "by --key.subkey=value, such as --optim.batch_size=4 or --dataset.train.src=FOLDER."
    )
    args, overrides = parser.parse_known_args(argv[1:] if argv[:1] == ["main"] else argv)
    # Of no use to who runs the command, and printed for each file of each of fairchem's models.
    warnings.filterwarnings("ignore", "You are using `torch.load`", category=FutureWarning)
    setup_logging()
    if patches_wanted():
        patches.exchange_the_command()  # the start-up hook has, where it is installed
    try:
        preflight.check(args, overrides)
    except InputError as error:
        print(f"fairchem: error: {error}", file=sys.stderr)  # noqa: T201
        return EXIT_BAD_INPUT
    return _run(args, overrides)


def _run(args: Namespace, overrides: list[str]) -> int:
    """Run fairchem-core's program; where that starts ranks, their status is its own."""
    try:
        _cli.main(args, overrides)
    except StoppedError as error:
        print(f"fairchem: error: {error}", file=sys.stderr)  # noqa: T201
        return error.status
    except (FailedJobError, FailedSubmissionError) as error:
        reason = " ".join(str(error).split())
        print(f"fairchem: error: Slurm took no job: {reason}", file=sys.stderr)  # noqa: T201
        return EXIT_BAD_INPUT
    except SignalException as error:  # the ranks got it, too, and had the time to save
        return SIGNALLED + error.sigval
    except ChildFailedError as error:  # which has printed what was wrong
        rank, failure = error.get_first_failure()
        status = failure.exitcode if failure.exitcode > 0 else SIGNALLED - failure.exitcode
        print(f"fairchem: error: rank {rank} ended with status {status}", file=sys.stderr)  # noqa: T201
        return status
    return 0
