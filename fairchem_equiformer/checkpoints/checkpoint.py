"""What a checkpoint says: the model, its weights, and how predictions get their units."""

from __future__ import annotations

import copy
import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fairchem_equiformer import models
from fairchem_equiformer.checkpoints import names
from fairchem_equiformer.checkpoints.potential import Potential
from fairchem_equiformer.checkpoints.reading import CheckpointError, read
from fairchem_equiformer.models.config import ModelConfig
from fairchem_equiformer.models.load_hooks import is_derived

logger = logging.getLogger(__name__)

Config = dict[str, Any]

# Names of normalisers until OCP's 2.0, and what they are called since.
_OLD_TARGETS = {"target": "energy", "grad_target": "forces"}
# Keys that ODAC23's configs had for what is called otherwise since.
_OLD_KEYS = {"norm_scale_nodes": "avg_num_nodes", "norm_scale_degree": "avg_degree"}


@dataclass(frozen=True)
class Normalizer:
    """A prediction in units is ``value * std + mean``."""

    mean: float
    std: float


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


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint of EquiformerV2, whoever wrote it.

    Attributes:
        path: the file.
        form: "flat" (one model) or "hydra" (backbone with heads).
        backbone: config keys of the backbone, or of the flat model.
        backbone_class: in plain PyTorch; for DeNS it takes keys of its own.
        heads: class and keys of each head, as
            :class:`~fairchem_equiformer.models.EquiformerV2Hydra` takes them; none if flat.
        weights: by the names of the model in plain PyTorch, in the order of its parameters.
        averaged: whether the weights were replaced by the moving averages (EMA) beside them.
        outputs: what it predicts, by target: ``energy``, ``forces``, ``stress``, others.
        normalizers: by target or part of a target.
        references: by target, a value [elements] for each atomic number, to be added per atom.
        config: the whole config, as saved.
    """

    path: Path
    form: str
    backbone: Config
    backbone_class: type[models.EquiformerV2Backbone]
    heads: dict[str, tuple[type[nn.Module], Config]]
    weights: dict[str, Tensor] = field(repr=False)
    averaged: bool
    outputs: dict[str, Output]
    normalizers: dict[str, Normalizer]
    references: dict[str, Tensor] = field(repr=False)
    config: Config = field(repr=False)

    @property
    def model_config(self) -> ModelConfig:
        """The backbone's keys, checked."""
        return _checked(self.backbone, self.backbone_class)

    def model(self) -> models.EquiformerV2 | models.EquiformerV2Hydra:
        """The model in plain PyTorch, with the weights; its results are normalised.

        Raises:
            CheckpointError: if the weights do not belong to the config; names what differs.
        """
        try:
            model = (
                models.EquiformerV2(**self.backbone)
                if self.form == "flat"
                else models.EquiformerV2Hydra(self.backbone, self.heads, self.backbone_class)
            )
            load_weights(model, self.weights)
        except (CheckpointError, TypeError, ValueError) as error:
            raise CheckpointError(f"{self.path}: {' '.join(str(error).split())}") from error
        return model

    def potential(
        self, *, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32
    ) -> Potential:
        """The model with its normalisers and references: a batch in, eV and Angstrom out.

        Raises:
            CheckpointError: as :meth:`model`, or if it predicts neither energy, forces nor stress.
        """
        return Potential(self).to(device=device, dtype=dtype).eval()


def load(path: str | Path, *, trusted: bool = False) -> Checkpoint:
    """Read and understand a checkpoint.

    Args:
        path: the file, of a trainer of fairchem-core 1.10, an older one, or the original release.
        trusted: see :func:`~fairchem_equiformer.checkpoints.read`.

    Raises:
        CheckpointError: if it cannot be read, or is none of EquiformerV2; says why in one line.
    """
    path = Path(path)
    content = read(path, trusted=trusted)
    try:
        return understand(content, path)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from error


def understand(content: Config, path: Path) -> Checkpoint:
    """What the content of a checkpoint says; `path` is for messages.

    Raises:
        CheckpointError: if it is none of EquiformerV2; says why in one line.
    """
    check_content(content)
    config = content["config"]
    model = model_section(config, path.parent)
    if model["name"] == "hydra":
        form, backbone_class, backbone, heads = "hydra", *_hydra(model)
    else:
        found = names.resolve("config.model.name", model["name"], (names.FLAT,))
        form, backbone_class, backbone, heads = "flat", found.module, _without(model, "name"), {}
    try:
        checked = _checked(backbone, backbone_class)
    except ValueError as error:
        raise CheckpointError(str(error)) from error
    weights, averaged = _weights(content, frozen_backbone=bool(model.get("freeze_backbone")))
    results = _results(heads) if heads else {"energy", "forces"}
    if form == "flat" and not checked.regress_forces:
        results.discard("forces")
    return Checkpoint(
        path=path,
        form=form,
        backbone=backbone,
        backbone_class=backbone_class,
        heads=heads,
        weights=weights,
        averaged=averaged,
        outputs=_outputs(config, model, results),
        normalizers=_normalizers(content, config),
        references=_references(content),
        config=config,
    )


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


def _without(keys: Config, name: str) -> Config:
    return {key: value for key, value in keys.items() if key != name}


def _checked(keys: Config, backbone_class: type[models.EquiformerV2Backbone]) -> ModelConfig:
    own = backbone_class.own_keys
    return ModelConfig.from_keys({key: value for key, value in keys.items() if key not in own})


def _hydra(
    model: Config,
) -> tuple[type[models.EquiformerV2Backbone], Config, dict[str, tuple[type[nn.Module], Config]]]:
    backbone = model["backbone"]
    found = names.resolve("config.model.backbone.model", backbone.get("model"), names.BACKBONES)
    heads = {}
    for name, section in model["heads"].items():
        where = f"config.model.heads.{name}.module"
        head = names.resolve(where, section.get("module"), names.HEADS).module
        heads[name] = (head, _without(section, "module"))
    return found.module, _without(backbone, "model"), heads


def _results(heads: dict[str, tuple[type[Any], Config]]) -> set[str]:
    """Keys of the model's results."""
    found: list[str] = []
    for head, keys in heads.values():
        found += head.results(**keys)
    twice = sorted({key for key in found if found.count(key) > 1})
    if twice:
        raise CheckpointError(f"two heads of config.model give {twice[0]!r} (output_name)")
    return set(found)


def _outputs(config: Config, model: Config, results: set[str]) -> dict[str, Output]:
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


def _weights(content: Config, *, frozen_backbone: bool) -> tuple[dict[str, Tensor], bool]:
    """Parameters by the model's names, moving averages in the place of raw ones.

    The average is a list in the order of the trained parameters, which a state dict has, too.
    """

    def is_trained(name: str) -> bool:
        if name.endswith("energy_lin_ref"):  # read from a file, never trained
            return False
        return not (frozen_backbone and name.startswith("backbone."))

    state = without_prefix(content["state_dict"])
    weights = {k: v for k, v in state.items() if not is_derived(k.removeprefix("backbone."))}
    average = content.get("ema")
    if not average:
        return weights, False
    trained = list(filter(is_trained, weights))
    values = average.get("shadow_params", [])
    if [value.shape for value in values] != [weights[name].shape for name in trained]:
        raise CheckpointError("its moving averages (ema) do not fit its weights (state_dict)")
    return weights | dict(zip(trained, values, strict=True)), True


def without_prefix(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state dict without the `module.`, one or two, that data-parallel training puts before."""

    def plain(name: str) -> str:
        while name.startswith("module."):
            name = name.removeprefix("module.")
        return name

    return {plain(name): value for name, value in state.items()}


def load_weights(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Load parameters; tables that follow from the config may be missing.

    Raises:
        CheckpointError: if they do not belong to the model; names what differs, in one line.
    """
    try:
        found = model.load_state_dict(weights, strict=False)
    except (RuntimeError, ValueError) as error:
        raise CheckpointError(" ".join(str(error).split())) from error
    tables = {name for name, _ in model.named_buffers(remove_duplicate=False)}
    for problem, keys in (
        ("its weights lack", [key for key in found.missing_keys if key not in tables]),
        ("it has weights that the config's model does not:", found.unexpected_keys),
    ):
        if keys:
            raise CheckpointError(f"{problem} {', '.join(keys[:5])}")


def _normalizers(content: Config, config: Config) -> dict[str, Normalizer]:
    """Those of the checkpoint, which come before those of the config."""
    dataset = config.get("dataset")
    dataset = dataset if isinstance(dataset, Mapping) else {}
    given = (dataset.get("transforms") or {}).get("normalizer") or {}
    given = {
        target: values
        for target, values in given.items()
        if isinstance(values, Mapping) and "mean" in values
    }
    saved = {
        _OLD_TARGETS.get(target, target): values
        for target, values in content.get("normalizers", {}).items()
    }
    return {target: _normalizer(target, values) for target, values in {**given, **saved}.items()}


def _normalizer(target: str, values: Mapping[str, Any]) -> Normalizer:
    std = next((values[key] for key in ("rmsd", "std", "stdev") if key in values), None)
    try:
        return Normalizer(float(values["mean"]), float(std))  # type: ignore[arg-type]
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"its normaliser of {target} is not a mean and a std") from error


def _references(content: Config) -> dict[str, Tensor]:
    saved = content.get("elementrefs") or {}
    for target, values in saved.items():
        if "element_references" not in values:
            raise CheckpointError(f"its element references of {target} are no list of values")
    return {t: torch.as_tensor(values["element_references"]) for t, values in saved.items()}
