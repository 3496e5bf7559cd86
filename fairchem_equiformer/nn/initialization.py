"""Initial weights."""

from __future__ import annotations

import math

from torch import nn

from fairchem_equiformer.nn.radial import RadialFunction
from fairchem_equiformer.nn.so3_linear import SO3Linear


def initialize(model: nn.Module, weight_init: str) -> None:
    """Set linear layers to N(0, 1 / inputs) ("normal") or leave them uniform ("uniform").

    Radial functions are uniform in +-1 / sqrt(inputs) either way, and all biases start at zero.
    """
    for module in model.modules():
        if isinstance(module, (nn.Linear, SO3Linear)):
            if module.bias is not None:
                nn.init.zeros_(module.bias)
            if weight_init == "normal":
                nn.init.normal_(module.weight, std=1 / math.sqrt(module.in_features))
    for module in model.modules():
        if isinstance(module, RadialFunction):
            for layer in module.net:
                if isinstance(layer, nn.Linear):
                    bound = 1 / math.sqrt(layer.in_features)
                    nn.init.uniform_(layer.weight, -bound, bound)
