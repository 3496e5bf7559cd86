"""A model of time: what one edge of one block costs at least, stage by stage, on three GPUs.

A stage takes no less than its floating-point operations at the card's rate, its bytes at the card's
bandwidth, or its evaluations of SiLU at the rate of the units that make exponentials and inverses,
whichever is the most. Bytes are those of the tensors that a stage reads and writes in device
memory, each once. Rates are those of the vendor's data sheets. So all figures are bounds that no
run can beat, not predictions; they do not know caches, launches or occupancy.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from rich.table import Table

from benchmarks.sizes import Sizes

FLOAT = 4  # bytes
NEIGHBORS = 20  # edges of an atom
RADIAL_HIDDEN = 128
GAUSSIANS = 600


@dataclass(frozen=True)
class Card:
    """Rates of a GPU, per second."""

    name: str
    vector: float  # FLOP in fp32, without tensor cores
    matrix: float  # FLOP in fp32 operands, with them where the card has TF32
    low: float  # FLOP in fp16 or bf16 operands
    bandwidth: float  # bytes
    special: float  # exponentials or inverses: 16 for each clock and multiprocessor


CARDS = (
    Card("V100", 15.7e12, 15.7e12, 125e12, 0.90e12, 80 * 16 * 1.53e9),
    Card("A100", 19.5e12, 156e12, 312e12, 2.04e12, 108 * 16 * 1.41e9),
    Card("H200", 67e12, 494e12, 989e12, 4.8e12, 132 * 16 * 1.98e9),
)


@dataclass(frozen=True)
class Stage:
    """Of an edge and block, forward."""

    name: str
    flop: float  # of matrix products
    vector: float  # FLOP beside them
    floats: float  # read and written in device memory
    silu: float = 0  # evaluations

    def seconds(self, card: Card, *, tensor_cores: bool) -> float:
        """No run takes less."""
        rate = card.matrix if tensor_cores else card.vector
        arithmetic = self.flop / rate + self.vector / card.vector
        memory = self.floats * FLOAT / card.bandwidth
        return max(arithmetic, memory, 2 * self.silu / card.special)


class _Counts:
    """Numbers of an edge that several stages share."""

    def __init__(self, sizes: Sizes) -> None:
        self.sizes = sizes
        edge = sizes.layout
        self.rows, self.coefficients = edge.num_rows, edge.num_coefficients
        self.message = self.rows * 2 * sizes.channels
        self.radial = sizes.weights * 2 * sizes.channels
        self.scalars = sizes.heads * sizes.alpha_channels
        self.features = self.rows * sizes.hidden
        self.first = self.features + self.scalars + sizes.hidden  # layer 1's output
        self.values = self.rows * sizes.heads * sizes.value_channels
        self.points = sizes.resolution**2

    @cached_property
    def radial_flop(self) -> float:
        hidden = RADIAL_HIDDEN
        return 2 * hidden * (GAUSSIANS + hidden + self.radial)

    def so2_flop(self, width_in: int, width_out: int, extra: int, products: int) -> float:
        """Of an SO(2) layer: one product for m = 0, ``products`` for each other order."""
        edge = self.sizes.layout
        zero = edge.num_degrees(0)
        flop = 2.0 * zero * width_in * (zero * width_out + extra)
        for m in range(1, edge.mmax + 1):
            flop += products * 2.0 * edge.num_degrees(m) ** 2 * width_in * width_out
        return flop

    def so2_passes(self, x: int, y: int) -> float:
        """Floats of a layer with three products: orders m > 0 are read and written more often."""
        edge = self.sizes.layout
        share = 1 - edge.num_degrees(0) / edge.num_rows
        # For m > 0: a sum of the inputs is written and read, inputs are read twice more, and the
        # results are copied once and added to once.
        return x * (1 + share * 2.0) + y * (1 + share * 2.0)


def ours(sizes: Sizes, *, tensor_cores: bool) -> list[Stage]:
    """Stages as this package runs them on a GPU; its SO(2) layers are others with tensor cores."""
    n = _Counts(sizes)
    products = 4 if tensor_cores else 3

    def so2_floats(x: int, y: int) -> float:
        return x + y if tensor_cores else n.so2_passes(x, y)

    width, hidden, heads = 2 * sizes.channels, sizes.hidden, sizes.heads
    values = heads * sizes.value_channels
    extra = n.scalars + hidden
    to_grid = 2.0 * n.points * hidden * (n.rows + n.rows - 1)
    return [
        Stage("radial function", n.radial_flop, 0, 2 * GAUSSIANS + 10 * RADIAL_HIDDEN + n.radial),
        Stage(
            "message (Triton)",
            0,
            4.0 * sizes.entries * sizes.channels,
            (1 + 1 / NEIGHBORS) * n.coefficients * sizes.channels
            + sizes.entries
            + n.radial
            + n.message,
        ),
        Stage(
            "SO(2) layer 1",
            n.so2_flop(width, hidden, extra, products),
            0,
            so2_floats(n.message, n.first),
        ),
        Stage("logits, softmax (Triton)", 0, 12.0 * n.scalars, n.scalars + 4 * heads, n.scalars),
        Stage("S2 activation (Triton)", to_grid, 0, 2 * n.features + hidden, n.points * hidden),
        Stage(
            "SO(2) layer 2",
            n.so2_flop(hidden, values, 0, products),
            0,
            so2_floats(n.features, n.values),
        ),
        Stage(
            "weight, turn back, sum (Triton)",
            0,
            2.0 * sizes.entries * values,
            n.values + sizes.entries + heads + n.coefficients * values / NEIGHBORS,
        ),
    ]


def stock(sizes: Sizes) -> list[Stage]:
    """The same in fairchem-core 1.10, by the tensors that its source makes."""
    n = _Counts(sizes)
    width, hidden, heads = 2 * sizes.channels, sizes.hidden, sizes.heads
    values = heads * sizes.value_channels
    ends = n.coefficients * width
    dense = n.rows * n.coefficients
    extra = n.scalars + hidden
    full_radial = 2 * RADIAL_HIDDEN * (GAUSSIANS + width + RADIAL_HIDDEN + n.radial)
    samples = n.points * hidden
    back = n.coefficients * values
    return [
        # Gaussians and embeddings side by side; three layers with norms and SiLU between.
        Stage("radial function", full_radial, 0, 3 * (GAUSSIANS + width) + 12 * 128 + n.radial),
        Stage("gather both ends, join them", 0, 0, 2 * ends + 2 * ends),
        Stage("cut rotations, turn", 2.0 * dense * width, 0, 3 * dense + ends + n.message),
        Stage("order by m", 2.0 * n.rows * n.message, 0, 2 * n.message),
        Stage("copy orders, radial scale", 0, n.message, 4 * n.message + n.radial),
        Stage("SO(2) layer 1", n.so2_flop(width, hidden, extra, 4), 0, n.message + 2 * n.first),
        Stage("combine, join, order by l", 2.0 * n.rows * n.features, 0, 8 * n.features),
        Stage("logits, softmax", 0, 12.0 * n.scalars, 10 * n.scalars + 12 * heads, n.scalars),
        Stage(
            "S2 activation",
            2.0 * samples * 2 * n.rows,
            0,
            4 * samples + 5 * n.features,
            samples,
        ),
        Stage(
            "order by m, SO(2) layer 2",
            n.so2_flop(hidden, values, 0, 4) + 2.0 * n.rows * n.features,
            0,
            5 * n.features + 2 * n.values,
        ),
        Stage("combine, join, order by l", 2.0 * n.rows * n.values, 0, 8 * n.values),
        Stage("weight by attention", 0, n.values, 2 * n.values),
        Stage("rescale rotations, turn", 2.0 * dense * values, 0, 5 * dense + n.values + back),
        Stage("sum", 0, back, 2 * back + back / NEIGHBORS),
    ]


def table(sizes: Sizes) -> Table:
    """FLOPs, bytes and bounds of all stages, stock's and ours."""
    result = Table(
        title=f"{sizes.name}: least ns of one edge and block, forward: a bound, not measured",
        caption="fp32 | TF32, on cards that have it. Times measured on a GPU: none yet.",
    )
    result.add_column("stage")
    for heading in ("MFLOP", "kB", *(card.name for card in CARDS)):
        result.add_column(heading, justify="right")
    for title, vector, matrix in (
        ("stock", stock(sizes), stock(sizes)),
        ("ours", ours(sizes, tensor_cores=False), ours(sizes, tensor_cores=True)),
    ):
        result.add_section()
        for one, other in zip(vector, matrix, strict=True):
            result.add_row(f"{title}: {other.name}", *_figures([one], [other]))
        result.add_row(f"{title}: all", *_figures(vector, matrix))
    return result


def _figures(vector: list[Stage], matrix: list[Stage]) -> list[str]:
    """FLOPs and bytes with tensor cores, and bounds without and with them."""
    flop = sum(stage.flop + stage.vector for stage in matrix)
    kilobytes = sum(stage.floats for stage in matrix) * FLOAT / 1e3
    figures = [f"{flop / 1e6:.2f}", f"{kilobytes:.1f}"]
    for card in CARDS:
        without = 1e9 * sum(stage.seconds(card, tensor_cores=False) for stage in vector)
        by_cores = 1e9 * sum(stage.seconds(card, tensor_cores=True) for stage in matrix)
        has_none = card.matrix == card.vector
        figures.append(f"{without:.1f}" if has_none else f"{without:.1f} | {by_cores:.1f}")
    return figures
