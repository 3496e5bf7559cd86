"""What the host does in a step besides the model's kernels: ``python -m benchmarks.host``.

On one thread of a CPU, best of many calls, in microseconds; a GPU adds the launches of what is
called here, and is not measured. Read the figures against each other: on a busy machine all grow.
"""

from __future__ import annotations

import argparse
import time
from typing import TYPE_CHECKING, Any
from unittest import mock

import torch

from benchmarks.gpu import Structures, keys_of
from fairchem_equiformer.models import EquiformerV2
from fairchem_equiformer.nn import replay
from fairchem_equiformer.nn.frozen import FrozenWeights
from fairchem_equiformer.ops.so3_linear import so3_linear

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from fairchem_equiformer.nn.replay import Results


def best(call: Callable[[], Any], repeat: int) -> float:
    """Microseconds of the fastest of many calls."""
    times = []
    for _ in range(repeat):
        start = time.perf_counter_ns()
        call()
        times.append(time.perf_counter_ns() - start)
    return min(times) / 1e3


def empty_graph(function: Callable[[], Results]) -> tuple[Callable[[], object], Results]:
    """A recorder whose graph does nothing: what is left is the host's work."""
    return (lambda: None), function()


def of_a_step(atoms: int, repeat: int) -> dict[str, float]:
    """Search and checks outside, against a recorded pass that holds them: of a small model."""
    keys = keys_of("tiny") | {"max_neighbors": 20, "max_radius": 12.0, "edges_per_chunk": 1 << 20}
    model, data, frozen = (
        EquiformerV2(**keys).eval(),
        Structures.of(1, atoms, "cpu"),
        FrozenWeights(),
    )
    times = {"search and checks outside a graph": best(lambda: model.read(data), repeat)}
    with mock.patch.dict(replay.RECORDERS, cpu=empty_graph), frozen.used_by(model):
        for _ in range(2):  # the second is recorded
            model(data)
        times["around a graph from positions on"] = best(lambda: model(data), repeat)
    return times


def of_weights(name: str, repeat: int) -> dict[str, float]:
    """What frozen weights of a published model cost at each step."""
    model, frozen = EquiformerV2(**keys_of(name)), FrozenWeights()

    def check() -> None:
        with frozen.used_by(model):
            pass

    return {f"asking whether the weights of {name} changed": best(check, repeat)}


def of_an_operation(repeat: int) -> dict[str, float]:
    """The smallest linear layer with a gradient, called directly and as an operation."""
    weight = torch.randn(1, 16, 16, requires_grad=True)
    x = torch.randn(4, 1, 16, requires_grad=True)

    def call() -> Any:
        return so3_linear(x, weight)

    times = {"a linear layer, called directly": best(call, repeat)}
    with mock.patch.object(torch.compiler, "is_compiling", return_value=True):
        times["a linear layer, registered"] = best(call, repeat)
    times["asking whether a compiler looks on"] = best(torch.compiler.is_compiling, repeat)
    return times


def main(arguments: Sequence[str] | None = None) -> dict[str, float]:
    """Run the command; return microseconds by what they are of."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="31M", help="default: %(default)s")
    parser.add_argument("--atoms", type=int, default=45, help="default: %(default)s")
    parser.add_argument("--repeat", type=int, default=200, help="default: %(default)s")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    with torch.no_grad():
        times = of_a_step(options.atoms, options.repeat)
    times |= of_weights(options.model, options.repeat)
    times |= of_an_operation(options.repeat)
    for name, microseconds in times.items():
        print(f"{microseconds:9.2f} us  {name}")
    return times


if __name__ == "__main__":
    main()
