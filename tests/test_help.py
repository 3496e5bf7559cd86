"""Every command explains each of its arguments, with its default."""

from __future__ import annotations

import argparse

import pytest

from fairchem_equiformer.adsorbml import __main__ as adsorbml
from fairchem_equiformer.fairchem1 import cli
from fairchem_equiformer.leaderboard import __main__ as leaderboard


def arguments(module):
    """Every argument of every sub-command, with a name for the test."""
    parser = module._parser()
    (commands,) = (a for a in parser._actions if isinstance(a, argparse._SubParsersAction))
    for name, command in commands.choices.items():
        for action in command._actions:
            yield pytest.param(action, id=f"{module.__name__.split('.')[1]} {name} {action.dest}")


@pytest.mark.parametrize("action", [*arguments(adsorbml), *arguments(leaderboard)])
def test_arguments_are_explained(action):
    assert action.help
    has_a_default = action.default not in (None, False, argparse.SUPPRESS) and action.default != {}
    assert ("default" in action.help) == has_a_default or action.default is None


def test_fairchems_command_tells_what_it_takes_beside_its_options(capsys):
    with pytest.raises(SystemExit, match="0"):
        cli.main(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert "fairchem main" in text
    assert "--key.subkey=value" in text
