"""Checkpoints of fairchem-core 1.10's EquiformerV2 into ones that name this package, and back.

Weights, EMA, optimizer, scheduler, normalisers and element references stay. What changes is the
names of classes in the config, the tables that fairchem's models save beside their parameters, and,
in the hydra form, the order of the optimizer's state: there fairchem exempts other parameters from
weight decay.
"""

from __future__ import annotations

import inspect
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fairchem.core.common.registry import registry
from fairchem.core.common.utils import setup_imports

from fairchem_equiformer.checkpoints.checkpoint import load_weights, without_prefix
from fairchem_equiformer.checkpoints.config import check_content, model_section
from fairchem_equiformer.checkpoints.names import BACKBONES, FLAT, HEADS, Names, resolve
from fairchem_equiformer.checkpoints.reading import CheckpointError
from fairchem_equiformer.models.config import ModelConfig

if TYPE_CHECKING:
    from torch import nn

Config = dict[str, Any]

SIDES = ("fairchem_equiformer", "fairchem")
# Config keys that decide how the numbers are computed, not which: a class may do without them.
WITHOUT_EFFECT = frozenset({"edges_per_chunk", "activation_checkpoint"})
_DEFAULTS = {key.name: key.default for key in fields(ModelConfig)}


def convert(checkpoint: dict[str, Any], to: str, folder: Path = Path()) -> dict[str, Any]:
    """Return a checkpoint whose config names the other classes.

    Args:
        checkpoint: as fairchem's trainers, or the original release's, write it.
        to: ``fairchem_equiformer`` or ``fairchem``.
        folder: of the checkpoint, where one that it was fine-tuned from is looked for.

    Raises:
        CheckpointError: for a model that the other side does not have, or weights that do not
            belong to the config.
    """
    setup_imports()
    check_content(checkpoint)
    old_config = model_section(checkpoint["config"], folder)
    new_config = _rename(old_config, to)
    old, new = _build(old_config), _build(new_config)
    if _names(old) != _names(new):
        raise CheckpointError("parameters differ in name or order: please report this")
    config = {k: v for k, v in checkpoint["config"].items() if k != "model_attributes"}
    converted = checkpoint | {
        "config": config | {"model": new_config},
        "state_dict": _weights(checkpoint["state_dict"], new),
    }
    if checkpoint.get("optimizer"):
        converted["optimizer"] = _reorder(checkpoint["optimizer"], old, new)
    return converted


def _rename(model: Config, to: str) -> Config:
    """The same section with the other side's classes, and the keys that these take."""

    def other(where: str, name: str, among: tuple[Names, ...]) -> str:
        found = resolve(f"config.model{where}", name, among)
        if found.is_ours(name) == (to == "fairchem_equiformer"):
            raise CheckpointError(
                f"config.model{where} is {name!r} already; --to {_other_side(to)} turns it back"
            )
        return found.theirs if to == "fairchem" else found.ours

    if model["name"] != "hydra":
        name = other(".name", model["name"], (FLAT,))
        return _shared_keys("", model, name) | {"name": name}
    backbone = model["backbone"]
    name = other(".backbone.model", backbone.get("model"), BACKBONES)
    return model | {
        "backbone": _shared_keys(".backbone", backbone, name) | {"model": name},
        "heads": {
            name: head | {"module": other(f".heads.{name}.module", head.get("module"), HEADS)}
            for name, head in model["heads"].items()
        },
    }


def _other_side(side: str) -> str:
    return next(name for name in SIDES if name != side)


def _shared_keys(where: str, keys: Config, name: str) -> Config:
    """The keys that the class of this name takes: all of them, or what its signature has.

    Raises:
        CheckpointError: for a key that it lacks, or a value that it does not know, where this
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
        raise CheckpointError(
            f"config.model{where}.{key} is {keys[key]!r}, which fairchem's {name} does not have"
        )
    return {key: value for key, value in keys.items() if key not in lacking}


def _build(model: Config) -> nn.Module:
    keys = {key: value for key, value in model.items() if key != "name"}
    try:
        return registry.get_model_class(model["name"])(**keys)
    except (AssertionError, TypeError, ValueError) as error:
        raise CheckpointError(f"{model['name']} refuses the config: {error}") from error


def _names(model: nn.Module) -> list[str]:
    return [name for name, _ in model.named_parameters()]


def _weights(saved: dict[str, Any], model: nn.Module) -> dict[str, Any]:
    """State of the model with the saved parameters, under the saved prefix."""
    state = without_prefix(saved)
    load_weights(model, state)
    name = next(iter(state), "")
    prefix = next((key.removesuffix(name) for key in saved if key.endswith(name)), "")
    return {prefix + name: value for name, value in model.state_dict().items()}


def _reorder(optimizer: dict[str, Any], old: nn.Module, new: nn.Module) -> dict[str, Any]:
    """The optimizer's state in the order in which fairchem's trainers ask the new model for it."""
    groups = optimizer["param_groups"]
    if len(groups) == 1:  # no weight decay: the order of the parameters
        return optimizer
    old_order = [name for group in _decay_groups(old) for name in group]
    new_groups = _decay_groups(new)
    if [len(group["params"]) for group in groups] != [len(g) for g in _decay_groups(old)]:
        raise CheckpointError("the optimizer's state does not belong to the config's parameters")
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
