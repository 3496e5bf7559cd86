"""The model's config keys: those of fairchem-core 1.10's EquiformerV2, flat and hydra, checked."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

from fairchem_equiformer.graph.build import GraphConfig
from fairchem_equiformer.models.keys import Keys
from fairchem_equiformer.nn.attention import AttentionConfig
from fairchem_equiformer.nn.block import BlockConfig
from fairchem_equiformer.nn.feed_forward import FeedForwardConfig
from fairchem_equiformer.nn.norm import NORMS
from fairchem_equiformer.so3.layout import Layout, layout

# Statistics of OC20's IS2RE 100k split that fairchem and the paper divide by.
AVERAGE_NUM_NODES = 77.81317
AVERAGE_DEGREE = 23.395238876342773

_LARGEST_LMAX = 8
_POSITIVE = (
    "max_neighbors",
    "max_num_elements",
    "num_layers",
    "sphere_channels",
    "attn_hidden_channels",
    "num_heads",
    "attn_alpha_channels",
    "attn_value_channels",
    "ffn_hidden_channels",
    "edge_channels",
    "num_distance_basis",
    "max_radius",
    "edges_per_chunk",
)
_PROBABILITIES = ("alpha_drop", "drop_path_rate", "proj_drop")
_CHOICES: dict[str, tuple[Any, ...]] = {
    "norm_type": tuple(NORMS),
    "weight_init": ("normal", "uniform"),
    "distance_function": ("gaussian", "learnable_gaussian"),
    "use_s2_act_attn": (False,),
}


@dataclass(frozen=True)
class ModelConfig(Keys):
    """Keys under ``model:`` (flat) or ``model.backbone:`` (hydra), with fairchem's defaults.

    ``num_sphere_samples``, ``attn_activation``, ``ffn_activation`` and, with the ``gaussian``
    distance function, ``num_distance_basis`` do nothing, here as there: the model has SiLU and 600
    Gaussians. They are accepted so that configs of ``equiformer_v2`` work unchanged.

    On a CPU the compiled kernels need widths that are multiples of 16: ``sphere_channels``,
    ``attn_hidden_channels``, ``attn_value_channels``, ``ffn_hidden_channels``; 16, 32 or 64 for
    ``attn_alpha_channels`` and these or 128 for ``edge_channels``. Other widths are slower.

    Raises:
        ValueError: for a value the model cannot be built with; the message names the key.
    """

    MODEL: ClassVar = "EquiformerV2"
    POSITIVE: ClassVar = _POSITIVE
    PROBABILITIES: ClassVar = _PROBABILITIES
    CHOICES: ClassVar = _CHOICES

    use_pbc: bool = True
    use_pbc_single: bool = False
    regress_forces: bool = True
    otf_graph: bool = True
    max_neighbors: int = 500
    max_radius: float = 5.0  # Angstrom
    max_num_elements: int = 90  # atomic numbers below this
    num_layers: int = 12
    sphere_channels: int = 128
    attn_hidden_channels: int = 128
    num_heads: int = 8
    attn_alpha_channels: int = 32  # per head
    attn_value_channels: int = 16  # per head
    ffn_hidden_channels: int = 512
    norm_type: str = "rms_norm_sh"
    lmax_list: list[int] = field(default_factory=lambda: [6])
    mmax_list: list[int] = field(default_factory=lambda: [2])
    grid_resolution: int | None = None
    num_sphere_samples: int = 128  # no effect
    edge_channels: int = 128
    use_atom_edge_embedding: bool = True
    share_atom_edge_embedding: bool = False
    use_m_share_rad: bool = False
    # "learnable_gaussian" has num_distance_basis Gaussians that training moves (Equiformer's).
    distance_function: str = "gaussian"
    num_distance_basis: int = 512
    attn_activation: str = "scaled_silu"  # no effect
    use_s2_act_attn: bool = False
    use_attn_renorm: bool = True
    ffn_activation: str = "scaled_silu"  # no effect
    use_gate_act: bool = False
    use_grid_mlp: bool = False
    use_sep_s2_act: bool = True
    alpha_drop: float = 0.1
    drop_path_rate: float = 0.05
    proj_drop: float = 0.0
    weight_init: str = "normal"
    enforce_max_neighbors_strictly: bool = True
    avg_num_nodes: float | None = None
    avg_degree: float | None = None
    use_energy_lin_ref: bool = False
    load_energy_lin_ref: bool = False
    # Keep only the blocks' inputs for the backward pass. Fairchem's flat model lacks this key.
    activation_checkpoint: bool = False
    # The keys from here on are not fairchem's.
    # Edges worked on at a time, by default 3 MiB a thread (CPU) or 256 MiB
    # (GPU). Fewer need less memory; the results are the same.
    edges_per_chunk: int | None = None
    use_tag_embedding: bool = False  # of data.tags: 0 bulk, 1 surface, 2 adsorbate

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_degrees()
        self._check_pairs()

    def _check_pairs(self) -> None:
        if self.share_atom_edge_embedding and not self.use_atom_edge_embedding:
            self.refuse("use_atom_edge_embedding", "True with share_atom_edge_embedding: True")
        if self.use_energy_lin_ref and not self.load_energy_lin_ref:
            self.refuse("load_energy_lin_ref", "True with use_energy_lin_ref: True")

    def _check_degrees(self) -> None:
        for key in ("lmax_list", "mmax_list"):
            if len(getattr(self, key)) != 1:
                self.refuse(key, "a list of one number (one resolution)")
        if not 1 <= self.lmax <= _LARGEST_LMAX:
            self.refuse("lmax_list", f"[1] to [{_LARGEST_LMAX}]")
        if not 0 <= self.mmax <= self.lmax:
            self.refuse("mmax_list", f"[0] to lmax_list, which is {self.lmax_list}")
        fewest = 2 * (self.lmax + 1)
        if self.grid_resolution is not None and (
            self.grid_resolution % 2 or self.grid_resolution < fewest
        ):
            wanted = f"an even number of at least {fewest}, 2 (lmax + 1)"
            self.refuse("grid_resolution", wanted)

    @property
    def lmax(self) -> int:
        """Highest degree."""
        return self.lmax_list[0]

    @property
    def mmax(self) -> int:
        """Highest order in the edge frame."""
        return self.mmax_list[0]

    @property
    def layout(self) -> Layout:
        """Coefficients kept in the edge frame."""
        return layout(self.lmax, self.mmax)

    @property
    def activation(self) -> str:
        """Kind of activation, see nn/attention.py."""
        if self.use_gate_act:
            return "gate"
        return "separable_s2" if self.use_sep_s2_act else "s2"

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

    def attention(self, num_basis: int) -> AttentionConfig:
        """Sizes of the attention layers."""
        own_embedding = self.use_atom_edge_embedding and not self.share_atom_edge_embedding
        return AttentionConfig(
            layout=self.layout,
            channels=self.sphere_channels,
            hidden_channels=self.attn_hidden_channels,
            num_heads=self.num_heads,
            alpha_channels=self.attn_alpha_channels,
            value_channels=self.attn_value_channels,
            activation=self.activation,
            renormalize=self.use_attn_renorm,
            grid_resolution=self.grid_resolution,
            num_basis=num_basis,
            edge_channels=self.edge_channels,
            num_elements=self.max_num_elements if own_embedding else 0,
            shared_embedding=self.share_atom_edge_embedding,
            radial_by_degree=self.use_m_share_rad,
        )

    def feed_forward(self) -> FeedForwardConfig:
        """Sizes of the feed-forward networks."""
        activation = self.activation
        if self.use_grid_mlp:
            activation = "separable_grid_mlp" if self.use_sep_s2_act else "grid_mlp"
        return FeedForwardConfig(
            lmax=self.lmax,
            channels=self.sphere_channels,
            hidden_channels=self.ffn_hidden_channels,
            activation=activation,
            grid_resolution=self.grid_resolution,
        )

    def block(self, num_basis: int) -> BlockConfig:
        """Sizes and regularisation of the blocks."""
        return BlockConfig(
            attention=self.attention(num_basis),
            feed_forward=self.feed_forward(),
            norm=self.norm_type,
            alpha_drop=self.alpha_drop,
            drop_path=self.drop_path_rate,
            channel_drop=self.proj_drop,
        )
