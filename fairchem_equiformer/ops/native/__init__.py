"""Compiled versions of the ops that matrix products do not cover, for float32 on a CPU.

They compute what the reference beside each call computes, without its passes over memory. The
library is built with the package (setup.py); without it, and for every other dtype, the ops run
their reference. The variable ``FAIRCHEM_EQUIFORMER_KERNELS`` decides otherwise (ops/choice.py).
"""

from fairchem_equiformer.ops.native.aggregate import aggregate_kernels
from fairchem_equiformer.ops.native.attention_softmax import (
    LogitKernels,
    logit_kernels,
    softmax_kernels,
)
from fairchem_equiformer.ops.native.depthwise_tensor_product import (
    DepthwiseKernels,
    depthwise_kernels,
)
from fairchem_equiformer.ops.native.equivariant_norm import (
    EquivariantNormKernels,
    equivariant_norm_kernels,
)
from fairchem_equiformer.ops.native.head_sums import HeadSumKernels, head_sum_kernels
from fairchem_equiformer.ops.native.irreps_gate import (
    Gated,
    IrrepsGateKernels,
    irreps_gate_kernels,
)
from fairchem_equiformer.ops.native.loader import together
from fairchem_equiformer.ops.native.matrix_products import (
    MatrixProducts,
    Packed,
    Rounded,
    pack,
    pack_in_bfloat16,
    product_kernels,
)
from fairchem_equiformer.ops.native.message import MessageKernels, message_kernels
from fairchem_equiformer.ops.native.radial import (
    GaussianKernels,
    NormSiLUKernels,
    gaussian_kernels,
    norm_silu_kernels,
)
from fairchem_equiformer.ops.native.s2_grid import GridKernels, grid_kernels
from fairchem_equiformer.ops.native.sums import add_rows, sum_and_difference
from fairchem_equiformer.ops.native.together import flush

__all__ = [
    "DepthwiseKernels",
    "EquivariantNormKernels",
    "Gated",
    "GaussianKernels",
    "GridKernels",
    "HeadSumKernels",
    "IrrepsGateKernels",
    "LogitKernels",
    "MatrixProducts",
    "MessageKernels",
    "NormSiLUKernels",
    "Packed",
    "Rounded",
    "add_rows",
    "aggregate_kernels",
    "depthwise_kernels",
    "equivariant_norm_kernels",
    "flush",
    "gaussian_kernels",
    "grid_kernels",
    "head_sum_kernels",
    "irreps_gate_kernels",
    "logit_kernels",
    "message_kernels",
    "norm_silu_kernels",
    "pack",
    "pack_in_bfloat16",
    "product_kernels",
    "softmax_kernels",
    "sum_and_difference",
    "together",
]
