"""FLOPs of matrix products: those of PyTorch, and those that our kernels make."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from benchmarks.boundaries import Boundary, SO2Layers, wrapped

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

# torch's table leaves out the product that is added in place.
FLOP = {**flop_registry, torch.ops.aten.addmm_: flop_registry[torch.ops.aten.addmm]}


class CountFlop(TorchDispatchMode):
    """Add up the FLOPs of matrix products in ``flop``.

    torch's FlopCounterMode does so module by module, and for that ties the graph of a forward pass
    that no backward follows into a cycle, which is never freed: the next call's peak would hold it.
    """

    def __init__(self) -> None:
        super().__init__()
        self.flop = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # noqa: ANN001, ANN204
        """Run one operation, and count it if torch knows what it costs."""
        result = func(*args, **(kwargs or {}))
        count = FLOP.get(func.overloadpacket)
        if count is not None:
            self.flop += count(*args, **(kwargs or {}), out_val=result)
        return result


def _radial(_: Any, arguments: tuple[Any, ...]) -> int:
    """Two products of (edges, tables, basis) for each edge."""
    scalars, tables = arguments[:2]
    return 2 * len(scalars.distance) * (tables.weight_2.numel() + tables.weight_3.numel())


def _radial_backward(_: Any, arguments: tuple[Any, ...]) -> int:
    """Of (self, radial, grad): as many for the inputs' gradients, and for the weights'."""
    gradient, radial = arguments[:2]
    tables = gradient.tables
    return 4 * len(radial) * (tables.weight_2.numel() + tables.weight_3.numel())


def _so2(layers: SO2Layers, arguments: tuple[Any, ...]) -> int:
    """Of (x, weights, bias)."""
    return 2 * len(arguments[0]) * layers.of(arguments)[1]


def _so2_backward(layers: SO2Layers, arguments: tuple[Any, ...]) -> int:
    """Of (grad, x, weights, weight_grads)."""
    return 2 * _so2(layers, arguments)


# Whose products a kernel may make: the least FLOPs of a call, by its arguments.
LEAST: dict[Boundary, Callable[[SO2Layers, tuple[Any, ...]], int]] = {
    Boundary("ops.edge_attention", "radial_function"): _radial,
    Boundary("ops.edge_degree", "radial_function"): _radial,
    Boundary("ops.radial:RadialGradient", "add"): _radial_backward,
    Boundary("ops.edge_attention", "so2_linear"): _so2,
    Boundary("ops.edge_attention", "so2_linear_backward"): _so2_backward,
}


@contextmanager
def counted_flop() -> Iterator[CountFlop]:
    """Count all products within: where PyTorch made fewer than :data:`LEAST`, kernels made them."""
    layers = SO2Layers()

    def at_least(boundary: Boundary, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **keywords: Any) -> Any:
            before = counter.flop
            result = function(*arguments, **keywords)
            least = LEAST[boundary](layers, arguments)
            counter.flop = max(counter.flop, before + least)
            return result

        return call

    with layers.watched(), wrapped(list(LEAST), at_least), CountFlop() as counter:
        yield counter
