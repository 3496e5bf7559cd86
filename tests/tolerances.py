"""The one table of test tolerances: largest error over largest value, by op and dtype.

float64 is held to a few hundred roundings, float32 likewise, bfloat16 (autocast) to a few of its
own 2^-8. An error above the number is a defect, not noise.
"""

from __future__ import annotations

import torch
from torch import Tensor

_F64, _F32, _BF16 = torch.float64, torch.float32, torch.bfloat16

TOLERANCES: dict[str, dict[torch.dtype, float]] = {
    # so3
    "frames": {_F64: 1e-14},
    "wigner": {_F64: 1e-12, _F32: 2e-7},
    "grid": {_F64: 1e-12, _F32: 2e-6},
    # ops
    "segments": {_F64: 1e-13, _F32: 2e-6},
    "radial": {_F64: 1e-11, _F32: 1e-5},
    "so2_linear": {_F64: 1e-13, _F32: 2e-6},
    "so3_linear": {_F64: 1e-13, _F32: 2e-6, _BF16: 2e-2},
    "rotate": {_F64: 1e-12, _F32: 2e-6},
    "activation": {_F64: 1e-12, _F32: 5e-6, _BF16: 3e-2},
    "edge_degree": {_F64: 1e-11, _F32: 1e-5, _BF16: 3e-2},
    "edge_attention": {_F64: 1e-11, _F32: 2e-5, _BF16: 5e-2},
    # the whole model: issue 2 asks for 1e-10 in float64
    "model": {_F64: 1e-10, _F32: 1e-4},
}


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Largest difference over the largest expected value; plain difference if all are zero."""
    if not expected.numel():
        return 0.0
    difference = (actual.detach().double() - expected.detach().double()).abs().max().item()
    return difference / (expected.detach().abs().max().item() or 1.0)


def assert_close(
    actual: Tensor, expected: Tensor, op: str, dtype: torch.dtype | None = None, name: str = ""
) -> None:
    """Check shapes, finiteness and the tolerance of ``op`` at ``dtype``, by default actual's."""
    assert actual.shape == expected.shape, (name, actual.shape, expected.shape)
    assert actual.isfinite().all(), f"{name or op}: not finite"
    error, allowed = relative_error(actual, expected), TOLERANCES[op][dtype or actual.dtype]
    assert error <= allowed, f"{name or op}: relative error {error:.2e}, allowed {allowed:.0e}"
