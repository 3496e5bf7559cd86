"""fairchem-core's other models at published sizes: how ours compares with more than its stock.

They have weights of their own, so their results say nothing about ours; their time and memory do.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

PYTHON2 = Path(__file__).parents[1] / ".venv-fairchem2/bin/python"  # by `make install-fairchem2`
MODELS = "fairchem.core.models"
NO_SEARCH = {"neighbors": "it has no search of its own; fairchem's is measured as that of stock"}


@dataclass(frozen=True)
class Context:
    """A model of fairchem-core that predicts energy and forces.

    Attributes:
        model: Class, with its module.
        size: Number of parameters, as tables have it.
        config: Arguments of the class.
        packages: What it imports beyond fairchem-core's requirements: module to distribution.
        cannot: Tasks that it cannot do, and why.
        fairchem: Major version of fairchem-core that has it: 1, or 2 in an environment of its own.
    """

    model: str
    size: str
    config: dict[str, Any]
    packages: dict[str, str] = field(default_factory=dict)
    cannot: dict[str, str] = field(default_factory=NO_SEARCH.copy)
    fairchem: int = 1


CONTEXT = {
    # configs/oc20/s2ef/all/escn/eSCN-L6-M2-Lay12-All-MD.yml of fairchem: 51,844,608 parameters.
    "escn": Context(
        model=f"{MODELS}.escn.escn.eSCN",
        size="52M",
        config={
            "num_layers": 12,
            "max_neighbors": 20,
            "cutoff": 12.0,
            "sphere_channels": 128,
            "hidden_channels": 256,
            "lmax_list": [6],
            "mmax_list": [2],
            "num_sphere_samples": 128,
            "distance_function": "gaussian",
            "basis_width_scalar": 2.0,
            "regress_forces": True,
            "use_pbc": True,
            "otf_graph": True,
        },
        cannot=NO_SEARCH
        | {"relaxation": "untrained, it predicts forces too small for LBFGS to take a step"},
    ),
    # configs/oc20/s2ef/all/gemnet/gemnet-oc.yml of fairchem, without its file of scale factors.
    "gemnet_oc": Context(
        model=f"{MODELS}.gemnet_oc.gemnet_oc.GemNetOC",
        size="39M",
        config={
            "num_spherical": 7,
            "num_radial": 128,
            "num_blocks": 4,
            "emb_size_atom": 256,
            "emb_size_edge": 512,
            "emb_size_trip_in": 64,
            "emb_size_trip_out": 64,
            "emb_size_quad_in": 32,
            "emb_size_quad_out": 32,
            "emb_size_aint_in": 64,
            "emb_size_aint_out": 64,
            "emb_size_rbf": 16,
            "emb_size_cbf": 16,
            "emb_size_sbf": 32,
            "num_before_skip": 2,
            "num_after_skip": 2,
            "num_concat": 1,
            "num_atom": 3,
            "num_output_afteratom": 3,
            "num_atom_emb_layers": 2,
            "num_global_out_layers": 2,
            "cutoff": 12.0,
            "cutoff_qint": 12.0,
            "cutoff_aeaint": 12.0,
            "cutoff_aint": 12.0,
            "max_neighbors": 30,
            "max_neighbors_qint": 8,
            "max_neighbors_aeaint": 20,
            "max_neighbors_aint": 1000,
            "rbf": {"name": "gaussian"},
            "envelope": {"name": "polynomial", "exponent": 5},
            "cbf": {"name": "spherical_harmonics"},
            "sbf": {"name": "legendre_outer"},
            "extensive": True,
            "output_init": "HeOrthogonal",
            "activation": "silu",
            "regress_forces": True,
            "direct_forces": True,
            "forces_coupled": False,
            "quad_interaction": True,
            "atom_edge_interaction": True,
            "edge_atom_interaction": True,
            "atom_interaction": True,
            "qint_tags": [1, 2],
            "otf_graph": True,
        },
        packages={"torch_sparse": "torch-sparse"},
    ),
    # eSEN-30M-OAM (arXiv:2502.12147), less the stress: 30,161,153 parameters, forces by gradient.
    # fairchem has no config of an eSEN for OC20.
    "esen": Context(
        model=f"{MODELS}.base.HydraModel",
        size="30M",
        config={
            "backbone": {
                "model": f"{MODELS}.esen.esen.eSEN_Backbone",
                "max_num_elements": 100,
                "num_layers": 10,
                "sphere_channels": 128,
                "hidden_channels": 128,
                "edge_channels": 128,
                "lmax": 3,
                "mmax": 2,
                "cutoff": 6.0,
                "max_neighbors": 300,
                "distance_function": "gaussian",
                "num_distance_basis": 64,
                "norm_type": "rms_norm_sh",
                "act_type": "gate",
                "mlp_type": "spectral",
                "use_envelope": True,
                "regress_forces": True,
                "direct_forces": False,
                "use_pbc": True,
                "otf_graph": True,
            },
            "heads": {"energy_and_forces": {"module": f"{MODELS}.esen.esen.MLP_EFS_Head"}},
            "pass_through_head_outputs": True,
        },
        cannot=NO_SEARCH
        | {"relaxation": "fairchem's writes to positions, which this model ties to a gradient"},
    ),
    # The part of UMA-S (arXiv:2506.23971) that runs for one structure: 6,020,097 parameters, its
    # experts merged; forces by gradient. Every other argument is fairchem's default.
    "uma_s": Context(
        model=f"{MODELS}.uma.escn_md.eSCNMDBackbone",
        size="6M",
        config={
            "num_layers": 4,
            "sphere_channels": 128,
            "hidden_channels": 128,
            "edge_channels": 128,
            "lmax": 2,
            "mmax": 2,
            "cutoff": 6.0,
            "max_neighbors": 30,
            "num_distance_basis": 64,
            "otf_graph": True,
            "always_use_pbc": False,
            "regress_forces": True,
            "direct_forces": False,
            "dataset_mapping": {name: name for name in ("oc20", "omat", "omol", "odac", "omc")},
            "chg_spin_emb_type": "rand_emb",
            "cs_emb_grad": True,
            "dataset_emb_grad": True,
            "execution_mode": "umas_fast_pytorch",
        },
        cannot=dict.fromkeys(
            ("training", "relaxation", "neighbors"),
            "only its inference is measured, in the environment of fairchem-core 2",
        ),
        fairchem=2,
    ),
}


def refusal(name: str, task: str, python2: Path = PYTHON2) -> str | None:
    """Return why an implementation cannot be measured at a task here, or None if it can.

    Args:
        name: of the implementation.
        task: one of :data:`benchmarks.spec.TASKS`.
        python2: the Python of an environment with fairchem-core 2.
    """
    if name not in CONTEXT:
        return None
    context = CONTEXT[name]
    if task in context.cannot:
        return f"{name} cannot be measured at {task}: {context.cannot[task]}"
    if context.fairchem == 2 and not python2.exists():
        return (
            f"{name} needs fairchem-core 2, and there is no {python2}: run make install-fairchem2, "
            "or name another Python by --python2"
        )
    for module, package in context.packages.items():
        if find_spec(module) is None:
            return (
                f"{name} needs the package {package}, which is not installed: "
                f"python -m pip install --no-build-isolation {package}"
            )
    return None
