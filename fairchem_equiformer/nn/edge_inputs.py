"""What every layer reads of a batch's edges."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from fairchem_equiformer.ops.edges import Edges
from fairchem_equiformer.ops.radial import Basis


@dataclass(frozen=True)
class EdgeInputs:
    """Edges, and the parameters of the whole model by which layers read them."""

    edges: Edges
    basis: Basis  # of the radial functions
    # Element embeddings of the model, for layers that have none of their own.
    source_embedding: nn.Embedding | None = None
    target_embedding: nn.Embedding | None = None
