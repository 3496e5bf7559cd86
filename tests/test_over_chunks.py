"""A function of edges chunk by chunk against the same function of all edges at once."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd import gradcheck

from fairchem_equiformer.ops.over_chunks import Part, over_chunks
from fairchem_equiformer.ops.segments import segment_sum, take, target_chunks
from tests.tolerances import assert_close

DOUBLE = torch.float64
GRAPHS = {
    "atoms without edges": [0, 3, 0, 0, 5, 2, 0],
    "one edge": [1],
    "no edges": [0, 0],
    "no atoms": [],
}


class Message(nn.Module):
    """Reads sources, edges and rows, and a parameter that may be frozen."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 4, dtype=DOUBLE)
        self.widths = []

    def forward(self, part: Part):
        x = part.sources if part.source is None else take(part.sources, 0, part.source)
        weights, other = part.edges
        (targets,) = part.rows
        self.widths.append(len(weights))
        messages = self.linear(x + take(targets, 0, part.target)).tanh() * weights * other
        return segment_sum(messages, part.target, part.num_rows) + targets.sum(1, keepdim=True)


def problem(degrees):
    pointers = torch.tensor([0, *degrees]).cumsum(0)
    target = torch.arange(len(degrees)).repeat_interleave(torch.tensor(degrees, dtype=torch.int64))
    source = torch.randint(6, (len(target),))
    shapes = (6, 3), (len(target), 4), (len(target), 1), (len(degrees), 3)
    tensors = [torch.randn(*shape, dtype=DOUBLE, requires_grad=True) for shape in shapes]
    return pointers, (source, target), tensors


def by_chunks(message, pointers, ends, tensors, max_edges):
    sources, *edges, rows = tensors
    return over_chunks(
        message,
        target_chunks(pointers, max_edges),
        ends,
        sources,
        edges=edges,
        rows=[rows],
        parameters=list(message.parameters()),
    )


def at_once(message, ends, tensors):
    sources, *edges, rows = tensors
    return message(Part(sources, *ends, tuple(edges), (rows,), len(rows)))


@pytest.mark.parametrize("max_edges", [1, 4, 100])
@pytest.mark.parametrize("degrees", GRAPHS.values(), ids=GRAPHS.keys())
def test_equals_all_edges_at_once(degrees, max_edges):
    pointers, ends, tensors = problem(degrees)
    message = Message()
    inputs = [*tensors, *message.parameters()]
    actual = by_chunks(message, pointers, ends, tensors, max_edges)
    expected = at_once(message, ends, tensors)
    assert_close(actual, expected, "segments")
    flow = torch.randn_like(expected)
    found = torch.autograd.grad(actual, inputs, flow)
    wanted = torch.autograd.grad(expected, inputs, flow)
    for one, other in zip(found, wanted, strict=True):
        assert_close(one, other, "segments")


def test_gradients():
    pointers, ends, tensors = problem(GRAPHS["atoms without edges"])
    message = Message()

    def function(*inputs):
        return by_chunks(message, pointers, ends, inputs[:4], 4)

    assert gradcheck(function, [*tensors, *message.parameters()])


def test_no_more_edges_at_a_time_than_a_chunk_has():
    pointers, ends, tensors = problem([2] * 10)
    message = Message()
    by_chunks(message, pointers, ends, tensors, 5).sum().backward()
    assert message.widths == [4] * 5 * 2


def test_what_is_kept_is_found_again():
    pointers, ends, tensors = problem([2, 3, 1])
    weight = torch.randn(3, 3, dtype=DOUBLE, requires_grad=True)
    found, made = [], []

    def function(part):
        (targets,) = part.rows
        found.append(part.kept is not None and list(part.kept))
        if part.kept:
            (factor,) = part.kept
        else:
            factor = targets.detach() + 1
            made.append(factor)
            if part.kept is not None:
                part.kept.append(factor)
        return targets @ weight * factor + 0 * part.sources.sum()

    def call():
        chunks = target_chunks(pointers, 4)
        return over_chunks(
            function, chunks, ends, tensors[0], edges=[], rows=[tensors[3]], parameters=[weight]
        )

    out = call()
    assert found == [[], []]
    flow = torch.randn_like(out)
    gradients = torch.autograd.grad(out, (tensors[3], weight), flow)
    assert [len(kept) for kept in found[2:]] == [1, 1]
    assert len(made) == 2
    expected = torch.autograd.grad(
        tensors[3] @ weight * (tensors[3].detach() + 1), (tensors[3], weight), flow
    )
    for one, other in zip(gradients, expected, strict=True):
        assert_close(one, other, "segments")
    with torch.no_grad():
        call()
    assert found[-2:] == [False, False]


def test_frozen_tensors_get_no_gradient():
    pointers, ends, tensors = problem([2, 3])
    message = Message()
    message.linear.bias.requires_grad_(False)
    tensors[1].requires_grad_(False)
    by_chunks(message, pointers, ends, tensors, 2).sum().backward()
    assert tensors[1].grad is None
    assert message.linear.bias.grad is None
    assert all(tensors[place].grad is not None for place in (0, 2, 3))


def test_autocast_is_that_of_the_forward_pass():
    pointers, ends, tensors = problem([2, 3])
    seen = []

    def function(part):
        (targets,) = part.rows
        product = F.linear(targets.float(), torch.ones(3, 3))
        seen.append(product.dtype)
        return product + part.sources.sum()

    with torch.autocast("cpu", torch.bfloat16):
        out = over_chunks(
            function,
            target_chunks(pointers, 2),
            ends,
            tensors[0],
            edges=[],
            rows=[tensors[3]],
            parameters=[],
        )
    out.sum().backward()
    assert seen == [torch.bfloat16] * 4
