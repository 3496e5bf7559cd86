"""What setup.cfg cannot say: the two files of `startup/`, and the compiled kernels."""

import platform
import runpy
from pathlib import Path

# First setuptools: Python 3.12 has no distutils of its own.
from setuptools import Distribution, Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

from distutils.command.install_data import install_data  # isort: skip

# Without AVX-512, vectors of 16 floats go through memory. Written by 16 bytes, as gcc does alone,
# and read by 32, each waits for its write: the S2 activation took twice as long.
MOVES = ("-mmove-max=256", "-mstore-max=256")
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


class BuildKernels(build_ext):
    """Builds a library that ctypes loads: of no Python, and of no version of torch."""

    def get_ext_filename(self, fullname: str) -> str:
        """Name the library as the loader looks for it, without a version of Python."""
        return str(Path(*fullname.split(".")).with_suffix(".so"))

    def build_extension(self, ext: Extension) -> None:
        """Link an empty libtorch_cpu.so in place of torch's, of which the name is all we need."""
        folder = Path(self.build_temp)
        folder.mkdir(parents=True, exist_ok=True)
        empty = folder / "empty.cpp"
        empty.write_text("")
        name = "libtorch_cpu.so"
        self.compiler.link_shared_object(
            self.compiler.compile([str(empty)], output_dir=str(folder)),
            str(folder / name),
            extra_postargs=[f"-Wl,-soname,{name}"],
        )
        ext.library_dirs.append(str(folder))
        ext.extra_compile_args += [flag for flag in MOVES if self.takes(flag, empty)]
        super().build_extension(ext)

    def takes(self, flag: str, source: Path) -> bool:
        """Whether the compiler knows a flag."""
        try:
            self.compiler.compile(
                [str(source)], output_dir=self.build_temp, extra_postargs=["-Werror", flag]
            )
        except CompileError:
            return False
        return True


class WheelForEveryPython(bdist_wheel):
    """Names a wheel by its platform alone."""

    def get_tag(self) -> tuple[str, str, str]:
        """Python, ABI and platform."""
        return "py3", "none", super().get_tag()[2]


def kernels() -> Extension:
    """Describe the library of ops/native; where it cannot be built, the package works without."""
    flags = ["-std=c++17", "-O3", "-ffast-math", "-fopenmp", "-Wno-psabi"]
    flags.append("-fno-associative-math")  # the sigmoid rounds by adding a large number
    if platform.machine() == "x86_64":
        flags.append("-mrecip=vec-div")
    # The file by itself: importing the package imports what it needs at run time.
    fingerprint = runpy.run_path(str(KERNELS / "sources.py"))["fingerprint"](KERNELS)
    return Extension(
        "fairchem_equiformer.ops.native._kernels",
        sources=sorted(map(str, KERNELS.glob("*.cpp"))),
        depends=[*sorted(map(str, KERNELS.glob("*.h"))), str(KERNELS / "sources.py")],
        define_macros=[("BUILT_FROM", f'"{fingerprint}"')],
        extra_compile_args=flags,
        # OpenMP is torch's own, found through it: a second one would spin on the same cores.
        # Not -fopenmp here, which links another, nor -ffast-math, which changes the process.
        extra_link_args=["-Wl,--no-as-needed", "-ltorch_cpu"],
        optional=True,
    )


setup(
    ext_modules=[kernels()],
    distclass=DistributionWithData,
    cmdclass={
        "bdist_wheel": WheelForEveryPython,
        "build_ext": BuildKernels,
        "install_data": InstallBesidePackages,
    },
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
