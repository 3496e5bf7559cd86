"""The depth-wise tensor product against e3nn's, its derivatives, its symmetries, its edge cases."""

from __future__ import annotations

import logging
from functools import cache

import pytest
import torch
from e3nn import o3
from torch.autograd import gradcheck, gradgradcheck

from fairchem_equiformer.ops.depthwise_tensor_product import (
    Ends,
    depthwise_tensor_product,
    from_channels_last,
    to_channels_last,
)
from fairchem_equiformer.ops.native import loader
from fairchem_equiformer.so3.depthwise import depthwise_paths
from tests.kernels import called_kernels, with_backward
from tests.tolerances import assert_close

DOUBLE = torch.float64
IS2RE = "256x0e + 128x1e", "1x0e + 1x1e"

# Irreps of features and of harmonics; all irreps of the features are wanted.
PRODUCTS = {
    "is2re": IS2RE,
    "qm9": ("16x0e + 8x1e + 8x2e", "1x0e + 1x1e + 1x2e"),
    "parity": ("16x0e + 8x0o + 5x1e + 4x1o + 3x2e + 2x2o", "1x0e + 1x1o + 1x2e"),
    "degree 4": ("3x0e + 2x1e + 2x2e + 1x3e + 2x4e", "1x0e + 1x1e + 1x2e + 1x3e + 1x4e"),
    "not sorted": ("2x1o + 3x0e + 2x1o", "1x1o + 1x0e"),
    "one channel": ("1x1e", "1x1e"),
}


def paths_of(features, harmonics):
    return depthwise_paths(o3.Irreps(features), o3.Irreps(harmonics), o3.Irreps(features))


def inputs(paths, edges, dtype=DOUBLE):
    widths = paths.irreps_in.dim, paths.irreps_sh.dim, paths.weight_numel
    return [torch.randn(edges, width, dtype=DOUBLE).to(dtype) for width in widths]


@cache
def by_e3nn(name):
    """The product that e3nn generates, in float64, with an irrep for each path of ours."""
    paths, default = paths_of(*PRODUCTS[name]), torch.get_default_dtype()
    order = sorted(paths.paths, key=lambda path: (path.out, path.channel))
    irreps_out = [(paths.irreps_in[p.feature].mul, paths.irreps_out[p.out].ir) for p in order]
    torch.set_default_dtype(DOUBLE)
    try:
        return o3.TensorProduct(
            paths.irreps_in,
            paths.irreps_sh,
            irreps_out,
            [(p.feature, p.harmonic, order.index(p), "uvu", True) for p in paths.paths],
            irrep_normalization="component",
            path_normalization="none",
            internal_weights=False,
            shared_weights=False,
        )
    finally:
        torch.set_default_dtype(default)


def test_irreps_and_weights_of_the_published_model():
    paths = paths_of(*IS2RE)
    assert paths.weight_numel == 896
    assert paths.irreps_out == o3.Irreps("384x0e + 512x1e")
    assert [(path.out, path.channel) for path in paths.paths] == [
        *((0, 0), (1, 0)),  # of invariants
        *((1, 256), (0, 256), (1, 384)),  # of vectors
    ]


def test_paths_follow_degrees_and_parity():
    features, harmonics = o3.Irreps(PRODUCTS["parity"][0]), o3.Irreps(PRODUCTS["parity"][1])
    paths = depthwise_paths(features, harmonics, features)
    found = []
    for a, (_, ir_in) in enumerate(features):
        for b, (_, ir_sh) in enumerate(harmonics):
            degrees = range(abs(ir_in.l - ir_sh.l), min(ir_in.l + ir_sh.l, 2) + 1)
            found += [(a, b, degree, ir_in.p * ir_sh.p) for degree in degrees]
    irreps = [paths.irreps_out[path.out].ir for path in paths.paths]
    made = [(p.feature, p.harmonic, ir.l, ir.p) for p, ir in zip(paths.paths, irreps, strict=True)]
    assert made == found
    order = [(ir.l, -ir.p) for _, ir in paths.irreps_out]
    assert order == sorted(order)
    # What is not wanted is left out, except invariants.
    scalars = depthwise_paths(features, harmonics, o3.Irreps("1x1o"))
    assert {str(ir) for _, ir in scalars.irreps_out} == {"0e", "1o"}


@pytest.mark.parametrize("dtype", [DOUBLE, torch.float32])
@pytest.mark.parametrize("irreps", PRODUCTS)
@pytest.mark.parametrize("shared", [False, True], ids=["weights of edges", "shared weights"])
def test_equals_e3nn(irreps, dtype, shared):
    paths = paths_of(*PRODUCTS[irreps])
    tensors = [tensor.requires_grad_() for tensor in inputs(paths, 5, dtype)]
    doubles = [tensor.detach().double().requires_grad_() for tensor in tensors]
    x, harmonics, weights = tensors
    if shared:
        weights = weights[0]
    actual = depthwise_tensor_product(x, harmonics, weights, paths)
    x, harmonics, weights = doubles
    if shared:
        weights = weights[:1].expand_as(weights)
    expected = by_e3nn(irreps)(x, harmonics, weights)
    assert_close(actual, expected, "depthwise")
    flow = torch.randn_like(expected)
    found = torch.autograd.grad(actual, tensors, flow.to(dtype))
    wanted = torch.autograd.grad(expected, doubles, flow)
    for one, other in zip(found, wanted, strict=True):
        assert_close(one, other, "depthwise", dtype)


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("edges", [0, 1, 2])
def test_first_and_second_derivatives(channels_last, edges):
    paths = paths_of("2x1o + 1x0e", "1x0e + 1x1o")
    tensors = [tensor.requires_grad_() for tensor in inputs(paths, edges)]

    def product(x, harmonics, weights):
        return depthwise_tensor_product(x, harmonics, weights, paths, channels_last=channels_last)

    assert product(*tensors).shape == (edges, paths.irreps_out.dim)
    if edges:
        assert gradcheck(product, tensors)
        assert gradgradcheck(product, tensors)


def test_derivatives_of_ends_and_shared_weights():
    paths = paths_of("1x0e + 2x1e", "1x0e + 1x1e")
    ends = [torch.randn(3, paths.irreps_in.dim, dtype=DOUBLE, requires_grad=True) for _ in "ab"]
    _, harmonics, _ = inputs(paths, 3)
    weights = torch.randn(paths.weight_numel, dtype=DOUBLE, requires_grad=True)
    source, target = torch.tensor([[0, 2, 2], [1, 1, 2]])

    def product(source_features, target_features, harmonics, weights):
        x = Ends(source_features, target_features, source, target)
        return depthwise_tensor_product(x, harmonics, weights, paths)

    tensors = [*ends, harmonics.requires_grad_(), weights]
    summed = ends[0][source] + ends[1][target]
    assert_close(
        product(*tensors), depthwise_tensor_product(summed, *tensors[2:], paths), "depthwise"
    )
    assert gradcheck(product, tensors)
    assert gradgradcheck(product, tensors)


@pytest.mark.parametrize("irreps", PRODUCTS.values(), ids=PRODUCTS.keys())
def test_channels_last_is_the_same_in_another_order(irreps):
    paths = paths_of(*irreps)
    x, *rest = inputs(paths, 4)
    turned = to_channels_last(x, paths.irreps_in)
    assert torch.equal(from_channels_last(turned, paths.irreps_in), x)
    actual = depthwise_tensor_product(turned, *rest, paths, channels_last=True)
    expected = depthwise_tensor_product(x, *rest, paths)
    assert_close(from_channels_last(actual, paths.irreps_out), expected, "depthwise")


def test_inputs_that_are_not_contiguous():
    paths = paths_of(*PRODUCTS["qm9"])
    tensors = inputs(paths, 4)
    spread = [torch.stack([tensor, tensor], dim=2)[:, :, 0] for tensor in tensors]
    assert not any(tensor.is_contiguous() for tensor in spread)
    actual = depthwise_tensor_product(*spread, paths)
    assert_close(actual, depthwise_tensor_product(*tensors, paths), "depthwise")


def turning(irreps, rotation, *, mirrored):
    """Matrix of a rotation, and of an inversion after it, solved from the harmonics themselves."""
    points = torch.randn(40, 3, dtype=DOUBLE)
    blocks = []
    for mul, ir in irreps:
        before, after = (
            o3.spherical_harmonics(ir.l, at, normalize=True)
            for at in (points, points @ rotation.t())
        )
        turned = torch.linalg.lstsq(before, after).solution
        blocks += [turned * (ir.p if mirrored else 1)] * mul
    return torch.block_diag(*blocks)


@pytest.mark.parametrize("mirrored", [False, True])
def test_turning_and_mirroring_what_goes_in_turns_what_comes_out(mirrored):
    paths = paths_of(*PRODUCTS["parity"])
    x, harmonics, weights = inputs(paths, 4)
    rotation = o3.rand_matrix(dtype=DOUBLE)
    turn_x, turn_y, turn_out = (
        turning(irreps, rotation, mirrored=mirrored)
        for irreps in (paths.irreps_in, paths.irreps_sh, paths.irreps_out)
    )
    turned = depthwise_tensor_product(x @ turn_x, harmonics @ turn_y, weights, paths)
    expected = depthwise_tensor_product(x, harmonics, weights, paths) @ turn_out
    assert_close(turned, expected, "depthwise")


# The compiled kernels, whose channels are multiples of 16

COMPILED = {
    "is2re": IS2RE,
    "qm9": ("128x0e + 64x1e + 32x2e", "1x0e + 1x1e + 1x2e"),
    "degree 4": ("16x0e + 32x1e + 16x2e + 16x3e + 16x4e", "1x0e + 1x1e + 1x2e + 1x3e + 1x4e"),
    "parity": ("16x0e + 16x0o + 16x1e + 16x1o", "1x0e + 1x1o + 1x2e"),
    "invariants alone": ("16x0e", "1x0e"),
}


def derivatives(function, tensors):
    """Value, first and second derivatives, the last through the square of the first."""
    leaves = [tensor.detach().clone().requires_grad_() for tensor in tensors]
    value = function(*leaves)
    flow = torch.linspace(-1, 1, value.numel()).view(value.shape).to(value).requires_grad_()
    first = torch.autograd.grad(value, leaves, flow, create_graph=True)
    square = sum(grad.square().sum() for grad in first)
    second = torch.autograd.grad(square, [*leaves, flow])
    return [tensor.detach() for tensor in (value, *first, *second)]


@pytest.mark.parametrize("name", COMPILED)
@pytest.mark.parametrize("edges", [0, 1, 37])
def test_kernels_equal_the_reference(name, edges):
    paths = paths_of(*COMPILED[name])
    doubles = inputs(paths, edges)

    def product(x, harmonics, weights):
        return depthwise_tensor_product(x, harmonics, weights, paths, channels_last=True)

    with called_kernels() as called:
        actual = derivatives(product, [tensor.float() for tensor in doubles])
    assert called == with_backward("depthwise_product")
    expected = derivatives(product, doubles)
    for one, other in zip(actual, expected, strict=True):
        assert_close(one, other, "depthwise", torch.float32)


def test_kernels_on_ends_and_shared_weights():
    paths = paths_of(*COMPILED["qm9"])
    source, target = torch.randint(6, (37,)), torch.randint(4, (37,))
    ends = [torch.randn(atoms, paths.irreps_in.dim, dtype=DOUBLE) for atoms in (6, 4)]
    _, harmonics, weights = inputs(paths, 37)
    doubles = [*ends, harmonics, weights[0]]

    def product(source_features, target_features, harmonics, weights):
        x = Ends(source_features, target_features, source, target)
        return depthwise_tensor_product(x, harmonics, weights, paths, channels_last=True)

    with called_kernels() as called:
        actual = derivatives(product, [tensor.float() for tensor in doubles])
    assert called == with_backward("depthwise_product")
    for one, other in zip(actual, derivatives(product, doubles), strict=True):
        assert_close(one, other, "depthwise", torch.float32)


def test_kernels_in_the_order_of_e3nn_and_on_strides():
    paths = paths_of(*COMPILED["qm9"])
    tensors = inputs(paths, 5)
    spread = [torch.stack([t, t], dim=2)[:, :, 0].float() for t in tensors]
    with called_kernels() as called:
        actual = depthwise_tensor_product(*spread, paths)
    assert called == {"depthwise_product"}
    expected = depthwise_tensor_product(*tensors, paths)
    assert_close(actual, expected, "depthwise", torch.float32)


def test_harmonics_without_a_gradient_get_none():
    paths = paths_of(*COMPILED["is2re"])
    x, harmonics, weights = (tensor.float().requires_grad_() for tensor in inputs(paths, 5))
    harmonics.requires_grad_(False)
    out = depthwise_tensor_product(x, harmonics, weights, paths, channels_last=True)
    out.square().sum().backward()
    doubles = [tensor.detach().double().requires_grad_() for tensor in (x, harmonics, weights)]
    expected = depthwise_tensor_product(*doubles, paths, channels_last=True)
    expected.square().sum().backward()
    assert harmonics.grad is None
    assert_close(x.grad, doubles[0].grad, "depthwise", torch.float32)
    assert_close(weights.grad, doubles[2].grad, "depthwise", torch.float32)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("place", [0, 1, 2])
def test_kernels_hide_nothing_that_is_not_finite(bad, place):
    paths = paths_of(*COMPILED["is2re"])
    tensors = [tensor.float() for tensor in inputs(paths, 3)]
    tensors[place][1] = bad
    with called_kernels() as called:
        out = depthwise_tensor_product(*tensors, paths, channels_last=True)
    assert called == {"depthwise_product"}
    assert out.isfinite().all(1).tolist() == [True, False, True]
    assert not out[1].isfinite().any()


@pytest.mark.parametrize(
    ("irreps", "reason"),
    [
        (("16x0e + 24x1e", "1x0e + 1x1e"), "not a multiple of 16"),
        (("16x7e", "1x0e + 1x1e"), "degrees above 6"),
        (("16x5e + 16x6e", "1x0e + 1x1e"), None),
        (("4112x0e", "1x0e"), "more than 4096 features"),
    ],
)
def test_sizes_that_no_kernel_takes_run_in_pytorch(irreps, reason, caplog):
    paths = paths_of(*irreps)
    tensors = inputs(paths, 2)
    loader._log_misfit.cache_clear()
    with caplog.at_level(logging.INFO), called_kernels() as called:
        actual = depthwise_tensor_product(*(t.float() for t in tensors), paths)
    assert called == (set() if reason else {"depthwise_product"})
    assert (reason or "") in caplog.text
    expected = depthwise_tensor_product(*tensors, paths)
    assert_close(actual, expected, "depthwise", torch.float32)


def test_wrong_shapes_are_named():
    paths = paths_of(*PRODUCTS["one channel"])
    x, harmonics, weights = inputs(paths, 4)
    with pytest.raises(ValueError, match=r"weights .*: shape \(4, 1\), it must be \(4, 2\)"):
        depthwise_tensor_product(x, harmonics, weights[:, :1], paths)
    with pytest.raises(ValueError, match=r"features .* 1x1e .*: shape \(3, 3\)"):
        depthwise_tensor_product(x[:3], harmonics, weights, paths)
    with pytest.raises(ValueError, match="2x1e: of 1e there must be one channel"):
        depthwise_paths(paths.irreps_in, o3.Irreps("2x1e"), paths.irreps_in)


@pytest.mark.parametrize("reduced", [False, True], ids=["all float32", "features of a product"])
def test_under_autocast(reduced):
    """Harmonics keep their digits; what a product in bfloat16 made is taken as it is."""
    paths = paths_of(*IS2RE)
    x, harmonics, weights = inputs(paths, 5, torch.float32)
    x = x.bfloat16() if reduced else x
    expected = depthwise_tensor_product(x.float(), harmonics, weights, paths, channels_last=True)
    with torch.autocast("cpu", torch.bfloat16):
        found = depthwise_tensor_product(x, harmonics, weights, paths, channels_last=True)
    if reduced:
        assert_close(found.float(), expected, "outputs", torch.bfloat16)
    else:
        assert torch.equal(found, expected)
