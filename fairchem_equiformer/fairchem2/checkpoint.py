"""Checkpoints of fairchem-core 1.10 in the form of fairchem-core 2.x."""

from __future__ import annotations

import io
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from fairchem.core.units.mlip_unit.api.inference import (
    InferenceSettings,
    MLIPInferenceCheckpoint,
    guess_inference_settings,
)
from fairchem.core.units.mlip_unit.predict import MLIPPredictUnit

from fairchem_equiformer import checkpoints, models
from fairchem_equiformer.fairchem2.models import EquiformerHead

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

    from fairchem_equiformer.checkpoints import Checkpoint

_HERE = "fairchem_equiformer.fairchem2"
_UNIT = "fairchem.core.units.mlip_unit.mlip_unit"
_NORMALIZATION = "fairchem.core.modules.normalization"
# That of all others is EquiformerV2Backbone.
_BACKBONES: dict[type[Any], str] = {
    models.DeNSBackbone: "DeNSBackbone",
    models.Equiformer: "EquiformerBackbone",
}


@dataclass(frozen=True)
class _Head:
    """A head of the converted model, which is named as its target, as 2.x wants it."""

    module: type[Any]
    keys: dict[str, Any]
    # What the names of its weights begin with in the checkpoint, and here; None if it has none.
    places: tuple[str, str] | None = None


def convert(
    path: Path | str, *, dataset: str | None = None, trusted: bool = False
) -> MLIPInferenceCheckpoint:
    """Give a checkpoint the form that fairchem-core 2.x predicts from, and fine-tunes.

    Both take the moving averages of the weights. Normalisers and element references become those
    of 2.x's tasks, except the two of a stress in parts, which the head keeps.

    Args:
        path: of any checkpoint that :func:`fairchem_equiformer.checkpoints.load` reads.
        dataset: what fairchem-core 2.x calls ``task_name``. The model does not read it, but 2.x's
            interface to torch-sim takes UMA's names alone. By default "omat" for a model with
            stress, else "oc20".
        trusted: see :func:`fairchem_equiformer.checkpoints.read`.

    Raises:
        InputError: for a file that is no checkpoint of EquiformerV2 or Equiformer.
    """
    checkpoint = checkpoints.load(path, trusted=trusted)
    checkpoint.model()  # raises where weights and config do not belong together
    name = dataset or ("omat" if "stress" in checkpoint.outputs else "oc20")
    heads = {target: _head(target, checkpoint) for target in checkpoint.outputs}
    weights = _weights(checkpoint, heads)
    backbone = _BACKBONES.get(checkpoint.backbone_class, "EquiformerV2Backbone")
    return MLIPInferenceCheckpoint(
        model_config={
            "_target_": f"{_HERE}.HydraModel",
            "backbone": {
                "model": f"{_HERE}.{backbone}",
                **checkpoint.backbone,
            },
            "heads": {
                target: {"module": f"{_HERE}.{head.module.__name__}", **head.keys}
                for target, head in heads.items()
            },
        },
        model_state_dict=weights,
        ema_state_dict={
            "n_averaged": torch.tensor(1),
            **{f"module.{key}": value for key, value in weights.items()},
        },
        tasks_config=[
            _task(target, checkpoint, heads[target], name) for target in checkpoint.outputs
        ],
    )


def _head(target: str, checkpoint: Checkpoint) -> _Head:
    parts, new = checkpoint.outputs[target].parts, f"output_heads.{target}."
    if issubclass(checkpoint.backbone_class, models.Equiformer):
        return _Head(EquiformerHead, {"output_name": target})
    if checkpoint.form == "flat":
        block, module = {
            "energy": ("energy_block.", models.EnergyHead),
            "forces": ("force_block.", models.ForceHead),
        }[parts[0]]
        return _Head(module, {"output_name": target}, (block, new + block))
    heads: dict[str, tuple[type[Any], dict[str, Any]]] = checkpoint.heads
    name, (module, keys) = next(
        (name, (module, keys))
        for name, (module, keys) in heads.items()
        if parts[0] in module.results(**keys)
    )
    keys = {**keys, "output_name": target}
    if len(parts) == 2:
        for kind, part in zip(("isotropic", "anisotropic"), parts, strict=True):
            keys[kind] = _scale(part, checkpoint)
    return _Head(module, keys, (f"output_heads.{name}.", new))


def _scale(name: str, checkpoint: Checkpoint) -> dict[str, float]:
    normalizer = checkpoint.normalizers.get(name)
    if normalizer is None:
        return {"mean": 0.0, "rmsd": 1.0}
    return {"mean": normalizer.mean, "rmsd": normalizer.std}


def _weights(checkpoint: Checkpoint, heads: dict[str, _Head]) -> dict[str, Tensor]:
    """Weights by the names of 2.x's hydra; those of heads that no target reads are left out."""
    places = dict(head.places for head in heads.values() if head.places)
    places |= {"backbone.": "backbone."} if checkpoint.form == "hydra" else {}
    found = {}
    for name, value in checkpoint.weights.items():
        old = next((old for old in places if name.startswith(old)), None)
        if old is not None:
            found[places[old] + name.removeprefix(old)] = value
        elif checkpoint.form == "flat":
            found[f"backbone.{name}"] = value
    return found


def _task(target: str, checkpoint: Checkpoint, head: _Head, dataset: str) -> dict[str, Any]:
    """Config of 2.x's task: what becomes of a head's results."""
    level = checkpoint.outputs[target].level
    tensor = issubclass(head.module, models.StressHead) or target == "stress"
    task = {
        "_target_": f"{_UNIT}.Task",
        "name": target,
        "property": target,
        "level": level,
        "datasets": [dataset],
        "out_spec": {
            "_target_": f"{_UNIT}.OutputSpec",
            "dim": [3] if level == "atom" else [1, 9] if tensor else [1],
            "dtype": "float32",
        },
        "normalizer": {
            "_target_": f"{_NORMALIZATION}.normalizer.Normalizer",
            **_scale(target, checkpoint),
        },
    }
    references = _references(target, checkpoint)
    if references is not None:
        task["element_references"] = {
            "_target_": f"{_NORMALIZATION}.element_references.ElementReferences",
            "element_references": {
                "_target_": "torch.DoubleTensor",
                "_args_": [references.tolist()],
            },
        }
    return task


def _references(target: str, checkpoint: Checkpoint) -> Tensor | None:
    """Energies of elements [elements] in eV that are added to the prediction, by atomic number.

    The flat model may have some of its own, in the units of its normaliser.
    """
    given = checkpoint.references.get(target)
    found = None if given is None else given.double().flatten()
    if target == "energy" and checkpoint.backbone.get("use_energy_lin_ref"):
        own = checkpoint.weights["energy_lin_ref"].double() * _scale(target, checkpoint)["rmsd"]
        if found is None:
            return own
        found = torch.nn.functional.pad(found, (0, max(0, len(own) - len(found))))
        found[: len(own)] += own
    return found


def load_predict_unit(
    path: Path | str,
    *,
    device: str | None = None,
    inference_settings: InferenceSettings | str = "batch",
    dataset: str | None = None,
    trusted: bool = False,
) -> MLIPPredictUnit:
    """Convert a checkpoint in memory into what ``FAIRChemCalculator`` and others predict with.

    Args:
        path: of any checkpoint that :func:`fairchem_equiformer.checkpoints.load` reads.
        device: "cpu" or "cuda"; by default "cuda" where there is one.
        inference_settings: as fairchem-core 2.x's function of this name takes them. "batch"
            computes in float32 everywhere; 2.x's own default allows TF32 on a GPU.
        dataset: see :func:`convert`.
        trusted: see :func:`convert`.

    Raises:
        InputError: for a file that is no checkpoint of EquiformerV2 or Equiformer.
    """
    stream = io.BytesIO()
    torch.save(convert(path, dataset=dataset, trusted=trusted), stream)
    stream.seek(0)
    unit = MLIPPredictUnit(
        stream,
        device=device or ("cuda" if torch.cuda.is_available() else "cpu"),
        inference_settings=guess_inference_settings(inference_settings),
    )
    unit._inference_model_path = str(path)  # noqa: SLF001  # or it would keep the stream
    return unit
