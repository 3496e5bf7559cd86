"""Files that are complete wherever they exist, and names that are one folder or file each."""

from __future__ import annotations

import json
import os
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

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
