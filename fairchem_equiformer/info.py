"""What runs here, as plain text for a bug report: ``python -m fairchem_equiformer.info``.

It works in every environment that has this package, and imports no framework.
"""

from __future__ import annotations

import argparse
import os
import platform
import sys
from importlib import metadata

from fairchem_equiformer import __version__, fairchem1_installed, patches_wanted
from fairchem_equiformer.threads import waiting

DISTRIBUTIONS = (
    *("torch", "e3nn", "numpy", "ase", "scipy", "triton"),
    *("fairchem-core", "torch-geometric", "torch-scatter", "torch-sim-atomistic"),
)
STARTUP = "fairchem_equiformer_startup"  # imported by a .pth file where it is installed


def report() -> dict[str, str]:
    """Versions, devices, threads, kernels and changes to fairchem-core, by what they are of."""
    lines = {
        "fairchem-equiformer": __version__,
        "Python": f"{platform.python_version()}, {platform.platform()}",
    }
    lines |= {name: _version(name) for name in DISTRIBUTIONS}
    try:
        lines |= _of_torch()
    except (ImportError, OSError) as error:
        lines["torch"] += f", which cannot be imported: {error}"
    try:
        lines["changes to fairchem"] = _changes_to_fairchem()
    except ValueError as error:
        lines["changes to fairchem"] = f"none can be made: {error}"
    return lines


def _version(distribution: str) -> str:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return "not installed"


def _of_torch() -> dict[str, str]:
    """What only torch knows.

    Raises:
        ImportError: if there is none.
        OSError: if its libraries cannot be loaded.
    """
    import torch  # noqa: PLC0415  # the rest is worth showing without it

    from fairchem_equiformer.ops.native import loader  # noqa: PLC0415

    devices = [
        f"CPU ({torch.backends.cpu.get_cpu_capability()})",
        *(
            f"{torch.cuda.get_device_name(index)} (CUDA {torch.version.cuda})"
            for index in range(torch.cuda.device_count())
        ),
    ]
    asked = os.environ.get("OMP_NUM_THREADS")
    threads = f"{torch.get_num_threads()} of {os.cpu_count()} cores"
    return {
        "torch": torch.__version__,  # with the variant, as in 2.13.0+cpu
        "devices": ", ".join(devices),
        "threads": threads + (f", OMP_NUM_THREADS={asked}" if asked else ""),
        "waiting threads": waiting(),
        "kernels on the CPU": loader.status(),
    }


def _changes_to_fairchem() -> str:
    if not fairchem1_installed():
        return "none, there is no fairchem-core 1.10"
    if not patches_wanted():
        return "switched off by FAIRCHEM_EQUIFORMER_PATCHES"
    if STARTUP not in sys.modules:
        return "in processes that import this package: its start-up hook is not installed"
    return "made (fairchem_equiformer/fairchem1/patches.py)"


def main(argv: list[str] | None = None) -> int:
    """Print the report."""
    argparse.ArgumentParser(
        prog="python -m fairchem_equiformer.info",
        description="Print versions, devices, kernels and changes to fairchem-core, to be pasted "
        "into a bug report.",
    ).parse_args(argv)
    lines = report()
    width = max(map(len, lines))
    for name, value in lines.items():
        print(f"{name:{width}}  {value}")  # noqa: T201
    return 0


if __name__ == "__main__":
    sys.exit(main())
