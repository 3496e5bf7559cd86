"""One measurement, in a process of its own: ``python -m benchmarks.measure SPEC.json``.

:mod:`benchmarks.compare` starts it. A fresh process is what makes the peak of the resident set
belong to one model, and keeps one implementation's caches and thread pools from another's time.
"""

from __future__ import annotations

import ctypes
import gc
import json
import logging
import math
import re
import resource
import sys
import time
import warnings
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from ase.build import add_adsorbate, fcc111, molecule
from ase.constraints import FixAtoms
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
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from benchmarks.context import CONTEXT
from benchmarks.spec import CLASSES, Spec

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from torch_geometric.data import Batch

RELAXATION_STEPS = 4
SEED = 0

Outputs = dict[str, Tensor]


def slab(atoms: int) -> Any:
    """Return ethanol on a Cu(111) slab of four layers as :class:`ase.Atoms`.

    The slab is square, so 45, 153, 409, 1609 and 10009 atoms exist; others are rounded to the
    nearest that does. Positions are displaced by 0.05 Angstrom, from a fixed seed.
    """
    adsorbate = molecule("CH3CH2OH")
    side = max(1, round(math.sqrt((atoms - len(adsorbate)) / 4)))
    structure = fcc111("Cu", size=(side, side, 4), vacuum=10.0)
    fixed = [atom.index for atom in structure if atom.tag > 2]
    add_adsorbate(structure, adsorbate, height=2.5, position="fcc")
    # ASE counts layers from the top, 1 to 4, and the adsorbate is 0. OC20: 0 bulk, 1 surface, 2 it.
    layers = structure.get_tags()
    structure.set_tags([2 if layer == 0 else int(layer == 1) for layer in layers])
    structure.set_constraint(FixAtoms(fixed))
    structure.rattle(0.05, seed=SEED)
    structure.pbc = True
    return structure


def batch_of(atoms: int, copies: int) -> Batch:
    """Return ``copies`` of :func:`slab` as the batch that fairchem's trainers pass to a model."""
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


class Task:
    """A piece of work on one batch: ``finish(forward())`` is what gets timed.

    Attributes:
        model: What holds the memory that is not counted.
        data: The batch.
        calls: Forward passes in one piece; times and FLOPs are given for one.
    """

    model: nn.Module
    data: Batch
    calls = 1

    def __init__(self, spec: Spec) -> None:
        self.model = build(spec).eval()
        self.data = batch_of(spec.atoms, spec.batch).to(spec.device)

    def forward(self) -> Outputs:
        """Do the part that autograd records."""
        raise NotImplementedError

    def finish(self, outputs: Outputs) -> None:
        """Do what follows the forward pass."""

    def results(self, outputs: Outputs) -> Outputs:
        """Return what must be equal for every implementation."""
        return outputs


class Inference(Task):
    """Energy and, of models that have them, forces, without gradients."""

    def forward(self) -> Outputs:
        """Predict."""
        with torch.no_grad():
            return self.model(self.data)


class Training(Task):
    """Forward and backward of the loss that the OC20 configs train with, without an optimizer.

    Where there are no forces, of its energy alone.
    """

    def __init__(self, spec: Spec) -> None:
        super().__init__(spec)
        self.model.train()

    def forward(self) -> Outputs:
        """Predict, recording."""
        self.model.zero_grad(set_to_none=True)
        return self.model(self.data)

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


class CpuMeter:
    """Time and resident memory of this process (Linux)."""

    def synchronize(self) -> None:
        """Wait for nothing: operations on the CPU have ended when they return."""

    def allocated(self) -> int:
        """Return the bytes resident now, after freed ones went back to the system."""
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)
        return self._status("VmRSS")

    def reset_peak(self) -> None:
        """Forget the peak so far."""
        Path("/proc/self/clear_refs").write_text("5")

    def peak(self) -> int:
        """Return the most bytes that were resident since :meth:`reset_peak`."""
        return self._status("VmHWM")

    @staticmethod
    def _status(key: str) -> int:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith(f"{key}:"):
                return int(line.split()[1]) * 1024
        msg = f"/proc/self/status has no {key}: memory on the CPU can only be measured on Linux"
        raise RuntimeError(msg)


class CudaMeter:
    """Time and memory of torch's allocator on the GPU."""

    def synchronize(self) -> None:
        """Wait until the GPU has done what it was given."""
        torch.cuda.synchronize()

    def allocated(self) -> int:
        """Return the bytes of live tensors."""
        gc.collect()
        return torch.cuda.memory_allocated()

    def reset_peak(self) -> None:
        """Forget the peak so far."""
        torch.cuda.reset_peak_memory_stats()

    def peak(self) -> int:
        """Return the most bytes of live tensors since :meth:`reset_peak`."""
        return torch.cuda.max_memory_allocated()


# torch's table leaves out the product that is added in place.
FLOP = {**flop_registry, torch.ops.aten.addmm_: flop_registry[torch.ops.aten.addmm]}


class CountFlop(TorchDispatchMode):
    """Add up the FLOPs of matrix products in ``flop``.

    torch's FlopCounterMode does so module by module, and for that ties the graph of a forward pass
    that no backward follows into a cycle, which is never freed: the next call's peak would hold it.
    """

    def __init__(self) -> None:
        super().__init__()
        self.flop = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # noqa: ANN001, ANN204
        """Run one operation, and count it if torch knows what it costs."""
        result = func(*args, **(kwargs or {}))
        count = FLOP.get(func.overloadpacket)
        if count is not None:
            self.flop += count(*args, **(kwargs or {}), out_val=result)
        return result


@contextmanager
def saved_for_backward(model: nn.Module) -> Iterator[dict[int, int]]:
    """Collect the storages that autograd keeps, as address to bytes, less the model's own."""
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor.detach()

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield kept


def gemm_rate(device: str, meter: CpuMeter | CudaMeter) -> float:
    """Return the FLOP/s that a large fp32 matrix product reaches here: the best of ten."""
    a, b = torch.randn(4096, 1024, device=device), torch.randn(1024, 1024, device=device)
    times = []
    for _ in range(10):
        meter.synchronize()
        start = time.perf_counter()
        a @ b
        meter.synchronize()
        times.append(time.perf_counter() - start)
    return 2 * a.shape[0] * a.shape[1] * b.shape[1] / min(times)


def timed(
    call: Callable[[], object], seconds: float, meter: CpuMeter | CudaMeter
) -> tuple[list[float], list[float]]:
    """Call at least once, until ``seconds`` have passed.

    Returns:
        For each call its seconds, and those that the processors spent on all its threads. On an
        idle machine the latter are no less.
    """
    times: list[float] = []
    cpu_times: list[float] = []
    while sum(times) < seconds or not times:
        meter.synchronize()
        start, cpu_start = time.perf_counter(), time.process_time()
        call()
        meter.synchronize()
        times.append(time.perf_counter() - start)
        cpu_times.append(time.process_time() - cpu_start)
    return times, cpu_times


def measure(spec: Spec) -> dict[str, Any]:
    """Write the results of one measurement and return its record.

    The first call counts (FLOPs, bytes saved for backward) and warms up. Those that follow are
    timed, and their peak of memory is taken above what the process held before the first call:
    the model, the structures and the libraries.
    """
    meter = CudaMeter() if spec.device == "cuda" else CpuMeter()
    torch.set_num_threads(spec.threads)
    rate = gemm_rate(spec.device, meter)
    task = TASKS[spec.task](spec)
    torch.manual_seed(spec.round)
    before = meter.allocated()

    with CountFlop() as counter:
        with saved_for_backward(task.model) as kept:
            outputs = task.forward()
        saved = sum(kept.values())
        task.finish(outputs)
    results = {name: value.detach().cpu() for name, value in task.results(outputs).items()}
    torch.save(results, spec.results)
    del outputs, results
    meter.allocated()

    meter.reset_peak()
    times, cpu_times = timed(lambda: task.finish(task.forward()), spec.seconds, meter)
    record = {
        "atoms": int(task.data.natoms[0]),
        "parameters": sum(p.numel() for p in task.model.parameters()),
        "times": [seconds / task.calls for seconds in times],
        "cpu_times": [seconds / task.calls for seconds in cpu_times],
        "peak_bytes": meter.peak() - before,
        "flop": counter.flop // task.calls,
        "gemm_flop_per_second": rate,
    }
    if isinstance(task, Training):
        record["saved_bytes"] = saved
    if isinstance(task, Relaxation):
        with torch.no_grad():
            record["forward_times"], _ = timed(lambda: task.model(task.data), spec.seconds, meter)
    return record


def main() -> None:
    """Measure what the JSON file named on the command line asks for."""
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    spec = Spec(**json.loads(Path(sys.argv[1]).read_text()))
    if spec.device == "cpu":
        resource.setrlimit(resource.RLIMIT_DATA, (spec.memory_limit, spec.memory_limit))
    try:
        record = measure(spec)
    except (MemoryError, RuntimeError) as error:
        if not re.search("memory|bad_alloc", f"{type(error).__name__} {error}", re.IGNORECASE):
            raise
        record = {"failure": "out of memory"}
    Path(spec.record).write_text(json.dumps(record))


if __name__ == "__main__":
    main()
