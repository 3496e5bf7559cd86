"""The flat model and fairchem's, small and on the same weights."""

from __future__ import annotations

from contextlib import contextmanager
from functools import cache
from typing import TYPE_CHECKING, Any
from unittest import mock

import torch
from fairchem.core.models.equiformer_v2 import equiformer_v2, equiformer_v2_deprecated, so3

from fairchem_equiformer import EquiformerV2
from fairchem_equiformer.so3.frames import edge_rotation_matrices

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor, nn
    from torch_geometric.data import Batch

# Widths that every compiled kernel takes.
KEYS: dict[str, Any] = {
    "max_neighbors": 12,
    "max_radius": 6.0,
    "num_layers": 2,
    "sphere_channels": 16,
    "attn_hidden_channels": 16,
    "num_heads": 2,
    "attn_alpha_channels": 16,
    "attn_value_channels": 16,
    "ffn_hidden_channels": 32,
    "norm_type": "layer_norm_sh",
    "lmax_list": [3],
    "mmax_list": [2],
    "grid_resolution": 12,
    "edge_channels": 16,
    "use_grid_mlp": True,
    "alpha_drop": 0.0,
    "drop_path_rate": 0.0,
}

# Widths that only the softmax's takes; the other ops run in PyTorch.
NARROW = {
    "sphere_channels": 12,
    "attn_hidden_channels": 8,
    "attn_alpha_channels": 8,
    "attn_value_channels": 4,
    "ffn_hidden_channels": 12,
    "edge_channels": 10,
}


def ours(**changes: Any) -> EquiformerV2:
    """This package's flat model, with no dropout unless asked for; all weights matter."""
    return scatter_weights(EquiformerV2(**{**KEYS, **changes}))


def scatter_weights(model: nn.Module) -> Any:
    """Move every parameter off its initial value, so that no bias is zero and no scale one."""
    with torch.no_grad():
        for parameter in model.parameters():
            spread = 0.05 * parameter.abs().mean().clamp_min(0.1)
            parameter.add_(torch.randn_like(parameter) * spread)
    return model


@cache
def _grid(lmax: int, mmax: int, **keys: Any) -> so3.SO3_Grid:
    return so3.SO3_Grid(lmax, mmax, **keys)


@contextmanager
def used_grids(lmax: int, mmax: int) -> Iterator[None]:
    """Within, fairchem's models of these degrees have the S2 grids they use only, made once."""

    def grid(degree: int, order: int, **rest: Any) -> nn.Module:
        used = degree == lmax and order in (mmax, lmax)
        return _grid(degree, order, **rest) if used else torch.nn.Identity()

    with (
        mock.patch.object(equiformer_v2, "SO3_Grid", grid),
        mock.patch.object(equiformer_v2_deprecated, "SO3_Grid", grid),
    ):
        yield


def stock_class(cls: type, **keys: Any) -> Any:
    """One of fairchem's models, with the S2 grids it uses only, each made once."""
    (lmax,), (mmax,) = keys["lmax_list"], keys["mmax_list"]
    with used_grids(lmax, mmax):
        return cls(**keys)


def stock(**changes: Any) -> equiformer_v2_deprecated.EquiformerV2:
    """fairchem's flat model, all weights mattering; each call rolls its edge frames at random."""
    keys = {**KEYS, **changes}
    return scatter_weights(stock_class(equiformer_v2_deprecated.EquiformerV2, **keys))


def fix_roll(backbone: nn.Module) -> None:
    """Give fairchem's model the edge frames of ours, which have no roll."""
    backbone._init_edge_rot_mat = lambda _data, _index, vector: edge_rotation_matrices(vector).to(
        vector.dtype
    )


def random_loss(out: dict[str, Tensor]) -> Tensor:
    """A weighted sum of all outputs, the same for the same shapes."""
    generator = torch.Generator().manual_seed(1)
    weights = {key: torch.randn(value.shape, generator=generator) for key, value in out.items()}
    return sum((weights[key].to(value) * value).sum() for key, value in out.items())


def results(model: nn.Module, data: Batch) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Outputs, and gradients of `random_loss` for all trainable parameters, by name."""
    model.zero_grad()
    out = model(data.clone())
    random_loss(out).backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    return {key: value.detach() for key, value in out.items()}, gradients


def gradients(model: nn.Module, data: Batch) -> dict[str, Tensor]:
    """The second of `results`."""
    return results(model, data)[1]
