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


@triton.jit
def standardised(x, inside, channels, epsilon):
    """Rows [BLOCK_B, BLOCK_C], centred, over their standard deviation; its inverse [BLOCK_B, 1]."""
    mean = tl.sum(x, axis=1)[:, None] / channels
    centred = tl.where(inside, x - mean, 0.0)
    mean_square = tl.sum(centred * centred, axis=1)[:, None] / channels
    inverse_std = 1 / tl.sqrt(mean_square + epsilon)
    return centred * inverse_std, inverse_std


@triton.jit
def standardised_grad(grad, normal, inverse_std, channels):
    """Gradient of the rows, given that of :func:`standardised` and its results."""
    straight = tl.sum(grad, axis=1)[:, None] / channels
    along = tl.sum(grad * normal, axis=1)[:, None] / channels
    return (grad - straight - normal * along) * inverse_std
