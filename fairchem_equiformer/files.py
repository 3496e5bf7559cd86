"""Files that are complete wherever they exist, and names that are one folder or file each."""

from __future__ import annotations

import json
import os
import shutil
from contextlib import contextmanager
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from fairchem_equiformer.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Iterator


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary name beside `path`; what was written there takes its place at the end."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # Named by the process: another shard may write beside it.
    partial = path.with_name(f".{os.getpid()}.{path.name}")
    try:
        yield partial
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def keeping_the_one_before(path: Path, before: Path | None) -> Iterator[IO[bytes]]:
    """Yield a file that takes the place of `path` once it is on the disk, whole.

    There is a whole file at `path` at each moment, if there was one. One process writes a path at
    a time; what it leaves behind when it is killed, the next one overwrites.

    Args:
        path: in a folder that exists or is made.
        before: where the file that was at `path` is kept; it is lost if None.

    Raises:
        OSError: if it cannot be written; `path` and `before` are as they were.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    try:
        with partial.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        if before is not None and path.exists():
            _second_name(path, before)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    _sync_folder(path.parent)


def _second_name(path: Path, name: Path) -> None:
    """Let a file have another name, too; a copy where the file system knows no links."""
    partial = name.with_name(f".{name.name}.partial")
    partial.unlink(missing_ok=True)
    try:
        os.link(path, partial)
    except OSError:
        shutil.copyfile(path, partial)
    partial.replace(name)


def _sync_folder(folder: Path) -> None:
    """Wait until the names in a folder are on the disk."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_json(path: Path, content: Any) -> None:
    """Write JSON, whole or not at all."""
    with replacing(path) as partial:
        partial.write_text(json.dumps(content, indent=1) + "\n")


def read_json(path: Path, made_by: str) -> Any:
    """Read JSON.

    Args:
        path: the file.
        made_by: the command that writes it, for the message.

    Raises:
        InputError: if there is none, or it is not JSON.
    """
    if not path.is_file():
        raise InputError(f"no such file: {path}; `{made_by}` writes it")
    try:
        return json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise InputError(f"{path}: not JSON ({error}); write it anew by `{made_by}`") from error
