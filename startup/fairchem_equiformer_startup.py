"""Let fairchem-core start without torch-sparse, in every process of this environment.

fairchem-core imports each of its models before it runs, and stops if one of them cannot be
imported. Our `fairchem` command could put that right for itself, but not for the processes that
never see it: fairchem-core's own script, Slurm jobs, the ranks of a distributed run. Python reads
the .pth file beside this module at start-up, and so all of them are served in one place.

Every start of Python pays for what stands at the top: hence no imports there but `sys`.
"""

from __future__ import annotations

import sys

TYPE_CHECKING = False  # typing's would cost its import
if TYPE_CHECKING:
    from importlib.machinery import ModuleSpec
    from pathlib import Path
    from types import ModuleType

TARGET = "fairchem.core.common.utils"


def import_local_file(path: Path, *, project_root: Path) -> None:
    """Stand in for fairchem-core's function of this name until its first call."""
    # By then nothing is half imported, as it is while `TARGET` is.
    from fairchem_equiformer import fairchem_setup  # noqa: PLC0415

    fairchem_setup.install()
    fairchem_setup.import_local_file(path, project_root=project_root)


class Finder:
    """Finds `TARGET` as the finders after it do, and has one function exchanged in it."""

    def find_spec(self, name: str, *_: object) -> ModuleSpec | None:
        """Answer for `TARGET`, once; see `importlib.abc.MetaPathFinder`."""
        if name != TARGET:
            return None
        from importlib.util import find_spec  # noqa: PLC0415

        sys.meta_path.remove(self)
        spec = find_spec(name)
        if spec is None or spec.loader is None:
            return spec
        loader = spec.loader
        run = loader.exec_module

        def run_and_exchange(module: ModuleType) -> None:
            run(module)
            module._import_local_file = import_local_file  # noqa: SLF001

        loader.exec_module = run_and_exchange
        return spec


sys.meta_path.insert(0, Finder())
