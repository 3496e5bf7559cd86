"""The comparison of Equiformer and EquiformerV2 on the demo's data: what it trains and reports."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from threading import Lock

import pytest
import yaml

sys.path.insert(0, str(Path(__file__).parents[1] / "examples" / "emt"))

import compare
import report
import run

VERSIONS = compare.read_versions()
VALIDATION = (
    "2026-01-01 10:00:00 x.py:1: (INFO): energy_mae: {}, forces_mae: 0.0500, loss: 1.0000\n"
)


def result(model, seed=0, energy=0.2, forces=0.05):
    return compare.Result(model, seed, 1000, energy, forces, 60.0)


def of_every_model(**changed):
    """Two results of each model; `changed` has a model's two errors."""
    return [
        result(name, seed, *[changed.get(name, (0.2, 0.3))[seed]] * 2)
        for seed in (0, 1)
        for name in VERSIONS
    ]


class TestVersions:
    def test_v2_is_the_demos_model(self):
        assert VERSIONS["V2"] == yaml.safe_load(run.CONFIG.read_text())["model"]

    def test_have_about_as_many_parameters(self):
        counts = {name: compare.parameters_of(model) for name, model in VERSIONS.items()}
        assert max(counts.values()) < 1.06 * min(counts.values())

    def test_see_the_same_edges(self):
        keys = ("max_neighbors", "max_radius", "use_pbc", "num_layers", "alpha_drop", "avg_degree")
        assert len({tuple(model[key] for key in keys) for model in VERSIONS.values()}) == 1

    def test_are_those_of_the_publications(self):
        v1 = {
            name: (model["attention"], model["nonlinear_message"])
            for name, model in VERSIONS.items()
            if name.startswith("V1")
        }
        assert v1 == {
            "V1": ("mlp", True),
            "V1 linear messages": ("mlp", False),
            "V1 dot product": ("dot_product", False),
        }
        keys = ("use_attn_renorm", "use_gate_act", "use_sep_s2_act", "norm_type")
        v2 = [
            tuple(model[key] for key in keys)
            for name, model in VERSIONS.items()
            if name.startswith("V2")
        ]
        assert v2 == [
            (False, True, True, "layer_norm"),
            (True, True, True, "layer_norm"),
            (True, False, False, "layer_norm"),
            (True, False, True, "layer_norm"),
            (True, False, True, "layer_norm_sh"),
        ]

    def test_claims_are_of_them_and_say_what_was_published(self):
        for claim in compare.CLAIMS:
            assert {claim.better, claim.worse} <= set(VERSIONS)
            better, worse = map(float, claim.published)
            assert better < worse


class TestReport:
    def test_table_has_mean_and_half_the_range(self):
        rows = compare.table([result("V1", 0, 0.2, 0.05), result("V1", 1, 0.3, 0.06)]).splitlines()
        assert rows[2] == "| V1 | 1,000 | 55.0 ± 5.0 | 250 ± 50 | 60 |"
        assert len(rows) == 3

    @pytest.mark.parametrize(
        ("v1", "linear", "found"),
        [
            ((0.1, 0.2), (0.3, 0.4), "yes"),
            ((0.3, 0.4), (0.1, 0.2), "no"),
            ((0.1, 0.3), (0.2, 0.4), "undecided"),
        ],
    )
    def test_an_ordering_is_found_where_no_seed_contradicts_it(self, v1, linear, found):
        results = of_every_model(**{"V1": v1, "V1 linear messages": linear})
        claim = compare.CLAIMS[0]
        assert (claim.better, claim.worse) == ("V1", "V1 linear messages")
        assert compare.verdict(claim, results) == found
        assert compare.claims_table(results).splitlines()[2].endswith(f"| {found} |")

    def test_is_written_between_the_marks(self, tmp_path):
        document = tmp_path / "versions.md"
        document.write_text(f"before\n{compare.START}\nold\n{compare.END}\nafter\n")
        compare.write_into(document, "new\n")
        text = f"before\n{compare.START}\nnew\n{compare.END}\nafter\n"
        assert document.read_text() == text
        document.write_text("nothing")
        with pytest.raises(run.StepError, match="has no lines"):
            compare.write_into(document, "new\n")

    def test_document_has_the_marks(self):
        text = (run.ROOT / "docs" / "versions.md").read_text()
        assert text.index(compare.START) < text.index(compare.END)


class TestCommand:
    @pytest.fixture
    def comparison(self, tmp_path, monkeypatch):
        monkeypatch.setattr(compare, "constant_error", lambda _: report.Errors(0.5, 0.2))
        return compare.Comparison(
            *(tmp_path / "out", tmp_path / "data", True, 2, 1), Lock(), time.monotonic()
        )

    def test_trains_each_on_the_same_config_and_tests_its_checkpoint(self, comparison, monkeypatch):
        calls = []

        def fairchem(_, label, config, call):
            calls.append((label, yaml.safe_load(config.read_text()), call))
            return VALIDATION.format("0.1000" if label.startswith("V1,") else "0.2000")

        monkeypatch.setattr(compare, "fairchem", fairchem)
        text = compare.compare(comparison, [0, 1])
        assert "| V1 | 353,715 | 50.0 ± 0.0 | 100 ± 0 |" in text
        demo = yaml.safe_load(run.CONFIG.read_text())
        for label, config, _ in calls:
            assert config == demo | {"model": VERSIONS[label.rpartition(",")[0]]}
        trainings = [call for _, _, call in calls if call[0] == "train"]
        assert len(trainings) == 16
        assert len({call[2:] for call in trainings}) == 2  # they differ by the seed alone
        tests = [call for _, _, call in calls if call[0] == "validate"]
        weights = comparison.folder / "checkpoints" / "v1-dot-product-1" / "best_checkpoint.pt"
        assert any(str(weights) in call for call in tests)
        assert sorted(path.name for path in (comparison.folder / "test_sets").iterdir()) == [
            f"data.{index:04d}.lmdb" for index in range(4)
        ]

        monkeypatch.setattr(compare, "fairchem", pytest.fail)
        again = compare.compare(comparison, [0, 1])
        assert again.splitlines()[:10] == text.splitlines()[:10]

    def test_a_failed_training_ends_it_and_names_the_log(self, comparison, monkeypatch):
        monkeypatch.setattr(sys, "executable", "false")
        log = comparison.folder / "logs" / "v1-0.log"
        with pytest.raises(run.StepError, match=f"V1, seed 0: --mode train failed; {log} ends"):
            compare.compare(comparison, [0])

    @pytest.mark.long
    def test_whole_comparison(self, tmp_path):
        command = [sys.executable, compare.__file__, "--short", "--out", str(tmp_path)]
        done = subprocess.run(command, capture_output=True, text=True, env=os.environ, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        text = (tmp_path / "summary.md").read_text()
        assert all(f"| {name} | " in text for name in VERSIONS)
        assert text.count("\n") >= len(VERSIONS) + len(compare.CLAIMS)
