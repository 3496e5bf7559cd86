"""The model's config keys: those of fairchem-core 1.10's EquiformerV2, flat and hydra, checked."""

from __future__ import annotations

import difflib
from dataclasses import dataclass, field, fields
from typing import Any

from fairchem_equiformer.graph.build import GraphConfig
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
)
_PROBABILITIES = ("alpha_drop", "drop_path_rate", "proj_drop")
_CHOICES: dict[str, tuple[Any, ...]] = {
    "norm_type": tuple(NORMS),
    "weight_init": ("normal", "uniform"),
    "distance_function": ("gaussian", "learnable_gaussian"),
    "use_s2_act_attn": (False,),
}
# Annotation of a key: types that it takes, and what to call them.
_TYPES: dict[str, tuple[tuple[type, ...], str]] = {
    "bool": ((bool,), "True or False"),
    "int": ((int,), "a whole number"),
    "float": ((int, float), "a number"),
    "str": ((str,), "a word"),
    "list[int]": ((list, tuple), "a list of whole numbers"),
}


@dataclass(frozen=True)
class ModelConfig:
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
    # Edges worked on at a time, by default as many as fit the processor's cache (CPU) or 256 MiB
    # (GPU). Fewer need less memory; the results are the same.
    edges_per_chunk: int | None = None
    use_tag_embedding: bool = False  # of data.tags: 0 bulk, 1 surface, 2 adsorbate

    @classmethod
    def from_keys(cls, keys: dict[str, Any]) -> ModelConfig:
        """Check the names of the keys, then their values.

        Keys set to None take their default, as in fairchem.

        Raises:
            ValueError: for an unknown key, naming the nearest known one.
        """
        known = [item.name for item in fields(cls)]
        for key in keys:
            if key not in known:
                near = difflib.get_close_matches(key, known, n=1)
                hint = (
                    f"; did you mean {near[0]!r}?" if near else f"; known keys: {', '.join(known)}"
                )
                msg = f"unknown key {key!r} in the config of EquiformerV2{hint}"
                raise ValueError(msg)
        return cls(**{key: value for key, value in keys.items() if value is not None})

    def __post_init__(self) -> None:
        self._check_types()
        for key in _POSITIVE:
            if not getattr(self, key) > 0:
                _refuse(key, getattr(self, key), "a number above 0")
        if self.edges_per_chunk is not None and self.edges_per_chunk < 1:
            _refuse("edges_per_chunk", self.edges_per_chunk, "a number above 0")
        for key in _PROBABILITIES:
            if not 0 <= getattr(self, key) < 1:
                _refuse(key, getattr(self, key), "a probability, at least 0 and below 1")
        for key, choices in _CHOICES.items():
            if getattr(self, key) not in choices:
                _refuse(key, getattr(self, key), " or ".join(map(repr, choices)))
        self._check_degrees()
        self._check_pairs()

    def _check_pairs(self) -> None:
        if self.share_atom_edge_embedding and not self.use_atom_edge_embedding:
            _refuse("use_atom_edge_embedding", False, "True with share_atom_edge_embedding: True")
        if self.use_energy_lin_ref and not self.load_energy_lin_ref:
            _refuse("load_energy_lin_ref", False, "True with use_energy_lin_ref: True")

    def _check_types(self) -> None:
        for key in fields(self):
            value, kind = getattr(self, key.name), str(key.type).removesuffix(" | None")
            if value is None and kind != key.type:
                continue
            types, wanted = _TYPES[kind]
            suits = isinstance(value, types) and (kind == "bool" or not isinstance(value, bool))
            if suits and kind == "list[int]":
                suits = all(type(item) is int for item in value)
            if not suits:
                _refuse(key.name, value, wanted)

    def _check_degrees(self) -> None:
        for key in ("lmax_list", "mmax_list"):
            if len(getattr(self, key)) != 1:
                _refuse(key, getattr(self, key), "a list of one number (one resolution)")
        if not 1 <= self.lmax <= _LARGEST_LMAX:
            _refuse("lmax_list", self.lmax_list, f"[1] to [{_LARGEST_LMAX}]")
        if not 0 <= self.mmax <= self.lmax:
            _refuse("mmax_list", self.mmax_list, f"[0] to lmax_list, which is {self.lmax_list}")
        fewest = 2 * (self.lmax + 1)
        if self.grid_resolution is not None and (
            self.grid_resolution % 2 or self.grid_resolution < fewest
        ):
            wanted = f"an even number of at least {fewest}, 2 (lmax + 1)"
            _refuse("grid_resolution", self.grid_resolution, wanted)

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


def _refuse(key: str, value: object, wanted: str) -> None:
    msg = f"EquiformerV2 config: {key} is {value!r}, it must be {wanted}"
    raise ValueError(msg)
