"""The command that prints tasks reads plain data alone."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import yaml

from fairchem_equiformer.fairchem2 import convert, tasks
from tests import golden


class Hostile:
    """A value whose pickle makes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_a_converted_checkpoint_is_plain_data(tmp_path, capsys):
    path = tmp_path / "start.pt"
    torch.save(convert(golden.checkpoint("hydra")), path)
    assert tasks.main([str(path)]) == 0
    names = [task["name"] for task in yaml.safe_load(capsys.readouterr().out)["tasks"]]
    assert {"energy", "forces"} <= set(names)


@pytest.mark.parametrize("options", [[], ["--trusted"]])
def test_a_hostile_one_needs_trust(tmp_path, capsys, options):
    path, struck = tmp_path / "start.pt", tmp_path / "struck"
    content = convert(golden.checkpoint("hydra"))
    content.model_config["more"] = Hostile(struck)
    torch.save(content, path)
    assert tasks.main([str(path), *options]) == (0 if options else 2)
    assert struck.exists() == bool(options)
    if not options:
        assert capsys.readouterr().err.startswith(f"tasks: error: {path}: asks for ")


def test_another_file_is_one_line(tmp_path, capsys):
    path = tmp_path / "start.pt"
    torch.save({"state_dict": {}}, path)
    assert tasks.main([str(path)]) == 2
    assert "not a checkpoint of fairchem-core 2.x" in capsys.readouterr().err
    assert tasks.main([str(tmp_path / "absent.pt")]) == 2
    assert "no such file" in capsys.readouterr().err
