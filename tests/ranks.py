"""The `fairchem` command with one rank and with several, on the same small problem.

    python -m tests.ranks FOLDER [--long]
    python -m tests.ranks FOLDER --again 40

The second relaxes on three ranks over and over: none may hang at its end. Each command is a fork of
this process, and so are its ranks, so that fairchem is imported once. What trainers computed is
written down by every rank; `tests/test_ranks.py` compares.
"""

from __future__ import annotations

import argparse
import copy
import functools
import os
import random
import shutil
import signal
import sys
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import yaml
from fairchem.core import _cli
from fairchem.core.common import distutils
from fairchem.core.common.data_parallel import _balanced_partition
from fairchem.core.common.registry import registry
from fairchem.core.common.utils import setup_imports
from fairchem.core.datasets import data_list_collater
from fairchem.core.trainers import OCPTrainer
from torch.distributed.elastic.utils.distributed import get_free_port

from fairchem_equiformer.fairchem1 import relaxation
from fairchem_equiformer.fairchem1.cli import main
from tests.conftest import TINY_MODEL, make_data, make_tiny_config, write_lmdb

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch.distributed.launcher.api import LaunchConfig

# Repeats of the surface's cell: 9 to 25 atoms. Six structures are a batch of four and one of two.
SIZES = ((2, 2, 2), (3, 2, 4), (2, 2, 3), (2, 3, 2), (2, 2, 4), (3, 2, 2))
BATCH = 4

HYDRA = {
    "name": "hydra",
    "pass_through_head_outputs": True,
    "otf_graph": True,
    "heads": {
        "energy": {"module": "fairchem_equiformer.EnergyHead"},
        "forces": {"module": "fairchem_equiformer.ForceHead"},
    },
}


def prepare(folder: Path) -> None:
    """Data with the number of atoms of each, and a config for either form of the model."""
    entries = [make_data(sid, size) for sid, size in enumerate(SIZES)]
    path = write_lmdb(folder / "data" / "data.lmdb", entries)
    np.savez(path.with_name("metadata.npz"), natoms=[len(entry.pos) for entry in entries])
    config = make_tiny_config(path)
    config["model"] |= {"alpha_drop": 0.0, "drop_path_rate": 0.0, "proj_drop": 0.0}
    config["optim"] |= {"batch_size": BATCH, "eval_batch_size": BATCH, "checkpoint_every": 1}
    del config["optim"]["clip_grad_norm"], config["dataset"]["val"], config["dataset"]["test"]
    config["task"] |= {"relaxation_steps": 4, "relaxation_fmax": 1e-3}
    (folder / "flat.yml").write_text(yaml.safe_dump(config))
    backbone = {**config["model"], "model": "fairchem_equiformer.EquiformerV2Backbone"}
    del backbone["name"]
    hydra = {**copy.deepcopy(HYDRA), "backbone": backbone}
    (folder / "hydra.yml").write_text(yaml.safe_dump({**config, "model": hydra}))


def command(
    folder: Path,
    name: str,
    mode: str,
    *options: str,
    form: str = "flat",
    before: Callable[[], None] = lambda: None,
) -> int:
    """Run `fairchem` in a fork, under an id; its exit status, or minus the signal's number."""
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    log = os.open(folder / f"{name}.{mode}.log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.chdir(folder)
    torch.set_num_threads(1)
    _cli.elastic_launch = forked
    before()
    given = ["main", "--mode", mode, "--config-yml", f"{form}.yml", "--cpu", "--print-every=1"]
    status = main([*given, "--timestamp-id", name, f"--run-dir={folder}", *options])
    sys.stdout.flush()
    os._exit(status)


def forked(launch: LaunchConfig, entry: Callable[[Any], None]) -> Callable[[Any], None]:
    """In place of torch's launcher, whose process has threads by the time that it could fork."""

    def start(config: Any) -> None:
        os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(get_free_port())}
        ranks = [_fork_rank(rank, entry, config) for rank in range(launch.nproc_per_node)]
        first, left = 0, set(ranks)
        while left:
            child, status = os.wait()
            left.discard(child)
            if status and not first:
                first = os.waitstatus_to_exitcode(status)
                for other in left:
                    os.kill(other, signal.SIGKILL)
        os._exit(first % 256)

    return start


def _fork_rank(rank: int, entry: Callable[[Any], None], config: Any) -> int:
    child = os.fork()
    if child:
        return child
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
    status = 1
    try:
        entry(config)
        status = 0
    except SystemExit as stopped:
        status = stopped.code
    except BaseException:  # noqa: BLE001  # as the end of a process does
        traceback.print_exc()
    sys.stderr.flush()
    os._exit(status)


def record(folder: Path, name: str) -> None:
    """Let every trainer of this process, and of its forks, write down what it computes."""
    steps: list[dict[str, Any]] = []
    compute_loss, backward, train = (
        getattr(OCPTrainer, method) for method in ("_compute_loss", "_backward", "train")
    )

    def recorded_loss(trainer: Any, out: Any, batch: Any) -> Any:
        loss = compute_loss(trainer, out, batch)
        steps.append(
            {
                "loss": loss.item(),
                "sids": batch.sid.tolist(),
                "natoms": batch.natoms.tolist(),
                "out": {key: value.detach().clone() for key, value in out.items()},
            }
        )
        return loss

    def recorded_backward(trainer: Any, loss: Any) -> None:
        backward(trainer, loss)
        steps[-1]["gradients"] = {
            key: None if parameter.grad is None else parameter.grad.clone()
            for key, parameter in trainer.model.named_parameters()
            if parameter.requires_grad
        }

    def recorded_train(trainer: Any, *args: Any, **settings: Any) -> None:
        train(trainer, *args, **settings)
        torch.save(steps, folder / f"{name}.{distutils.get_rank()}.pt")

    OCPTrainer._compute_loss = recorded_loss
    OCPTrainer._backward = recorded_backward
    OCPTrainer.train = recorded_train


def several(ranks: int, of_a_graph: int = 1) -> list[str]:
    """Options for so many ranks, so many of them on one graph, with batches of `BATCH` in all."""
    batch = BATCH * of_a_graph // ranks
    options = [f"--num-gpus={ranks}", f"--optim.batch_size={batch}"]
    options.append(f"--optim.eval_batch_size={batch}")
    return options + ([f"--gp-gpus={of_a_graph}"] if of_a_graph > 1 else [])


def run(folder: Path, name: str, *options: str, form: str = "flat") -> None:
    """Train, then relax with the weights of the one-rank training of that form."""
    before = functools.partial(record, folder, name)
    status = command(folder, name, "train", *options, form=form, before=before)
    assert status == 0, f"see {folder}/{name}.train.log"
    relax(folder, name, *options, form=form)


def relax(folder: Path, name: str, *options: str, form: str = "flat") -> None:
    """Relax, with trajectories in a folder of that name."""
    status = relax_once(folder, name, *options, form=form)
    assert status == 0, f"see {folder}/{name}.run-relaxations.log"


def relax_once(folder: Path, name: str, *options: str, form: str = "flat", **how: Any) -> int:
    """The same; the exit status, since it may be killed."""
    weights = f"--checkpoint={folder}/checkpoints/{form}/checkpoint.pt"
    trajectories = f"--task.relax_opt.traj_dir={folder}/{name}"
    options = (weights, trajectories, *options)
    return command(folder, name, "run-relaxations", *options, form=form, **how)


def die_in_relaxation(rank: int, after: int, *, in_a_step: bool) -> None:
    """Let one rank be killed after some steps, or after some trajectories are in their place."""
    owner: Any = relaxation.LBFGS if in_a_step else Path
    name = "step" if in_a_step else "replace"
    method, calls = getattr(owner, name), []

    def counted(*args: Any) -> Any:
        result = method(*args)
        calls.append(args)
        if len(calls) > after and distutils.get_rank() == rank:
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    setattr(owner, name, counted)


def interrupt(folder: Path, name: str, *options: str, kills: int) -> None:
    """Relax, killed again and again, until it is done."""
    rng = random.Random(0)
    ranks = 2 if options else 1
    for number in range(kills):
        die = functools.partial(
            die_in_relaxation,
            rng.randrange(ranks),
            rng.randrange(5 // ranks),
            in_a_step=number % 2 == 0,
        )
        if relax_once(folder, name, *options, before=die) == 0:
            shutil.rmtree(folder / name)  # it was done before its end: begin again
    relax(folder, name, *options)


def run_all(folder: Path, *, long: bool) -> None:
    """All that is compared; `long` is the product of forms and ways to spread."""
    prepare(folder)
    for form in ("flat", "hydra"):
        run(folder, form, form=form)
        run(folder, f"{form} graph 2", *several(2, 2), form=form)
        if long:
            run(folder, f"{form} data 2", *several(2), form=form)
            run(folder, f"{form} graph 3", *several(3, 3), form=form)
            run(folder, f"{form} graph 2 data 2", *several(4, 2), form=form)
    if not long:
        run(folder, "flat data 2", *several(2))
    interrupt(folder, "flat killed", kills=20 if long else 2)
    interrupt(folder, "flat killed 2", *several(2), kills=20 if long else 2)
    for sid in (0, 1):  # of one rank's batch; the other rank has nothing left to relax
        (folder / "flat killed 2" / f"{sid}.traj").unlink()
    relax(folder, "flat killed 2", *several(2))


def warm_up() -> None:
    """Do once what each rank would do anew: imports, compiling, tables."""
    torch.set_num_threads(1)
    setup_imports()
    _balanced_partition(np.array([3, 1, 2]), 2)
    model = registry.get_model_class("fairchem_equiformer.EquiformerV2")
    keys = {key: value for key, value in TINY_MODEL.items() if key != "name"}
    with torch.no_grad():
        model(**keys)(data_list_collater([make_data(0)], otf_graph=True))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--long", action="store_true")
    parser.add_argument("--again", type=int, default=0)
    given = parser.parse_args()
    folder = given.folder.resolve()
    warm_up()
    if given.again:
        prepare(folder)
        run(folder, "flat")
        for number in range(given.again):
            relax(folder, f"again {number}", *several(3, 3))
    else:
        run_all(folder, long=given.long)
