"""One test set: predictions for S2EF, relaxations for IS2RS and IS2RE.

All is done by the `fairchem` command in processes of their own, and kept in one folder::

    <folder>/run.json        checkpoint, config and data; a later run must have the same
    <folder>/config.yml      the config, completed by the options, less absent training data
    <folder>/s2ef.npz        fairchem's predictions
    <folder>/trajectories/   <sid>.traj, the relaxations
    <folder>/relaxed.npz     energy and positions of their last frames

A file that is there is complete: it is written under another name first. What is complete is not
done again, and an interrupted relaxation goes on with the batches that have no trajectories yet.
"""

from __future__ import annotations

import hashlib
import json
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ase.io
import numpy as np
import yaml
from fairchem.core.common.flags import flags

from fairchem_equiformer.errors import InputError
from fairchem_equiformer.fairchem1 import preflight
from fairchem_equiformer.files import replacing, write_json
from fairchem_equiformer.leaderboard import systems

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy.typing as npt
    from ase import Atoms
    from torch_geometric.data import Data

S2EF, RELAXED, TRAJECTORIES = "s2ef.npz", "relaxed.npz", "trajectories"
RECORD, CONFIG = "run.json", "config.yml"
# Keys of `fairchem` that are ours to give.
OURS = (
    "--mode",
    "--config-yml",
    "--checkpoint",
    "--run-dir",
    "--timestamp-id",
    "--submit",
    "--sweep-yml",
    "--dataset.test.src",
    "--dataset.relax.src",
    "--task.relax_opt.traj_dir",
)
SAME = ("trainer", "model", "outputs", "task")  # sections that decide on the results


class FailedError(Exception):
    """A step did not give what it should. The message is one line, written for the user."""


@dataclass(frozen=True)
class Split:
    """A folder, and the model whose results it takes.

    Attributes:
        folder: where the results of one test set go.
        config: the .yml file of the model.
        checkpoint: its weights.
        options: further ones for `fairchem`: `--cpu`, `--optim.eval_batch_size=8`, ...
    """

    folder: Path
    config: Path
    checkpoint: Path
    options: tuple[str, ...] = ()

    def predict(self, src: str) -> Path:
        """Predict energies and forces of an S2EF test set; return the file of predictions.

        Raises:
            InputError: bad input, or a folder with results of other input.
            FailedError: `fairchem` failed.
        """
        path = self.folder / S2EF
        self._begin("s2ef", src, "test")
        if path.exists():
            _say(f"{path} is complete")
            return path
        self._fairchem("predict", "s2ef", f"--dataset.test.src={src}")
        found = sorted((self.folder / "results" / "s2ef").glob("*_predictions.npz"))
        if len(found) != 1:
            raise FailedError(f"fairchem ended well, but left {len(found)} files of predictions")
        return found[0].replace(path)

    def relax(self, src: str) -> Path:
        """Relax the initial structures of an IS2RE test set; return the file of relaxed ones.

        Raises:
            InputError: bad input, or a folder with results of other input.
            FailedError: `fairchem` failed, or left systems out.
        """
        path = self.folder / RELAXED
        data_format = self._begin("is2re", src, "relax")
        if path.exists():
            _say(f"{path} is complete")
            return path
        folder = (self.folder / TRAJECTORIES).resolve()
        _remove_unfinished(folder)
        wanted = systems.rows("IS2RS", src, data_format)
        if _missing(folder, wanted):
            options = f"--dataset.relax.src={src}", f"--task.relax_opt.traj_dir={folder}"
            self._fairchem("run-relaxations", "is2re", *options)
        if missing := _missing(folder, wanted):
            raise FailedError(
                f"{len(missing)} of {len(wanted)} systems have no trajectory in {folder}, the "
                f"first is {missing[0]}; does task.num_relaxation_batches end the run early?"
            )
        with replacing(path) as partial:
            np.savez_compressed(partial, **relaxed_structures(folder, src, data_format))
        return path

    def _begin(self, part: str, src: str, split: str) -> str:
        """Check the input against what the folder holds; return the format of the data."""
        config = self._read_config()
        if not self.checkpoint.is_file():
            raise InputError(f"--checkpoint: no such file: {self.checkpoint}")
        data_format = systems.format_of(config, split)
        record = {
            "checkpoint": _digest(self.checkpoint),
            "config": {key: config[key] for key in SAME if key in config},
            "sources": {part: {"src": src, "format": data_format}},
        }
        record = json.loads(json.dumps(record, default=str))
        before = self._record_of_results()
        if found := differing(before or record, record):
            raise InputError(
                f"{self.folder} holds results of other input: {found}; "
                "give another --out, or remove that folder"
            )
        record["sources"] |= (before or record)["sources"]
        write_json(self.folder / RECORD, record)
        with replacing(self.folder / CONFIG) as partial:
            partial.write_text(yaml.safe_dump(config))
        return data_format

    def _read_config(self) -> dict[str, Any]:
        """The config with what it includes and overrides, less training data that are not here.

        fairchem opens the data of training whatever it runs, and needs nothing of them to predict.
        """
        if clash := [word.split("=")[0] for word in self.options if word.split("=")[0] in OURS]:
            raise InputError(f"{clash[0]} is set by this command; leave it out")
        words = ["--mode", "predict", "--config-yml", str(self.config), *self.options]
        _, overrides = flags.get_parser().parse_known_args(words)
        config = preflight.read_config(self.config, overrides)
        if not isinstance(config.get("dataset"), dict):
            raise InputError(f"{self.config}: dataset is no mapping with train, val, ...")
        for name in ("train", "val"):
            given = config["dataset"].get(name) or {}
            if isinstance(given.get("src"), str) and not Path(given["src"]).exists():
                del given["src"]
        return config

    def _record_of_results(self) -> dict[str, Any] | None:
        """What an earlier run recorded of the results that are there; None if there are none."""
        path = self.folder / RECORD
        if not path.exists():
            return None
        record = json.loads(path.read_text())
        relaxed = (self.folder / RELAXED).exists()
        done = {
            "s2ef": (self.folder / S2EF).exists(),
            "is2re": relaxed or any((self.folder / TRAJECTORIES).glob("*.traj")),
        }
        record["sources"] = {part: src for part, src in record["sources"].items() if done[part]}
        return record if record["sources"] else None

    def _fairchem(self, mode: str, name: str, *options: str) -> None:
        words = ["main", "--mode", mode, "--config-yml", str(self.folder / CONFIG)]
        words += ["--checkpoint", str(self.checkpoint), "--run-dir", str(self.folder)]
        words += ["--timestamp-id", name, *options, *self.options]
        _say(f"fairchem {shlex.join(words)}")
        if status := start(words):
            raise FailedError(f"fairchem --mode {mode} ended with status {status}; see above")


def start(words: Sequence[str]) -> int:
    """Run the `fairchem` command in a process of its own and return its exit status."""
    return subprocess.call([sys.executable, "-m", "fairchem_equiformer", *words])  # noqa: S603


def relaxed_structures(
    folder: Path, src: str, data_format: str
) -> dict[str, npt.NDArray[np.generic]]:
    """Energies and positions at the end of each relaxation.

    Trajectories have their atoms wrapped into the cell; here they are those nearest to where they
    began.

    Args:
        folder: with ``<sid>.traj`` of each system.
        src: the initial structures.
        data_format: of the initial structures.

    Returns:
        ids [N], energy [N] in eV, pos [atoms of all, 3] in Angstrom and chunk_idx [N - 1].

    Raises:
        FailedError: a trajectory cannot be read, or belongs to another system.
    """
    ids, energy, pos = [], [], []
    for data in systems.read(src, data_format):
        final = last_frame(folder, data)
        begin = data.pos.numpy().astype(np.float64)
        moved = systems.fold(final.positions - begin, final.cell.array)
        ids.append(systems.name(data, frame=False))
        energy.append(final.get_potential_energy())
        pos.append((begin + moved).astype(np.float32))
    return {
        "ids": np.array(ids),
        "energy": np.array(energy),
        "pos": np.concatenate(pos),
        "chunk_idx": np.cumsum([len(one) for one in pos])[:-1],
    }


def last_frame(folder: Path, data: Data) -> Atoms:
    """The end of a system's relaxation, with the model's energy and forces.

    Raises:
        FailedError: it cannot be read, or is of another system.
    """
    path = folder / f"{systems.name(data, frame=False)}.traj"
    try:
        atoms = ase.io.read(path, index=-1)
    except Exception as error:  # whatever ASE meets in a damaged file
        reason = str(error) or type(error).__name__
        raise FailedError(f"cannot read {path} ({reason}); remove it and run again") from error
    if atoms.numbers.tolist() != data.atomic_numbers.long().tolist():
        raise FailedError(f"{path} has other atoms than system {path.stem} of the data")
    return atoms


def _remove_unfinished(folder: Path) -> None:
    """Remove trajectories that an interrupted run left without a frame."""
    for path in folder.glob("*.traj"):
        try:
            with ase.io.Trajectory(path) as frames:
                empty = len(frames) == 0
        except Exception:  # noqa: BLE001  # ASE raises InvalidULMFileError and others
            empty = True
        if empty:
            path.unlink()


def _missing(folder: Path, names: dict[str, int]) -> list[str]:
    return [name for name in names if not (folder / f"{name}.traj").exists()]


def _digest(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def differing(before: dict[str, Any], now: dict[str, Any], where: str = "") -> str:
    """The first key in which two records differ, with both values; empty if there is none."""
    for key in sorted(before.keys() | now.keys()):
        name = f"{where}.{key}".lstrip(".")
        if where == "sources" and not (key in before and key in now):
            continue  # the part that is new, or not asked for this time
        old, new = before.get(key), now.get(key)
        if isinstance(old, dict) and isinstance(new, dict):
            if deeper := differing(old, new, name):
                return deeper
        elif old != new:
            return f"{name} was {old}, now {new}"
    return ""


def _say(text: str) -> None:
    print(f"== {text}", flush=True)  # noqa: T201
