"""This package against fairchem's own model on a GPU: ``python -m benchmarks.gpu FOLDER``.

Started by ``benchmarks/gpu.sh``. One process measures the rates of the device, then every row of
the targets in float32, TF32 and bfloat16 autocast: stock, this package with Triton's kernels, this
package in PyTorch alone and, for inference, as calculators run it (CUDA graphs), on the same
weights. What fails says why and the rest goes on; what
there is no time for is named.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import math
import os
import sys
import time
import types
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
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
MODES = ("fp32", "tf32", "bf16")
RECORDED = "ours on frozen weights"  # as calculators run it: one CUDA graph
KERNELS = {
    "ours": "triton" if torch.cuda.is_available() else "auto",
    "ours in PyTorch": "reference",
    RECORDED: "triton" if torch.cuda.is_available() else "auto",
}
IMPLEMENTATIONS = ("stock", *KERNELS)
COPPER = 2.553  # Angstrom between neighbours


@dataclass(frozen=True)
class Row:
    """A line of the table of targets."""

    task: str  # inference or training
    model: str
    copies: int
    atoms: int


ROWS = (
    Row("inference", "31M", 1, 80),
    Row("inference", "31M", 8, 80),
    Row("inference", "153M", 8, 80),
    Row("training", "153M", 4, 80),
)
DRY_ROWS = (Row("inference", "tiny", 2, 10), Row("training", "tiny", 1, 10))
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
    """The device, the clock, and where results go."""

    def __init__(self, folder: Path, *, dry: bool, minutes: float) -> None:
        self.folder = folder
        self.dry = dry
        self.device = "cpu" if dry else "cuda"
        self.end = time.monotonic() + 60 * minutes
        self.seconds = 0.0 if dry else 2.0  # of a measurement
        self.records: list[Record] = []

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
    record = asdict(row) | {"implementation": name, "mode": mode}
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


def attempt(session: Session, label: str, call: Callable[[], Record]) -> Record:
    """A record, or one that says why there is none."""
    if time.monotonic() > session.end:
        return {"failure": "no time left"}
    print(label, file=sys.stderr)
    try:
        return call()
    except Exception as error:  # noqa: BLE001  # the rest is measured nevertheless
        reason = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        print(f"{label}: {reason}", file=sys.stderr)
        return {"failure": reason[:300]}
    finally:
        gc.collect()
        if not session.dry:
            torch.cuda.empty_cache()


def measure_row(session: Session, row: Row) -> list[Record]:
    """One row by all implementations in all modes, on the same weights and structures."""
    keys, device = keys_of(row.model), session.device
    torch.manual_seed(0)
    own = EquiformerV2(**keys).to(device)
    data = Structures.of(row.copies, row.atoms, device)
    found: dict[tuple[str, str], Record] = {}
    for name in (*KERNELS, "stock"):
        if name == RECORDED and row.task == "training":
            continue
        model: nn.Module = own
        if name == "stock":

            def build() -> Record:
                made = stock(keys).to(device)
                weights = dict(own.named_parameters())
                with torch.no_grad():
                    for key, parameter in made.named_parameters():
                        parameter.copy_(weights[key])
                return {"model": made}

            built = attempt(session, f"{row}: building the stock model", build)
            model = built.get("model", own)
        for mode in MODES:
            label = f"{row.task}, {row.model}, {row.copies} x {row.atoms} atoms, {name}, {mode}"
            identity = asdict(row) | {"implementation": name, "mode": mode}
            if name == "stock" and "failure" in built:
                record = built
            else:
                record = attempt(
                    session,
                    label,
                    lambda n=name, m=mode, of=model: measure(session, row, n, m, of, data),
                )
            found[name, mode] = identity | record
    return compared(found)


def compared(found: dict[tuple[str, str], Record]) -> list[Record]:
    """The records, with each one's difference from the stock model in float32."""
    reference = found["stock", "fp32"].get("results") or found["ours", "fp32"].get("results")
    records = []
    for record in found.values():
        results = record.pop("results", None)
        if results is not None and reference is not None:
            record["difference"] = {
                key: ((results[key] - value).abs().max() / value.abs().max()).item()
                for key, value in reference.items()
            }
        records.append(record)
    return records


def table(records: list[Record]) -> str:
    """Markdown: milliseconds and peak memory, and how many times less than stock's they are."""
    header = ("work", "mode", "implementation", "ms", "ratio", "peak / MB", "ratio", "difference")
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    of_stock = {
        (r["task"], r["model"], r["copies"], r["mode"]): r
        for r in records
        if r["implementation"] == "stock"
    }
    for r in records:
        first = of_stock[r["task"], r["model"], r["copies"], r["mode"]]
        work = f"{r['task']}, {r['model']}, {r['copies']} x {r['atoms']} atoms"
        cells = [work, r["mode"], r["implementation"]]
        if "failure" in r:
            cells += [r["failure"].replace("|", "/"), "", "", "", ""]
        else:
            cells += [f"{1e3 * r['seconds']:.2f}", ratio(first, r, "seconds")]
            cells += [f"{r['peak_bytes'] / 1e6:.0f}", ratio(first, r, "peak_bytes")]
            cells.append(f"{max(r['difference'].values()):.1e}" if "difference" in r else "")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def ratio(first: Record, record: Record, key: str) -> str:
    """How many times less a figure is than the first one's."""
    return f"{first[key] / record[key]:.2f}" if first.get(key) and record.get(key) else ""


def main() -> None:
    """Measure everything; write after each row, so that what was measured is there."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--dry-run", action="store_true", help="on the CPU, tiny")
    parser.add_argument("--minutes", type=float, default=5.0, help="start nothing after these")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    options.folder.mkdir(parents=True, exist_ok=True)
    session = Session(options.folder, dry=options.dry_run, minutes=options.minutes)
    if not session.dry and not torch.cuda.is_available():
        parser.error("there is no GPU; --dry-run tries everything on the CPU")
    about = {
        "device": "cpu" if session.dry else torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "python": sys.version.split()[0],
    }
    session.write("rates.json", json.dumps(about | rates(session), indent=1) + "\n")
    for row in DRY_ROWS if session.dry else ROWS:
        session.records += [about | record for record in measure_row(session, row)]
        lines = [json.dumps(record) + "\n" for record in session.records]
        session.write("results.jsonl", "".join(lines))
        session.write("table.md", table(session.records))
    print(table(session.records))
    if session.dry and any("failure" in record for record in session.records):
        sys.exit("the dry run failed: see the table")


if __name__ == "__main__":
    main()
