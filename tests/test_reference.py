"""The model equals its formulas (tests/reference.py) in float64, with every option."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch_geometric.data import Batch, Data

from fairchem_equiformer import EquiformerV2
from fairchem_equiformer.graph.build import build_graph
from tests.reference import reference_forward
from tests.tolerances import assert_close

SMALL = {
    "max_neighbors": 3,
    "max_radius": 5.0,
    "max_num_elements": 10,
    "num_layers": 1,
    "lmax_list": [2],
    "mmax_list": [1],
    "sphere_channels": 5,
    "attn_hidden_channels": 3,
    "num_heads": 2,
    "attn_alpha_channels": 3,
    "attn_value_channels": 2,
    "ffn_hidden_channels": 4,
    "edge_channels": 3,
}

DEGREES = [(1, 0), (1, 1), (2, 0), (3, 1), (4, 2), (6, 3), (8, 8)]
S2, GATE = {"use_sep_s2_act": False}, {"use_gate_act": True}
OPTIONS = {
    "default, two blocks": {"num_layers": 2},
    "s2": S2,
    "gate": GATE,
    "grid_mlp": S2 | {"use_grid_mlp": True},
    "separable_grid_mlp": {"use_grid_mlp": True},
    "gate, grid_mlp": GATE | {"use_grid_mlp": True},
    "layer_norm": {"norm_type": "layer_norm"},
    "layer_norm_sh": {"norm_type": "layer_norm_sh"},
    "no renorm": {"use_attn_renorm": False},
    "no embedding": {"use_atom_edge_embedding": False},
    "shared embedding": {"share_atom_edge_embedding": True},
    "m share": {"use_m_share_rad": True},
    "m share, no embedding, gate": GATE
    | {"use_m_share_rad": True, "use_atom_edge_embedding": False},
    "resolution": {"grid_resolution": 14},
    "references": {"load_energy_lin_ref": True, "use_energy_lin_ref": True},
    "averages": {"avg_num_nodes": 3.0, "avg_degree": 2.5},
    "uniform": {"weight_init": "uniform"},
    "learnable gaussians": {"distance_function": "learnable_gaussian", "num_distance_basis": 7},
    "tags": {"use_tag_embedding": True},
}


def make_model(**keys) -> EquiformerV2:
    """A small model in float64 whose norms and biases are not the identity."""
    model = EquiformerV2(**SMALL | keys).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.2)
    return model


def make_batch() -> Batch:
    """A periodic pair along y, a cluster, an atom alone: small, and no two directions alike."""
    cluster = torch.randn(4, 3, dtype=torch.float64) * 1.2
    pair = torch.tensor([[0.0, 0.0, 0.0], [0.0, 1.5, 0.0]], dtype=torch.float64)
    alone = torch.zeros(1, 3, dtype=torch.float64)
    entries = []
    for pos, size in ((pair, 4.0), (cluster, 30.0), (alone, 30.0)):
        entries.append(
            Data(
                pos=pos,
                cell=size * torch.eye(3, dtype=torch.float64)[None],
                atomic_numbers=torch.randint(1, 10, (len(pos),)),
                natoms=len(pos),
                tags=torch.randint(3, (len(pos),)),
            )
        )
    return Batch.from_data_list(entries)


def weighted_sum(energy: Tensor, forces: Tensor) -> Tensor:
    """A number that every output moves in its own way."""
    generator = torch.Generator().manual_seed(1)
    outputs = torch.cat([energy, forces.flatten()])
    return outputs @ torch.randn(len(outputs), generator=generator, dtype=outputs.dtype)


def check(model: EquiformerV2, batch: Batch) -> None:
    config = model.config
    graph = build_graph(batch, config.graph(otf=config.otf_graph))
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    out = model(batch)
    grads = torch.autograd.grad(weighted_sum(out["energy"], out["forces"]), list(trained.values()))
    tags = batch.tags if config.use_tag_embedding else None
    energy, forces = reference_forward(model, graph, tags)
    expected = torch.autograd.grad(
        weighted_sum(energy, forces), list(trained.values()), allow_unused=True
    )
    assert_close(out["energy"], energy, "formula", name="energy")
    assert_close(out["forces"], forces, "formula", name="forces")
    for (name, parameter), grad, reference in zip(trained.items(), grads, expected, strict=True):
        wanted = torch.zeros_like(parameter) if reference is None else reference
        assert_close(grad, wanted, "formula", name=name)


@pytest.mark.parametrize("keys", OPTIONS.values(), ids=OPTIONS.keys())
def test_every_option(keys):
    check(make_model(**keys), make_batch())


@pytest.mark.parametrize(("lmax", "mmax"), DEGREES)
def test_every_degree(lmax, mmax):
    check(make_model(lmax_list=[lmax], mmax_list=[mmax]), make_batch())
