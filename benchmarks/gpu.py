"""This package against fairchem's own model on a GPU: ``python -m benchmarks.gpu FOLDER``.

Started by ``benchmarks/gpu.sh``. Measured are the rates of the device, then every row of the
targets in float32, TF32 and bfloat16 autocast: stock, this package with Triton's kernels, this
package in PyTorch alone and, for inference, as calculators run it (CUDA graphs), on the same
weights. Each measurement is written as soon as it is there. What fails says why and the rest goes
on, in a new process where the old one ended, hung or lost its device; what there is no time for
is named. Called again with the same folder, it measures what is missing.
"""

from __future__ import annotations

import argparse
import contextlib
import faulthandler
import gc
import json
import math
import os
import subprocess
import sys
import time
import types
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from benchmarks.sizes import SIZES
from fairchem_equiformer.models import EquiformerV2
from fairchem_equiformer.nn.frozen import FrozenWeights
from fairchem_equiformer.ops.choice import VARIABLE

Record = dict[str, Any]
Key = tuple[str, str, int, int, str, str]  # row, implementation, mode
MODES = ("fp32", "tf32", "bf16")
RECORDED = "ours on frozen weights"  # as calculators run it: one CUDA graph
KERNELS = {
    "ours": "triton" if torch.cuda.is_available() else "auto",
    "ours in PyTorch": "reference",
    RECORDED: "triton" if torch.cuda.is_available() else "auto",
}
IMPLEMENTATIONS = ("stock", *KERNELS)
COPPER = 2.553  # Angstrom between neighbours

# Seconds. The first two are guesses; longer than the third, and the process is given up.
PER_MEASUREMENT, PER_STOCK_MODEL, AT_MOST = 5, 10, 90
ENDED = f"its process ended, or took longer than {AT_MOST} s"
DEVICE_LOST = 75  # exit code


@dataclass(frozen=True)
class Row:
    """A line of the table of targets: how many times less than stock's, by mode."""

    task: str  # inference or training
    model: str
    copies: int
    atoms: int
    seconds: tuple[float, ...]
    peak_bytes: tuple[float, ...] = ()  # no target without

    def key(self, implementation: str, mode: str) -> Key:
        """What one measurement is known by."""
        return self.task, self.model, self.copies, self.atoms, implementation, mode


ROWS = (
    Row("inference", "31M", 1, 80, (4, 5, 5)),
    Row("inference", "31M", 8, 80, (2.5, 5, 6)),
    Row("inference", "153M", 8, 80, (2.5, 4, 6)),
    Row("training", "153M", 4, 80, (2, 3, 4), (10, 10, 15)),
)
DRY_ROWS = (
    Row("inference", "tiny", 2, 10, (1, 1, 1)),
    Row("training", "tiny", 1, 10, (1, 1, 1), (1, 1, 1)),
)


def planned(row: Row) -> list[tuple[str, str]]:
    """Implementations and modes of a row; stock last, which needs most memory."""
    names = [n for n in (*KERNELS, "stock") if n != RECORDED or row.task == "inference"]
    return [(name, mode) for name in names for mode in MODES]


# Of configs/oc20/all_md, which need fairchem-core to be read.
KEYS: dict[str, Any] = {
    "use_pbc": True,
    "otf_graph": True,
    "max_neighbors": 20,
    "max_radius": 12.0,
    "max_num_elements": 90,
    "grid_resolution": 18,
    "sphere_channels": 128,
    "attn_hidden_channels": 64,
    "num_heads": 8,
    "attn_alpha_channels": 64,
    "attn_value_channels": 16,
    "ffn_hidden_channels": 128,
    "norm_type": "layer_norm_sh",
    "edge_channels": 128,
    "use_grid_mlp": True,
    "use_sep_s2_act": True,
    "weight_init": "uniform",
    "regress_forces": True,
    "alpha_drop": 0.0,  # without dropout outputs and gradients can be compared
    "drop_path_rate": 0.0,
}
TINY = {
    "num_layers": 1,
    "lmax_list": [2],
    "mmax_list": [1],
    "grid_resolution": 8,
    "sphere_channels": 16,
    "attn_hidden_channels": 8,
    "num_heads": 2,
    "attn_alpha_channels": 8,
    "attn_value_channels": 4,
    "ffn_hidden_channels": 16,
    "edge_channels": 16,
    "max_neighbors": 6,
    "max_radius": 6.0,
}


def keys_of(model: str) -> dict[str, Any]:
    """Config of a published model, or of a tiny one."""
    if model == "tiny":
        return KEYS | TINY
    sizes = SIZES[model]
    degrees = {"lmax_list": [sizes.lmax], "mmax_list": [sizes.mmax]}
    return KEYS | degrees | {"num_layers": sizes.blocks}


class Structures(types.SimpleNamespace):
    """A batch of copper slabs, with the fields that both models read."""

    @classmethod
    def of(cls, copies: int, atoms: int, device: str) -> Structures:
        """Slabs of three layers, each atom displaced by 0.05 Angstrom, no two alike."""
        side = math.ceil(math.sqrt(atoms / 3))
        place = torch.arange(atoms)
        layer, x, y = place // side**2, place % side, place // side % side
        flat = [x + 0.5 * y + 0.5 * layer, math.sqrt(0.75) * y + layer / math.sqrt(12)]
        positions = COPPER * torch.stack([*flat, math.sqrt(2 / 3) * layer], dim=1)
        generator = torch.Generator().manual_seed(0)
        pos = positions.repeat(copies, 1)
        pos = pos + 0.05 * torch.randn(pos.shape, generator=generator)
        lengths = (side, side * math.sqrt(0.75), 10.0)
        cell = COPPER * torch.diag(torch.tensor(lengths))
        cell[1, 0] = COPPER * side / 2
        batch = torch.arange(copies).repeat_interleave(atoms)
        tensors = {
            "pos": pos,
            "cell": cell.repeat(copies, 1, 1),
            "natoms": torch.full((copies,), atoms),
            "atomic_numbers": torch.full((copies * atoms,), 29),
            "batch": batch,
            "pbc": torch.ones(copies, 3, dtype=torch.bool),
        }
        return cls(**{name: tensor.to(device) for name, tensor in tensors.items()})


# fairchem's own model


def torch_scatter() -> types.ModuleType:
    """The two functions of torch_scatter that fairchem's model calls, by PyTorch's scatter."""
    module = types.ModuleType("torch_scatter")

    def scatter(
        src: Tensor, index: Tensor, dim: int = -1, dim_size: int | None = None, reduce: str = "sum"
    ) -> Tensor:
        dim %= src.ndim
        size = int(index.max()) + 1 if dim_size is None else dim_size
        shape = [1] * src.ndim
        shape[dim] = -1
        where = index.view(shape).expand_as(src) if index.ndim == 1 else index.expand_as(src)
        out = src.new_zeros(*src.shape[:dim], size, *src.shape[dim + 1 :])
        name = {"add": "sum", "max": "amax", "min": "amin"}.get(reduce, reduce)
        return out.scatter_reduce(dim, where, src, name, include_self=False)

    def segment_coo(
        src: Tensor, index: Tensor, dim_size: int | None = None, reduce: str = "sum"
    ) -> Tensor:
        return scatter(src, index, 0, dim_size, reduce)

    def segment_csr(src: Tensor, indptr: Tensor, reduce: str = "sum") -> Tensor:
        return torch.segment_reduce(src, reduce, offsets=indptr)

    module.scatter, module.segment_coo, module.segment_csr = scatter, segment_coo, segment_csr
    return module


def stock(keys: dict[str, Any]) -> nn.Module:
    """fairchem-core 1.10's model, with the grids that it uses and no others (they take minutes).

    Of the package, only what this model imports is loaded: the whole needs ase, lmdb and more.
    """
    try:
        import torch_scatter as _  # noqa: F401, PLC0415
    except ImportError:
        sys.modules["torch_scatter"] = torch_scatter()
    if "fairchem.core" not in sys.modules:
        import fairchem  # noqa: PLC0415

        for name in ("core", "core.models"):  # their own __init__ would load everything
            package = types.ModuleType(f"fairchem.{name}")
            parts = name.split(".")
            package.__path__ = [str(Path(folder, *parts)) for folder in fairchem.__path__]
            sys.modules[package.__name__] = package
    from fairchem.core.models.equiformer_v2 import equiformer_v2_deprecated as module  # noqa: PLC0415

    (lmax,), (mmax,) = keys["lmax_list"], keys["mmax_list"]
    make = module.SO3_Grid

    def grid(degree: int, order: int, **rest: Any) -> nn.Module:
        used = degree == lmax and order in (mmax, lmax)
        return make(degree, order, **rest) if used else nn.Identity()

    with mock.patch.object(module, "SO3_Grid", grid):
        return module.EquiformerV2(**keys)


# Measuring


class Session:
    """The device, the clock, and what was measured, also by processes before this one."""

    def __init__(self, folder: Path, *, dry: bool, minutes: float) -> None:
        self.folder = folder
        self.dry = dry
        self.rows = DRY_ROWS if dry else ROWS
        self.device = "cpu" if dry else "cuda"
        self.end = time.monotonic() + 60 * minutes
        self.seconds = 0.0 if dry else 2.0  # of a measurement
        self.about = {
            "device": "cpu" if dry else torch.cuda.get_device_name(),
            "torch": torch.__version__,
            "python": sys.version.split()[0],
        }
        self.records: dict[Key, Record] = {}
        self.results: dict[Key, dict[str, Tensor]] = {}
        self._continue()

    def _continue(self) -> None:
        """Read what there is of the same device and versions."""
        lines, results = self.folder / "results.jsonl", self.folder / "results.pt"
        if results.exists():
            self.results = torch.load(results, weights_only=True)
        for line in lines.read_text().splitlines() if lines.exists() else ():
            record = json.loads(line)
            if self.about.items() <= record.items():
                self.records[tuple(record["key"])] = record
        self.results = {key: own for key, own in self.results.items() if key in self.records}

    def keep(self, key: Key, record: Record) -> None:
        """Write a record beside the others, and the table of them all."""
        record = self.about | {"key": key} | record
        results = record.pop("results", None)
        if results is not None:
            self.results[key] = results
            torch.save(self.results, self.folder / ".results.pt")
            (self.folder / ".results.pt").rename(self.folder / "results.pt")
        self.records[key] = record
        self.write("results.jsonl", "".join(json.dumps(r) + "\n" for r in self.records.values()))
        self.write("table.md", table(self))

    def forget_failures(self) -> None:
        """What failed is tried again."""
        self.records = {key: r for key, r in self.records.items() if "failure" not in r}
        self.write("results.jsonl", "".join(json.dumps(r) + "\n" for r in self.records.values()))

    def synchronize(self) -> None:
        """Wait for the device."""
        if not self.dry:
            torch.cuda.synchronize()

    def time(self, call: Callable[[], object]) -> tuple[float, int]:
        """Median seconds of a call, after one to warm up, and how many there were."""
        call()
        times: list[float] = []
        while not times or sum(times) < self.seconds:
            self.synchronize()
            start = time.perf_counter()
            call()
            self.synchronize()
            times.append(time.perf_counter() - start)
        return median(times), len(times)

    def peak(self, call: Callable[[], object]) -> int:
        """Bytes that a call needs at most above what is held already; 0 on a CPU."""
        if self.dry:
            call()
            return 0
        gc.collect()
        torch.cuda.empty_cache()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        call()
        self.synchronize()
        return torch.cuda.max_memory_allocated() - before

    def write(self, name: str, text: str) -> None:
        """Write a file in the folder."""
        partial = self.folder / f".{name}"
        partial.write_text(text)
        partial.rename(self.folder / name)


def rates(session: Session) -> Record:
    """Matrix products per second in each mode, and bytes read and written per second."""
    size = 256 if session.dry else 8192
    found: Record = {}
    for mode in MODES:
        dtype = torch.bfloat16 if mode == "bf16" else torch.float32
        a, b = (torch.randn(size, size, device=session.device, dtype=dtype) for _ in range(2))
        with precision(mode, session.device, autocast=False):
            seconds, _ = session.time(lambda a=a, b=b: a @ b)
        found[f"{mode}_flop_per_second"] = 2 * size**3 / seconds
    source = torch.randn(size * size * (1 if session.dry else 16), device=session.device)
    target = torch.empty_like(source)
    seconds, _ = session.time(lambda: target.copy_(source))
    found["bytes_per_second"] = 2 * source.numel() * source.element_size() / seconds
    return found


@contextlib.contextmanager
def precision(mode: str, device: str, *, autocast: bool = True) -> Iterator[None]:
    """Products in float32, in TF32, or under autocast in bfloat16."""
    torch.set_float32_matmul_precision("high" if mode == "tf32" else "highest")
    try:
        with torch.autocast(device, torch.bfloat16, enabled=autocast and mode == "bf16"):
            yield
    finally:
        torch.set_float32_matmul_precision("highest")


def step(model: nn.Module, data: Structures, task: str) -> dict[str, Tensor]:
    """Predict, or predict and differentiate the loss that the OC20 configs train with."""
    batch = Structures(**vars(data))
    if task == "inference":
        with torch.no_grad():
            return dict(model(batch))
    model.zero_grad(set_to_none=True)
    out = dict(model(batch))
    energy, forces = out["energy"].float(), out["forces"].float()
    (2 * (energy - 1).abs().mean() + 100 * forces.norm(dim=-1).mean()).backward()
    return {name: value.detach() for name, value in out.items()}


def measure(
    session: Session, row: Row, name: str, mode: str, model: nn.Module, data: Structures
) -> Record:
    """Time, memory and results of one implementation."""
    record: Record = {}
    choice = {VARIABLE: KERNELS.get(name, "auto")}
    model.train(row.task == "training")
    frozen = FrozenWeights().used_by(model) if name == RECORDED else contextlib.nullcontext()
    with mock.patch.dict(os.environ, choice), precision(mode, session.device), frozen:
        results = step(model, data, row.task)
        record["results"] = {key: value.float().cpu() for key, value in results.items()}
        del results
        record["peak_bytes"] = session.peak(lambda: step(model, data, row.task))
        record["seconds"], record["calls"] = session.time(lambda: step(model, data, row.task))
        if name == "ours" and mode != "tf32":
            write_profile(session, row, mode, lambda: step(model, data, row.task))
    model.zero_grad(set_to_none=True)
    return record


def write_profile(session: Session, row: Row, mode: str, call: Callable[[], object]) -> None:
    """What takes the device's time in one call."""
    activities = [ProfilerActivity.CPU] + ([] if session.dry else [ProfilerActivity.CUDA])
    with profile(activities=activities) as found:
        call()
        session.synchronize()
    key = "self_cpu_time_total" if session.dry else "self_cuda_time_total"
    text = found.key_averages().table(sort_by=key, row_limit=40, max_name_column_width=90)
    session.write(f"profile_{row.task}_{row.model}_{row.copies}x{row.atoms}_{mode}.txt", text)


def attempt(label: str, call: Callable[[], Record]) -> Record:
    """A record, or one that says why there is none."""
    print(label, file=sys.stderr)
    faulthandler.dump_traceback_later(AT_MOST, exit=True)
    try:
        return call()
    except Exception as error:  # noqa: BLE001  # the rest is measured nevertheless
        reason = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        print(f"{label}: {reason}", file=sys.stderr)
        return {"failure": reason[:300]}
    finally:
        faulthandler.cancel_dump_traceback_later()


def stop_without_device(session: Session) -> None:
    """End this process if an error has taken the device from it: all that follows would fail."""
    if session.dry:
        return
    try:
        session.synchronize()
        gc.collect()
        torch.cuda.empty_cache()
    except RuntimeError as error:
        print(f"the device is lost: {error}", file=sys.stderr)
        sys.exit(DEVICE_LOST)


def measure_row(session: Session, row: Row) -> None:
    """What is missing of one row, by all implementations in all modes, on the same weights."""
    left = [pair for pair in planned(row) if row.key(*pair) not in session.records]
    if not left:
        return
    torch.manual_seed(0)
    own = EquiformerV2(**keys_of(row.model)).to(session.device)
    data = Structures.of(row.copies, row.atoms, session.device)
    model: nn.Module = own
    for name, mode in left:
        key = row.key(name, mode)
        if time.monotonic() > session.end:
            session.keep(key, {"failure": "no time left"})
            continue
        session.keep(key, {"failure": ENDED})  # unless it is replaced
        label = f"{row.task}, {row.model}, {row.copies} x {row.atoms} atoms, {name}, {mode}"

        def call(name: str = name, mode: str = mode) -> Record:
            nonlocal model
            if name == "stock" and model is own:
                model = stock_like(own, keys_of(row.model))
            return measure(session, row, name, mode, model, data)

        session.keep(key, attempt(label, call))
        stop_without_device(session)


def stock_like(own: nn.Module, keys: dict[str, Any]) -> nn.Module:
    """fairchem's model with the weights of ours, on the same device."""
    weights = dict(own.named_parameters())
    made = stock(keys).to(next(own.parameters()).device)
    with torch.no_grad():
        for key, parameter in made.named_parameters():
            parameter.copy_(weights[key])
    return made


def difference(session: Session, row: Row, name: str, mode: str) -> str:
    """The results' largest difference from those of stock in float32, or of ours without that."""
    own = session.results.get(row.key(name, mode))
    references = [session.results.get(row.key(other, "fp32")) for other in ("stock", "ours")]
    reference = next((found for found in references if found is not None), None)
    if own is None or reference is None:
        return ""
    errors = [(own[k] - v).abs().max() / v.abs().max() for k, v in reference.items()]
    return f"{max(errors).item():.1e}"


def table(session: Session) -> str:
    """Markdown: time and peak memory, and how many times less than stock's they are and have to be.

    The targets stand beside what a user gets: inference on frozen weights, training with kernels.
    """
    header = ("work", "mode", "implementation", "ms", "ratio", "target", "peak / MB", "ratio")
    lines = ["| " + " | ".join((*header, "target", "difference")) + " |", "|" + "---|" * 10]
    for row in session.rows:
        for name, mode in planned(row):
            record = session.records.get(row.key(name, mode), {"failure": "not measured"})
            work = f"{row.task}, {row.model}, {row.copies} x {row.atoms} atoms"
            cells = [work, mode, name, *figures(session, row, name, mode, record)]
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def figures(session: Session, row: Row, name: str, mode: str, record: Record) -> list[str]:
    """Cells of the table behind the names."""
    offered = RECORDED if row.task == "inference" else "ours"
    place = MODES.index(mode)
    targets = [
        f"{wanted[place]:g}" if name == offered and wanted else ""
        for wanted in (row.seconds, row.peak_bytes)
    ]
    if "failure" in record:
        return [record["failure"].replace("|", "/"), "", targets[0], "", "", targets[1], ""]
    first = session.records.get(row.key("stock", mode), {})
    return [
        f"{1e3 * record['seconds']:.2f}",
        ratio(first, record, "seconds"),
        targets[0],
        f"{record['peak_bytes'] / 1e6:.0f}",
        ratio(first, record, "peak_bytes"),
        targets[1],
        difference(session, row, name, mode),
    ]


def ratio(first: Record, record: Record, key: str) -> str:
    """How many times less a figure is than the first one's."""
    return f"{first[key] / record[key]:.2f}" if first.get(key) and record.get(key) else ""


def work(session: Session) -> None:
    """Measure what is missing."""
    if not (session.folder / "rates.json").exists():
        found = attempt("rates of the device", lambda: rates(session))
        if "failure" not in found:
            session.write("rates.json", json.dumps(session.about | found, indent=1) + "\n")
        stop_without_device(session)
    for row in session.rows:
        measure_row(session, row)


def missing(session: Session) -> list[Key]:
    """What was not measured, or failed."""
    keys = [row.key(*pair) for row in session.rows for pair in planned(row)]
    return [key for key in keys if "failure" in session.records.get(key, {"failure": ""})]


def supervise(folder: Path, end: float, *, dry: bool) -> None:
    """Have a process measure, and another one what is left where it ended before its time."""
    tried = -1
    while time.monotonic() < end:
        left = (end - time.monotonic()) / 60
        command = [sys.executable, "-m", "benchmarks.gpu", str(folder), "--worker"]
        command += ["--minutes", f"{left:.2f}", *(["--dry-run"] if dry else [])]
        ended = subprocess.run(command, check=False).returncode
        lines = folder / "results.jsonl"
        now = len(lines.read_text().splitlines()) if lines.exists() else 0
        if ended == 0 or now == tried:  # as it should, or nothing can be measured at all
            return
        tried = now


def main() -> None:
    """Measure everything."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--dry-run", action="store_true", help="on the CPU, tiny")
    parser.add_argument("--minutes", type=float, default=5.5, help="start nothing after these")
    parser.add_argument("--worker", action="store_true", help="in this process, and no other one")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    options.folder.mkdir(parents=True, exist_ok=True)
    if not options.dry_run and not torch.cuda.is_available():
        parser.error("there is no GPU; --dry-run tries everything on the CPU")
    end = time.monotonic() + 60 * options.minutes
    session = Session(options.folder, dry=options.dry_run, minutes=options.minutes)
    if options.worker:
        work(session)
        return
    session.forget_failures()
    left = missing(session)
    seconds = PER_MEASUREMENT * len(left) + PER_STOCK_MODEL * len({key[:4] for key in left})
    print(f"{len(left)} measurements, about {seconds} s; none begins after {options.minutes:g} min")
    supervise(options.folder, end, dry=options.dry_run)
    session = Session(options.folder, dry=options.dry_run, minutes=0)
    print(table(session))
    left = missing(session)
    if left:
        sys.exit(f"{len(left)} measurements are missing: see the table, and call this again")


if __name__ == "__main__":
    main()
