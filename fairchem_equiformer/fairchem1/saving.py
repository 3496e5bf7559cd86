"""Checkpoints that are whole at each moment, and are looked at before they are loaded.

fairchem-core writes a checkpoint over the one before: who is killed while it writes has neither.
Here it is written beside, and the state of training (``checkpoint.pt``) is kept once more, as
``checkpoint.previous.pt``.

The files are those of ``torch.save``, zip archives that hold a CRC-32 of each tensor. torch does
not compare it when it loads; `damage` does.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar
from zipfile import ZipFile, is_zipfile

import torch
from fairchem.core.common import distutils
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from fairchem_equiformer import files
from fairchem_equiformer.errors import InputError, StoppedError

if TYPE_CHECKING:
    from collections.abc import Callable

logger = logging.getLogger(__name__)

T = TypeVar("T")

LATEST = "checkpoint.pt"
PREVIOUS = "checkpoint.previous.pt"

DOS_FOLDER = 0x10  # attribute of an entry in a zip archive


def save_checkpoint(
    state: dict[str, Any],
    checkpoint_dir: str = "checkpoints/",
    checkpoint_file: str = LATEST,
) -> str:
    """Write a checkpoint, whole or not at all; in place of fairchem-core's function.

    Returns:
        The path.

    Raises:
        StoppedError: if it cannot be written; what was there before is in place.
    """
    path = Path(checkpoint_dir, checkpoint_file)
    before = path.with_name(PREVIOUS) if path.name == LATEST else None
    try:
        # torch's own writer, given a path, does not say why it could not write.
        with files.keeping_the_one_before(path, before) as file:
            torch.save(state, file)
    except OSError as error:
        kept = "the checkpoint before it is in place" if path.exists() else "there is none before"
        raise StoppedError(f"{path} cannot be written: {error.strerror}; {kept}") from error
    return str(path)


def damage(path: Path) -> str | None:
    """Read all of a checkpoint and compare its checksums.

    Returns:
        What is wrong with it; None if nothing is, and for files by torch before 1.6, which hold
        no checksums.
    """
    if not path.is_file():
        return "no such file"
    with path.open("rb") as file:
        start = file.read(4)
    if not start:
        return "the file is empty"
    try:
        if not is_zipfile(path):
            if b"PK\x03\x04".startswith(start):
                return "the file is cut short"
            return None if start.startswith(b"\x80") else "it is no file of torch.save"
        wrong = _wrong_record(path)
    except Exception as error:  # noqa: BLE001  # damaged headers trip zipfile in many ways
        return f"the file is damaged: {' '.join(str(error).split())}"
    return None if wrong is None else f"the checksum of {wrong} in it is wrong"


def _wrong_record(path: Path) -> str | None:
    """Name of a record of an archive that is not what was written, if one is found."""
    with ZipFile(path) as archive:
        for record in archive.infolist():
            if record.external_attr & DOS_FOLDER:  # torch would not read its content
                return record.filename
        wrong = archive.testzip()
    # torch reads some fields of the archive that Python does not.
    reader: Any = torch._C.PyTorchFileReader(str(path))  # noqa: SLF001
    for name in reader.get_all_records():
        reader.get_record_offset(name)
    return wrong


def newest_good(path: Path) -> tuple[Path, str | None]:
    """The checkpoint at a path, or the one kept before it if that is damaged.

    Returns:
        What to load; and what is wrong with the one at `path`, if it is not that.

    Raises:
        InputError: if neither is good.
    """
    reason = damage(path)
    if reason is None:
        return path, None
    if path.name != LATEST:
        raise InputError(f"the checkpoint {path} cannot be read: {reason}; copy it again")
    before = path.with_name(PREVIOUS)
    if reason_before := damage(before):
        raise InputError(
            f"the checkpoint {path} cannot be read: {reason}; nor the one kept before it, "
            f"{before}: {reason_before}. Start from another one by --checkpoint"
        )
    return before, reason


def load_newest_good(original: Callable[..., None]) -> Callable[..., None]:
    """For ``BaseTrainer.load_checkpoint``: of a damaged checkpoint, load the one before.

    And put the schedule where the step is. fairchem-core saves after a step's update and before
    the schedule's, so that a resumed training was one step behind.
    """

    def load_checkpoint(
        self: Any,
        checkpoint_path: str,
        checkpoint: dict[str, Any] | None = None,
        inference_only: bool = False,
    ) -> None:
        if checkpoint is None:
            path = Path(checkpoint_path)
            checkpoint_path = on_first_rank(lambda: _choose(path), self.device)
        original(self, checkpoint_path, checkpoint, inference_only)
        if not inference_only:
            _catch_up(self)

    return load_checkpoint


def _choose(path: Path) -> str:
    """Path of the newest good checkpoint, with a warning if it is not the newest."""
    good, reason = newest_good(path)
    if reason is not None:
        logger.warning("%s cannot be read (%s): taking %s, the one before it", path, reason, good)
    return str(good)


def on_first_rank(look: Callable[[], T], device: torch.device) -> T:
    """What one rank found out, on all of them.

    Raises:
        InputError: on all ranks, if it did there.
    """
    found: list[Any] = [None]
    if distutils.is_master():
        try:
            found = [look()]
        except InputError as error:
            found = [error]
    distutils.broadcast_object_list(found, src=0, device=device)
    if isinstance(found[0], InputError):
        raise found[0]
    return found[0]


def _catch_up(trainer: Any) -> None:
    """Let a schedule that counts steps make the one that it missed."""
    scheduler: Any = getattr(getattr(trainer, "scheduler", None), "scheduler", None)
    counts_steps = isinstance(scheduler, LRScheduler) and not isinstance(
        scheduler, ReduceLROnPlateau
    )
    if counts_steps and scheduler.last_epoch == trainer.step - 1:
        scheduler.step()
