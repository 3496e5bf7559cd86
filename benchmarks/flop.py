"""FLOPs of matrix products: those of PyTorch, and those that our kernels make."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from benchmarks.boundaries import Boundary, wrapped

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

# torch's table leaves out the product that is added in place.
FLOP = {**flop_registry, torch.ops.aten.addmm_: flop_registry[torch.ops.aten.addmm]}


class CountFlop(TorchDispatchMode):
    """Add up the FLOPs of matrix products in ``flop``, and the calls in ``products``.

    torch's FlopCounterMode does so module by module, and for that ties the graph of a forward pass
    that no backward follows into a cycle, which is never freed: the next call's peak would hold it.
    """

    def __init__(self) -> None:
        super().__init__()
        self.flop = 0
        self.products = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # noqa: ANN001, ANN204
        """Run one operation, and count it if torch knows what it costs."""
        result = func(*args, **(kwargs or {}))
        count = FLOP.get(func.overloadpacket)
        if count is not None:
            self.add(count(*args, **(kwargs or {}), out_val=result))
        return result

    def add(self, flop: int) -> None:
        """Count one call."""
        self.flop += flop
        self.products += 1


# Functions by which our kernels make products, and the FLOPs of a call by its arguments.
KERNELS: dict[Boundary, Callable[..., int]] = {
    Boundary("ops.native.matrix_products:MatrixProducts", "run"): lambda products: products.flop,
    Boundary("ops.native.s2_grid:GridKernels", "mlp"): lambda kernels, x, weight: (
        2 * len(x) * kernels.shape[0] * weight.k * weight.n
    ),
}


@contextmanager
def counted_flop() -> Iterator[CountFlop]:
    """Count all products within; our own, which no operation of PyTorch makes, where they run."""

    def also(boundary: Boundary, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **keywords: Any) -> Any:
            counter.add(KERNELS[boundary](*arguments))
            return function(*arguments, **keywords)

        return call

    with wrapped(list(KERNELS), also), CountFlop() as counter:
        yield counter
