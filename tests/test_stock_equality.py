"""Same weights, same numbers as fairchem's own `equiformer_v2`, for every option.

Energies and forces agree to 1e-5 and the gradient of each parameter to 3e-5, in float32, measured
as the largest difference over the reference's largest entry.
"""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from fairchem.core.datasets import data_list_collater
from fairchem.core.preprocessing import AtomsToGraphs

from fairchem_equiformer.ops.choice import VARIABLE
from tests.kernels import (
    HELPERS,
    PRODUCTS,
    WITH_PRODUCTS,
    WITHOUT_PRODUCTS,
    called_kernels,
    with_backward,
)
from tests.models import KEYS, NARROW, fix_roll, ours, results, stock
from tests.structures import batch_of, single_atom, slab, slab_atoms, three_slabs
from tests.tolerances import TOLERANCES, assert_all_close, assert_close, relative_error

ROUNDING = TOLERANCES["outputs"][torch.float32]

GATE = {"use_gate_act": True}
S2 = {"use_sep_s2_act": False}
NO_GRID_MLP = {"use_grid_mlp": False}

OPTIONS: dict[str, dict[str, Any]] = {
    "base": {},
    "gate": {**GATE, **NO_GRID_MLP},
    "gate, grid MLP": GATE,
    "gate, grid MLP with all degrees": {**GATE, **S2},
    "S2": {**S2, **NO_GRID_MLP},
    "S2, grid MLP": S2,
    "separable S2": NO_GRID_MLP,
    "layer_norm": {"norm_type": "layer_norm"},
    "rms_norm_sh": {"norm_type": "rms_norm_sh"},
    "no re-normalisation": {"use_attn_renorm": False},
    "no element embedding": {"use_atom_edge_embedding": False},
    "shared element embedding": {"share_atom_edge_embedding": True},
    "radial weight per degree": {"use_m_share_rad": True},
    "radial weight per degree, no element embedding": {
        "use_m_share_rad": True,
        "use_atom_edge_embedding": False,
    },
    "uniform weights": {"weight_init": "uniform"},
    "energy references added": {"use_energy_lin_ref": True, "load_energy_lin_ref": True},
    "energy references loaded": {"load_energy_lin_ref": True},
    "energy only": {"regress_forces": False},
    "default grid": {"grid_resolution": None, "mmax_list": [3]},
    "fine grid": {"grid_resolution": 20},
    "other averages": {"avg_num_nodes": 10.0, "avg_degree": 7.5},
    "one block": {"num_layers": 1},
    "one head": {"num_heads": 1},
    "fewer elements": {"max_num_elements": 79},
    "neighbours at equal distance": {"enforce_max_neighbors_strictly": False},
    "all neighbours": {"max_neighbors": 500, "max_radius": 4.0},
    "structures searched one by one": {"use_pbc_single": True},
    "keys without effect": {
        "num_sphere_samples": 7,
        "num_distance_basis": 7,
        "attn_activation": "silu",
        "ffn_activation": "silu",
    },
}
# Every lmax, at mmax 0, at lmax and between.
DEGREES = [
    *((1, 0), (1, 1), (2, 1), (3, 0), (3, 3), (4, 2), (5, 3)),
    *((6, 2), (6, 6), (7, 4), (8, 0), (8, 8)),
]


def random_options(seed: int) -> dict[str, Any]:
    """One value for every option at once."""
    rng = random.Random(seed)
    lmax = rng.randint(1, 5)
    return {
        "lmax_list": [lmax],
        "mmax_list": [rng.randint(0, lmax)],
        "norm_type": rng.choice(["layer_norm", "layer_norm_sh", "rms_norm_sh"]),
        "use_gate_act": rng.random() < 0.3,
        "use_sep_s2_act": rng.random() < 0.5,
        "use_grid_mlp": rng.random() < 0.5,
        "use_attn_renorm": rng.random() < 0.5,
        "use_m_share_rad": rng.random() < 0.5,
        "weight_init": rng.choice(["normal", "uniform"]),
        **rng.choice([{}, {"use_atom_edge_embedding": False}, {"share_atom_edge_embedding": True}]),
    }


def pair(**changes: Any):
    """fairchem's model with our edge frames, and ours on its weights."""
    theirs = stock(**changes)
    fix_roll(theirs)
    own = ours(**changes)
    own.load_state_dict(theirs.state_dict())
    return theirs, own


def assert_same(theirs, own, data, slack=1.0) -> None:
    """Outputs and gradients of two models on one batch; ours may be on a GPU."""
    expected, reference = results(theirs, data)
    got, gradients = results(own, data.clone().to(next(own.parameters()).device))
    assert_all_close(got, expected, "outputs", slack=slack)
    assert gradients.keys() == reference.keys()
    for name, value in reference.items():
        if value is None:  # fairchem's answer for a parameter without influence
            assert not gradients[name].any(), name
        else:
            assert_close(gradients[name], value, "gradients", name=name, slack=slack)


def kernels_of(**changes: Any) -> set[str]:
    """All that a training step with the widths of KEYS calls."""
    keys = {**KEYS, **changes}
    names = ["edge_message", "edge_aggregate", "edge_softmax", "attention_logits"]
    names += ["gaussians_times", "layer_norm_silu", "equivariant_norm"]
    if not keys.get("use_gate_act"):
        names += (
            ["s2_activation", "silu"] if keys.get("use_sep_s2_act", True) else ["s2_activation"]
        )
    if keys["use_grid_mlp"]:
        names += ["silu_samples", "integrate_silu"]
    made = with_backward(*names) | PRODUCTS
    return made - WITHOUT_PRODUCTS | WITH_PRODUCTS if keys["use_grid_mlp"] else made


@pytest.mark.parametrize("changes", OPTIONS.values(), ids=OPTIONS)
def test_option_by_compiled_kernels(changes, monkeypatch):
    monkeypatch.setenv(VARIABLE, "native")  # our own products wherever they can run
    models = pair(**changes)
    with called_kernels() as called:
        assert_same(*models, three_slabs())
    assert called - HELPERS == kernels_of(**changes)


@pytest.mark.parametrize("changes", OPTIONS.values(), ids=OPTIONS)
def test_option_in_pytorch(changes):
    models = pair(**{**NARROW, "num_layers": 1, **changes})
    with called_kernels() as called:
        assert_same(*models, three_slabs())
    assert called - PRODUCTS - HELPERS == with_backward("edge_softmax")


@pytest.mark.parametrize(("lmax", "mmax"), DEGREES)
def test_degrees(lmax, mmax):
    """fairchem makes its rotations in float32: at lmax 8 it is further from float64 than we allow.

    At mmax 0, over three sets of weights, its forces are up to 1.6e-5 and its gradients 7e-5 from
    this model's in float64; this model's in float32 are 1.1e-5 and 6e-5 from them.
    """
    changes = {"lmax_list": [lmax], "mmax_list": [mmax], "grid_resolution": 2 * (lmax + 2)}
    assert_same(*pair(**changes, num_layers=1), three_slabs(), slack=1 if lmax <= 6 else 2)


@pytest.mark.parametrize("seed", range(6))
def test_options_together(seed):
    widths = {} if seed % 2 else NARROW
    assert_same(*pair(**widths, **random_options(seed)), three_slabs())


def test_given_edges():
    """`otf_graph: False` uses the edges of the batch: fewer of them than would be found."""
    converter = AtomsToGraphs(max_neigh=6, radius=5.0, r_edges=True)
    structures = converter.convert_all(
        [slab_atoms("Cu", "CO", 1), slab_atoms("Ni", "H2O", 2)], disable_tqdm=True
    )
    data = data_list_collater(structures, otf_graph=False)
    theirs, own = pair(otf_graph=False)
    assert_same(theirs, own, data)
    own.otf_graph = True
    found = own(data.clone())["energy"]
    assert relative_error(found, theirs(data.clone())["energy"]) > 10 * ROUNDING


def test_atom_without_neighbours():
    data = batch_of(slab("Cu", "CO", 1), single_atom("Pt", 2), slab("Ni", "H2O", 3))
    assert_same(*pair(), data)


def test_wrong_weights_show():
    """The comparison above is not blind: one entry of one weight moves every number."""
    theirs, own = pair()
    with torch.no_grad():
        own.blocks[1].ga.alpha_dot[0, 0] += 0.05
    with pytest.raises(AssertionError):
        assert_same(theirs, own, three_slabs())


class TestRoll:
    """fairchem turns each edge's frame by a random angle; ours has no roll."""

    @pytest.mark.parametrize("changes", [{**GATE, **NO_GRID_MLP}, GATE], ids=["gate", "grid MLP"])
    def test_gate_activation_does_not_depend_on_it(self, changes):
        """The grid MLP works on atoms, not in edge frames."""
        theirs, own = stock(**changes), ours(**changes)
        own.load_state_dict(theirs.state_dict())
        assert_same(theirs, own, three_slabs())

    def test_ours_is_as_good_as_any(self):
        """With S2 activation fairchem's own calls differ, and ours lies among them.

        On this coarse grid of 8 points its calls lie up to 8e-5 (energy) and 3e-3 (forces) from
        their mean, ours 6e-5 and 3e-3. On the published models' grid of 18 points, at lmax 4 and 6,
        both are at float32 rounding: 3e-7 and 3e-6.
        """
        theirs, own = stock(grid_resolution=8), ours(grid_resolution=8)
        own.load_state_dict(theirs.state_dict())
        data = three_slabs()
        with torch.no_grad():
            calls = [theirs(data.clone()) for _ in range(8)]
            result = own(data.clone())
        for key, value in result.items():
            stacked = torch.stack([call[key] for call in calls])
            mean = stacked.mean(dim=0)
            spread = max(relative_error(call, mean) for call in stacked)
            assert spread > ROUNDING
            assert relative_error(value, mean) < 1.5 * spread


@pytest.mark.long
def test_published_size():
    """The 31M model of the paper, at its full width and depth, on one structure."""
    keys = {
        **KEYS,
        "max_neighbors": 20,
        "max_radius": 12.0,
        "num_layers": 8,
        "sphere_channels": 128,
        "attn_hidden_channels": 64,
        "num_heads": 8,
        "attn_alpha_channels": 64,
        "attn_value_channels": 16,
        "ffn_hidden_channels": 128,
        "lmax_list": [4],
        "mmax_list": [2],
        "grid_resolution": 18,
        "edge_channels": 128,
    }
    theirs, own = pair(**keys)
    assert own.num_params == 31_058_690
    assert_same(theirs, own, batch_of(slab("Cu", "CO", 1)))


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["base", "gate", "S2", "shared element embedding"])
def test_option_on_gpu(name):
    theirs, own = pair(**OPTIONS[name])
    assert_same(theirs, own.cuda(), three_slabs())
