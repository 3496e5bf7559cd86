"""What setup.cfg cannot say: the two files of `startup/`, and the compiled kernels."""

import platform
import runpy
from pathlib import Path

# First setuptools: Python 3.12 has no distutils of its own.
from setuptools import Distribution, Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

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
        super().build_extension(ext)


class WheelForEveryPython(bdist_wheel):
    """Names a wheel by its platform alone."""

    def get_tag(self) -> tuple[str, str, str]:
        """Python, ABI and platform."""
        return "py3", "none", super().get_tag()[2]


def kernels() -> list[Extension]:
    """Describe the libraries of ops/native; where one cannot be built, the package does without.

    One is for any processor, and knows which of the others, each for a generation of x86-64 and
    those after it, the loader is to take.
    """
    flags = ["-std=c++17", "-O3", "-ffast-math", "-fopenmp", "-Wno-psabi"]
    flags.append("-fno-associative-math")  # the sigmoid rounds by adding a large number
    generations = {"": []}
    if platform.machine() == "x86_64":
        flags.append("-mrecip=vec-div")
        generations |= {f"_v{number}": [f"-march=x86-64-v{number}"] for number in (3, 4)}
    # The file by itself: importing the package imports what it needs at run time.
    fingerprint = runpy.run_path(str(KERNELS / "sources.py"))["fingerprint"](KERNELS)
    return [
        Extension(
            f"fairchem_equiformer.ops.native._kernels{name}",
            sources=sorted(map(str, KERNELS.glob("*.cpp"))),
            depends=[*sorted(map(str, KERNELS.glob("*.h"))), str(KERNELS / "sources.py")],
            define_macros=[("BUILT_FROM", f'"{fingerprint}"')],
            extra_compile_args=[*flags, *generation],
            # OpenMP is torch's own, found through it: a second one would spin on the same cores.
            # Not -fopenmp here, which links another, nor -ffast-math, which changes the process.
            extra_link_args=["-Wl,--no-as-needed", "-ltorch_cpu"],
            optional=True,
        )
        for name, generation in generations.items()
    ]


setup(
    ext_modules=kernels(),
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
