"""The figures as a table: ``python -m benchmarks.table results.jsonl`` prints it in Markdown."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Console
from rich.table import Table

from benchmarks.context import CONTEXT

if TYPE_CHECKING:
    from collections.abc import Iterable

Record = dict[str, Any]
WIDTH = 160
BUSY = 0.9  # of the time on a processor, where nothing but other processes can make it wait


def read_ledger(path: Path) -> list[Record]:
    """Return the lines of a ledger, the newest where a measurement was repeated."""
    newest: dict[tuple[Any, ...], Record] = {}
    for line in path.read_text().splitlines():
        record = json.loads(line)
        key = *row_of(record), record["implementation"], record["device"], record["threads"]
        newest[key] = record
    return list(newest.values())


def row_of(record: Record) -> tuple[str, str, int, int]:
    """Return what the implementations of one row have in common."""
    return record["task"], record["model"], record["copies"], record["atoms"]


def model_of(record: Record) -> str:
    """Return the size of the model that was measured."""
    context = CONTEXT.get(record["implementation"])
    return context.size if context else record["model"]


def table(records: Iterable[Record], style: box.Box = box.HEAVY_HEAD) -> Table:
    """Return a table; ratios are the figure of a row's first implementation over this one's."""
    caption = "~: other work took the processors meanwhile; compare cpu_seconds in the ledger."
    result = Table(title="Ratios: how many times less than the first", caption=caption, box=style)
    for heading in ("work", "model", "atoms", "by"):
        result.add_column(heading)
    for heading in ("time / s", "ratio", "peak / MB", "ratio", "kept / MB", "ratio"):
        result.add_column(heading, justify="right")
    for heading in ("GFLOP", "GEMM share", "regions", "difference"):
        result.add_column(heading, justify="right")
    first: dict[tuple[str, str, int, int], Record] = {}
    for record in records:
        task, _, copies, atoms = row = row_of(record)
        reference = first.setdefault(row, record)
        if reference is record:
            result.add_section()
        size = f"{copies} x {atoms}" if copies > 1 else f"{atoms}"
        work = task, model_of(record), size, record["implementation"]
        result.add_row(*work, *cells(record, reference))
    return result


def cells(record: Record, first: Record) -> list[str]:
    """Return the figures of one implementation, as :func:`table` has them."""
    if "failure" in record:
        return [record["failure"]]
    figures = []
    for key, unit in (("seconds", 1.0), ("peak_bytes", 1e6), ("saved_bytes", 1e6)):
        value, reference = record.get(key), first.get(key)
        figures.append(f"{value / unit:.4g}" if value is not None else "")
        figures.append(f"{reference / value:.1f}" if reference and value else "")
    if record["cpu_seconds"] < BUSY * record["seconds"]:
        figures[0] = f"~{figures[0]}"
    share = f"{record['gemm_share']:.0%}"
    if "over_forward" in record:
        share += f" ({record['over_forward']:+.0%} over forward)"
    errors = record.get("difference", record.get("spread", {}))
    worst = f"{max(errors.values()):.1e}" if errors else ""
    regions = f"{record['regions']}" if "regions" in record else ""
    return [*figures, f"{record['flop'] / 1e9:.4g}", share, regions, worst]


def main() -> None:
    """Print the ledger named on the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.table", description=__doc__)
    parser.add_argument("ledger", type=Path)
    records = read_ledger(parser.parse_args().ledger)
    Console(width=WIDTH).print(table(records, box.MARKDOWN))


if __name__ == "__main__":
    main()
