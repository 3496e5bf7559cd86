"""EquiformerV2 in fairchem-core 1.10: registered models, the command, trainers and datasets.

Importing this registers the models and the loss, and changes in fairchem-core what ``patches``
lists.

Raises:
    ImportError: where another fairchem-core is installed, or none.
"""

from importlib import metadata

from fairchem_equiformer import fairchem1_installed

if not fairchem1_installed():
    try:
        _found = f"fairchem-core {metadata.version('fairchem-core')} is installed"
    except metadata.PackageNotFoundError:
        _found = "no fairchem-core is installed"
    raise ImportError(
        f"this needs fairchem-core 1.10, and {_found}: pip install"
        " 'fairchem-equiformer[fairchem1]' into an environment of its own. Without it there are"
        " fairchem_equiformer.models (PyTorch), .EquiformerCalculator (ASE), .torch_sim and"
        " .fairchem2"
    )

from fairchem_equiformer.fairchem1 import loss, models, patches  # noqa: F401

patches.install()
