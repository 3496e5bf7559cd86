"""A function of edges that is summed over each target atom, computed chunk by chunk.

Nothing that the function makes exists for more than one chunk of edges at a time, neither in the
forward pass nor in the backward pass, which calls the function again. Its arguments are kept, and
what it asks for: what would cost the most to make again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fairchem_equiformer.ops.segments import Chunk, add_rows


class Part(NamedTuple):
    """What the function sees: the edges to some consecutive targets."""

    sources: Tensor  # [N, ...], features of atoms
    source: Tensor | None  # [e], rows of ``sources``; None where they stand edge by edge
    target: Tensor  # [e], row of each edge's target among ``rows``, ascending
    edges: tuple[Tensor, ...]  # [e, ...]
    rows: tuple[Tensor, ...]  # [n, ...], of the targets
    num_rows: int  # n
    # Where the function puts what it made, to find it here when the backward pass calls it again on
    # the same edges. None where it will not be called again.
    kept: list[Tensor] | None = None


@dataclass(frozen=True)
class _Call:
    """One call, without its tensors: those are sources, those of edges, of rows, parameters."""

    function: Callable[[Part], Tensor]
    chunks: Sequence[Chunk]
    num_edge_tensors: int
    num_row_tensors: int
    autocast: tuple[str, torch.dtype, bool]  # of the forward pass, for the backward pass
    again: bool  # whether there will be a backward pass

    @property
    def num_data(self) -> int:
        """Tensors that are no parameters."""
        return 1 + self.num_edge_tensors + self.num_row_tensors

    def select(self, chunk: Chunk, tensors: Sequence[Tensor]) -> list[Tensor]:
        """What a chunk reads of the tensors; of the sources, all."""
        split = 1 + self.num_edge_tensors
        edges = [tensor[chunk.edges] for tensor in tensors[1:split]]
        rows = [tensor[chunk.rows] for tensor in tensors[split : self.num_data]]
        return [tensors[0], *edges, *rows]

    def evaluate(
        self,
        chunk: Chunk,
        selected: Sequence[Tensor],
        source: Tensor | None,
        target: Tensor,
        kept: list[Tensor] | None,
    ) -> Tensor:
        """The function of one chunk [n, ...]; ``target`` [E]."""
        split = 1 + self.num_edge_tensors
        part = Part(
            sources=selected[0],
            source=source,
            target=target[chunk.edges] - chunk.rows.start,
            edges=tuple(selected[1:split]),
            rows=tuple(selected[split:]),
            num_rows=chunk.rows.stop - chunk.rows.start,
            kept=kept,
        )
        device, dtype, enabled = self.autocast
        with torch.autocast(device, dtype=dtype, enabled=enabled):
            return self.function(part)


def over_chunks(
    function: Callable[[Part], Tensor],
    chunks: Sequence[Chunk],
    ends: tuple[Tensor, Tensor],
    sources: Tensor,
    *,
    edges: Sequence[Tensor],
    rows: Sequence[Tensor],
    parameters: Sequence[Tensor],
) -> Tensor:
    """Call a function on each chunk. Differentiable once, in all tensors.

    Args:
        function: of a part of the edges, gives [n, ...], a row for each of its targets. It must
            draw no random numbers.
        chunks: of whole targets, which cover all edges in their order.
        ends: source of each edge among ``sources``, and its target among ``rows`` [E] both.
        sources: [N, ...], features of atoms.
        edges: [E, ...] each.
        rows: [rows, ...] each, of target atoms.
        parameters: all that the function reads beside its argument and that may have a gradient.

    Returns:
        [rows, ...], what the chunks gave, one after the other.
    """
    nothing = slice(0, 0)
    chunks = chunks or [Chunk(nothing, nothing, nothing)]  # no atoms: the function knows the width
    device = sources.device.type
    autocast = device, torch.get_autocast_dtype(device), torch.is_autocast_enabled(device)
    tensors = sources, *edges, *rows, *parameters
    again = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)
    call = _Call(function, chunks, len(edges), len(rows), autocast, again)
    out: Tensor = _OverChunks.apply(call, ends, *tensors)
    return out


class _OverChunks(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, call: _Call, ends: tuple[Tensor, Tensor], *tensors: Tensor) -> Tensor:
        source, target = ends
        kept: list[list[Tensor]] = [[] for _ in call.chunks]
        found = [
            call.evaluate(
                chunk,
                call.select(chunk, tensors),
                source[chunk.edges],
                target,
                own if call.again else None,
            )
            for chunk, own in zip(call.chunks, kept, strict=True)
        ]
        ctx.call, ctx.num_kept = call, [len(own) for own in kept]
        ctx.save_for_backward(*ends, *(tensor for own in kept for tensor in own), *tensors)
        return torch.cat(found)

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        source, target, *rest = ctx.saved_tensors
        tensors = rest[sum(ctx.num_kept) :]
        kept = iter(rest)
        wanted = ctx.needs_input_grad[2:]
        totals = _room(ctx.call, tensors, wanted)
        for chunk, number in zip(ctx.call.chunks, ctx.num_kept, strict=True):
            own = list(islice(kept, number))
            found = _differentiate(ctx.call, chunk, source, target, tensors, own, wanted, grad)
            _add(ctx.call, chunk, source, totals, found)
        return None, None, *totals


def _room(call: _Call, tensors: Sequence[Tensor], wanted: Sequence[bool]) -> list[Tensor | None]:
    """Where gradients of what chunks read are written; those of parameters are there later."""
    room: list[Tensor | None] = [None] * len(tensors)
    for place in range(call.num_data):
        if wanted[place]:
            make = torch.empty_like if place else torch.zeros_like  # each edge and row has one
            room[place] = make(tensors[place])
    return room


def _differentiate(
    call: _Call,
    chunk: Chunk,
    source: Tensor,
    target: Tensor,
    tensors: Sequence[Tensor],
    kept: list[Tensor],
    wanted: Sequence[bool],
    grad: Tensor,
) -> list[Tensor | None]:
    """Gradients of one chunk, of the tensors that are wanted; of its edges' sources, not of all."""
    selected = call.select(chunk, tensors)
    selected[0] = selected[0].index_select(0, source[chunk.edges])
    leaves = [t.detach().requires_grad_(w) for t, w in zip(selected, wanted, strict=False)]
    with torch.enable_grad():
        out = call.evaluate(chunk, leaves, None, target, kept)
    leaves += tensors[call.num_data :]
    inputs = [leaf for leaf, w in zip(leaves, wanted, strict=True) if w]
    found = iter(torch.autograd.grad(out, inputs, grad[chunk.rows]))
    return [next(found) if w else None for w in wanted]


def _add(
    call: _Call,
    chunk: Chunk,
    source: Tensor,
    totals: list[Tensor | None],
    found: Sequence[Tensor | None],
) -> None:
    """Add one chunk's gradients to those of all."""
    for place, part in enumerate(found):
        total = totals[place]
        if part is None:
            continue
        if total is None:
            totals[place] = part.clone()  # of a parameter, by the first chunk
        elif place == 0:
            add_rows(total, source[chunk.edges], part)
        elif place <= call.num_edge_tensors:
            total[chunk.edges] = part
        elif place < call.num_data:
            total[chunk.rows] = part
        else:
            total.add_(part)
