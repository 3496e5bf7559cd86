"""Functions that several kernels call."""

import triton
import triton.language as tl


@triton.jit
def silu_slope(x):
    """Derivative of SiLU."""
    gate = tl.sigmoid(x)
    return gate * (1 + x * (1 - gate))


@triton.jit
def row_of_rotation(rotations, entry, i, edge, num_entries, k, in_degree):
    """Row i of a table (ops/triton/rows.py) of an edge's rotation: [BLOCK_K], zeros after it."""
    found = rotations + edge * num_entries + tl.load(entry + i) + k
    return tl.load(found, mask=in_degree, other=0.0).to(tl.float32)
