"""Which parameters weight decay leaves alone."""

from __future__ import annotations

from torch import nn

from fairchem_equiformer.nn.norm import NORMS
from fairchem_equiformer.nn.so3_linear import SO3Linear

_NORMS: tuple[type[nn.Module], ...] = (nn.LayerNorm, *NORMS.values())


def no_weight_decay(model: nn.Module) -> set[str]:
    """Names of all biases of linear layers and all parameters of norms.

    The set that fairchem's flat ``equiformer_v2`` gives; embeddings and attention vectors decay.
    """
    names = set()
    for prefix, module in model.named_modules():
        if isinstance(module, (nn.Linear, SO3Linear)):
            names |= {f"{prefix}.bias"} if module.bias is not None else set()
        elif isinstance(module, _NORMS):
            names |= {f"{prefix}.{name}" for name, _ in module.named_parameters()}
    return names
