"""The published checkpoints of EquiformerV2: what each is, and where to get it.

Config keys are those of the configs that fairchem published beside them. The files themselves could
not be had when this was written: tests/test_published.py says what was tested.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from fairchem_equiformer.models import DeNSBackbone, EquiformerV2, EquiformerV2Backbone, ModelConfig

if TYPE_CHECKING:
    from fairchem_equiformer.checkpoints.checkpoint import Checkpoint

# What all of them share.
_SHARED: dict[str, Any] = {
    "use_pbc": True,
    "otf_graph": True,
    "max_neighbors": 20,
    "sphere_channels": 128,
    "attn_hidden_channels": 64,
    "num_heads": 8,
    "attn_alpha_channels": 64,
    "attn_value_channels": 16,
    "ffn_hidden_channels": 128,
    "norm_type": "layer_norm_sh",
    "grid_resolution": 18,
    "num_sphere_samples": 128,
    "edge_channels": 128,
    "use_atom_edge_embedding": True,
    "distance_function": "gaussian",
    "num_distance_basis": 512,
    "attn_activation": "silu",
    "use_s2_act_attn": False,
    "ffn_activation": "silu",
    "use_gate_act": False,
    "use_grid_mlp": True,
    "alpha_drop": 0.1,
    "drop_path_rate": 0.1,
    "proj_drop": 0.0,
    "weight_init": "uniform",
}
# Blocks, Lmax and Mmax by the name of the size.
_SIZES = {
    "31M": (8, 4, 2),
    "83M": (12, 6, 2),
    "86M": (10, 6, 4),
    "121M": (18, 6, 2),
    "153M": (20, 6, 3),
}
_OC20 = {"regress_forces": True, "max_radius": 12.0, "max_num_elements": 90}
_OC22 = _OC20 | {"enforce_max_neighbors_strictly": False, "load_energy_lin_ref": True}
_ODAC = {
    "regress_forces": True,
    "max_radius": 8.0,
    "max_num_elements": 100,
    "avg_num_nodes": 192.561,
    "avg_degree": 21.024127419363214,
}
_OMAT = {
    "use_pbc_single": True,
    "enforce_max_neighbors_strictly": False,
    "max_radius": 12.0,
    "max_num_elements": 96,
    "avg_num_nodes": 31.16592360068011,
    "avg_degree": 61.94676351484548,
}
_DENS = _OMAT | {"use_force_encoding": True, "use_noise_schedule_sigma_encoding": False}
_SERVER = "dl.fbaipublicfiles.com/"
_HUB = "facebook/OMAT24"  # on the Hugging Face hub


@dataclass(frozen=True)
class Published:
    """One of the published checkpoints.

    Attributes:
        file: name of the file.
        name: in fairchem-core 1.10's model registry.
        data: it was trained on.
        size: what it is called after.
        parameters: their number.
        own_keys: config keys in which it differs from others.
        backbone_class: in plain PyTorch.
        source: where to get it.
    """

    file: str
    name: str
    data: str
    size: str
    parameters: int
    own_keys: dict[str, Any] = field(repr=False)
    backbone_class: type[EquiformerV2Backbone]
    source: str

    @property
    def keys(self) -> dict[str, Any]:
        """All config keys of the backbone, or of the flat model."""
        layers, lmax, mmax = _SIZES[self.size]
        size = {"num_layers": layers, "lmax_list": [lmax], "mmax_list": [mmax]}
        return _SHARED | self.own_keys | size

    @property
    def form(self) -> str:
        """Flat or hydra, as of :class:`~fairchem_equiformer.checkpoints.Checkpoint`."""
        return "flat" if self.backbone_class is EquiformerV2 else "hydra"

    @property
    def outputs(self) -> tuple[str, ...]:
        """What it predicts."""
        if self.form == "hydra":
            return ("energy", "forces", "stress")
        return ("energy", "forces") if self.keys["regress_forces"] else ("energy",)

    def is_like(self, checkpoint: Checkpoint) -> bool:
        """Whether a checkpoint is of the same class, size and kind of data."""
        own = self.backbone_class.own_keys
        keys = {key: value for key, value in self.keys.items() if key not in own}
        config = checkpoint.model_config
        if checkpoint.backbone_class is not self.backbone_class:
            return False
        return isinstance(config, ModelConfig) and _signature(config) == _signature(
            ModelConfig.from_keys(keys)
        )


def _signature(config: ModelConfig) -> tuple[object, ...]:
    return (
        *(config.num_layers, config.lmax, config.mmax, config.sphere_channels),
        *(config.max_num_elements, config.max_radius, config.max_neighbors),
        *(config.regress_forces, config.load_energy_lin_ref),
    )


def _flat(path: str, name: str, data: str, size: str, parameters: int, **keys: Any) -> Published:
    file = path.rpartition("/")[2]
    return Published(file, name, data, size, parameters, keys, EquiformerV2, _SERVER + path)


def _materials(size: str, kind: str, name: str, data: str) -> Published:
    count = {"31M": 31_207_434, "86M": 86_589_068, "153M": 153_769_868}[size]
    file = f"eqV2_{size}_{kind}.pt"
    name = f"EquiformerV2-{size}-{name}"
    return Published(file, name, data, size, count, _OMAT, EquiformerV2Backbone, _HUB)


def _dens(size: str) -> Published:
    count = {"31M": 34_339_083, "86M": 94_033_933, "153M": 160_673_293}[size]
    file, name = f"eqV2_dens_{size}_mp.pt", f"EquiformerV2-DeNS-{size}-MP"
    return Published(file, name, "MPtrj, with DeNS", size, count, _DENS, DeNSBackbone, _HUB)


_S2EF = "opencatalystproject/models/2023_06/oc20/s2ef/"
_LARGE = ("31M", "86M", "153M")

PUBLISHED = (
    _flat(
        _S2EF + "eq2_83M_2M.pt",
        "EquiformerV2-83M-S2EF-OC20-2M",
        "OC20 2M",
        "83M",
        83_164_802,
        **_OC20 | {"drop_path_rate": 0.05},
    ),
    _flat(
        _S2EF + "eq2_31M_ec4_allmd.pt",
        "EquiformerV2-31M-S2EF-OC20-All+MD",
        "OC20 All+MD",
        "31M",
        31_058_690,
        **_OC20,
    ),
    _flat(
        _S2EF + "eq2_153M_ec4_allmd.pt",
        "EquiformerV2-153M-S2EF-OC20-All+MD",
        "OC20 All+MD",
        "153M",
        153_602_690,
        **_OC20,
    ),
    _flat(
        "opencatalystproject/models/2023_10/oc22/s2ef/eq2_121M_e4_f100_oc22_s2ef.pt",
        "EquiformerV2-lE4-lF100-S2EFS-OC22",
        "OC22",
        "121M",
        121_526_492,
        **_OC22,
    ),
    _flat(
        "dac/checkpoints_20240709/eqv2_31M.pt",
        "EquiformerV2-S2EF-ODAC",
        "ODAC23",
        "31M",
        31_085_570,
        **_ODAC,
    ),
    _flat(
        "dac/checkpoints_20240709/Equiformer_V2_Large.pt",
        "EquiformerV2-Large-S2EF-ODAC",
        "ODAC23",
        "153M",
        153_660_290,
        **_ODAC,
    ),
    _flat(
        "dac/checkpoints_20231018/Equiformer_V2_Direct.pt",
        "EquiformerV2-IS2RE-ODAC",
        "ODAC23, relaxed energies",
        "31M",
        27_953_665,
        **_ODAC | {"regress_forces": False},
    ),
    *(_materials(size, "omat", "OMAT24", "OMat24") for size in _LARGE),
    *(
        _materials(size, "omat_mp_salex", "OMAT24-MP-sAlex", "OMat24, then MPtrj and sAlex")
        for size in _LARGE
    ),
    _materials("31M", "mp", "MP", "MPtrj"),
    *(_dens(size) for size in _LARGE),
)
