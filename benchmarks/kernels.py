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
from fairchem_equiformer.ops.triton import grid as grid_module
from fairchem_equiformer.ops.triton.aggregate import AggregateKernels
from fairchem_equiformer.ops.triton.attention import LogitKernels, SoftmaxKernels
from fairchem_equiformer.ops.triton.grid import GridKernels
from fairchem_equiformer.ops.triton.message import MessageKernels
from fairchem_equiformer.so3.grid import grid

CAPABILITIES = (70, 80, 90)
# Bytes of shared memory that a program may have (CUDA programming guide, compute capabilities).
SHARED_LIMIT = {70: 96 * 1024, 80: 163 * 1024, 90: 227 * 1024}
ASSEMBLER_TARGET = {70: "sm_70", 80: "sm_80", 90: "sm_90a"}
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
    """Every launch of an attention block of this size, forward and backward.

    The S2 activation comes three times: products in float32 (by three of TF32), TF32 and bfloat16.
    Below compute capability 8.0 it is PyTorch's.
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
    with recorded_launches() as found:
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
        for dtype, kind in (
            ()
            if capability < 80
            else (
                *((torch.float32, "tf32x3"), (torch.float32, "tf32")),
                (torch.bfloat16, "ieee"),
            )
        ):
            with mock.patch.object(grid_module, "precision", return_value=kind):
                _activate(sizes, dtype)
    return found


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


if __name__ == "__main__":
    main()
