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
    # Whether products of fp32 are made by three of TF32, with TF32 off too (Triton's are).
    in_parts: bool = False

    def seconds(self, card: Card, *, tensor_cores: bool) -> float:
        """No run takes less."""
        least = max(card.vector, card.matrix / 3) if self.in_parts else card.vector
        rate = card.matrix if tensor_cores else least
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
        # Of an atom, so of 20 edges: all coefficients and channels, and the grid MLP's.
        self.atom = self.coefficients * sizes.channels
        self.hidden = self.coefficients * sizes.ffn_hidden
        self.hidden_points = self.points * sizes.ffn_hidden

    def radial_stages(self, name: str, out: int, share: float = 1) -> list[Stage]:
        """Of a radial function of so many weights, or of a share of it.

        The first layer writes its result; then come norm and SiLU and a product, twice.
        """
        hidden = RADIAL_HIDDEN
        return [
            Stage(
                f"{name}, first layer (Triton)",
                2 * hidden * GAUSSIANS * share,
                0,
                hidden * share,
                GAUSSIANS / 2 * share,  # an exponential is half of a SiLU
                in_parts=True,
            ),
            Stage(
                f"{name}, the rest",
                2 * hidden * (hidden + out) * share,
                0,
                (7 * hidden + out) * share,
                2 * hidden * share,
            ),
        ]

    @cached_property
    def degrees_flop(self) -> float:
        """Of the edge-degree embedding's radial function."""
        hidden = RADIAL_HIDDEN
        return 2 * hidden * (GAUSSIANS + hidden + self.degrees)

    def so2_flop(self, width_in: int, width_out: int, extra: int, products: int) -> float:
        """Of an SO(2) layer: one product for m = 0, ``products`` for each other order."""
        edge = self.sizes.layout
        zero = edge.num_degrees(0)
        flop = 2.0 * zero * width_in * (zero * width_out + extra)
        for m in range(1, edge.mmax + 1):
            flop += products * 2.0 * edge.num_degrees(m) ** 2 * width_in * width_out
        return flop

    def grid_mlp_flop(self, layers: int) -> float:
        """Of an atom's feed-forward network: to the grid and back, and layers on its channels."""
        return 2.0 * self.hidden_points * (2 * self.coefficients + layers * self.sizes.ffn_hidden)

    @cached_property
    def so3_flop(self) -> float:
        """Of the projection behind the attention and the outer layers of the feed-forward."""
        sizes = self.sizes
        widths = sizes.heads * sizes.value_channels + 2 * sizes.ffn_hidden
        return 2.0 * self.atom * widths

    @cached_property
    def so3_floats(self) -> float:
        """What these three layers read and write."""
        values = self.coefficients * self.sizes.heads * self.sizes.value_channels
        return values + 3 * self.atom + 2 * self.hidden

    @cached_property
    def degrees(self) -> float:
        """Of an edge: what the edge-degree embedding's radial function gives."""
        return (self.sizes.lmax + 1) * self.sizes.channels

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
        *n.radial_stages("radial function", n.radial),
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
        Stage(
            "S2 activation (Triton)",
            to_grid,
            0,
            2 * n.features + hidden,
            n.points * hidden,
            in_parts=True,
        ),
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
        *_nodes(
            n,
            norms=("norms (Triton)", 4 * n.atom),
            layers=("SO(3) layers, sums", n.so3_floats + 6 * n.atom),
            mlp=("grid MLP (Triton)", 1, 2 * n.hidden),
        ),
        *n.radial_stages("edge-degree embedding, a share", n.degrees, 1 / sizes.blocks),
        Stage(
            "edge-degree embedding, a share, sum (Triton)",
            0,
            2.0 * (sizes.lmax + 1) ** 2 * sizes.channels / sizes.blocks,
            (n.degrees + sizes.entries + n.atom / NEIGHBORS) / sizes.blocks,
        ),
    ]


def _nodes(
    n: _Counts,
    *,
    norms: tuple[str, float],
    layers: tuple[str, float],
    mlp: tuple[str, int, float],
) -> list[Stage]:
    """What atoms take, shared among their edges.

    Args:
        n: counts.
        norms: name, and floats of the block's two.
        layers: name, and floats of the SO(3) layers and of the sums with what went in.
        mlp: name, layers on the grid, and floats.
    """
    name, hidden_layers, floats = mlp
    return [
        Stage(norms[0], 0, 16.0 * n.atom / NEIGHBORS, norms[1] / NEIGHBORS),
        Stage(layers[0], n.so3_flop / NEIGHBORS, 2.0 * n.atom / NEIGHBORS, layers[1] / NEIGHBORS),
        Stage(
            name,
            n.grid_mlp_flop(hidden_layers) / NEIGHBORS,
            0,
            floats / NEIGHBORS,
            2 * n.hidden_points / NEIGHBORS,
            in_parts=hidden_layers == 1,
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
        # Each norm squares, averages, scales twice and joins; each SO(3) layer spreads its weights.
        # The grid is written by every step of the perceptron, three layers and two SiLUs.
        *_nodes(
            n,
            norms=("norms", 20 * n.atom),
            layers=("SO(3) layers, sums", n.so3_floats + 6 * n.atom),
            mlp=("grid MLP", 3, 2 * n.hidden + 12 * n.hidden_points),
        ),
        Stage(
            "edge-degree embedding, a share",
            (n.degrees_flop + 2.0 * dense * sizes.channels) / sizes.blocks,
            0,
            (
                3 * (GAUSSIANS + width)
                + 12 * RADIAL_HIDDEN
                + 2 * n.degrees
                + 4 * n.rows * sizes.channels
                + 5 * dense
                + 4 * n.atom
            )
            / sizes.blocks,
        ),
    ]


def so2_table(sizes: Sizes) -> Table:
    """SO(2) layers by four products (one matrix per order) and by three: least ns of an edge."""
    result = Table(
        title=f"{sizes.name}: SO(2) layers by four products | by three: least ns of one edge",
        caption="A bound, not measured.",
    )
    result.add_column("layer, products in")
    for card in CARDS:
        result.add_column(card.name, justify="right")
    for name, widths in so2_layers(sizes).items():
        for kind in ("fp32", "TF32", "bf16"):
            figures = []
            for card in CARDS:
                if kind == "TF32" and card.matrix == card.vector:
                    figures.append("")
                    continue
                four, three = (so2_seconds(sizes, *widths, n, card, kind) for n in (4, 3))
                figures.append(f"{1e9 * four:.1f} | {1e9 * three:.1f}")
            result.add_row(f"{name}, {kind}", *figures)
    return result


def so2_layers(sizes: Sizes) -> dict[str, tuple[int, int, int]]:
    """Channels in and out, and scalars beside them, of the block's two SO(2) layers."""
    extra = sizes.heads * sizes.alpha_channels + sizes.hidden
    values = sizes.heads * sizes.value_channels
    return {
        "layer 1": (2 * sizes.channels, sizes.hidden, extra),
        "layer 2": (sizes.hidden, values, 0),
    }


def so2_seconds(
    sizes: Sizes, width_in: int, width_out: int, extra: int, products: int, card: Card, kind: str
) -> float:
    """Least time of an SO(2) layer by three or four products.

    Four are one product per order: each number is read or written once, while the arithmetic goes
    on. Three need passes of their own: a sum of the inputs and a copy of the results, and products
    that add to what is there.

    Args:
        sizes: of the model.
        width_in: channels.
        width_out: channels.
        extra: scalars beside them.
        products: 3 or 4.
        card: GPU.
        kind: "fp32", "TF32" or "bf16".
    """
    counts, edge = _Counts(sizes), sizes.layout
    rate = {"fp32": card.vector, "TF32": card.matrix, "bf16": card.low}[kind]
    size = 2 if kind == "bf16" else FLOAT
    x, y = edge.num_rows * width_in, edge.num_rows * width_out + extra
    beyond = edge.num_rows - edge.num_degrees(0)  # rows of orders m > 0
    again, passes = 0, 0
    if products == 3:
        again = beyond * (width_in / 2 + width_out)  # the sum is read, results are added to
        passes = beyond * (1.5 * width_in + width_out)  # the sum is made, a half is copied
    flop = counts.so2_flop(width_in, width_out, extra, products)
    made = max(flop / rate, (x + y + again) * size / card.bandwidth)
    return made + passes * size / card.bandwidth


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
