"""The tolerant set-up: what it lets pass, and what it does not."""

from __future__ import annotations

import importlib
import logging
import os
import subprocess
import sys

import pytest
from fairchem.core.common import utils
from fairchem.core.common.registry import registry
from fairchem.core.trainers import OCPTrainer

import fairchem_equiformer
from fairchem_equiformer.fairchem1 import patches


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A folder laid out as fairchem's, under a name of its own; files by path and content."""
    root = tmp_path / "fairchem_like"
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(patches, "_tried", set())

    def write(**files):
        for name, content in files.items():
            path = root / "core" / f"{name.replace('__', '/')}.py"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(content)
        return root

    yield write
    for name in [name for name in sys.modules if name.startswith("fairchem_like")]:
        del sys.modules[name]


def test_missing_dependencies_of_models_are_named_once(project, caplog):
    root = project(
        models__good="x = 1",
        models__gem__net="import absent_one",
        models__gem__layers="import absent_one",
        models__dime="from math import absent_two",
        models__other="raise OSError('library for another torch')",
    )
    caplog.set_level(logging.INFO)
    for path in sorted((root / "core" / "models").rglob("*.py")):
        patches.import_local_file(path, project_root=root)
    assert "fairchem_like.core.models.good" in sys.modules
    (message,) = [record.getMessage() for record in caplog.records]
    assert message.startswith("fairchem models skipped: ")
    assert "gem (No module named 'absent_one')" in message
    assert "dime (cannot import name 'absent_two'" in message
    assert "other (library for another torch)" in message


def test_nothing_is_said_where_nothing_is_skipped(project, caplog):
    root = project(models__good="x = 1")
    caplog.set_level(logging.INFO)
    patches.import_local_file(root / "core" / "models" / "good.py", project_root=root)
    assert not caplog.records


def test_a_mistake_in_a_model_is_not_hidden(project):
    root = project(models__wrong="1 / 0")
    with pytest.raises(ZeroDivisionError):
        patches.import_local_file(root / "core" / "models" / "wrong.py", project_root=root)


def test_a_trainer_must_be_importable(project):
    root = project(trainers__wrong="import absent_three")
    with pytest.raises(ModuleNotFoundError, match="absent_three"):
        patches.import_local_file(root / "core" / "trainers" / "wrong.py", project_root=root)


def test_importing_the_package_installs_it():
    assert utils._import_local_file is patches.import_local_file


@pytest.mark.parametrize("name", ["s2ef", "is2re"])
def test_a_task_saved_as_trainer_is_found(name):
    assert registry.get_trainer_class(name) is OCPTrainer


def test_every_patch_has_its_reason_and_original():
    for patch in (*patches.PATCHES, *patches.AFTER_THE_MODELS, *patches.OF_THE_COMMAND):
        for _ in range(2):
            patch.apply()
        value = importlib.import_module(patch.module)
        for part in patch.name.split("."):
            value = getattr(value, part)
        assert value.original.__module__.startswith(("fairchem.core", "submitit")), patch.name
        assert not hasattr(value.original, "original"), f"{patch.name} is patched twice"
        assert patch.reason


def run(program: str, **environment: str) -> str:
    """Print of a Python process, which the start-up hook serves."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout.strip()


def test_a_look_up_does_not_spend_the_start_up_hook():
    shown = run(
        "import importlib.util as util; util.find_spec('fairchem.core.common.utils');"
        "from fairchem.core.common import utils; print(utils._import_local_file.__module__)"
    )
    assert shown == "fairchem_equiformer_startup"


def test_patches_can_be_left_out():
    shown = run(
        "import fairchem_equiformer; fairchem_equiformer.EquiformerV2;"
        "from fairchem.core.common import utils; print(utils._import_local_file.__module__)",
        FAIRCHEM_EQUIFORMER_PATCHES="off",
    )
    assert shown == "fairchem.core.common.utils"


def test_another_fairchem_is_left_alone(monkeypatch):
    startup = importlib.import_module("fairchem_equiformer_startup")
    assert startup.wanted()
    monkeypatch.setattr(fairchem_equiformer, "fairchem1_installed", lambda: False)
    assert not startup.wanted()


def test_another_value_of_the_switch_is_an_error(monkeypatch):
    monkeypatch.setenv(fairchem_equiformer.PATCHES_VARIABLE, "no")
    with pytest.raises(ValueError, match="_PATCHES is 'no', it must be on or off"):
        patches.install()
