"""Write ``tests/data/golden_*``: small checkpoints of fairchem-core 1.10 and what it predicts.

    python tests/make_golden.py

To be run in the environment of fairchem-core 1.10, whose own model, trainer and conversion of
structures do everything; this package gives the edge frames alone. Their roll, which that model
draws at random at each call, is zero here, as it is in this package; ``golden.json`` says how far
other draws move the results. The frames are patched in for the predictions only. Equiformer (V1),
of which fairchem has none, is this package's model in fairchem's trainer.

- ``golden_flat.pt``: the flat model, energy and forces, with a training state: moving averages that
  differ from the weights, normalisers and element references.
- ``golden_hydra.pt``: backbone and heads with stress, whose isotropic and anisotropic parts have a
  normaliser each, as OMat24's; the kind without a training state, whose weights are the averages.
- ``golden_equiformer.pt``: Equiformer (V1), forces and stress as the energy's derivatives, Bessel
  functions, with a training state as the first.
- ``golden.json``: structures, and energy (eV), forces (eV/Angstrom) and stress (eV/Angstrom^3) as
  the trainer predicts them: from the averages, with normalisers undone and references added.
"""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from ase import Atoms
from ase.build import add_adsorbate, bcc110, bulk, fcc100, fcc111, molecule
from ase.calculators.emt import EMT
from ase.calculators.singlepoint import SinglePointCalculator
from ase.constraints import FixAtoms
from ase.db import connect
from ase.neighborlist import neighbor_list
from fairchem.core.common.registry import registry
from fairchem.core.common.utils import setup_imports
from fairchem.core.datasets import data_list_collater
from fairchem.core.models.equiformer_v2 import equiformer_v2, equiformer_v2_deprecated
from fairchem.core.preprocessing import AtomsToGraphs

import fairchem_equiformer  # noqa: F401  # lets fairchem start without torch-sparse
from fairchem_equiformer.so3.frames import edge_rotation_matrices

DATA = Path(__file__).parent / "data"

SIZES = {
    "otf_graph": True,
    "use_pbc": True,
    "max_neighbors": 20,
    "max_radius": 6.0,
    "max_num_elements": 90,
    "num_layers": 1,
    "grid_resolution": 8,
    "edge_channels": 8,
    "distance_function": "gaussian",
    "use_atom_edge_embedding": True,
    "share_atom_edge_embedding": False,
    "use_m_share_rad": False,
    "norm_type": "layer_norm_sh",
    "use_attn_renorm": True,
    "use_s2_act_attn": False,
    "use_gate_act": False,
    "use_sep_s2_act": True,
    "use_grid_mlp": True,
    "alpha_drop": 0.1,
    "drop_path_rate": 0.05,
    "proj_drop": 0.0,
    "weight_init": "uniform",
}

FLAT = {
    **SIZES,
    "name": "equiformer_v2",
    "lmax_list": [2],
    "mmax_list": [1],
    "sphere_channels": 8,
    "attn_hidden_channels": 8,
    "num_heads": 2,
    "attn_alpha_channels": 8,
    "attn_value_channels": 4,
    "ffn_hidden_channels": 8,
    "regress_forces": True,
}

HYDRA = {
    "name": "hydra",
    "pass_through_head_outputs": True,
    "otf_graph": True,
    "backbone": {
        **SIZES,
        "model": "equiformer_v2_backbone",
        "use_pbc_single": True,
        "enforce_max_neighbors_strictly": False,
        "lmax_list": [2],
        "mmax_list": [2],
        "sphere_channels": 16,  # the compiled kernels want multiples of 16
        "attn_hidden_channels": 16,
        "num_heads": 1,
        "attn_alpha_channels": 16,
        "attn_value_channels": 16,
        "ffn_hidden_channels": 16,
        "avg_num_nodes": 31.17,
        "avg_degree": 61.95,
    },
    "heads": {
        "energy": {"module": "equiformer_v2_energy_head"},
        "forces": {"module": "equiformer_v2_force_head"},
        "stress": {
            "module": "rank2_symmetric_head",
            "output_name": "stress",
            "use_source_target_embedding": True,
            "decompose": True,
        },
    },
}

EQUIFORMER = {
    "name": "equiformer",
    "otf_graph": True,
    "use_pbc": True,
    "max_neighbors": 20,
    "max_radius": 6.0,
    "max_num_elements": 90,
    "use_tag_embedding": False,
    "regress_forces": True,
    "direct_forces": False,
    "regress_stress": True,
    "num_layers": 1,
    "irreps_node_embedding": "8x0e+4x1e",
    "irreps_head": "4x0e+2x1e",
    "num_heads": 2,
    "irreps_mlp_mid": "8x0e+4x1e",
    "irreps_feature": "8x0e",
    "distance_function": "bessel",
    "num_distance_basis": 8,
    "edge_channels": 8,
}

OUTPUTS = {
    "energy": {"level": "system"},
    "forces": {"level": "atom", "train_on_free_atoms": True, "eval_on_free_atoms": True},
}
STRESS = {
    "level": "system",
    "decomposition": {"stress_isotropic": {"irrep_dim": 0}, "stress_anisotropic": {"irrep_dim": 2}},
}
NORMALIZERS = {
    "energy": {"mean": -1.3125, "rmsd": 170.25},
    "forces": {"mean": 0.0, "rmsd": 9.6875},
    "stress_isotropic": {"mean": -0.03125, "rmsd": 0.109375},
    "stress_anisotropic": {"mean": 0.0, "rmsd": 1.46875},
}
# A derivative has the scale of what it is taken of.
DERIVED = {
    "energy": NORMALIZERS["energy"] | {"rmsd": 9.6875},
    "forces": NORMALIZERS["forces"],
    "stress": NORMALIZERS["forces"],
}


def structures() -> dict[str, Atoms]:
    """A dozen: slabs with adsorbates, rattled crystals, molecules and single atoms."""
    found: dict[str, Atoms] = {}
    for name, slab, adsorbate in (
        ("CO on Cu", fcc111("Cu", (2, 2, 3), vacuum=8.0), "CO"),
        ("CH3OH on Pt", fcc111("Pt", (3, 2, 2), vacuum=8.0), "CH3OH"),
        ("NH3 on Fe", bcc110("Fe", (2, 2, 3), vacuum=8.0), "NH3"),
        ("H2O on Ni, open above", fcc100("Ni", (3, 2, 2), vacuum=4.0), "H2O"),
    ):
        add_adsorbate(slab, molecule(adsorbate), 1.9, "ontop")
        slab.pbc = (True, True, "open" not in name)
        found[name] = slab
    found["MgO"] = bulk("MgO", "rocksalt", a=4.25, cubic=True)
    found["Si"] = bulk("Si", cubic=True)
    found["CuAu, sheared"] = bulk("Cu", cubic=True)
    found["CuAu, sheared"].symbols[[0, 3]] = "Au"
    shear = [[1.02, 0.05, 0.0], [0.0, 0.97, 0.04], [0.03, 0.0, 1.05]]
    found["CuAu, sheared"].set_cell(found["CuAu, sheared"].cell.array @ shear, scale_atoms=True)
    found["Al, elongated"] = bulk("Al", cubic=True).repeat((1, 1, 2))
    found["H2O in a box"] = molecule("H2O", cell=[9.0, 9.5, 10.0], pbc=True)
    found["ethanol without a cell"] = molecule("CH3CH2OH")
    for seed, atoms in enumerate(found.values()):
        atoms.rattle(0.08, seed=seed)
    found["CO on Cu"].positions += (0.0, 0.0, 20.0)  # not wrapped into the cell
    found["CO on Cu"].set_constraint(FixAtoms([0, 1, 2, 3]))
    lattice = [[5.2, 0.3, 0.0], [0.4, 5.6, 0.2], [-0.1, 0.5, 4.9]]
    found["one atom in a crystal"] = Atoms("Cs", cell=lattice, pbc=True)
    found["one atom alone"] = Atoms("Cu", [(1.0, 2.0, 3.0)])
    for name, atoms in found.items():
        check_cut(name, atoms)
    return found


def check_cut(name: str, atoms: Atoms) -> None:
    """Check that rounding does not decide which neighbours an atom keeps.

    Those kept are the nearest ones, or in the hydra form also those as far as the first one left
    out, to 0.01 Angstrom^2.
    """
    target, distance = neighbor_list("id", atoms, SIZES["max_radius"])
    most = SIZES["max_neighbors"]
    for atom in range(len(atoms)):
        squares = np.sort(distance[target == atom]) ** 2
        if len(squares) <= most:
            continue
        left_out = squares[most]
        near = min(left_out - squares[most - 1], np.abs(squares - left_out - 0.01).min())
        if near < 1e-4:
            raise ValueError(f"{name}: a tie decides about the neighbours of atom {atom}")


def make_trainer(folder: Path, model: dict, outputs: dict, normalizers: dict):
    """fairchem's trainer of this model, with a training set of two structures."""
    with connect(folder / "train.db") as database:
        for seed in range(2):
            atoms = bulk("Cu", cubic=True)
            atoms.rattle(0.05, seed=seed)
            atoms.calc = EMT()
            energy, forces = atoms.get_potential_energy(), atoms.get_forces()
            atoms.calc = SinglePointCalculator(atoms, energy=energy, forces=forces)
            database.write(atoms)
    rng = np.random.default_rng(5)
    references = np.round(rng.uniform(-1, 1, 100), 3)
    np.savez(folder / "references.npz", coeff=references.astype(np.float32))
    normalizers = {key: value for key, value in normalizers.items() if key.split("_")[0] in outputs}
    return registry.get_trainer_class("equiformerv2_forces")(
        task={},
        model=model,
        dataset={
            "train": {
                "format": "ase_db",
                "src": "train.db",
                "a2g_args": {"r_energy": True, "r_forces": True},
                "transforms": {
                    "normalizer": normalizers,
                    "element_references": {"energy": {"file": "references.npz"}},
                },
            }
        },
        outputs=outputs,
        loss_functions=[
            {"energy": {"fn": "mae", "coefficient": 1}},
            {"forces": {"fn": "l2mae", "coefficient": 1}},
        ],
        evaluation_metrics={
            "metrics": {"energy": ["mae"], "forces": ["mae"]},
            "primary_metric": "forces_mae",
        },
        optimizer={
            "batch_size": 1,
            "num_workers": 0,
            "optimizer": "AdamW",
            "optimizer_params": {"weight_decay": 0.001},
            "lr_initial": 1e-3,
            "max_epochs": 1,
            "ema_decay": 0.999,
            "clip_grad_norm": 100,
            "scheduler": "LambdaLR",
            "scheduler_params": {
                "lambda_type": "cosine",
                "warmup_epochs": 1,
                "warmup_factor": 0.2,
                "lr_min_factor": 0.01,
            },
        },
        identifier="golden",
        timestamp_id="golden",
        run_dir=".",
        local_rank=0,
        logger="tensorboard",
        cpu=True,
        seed=0,
        name="s2ef",  # as fairchem calls it in checkpoints
    )


def scatter(names: list[str], tensors: list[torch.Tensor], size: float) -> None:
    """Move each value, so that no bias is zero and no scale one.

    What the radial functions make of a distance stays smooth, so that a position's rounding does
    not matter: of 600 Gaussians, neighbours get about the same weight, and Bessel functions keep
    their frequencies.
    """
    for name, tensor in zip(names, tensors, strict=True):
        if name.endswith("frequencies"):
            continue
        noise = torch.randn_like(tensor) * size * tensor.abs().mean().clamp_min(0.1)
        tensor.data += noise
        if name.endswith("rad_func.net.0.weight"):
            tensor.data[:, :600] = smooth(tensor.data[:, :600])


def smooth(rows: torch.Tensor, width: int = 75) -> torch.Tensor:
    """Each row averaged over ``width`` columns, and as large as before."""
    kernel = torch.hann_window(width + 1)[None, None]
    found = torch.nn.functional.conv1d(rows[:, None], kernel, padding="same")[:, 0]
    return found * (rows.norm() / found.norm())


def predict(trainer, atoms: Atoms) -> dict[str, np.ndarray]:
    """Energy [], forces [N, 3] and, where the model has it, stress [3, 3].

    The structures are those that fairchem's calculator hands to its trainer. The stock model
    refuses a batch without an edge: an atom alone is predicted beside a molecule.
    """
    convert = AtomsToGraphs(r_edges=False, r_pbc=True).convert
    batch = [atoms] if len(atoms) > 1 or atoms.pbc.any() else [atoms, molecule("CH3CH2OH")]
    data = data_list_collater([convert(one) for one in batch], otf_graph=True)
    found = trainer.predict(data, per_image=False, disable_tqdm=True)
    result = {
        "energy": found["energy"].reshape(-1)[0],
        "forces": found["forces"].reshape(-1, 3)[: len(atoms)],
    }
    if "stress" in found:
        result["stress"] = found["stress"].reshape(-1, 3, 3)[0]
    return {key: value.double().numpy() for key, value in result.items()}


def no_roll():
    """Let both of fairchem's models take their edge frames from this package."""

    def frames(_self, _data, _edge_index, vector):
        return edge_rotation_matrices(vector).to(vector.dtype)

    return (
        mock.patch.object(module, "_init_edge_rot_mat", frames)
        for module in (equiformer_v2.EquiformerV2Backbone, equiformer_v2_deprecated.EquiformerV2)
    )


def spread_of_rolls(trainer, exact: dict[str, np.ndarray], atoms: Atoms) -> dict[str, float]:
    """How far random rolls move the results, over the largest value: at most, of eight draws."""
    torch.manual_seed(1)
    draws = [predict(trainer, atoms) for _ in range(8)]
    return {
        key: max(float(np.abs(draw[key] - value).max() / np.abs(value).max()) for draw in draws)
        for key, value in exact.items()
    }


def make(
    form: str, model: dict, outputs: dict, normalizers: dict, *, training_state: bool, found: dict
):
    """Write the checkpoint of one form, and add its predictions to ``found``."""
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        trainer = make_trainer(Path(folder), model, outputs, normalizers)
        names, weights = zip(*trainer.model.named_parameters(), strict=True)
        scatter(names, weights, 0.5)
        trainer.ema.shadow_params = [weight.detach().clone() for weight in weights]
        scatter(names, trainer.ema.shadow_params, 0.05)
        name = f"golden_{form}.pt"
        saved = trainer.save(checkpoint_file=name, training_state=training_state)
        (DATA / name).write_bytes(Path(saved).read_bytes())
        trainer.load_checkpoint(saved)
        spread: dict[str, float] = {}
        for structure, atoms in structures().items():
            flat, hydra = no_roll()
            with flat, hydra:
                exact = predict(trainer, atoms)
            found[structure][form] = {key: value.tolist() for key, value in exact.items()}
            if form != "equiformer":  # which has no edge frames
                for key, value in spread_of_rolls(trainer, exact, atoms).items():
                    spread[key] = max(spread.get(key, 0.0), value)
        os.chdir(DATA)
    return spread


def main() -> None:
    """Write all four files."""
    setup_imports()
    DATA.mkdir(exist_ok=True)
    found = {
        name: {
            "numbers": atoms.numbers.tolist(),
            "positions": atoms.positions.tolist(),
            "cell": atoms.cell.array.tolist(),
            "pbc": atoms.pbc.tolist(),
        }
        for name, atoms in structures().items()
    }
    whole = OUTPUTS | {"stress": {"level": "system"}}
    spread = {
        "flat": make("flat", FLAT, OUTPUTS, NORMALIZERS, training_state=True, found=found),
        "hydra": make(
            "hydra",
            HYDRA,
            OUTPUTS | {"stress": STRESS},
            NORMALIZERS,
            training_state=False,
            found=found,
        ),
    }
    make("equiformer", EQUIFORMER, whole, DERIVED, training_state=True, found=found)
    about = {
        "made by": "tests/make_golden.py, with fairchem-core 1.10.0 and torch 2.4.1",
        "edge frames": "roll zero, as in this package; the stock model draws it at random",
        "relative change by a random roll": spread,
    }
    (DATA / "golden.json").write_text(json.dumps({"about": about, "structures": found}, indent=1))


if __name__ == "__main__":
    main()
