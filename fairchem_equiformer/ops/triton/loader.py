"""Whether Triton's kernels can run, and why not."""

from __future__ import annotations

import logging
import os
from functools import cache

import torch
from torch import Tensor

from fairchem_equiformer.ops.choice import VARIABLE, chosen

logger = logging.getLogger(__name__)

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def interpreted() -> bool:
    """Whether Triton's interpreter runs the kernels, on a CPU and slowly: for tests."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@cache
def _missing() -> str | None:
    try:
        import triton  # noqa: F401, PLC0415  # takes a while, and only a GPU needs it
    except ImportError as error:
        return f"triton cannot be imported: {error}"
    return None


@cache
def _too_old(device: torch.device, least: int) -> str | None:
    major, minor = torch.cuda.get_device_capability(device)
    if major >= least:
        return None
    name = torch.cuda.get_device_name(device)
    return f"{name} has compute capability {major}.{minor}, below {least}.0"


def supports(*tensors: Tensor, least: int = 7) -> str | None:
    """Say what keeps the kernels from working on these tensors.

    Args:
        tensors: that they would read.
        least: compute capability that they need.

    Returns:
        The reason, or None where they can.
    """
    reason = _missing()
    if reason is not None:
        return reason
    for tensor in tensors:
        if tensor.dtype not in _DTYPES:
            return f"they do not compute in {str(tensor.dtype).removeprefix('torch.')}"
        if tensor.device.type == "cuda" and not interpreted():
            reason = _too_old(tensor.device, least)
        elif not (tensor.device.type == "cpu" and interpreted()):
            reason = f"they do not run on {tensor.device.type}"
        if reason is not None:
            return reason
    return None


def usable(op: str, *tensors: Tensor, least: int = 7) -> bool:
    """Whether the op runs these kernels on these tensors; if not, the log says why, once.

    Only where they were asked for by name: no GPU has run them yet, and until one has and
    ``benchmarks/gpu.sh`` compared the numbers, ``auto`` means PyTorch there.

    Arguments are those of :func:`supports`.

    Raises:
        RuntimeError: if they were asked for by name and there is nothing that they could run on.
    """
    if chosen() != "triton":
        return False
    reason = supports(*tensors, least=least)
    if reason is None:
        return True
    if _missing() or not (torch.cuda.is_available() or interpreted()):
        raise RuntimeError(f"{VARIABLE} is 'triton', but the kernels cannot be used: {reason}")
    _log(op, reason)
    return False


@cache
def _log(op: str, reason: str) -> None:
    logger.warning("%s: PyTorch runs in place of Triton's kernels, slower: %s", op, reason)
