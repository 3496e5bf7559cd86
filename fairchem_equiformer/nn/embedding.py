"""Edge-degree embedding."""

from __future__ import annotations

from torch import Tensor, nn

from fairchem_equiformer.nn.autocast import without_autocast
from fairchem_equiformer.nn.edge_inputs import EdgeInputs
from fairchem_equiformer.nn.frozen import kept
from fairchem_equiformer.nn.radial import ElementEmbedding, RadialFunction
from fairchem_equiformer.ops.edge_degree import edge_degree_embedding
from fairchem_equiformer.ops.radial import RadialTables


class EdgeDegreeEmbedding(nn.Module):
    """Embeds each atom's neighbourhood from distances and elements alone (paper, section 3.5).

    Args:
        channels: C.
        lmax: highest degree.
        num_basis: Gaussians.
        edge_channels: hidden size of the radial function and size of the element embeddings.
        num_elements: rows of the element embeddings; 0 for none of its own.
        shared_embedding: the radial function reads embeddings that are handed in.
        average_degree: edges per atom; divides the sum.
    """

    def __init__(
        self,
        *,
        channels: int,
        lmax: int,
        num_basis: int,
        edge_channels: int,
        num_elements: int,
        shared_embedding: bool,
        average_degree: float,
    ) -> None:
        super().__init__()
        self.source_embedding = self.target_embedding = None
        in_features = num_basis
        if num_elements:
            self.source_embedding = ElementEmbedding(num_elements, edge_channels)
            self.target_embedding = ElementEmbedding(num_elements, edge_channels)
        if num_elements or shared_embedding:
            in_features += 2 * edge_channels
        self.rad_func = RadialFunction(in_features, edge_channels, (lmax + 1) * channels)
        self.average_degree = average_degree

    def forward(self, inputs: EdgeInputs) -> Tensor:
        """Embedding [rows, (lmax + 1)^2, C], in the weights' dtype also under autocast.

        It has a few of the model's products, and all nodes begin with its sums and rotations.
        """
        with without_autocast(inputs.edges.vector.device):
            return self._embedding(inputs)

    def _embedding(self, inputs: EdgeInputs) -> Tensor:
        source = self.source_embedding or inputs.source_embedding
        target = self.target_embedding or inputs.target_embedding
        weights, basis = self.rad_func.weights(source, target), inputs.basis
        tables = kept(
            self,
            "tables",
            weights.weight_1.dtype,
            lambda: RadialTables.of(weights.including(basis)),
        )
        return edge_degree_embedding(inputs.edges, basis, weights, self.average_degree, tables)
