"""Which sources the compiled kernels were built from; setup.py runs this file by itself."""

from __future__ import annotations

import hashlib
from pathlib import Path


def fingerprint(folder: Path) -> str | None:
    """Hash of the C++ sources in a folder; None where there are none, as in a wheel."""
    sources = sorted([*folder.glob("*.cpp"), *folder.glob("*.h")])
    digest = hashlib.sha256()
    for source in sources:
        digest.update(f"{source.name}\n".encode() + source.read_bytes())
    return digest.hexdigest()[:16] if sources else None
