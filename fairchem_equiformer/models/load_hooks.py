"""Loading checkpoints: derived tables are dropped, and a misfit is explained."""

from __future__ import annotations

import logging
import re
from typing import TYPE_CHECKING, Any, cast

from torch import Tensor, nn

if TYPE_CHECKING:
    from collections.abc import Mapping

    from fairchem_equiformer.models.config import ModelConfig
    from fairchem_equiformer.models.config_v1 import EquiformerConfig

# Modules and buffers of fairchem's models that hold tables; here they are computed.
_DERIVED = {
    "SO3_rotation",
    "SO3_grid",
    "mappingReduced",
    "expand_index",
    "balance_degree_weight",
}
_MOST_LISTED = 10

logger = logging.getLogger(__name__)


def is_derived(name: str) -> bool:
    """Whether fairchem's models save a table that follows from the config under this name."""
    return name == "distance_expansion.offset" or not _DERIVED.isdisjoint(name.split("."))


def drop_derived(module: nn.Module) -> None:
    """Make ``load_state_dict`` ignore the tables that fairchem's models save for ``module``."""
    module._register_load_state_dict_pre_hook(_drop)  # noqa: SLF001 (torch has no public one in 2.4)


# Hooks are functions of the module, so that models can be pickled.
def _drop(state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    for key in [key for key in state_dict if key.startswith(prefix)]:
        if is_derived(key.removeprefix(prefix)):
            del state_dict[key]


def explain_misfits(model: nn.Module) -> None:
    """Make ``model.load_state_dict`` say how the model that wrote a checkpoint differs.

    Args:
        model: with its ``config``, which has a ``max_radius``.

    Raises (when a checkpoint is loaded):
        ValueError: if it was made by a model of another size; lists the config keys and the tensors
            that differ.
    """
    register = model._register_load_state_dict_pre_hook  # noqa: SLF001 (torch has no public one)
    register(_explain, with_module=True)


def _explain(model: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    saved = {
        key.removeprefix(prefix): value
        for key, value in state_dict.items()
        if key.startswith(prefix) and isinstance(value, Tensor)
    }
    _check_cutoff(saved, cast("ModelConfig | EquiformerConfig", model.config))
    _check_sizes(saved, dict(model.named_parameters()))


def _check_cutoff(saved: Mapping[str, Tensor], config: ModelConfig | EquiformerConfig) -> None:
    centers = saved.get("distance_expansion.offset")
    if centers is not None and abs(float(centers[-1]) - config.max_radius) > 1e-4:
        logger.warning(
            "The checkpoint was trained with max_radius %.4g, the config says %.4g: its radial "
            "functions will read distances differently.",
            float(centers[-1]),
            config.max_radius,
        )


def _sizes(tensors: Mapping[str, Tensor]) -> dict[str, int]:
    """Config keys that the shapes of some tensors tell."""
    found: dict[str, int] = {}
    blocks = {match[1] for name in tensors if (match := re.match(r"blocks\.(\d+)\.", name))}
    if blocks:
        found["num_layers"] = len(blocks)

    def read(name: str, **keys: int) -> None:
        if name in tensors:
            found.update({key: tensors[name].shape[axis] for key, axis in keys.items()})

    read("sphere_embedding.weight", max_num_elements=0, sphere_channels=1)
    read("atom_embedding.weight", max_num_elements=0)
    read("blocks.0.ga.message.logits.dot", num_heads=0)
    read("blocks.0.ga.alpha_dot", num_heads=0, attn_alpha_channels=1)
    read("blocks.0.ga.alpha_norm.weight", attn_alpha_channels=0)
    read("blocks.0.ffn.so3_linear_1.weight", ffn_hidden_channels=1)
    read("edge_degree_embedding.rad_func.net.0.weight", edge_channels=0)
    read("distance_expansion.mean", num_distance_basis=1)
    read("distance_expansion.frequencies", num_distance_basis=0)
    if "blocks.0.ffn.so3_linear_1.weight" in tensors:
        found["lmax_list"] = len(tensors["blocks.0.ffn.so3_linear_1.weight"]) - 1
        orders = {
            match[1]
            for name in tensors
            if (match := re.match(r"blocks\.0\.ga\.so2_conv_1\.so2_m_conv\.(\d+)\.", name))
        }
        found["mmax_list"] = len(orders)
    second = tensors.get("blocks.0.ga.so2_conv_2.fc_m0.weight")
    if second is not None and "lmax_list" in found:
        degrees = found["lmax_list"] + 1
        found["attn_hidden_channels"] = second.shape[1] // degrees
        if "num_heads" in found:
            found["attn_value_channels"] = second.shape[0] // degrees // found["num_heads"]
    return found


def _check_sizes(saved: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> None:
    misfits = [
        f"{name}: checkpoint {list(saved[name].shape)}, model {list(own[name].shape)}"
        for name in own
        if name in saved and saved[name].shape != own[name].shape
    ]
    theirs, ours = _sizes(saved), _sizes(own)
    keys = [
        f"{key}: checkpoint {theirs[key]}, config {ours[key]}"
        for key in ours
        if key in theirs and theirs[key] != ours[key]
    ]
    if not misfits and not keys:
        return
    lines = ["the checkpoint was made by a model of another size."]
    if keys:
        lines += ["Config keys that differ:", *(f"  {line}" for line in keys)]
    if misfits:
        lines += ["Tensors that differ:", *(f"  {line}" for line in misfits[:_MOST_LISTED])]
        if len(misfits) > _MOST_LISTED:
            lines.append(f"  and {len(misfits) - _MOST_LISTED} more")
    lines.append("Use the config that the checkpoint was trained with, or another checkpoint.")
    raise ValueError("\n".join(lines))
