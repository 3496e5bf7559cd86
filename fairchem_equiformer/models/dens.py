"""DeNS: training that also denoises structures which are not at equilibrium (arXiv:2403.09549).

In a share of the training steps the positions are noisy. Then the model reads the forces of the
clean structure, which say what that structure is, and its force head predicts the noise in place of
forces. Otherwise it is EquiformerV2, and reads no forces.

The noisy steps are told by fields of the batch, as fairchem-core 1.10's trainer
``equiformerv2_dens`` sets them:

    denoising_pos_forward   True in a noisy step
    forces                  [N, 3] of the clean structure
    noise_mask              [N] bool, which atoms are noisy; all of them where there is none
    sigmas                  [N, 1] standard deviation of the noise, where the model encodes it
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from fairchem_equiformer.models.backbone import EquiformerV2Backbone
from fairchem_equiformer.models.heads import EnergyHead, StressHead, check_backbone
from fairchem_equiformer.models.load_hooks import drop_derived
from fairchem_equiformer.models.readouts import force_block, forces
from fairchem_equiformer.nn.initialization import initialize
from fairchem_equiformer.nn.so3_linear import SO3Linear
from fairchem_equiformer.ops.harmonics import spherical_harmonics
from fairchem_equiformer.ops.touch import touch

if TYPE_CHECKING:
    from fairchem_equiformer.graph.edge_graph import EdgeGraph
    from fairchem_equiformer.models.backbone import Embedding


def is_denoising(data: Any) -> bool:
    """Whether the positions of a batch are noisy, so that the noise is what to predict."""
    return bool(getattr(data, "denoising_pos_forward", False))


class DeNSBackbone(EquiformerV2Backbone):
    """EquiformerV2's backbone with an encoding of forces.

    Args:
        use_force_encoding: False encodes zeros in noisy steps, too (the paper's ablation).
        use_noise_schedule_sigma_encoding: add a linear function of each atom's ``sigmas``.
        keys: those of :class:`~fairchem_equiformer.models.config.ModelConfig`.

    Raises:
        ValueError: for an unknown key or an impossible value.
    """

    own_keys: ClassVar = frozenset({"use_force_encoding", "use_noise_schedule_sigma_encoding"})

    def __init__(
        self,
        use_force_encoding: bool = True,
        use_noise_schedule_sigma_encoding: bool = False,
        **keys: Any,
    ) -> None:
        super().__init__(**keys)
        self.use_force_encoding = use_force_encoding
        channels, lmax = self.config.sphere_channels, self.config.lmax
        self.force_embedding = SO3Linear(1, channels, lmax)
        initialize(self.force_embedding, self.config.weight_init)
        self.noise_schedule_sigma_embedding = None
        if use_noise_schedule_sigma_encoding:
            self.noise_schedule_sigma_embedding = nn.Linear(1, channels)
            initialize(self.noise_schedule_sigma_embedding, self.config.weight_init)

    def further_inputs(self, data: Any, graph: EdgeGraph) -> Tensor:
        """What the nodes start from beside their elements: [N, (lmax + 1)^2, C]."""
        x: Tensor = self.force_embedding(self._forces_on_sphere(data, graph.num_nodes)[:, :, None])
        if self.noise_schedule_sigma_embedding is None:
            return x
        sigmas = torch.zeros_like(x[:, 0, :1])
        if is_denoising(data):
            sigmas = _field(data, "sigmas").to(x).reshape(-1, 1)
        scalars = x[:, :1] + self.noise_schedule_sigma_embedding(sigmas)[:, None]
        return torch.cat([scalars, x[:, 1:]], dim=1)

    def _forces_on_sphere(self, data: Any, num_atoms: int) -> Tensor:
        """|F| / sqrt(3) Y(F / |F|) with component-normalised Y: [N, (lmax + 1)^2]."""
        weight = self.force_embedding.weight
        degrees = list(range(self.config.lmax + 1))
        if not (is_denoising(data) and self.use_force_encoding):
            return weight.new_zeros(num_atoms, len(degrees) ** 2)
        force = _field(data, "forces").to(weight)
        mask = getattr(data, "noise_mask", None)
        if mask is not None:
            force = force * mask.reshape(-1, 1)
        harmonics = spherical_harmonics(degrees, force, normalize=True, normalization="component")
        length: Tensor = force.norm(dim=1, keepdim=True)
        return harmonics * length / math.sqrt(3)


def _field(data: Any, name: str) -> Tensor:
    value: Tensor | None = getattr(data, name, None)
    if value is None:
        raise ValueError(f"the batch has no field {name!r}, which a model with DeNS reads as noisy")
    return value


class DeNSEnergyHead(EnergyHead):
    """Energy of each structure; of the clean one where positions are noisy.

    Args:
        backbone: whose features it reads.
        output_name: key of the result.
        reduce: "sum" over atoms, divided by the mean number of atoms, or "mean".
        use_denoising: False gives zero where positions are noisy.

    Raises:
        ValueError: for another ``reduce``.
        TypeError: for another backbone.
    """

    block_name: ClassVar = "scalar_block"

    def __init__(
        self,
        backbone: EquiformerV2Backbone,
        output_name: str = "energy",
        reduce: str = "sum",
        use_denoising: bool = True,
    ) -> None:
        super().__init__(backbone, output_name, reduce)
        self.use_denoising = use_denoising

    def forward(self, data: Any, emb: Embedding) -> dict[str, Tensor]:
        """[B], keyed by ``output_name``."""
        return _unless_noisy(self, data, super().forward(data, emb))


class DeNSForceHead(nn.Module):
    """Force on each atom, or the noise in its position where that is noisy.

    The noise is in units of its standard deviation. A block of graph attention each.

    Args:
        backbone: whose features it reads.
        output_name: key of the result.

    Raises:
        TypeError: for another backbone.
    """

    def __init__(self, backbone: EquiformerV2Backbone, output_name: str = "forces") -> None:
        super().__init__()
        check_backbone(self, backbone)
        self.output_name = output_name
        self.vector_block = force_block(backbone)
        self.denoising_pos_block = force_block(backbone)
        initialize(self, backbone.config.weight_init)
        drop_derived(self)

    @staticmethod
    def results(output_name: str = "forces", **_: Any) -> list[str]:
        """Keys of what a head of these config keys gives."""
        return [output_name]

    def forward(self, data: Any, emb: Embedding) -> dict[str, Tensor]:
        """[N, 3], keyed by ``output_name``."""
        mask = getattr(data, "noise_mask", None)
        if is_denoising(data) and mask is not None:
            noisy = mask.bool().reshape(-1, 1)
            noise, force = (forces(b, emb) for b in (self.denoising_pos_block, self.vector_block))
            return {self.output_name: torch.where(noisy, noise, force)}
        used, unused = self.vector_block, self.denoising_pos_block
        if is_denoising(data):
            used, unused = unused, used
        # Data-parallel training waits for a gradient of the other block, too: zero.
        return {self.output_name: touch(forces(used, emb), *unused.parameters())}


class DeNSStressHead(StressHead):
    """Symmetric second-rank tensor of each structure.

    Takes the keys of :class:`StressHead`, and

    Args:
        use_denoising: False gives zero where positions are noisy.

    Raises:
        TypeError: for another backbone.
        ValueError: for fewer than one layer.
    """

    def __init__(
        self, backbone: EquiformerV2Backbone, *args: Any, use_denoising: bool = True, **keys: Any
    ) -> None:
        super().__init__(backbone, *args, **keys)
        self.use_denoising = use_denoising

    def forward(self, data: Any, emb: Embedding) -> dict[str, Tensor]:
        """As :meth:`StressHead.forward`."""
        return _unless_noisy(self, data, super().forward(data, emb))


def _unless_noisy(
    head: DeNSEnergyHead | DeNSStressHead, data: Any, results: dict[str, Tensor]
) -> dict[str, Tensor]:
    """Zeros where positions are noisy and the head is not to be trained on that."""
    if head.use_denoising or not is_denoising(data):
        return results
    return {key: value * 0.0 for key, value in results.items()}
