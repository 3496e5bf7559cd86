"""What setup.cfg cannot say: the two files of `startup/`, and the compiled kernels."""

import platform
import runpy
from pathlib import Path

# First setuptools: Python 3.12 has no distutils of its own.
from setuptools import Distribution, Extension, setup

from distutils.command.install_data import install_data  # isort: skip

KERNELS = Path("fairchem_equiformer/ops/native")


class InstallBesidePackages(install_data):
    """Installs data files where modules go: Python reads .pth files nowhere else."""

    def finalize_options(self) -> None:
        """Take the folder of modules for that of data, and the defaults for the rest."""
        self.set_undefined_options("install", ("install_lib", "install_dir"))
        super().finalize_options()


class DistributionWithData(Distribution):
    """Has the method that setuptools' editable install asks for before it installs data."""

    has_data = Distribution.has_data_files


def kernels() -> list[Extension]:
    """Describe the library of ops/native; where it cannot be built, the package works without."""
    try:
        import torch  # noqa: PLC0415  # not there yet in an isolated build
    except ImportError:
        return []
    flags = ["-std=c++17", "-O3", "-ffast-math", "-fopenmp", "-Wno-psabi"]
    flags.append("-fno-associative-math")  # the sigmoid rounds by adding a large number
    if platform.machine() == "x86_64":
        flags.append("-mrecip=vec-div")
    # The file by itself: importing the package imports what it needs at run time.
    fingerprint = runpy.run_path(str(KERNELS / "sources.py"))["fingerprint"](KERNELS)
    return [
        Extension(
            "fairchem_equiformer.ops.native._kernels",
            sources=sorted(map(str, KERNELS.glob("*.cpp"))),
            depends=[*sorted(map(str, KERNELS.glob("*.h"))), str(KERNELS / "sources.py")],
            define_macros=[("BUILT_FROM", f'"{fingerprint}"')],
            extra_compile_args=flags,
            # OpenMP is torch's own, found through it: a second one would spin on the same cores.
            # Not -fopenmp here, which links another, nor -ffast-math, which changes the process.
            extra_link_args=["-Wl,--no-as-needed", "-ltorch_cpu"],
            library_dirs=[str(Path(torch.__file__).parent / "lib")],
            optional=True,
        )
    ]


setup(
    ext_modules=kernels(),
    distclass=DistributionWithData,
    cmdclass={"install_data": InstallBesidePackages},
    data_files=[
        (
            "",
            [
                "startup/fairchem_equiformer_startup.pth",
                "startup/fairchem_equiformer_startup.py",
            ],
        )
    ],
)
