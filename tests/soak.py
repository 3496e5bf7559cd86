"""Kills trainings at random, resumes them, and compares the end with an uninterrupted training.

    python -m tests.soak --kills 21

A third of the kills fall inside a save: while tensors are written, before the file is on the disk,
and between the renames. Each training is a fork of this process, in which fairchem is imported
once. After each kill the checkpoints must be whole; after the last the training goes on to its end,
and its weights, averages and optimizer state must be those of a training that nobody killed.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import yaml

from fairchem_equiformer import files
from fairchem_equiformer.fairchem1 import saving
from fairchem_equiformer.fairchem1.cli import main
from tests.conftest import make_data, make_tiny_config, write_lmdb

if TYPE_CHECKING:
    from collections.abc import Callable

STRUCTURES = 4
PLACES = ("writing", "before fsync", "before the rename")


def prepare(folder: Path, epochs: int) -> None:
    """Data and a config that saves after each step, without dropout."""
    path = write_lmdb(folder / "data.lmdb", [make_data(index) for index in range(STRUCTURES)])
    config = make_tiny_config(path)
    config["model"] |= {"alpha_drop": 0.0, "drop_path_rate": 0.0, "proj_drop": 0.0}
    config["optim"] |= {"batch_size": 1, "checkpoint_every": 1, "max_epochs": epochs}
    for split in ("val", "test", "relax"):
        del config["dataset"][split]
    (folder / "config.yml").write_text(yaml.safe_dump(config))


def start(folder: Path, name: str, before: Callable[[], None] = lambda: None) -> int:
    """Train in a fork, whose output goes to a file; the process id."""
    child = os.fork()
    if child:
        return child
    log = os.open(folder / f"{name}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.chdir(folder)
    torch.set_num_threads(1)
    before()
    options = ["--mode", "train", "--config-yml", "config.yml", "--cpu", "--timestamp-id", name]
    status = main([*options, f"--run-dir={folder}"])
    sys.stdout.flush()
    os._exit(status)


def die() -> None:
    """As the kernel ends a process that is out of memory."""
    os.kill(os.getpid(), signal.SIGKILL)


def die_in_save(place: str, after: int) -> None:
    """Let this process die in a save, once it has made some."""
    saves = 0
    save, fsync, link = torch.save, os.fsync, os.link

    def due() -> bool:
        return saves > after

    class Dying:
        """A file that takes a few bytes more."""

        def __init__(self, file) -> None:
            self.file = file

        def write(self, content) -> int:
            count = self.file.write(content[: len(content) // 2])
            self.file.flush()
            die()
            return count

        def flush(self) -> None:
            self.file.flush()

    def counted_save(state, file) -> None:
        nonlocal saves
        saves += "optimizer" in state  # the others are normalizers
        save(state, Dying(file) if due() and place == "writing" else file)

    def checked_fsync(handle) -> None:
        if due() and place == "before fsync":
            die()
        fsync(handle)

    def checked_link(*names) -> None:
        link(*names)
        if due() and place == "before the rename":
            die()

    saving.torch.save = counted_save
    files.os.fsync, files.os.link = checked_fsync, checked_link


def step_of(path: Path) -> int:
    """The step of a checkpoint; 0 where there is none."""
    if not path.exists():
        return 0
    return torch.load(path, weights_only=False)["step"]


def kill_once(folder: Path, number: int, rng: random.Random) -> str:
    """Start the training, have it killed, and say where; whole checkpoints must be left."""
    latest = folder / "checkpoints" / "killed" / saving.LATEST
    begin = step_of(latest)
    if number % 3 == 0:
        place, after = PLACES[number // 3 % len(PLACES)], rng.randrange(3)
        child = start(folder, "killed", lambda: die_in_save(place, after))
    else:
        place = "at random"
        child = start(folder, "killed")
        while step_of(latest) == begin:  # its first step takes the longest
            time.sleep(0.05)
            ended, status = os.waitpid(child, os.WNOHANG)
            if ended:
                break
        else:
            time.sleep(rng.uniform(0, 0.3))
            os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status), f"it ended by itself: see {folder}/killed.log"
    assert os.WTERMSIG(status) == signal.SIGKILL
    for path in (latest, latest.with_name(saving.PREVIOUS)):
        if path.exists() or begin > 1:
            assert saving.damage(path) is None, f"{path}: {saving.damage(path)}"
    end = step_of(latest)
    assert end >= begin
    return f"{number + 1:3}  {place:18} steps {begin} to {end}"


def differences(one: Path, other: Path) -> list[str]:
    """Names of what two checkpoints differ in, to the last bit."""
    left, right = (torch.load(path, weights_only=False) for path in (one, other))
    found = [
        name
        for name, value in left["state_dict"].items()
        if not torch.equal(value, right["state_dict"][name])
    ]
    averages = zip(left["ema"]["shadow_params"], right["ema"]["shadow_params"], strict=True)
    found += [f"average {i}" for i, pair in enumerate(averages) if not torch.equal(*pair)]
    states = left["optimizer"]["state"], right["optimizer"]["state"]
    for index, state in states[0].items():
        found += [
            f"optimizer {index} {key}"
            for key, value in state.items()
            if not torch.equal(value, states[1][index][key])
        ]
    found += [key for key in ("step", "epoch") if left[key] != right[key]]
    return found


def soak(folder: Path, kills: int, epochs: int, seed: int) -> None:
    """Kill, resume and compare; an AssertionError says what was lost."""
    prepare(folder, epochs)
    rng = random.Random(seed)
    _, status = os.waitpid(start(folder, "whole"), 0)
    assert status == 0, f"see {folder}/whole.log"
    for number in range(kills):
        print(kill_once(folder, number, rng), flush=True)
    _, status = os.waitpid(start(folder, "killed"), 0)
    assert status == 0, f"see {folder}/killed.log"
    checkpoints = [folder / "checkpoints" / name / saving.LATEST for name in ("whole", "killed")]
    assert step_of(checkpoints[1]) == STRUCTURES * epochs
    assert not (found := differences(*checkpoints)), found
    print(f"{kills} kills, seed {seed}: the same to the last bit after {STRUCTURES * epochs} steps")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--kills", type=int, default=21)
    parser.add_argument("--epochs", type=int, default=40)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        soak(Path(name), given.kills, given.epochs, given.seed)
