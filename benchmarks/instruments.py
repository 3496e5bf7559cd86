"""What a process measures itself with: time, memory, FLOPs, parallel regions; of any model.

:func:`run` is the whole of a measuring process; what it measures is a :class:`Work`.
"""

from __future__ import annotations

import ctypes
import gc
import json
import logging
import re
import resource
import sys
import time
import warnings
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from benchmarks import regions
from benchmarks.flop import counted_flop
from benchmarks.spec import Spec

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

Outputs = dict[str, Tensor]


class Work:
    """A piece of work on one batch: ``finish(forward())`` is what gets timed.

    Attributes:
        model: What holds the memory that is not counted.
        data: The batch; its ``natoms`` are the atoms of each structure.
        calls: Forward passes in one piece; times and FLOPs are given for one.
        keeps: Whether what autograd keeps of the forward pass is counted.
    """

    model: nn.Module
    data: Any
    calls = 1
    keeps = False

    def forward(self) -> Outputs:
        """Do the part that autograd records."""
        raise NotImplementedError

    def finish(self, outputs: Outputs) -> None:
        """Do what follows the forward pass."""

    def results(self, outputs: Outputs) -> Outputs:
        """Return what must be equal for every implementation."""
        return outputs


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


def meter_of(device: str) -> CpuMeter | CudaMeter:
    """Return what measures work on a device."""
    return CudaMeter() if device == "cuda" else CpuMeter()


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
    """Return the FLOP/s that a large fp32 matrix product reaches here: the best of ten.

    By PyTorch's products or, where that is faster, by ours.
    """
    ways = [torch.mm]
    with suppress(ImportError):  # another version of this package may have none
        from fairchem_equiformer.ops.linear import product  # noqa: PLC0415

        ways.append(product)
    a, b = torch.randn(4096, 1024, device=device), torch.randn(1024, 1024, device=device)
    times = []
    for multiply in ways * 10:
        meter.synchronize()
        start = time.perf_counter()
        multiply(a, b)
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


def copy_rate() -> float:
    """Return the bytes per second, read and written, of a large copy: the best of ten."""
    source = torch.ones(2**25)
    target = torch.empty_like(source)
    times = []
    for _ in range(10):
        start = time.perf_counter()
        target.copy_(source)
        times.append(time.perf_counter() - start)
    return 2 * source.nbytes / min(times)


def counted(work: Work) -> tuple[Outputs, dict[str, int]]:
    """Return the outputs of the work; its products and their FLOPs, and the bytes kept.

    That is, by autograd of the forward pass. Other than time, all are the same in a first call.
    """
    with counted_flop() as counter:
        with saved_for_backward(work.model) as kept:
            outputs = work.forward()
        saved = sum(kept.values())
        work.finish(outputs)
    counts = {"flop": counter.flop, "products": counter.products}
    return outputs, counts | {"saved_bytes": saved}


def measured(make: Callable[[Spec], Work], spec: Spec) -> tuple[Work, dict[str, Any]]:
    """Write the results of one measurement and return the work and its record.

    The first call counts (FLOPs, bytes saved for backward) and warms up. Those that follow are
    timed, and their peak of memory is taken above what the process held before the first call:
    the model, the structures and the libraries.
    """
    meter = meter_of(spec.device)
    torch.set_num_threads(spec.threads)
    rate = gemm_rate(spec.device, meter)
    work = make(spec)
    torch.manual_seed(spec.round)
    before = meter.allocated()

    outputs, counts = counted(work)
    results = {name: value.detach().cpu() for name, value in work.results(outputs).items()}
    torch.save(results, spec.results)
    del outputs, results
    meter.allocated()

    meter.reset_peak()
    regions_before = regions.counted()
    times, cpu_times = timed(lambda: work.finish(work.forward()), spec.seconds, meter)
    record = {
        "atoms": int(work.data.natoms[0]),
        "parameters": sum(p.numel() for p in work.model.parameters()),
        "times": [seconds / work.calls for seconds in times],
        "cpu_times": [seconds / work.calls for seconds in cpu_times],
        "peak_bytes": meter.peak() - before,
        "flop": counts["flop"] // work.calls,
        "gemm_flop_per_second": rate,
    }
    if regions_before is not None:
        calls = len(times) * work.calls
        record["regions"] = (regions.counted() - regions_before) // calls
    package = sys.modules.get("fairchem_equiformer")
    if package is not None and package.__file__:
        record["package"] = str(Path(package.__file__).resolve().parents[1])
    if work.keeps:
        record["saved_bytes"] = counts["saved_bytes"]
    return work, record


def run(measure: Callable[[Spec], dict[str, Any]]) -> None:
    """Measure what the JSON file named on the command line asks for, and write the record."""
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
