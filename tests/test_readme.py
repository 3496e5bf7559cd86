"""The README's table of experiments against the configs and their tested numbers of parameters."""

from __future__ import annotations

import re
from pathlib import Path

from tests import test_configs, test_is2re, test_omat24, test_own_data, test_qm9
from tests.test_configs import CONFIGS

README = Path(__file__).parents[1] / "README.md"
ROW = re.compile(r"^\| `(?P<config>\S+\.yml)` \|[^|]*\| (?P<parameters>[\d,]+) \|", re.MULTILINE)


def rows() -> dict[str, int]:
    section = README.read_text().partition("## Experiments")[2].partition("\n## ")[0]
    return {row["config"]: int(row["parameters"].replace(",", "")) for row in ROW.finditer(section)}


def test_every_config_is_in_the_table() -> None:
    configs = {str(path.relative_to(CONFIGS)) for path in CONFIGS.rglob("*.yml")}
    assert set(rows()) == {name for name in configs if not name.endswith("base.yml")}


def test_parameters_are_those_that_the_models_are_tested_for() -> None:
    expected = {name: paper.parameters for name, paper in test_configs.EXPERIMENTS.items()}
    expected |= {f"oc20/is2re/{n}.yml": p.parameters for n, p in test_is2re.EXPERIMENTS.items()}
    expected |= {f"omat24/{name}.yml": count for name, count in test_omat24.PARAMETERS.items()}
    expected["omat24/finetune.yml"] = test_omat24.PARAMETERS["eqv2_31M"]
    expected["own_data/eqv2_31M.yml"] = test_own_data.PARAMETERS
    for name in test_qm9.EXPERIMENTS:
        expected[f"qm9/{name}"] = test_qm9.expected_parameters(name)
    assert rows() == expected
