"""Triton's kernels without a GPU: ``python -m benchmarks.kernels``.

Compiles every kernel as the published models launch it, for compute capability 7.0, 8.0 and 9.0
(V100, A100, H200), and prints what the assembler says: registers of a thread, bytes spilled to
memory, shared memory of a program, and which tensor-core instructions there are. Then a model of
time for one edge and block (:mod:`benchmarks.time_model`).
"""

from __future__ import annotations

import argparse
import re
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import triton
from rich.console import Console
from rich.table import Table
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from benchmarks import time_model
from benchmarks.sizes import SIZES, Sizes
from benchmarks.time_model import GAUSSIANS, RADIAL_HIDDEN
from fairchem_equiformer.ops.triton import gaussians as gaussians_module
from fairchem_equiformer.ops.triton import grid as grid_module
from fairchem_equiformer.ops.triton import grid_mlp as grid_mlp_module
from fairchem_equiformer.ops.triton.aggregate import AggregateKernels
from fairchem_equiformer.ops.triton.attention import LogitKernels, SoftmaxKernels
from fairchem_equiformer.ops.triton.gate import GateKernels
from fairchem_equiformer.ops.triton.gaussians import GaussianKernels
from fairchem_equiformer.ops.triton.grid import GridKernels
from fairchem_equiformer.ops.triton.grid_mlp import GridMLPKernels
from fairchem_equiformer.ops.triton.message import MessageKernels
from fairchem_equiformer.ops.triton.norm import NormKernels
from fairchem_equiformer.ops.triton.radial import NormSiLUKernels
from fairchem_equiformer.so3.grid import grid
from fairchem_equiformer.so3.layout import layout

CAPABILITIES = (70, 80, 90)
# Bytes of shared memory that a program may have (CUDA programming guide, compute capabilities).
SHARED_LIMIT = {70: 96 * 1024, 80: 163 * 1024, 90: 227 * 1024}
ASSEMBLER_TARGET = {70: "sm_70", 80: "sm_80", 90: "sm_90a"}
PRODUCTS = (
    (torch.float32, "tf32x3"),
    (torch.float32, "tf32"),
    (torch.bfloat16, "ieee"),
)
EDGES, ATOMS = 32, 16  # divisible by 16, as they may be at best; sizes do not change the code
_POINTERS = {
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.int32: "*i32",
    torch.int64: "*i64",
}


@dataclass(frozen=True)
class Launch:
    """A kernel, its arguments by name and the options of its compilation."""

    kernel: JITFunction
    arguments: dict[str, Any]
    options: dict[str, Any]

    @property
    def name(self) -> str:
        """Of the kernel, and how it makes products if it does."""
        name = self.kernel.__name__
        if self.arguments.get("WEIGHTED") is False:
            return f"{name} of degrees"
        kind = self.arguments.get("PRECISION")
        if kind is None:
            return name
        dtype = str(self.arguments["x"].dtype).removeprefix("torch.")
        return f"{name} {kind if dtype == 'float32' else dtype}"


@dataclass(frozen=True)
class Compiled:
    """What the assembler says of a kernel."""

    registers: int
    spilled: int  # bytes
    shared: int  # bytes
    products: tuple[str, ...]  # instructions of tensor cores


@contextmanager
def recorded_launches() -> Iterator[list[Launch]]:
    """Collect what would be launched within; nothing is."""
    found: list[Launch] = []

    def record(self: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        if warmup or not grid:
            raise ValueError(f"{self.__name__}: not a launch")
        arguments = dict(zip(self.arg_names, args, strict=False))
        options = {}
        for key, value in kwargs.items():
            (arguments if key in self.arg_names else options)[key] = value
        found.append(Launch(self, arguments, options))

    with mock.patch.object(JITFunction, "run", record):
        yield found


def launches(sizes: Sizes, capability: int) -> list[Launch]:
    """Every launch of a block of this size and of the embedding, forward and backward.

    What makes products comes three times: in float32 (by three of TF32), TF32 and bfloat16, but the
    radial function is never in bfloat16. Below compute capability 8.0 it is PyTorch's.
    """
    edge, out = sizes.layout, sizes.layout
    x = torch.empty(ATOMS, edge.num_coefficients, sizes.channels)
    source = target = torch.zeros(EDGES, dtype=torch.int64)
    pointers = torch.zeros(ATOMS + 1, dtype=torch.int64)
    rotations = torch.empty(EDGES, sizes.entries)
    radial = torch.empty(EDGES, sizes.weights, 2 * sizes.channels)
    message = torch.empty(EDGES, edge.num_rows, 2 * sizes.channels)
    values = torch.empty(EDGES, out.num_rows, sizes.heads, sizes.value_channels)
    alpha = torch.empty(EDGES, sizes.heads)
    sums = torch.empty(ATOMS, out.num_coefficients, sizes.heads * sizes.value_channels)
    scalars = torch.empty(EDGES, sizes.heads, sizes.alpha_channels)
    norm = torch.empty(sizes.alpha_channels), torch.empty(sizes.alpha_channels)
    layer = torch.empty(EDGES, RADIAL_HIDDEN)
    with recorded_launches() as found:
        NormSiLUKernels(1e-5).forward(layer, layer[0], layer[0])
        NormSiLUKernels(1e-5).backward(layer, layer[0], layer[0], layer)
        messages = MessageKernels(edge, by_degree=False)
        ends = rotations, source, target, 0
        messages.forward(x, *ends, radial, torch.float32)
        messages.backward_radial(message, x, *ends, radial)
        messages.add_to_atoms(x, message, rotations, radial, pointers, source, 0)
        messages.add_to_atoms(x, message, rotations, radial, pointers, None, 0)
        aggregation = AggregateKernels(edge, out)
        aggregation.forward(rotations, values, alpha, pointers)
        aggregation.backward(rotations, sums, target, values, alpha)
        weights = norm, torch.empty(sizes.heads, sizes.alpha_channels)
        LogitKernels(1e-5).forward(scalars, *weights)
        LogitKernels(1e-5).backward(scalars, *weights, alpha)
        SoftmaxKernels().forward(alpha, pointers)
        SoftmaxKernels().backward(alpha, alpha, pointers)
        messages_of_degrees = torch.empty(EDGES, sizes.lmax + 1, 1, sizes.channels)
        embedding = AggregateKernels(edge, layout(sizes.lmax, 0))
        embedding.forward(rotations, messages_of_degrees, None, pointers)
        embedding.backward_values(rotations, x, target, 1, torch.float32)
        _nodes(sizes, x)
        if capability >= 80:
            for kind in ("tf32x3", "tf32"):
                with mock.patch.object(gaussians_module, "precision", return_value=kind):
                    _first_radial_layer(layer)
            for dtype, kind in PRODUCTS:
                with (
                    mock.patch.object(grid_module, "precision", return_value=kind),
                    mock.patch.object(grid_mlp_module, "precision", return_value=kind),
                ):
                    _activate(sizes, dtype)
                    _grid_mlp(sizes, dtype)
    return found


def _first_radial_layer(hidden: torch.Tensor) -> None:
    centers, distance = torch.empty(GAUSSIANS), torch.empty(EDGES)
    matrix, table = torch.empty(GAUSSIANS, RADIAL_HIDDEN), torch.empty(90, RADIAL_HIDDEN)
    element = torch.zeros(EDGES, dtype=torch.int64)
    kernels = GaussianKernels(centers, -1.0, -40.0)
    kernels.forward(distance, matrix, hidden[0], [(table, element)] * 2)
    kernels.backward(distance, hidden)


def _nodes(sizes: Sizes, x: torch.Tensor) -> None:
    weight, affine = x.new_empty(sizes.channels), x.new_empty(sizes.lmax, sizes.channels)
    norms = NormKernels("rms_norm_sh", sizes.lmax, 1e-5)  # the others differ in a table's numbers
    norms.forward(x, weight, weight, affine)
    norms.backward(x, weight, affine, x)
    hidden = x.new_empty(ATOMS, x.shape[1], sizes.ffn_hidden)
    gates = x.new_empty(ATOMS, sizes.lmax * sizes.ffn_hidden)
    by_gates = GateKernels(layout(sizes.lmax, sizes.lmax).l_major)
    by_gates.forward(hidden, gates)
    by_gates.backward(hidden, gates, hidden)


def _grid_mlp(sizes: Sizes, dtype: torch.dtype) -> None:
    full, cpu = layout(sizes.lmax, sizes.lmax), torch.device("cpu")
    sphere = grid(full, sizes.resolution, dtype, cpu, l_major=True, wanted="others")
    x = torch.empty(ATOMS, full.num_coefficients, sizes.ffn_hidden, dtype=dtype)
    weight = torch.empty(sizes.ffn_hidden, sizes.ffn_hidden, dtype=dtype)
    kernels = GridMLPKernels(sphere)
    kernels.forward(x, weight)
    kernels.backward(x, weight, x[:, 1:])


def _activate(sizes: Sizes, dtype: torch.dtype) -> None:
    resolution, cpu = sizes.resolution, torch.device("cpu")
    sphere = GridKernels(grid(sizes.layout, resolution, dtype, cpu, wanted="others"))
    x = torch.empty(EDGES, sizes.layout.num_rows, sizes.hidden, dtype=dtype)
    y = torch.empty_like(x)[:, 1:]
    sphere.activation(x, y)
    sphere.activation_backward(x, y)


def _argument(value: Any) -> tuple[str, bool]:
    """Type of an argument, and whether 16 divides it."""
    if isinstance(value, torch.Tensor):
        return _POINTERS[value.dtype], True  # PyTorch's memory is aligned to more
    if isinstance(value, float):
        return "fp32", False
    return "i32", value % 16 == 0


def source_of(launch: Launch) -> ASTSource:
    """The kernel with the types of its arguments, as this version of Triton wants it."""
    kernel = launch.kernel
    constants = {p.name for p in kernel.params if p.is_constexpr}
    kinds = {n: _argument(v) for n, v in launch.arguments.items() if n not in constants}
    values = {n: launch.arguments[n] for n in constants}
    # What is 1 becomes a constant when it is launched.
    ones = {n for n in kinds if type(launch.arguments[n]) is int and launch.arguments[n] == 1}
    places = {name: place for place, name in enumerate(kernel.arg_names)}
    divisible = [places[n] for n, (_, divides) in kinds.items() if divides and n not in ones]
    values |= dict.fromkeys(ones, 1)
    if triton.__version__ < "3.3":
        from triton.compiler.compiler import AttrsDescriptor  # noqa: PLC0415  # not there later

        signature = {places[n]: kind for n, (kind, _) in kinds.items() if n not in ones}
        attributes = AttrsDescriptor(tuple(divisible), tuple(places[n] for n in ones))
        return ASTSource(kernel, signature, {places[n]: v for n, v in values.items()}, attributes)
    signature = {n: kinds[n][0] if n not in values else "constexpr" for n in kernel.arg_names}
    attributes = {(place,): [["tt.divisibility", 16]] for place in divisible}
    return ASTSource(kernel, signature, values, attributes)


def compile_for(launch: Launch, capability: int) -> Compiled:
    """Compile and assemble for a compute capability (90 is 9.0).

    Raises:
        RuntimeError: if the assembler refuses.
    """
    target = GPUTarget("cuda", capability, 32)
    made = triton.compile(source_of(launch), target=target, options=dict(launch.options))
    ptx = made.asm["ptx"]
    report = assembler_report(ptx, ASSEMBLER_TARGET[capability])
    registers = re.search(r"Used (\d+) registers", report)
    spilled = re.search(r"(\d+) bytes spill stores", report)
    products = sorted(set(re.findall(r"\b(wgmma\.mma_async|mma\.sync|wmma\.mma)", ptx)))
    return Compiled(
        int(registers[1]) if registers else 0,
        int(spilled[1]) if spilled else 0,
        made.metadata.shared,
        tuple(products),
    )


def narrow_addresses(launch: Launch) -> list[str]:
    """Where a kernel's intermediate code computes an address into a long tensor in 32 bits.

    Long are the tensors with an entry for each edge or atom. An index of an edge or atom is the
    number of a program, which has to be widened at once, or was read from a tensor of 64 bits.
    """
    made = triton.compile(
        source_of(launch), target=GPUTarget("cuda", 80, 32), options=launch.options
    )
    text = made.asm["ttir"]
    signature = text[text.index("tt.func public") :].split("attributes", 1)[0]
    pointers = re.findall(r"(%\w+): !tt\.ptr", signature)
    tensors = [v for v in launch.arguments.values() if isinstance(v, torch.Tensor)]
    counts = {EDGES, ATOMS, ATOMS + 1}
    long = {p for p, t in zip(pointers, tensors, strict=True) if t.shape[0] in counts}
    return narrow_programs(text) + narrow_pointers(text, long)


def narrow_programs(text: str) -> list[str]:
    """Uses of a program's number along the first axis other than its extension to 64 bits."""
    found = []
    for name in re.findall(r"(%\w+) = tt\.get_program_id x", text):
        for line in text.splitlines():
            uses = re.search(rf"{name}\b(?! =)", line)
            if uses and not re.search(rf"arith\.extsi {name} : i32 to i64", line):
                found.append(line.strip())
    return found


def narrow_pointers(text: str, long: set[str]) -> list[str]:
    """Loads and stores whose way from one of these arguments has no offset of 64 bits."""
    origin = {name: (name, False) for name in long}  # argument, whether an offset was wide
    found = []
    for line in text.splitlines():
        moved = re.match(r"\s*(%\w+) = tt\.(?:addptr|splat|broadcast|expand_dims) (%\w+)", line)
        if moved and moved[2] in origin:
            name, wide = origin[moved[2]]
            offset = line.split(" loc(")[0].rstrip()
            widened = "tt.addptr" in line and re.search(r", (?:i64|tensor<[0-9x]+xi64>)$", offset)
            origin[moved[1]] = name, wide or bool(widened)
        used = re.search(r"tt\.(?:load|store) (%\w+)", line)
        if used and used[1] in origin and not origin[used[1]][1]:
            found.append(f"{origin[used[1]][0]} by {used[1]}")
    return found


def assembler_report(ptx: str, target: str) -> str:
    """What ``ptxas -v``, which Triton brings along, says."""
    ptxas = Path(triton.__file__).parent / "backends/nvidia/bin/ptxas"
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(ptx)
        file.flush()
        command = [ptxas, "-v", f"-arch={target}", file.name, "-o", "/dev/null"]
        ended = subprocess.run(command, capture_output=True, text=True, check=False)
    if ended.returncode:
        raise RuntimeError(f"ptxas refuses: {ended.stderr[-2000:]}")
    return ended.stderr


def table(sizes: Sizes, capabilities: Sequence[int]) -> Table:
    """What the assembler says of all kernels of one model."""
    result = Table(title=f"{sizes.name}: as Triton {triton.__version__} compiles it")
    for heading in ("kernel", "capability"):
        result.add_column(heading)
    for heading in ("registers", "spilled / B", "shared / B"):
        result.add_column(heading, justify="right")
    result.add_column("tensor cores")
    for capability in capabilities:
        for launch in launches(sizes, capability):
            made = compile_for(launch, capability)
            figures = map(str, (made.registers, made.spilled, made.shared))
            label = f"{capability // 10}.{capability % 10}"
            result.add_row(launch.name, label, *figures, " ".join(made.products))
    return result


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the tables of the models named on the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.kernels",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--models", nargs="+", choices=SIZES, default=list(SIZES))
    parser.add_argument("--capabilities", nargs="+", type=int, default=list(CAPABILITIES))
    parser.add_argument("--no-compile", action="store_true", help="the model of time alone")
    options = parser.parse_args(arguments)
    console = Console(width=150)
    for name in options.models:
        if not options.no_compile:
            console.print(table(SIZES[name], options.capabilities))
        console.print(time_model.table(SIZES[name]))
        console.print(time_model.so2_table(SIZES[name]))


if __name__ == "__main__":
    main()
