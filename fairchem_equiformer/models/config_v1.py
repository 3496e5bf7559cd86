"""The config keys of Equiformer (V1), checked."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from e3nn import o3

from fairchem_equiformer.graph.build import GraphConfig
from fairchem_equiformer.models.keys import Keys
from fairchem_equiformer.nn.irreps.attention import IrrepsAttentionConfig
from fairchem_equiformer.nn.irreps.block import IrrepsBlockConfig
from fairchem_equiformer.so3.irreps import SCALAR

_IRREPS = (
    "irreps_node_embedding",
    "irreps_sh",
    "irreps_head",
    "irreps_mlp_mid",
    "irreps_feature",
)
_HIGHEST_DEGREE = 8


@dataclass(frozen=True)
class EquiformerConfig(Keys):
    """Keys under ``model:``. The defaults are the poster's model of OC20 IS2RE.

    Irreps are written as e3nn writes them, each once and scalars (0e) first. Harmonics of even
    parity alone (``1x0e+1x1e``) make a model that turns with the structure, SE(3); those of their
    own parity (``1x0e+1x1o``) one that is also reflected with it, E(3). Vectors that the model
    predicts are 1e in the first case and 1o in the second.

    Raises:
        ValueError: for a value the model cannot be built with; the message names the key.
    """

    MODEL: ClassVar = "Equiformer"
    POSITIVE: ClassVar = (
        "max_neighbors",
        "max_radius",
        "max_num_elements",
        "num_layers",
        "num_heads",
        "edge_channels",
        "num_distance_basis",
        "avg_num_nodes",
        "avg_degree",
    )
    PROBABILITIES: ClassVar = ("alpha_drop", "drop_path_rate")
    CHOICES: ClassVar = {
        "attention": ("mlp", "dot_product"),
        "distance_function": ("learnable_gaussian", "exponential_normal", "bessel"),
    }

    use_pbc: bool = True
    use_pbc_single: bool = False
    otf_graph: bool = True
    max_neighbors: int = 500
    max_radius: float = 5.0  # Angstrom
    enforce_max_neighbors_strictly: bool = True
    max_num_elements: int = 84  # atomic numbers below this
    use_tag_embedding: bool = True  # of data.tags: 0 bulk, 1 surface, 2 adsorbate

    # Forces and, with regress_stress, stress; the first by a head of their own (direct_forces) or
    # both as derivatives of the energy.
    regress_forces: bool = False
    direct_forces: bool = True
    regress_stress: bool = False
    vector_outputs: list[str] = field(default_factory=list)  # further vectors of atoms, by name

    num_layers: int = 6
    irreps_node_embedding: str = "256x0e+128x1e"
    irreps_sh: str = "1x0e+1x1e"  # harmonics of the edges
    irreps_head: str = "32x0e+16x1e"  # values of one head; its logit is made of as many scalars
    num_heads: int = 8
    irreps_mlp_mid: str = "768x0e+384x1e"  # in the feed-forward networks
    irreps_feature: str = "512x0e"  # of the last block, which the heads read
    attention: str = "mlp"
    nonlinear_message: bool = True  # no effect with dot_product, whose messages are linear

    distance_function: str = "learnable_gaussian"
    num_distance_basis: int = 128
    edge_channels: int = 64  # of the radial functions' hidden layers
    # Take what an edge adds to zero at max_radius, with two derivatives. Not in published models,
    # whose energies jump where an atom comes within reach, with any radial basis.
    smooth_cutoff: bool = False

    alpha_drop: float = 0.2  # dropout of attention weights
    drop_path_rate: float = 0.0  # stochastic depth

    avg_num_nodes: float = 77.81317  # the sum over atoms is divided by its square root
    avg_degree: float = 23.395238876342773  # likewise, the edge-degree embedding's over edges

    # Edges worked through at a time; by default as many as the processor's cache holds.
    edges_per_chunk: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        for key in _IRREPS:
            self._check_irreps(key)
        self._check_harmonics()
        self._check_outputs()

    def _check_irreps(self, key: str) -> None:
        try:
            irreps = o3.Irreps(getattr(self, key))
        except (ValueError, AssertionError):
            self.refuse(key, "irreps as e3nn writes them, such as '256x0e+128x1e'")
        kinds = [ir for mul, ir in irreps if mul > 0]
        if not kinds or kinds[0] != SCALAR or len(set(kinds)) != len(irreps):
            self.refuse(key, "irreps with 0e first, and each once")
        if irreps.lmax > _HIGHEST_DEGREE:
            self.refuse(key, f"irreps of degrees up to {_HIGHEST_DEGREE}")

    def _check_harmonics(self) -> None:
        harmonics = self.irreps("irreps_sh")
        even = [(1, (degree, 1)) for degree in range(harmonics.lmax + 1)]
        own = [(1, (degree, (-1) ** degree)) for degree in range(harmonics.lmax + 1)]
        if harmonics not in (o3.Irreps(even), o3.Irreps(own)):
            self.refuse("irreps_sh", f"{o3.Irreps(even)} (SE(3)) or {o3.Irreps(own)} (E(3))")
        if self.parity:
            return
        for key in _IRREPS:
            if any(ir.p == -1 for _, ir in self.irreps(key)):
                self.refuse(key, "of even irreps, since irreps_sh has no odd ones")

    def _check_outputs(self) -> None:
        if self.regress_stress and not self.gradient_forces:
            self.refuse(
                "regress_stress", "False without regress_forces: True, direct_forces: False"
            )
        names = self.vector_heads
        if len(set(names)) != len(names) or "energy" in names:
            self.refuse("vector_outputs", "names of outputs, each once")
        if names and self.vector not in self.irreps("irreps_head"):
            self.refuse("irreps_head", f"irreps with {self.vector}, which {names[0]} is made of")

    def irreps(self, key: str) -> o3.Irreps:
        """The irreps that a key names."""
        return o3.Irreps(getattr(self, key))

    @property
    def parity(self) -> bool:
        """Whether irreps tell what a reflection does, E(3), or rotations alone, SE(3)."""
        return any(ir.p == -1 for _, ir in self.irreps("irreps_sh"))

    @property
    def vector(self) -> o3.Irrep:
        """What forces and displacements are."""
        return o3.Irrep(1, -1 if self.parity else 1)

    @property
    def gradient_forces(self) -> bool:
        """Whether forces are derivatives of the energy."""
        return self.regress_forces and not self.direct_forces

    @property
    def vector_heads(self) -> list[str]:
        """Outputs that are vectors of atoms with a head of their own."""
        direct = self.regress_forces and self.direct_forces
        return (["forces"] if direct else []) + list(self.vector_outputs)

    def graph(self, *, otf: bool) -> GraphConfig:
        """Which edges the model reads; ``otf`` stands for ``otf_graph``, which callers may set."""
        return GraphConfig(
            max_radius=self.max_radius,
            max_neighbors=self.max_neighbors,
            enforce_max_neighbors_strictly=self.enforce_max_neighbors_strictly,
            use_pbc=self.use_pbc,
            use_pbc_single=self.use_pbc_single,
            otf_graph=otf,
            max_num_elements=self.max_num_elements,
            use_tags=self.use_tag_embedding,
        )

    def attention_sizes(self) -> IrrepsAttentionConfig:
        """Sizes of the attention layers."""
        return IrrepsAttentionConfig(
            irreps=self.irreps("irreps_node_embedding"),
            irreps_sh=self.irreps("irreps_sh"),
            irreps_head=self.irreps("irreps_head"),
            num_heads=self.num_heads,
            attention=self.attention,
            nonlinear_message=self.nonlinear_message,
            num_basis=self.num_distance_basis,
            edge_channels=self.edge_channels,
            alpha_drop=self.alpha_drop,
        )

    def block(self) -> IrrepsBlockConfig:
        """Sizes and regularisation of the blocks."""
        return IrrepsBlockConfig(
            attention=self.attention_sizes(),
            irreps_mlp_mid=self.irreps("irreps_mlp_mid"),
            drop_path=self.drop_path_rate,
        )
