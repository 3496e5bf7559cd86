"""One measurement, in a process of its own: ``python -m benchmarks.measure SPEC.json``.

:mod:`benchmarks.compare` starts it. A fresh process is what makes the peak of the resident set
belong to one model, and keeps one implementation's caches and thread pools from another's time.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from fairchem.core.common.registry import registry
from fairchem.core.common.relaxation import ml_relaxation
from fairchem.core.common.relaxation.optimizable import OptimizableBatch
from fairchem.core.common.utils import load_config
from fairchem.core.datasets import data_list_collater
from fairchem.core.models.base import GraphModelMixin
from fairchem.core.modules.exponential_moving_average import ExponentialMovingAverage
from fairchem.core.modules.scaling import ScaleFactor
from fairchem.core.preprocessing import AtomsToGraphs
from fairchem.core.trainers import OCPTrainer
from torch import nn

from benchmarks.context import CONTEXT
from benchmarks.instruments import Outputs, Work, measured, meter_of, run, timed
from benchmarks.slab import SEED, slab
from benchmarks.spec import CLASSES, Spec

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch_geometric.data import Batch

RELAXATION_STEPS = 4


def batch_of(atoms: int, copies: int) -> Batch:
    """Return ``copies`` of the slab as the batch that fairchem's trainers pass to a model."""
    convert = AtomsToGraphs(r_edges=False, r_energy=False, r_forces=False, r_pbc=True)
    graphs = [convert.convert(slab(atoms)) for _ in range(copies)]
    for index, graph in enumerate(graphs):
        graph.sid = f"slab_{index}"
    return data_list_collater(graphs, otf_graph=True)


def model_config(path: str) -> dict[str, Any]:
    """Return the ``model`` section of a config, less its name and with all dropout off.

    Without dropout the outputs and gradients of two implementations can be compared.
    """
    config = dict(load_config(path)[0]["model"])
    dropouts = ["alpha_drop", "drop_path_rate"]
    if config.pop("name") != CLASSES["equiformer"]:  # V1 has no third
        dropouts.append("proj_drop")
    return config | dict.fromkeys(dropouts, 0.0)


def share_weights(model: nn.Module, path: Path) -> None:
    """Load the parameters in ``path``, or write them if nobody has yet."""
    parameters = dict(model.named_parameters())
    if not path.exists():
        partial = path.with_suffix(".part")
        torch.save({name: p.detach().cpu() for name, p in parameters.items()}, partial)
        partial.rename(path)
        return
    saved = torch.load(path, map_location="cpu", weights_only=True)
    if list(saved) != list(parameters):
        differ = sorted(set(saved) ^ set(parameters)) or "the same names in another order"
        msg = f"{path}: the weights are of another model; parameters that differ: {differ}"
        raise ValueError(msg)
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(saved[name])


def architecture(spec: Spec) -> tuple[str, dict[str, Any]]:
    """Return the class of the spec's model, by name, and its arguments."""
    if spec.implementation in CONTEXT:
        context = CONTEXT[spec.implementation]
        return context.model, context.config
    return CLASSES[spec.implementation], model_config(spec.config)


def build(spec: Spec) -> nn.Module:
    """Return the model of the spec, with the weights that ours and stock share."""
    torch.manual_seed(SEED)
    name, config = architecture(spec)
    model = registry.get_model_class(name)(**config)
    if spec.implementation in CONTEXT:
        fit_scale_factors(model)
    else:
        share_weights(model, Path(spec.weights))
    return model.to(spec.device)


def fit_scale_factors(model: nn.Module) -> None:
    """Set GemNet-OC's scale factors, which it leaves out of its work while they are zero."""
    for module in model.modules():
        if isinstance(module, ScaleFactor):
            module.set_(1.0)


class Task(Work):
    """One on a batch of slabs, with a model of fairchem-core 1.10."""

    data: Batch

    def __init__(self, spec: Spec) -> None:
        self.model = build(spec).eval()
        self.data = batch_of(spec.atoms, spec.batch).to(spec.device)
        self.spec = spec

    def predict(self) -> Outputs:
        """Call the model."""
        reduced = self.spec.implementation == "ours_bf16"
        with torch.autocast(self.spec.device, torch.bfloat16, enabled=reduced):
            return self.model(self.data)


class Inference(Task):
    """Energy and, of models that have them, forces, without gradients."""

    def forward(self) -> Outputs:
        """Predict."""
        with torch.no_grad():
            return self.predict()


class Training(Task):
    """Forward and backward of the loss that the OC20 configs train with, without an optimizer.

    Where there are no forces, of its energy alone.
    """

    keeps = True

    def __init__(self, spec: Spec) -> None:
        super().__init__(spec)
        self.model.train()

    def forward(self) -> Outputs:
        """Predict, recording."""
        self.model.zero_grad(set_to_none=True)
        return self.predict()

    def finish(self, outputs: Outputs) -> None:
        """Differentiate the loss."""
        loss = 2 * (outputs["energy"] - 1).abs().mean()
        if "forces" in outputs:
            loss = loss + 100 * outputs["forces"].norm(dim=-1).mean()
        loss.backward()

    def results(self, outputs: Outputs) -> Outputs:
        """Return what was predicted, and the gradient by all parameters in one vector."""
        gradients = [p.grad.flatten() for p in self.model.parameters() if p.grad is not None]
        return outputs | {"gradient": torch.cat(gradients)}


class Relaxation(Task):
    """A few steps of LBFGS through fairchem's trainer with averages, as in ``run-relaxations``."""

    calls = RELAXATION_STEPS + 1  # the forces at the start, then one call a step

    def __init__(self, spec: Spec) -> None:
        super().__init__(spec)
        self.trainer = inference_trainer(spec)
        self.trainer.model = self.model
        self.trainer.ema = ExponentialMovingAverage(self.model.parameters(), 0.999)

    def forward(self) -> Outputs:
        """Relax from the start."""
        optimizable = OptimizableBatch(self.data.clone(), trainer=self.trainer)
        optimizer = ml_relaxation.LBFGS(
            optimizable, maxstep=0.01, memory=50, damping=1.0, alpha=70.0
        )
        optimizer.run(fmax=0.0, steps=RELAXATION_STEPS)
        return {"forces": optimizable.get_forces(), "pos": optimizable.batch.pos}


class Neighbors(Task):
    """The periodic neighbour search of the model: all edges of the batch, with their vectors."""

    def __init__(self, spec: Spec) -> None:
        self.model = nn.Module()
        self.data = batch_of(spec.atoms, spec.batch).to(spec.device)
        self.search = {"ours": our_search, "stock": stock_search}[spec.implementation](
            model_config(spec.config)
        )

    def forward(self) -> Outputs:
        """Search."""
        return self.search(self.data)


TASKS = {
    "inference": Inference,
    "training": Training,
    "relaxation": Relaxation,
    "neighbors": Neighbors,
}


def our_search(config: dict[str, Any]) -> Callable[[Batch], Outputs]:
    """Return this package's search: batch to source [E], target [E] and vector [E, 3]."""
    # Only here: the stock model is measured in a process that never saw this package.
    from fairchem_equiformer.graph.build import GraphConfig, build_graph  # noqa: PLC0415

    names = ("max_radius", "max_neighbors", "enforce_max_neighbors_strictly", "max_num_elements")
    settings = GraphConfig(**{name: config[name] for name in names if name in config})

    def search(data: Batch) -> Outputs:
        graph = build_graph(data, settings)
        return {"source": graph.source, "target": graph.target, "vector": graph.vector}

    return search


def stock_search(config: dict[str, Any]) -> Callable[[Batch], Outputs]:
    """Return fairchem's search: batch to source [E], target [E] and vector [E, 3]."""
    mixin = GraphModelMixin()
    mixin.cutoff, mixin.max_neighbors = config["max_radius"], config["max_neighbors"]
    mixin.use_pbc, mixin.use_pbc_single, mixin.otf_graph = True, False, True
    strict = config.get("enforce_max_neighbors_strictly", True)

    def search(data: Batch) -> Outputs:
        graph = mixin.generate_graph(data, enforce_max_neighbors_strictly=strict)
        source, target = graph.edge_index
        return {"source": source, "target": target, "vector": graph.edge_distance_vec}

    return search


def inference_trainer(spec: Spec) -> Any:
    """Return fairchem's trainer for predictions, around a model that the caller replaces."""
    name, config = architecture(spec)
    if "num_layers" in config:
        config = config | {"num_layers": 1}
    return OCPTrainer(
        task={},
        model={"name": name, **config},
        outputs={"energy": {"level": "system"}, "forces": {"level": "atom"}},
        dataset=[],
        optimizer={},
        loss_functions=[{"energy": {"fn": "mae", "coefficient": 1}}],
        evaluation_metrics={},
        identifier="benchmark",
        local_rank=0,
        is_debug=True,
        cpu=spec.device == "cpu",
        name="ocp",
        inference_only=True,
    )


def measure(spec: Spec) -> dict[str, Any]:
    """Write the results of one measurement and return its record."""
    task, record = measured(TASKS[spec.task], spec)
    if isinstance(task, Relaxation):
        with torch.no_grad():
            record["forward_times"], _ = timed(
                lambda: task.model(task.data), spec.seconds, meter_of(spec.device)
            )
    return record


if __name__ == "__main__":
    run(measure)
