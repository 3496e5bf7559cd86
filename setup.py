"""Puts the two files of `startup/` into site-packages; everything else stands in setup.cfg."""

from setuptools import Distribution, setup  # first: Python 3.12 has no distutils of its own

from distutils.command.install_data import install_data  # isort: skip


class InstallBesidePackages(install_data):
    """Installs data files where modules go: Python reads .pth files nowhere else."""

    def finalize_options(self) -> None:
        """Take the folder of modules for that of data, and the defaults for the rest."""
        self.set_undefined_options("install", ("install_lib", "install_dir"))
        super().finalize_options()


class DistributionWithData(Distribution):
    """Has the method that setuptools' editable install asks for before it installs data."""

    has_data = Distribution.has_data_files


setup(
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
