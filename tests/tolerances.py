"""The one table of tolerances of ops and models: largest error over largest value, by dtype.

float64 is held to a few hundred roundings, float32 likewise, bfloat16 and float16 (autocast) to a
few of their own 2^-8 and 2^-11. An error above the number is a defect, not noise.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

_F64, _F32 = torch.float64, torch.float32
_BF16, _F16 = torch.bfloat16, torch.float16

TOLERANCES: dict[str, dict[torch.dtype, float]] = {
    # so3
    "frames": {_F64: 1e-14},
    "wigner": {_F64: 1e-12, _F32: 2e-7},
    "grid": {_F64: 1e-12, _F32: 2e-6},
    # ops
    "segments": {_F64: 1e-13, _F32: 2e-6},
    "radial": {_F64: 1e-11, _F32: 1e-5},
    "so2_linear": {_F64: 1e-13, _F32: 2e-6, _BF16: 2e-2, _F16: 3e-3},
    "product": {_F32: 2e-6},
    "norm": {_F32: 1e-5},
    "so3_linear": {_F64: 1e-13, _F32: 2e-6, _BF16: 2e-2},
    "rotate": {_F64: 1e-12, _F32: 2e-6},
    "aggregate": {_F32: 5e-6},  # in kernels to lmax 8, where 3.2e-6 was seen
    "logits": {_F32: 2e-5},  # sums over channels that may all but cancel
    "activation": {_F64: 1e-12, _F32: 6e-6, _BF16: 3e-2},  # 5.4e-6 by the AVX2 reciprocal
    "depthwise": {_F64: 1e-12, _F32: 2e-6},
    "head_sums": {_F32: 5e-6},  # of second derivatives
    "edge_degree": {_F64: 1e-11, _F32: 1e-5, _BF16: 3e-2},
    "edge_attention": {_F64: 1e-11, _F32: 2e-5, _BF16: 5e-2},
    "triton": {_F32: 5e-6},  # of each row by itself
    # whole models
    "formula": {_F64: 1e-10, _F32: 1e-4},  # outputs and gradients against tests/reference.py
    # against fairchem's model, or in another order: batches, processes, symmetries
    "outputs": {_F64: 1e-10, _F32: 1e-5, _BF16: 3e-2, _F16: 4e-3},
    "gradients": {_F64: 1e-10, _F32: 3e-5},
    "gradients that cancel": {_F32: 1e-3},
    "made again": {_F32: 1e-6},
    "all in float32": {_F32: 3e-5},  # distances included, against float64
    "after 8 steps": {_F32: 1e-3},  # of Adam, which divides by small gradients
}


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Largest difference over the largest expected value; if all are zero, all must be equal."""
    assert actual.shape == expected.shape, (actual.shape, expected.shape)
    if not expected.numel():
        return 0.0
    actual, expected = (x.detach().cpu().double() for x in (actual, expected))
    difference, largest = (actual - expected).abs().max().item(), expected.abs().max().item()
    return difference / max(largest, 1e-30)


def assert_close(
    actual: Tensor,
    expected: Tensor,
    kind: str,
    dtype: torch.dtype | None = None,
    name: str = "",
    slack: float = 1.0,
) -> None:
    """Check the shape, finiteness and a row of the table.

    Args:
        kind: row.
        dtype: column, by default actual's.
        name: of what is compared.
        slack: factor on the tolerance.
    """
    name = name or kind
    assert actual.shape == expected.shape, (name, actual.shape, expected.shape)
    assert actual.isfinite().all(), f"{name}: not finite"
    error = relative_error(actual, expected)
    allowed = slack * TOLERANCES[kind][dtype or actual.dtype]
    assert error <= allowed, f"{name}: relative error {error:.2e}, allowed {allowed:.0e}"


def assert_all_close(
    actual: Mapping[str, Tensor],
    expected: Mapping[str, Tensor],
    kind: str,
    dtype: torch.dtype | None = None,
    slack: float = 1.0,
) -> None:
    """The same for all of some tensors by name."""
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        assert_close(actual[name], value, kind, dtype, name, slack)
