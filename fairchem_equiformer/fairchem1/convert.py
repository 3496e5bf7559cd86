"""Checkpoints of fairchem-core 1.10's EquiformerV2 into ones that name this package, and back.

Weights, EMA, optimizer, scheduler, normalisers and element references stay. What changes is the
names of classes in the config, the tables that fairchem's models save beside their parameters, and,
in the hydra form, the order of the optimizer's state: there fairchem exempts other parameters from
weight decay.
"""

from __future__ import annotations

import copy
import inspect
from dataclasses import fields
from typing import TYPE_CHECKING, Any

from fairchem.core.common.registry import registry
from fairchem.core.common.utils import setup_imports

from fairchem_equiformer.errors import InputError
from fairchem_equiformer.models.config import ModelConfig

if TYPE_CHECKING:
    from torch import nn

Config = dict[str, Any]

# fairchem's registered names and ours; where two of theirs mean one of ours, the last is written.
CLASSES = {
    "equiformer_v2": "fairchem_equiformer.EquiformerV2",
    "equiformer_v2_backbone": "fairchem_equiformer.EquiformerV2Backbone",
    "equiformer_v2_energy_head": "fairchem_equiformer.EnergyHead",
    "equiformerV2_scalar_head": "fairchem_equiformer.EnergyHead",
    "equiformer_v2_force_head": "fairchem_equiformer.ForceHead",
    "equiformerV2_vector_head": "fairchem_equiformer.ForceHead",
    "rank2_symmetric_head": "fairchem_equiformer.StressHead",
}
NAMES = {
    "fairchem_equiformer": CLASSES,
    "fairchem": {ours: theirs for theirs, ours in CLASSES.items()},
}
# Config keys that decide how the numbers are computed, not which: a class may do without them.
WITHOUT_EFFECT = frozenset({"edges_per_chunk", "activation_checkpoint"})
_DEFAULTS = {key.name: key.default for key in fields(ModelConfig)}


class ConversionError(InputError):
    """A checkpoint that cannot be converted."""


def convert(checkpoint: dict[str, Any], to: str) -> dict[str, Any]:
    """Return a checkpoint whose config names the other classes.

    Args:
        checkpoint: as fairchem's trainers, or the original release's, write it.
        to: ``fairchem_equiformer`` or ``fairchem``.

    Raises:
        ConversionError: for a model that the other side does not have, or weights that do not
            belong to the config.
    """
    setup_imports()
    if not {"state_dict", "config"} <= checkpoint.keys():
        raise ConversionError("it holds no state_dict and config: not a checkpoint of fairchem")
    old_config = _model_config(checkpoint["config"])
    new_config = _rename(old_config, to)
    old, new = _build(old_config), _build(new_config)
    if _names(old) != _names(new):
        raise ConversionError("parameters differ in name or order: please report this")
    config = {k: v for k, v in checkpoint["config"].items() if k != "model_attributes"}
    converted = checkpoint | {
        "config": config | {"model": new_config},
        "state_dict": _weights(checkpoint["state_dict"], new),
    }
    if checkpoint.get("optimizer"):
        converted["optimizer"] = _reorder(checkpoint["optimizer"], old, new)
    return converted


def _model_config(config: Config) -> Config:
    """The section `model`, of today's configs or of the original release's."""
    model = config.get("model")
    if isinstance(model, str):
        model = {**config.get("model_attributes", {}), "name": model}
    if not isinstance(model, dict) or "name" not in model:
        raise ConversionError("its config names no model (config.model.name)")
    return copy.deepcopy(model)


def _rename(model: Config, to: str) -> Config:
    """The same section with the other side's classes, and the keys that these take."""
    names = NAMES[to]

    def other(where: str, name: str) -> str:
        if name in names:
            return names[name]
        if name in names.values():
            raise ConversionError(
                f"config.model{where} is {name!r} already; --to {_other_side(to)} turns it back"
            )
        raise ConversionError(
            f"config.model{where} is {name!r}; known are {', '.join(sorted(names))}"
        )

    if model["name"] != "hydra":
        name = other(".name", model["name"])
        return _shared_keys("", model, name) | {"name": name}
    if not (model.get("backbone") and model.get("heads")):
        raise ConversionError("config.model is a hydra without backbone or heads of its own")
    backbone = model["backbone"]
    name = other(".backbone.model", backbone["model"])
    return model | {
        "backbone": _shared_keys(".backbone", backbone, name) | {"model": name},
        "heads": {
            name: head | {"module": other(f".heads.{name}.module", head["module"])}
            for name, head in model["heads"].items()
        },
    }


def _other_side(side: str) -> str:
    return next(name for name in NAMES if name != side)


def _shared_keys(where: str, keys: Config, name: str) -> Config:
    """The keys that the class of this name takes: all of them, or what its signature has.

    Raises:
        ConversionError: for a key that it lacks, or a value that it does not know, where this
            changes the model.
    """
    parameters = inspect.signature(registry.get_model_class(name)).parameters
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
        return keys  # one of ours, which checks its keys by itself
    lacking = {key for key in keys if key in _DEFAULTS and key not in parameters}
    changes = {key for key in lacking - WITHOUT_EFFECT if keys[key] != _DEFAULTS[key]}
    if keys.get("distance_function") == "learnable_gaussian":
        changes.add("distance_function")  # a key of theirs, but not this value
    if changes:
        key = min(changes)
        raise ConversionError(
            f"config.model{where}.{key} is {keys[key]!r}, which fairchem's {name} does not have"
        )
    return {key: value for key, value in keys.items() if key not in lacking}


def _build(model: Config) -> nn.Module:
    keys = {key: value for key, value in model.items() if key != "name"}
    try:
        return registry.get_model_class(model["name"])(**keys)
    except (AssertionError, TypeError, ValueError) as error:
        raise ConversionError(f"{model['name']} refuses the config: {error}") from error


def _names(model: nn.Module) -> list[str]:
    return [name for name, _ in model.named_parameters()]


def _weights(saved: dict[str, Any], model: nn.Module) -> dict[str, Any]:
    """State of the model with the saved parameters, under the saved prefix.

    Data-parallel training puts one or two `module.` before every name.
    """
    first = _names(model)[-1]
    prefixes = [key.removesuffix(first) for key in saved if key.endswith(first)]
    prefix = min(prefixes, key=len, default="")
    state = {key.removeprefix(prefix): value for key, value in saved.items()}
    try:
        result = model.load_state_dict(state, strict=False)
    except (RuntimeError, ValueError) as error:
        raise ConversionError(" ".join(str(error).split())) from error
    buffers = {name for name, _ in model.named_buffers(remove_duplicate=False)}
    if missing := [name for name in result.missing_keys if name not in buffers]:
        raise ConversionError(f"its weights lack {', '.join(missing[:5])}")
    return {prefix + name: value for name, value in model.state_dict().items()}


def _reorder(optimizer: dict[str, Any], old: nn.Module, new: nn.Module) -> dict[str, Any]:
    """The optimizer's state in the order in which fairchem's trainers ask the new model for it."""
    groups = optimizer["param_groups"]
    if len(groups) == 1:  # no weight decay: the order of the parameters
        return optimizer
    old_order = [name for group in _decay_groups(old) for name in group]
    new_groups = _decay_groups(new)
    if [len(group["params"]) for group in groups] != [len(g) for g in _decay_groups(old)]:
        raise ConversionError("the optimizer's state does not belong to the config's parameters")
    index = {name: i for i, name in enumerate(old_order)}
    new_order = [name for group in new_groups for name in group]
    state = {
        i: optimizer["state"][index[name]]
        for i, name in enumerate(new_order)
        if index[name] in optimizer["state"]
    }
    numbers = iter(range(len(new_order)))
    return {
        "state": state,
        "param_groups": [
            group | {"params": [next(numbers) for _ in names]}
            for group, names in zip(groups, new_groups, strict=True)
        ],
    }


def _decay_groups(model: nn.Module) -> tuple[list[str], list[str]]:
    """Names of the trained parameters without and with weight decay, as the trainers part them."""
    exempt = tuple(model.no_weight_decay())
    names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    without = [name for name in names if name.endswith(exempt)]
    return without, [name for name in names if not name.endswith(exempt)]


def summary(checkpoint: dict[str, Any]) -> str:
    """Name the classes of a checkpoint's model."""
    model = checkpoint["config"]["model"]
    if model["name"] != "hydra":
        return str(model["name"])
    heads = ", ".join(head["module"] for head in model["heads"].values())
    return f"hydra of {model['backbone']['model']} with {heads}"
