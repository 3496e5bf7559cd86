"""Where the time of this package goes, by stage: ``python -m benchmarks.profile``.

Runs a forward pass, or one and its backward pass, in a process of its own, with the functions of
each stage wrapped from outside (:mod:`benchmarks.stages`), and prints the fastest of several. What
a function does beside those of other stages is its stage's; what belongs to none (the loss, sums of
residuals, autograd itself) is the rest.

Beside each stage stands its floor: the time of its matrix products at the rate of one large
product in the same process; or, of stages that make none, of their tensors, each read or written
once, at the rate of a large copy. What lies between is lost, in per cent of the whole. A floor of
bytes knows nothing of arithmetic, as that of the activation's sigmoids and transforms. Regions are
parallel ones (:mod:`benchmarks.regions`). Examples::

    python -m benchmarks.profile --size 409
    python -m benchmarks.profile --task training --size 4x45 --model 83M
"""

from __future__ import annotations

import argparse
import tempfile
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from benchmarks.compare import (
    CONFIGS,
    Contender,
    available_gib,
    device_name,
    run_child,
    size,
    spec_of,
    title_of,
)
from benchmarks.table import WIDTH, Record

if TYPE_CHECKING:
    from collections.abc import Sequence


def floor(stage: Record, rates: Record) -> float:
    """Return the least seconds of a stage: of its products, or of its bytes without any."""
    if stage["flop"]:
        return stage["flop"] / rates["gemm_flop_per_second"]
    return stage["bytes"] / rates["copy_bytes_per_second"]


def table(record: Record, title: str) -> Table:
    """Return the stages of a record with their floors, and their sum."""
    stages = record["stages"]
    total = sum(stage["seconds"] for stage in stages.values())
    result = Table(title=title)
    result.add_column("stage")
    for heading in ("calls", "time / ms", "share", "GFLOP", "MB", "floor / ms", "of floor", "lost"):
        result.add_column(heading, justify="right")
    result.add_column("regions", justify="right")
    for name, stage in stages.items():
        result.add_row(name, *cells(stage, floor(stage, record), total))
    result.add_section()
    keys = ("seconds", "flop", "bytes", "regions")
    whole = {key: sum(stage[key] or 0 for stage in stages.values()) for key in keys} | {"calls": 0}
    if any(stage["regions"] is None for stage in stages.values()):
        whole["regions"] = None
    floors = sum(floor(stage, record) for stage in stages.values())
    result.add_row("all", *cells(whole, floors, total))
    return result


def cells(stage: Record, least: float, total: float) -> list[str]:
    """Return the figures of one line, as :func:`table` has them."""
    seconds = stage["seconds"]
    return [
        f"{stage['calls']}" if stage["calls"] else "",
        f"{1e3 * seconds:.4g}",
        f"{seconds / total:.1%}",
        f"{stage['flop'] / 1e9:.4g}" if stage["flop"] else "",
        f"{stage['bytes'] / 1e6:.4g}" if stage["bytes"] else "",
        f"{1e3 * least:.4g}" if least else "",
        f"{least / seconds:.0%}" if least and seconds else "",
        f"{(seconds - least) / total:.1%}",
        f"{stage['regions']:.0f}" if stage["regions"] is not None else "",
    ]


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Return the options of the command."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.profile",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--model", default="31M", help=f"{', '.join(CONFIGS)} or a config file")
    add("--task", choices=["inference", "training"], default="inference")
    add("--implementation", choices=["ours", "ours_bf16"], default="ours")
    add("--size", type=size, default=(1, 45), help="atoms: 45, or 4x45 for a batch of four")
    add("--threads", type=int, default=2, help="CPU threads")
    add("--seconds", type=float, default=10.0, help="least time to repeat the step for")
    add("--timeout", type=float, default=900.0, help="seconds after which it is given up")
    add("--memory", type=float, default=0.8 * available_gib(), help="GiB it may take")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> Record:
    """Measure and print; return the record."""
    options = parse(arguments)
    with tempfile.TemporaryDirectory() as folder:
        spec = spec_of(
            options,
            folder,
            implementation=options.implementation,
            task=options.task,
            memory_limit=int(options.memory * 2**30),
        )
        record = run_child(
            spec, options.timeout, Contender(options.implementation, module="benchmarks.stages")
        )
    if "failure" in record:
        raise SystemExit(f"benchmarks.profile: {record['failure']}")
    Console(width=WIDTH).print(table(record, f"{options.task}, {title_of(options)}"))
    print(
        f"{device_name('cpu')}; one large product {record['gemm_flop_per_second'] / 1e9:.0f} "
        f"GFLOP/s, a large copy {record['copy_bytes_per_second'] / 1e9:.1f} GB/s"
    )
    if record["stages"]["rest"]["regions"] is None:
        print("parallel regions: not counted, for want of a C compiler")
    return record


if __name__ == "__main__":
    main()
