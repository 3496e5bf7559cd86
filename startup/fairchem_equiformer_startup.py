"""Let fairchem-core start without torch-sparse, in every process of this environment.

fairchem-core imports each of its models before it runs, and stops if one of them cannot be
imported. Our `fairchem` command could put that right for itself, but not for the processes that
never see it: fairchem-core's own script, Slurm jobs, the ranks of a distributed run. Python reads
the .pth file beside this module at start-up, and so all of them are served in one place.

Only the standard library is imported, since every start of Python pays for it.
"""

from __future__ import annotations

import sys
from importlib.abc import Loader, MetaPathFinder
from importlib.util import find_spec
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence
    from importlib.machinery import ModuleSpec
    from pathlib import Path
    from types import ModuleType

TARGET = "fairchem.core.common.utils"


def import_local_file(path: Path, *, project_root: Path) -> None:
    """Stand in for fairchem-core's function of this name until its first call."""
    # Not at the top: at start-up it would import torch, and here nothing is half imported.
    from fairchem_equiformer import fairchem_setup  # noqa: PLC0415

    fairchem_setup.install()
    fairchem_setup.import_local_file(path, project_root=project_root)


class _PatchingLoader(Loader):
    """Runs a module as its own loader does, then exchanges the one function."""

    def __init__(self, loader: Loader) -> None:
        self.loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self.loader.exec_module(module)
        module._import_local_file = import_local_file  # noqa: SLF001


class _Finder(MetaPathFinder):
    """Finds `TARGET` once, as the finders after it do, and wraps its loader."""

    def find_spec(
        self,
        fullname: str,
        path: Sequence[str] | None = None,  # noqa: ARG002
        target: ModuleType | None = None,  # noqa: ARG002
    ) -> ModuleSpec | None:
        if fullname != TARGET:
            return None
        sys.meta_path.remove(self)
        spec = find_spec(fullname)
        if spec is not None and spec.loader is not None:
            spec.loader = _PatchingLoader(spec.loader)
        return spec


sys.meta_path.insert(0, _Finder())
