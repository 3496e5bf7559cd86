"""The graph of a batch of structures."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class EdgeGraph:
    """Directed edges of a batch of structures, sorted by receiving atom.

    An edge carries a message from atom ``source`` to atom ``target``. All edges that atom ``i``
    receives are contiguous, so that a sum or a softmax over neighbours is a segment operation.
    """

    source: Tensor  # [E] int64, neighbour j
    target: Tensor  # [E] int64, receiving atom i, ascending (CSR order)
    target_ptr: Tensor  # [N + 1] int64, edges of atom i are target_ptr[i]:target_ptr[i + 1]
    vector: Tensor  # [E, 3] Angstrom, pos[source] + offset - pos[target]
    distance: Tensor  # [E] Angstrom
    atomic_numbers: Tensor  # [N] int64
    batch: Tensor  # [N] int64, structure of each atom
    natoms: Tensor  # [B] int64, atoms of each structure
    tags: Tensor | None = None  # [N] int64, where the model reads them

    @property
    def num_graphs(self) -> int:
        """Number of structures in the batch, B."""
        return self.natoms.shape[0]

    @property
    def num_nodes(self) -> int:
        """Number of atoms in the batch, N."""
        return self.atomic_numbers.shape[0]

    @property
    def num_edges(self) -> int:
        """Number of directed edges in the batch, E."""
        return self.source.shape[0]
