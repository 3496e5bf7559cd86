"""Messages along edges (message.cpp)."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

import torch
from torch import Tensor

from fairchem_equiformer.ops.native.loader import fits, usable
from fairchem_equiformer.ops.native.rows import Rows, rows
from fairchem_equiformer.ops.native.together import dense
from fairchem_equiformer.so3.layout import Layout


@dataclass(frozen=True)
class MessageKernels:
    """The message of both ends of each edge (message.cpp)."""

    kernels: ctypes.CDLL
    rows: Rows

    def forward(
        self, x: Tensor, rotations: Tensor, source: Tensor, target: Tensor, radial: Tensor
    ) -> Tensor:
        """w * D (x_source, x_target).

        Args:
            x: [N, K, C].
            rotations: [e, n], compact (so3/wigner.py).
            source, target: [e], atoms.
            radial: [e, W, 2 C].

        Returns:
            [e, R, 2 C].
        """
        x, rotations, radial = dense(x), dense(rotations), dense(radial)
        out = x.new_empty(len(source), self.rows.struct.rows, 2 * x.shape[2])
        self.kernels.edge_message(
            self.rows.struct,
            rotations,
            x,
            source,
            target,
            x.shape[2],
            radial,
            out,
            len(source),
            torch.get_num_threads(),
        )
        return out

    def backward(
        self,
        grad: Tensor,
        x: Tensor,
        rotations: Tensor,
        source: Tensor,
        target: Tensor,
        radial: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Gradient of :meth:`forward`.

        Returns:
            Of the radial weights [e, W, 2 C], and each edge's part of that of the features of its
            source and of its target, [e, K, C] both.
        """
        x, rotations, radial = dense(x), dense(rotations), dense(radial)
        grad = dense(grad)
        radial_grad = torch.empty_like(radial)
        source_grad = x.new_empty(len(source), *x.shape[1:])
        target_grad = torch.empty_like(source_grad)
        self.kernels.edge_message_backward(
            self.rows.struct,
            rotations,
            x,
            source,
            target,
            x.shape[2],
            radial,
            grad,
            radial_grad,
            source_grad,
            target_grad,
            len(source),
            torch.get_num_threads(),
        )
        return radial_grad, source_grad, target_grad


def message_kernels(
    x: Tensor, radial: Tensor, layout: Layout, *, by_degree: bool
) -> MessageKernels | None:
    """Kernels for such features and edges; None where the reference has to run."""
    kernels = usable(x, radial)
    if kernels is None:
        return None
    found = rows(layout, layout, by_degree=by_degree)
    channels = x.shape[2]
    fit = fits("messages", channels, kernels.message_misfit(found.struct, channels))
    return MessageKernels(kernels, found) if fit else None
