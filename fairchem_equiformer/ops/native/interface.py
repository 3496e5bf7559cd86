"""What the compiled library exports: its structs and the signatures of its functions.

Tensors are passed as they are: ctypes takes their address, after a look at their dtype. They must
lie as the comment above each function says.
"""

from __future__ import annotations

import ctypes
from ctypes import POINTER, c_char_p, c_float, c_int, c_int64, c_void_p
from typing import Any, ClassVar

import torch
from torch import Tensor

from fairchem_equiformer.ops.native.together import keep


class Floats:
    """``float*``, from a tensor that must outlive the call; of deferred kernels, it does."""

    dtype: ClassVar[torch.dtype] = torch.float32

    @classmethod
    def address(cls, tensor: Tensor) -> int:
        """Address of the numbers, for a field of a struct.

        Raises:
            TypeError: if the tensor holds others.
        """
        if tensor.dtype != cls.dtype:
            raise TypeError(f"a tensor of {tensor.dtype} where {cls.dtype} is needed")
        keep(tensor)
        return tensor.data_ptr()

    @classmethod
    def from_param(cls, tensor: Tensor | None) -> c_void_p:
        """Address of the numbers, or null, for an argument: ctypes calls this."""
        return c_void_p(None if tensor is None else cls.address(tensor))


class Indices(Floats):
    """``const int64_t*``, likewise."""

    dtype = torch.int64


class Bfloat16s(Floats):
    """``uint32_t*`` or ``uint16_t*`` of numbers in bfloat16, likewise."""

    dtype = torch.bfloat16


class NormStruct(ctypes.Structure):
    """``struct Norm`` of norm.h; weight and bias are null where there is no norm."""

    _fields_ = (
        *((name, c_void_p) for name in ("weight", "bias")),
        ("epsilon", c_float),
    )


class LogitsStruct(ctypes.Structure):
    """``struct Logits`` of attention_softmax.cpp."""

    _fields_ = (
        ("norm", NormStruct),
        ("dot", c_void_p),
        *((name, c_int64) for name in ("heads", "channels")),
    )


class RowsStruct(ctypes.Structure):
    """``struct Rows`` of rows.h."""

    _fields_ = (
        *((name, c_void_p) for name in ("row", "degree", "entry", "weight")),
        *((name, c_int64) for name in ("rows", "coefficients", "entries", "weights", "lmin")),
    )


class LatitudesStruct(ctypes.Structure):
    """``struct Latitudes`` of s2_grid.cpp."""

    _fields_ = (
        *((name, c_void_p) for name in ("values", "row", "starts")),
        ("rows", c_int64),
    )


class GridStruct(ctypes.Structure):
    """``struct Grid`` of s2_grid.cpp."""

    _fields_ = (
        *((name, LatitudesStruct) for name in ("in_", "out")),
        ("longitude", c_void_p),
        *((name, c_int64) for name in ("latitudes", "pairs", "unpaired", "orders", "same")),
    )


class GaussiansStruct(ctypes.Structure):
    """``struct Gaussians`` of radial.cpp."""

    _fields_ = (
        ("centers", c_void_p),
        *((name, c_int64) for name in ("count", "window")),
        *((name, c_float) for name in ("spacing", "coefficient", "reach")),
    )


class TablesStruct(ctypes.Structure):
    """``struct Tables`` of radial.cpp."""

    _fields_ = (
        ("bias", c_void_p),
        *((name, c_void_p * 2) for name in ("rows", "index")),
        ("count", c_int64),
    )


class ProductStruct(ctypes.Structure):
    """``struct Product`` of depthwise_tensor_product.cpp."""

    _fields_ = (
        *((name, c_void_p) for name in ("feature", "size", "channels")),
        *((name, c_void_p) for name in ("out", "out_size", "out_channels", "weight", "matrix")),
        *((name, c_int64) for name in ("paths", "features", "outs", "weights", "entries")),
    )


class FeaturesStruct(ctypes.Structure):
    """``struct Features`` of depthwise_tensor_product.cpp."""

    _fields_ = (
        *((name, c_void_p * 2) for name in ("tensor", "index")),
        ("count", c_int64),
    )


class IrrepsGateStruct(ctypes.Structure):
    """``struct IrrepsGate`` of irreps_gate.cpp."""

    _fields_ = (
        *((name, c_void_p) for name in ("channels", "components")),
        *((name, c_int64) for name in ("irreps", "scalars", "in_", "out")),
        *((name, c_float) for name in ("silu_scale", "sigmoid_scale")),
    )


class MatrixProductStruct(ctypes.Structure):
    """``struct MatrixProduct`` of matrix_products.cpp."""

    _fields_ = (
        *((name, c_void_p) for name in ("a", "plus", "norm", "sum", "pairs")),
        *((name, c_void_p) for name in ("b", "bias", "c", "also")),
        *((name, c_int64) for name in ("rows", "n", "k", "a_row", "a_column")),
        *((name, c_int64) for name in ("pair_row", "pair_column", "b_row", "c_row")),
        ("accumulate", c_int64),
        ("sign", c_float),
    )


class EquivariantNormStruct(ctypes.Structure):
    """``struct EquivariantNorm`` of equivariant_norm.cpp."""

    _fields_ = (
        ("weights", c_void_p * 9),
        ("bias", c_void_p),
        *((name, c_int64) for name in ("lmax", "channels")),
        ("groups", c_int64 * 10),
        ("num_groups", c_int64),
        ("epsilon", c_float),
    )


STRUCTS: dict[str, type[ctypes.Structure]] = {
    "Norm": NormStruct,
    "Logits": LogitsStruct,
    "Rows": RowsStruct,
    "Grid": GridStruct,
    "Gaussians": GaussiansStruct,
    "Tables": TablesStruct,
    "Product": ProductStruct,
    "Features": FeaturesStruct,
    "IrrepsGate": IrrepsGateStruct,
    "MatrixProduct": MatrixProductStruct,
    "EquivariantNorm": EquivariantNormStruct,
}

_F, _I, _N, _THREADS = Floats, Indices, c_int64, c_int
_NORM, _LOGITS, _ROWS = POINTER(NormStruct), POINTER(LogitsStruct), POINTER(RowsStruct)
_GRID, _GAUSSIANS, _TABLES = POINTER(GridStruct), POINTER(GaussiansStruct), POINTER(TablesStruct)
_EQUIVARIANT = POINTER(EquivariantNormStruct)
_PRODUCT, _FEATURES = POINTER(ProductStruct), POINTER(FeaturesStruct)
_IRREPS_GATE = POINTER(IrrepsGateStruct)
_MATRIX_PRODUCTS = POINTER(MatrixProductStruct)

# Result and arguments of every function, in the order of the C++ files.
SIGNATURES: dict[str, tuple[Any, tuple[Any, ...]]] = {
    "built_from": (c_char_p, ()),
    "generation": (c_int, ()),
    # together.cpp
    "begin_together": (None, ()),
    "run_together": (None, (_THREADS,)),
    "end_together": (None, ()),
    **{f"sizeof_{name}": (c_int64, ()) for name in STRUCTS},
    # message.cpp
    "message_misfit": (c_char_p, (_ROWS, _N)),
    "edge_message": (None, (_ROWS, _F, _F, _I, _I, _N, _F, _F, _N, _THREADS)),
    "edge_message_backward": (
        None,
        (_ROWS, _F, _F, _I, _I, _N, _F, _F, _F, _F, _F, _N, _THREADS),
    ),
    # aggregate.cpp
    "aggregate_misfit": (c_char_p, (_ROWS, _N)),
    "edge_aggregate": (None, (_ROWS, _F, _F, _F, _N, _N, _F, _I, _F, _N, _THREADS)),
    "edge_aggregate_backward": (
        None,
        (_ROWS, _F, _F, _I, _F, _F, _N, _N, _F, _F, _N, _THREADS),
    ),
    # attention_softmax.cpp
    "logits_misfit": (c_char_p, (_N,)),
    "attention_logits": (None, (_LOGITS, _F, _N, _F, _N, _THREADS)),
    "attention_logits_backward": (None, (_LOGITS, _F, _N, _F, _F, _N, _F, _N, _THREADS)),
    "edge_softmax": (None, (_F, _N, _I, _F, _N, _THREADS)),
    "edge_softmax_backward": (None, (_F, _F, _N, _I, _F, _N, _THREADS)),
    # s2_grid.cpp
    "s2_grid_misfit": (c_char_p, (_GRID, _N)),
    "silu": (None, (_F, _N, _F, _N, _N, _N, _THREADS)),
    "silu_backward": (None, (_F, _N, _F, _N, _F, _N, _N, _N, _THREADS)),
    "s2_activation": (None, (_GRID, _F, _N, _F, _N, _N, _N, _THREADS)),
    "s2_activation_backward": (None, (_GRID, _F, _N, _F, _N, _F, _N, _N, _N, _THREADS)),
    "silu_samples": (None, (_GRID, _F, _N, _F, _N, _N, _THREADS)),
    "silu_samples_backward": (None, (_GRID, _F, _N, _F, _F, _N, _N, _THREADS)),
    "integrate_silu": (None, (_GRID, _F, _F, _N, _N, _THREADS)),
    "integrate_silu_backward": (None, (_GRID, _F, _F, _N, _F, _N, _N, _THREADS)),
    "grid_mlp": (None, (_GRID, _F, _N, _F, _F, _N, _F, _N, _N, _THREADS)),
    # radial.cpp
    "gaussians_misfit": (c_char_p, (_GAUSSIANS, _N)),
    "gaussians_times": (None, (_GAUSSIANS, _F, _F, _N, _TABLES, _F, _N, _THREADS)),
    "gaussians_times_backward": (None, (_GAUSSIANS, _F, _F, _N, _F, _N, _THREADS)),
    "norm_misfit": (c_char_p, (_N,)),
    "layer_norm_silu": (None, (_NORM, _N, _F, _F, _N, _THREADS)),
    "norm_block": (c_int64, ()),
    "layer_norm_silu_backward": (None, (_NORM, _N, _F, _F, _F, _F, _N, _THREADS)),
    # depthwise_tensor_product.cpp
    "depthwise_misfit": (c_char_p, (_PRODUCT,)),
    "depthwise_product": (None, (_PRODUCT, _FEATURES, _F, _F, _N, _F, _N, _THREADS)),
    "depthwise_block": (c_int64, ()),
    "depthwise_product_backward": (
        None,
        (_PRODUCT, _FEATURES, _F, _F, _N, _F, _F, _F, _F, _N, _THREADS),
    ),
    # irreps_gate.cpp
    "irreps_gate_misfit": (c_char_p, (_IRREPS_GATE,)),
    "irreps_gate": (None, (_IRREPS_GATE, _F, _F, _N, _THREADS)),
    "irreps_gate_backward": (None, (_IRREPS_GATE, _F, _F, _F, _N, _THREADS)),
    # matrix_products.cpp
    "prefers_own_products": (c_int, ()),
    "matrix_products": (None, (_MATRIX_PRODUCTS, _N, _N, _THREADS)),
    "pack_matrix": (None, (_F, _F, c_float, _N, _N, _N, _N, _F, _THREADS)),
    "has_bfloat16_products": (c_int, ()),
    # bfloat16_products.cpp
    "pack_bfloat16": (None, (_F, _N, _N, _N, _N, Bfloat16s, _THREADS)),
    # sums.cpp
    "add_rows": (None, (_F, _N, _I, _F, _N, _N, _THREADS)),
    "sum_and_difference": (None, (_F, _F, _N, _F, _F, _N, _N, _THREADS)),
    # equivariant_norm.cpp
    "equivariant_norm_misfit": (c_char_p, (_N, _N)),
    "equivariant_norm": (None, (_EQUIVARIANT, _F, _F, _N, _THREADS)),
    "equivariant_norm_block": (c_int64, ()),
    "equivariant_norm_backward": (None, (_EQUIVARIANT, _F, _F, _F, _F, _N, _THREADS)),
    # head_sums.cpp
    "head_sums_misfit": (c_char_p, (_N,)),
    "head_sum": (None, (_F, _F, _I, _N, _N, _F, _N, _THREADS)),
    "head_dot": (None, (_F, _F, _I, _N, _N, _F, _N, _THREADS)),
    "head_spread": (None, (_F, _F, _I, _N, _N, _F, _N, _THREADS)),
}


def declare(library: ctypes.CDLL) -> None:
    """Tell ctypes the signatures.

    Raises:
        AttributeError: if the library lacks a function.
    """
    for name, (result, arguments) in SIGNATURES.items():
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
