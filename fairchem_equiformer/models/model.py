"""What a framework that trains a model asks of it, whichever model it is."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn

from fairchem_equiformer.models.weight_decay import no_weight_decay

if TYPE_CHECKING:
    from fairchem_equiformer.graph.edge_graph import EdgeGraph
    from fairchem_equiformer.ops.edges import NodeShare


class Model(nn.Module):
    """Base of Equiformer and of EquiformerV2's backbone."""

    def node_share(self, graph: EdgeGraph) -> NodeShare | None:  # noqa: ARG002
        """The atoms whose features this process computes; None for all.

        A framework that spreads the atoms of a batch over processes overrides this.
        """
        return None

    @property
    def num_params(self) -> int:
        """Number of parameters, trainable or not."""
        return sum(parameter.numel() for parameter in self.parameters())

    def no_weight_decay(self) -> set[str]:
        """Names of parameters that weight decay leaves alone."""
        return no_weight_decay(self)
