"""Equiformer (V1) from another one's checkpoint, with heads of its own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fairchem_equiformer import checkpoints, models
from fairchem_equiformer.checkpoints.checkpoint import load_weights
from fairchem_equiformer.errors import InputError

_WHERE = "model.finetune_config"
_START = "starting_checkpoint"


def start_from(model: models.Equiformer, settings: Mapping[str, Any]) -> None:
    """Give a model a checkpoint's weights but for the heads: the averages, where there are any.

    Args:
        model: whose sizes are those of the checkpoint's model; heads may be others.
        settings: with the path of the checkpoint, ``starting_checkpoint``.

    Raises:
        InputError: for other settings, a checkpoint that cannot be read, is of another model, or of
            another size; says what differs, in one line.
    """
    if set(settings) != {_START}:
        raise InputError(
            f"{_WHERE} has {', '.join(sorted(settings)) or 'nothing'}; of Equiformer it has "
            f"{_START}, and the model's keys stand in the config"
        )
    path = settings[_START]
    saved = checkpoints.load(path)
    if not issubclass(saved.backbone_class, models.Equiformer):
        raise InputError(
            f"{_WHERE}.{_START}: {path} holds {saved.backbone_class.__name__}, from which "
            "Equiformer cannot start"
        )
    own = {name: value for name, value in model.state_dict().items() if model.of_head(name)}
    body = {name: value for name, value in saved.weights.items() if not model.of_head(name)}
    try:
        load_weights(model, body | own)
    except checkpoints.CheckpointError as error:
        raise InputError(f"{_WHERE}.{_START}: {path}: {error}") from error
