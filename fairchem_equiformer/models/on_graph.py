"""A model from its graph on: tensors in, tensors out, for ``torch.compile`` and ``torch.export``.

The search for neighbours stays outside. How many edges there are, and into which chunks they are
cut, follows from positions: the host has to read it, which ends a compiled graph.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.export import Dim, ExportedProgram, export

from fairchem_equiformer.graph.edge_graph import EdgeGraph
from fairchem_equiformer.models.dens import is_denoising
from fairchem_equiformer.models.equiformer_v1 import Equiformer
from fairchem_equiformer.models.equiformer_v2 import EquiformerV2
from fairchem_equiformer.models.hydra import EquiformerV2Hydra
from fairchem_equiformer.ops.segments import table_of, target_chunks

_FIELDS = (
    "source",
    "target",
    "target_ptr",
    "vector",
    "distance",
    "atomic_numbers",
    "batch",
    "natoms",
)
_OF_ATOMS = ("atomic_numbers", "batch", "tags", "forces", "noise_mask", "sigmas")


class OnGraph(nn.Module):
    """A model whose arguments are what :meth:`inputs` makes of a batch.

    Args:
        model: flat, or with heads by name, or Equiformer (V1). Shared, not copied.
    """

    def __init__(self, model: EquiformerV2 | EquiformerV2Hydra | Equiformer) -> None:
        super().__init__()
        self.model = model

    def inputs(self, data: Any) -> dict[str, Tensor]:
        """Arguments of :meth:`forward` for a batch: the fields of its graph, and its chunks.

        Raises:
            StructureError: for bad input, a ValueError that names structure and value.
            ValueError: for a model whose forces are the energy's derivative.
        """
        base = self.model.base
        if isinstance(base, Equiformer):
            base.refuse_derivatives()
        graph = base.read(data)
        most = base.edges_at_once(graph.vector.device)
        table = table_of(target_chunks(graph.target_ptr, most))
        tags = {} if graph.tags is None else {"tags": graph.tags}
        fields = {name: getattr(graph, name) for name in _FIELDS}
        return fields | tags | {"chunks": table} | _noise_of(data)

    def exported(self, data: Any) -> ExportedProgram:
        """The model for ``torch.export.save``, for any number of atoms, edges and structures.

        Args:
            data: a batch to trace the model with, of two structures at least and in two chunks at
                least, since PyTorch takes a size of one for a constant.
        """
        inputs = self.inputs(data)
        small = [name for name in ("natoms", "chunks") if inputs[name].shape[0] < 2]
        if small:
            raise ValueError(f"{small[0]}: the batch to export with has one, it must have two")
        edges, atoms = Dim("edges"), Dim("atoms", max=2**31)
        counts = {"target_ptr": atoms + 1, "natoms": Dim("structures"), "chunks": Dim("chunks")}
        counts |= dict.fromkeys(_OF_ATOMS, atoms)
        sizes = {name: {0: counts.get(name, edges)} for name in inputs}
        return export(self, (), inputs, dynamic_shapes=sizes)

    def forward(
        self,
        source: Tensor,
        target: Tensor,
        target_ptr: Tensor,
        vector: Tensor,
        distance: Tensor,
        atomic_numbers: Tensor,
        batch: Tensor,
        natoms: Tensor,
        chunks: Tensor,
        tags: Tensor | None = None,
        forces: Tensor | None = None,
        noise_mask: Tensor | None = None,
        sigmas: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Predict as the model does, in the normalised units of training.

        Args:
            source: [E] and so on: fields of
                :class:`~fairchem_equiformer.graph.edge_graph.EdgeGraph`.
            chunks: [chunks, 6] int64, in the host's memory whatever the device.
            tags: [N], where the model reads them.
            forces: [N, 3] in a noisy step of DeNS, and what follows as there.
            noise_mask: [N].
            sigmas: [N, 1].
        """
        graph = EdgeGraph(
            source, target, target_ptr, vector, distance, atomic_numbers, batch, natoms, tags
        )
        noise = None if forces is None else _Noise(forces, noise_mask, sigmas)
        return self.model.of_graph(graph, noise, chunk_table=chunks)


@dataclass
class _Noise:
    """What a model with DeNS reads of a batch in a noisy step: see models/dens.py."""

    forces: Tensor
    noise_mask: Tensor | None
    sigmas: Tensor | None
    denoising_pos_forward: bool = True


def _noise_of(data: Any) -> dict[str, Tensor]:
    """Fields of :class:`_Noise` in a noisy step.

    Raises:
        ValueError: if there are no forces.
    """
    if not is_denoising(data):
        return {}
    if getattr(data, "forces", None) is None:
        raise ValueError("the batch is noisy, but has no field 'forces'")
    found = {name: getattr(data, name, None) for name in ("forces", "noise_mask", "sigmas")}
    return {name: value for name, value in found.items() if value is not None}
