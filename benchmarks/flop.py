"""FLOPs of matrix products: those of PyTorch, and those that our kernel makes."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from fairchem_equiformer.ops.native import MatrixProducts

if TYPE_CHECKING:
    from collections.abc import Iterator

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


@contextmanager
def counted_flop() -> Iterator[CountFlop]:
    """Count all products within; our own, which no operation of PyTorch makes, where they run."""
    run = MatrixProducts.run

    def counted(products: MatrixProducts) -> None:
        counter.flop += products.flop
        run(products)

    with mock.patch.object(MatrixProducts, "run", counted), CountFlop() as counter:
        yield counter
