"""Time and memory of one convolution against the highest degree: ``python -m benchmarks.lmax``.

Equiformer's convolution is a tensor product with the harmonics of the edge, EquiformerV2's one
SO(2) linear layer in the edge's frame. Both read the features of the two ends of an edge, C
channels of every degree, weight them by radial weights and give C channels of every degree, summed
over the edges of an atom: on the same edges, without gradients, by this package; the tensor product
also by e3nn. All orders are kept (Mmax = Lmax).

Prints seconds, peak memory and multiplications of an edge, and for each the exponent of Lmax that
fits the degrees from the middle one on best; appends JSON lines to ``<out>/lmax.jsonl`` and draws
``<out>/lmax.png``. Multiplications are counted from the sizes and do not depend on the machine.
Channels must be a multiple of 16. Example::

    python -m benchmarks.lmax --lmax 1 2 3 4 5 6 --channels 32
"""

from __future__ import annotations

import argparse
import json
import math
from collections import defaultdict
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any, NamedTuple

import matplotlib as mpl
import torch
from e3nn import o3
from rich.console import Console
from rich.table import Table

mpl.use("Agg")

import matplotlib.pyplot as plt

from benchmarks.compare import ROOT, environment
from benchmarks.e3nn_equiformer import linear as e3nn_linear
from benchmarks.e3nn_equiformer import product_module
from benchmarks.instruments import CpuMeter, timed
from benchmarks.measure import batch_of
from benchmarks.slab import SEED
from fairchem_equiformer.graph.build import GraphConfig, build_graph
from fairchem_equiformer.graph.edges import prepare_edges
from fairchem_equiformer.nn.irreps.linear import IrrepsLinear
from fairchem_equiformer.nn.so2_linear import SO2Convolution
from fairchem_equiformer.ops.aggregate import aggregate
from fairchem_equiformer.ops.depthwise_tensor_product import (
    Ends,
    depthwise_tensor_product,
    from_channels_last,
    to_channels_last,
)
from fairchem_equiformer.ops.edges import chunk_frames, fitting_edges
from fairchem_equiformer.ops.message import message
from fairchem_equiformer.ops.segments import segment_sum, target_chunks
from fairchem_equiformer.ops.so2_linear import SO2Weights, so2_linear
from fairchem_equiformer.so3.depthwise import DepthwisePaths, depthwise_paths
from fairchem_equiformer.so3.harmonics import harmonics
from fairchem_equiformer.so3.layout import layout

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor

    from fairchem_equiformer.graph.edge_graph import EdgeGraph

DTYPE = torch.float32
CUTOFF = 5.0  # Angstrom
E3NN, V1, V2 = "V1 by e3nn", "V1", "V2"
FIGURES = {
    "seconds": "time of a call / s",
    "peak_bytes": "peak memory / B",
    "multiplications": "multiplications of an edge",
}

Record = dict[str, Any]


class Convolution(NamedTuple):
    """One convolution of given degrees, and what it multiplies for each edge."""

    call: Callable[[], Tensor]
    multiplications: int


def slab_graph(atoms: int) -> EdgeGraph:
    """Return the edges of the slab that the other benchmarks use."""
    return build_graph(batch_of(atoms, 1), GraphConfig(max_radius=CUTOFF, max_neighbors=500))


def tensor_product(graph: EdgeGraph, lmax: int, channels: int, *, by_e3nn: bool) -> Convolution:
    """Return V1's: depth-wise tensor product, linear layer, sum over the edges of an atom."""
    sh = o3.Irreps([(1, (degree, 1)) for degree in range(lmax + 1)])
    irreps = o3.Irreps([(channels * mul, ir) for mul, ir in sh])
    paths = depthwise_paths(irreps, sh, irreps)
    linear = IrrepsLinear(paths.irreps_out, irreps, bias=False)
    edge_harmonics = harmonics(graph.vector, lmax).to(DTYPE)
    weights = torch.randn(graph.num_edges, paths.weight_numel)
    x = torch.randn(graph.num_nodes, irreps.dim)

    if by_e3nn:
        product = product_module(paths, shared=False)
        rows = from_channels_last(x, irreps)

        def call() -> Tensor:
            sent = rows[graph.source] + rows[graph.target]
            made = e3nn_linear(linear, product(sent, edge_harmonics, weights))
            out = segment_sum(made, graph.target, graph.num_nodes)
            return to_channels_last(out, irreps)
    else:
        most = fitting_edges(paths.irreps_out.dim, DTYPE, x.device)
        chunks = target_chunks(graph.target_ptr, most)

        def call() -> Tensor:
            out = torch.empty_like(x)
            for chunk in chunks:
                part = chunk.edges
                ends = Ends(x, x, graph.source[part], graph.target[part])
                made = depthwise_tensor_product(
                    ends, edge_harmonics[part], weights[part], paths, channels_last=True
                )
                target = graph.target[part] - chunk.rows.start
                num_rows = chunk.rows.stop - chunk.rows.start
                out[chunk.rows] = segment_sum(linear(made), target, num_rows)
            return out

    return Convolution(call, multiplications_v1(paths, irreps, by_e3nn=by_e3nn))


def multiplications_v1(paths: DepthwisePaths, irreps: o3.Irreps, *, by_e3nn: bool) -> int:
    """Count those of an edge; e3nn's generated code contracts all three irreps for each channel."""
    total = 0
    for path in paths.paths:
        mul, ir = paths.irreps_in[path.feature]
        sizes = ir.dim * paths.irreps_out[path.out].ir.dim
        harmonic = paths.irreps_sh[path.harmonic].ir.dim
        total += sizes * harmonic * mul if by_e3nn else sizes * (harmonic + mul)
        total += mul * paths.irreps_out[path.out].ir.dim  # the weights
    mixed = zip(paths.irreps_out, irreps, strict=True)
    return total + sum(mul * ir.dim * mul_out for (mul, ir), (mul_out, _) in mixed)


def so2_convolution(graph: EdgeGraph, lmax: int, channels: int) -> Convolution:
    """Return V2's: turn both ends into the edge's frame, SO(2) linear layer, turn back, sum."""
    sizes = layout(lmax, lmax)
    edges = prepare_edges(graph, sizes, channels, DTYPE)
    matrices, bias = SO2Convolution(sizes, 2 * channels, channels).weights()
    prepared, offset = SO2Weights.of([m.detach() for m in matrices], DTYPE), bias.detach()
    pairs = sum(sizes.num_degrees(m) for m in range(lmax + 1))
    radial = torch.randn(graph.num_edges, pairs, 2 * channels)
    x = torch.randn(graph.num_nodes, sizes.num_coefficients, channels)

    def call() -> Tensor:
        out = torch.empty_like(x)
        for chunk in edges.chunks:
            frames = chunk_frames(edges, chunk)
            scaled, _ = message(x, frames, radial[chunk.edges], sizes, by_degree=False)
            values = so2_linear(scaled.flatten(1), prepared, offset)
            values = values.view(len(values), sizes.num_rows, 1, channels)
            alpha = values.new_ones(len(values), 1)
            out[chunk.rows] = aggregate(values, alpha, frames, sizes)
        return out

    return Convolution(call, multiplications_v2(lmax, channels))


def multiplications_v2(lmax: int, channels: int) -> int:
    """Count those of an edge; of each order m > 0 three real products make the complex one."""
    turned = sum((2 * degree + 1) ** 2 for degree in range(lmax + 1))
    scaled = 2 * channels * (lmax + 1) ** 2
    orders = [(1 if m == 0 else 3) * (lmax + 1 - m) ** 2 for m in range(lmax + 1)]
    return 3 * turned * channels + scaled + sum(orders) * 2 * channels * channels


def convolutions(
    graph: EdgeGraph, lmax: int, channels: int, highest_of_e3nn: int
) -> dict[str, Convolution]:
    """Return all that are measured at one Lmax, by name."""
    torch.manual_seed(SEED)
    found = {
        V1: tensor_product(graph, lmax, channels, by_e3nn=False),
        V2: so2_convolution(graph, lmax, channels),
    }
    if lmax <= highest_of_e3nn:
        torch.manual_seed(SEED)
        found[E3NN] = tensor_product(graph, lmax, channels, by_e3nn=True)
    return found


def measure(convolution: Convolution, seconds: float) -> Record:
    """Return the figures of one convolution; its first call warms up."""
    meter = CpuMeter()
    with torch.no_grad():
        convolution.call()
        before = meter.allocated()
        meter.reset_peak()
        times, _ = timed(convolution.call, seconds, meter)
    peak = max(meter.peak() - before, 1)
    return {
        "seconds": median(times),
        "peak_bytes": peak,
        "multiplications": convolution.multiplications,
    }


def exponent(by_lmax: dict[int, float]) -> float:
    """Return the power of Lmax that fits best (least squares), from the middle degree on."""
    chosen = sorted(by_lmax)[(len(by_lmax) - 1) // 2 :]
    if len(chosen) < 2:
        return math.nan
    x = torch.tensor([math.log(degree) for degree in chosen])
    y = torch.tensor([math.log(by_lmax[degree]) for degree in chosen])
    x, y = x - x.mean(), y - y.mean()
    return ((x * y).sum() / x.square().sum()).item()


def curves(records: Sequence[Record], figure: str) -> dict[str, dict[int, float]]:
    """Return one figure of each convolution by Lmax."""
    found: dict[str, dict[int, float]] = defaultdict(dict)
    for record in records:
        found[record["convolution"]][record["lmax"]] = record[figure]
    return dict(found)


def table(records: Sequence[Record]) -> Table:
    """Return all figures, and below them the exponents."""
    result = Table(title="One convolution against Lmax")
    result.add_column("Lmax")
    result.add_column("convolution")
    for title in FIGURES.values():
        result.add_column(title, justify="right")
    for record in records:
        figures = (f"{record[figure]:.3g}" for figure in FIGURES)
        result.add_row(str(record["lmax"]), record["convolution"], *figures)
    result.add_section()
    for name in curves(records, "seconds"):
        powers = (f"{exponent(curves(records, figure)[name]):.1f}" for figure in FIGURES)
        result.add_row("power", name, *powers)
    return result


def draw(records: Sequence[Record], picture: Path) -> Path:
    """Draw every figure against Lmax, with the fitted exponents."""
    figure, axes = plt.subplots(1, len(FIGURES), figsize=(13, 4.2), layout="constrained")
    for axis, (key, title) in zip(axes, FIGURES.items(), strict=True):
        for name, by_lmax in curves(records, key).items():
            degrees = sorted(by_lmax)
            label = f"{name}: power {exponent(by_lmax):.1f}"
            axis.plot(degrees, [by_lmax[degree] for degree in degrees], marker="o", label=label)
        axis.set(xscale="log", yscale="log", xlabel="Lmax", title=title)
        axis.grid(visible=True, which="both", alpha=0.2)
        axis.legend()
    partial = picture.with_stem(f".{picture.stem}")
    figure.savefig(partial, dpi=150)
    plt.close(figure)
    partial.rename(picture)
    return picture


def main(arguments: Sequence[str] | None = None) -> list[Record]:
    """Measure, print, write and draw; return the lines written."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.lmax",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--lmax", nargs="+", type=int, default=[1, 2, 3, 4, 5, 6])
    add("--e3nn-lmax", type=int, default=5, help="highest degree by e3nn")
    add("--channels", type=int, default=32)
    add("--atoms", type=int, default=45, help="of the slab whose edges are taken")
    add("--threads", type=int, default=2)
    add("--seconds", type=float, default=2.0, help="least time to repeat each call for")
    add("--out", type=Path, default=ROOT / "benchmarks/runs")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    options.out.mkdir(parents=True, exist_ok=True)
    options.device = "cpu"
    about = environment(options)
    graph = slab_graph(options.atoms)
    records = []
    for lmax in options.lmax:
        found = convolutions(graph, lmax, options.channels, options.e3nn_lmax)
        for name, convolution in found.items():
            sizes = {"lmax": lmax, "channels": options.channels, "edges": graph.num_edges}
            record = {"convolution": name, **sizes, **measure(convolution, options.seconds)}
            records.append(record | about)
    with (options.out / "lmax.jsonl").open("a") as file:
        file.writelines(json.dumps(record) + "\n" for record in records)
    Console(width=120).print(table(records))
    print(f"picture: {draw(records, options.out / 'lmax.png')}")
    return records


if __name__ == "__main__":
    main()
