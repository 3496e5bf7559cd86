"""Which parameters weight decay leaves alone."""

from __future__ import annotations

from torch import nn

from fairchem_equiformer.nn.irreps.embedding import KindEmbedding
from fairchem_equiformer.nn.irreps.linear import IrrepsLinear
from fairchem_equiformer.nn.irreps.norm import IrrepsLayerNorm
from fairchem_equiformer.nn.norm import NORMS
from fairchem_equiformer.nn.radial import LearnableGaussianSmearing, SphericalBesselBasis
from fairchem_equiformer.nn.so3_linear import SO3Linear

_WHOLE: tuple[type[nn.Module], ...] = (
    nn.LayerNorm,
    *NORMS.values(),
    IrrepsLayerNorm,
    LearnableGaussianSmearing,
    SphericalBesselBasis,
)
_BIAS: tuple[type[nn.Module], ...] = (nn.Linear, SO3Linear, IrrepsLinear, KindEmbedding)


def no_weight_decay(model: nn.Module) -> set[str]:
    """Names of all biases of linear layers and all parameters of norms and learned radial bases.

    The set that fairchem's flat ``equiformer_v2`` gives; embeddings and attention vectors decay.
    """
    names = set()
    for prefix, module in model.named_modules():
        if isinstance(module, _BIAS):
            names |= {f"{prefix}.bias"} if module.bias is not None else set()
        elif isinstance(module, _WHOLE):
            names |= {f"{prefix}.{name}" for name, _ in module.named_parameters()}
    return names
