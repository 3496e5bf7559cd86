"""Put fairchem-core 1.10 right in every process of this environment.

fairchem-core imports each of its models before it runs, and stops if one of them cannot be
imported. Our own command could put that right for itself, but not for the processes that never see
it: fairchem-core's `fairchem`, Slurm jobs, the ranks of a distributed run. Python reads the .pth
file beside this module at start-up, and so all of them are served in one place, and `fairchem`
checks its input as `python -m fairchem_equiformer` does. In all of them, threads that wait go to
sleep (`fairchem_equiformer/threads.py`).
`FAIRCHEM_EQUIFORMER_PATCHES=off` in the environment turns it off; other versions of fairchem-core
are left alone.

Every start of Python pays for what stands at the top: hence no imports there but `sys`.
"""

from __future__ import annotations

import sys

TYPE_CHECKING = False  # typing's would cost its import
if TYPE_CHECKING:
    from collections.abc import Callable
    from importlib.machinery import ModuleSpec
    from pathlib import Path
    from types import ModuleType


def wanted() -> bool:
    """Whether this environment has fairchem-core 1.10, and nobody switched this off."""
    from fairchem_equiformer import patches_wanted  # noqa: PLC0415

    return patches_wanted()


def import_models_that_can_be(utils: ModuleType) -> None:
    """Exchange the function that imports one file of fairchem-core."""

    def import_local_file(path: Path, *, project_root: Path) -> None:
        # By then nothing is half imported, as it is while `utils` is.
        from fairchem_equiformer.fairchem1 import patches  # noqa: PLC0415

        patches.import_local_file(path, project_root=project_root)

    import_local_file.original = utils._import_local_file  # noqa: SLF001
    utils._import_local_file = import_local_file  # noqa: SLF001


def check_input(_: ModuleType) -> None:
    """Let fairchem-core's command be ours."""
    from fairchem_equiformer.fairchem1 import patches  # noqa: PLC0415

    patches.exchange_the_command()


def let_threads_sleep(_: ModuleType) -> None:
    """Do nothing more: `wanted` imported our package, which did it, before torch was imported."""


class Finder:
    """Finds a module as the finders after it do, and has something exchanged in it."""

    def __init__(self, target: str, exchange: Callable[[ModuleType], None]) -> None:
        self.target = target
        self.exchange = exchange

    def find_spec(self, name: str, *_: object) -> ModuleSpec | None:
        """Answer for the target; see `importlib.abc.MetaPathFinder`."""
        if name != self.target:
            return None
        from importlib.util import find_spec  # noqa: PLC0415

        sys.meta_path.remove(self)  # or it would be asked again
        try:
            spec = find_spec(name)
        finally:
            sys.meta_path.insert(0, self)  # who asked may only be looking
        if spec is None or spec.loader is None or not wanted():
            return spec
        loader = spec.loader
        run = loader.exec_module

        def run_and_exchange(module: ModuleType) -> None:
            run(module)
            if self in sys.meta_path:
                sys.meta_path.remove(self)
            self.exchange(module)

        loader.exec_module = run_and_exchange
        return spec


sys.meta_path.insert(0, Finder("fairchem.core", let_threads_sleep))
sys.meta_path.insert(0, Finder("fairchem.core.common.utils", import_models_that_can_be))
sys.meta_path.insert(0, Finder("fairchem.core._cli", check_input))
