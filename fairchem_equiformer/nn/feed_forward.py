"""Feed-forward network (paper, section 3.5 and Fig. 1d)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fairchem_equiformer.nn.autocast import without_autocast
from fairchem_equiformer.nn.frozen import once
from fairchem_equiformer.nn.so3_linear import SO3Linear
from fairchem_equiformer.ops.gate import gate_activation
from fairchem_equiformer.ops.grid_mlp import grid_mlp
from fairchem_equiformer.ops.s2_activation import s2_activation, separable_s2_activation
from fairchem_equiformer.ops.so3_linear import so3_linear
from fairchem_equiformer.ops.touch import touch
from fairchem_equiformer.so3.grid import GridSpec
from fairchem_equiformer.so3.layout import layout


@dataclass(frozen=True, kw_only=True)
class FeedForwardConfig:
    """Sizes of a feed-forward network, in the paper's terms (section C)."""

    lmax: int
    channels: int  # d_embed
    hidden_channels: int  # d_ffn
    # "gate", "s2" or "separable_s2"; or, with F a three-layer perceptron (section 3.5), "grid_mlp"
    # or "separable_grid_mlp"
    activation: str
    grid_resolution: int | None


class FeedForward(nn.Module):
    """Equivariant linear layer, non-linearity, equivariant linear layer.

    Args:
        config: sizes.
        out_channels: of the last layer.
        scalars_only: compute l = 0 of the result only, as an energy head needs it.
    """

    def __init__(
        self, config: FeedForwardConfig, out_channels: int, *, scalars_only: bool = False
    ) -> None:
        super().__init__()
        self.config = config
        self.scalars_only = scalars_only
        channels, hidden, lmax = config.channels, config.hidden_channels, config.lmax
        self.layout = layout(lmax, lmax)
        self.rows = self.layout.l_major
        self.so3_linear_1 = SO3Linear(channels, hidden, lmax)
        if config.activation == "separable_grid_mlp":
            self.scalar_mlp = nn.Sequential(nn.Linear(channels, hidden), nn.SiLU())
        if config.activation.endswith("grid_mlp"):
            layers = [nn.Linear(hidden, hidden, bias=False) for _ in range(3)]
            self.grid_mlp = nn.Sequential(layers[0], nn.SiLU(), layers[1], nn.SiLU(), layers[2])
        elif config.activation != "s2":
            gates = lmax if config.activation == "gate" else 1
            self.gating_linear = nn.Linear(channels, gates * hidden)
        self.so3_linear_2 = SO3Linear(hidden, out_channels, lmax)

    def forward(self, x: Tensor) -> Tensor:
        """[N, (lmax + 1)^2, C] to [N, (lmax + 1)^2, out], or to [N, 1, out] for scalars only."""
        if not self.scalars_only:
            return so3_linear(self._hidden(x), self._second_weight(x), self.so3_linear_2.bias)
        hidden = self._scalars(x)
        with without_autocast(x.device):  # a result keeps its digits
            weight = self._second_weight(x)[:1]
            return so3_linear(hidden.to(weight.dtype), weight, self.so3_linear_2.bias)

    def _second_weight(self, x: Tensor) -> Tensor:
        """Of so3_linear_2, with what is folded into it."""
        if self.config.activation.endswith("grid_mlp"):
            return once(self, "last", x.dtype, self._last_weight)
        weight: Tensor = self.so3_linear_2.weight
        return weight

    @property
    def _separable(self) -> bool:
        return self.config.activation.startswith("separable")

    def _grid(self, wanted: str) -> GridSpec:
        return GridSpec(self.layout, self.config.grid_resolution, l_major=True, wanted=wanted)

    @staticmethod
    def _of_scalars(layer: nn.Module, x: Tensor) -> Tensor:
        """A layer on the channels of l = 0: [N, (lmax + 1)^2, C] to [N, 1, out].

        On matrices: with three dimensions PyTorch's path, and so its rounding, depends on whether
        the layer is trained.
        """
        y: Tensor = layer(x[:, 0])
        return y[:, None]

    def _last_weight(self) -> Tensor:
        """The perceptron's last layer, which acts on channels alone, and so3_linear_2."""
        weight: Tensor = self.so3_linear_2.weight
        folded = _matmul(weight, self.grid_mlp[4].weight)
        return torch.cat([weight[:1], folded[1:]]) if self._separable else folded

    def _first_weight(self) -> tuple[Tensor, Tensor]:
        """so3_linear_1 and the perceptron's first layer, which commutes with the grid."""
        mix, first = self.grid_mlp[0].weight, self.so3_linear_1
        return _matmul(mix, first.weight), mix @ first.bias

    def _first_grid_layer(self, x: Tensor) -> Tensor:
        return so3_linear(x, *once(self, "first", x.dtype, self._first_weight))

    def _hidden(self, x: Tensor) -> Tensor:
        """All degrees after the non-linearity: [N, (lmax + 1)^2, hidden]."""
        kind = self.config.activation
        if kind.endswith("grid_mlp"):
            h = self._first_grid_layer(x)
            middle = self.grid_mlp[2].weight
            if not self._separable:
                return grid_mlp(h, middle, self._grid("all"))
            vectors = grid_mlp(h, middle, self._grid("others"))
            scalars = self._of_scalars(self.scalar_mlp, x)
            return torch.cat([scalars.to(vectors.dtype), vectors], dim=1)
        h = self.so3_linear_1(x)
        if kind == "gate":
            return gate_activation(h, self.gating_linear(x[:, 0]), self.rows)
        if kind == "s2":
            return s2_activation(h, self._grid("all"))
        gates = self.gating_linear(x[:, 0]).to(h.dtype)
        return separable_s2_activation(h, gates, self._grid("others"))

    def _scalars(self, x: Tensor) -> Tensor:
        """l = 0 after the non-linearity, [N, 1, hidden]: often without the other degrees."""
        kind = self.config.activation
        first = self.so3_linear_1
        if kind == "separable_grid_mlp":
            scalars = self._of_scalars(self.scalar_mlp, x)
            return touch(scalars, *first.parameters(), *self.grid_mlp.parameters())
        if kind == "separable_s2":
            scalars = F.silu(self._of_scalars(self.gating_linear, x))
            return touch(scalars, *first.parameters())
        if kind == "gate":
            scalars = so3_linear(x[:, :1], first.weight[:1], first.bias)
            return touch(F.silu(scalars), *self.gating_linear.parameters())
        if kind == "grid_mlp":
            h = self._first_grid_layer(x)
            return grid_mlp(h, self.grid_mlp[2].weight, self._grid("scalars"))
        h = first(x)
        return s2_activation(h, self._grid("scalars"))


def _matmul(left: Tensor, right: Tensor) -> Tensor:
    """Product of a matrix per degree and one matrix, in either order.

    torch.matmul takes another path, with other rounding, where a gradient is wanted.
    """
    degrees = len(left) if left.ndim == 3 else len(right)
    return torch.bmm(left.expand(degrees, -1, -1), right.expand(degrees, -1, -1))
