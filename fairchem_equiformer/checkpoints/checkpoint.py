"""What a checkpoint says: the model, its weights, and how predictions get their units."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fairchem_equiformer import models
from fairchem_equiformer.checkpoints.config import (
    Architecture,
    Config,
    Output,
    architecture,
    check_content,
    model_section,
    outputs_of,
)
from fairchem_equiformer.checkpoints.potential import Potential
from fairchem_equiformer.checkpoints.reading import CheckpointError, read
from fairchem_equiformer.models.config import ModelConfig
from fairchem_equiformer.models.config_v1 import EquiformerConfig
from fairchem_equiformer.models.load_hooks import is_derived

# Names of normalisers until OCP's 2.0, and what they are called since.
_OLD_TARGETS = {"target": "energy", "grad_target": "forces"}


@dataclass(frozen=True)
class Normalizer:
    """A prediction in units is ``value * std + mean``."""

    mean: float
    std: float


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint of EquiformerV2, whoever wrote it, or of Equiformer.

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
    backbone_class: type[models.EquiformerV2Backbone | models.Equiformer]
    heads: dict[str, tuple[type[nn.Module], Config]]
    weights: dict[str, Tensor] = field(repr=False)
    averaged: bool
    outputs: dict[str, Output]
    normalizers: dict[str, Normalizer]
    references: dict[str, Tensor] = field(repr=False)
    config: Config = field(repr=False)

    @property
    def model_config(self) -> ModelConfig | EquiformerConfig:
        """The backbone's keys, checked."""
        found = Architecture(self.form, self.backbone_class, self.backbone, self.heads)
        return found.model_config

    def model(self) -> nn.Module:
        """The model in plain PyTorch, with the weights; its results are normalised.

        Raises:
            CheckpointError: if the weights do not belong to the config; names what differs.
        """
        try:
            if issubclass(self.backbone_class, models.Equiformer) or self.form == "flat":
                model: nn.Module = self.backbone_class(**self.backbone)
            else:
                model = models.EquiformerV2Hydra(self.backbone, self.heads, self.backbone_class)
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
        CheckpointError: if it cannot be read, or is none of EquiformerV2 and Equiformer; says why
            in one line.
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
        CheckpointError: if it is none of EquiformerV2 and Equiformer; says why in one line.
    """
    check_content(content)
    config = content["config"]
    model = model_section(config, path.parent)
    found = architecture(model)
    weights, averaged = _weights(content, frozen_backbone=bool(model.get("freeze_backbone")))
    return Checkpoint(
        path=path,
        form=found.form,
        backbone=found.backbone,
        backbone_class=found.backbone_class,
        heads=found.heads,
        weights=weights,
        averaged=averaged,
        outputs=outputs_of(config, model, found.results),
        normalizers=_normalizers(content, config),
        references=_references(content),
        config=config,
    )


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
