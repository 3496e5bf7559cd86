"""What the documents say of configs and speed, against configs, tested numbers and measurements."""

from __future__ import annotations

import re
from pathlib import Path
from posixpath import join, normpath
from typing import TYPE_CHECKING

import pytest

from tests import (
    test_configs,
    test_equiformer_v1_configs,
    test_is2re,
    test_md17,
    test_omat24,
    test_own_data,
    test_qm9,
)
from tests.test_configs import CONFIGS

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).parents[1]


def tables(path: str) -> Iterator[tuple[list[str], list[list[str]]]]:
    """Header and rows of every table in a document."""
    for table in re.findall(r"(?:^\|.*\n)+", (ROOT / path).read_text(), re.MULTILINE):
        header, _, *rows = (
            [cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()
        )
        yield header, rows


def parameters(path: str) -> dict[str, int]:
    """Parameters of every config in a document's tables.

    A folder stands in the header of the first column, one below it in that of the parameters.
    """
    found: dict[str, int] = {}
    for header, rows in tables(path):
        folder = re.search(r"`configs/(\S*)`", header[0])
        for cells in rows:
            for title, cell in zip(header, cells, strict=True):
                if title.endswith("parameters"):
                    name = re.search(r"`(\S+\.yml)`", cells[0])[1]
                    below = re.match(r"`(\S+)`: ", title)
                    parts = [match[1] for match in (folder, below) if match]
                    config, count = normpath(join(*parts, name)), int(cell.replace(",", ""))
                    assert found.setdefault(config, count) == count
    return found


def expected() -> dict[str, int]:
    """The numbers that the models are tested for."""
    counts = {name: paper.parameters for name, paper in test_configs.EXPERIMENTS.items()}
    counts |= {f"oc20/is2re/{n}.yml": p.parameters for n, p in test_is2re.EXPERIMENTS.items()}
    counts |= test_equiformer_v1_configs.PARAMETERS
    counts |= {f"omat24/{name}.yml": count for name, count in test_omat24.PARAMETERS.items()}
    counts["omat24/finetune.yml"] = test_omat24.PARAMETERS["eqv2_31M"]
    counts["own_data/eqv2_31M.yml"] = test_own_data.PARAMETERS
    counts |= {
        f"md17/{name}": scripts.parameters for name, scripts in test_md17.EXPERIMENTS.items()
    }
    counts |= {
        f"qm9/{name}": test_qm9.VARIANTS[scripts.variant][2]
        for name, scripts in test_qm9.EQUIFORMER.items()
    }
    return counts | {f"qm9/{n}": test_qm9.expected_parameters(n) for n in test_qm9.EXPERIMENTS}


def test_every_config_is_in_a_table() -> None:
    configs = {str(path.relative_to(CONFIGS)) for path in CONFIGS.rglob("*.yml")}
    experiments = {name for name in configs if not name.endswith("base.yml")}
    assert set(parameters("docs/experiments.md")) == experiments
    (count,) = re.findall(r"materials models: (\d+) in all", (ROOT / "README.md").read_text())
    assert int(count) == len(experiments)


def test_parameters_are_those_that_the_models_are_tested_for() -> None:
    assert parameters("docs/experiments.md") == expected()
    some = parameters("README.md")
    assert len(some) > 5
    assert some.items() <= expected().items()


@pytest.mark.parametrize("path", ["README.md", "CHANGELOG.md"])
def test_how_much_faster_it_is_was_measured(path: str) -> None:
    """From the smallest to the largest ratio of whole calls, on any CPU."""
    ratios = []
    for header, rows in tables("docs/benchmarks.md"):
        if "kept / MB" not in header:
            continue
        ratio = header.index("ratio")  # the first is that of time
        compared = [row[:3] for row in rows if row[3] == "stock"]
        ratios += [
            float(row[ratio])
            for row in rows
            if row[3] == "ours" and row[0] != "neighbors" and row[:3] in compared
        ]
    said = re.search(r"([\d.]+)\sto\s([\d.]+)\stimes\sfaster", (ROOT / path).read_text())
    assert [float(number) for number in said.groups()] == [min(ratios), max(ratios)]
