"""Operations over edges sorted by target atom: chunks, segment sums and softmax."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fairchem_equiformer.ops import native


class Chunk(NamedTuple):
    """Consecutive target atoms and all the edges they receive."""

    nodes: slice  # target atoms among all atoms
    rows: slice  # the same among the atoms whose features are computed here
    edges: slice


def target_chunks(target_ptr: Tensor, max_edges: int, offset: int = 0) -> tuple[Chunk, ...]:
    """Cut the edge list at target boundaries into chunks of at most ``max_edges`` edges.

    An atom with more edges than that gets a chunk of its own, so that softmax and sums never cross
    a boundary.

    Args:
        target_ptr: [N + 1], edges of the i-th target are ``target_ptr[i]:target_ptr[i + 1]``.
        max_edges: at least 1.
        offset: first target among all atoms.
    """
    pointers = target_ptr.tolist()
    chunks = []
    first = 0
    for node in range(1, len(pointers)):
        last = node == len(pointers) - 1
        if last or pointers[node + 1] - pointers[first] > max_edges:
            chunks.append(
                Chunk(
                    slice(offset + first, offset + node),
                    slice(first, node),
                    slice(pointers[first], pointers[node]),
                )
            )
            first = node
    return tuple(chunks)


def table_of(chunks: Sequence[Chunk]) -> Tensor:
    """Chunks as a tensor [chunks, 6] int64 on the host: an operation takes no slices."""
    bounds = [[end for part in chunk for end in (part.start, part.stop)] for chunk in chunks]
    return torch.tensor(bounds, dtype=torch.int64).view(-1, 6)


def chunks_of(table: Tensor) -> tuple[Chunk, ...]:
    """Inverse of :func:`table_of`."""
    return tuple(
        Chunk(*(slice(*bounds[i : i + 2]) for i in (0, 2, 4))) for bounds in table.tolist()
    )


def segment_sum(values: Tensor, segment: Tensor, num_segments: int) -> Tensor:
    """Sum rows of equal segment, in the order of the rows: the same bits at every call.

    Args:
        values: [E, ...].
        segment: [E] int64, ascending.
        num_segments: S.

    Returns:
        [S, ...].
    """
    flat = values.reshape(values.shape[0], math.prod(values.shape[1:]))
    if values.is_cuda and flat.numel():  # index_add_ uses atomics there, in no fixed order
        bounds = torch.arange(num_segments + 1, device=segment.device)
        offsets = torch.searchsorted(segment.contiguous(), bounds)
        # The check that "unsafe" leaves out would make the host wait.
        total = torch.segment_reduce(flat, "sum", offsets=offsets, unsafe=True)
    else:
        total = flat.new_zeros(num_segments, flat.shape[1]).index_add_(0, segment, flat)
    return total.view(num_segments, *values.shape[1:])


def in_single(values: Tensor) -> Tensor:
    """In float32 at least: a sum in half precision loses what is small beside it."""
    return values.float() if values.dtype in (torch.float16, torch.bfloat16) else values


def take(x: Tensor, dim: int, index: Tensor) -> Tensor:
    """``x.index_select(dim, index)``, with a gradient that has the same bits at every call.

    That of index_select is summed by atomics on a GPU, that of indexing in the order of the index.
    """
    if not x.is_cuda:
        return x.index_select(dim, index)
    return x[(slice(None),) * dim + (index,)]


def add_rows(total: Tensor, index: Tensor, rows: Tensor) -> None:
    """Add rows [E, ...] to those of ``total`` [N, ...] that the index [E] names, in place.

    The same bits at every call: a GPU sorts the index where index_add_ would use atomics.
    """
    if total.is_cuda:
        total.index_put_((index,), rows, accumulate=True)
    elif not native.add_rows(total, index, rows):
        total.index_add_(0, index, rows)


def segment_softmax(logits: Tensor, segment: Tensor, num_segments: int) -> Tensor:
    """Softmax over the edges of each target, per head (paper, section 3.2).

    Args:
        logits: [E, heads].
        segment: [E] int64, ascending.
        num_segments: S.

    Returns:
        [E, heads], positive, summing to 1 over each segment.
    """
    index = segment[:, None].expand_as(logits)
    peak = logits.new_full((num_segments, logits.shape[1]), -torch.inf)
    # What is subtracted leaves the result, and so its derivatives, as they are.
    peak = peak.scatter_reduce(0, index, logits.detach(), "amax")
    weights = torch.exp(logits - peak[segment])
    return weights / segment_sum(weights, segment, num_segments)[segment]
