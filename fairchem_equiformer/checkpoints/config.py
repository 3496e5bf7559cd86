"""What the config of a checkpoint says: classes and keys of the model, and what it predicts."""

from __future__ import annotations

import copy
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fairchem_equiformer import models
from fairchem_equiformer.checkpoints import names
from fairchem_equiformer.checkpoints.reading import CheckpointError, read
from fairchem_equiformer.models.config import ModelConfig
from fairchem_equiformer.models.config_v1 import EquiformerConfig

logger = logging.getLogger(__name__)

Config = dict[str, Any]

# Keys that ODAC23's configs had for what is called otherwise since.
_OLD_KEYS = {"norm_scale_nodes": "avg_num_nodes", "norm_scale_degree": "avg_degree"}


@dataclass(frozen=True)
class Architecture:
    """Classes and keys of a model; of the attributes see ``Checkpoint``."""

    form: str
    backbone_class: type[models.EquiformerV2Backbone | models.Equiformer]
    backbone: Config
    heads: dict[str, tuple[type[Any], Config]]

    @property
    def model_config(self) -> ModelConfig | EquiformerConfig:
        """The backbone's keys, checked."""
        if issubclass(self.backbone_class, models.Equiformer):
            return EquiformerConfig.from_keys(self.backbone)
        own = self.backbone_class.own_keys
        return ModelConfig.from_keys({k: v for k, v in self.backbone.items() if k not in own})

    @property
    def results(self) -> set[str]:
        """Keys of the model's results."""
        if self.form == "flat":
            config = self.model_config
            results = {"energy", "forces"} if config.regress_forces else {"energy"}
            if isinstance(config, EquiformerConfig):
                results.update(config.vector_outputs, ["stress"] * config.regress_stress)
            return results
        found = [key for head, keys in self.heads.values() for key in head.results(**keys)]
        twice = sorted({key for key in found if found.count(key) > 1})
        if twice:
            raise CheckpointError(f"two heads of config.model give {twice[0]!r} (output_name)")
        return set(found)


@dataclass(frozen=True)
class Output:
    """A target, and which results of the model it is made of.

    Attributes:
        level: "system" or "atom".
        parts: one result; or the isotropic and the anisotropic part of a symmetric tensor, each
            with a normaliser of its own.
    """

    level: str
    parts: tuple[str, ...]


def check_content(content: Config) -> None:
    """Raise CheckpointError if this is no checkpoint of fairchem."""
    if not all(isinstance(content.get(key), Mapping) for key in ("state_dict", "config")):
        raise CheckpointError("it holds no state_dict and config: not a checkpoint of fairchem")


def model_section(config: Config, folder: Path = Path()) -> Config:
    """A copy of the section `model`, of today's configs or of the original release's, complete.

    Keys that ODAC23's configs had have their names of today. What a fine-tuned model took from the
    checkpoint it started from is filled in.

    Args:
        config: of a checkpoint.
        folder: of the checkpoint, where the one it started from is looked for, too.

    Raises:
        CheckpointError: if there is none, or it is a hydra without backbone or heads.
    """
    model = config.get("model")
    if isinstance(model, str):
        model = {**config.get("model_attributes", {}), "name": model}
    if not isinstance(model, dict) or "name" not in model:
        raise CheckpointError("its config names no model (config.model.name)")
    model = copy.deepcopy(model)
    if model["name"] != "hydra":
        model.pop("finetune_config", None)  # its keys stand here, and its weights in the checkpoint
        return _renamed(model)
    if model.get("finetune_config"):
        model = _with_start(model, folder)
    if not (model.get("backbone") and model.get("heads")):
        raise CheckpointError("config.model is a hydra without backbone or heads of its own")
    return model | {"backbone": _renamed(model["backbone"])}


def _with_start(model: Config, folder: Path) -> Config:
    """The section of a fine-tuned model, which says of backbone and heads what is new alone."""
    start = model.pop("finetune_config")
    if model.get("backbone") and model.get("heads"):
        return model
    path = Path(start["starting_checkpoint"])
    found = next((p for p in (path, folder / path.name) if p.is_file()), None)
    if found is None:
        raise CheckpointError(
            f"it was fine-tuned from {path}, whose config says what its backbone and heads are:"
            f" put {path.name} beside it"
        )
    content = read(found)
    check_content(content)
    base = model_section(content["config"], found.parent)
    if base["name"] != "hydra":
        raise CheckpointError(f"it was fine-tuned from {found}, which is no hydra")
    own = {key: value for key, value in model.items() if value}
    backbone = base["backbone"] | start.get("override", {})
    return {"backbone": backbone, "heads": base["heads"]} | own


def _renamed(keys: Config) -> Config:
    return {_OLD_KEYS.get(key, key): value for key, value in keys.items()}


def architecture(model: Config) -> Architecture:
    """Classes and keys of a section `model`.

    Raises:
        CheckpointError: for a name or key that is none of EquiformerV2's and Equiformer's, or an
            impossible value.
    """
    if model["name"] != "hydra":
        flat = names.resolve("config.model.name", model["name"], (names.FLAT, names.EQUIFORMER))
        found = Architecture("flat", flat.module, _without(model, "name"), {})
    else:
        backbone = model["backbone"]
        where = "config.model.backbone.model"
        used = names.resolve(where, backbone.get("model"), names.BACKBONES).module
        heads = {}
        for name, section in model["heads"].items():
            where = f"config.model.heads.{name}.module"
            head = names.resolve(where, section.get("module"), names.HEADS).module
            heads[name] = (head, _without(section, "module"))
        found = Architecture("hydra", used, _without(backbone, "model"), heads)
    try:
        _ = found.model_config
    except ValueError as error:
        raise CheckpointError(str(error)) from error
    return found


def _without(keys: Config, name: str) -> Config:
    return {key: value for key, value in keys.items() if key != name}


def outputs_of(config: Config, model: Config, results: set[str]) -> dict[str, Output]:
    """Targets of the config that the model has a result for."""
    saved = config.get("outputs") or _outputs_of_old(config)
    by_head = model["name"] == "hydra" and not model.get("pass_through_head_outputs", False)
    outputs = {}
    for target, section in saved.items():
        level = section.get("level", "system")
        part = section.get("property", target) if by_head else target
        split = _by_degree(section.get("decomposition") or {})
        if part in results:
            outputs[target] = Output(level, (part,))
        elif list(split) == [0, 2] and set(split.values()) <= results:
            outputs[target] = Output(level, tuple(split.values()))
        else:
            logger.warning(
                "its config asks for %s, which the model does not predict: left out", target
            )
    return outputs


def _outputs_of_old(config: Config) -> Config:
    """The targets of configs from before OCP's 2.0: by the kind of data."""
    kind = config.get("task", {}).get("dataset", "trajectory_lmdb")
    outputs = {"energy": {"level": "system"}}
    return outputs if kind == "single_point_lmdb" else outputs | {"forces": {"level": "atom"}}


def _by_degree(split: Config) -> dict[int, str]:
    return dict(sorted((section["irrep_dim"], part) for part, section in split.items()))
