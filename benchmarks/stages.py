"""One profile, in a process of its own: ``python -m benchmarks.stages SPEC.json``.

:mod:`benchmarks.profile` starts it. The functions that make up a stage are wrapped from outside;
what is spent within one of them, and within no other below it, is the stage's. Kernels that would
wait for others, to run in one parallel region, run by themselves for the times, FLOPs and bytes; as
parallel regions those of one region count once, as the stage :data:`TOGETHER`.
"""

from __future__ import annotations

import math
import time
from collections import defaultdict
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from benchmarks import regions
from benchmarks.boundaries import Boundary, wrapped
from benchmarks.flop import counted_flop
from benchmarks.instruments import copy_rate, gemm_rate, meter_of, run
from benchmarks.measure import TASKS
from fairchem_equiformer.ops.edges import ChunkFrames
from fairchem_equiformer.ops.message import Message

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from benchmarks.spec import Spec

REST = "rest"
TOGETHER = "kernels together"  # that run in one parallel region
SO2 = "SO(2) layer"  # and which of the two

# Functions of each stage, (owner, name), in the order of the table.
STAGES: dict[str, list[tuple[str, str]]] = {
    "graph": [("models.backbone", "build_graph"), ("models.backbone", "prepare_edges")],
    "edge-degree embedding": [("ops.edge_degree", "_forward"), ("ops.edge_degree", "_backward")],
    "norms": [("ops.norm", "_normalized"), ("ops.norm:_KeepInput", "backward")],
    "weights of the edges": [("ops.edge_attention:PreparedWeights", "of")],
    "radial function": [
        ("ops.edge_attention", "radial_function"),
        ("ops.edge_degree", "radial_function"),
        ("ops.radial:RadialGradient", "evaluate"),
        ("ops.radial:RadialGradient", "add"),
        ("ops.radial:RadialGradient", "add_by_autograd"),
        ("ops.radial:RadialGradient", "total"),
    ],
    "message": [("ops.edge_attention", "message"), ("ops.edge_attention", "message_backward")],
    SO2: [
        ("ops.edge_attention", "so2_linear"),
        ("ops.edge_attention", "so2_linear_backward"),
        ("ops.edge_attention:_Backward", "_linear"),
    ],
    "activation": [
        ("ops.edge_attention", "activate"),
        ("ops.edge_attention:_ActivationKernels", "forward"),
        ("ops.edge_attention:_ActivationKernels", "backward"),
        ("ops.s2_activation", "_forward"),
        ("ops.s2_activation", "_backward"),
        ("ops.gate", "_gated"),
    ],
    "logits, softmax": [
        ("ops.edge_attention", "attention_logits"),
        ("ops.attention_softmax:_AttentionLogits", "backward"),
        ("ops.native.attention_softmax:LogitKernels", "forward"),
        ("ops.native.attention_softmax:LogitKernels", "add_backward"),
        ("ops.edge_attention", "attention_softmax"),
        ("ops.edge_attention", "attention_softmax_backward"),
    ],
    "aggregation": [
        ("ops.edge_attention", "aggregate"),
        ("ops.edge_attention", "aggregate_backward"),
    ],
    "linear layers of atoms": [("ops.so3_linear", "_forward"), ("ops.so3_linear", "_backward")],
    "grid MLP": [("ops.grid_mlp", "_forward"), ("ops.grid_mlp", "_backward")],
    TOGETHER: [("ops.native.together", "flush")],
    "heads": [("models.equiformer_v2", "sum_energy"), ("models.equiformer_v2", "forces")],
}
# Stages that wait for memory more than for arithmetic: their floor is that of a copy.
BY_BYTES = {"norms", "message", "activation", "logits, softmax", "aggregation"}
# Arguments that hold the features of all atoms, of which one chunk's edges read some.
OF_ALL_ATOMS = {
    Boundary("ops.edge_attention", "message"): {0},
    Boundary("ops.edge_attention", "message_backward"): {2, 3},
}
WAITING = Boundary("ops.native.loader", "deferred")  # that kernels wait within
STAGE_OF = {Boundary(*function): name for name, found in STAGES.items() for function in found}


class Ledger:
    """What each stage took, by a clock: seconds, FLOPs or anything else that only grows."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self.spent: defaultdict[str, float] = defaultdict(float)
        self.calls: defaultdict[str, int] = defaultdict(int)
        self.bytes: defaultdict[str, int] = defaultdict(int)
        self._clock = clock
        self._open = [REST]
        self._since = clock()

    def begin(self, stage: str) -> None:
        """What follows is of this stage."""
        self._book()
        self._open.append(stage)

    def end(self) -> bool:
        """What follows is of the stage around; return whether that is another one."""
        self._book()
        stage = self._open.pop()
        outermost = stage not in self._open
        self.calls[stage] += outermost
        return outermost

    def close(self) -> None:
        """Book what came last."""
        self._book()

    def _book(self) -> None:
        now = self._clock()
        self.spent[self._open[-1]] += now - self._since
        self._since = now


class SO2Layers:
    """Which of an attention layer's two SO(2) layers some weights belong to."""

    MADE = Boundary("ops.edge_attention:_Convolutions", "of")

    def __init__(self) -> None:
        self._known: dict[int, str] = {}
        self._alive: list[Any] = []  # so that no address comes again

    def watch(self, _: Boundary, make: Callable[..., Any]) -> Callable[..., Any]:
        """Wrap what makes the weights."""

        def watched(*arguments: Any, **keywords: Any) -> Any:
            made = make(*arguments, **keywords)
            self._alive.append(made)
            self._known |= {id(made.first): "1", id(made.second): "2"}
            return made

        return watched

    def of(self, arguments: Sequence[Any]) -> str:
        """Return "1" or "2" by the weights among the arguments; "" for unknown ones."""
        return next((self._known[id(a)] for a in arguments if id(a) in self._known), "")


@contextmanager
def staged(
    clock: Callable[[], float], *, sizes: bool = False, apart: bool = True
) -> Iterator[Ledger]:
    """Give a ledger of what is done within.

    Args:
        clock: of what is booked.
        sizes: also of the bytes of tensors.
        apart: no kernel waits for others, so that each is booked for its stage.
    """
    waiting = [WAITING] if apart else []
    layers, ledger = SO2Layers(), Ledger(clock)

    def wrap(boundary: Boundary, function: Callable[..., Any]) -> Callable[..., Any]:
        name = STAGE_OF[boundary]
        skipped = OF_ALL_ATOMS.get(boundary, set())

        def call(*arguments: Any, **keywords: Any) -> Any:
            stage = f"{SO2} {layers.of(arguments)}" if name == SO2 else name
            ledger.begin(stage)
            try:
                result = function(*arguments, **keywords)
            finally:
                outermost = ledger.end()
            if sizes and outermost and stage in BY_BYTES:
                read = [value for i, value in enumerate(arguments) if i not in skipped]
                ledger.bytes[stage] += bytes_of((*read, result))
            return result

        return call

    with (
        wrapped(waiting, lambda *_: nullcontext),
        wrapped([layers.MADE], layers.watch),
        wrapped(list(STAGE_OF), wrap),
    ):
        yield ledger
        ledger.close()


def bytes_of(values: Any) -> int:
    """Return the bytes of all tensors that a function took and gave, each once."""
    found: dict[int, int] = {}

    def look(value: Any) -> None:
        if isinstance(value, Tensor):
            found[value.data_ptr()] = value.nbytes
        elif type(value) in (tuple, list):
            for part in value:
                look(part)
        elif isinstance(value, Message):
            look([value.radial, value.frames])
        elif isinstance(value, ChunkFrames):
            look(value.compact)

    look(values)
    return sum(found.values())


def profile(spec: Spec) -> dict[str, Any]:
    """Return the fastest of several steps by stage, and what such a step counts."""
    torch.set_num_threads(spec.threads)
    rates = {
        "gemm_flop_per_second": gemm_rate(spec.device, meter_of(spec.device)),
        "copy_bytes_per_second": copy_rate(),
    }
    work = TASKS[spec.task](spec)

    def step() -> None:
        work.finish(work.forward())

    with counted_flop() as counter, staged(lambda: counter.flop, sizes=True) as counts:
        step()
    called = None
    if regions.counted() is not None:
        with staged(regions.counted, apart=False) as called:
            step()
    timed = fastest(step, spec.seconds)
    return rates | {
        "stages": {
            name: {
                "seconds": timed.spent[name],
                "calls": timed.calls[name],
                "flop": counts.spent[name],
                "bytes": counts.bytes[name],
                "regions": called and called.spent[name],
            }
            for name in (*ordered(timed), *([TOGETHER] if called else []), REST)
        }
    }


def fastest(step: Callable[[], None], seconds: float) -> Ledger:
    """Return the ledger of the fastest step of those that fit the time, at least one."""
    best, took, passed = None, math.inf, 0.0
    while passed < seconds or best is None:
        with staged(time.perf_counter) as ledger:
            step()
        total = sum(ledger.spent.values())
        passed += total
        if total < took:
            best, took = ledger, total
    return best


def ordered(ledger: Ledger) -> list[str]:
    """Return the stages that were called, in the order of :data:`STAGES`."""
    stages = [name for name in STAGES if name != TOGETHER]
    names = [n for name in stages for n in ([f"{SO2} 1", f"{SO2} 2"] if name == SO2 else [name])]
    return [name for name in names if ledger.calls[name]]


if __name__ == "__main__":
    run(profile)
