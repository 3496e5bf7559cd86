"""A run resumes itself, and no other: ids that differ, and configs that do not."""

from __future__ import annotations

import logging
import secrets
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from fairchem.core.common import distutils

from fairchem_equiformer import checkpoints
from fairchem_equiformer.errors import InputError
from fairchem_equiformer.fairchem1 import saving, slurm

if TYPE_CHECKING:
    from collections.abc import Callable

logger = logging.getLogger(__name__)

SWITCH = "resume_changed"  # under `task`: resume although the config has changed
TRUSTED = "trusted"  # under `task`: checkpoints may have anything called when they are read
# What may change without a word: where and how often things are written, and on what they run.
FREE = frozenset(
    {
        *("slurm", "logger", f"task.{SWITCH}", f"task.{TRUSTED}"),
        *(f"cmd.{key}" for key in ("identifier", "print_every", "timestamp_id", "commit")),
        *(f"cmd.{key}" for key in ("version", "checkpoint_dir", "results_dir", "logs_dir")),
        *(f"optim.{key}" for key in ("num_workers", "eval_every", "checkpoint_every")),
        *(f"optim.{key}" for key in ("eval_batch_size", "nonfinite")),
    }
)
EXIT_BAD_INPUT = 2


def unique_id(_: Any) -> Callable[[torch.device, str | None], str]:
    """For ``BaseTrainer._get_timestamp``: the second, and three random bytes."""

    def timestamp(device: torch.device, suffix: str | None) -> str:
        now = datetime.now().astimezone().strftime("%Y-%m-%d-%H-%M-%S")
        made = f"{now}-{secrets.token_hex(3)}"
        name = saving.on_first_rank(lambda: made, device)
        return f"{name}-{suffix}" if suffix else name

    return timestamp


def resume_only_the_same(original: Callable[[Any, Any], None]) -> Callable[[Any, Any], None]:
    """For ``BaseTask.setup``: resume under an id only what this config began.

    A checkpoint named by ``--checkpoint`` is the user's choice, and loaded whatever its config;
    but not in a job that Slurm has restarted, which goes on where it was.
    """

    def setup(self: Any, trainer: Any) -> None:
        try:
            saved = Path(trainer.config["cmd"]["checkpoint_dir"], saving.LATEST)
            if slurm.restarted() and self.config["mode"] == "train" and saved.is_file():
                self.config["checkpoint"] = None
            if self.config["checkpoint"] is None:
                saving.on_first_rank(lambda: _compare(trainer), trainer.device)
            original(self, trainer)
        except InputError as error:
            if distutils.is_master():
                logger.error("%s", error)  # noqa: TRY400  # the line says all
            distutils.cleanup()
            raise SystemExit(EXIT_BAD_INPUT) from None

    return setup


def _compare(trainer: Any) -> None:
    """Look whether the checkpoint under a trainer's id, if there is one, has its config.

    Raises:
        InputError: if it has not, and nothing says to resume all the same.
    """
    path = Path(trainer.config["cmd"]["checkpoint_dir"], saving.LATEST)
    if not path.is_file():
        return
    good, _ = saving.newest_good(path)
    saved = checkpoints.read(good, trusted=trusted(trainer.config), mapped=True)
    changes = changed(saved.get("config") or {}, trainer.config)
    if not changes:
        return
    named = "; ".join(changes)
    if not (trainer.config.get("task") or {}).get(SWITCH):
        raise InputError(
            f"{path} is there already, of a training with another config: {named}. Resume it all "
            f"the same with --task.{SWITCH}=True, or start anew with another --timestamp-id"
        )
    logger.warning("resuming %s with a changed config: %s", path, named)


def trusted(config: dict[str, Any]) -> bool:
    """Whether a config says that its checkpoints may ask for more than plain data."""
    return bool((config.get("task") or {}).get(TRUSTED))


def changed(before: Any, now: Any) -> list[str]:
    """What differs between two configs of trainers, key by key."""
    left, right = _flat(before), _flat(now)
    return [
        f"{key} was {left.get(key, 'not set')} and is {right.get(key, 'not set')}"
        for key in sorted({*left, *right})
        if left.get(key) != right.get(key)
    ]


def _flat(config: Any, prefix: str = "") -> dict[str, Any]:
    """Values by dotted keys, without those that are free to change."""
    found: dict[str, Any] = {}
    for name, value in config.items():
        key = f"{prefix}{name}"
        if key in FREE:
            continue
        if isinstance(value, dict):
            found |= _flat(value, f"{key}.")
        else:
            found[key] = value
    return found
