"""Parameters of the equivariant norms. All take [N, (lmax + 1)^2, C]."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fairchem_equiformer.ops.norm import EPSILON, norm


class _Norm(nn.Module):
    """Runs in float32 at least, also under autocast. The computation is ops/norm.py."""

    kind: str

    def __init__(self, lmax: int, channels: int) -> None:
        super().__init__()
        self.lmax = lmax
        self.channels = channels

    def forward(self, x: Tensor) -> Tensor:
        """Normalise [N, (lmax + 1)^2, C]."""
        parameters = self.weights()
        return norm(self.kind, x.to(parameters[0].dtype), *parameters)

    def weights(self) -> tuple[Tensor, ...]:
        """Parameters as ops/norm.py takes them."""
        raise NotImplementedError

    def extra_repr(self) -> str:
        """What ``print(model)`` shows."""
        return f"lmax={self.lmax}, channels={self.channels}"


class _NormOfAllDegrees(_Norm):
    def __init__(self, lmax: int, channels: int) -> None:
        super().__init__(lmax, channels)
        self.affine_weight = nn.Parameter(torch.ones(lmax + 1, channels))
        self.affine_bias = nn.Parameter(torch.zeros(channels))

    def weights(self) -> tuple[Tensor, ...]:
        """Parameters as ops/norm.py takes them."""
        return self.affine_weight, self.affine_bias


class DegreeLayerNorm(_NormOfAllDegrees):
    """``layer_norm``: every degree is divided by its own RMS; l = 0 is centred first."""

    kind = "layer_norm"


class SeparableLayerNorm(_Norm):
    """``layer_norm_sh``: layer norm on l = 0; one RMS, averaged over degrees, for all l > 0."""

    kind = "layer_norm_sh"

    def __init__(self, lmax: int, channels: int) -> None:
        super().__init__(lmax, channels)
        self.norm_l0 = nn.LayerNorm(channels, eps=EPSILON)
        self.affine_weight = nn.Parameter(torch.ones(lmax, channels))

    def weights(self) -> tuple[Tensor, ...]:
        """Parameters as ops/norm.py takes them."""
        return self.affine_weight, self.norm_l0.weight, self.norm_l0.bias


class RMSNorm(_NormOfAllDegrees):
    """``rms_norm_sh``: one RMS, averaged over degrees, for all l; l = 0 is centred first."""

    kind = "rms_norm_sh"


NORMS: dict[str, type[_Norm]] = {
    kind.kind: kind for kind in (DegreeLayerNorm, SeparableLayerNorm, RMSNorm)
}
