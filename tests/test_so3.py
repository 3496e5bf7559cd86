"""Layouts, edge frames, Wigner matrices and sphere grids against their definitions and e3nn."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from e3nn import o3
from hypothesis import given, settings
from hypothesis import strategies as st

from fairchem_equiformer.so3 import grid as grids
from fairchem_equiformer.so3 import wigner
from fairchem_equiformer.so3.frames import edge_angles, edge_rotation_matrices
from fairchem_equiformer.so3.grid import grid
from fairchem_equiformer.so3.layout import Layout, degree_slices, layout
from fairchem_equiformer.so3.rank2 import symmetric_tensor
from fairchem_equiformer.so3.wigner import edge_rotations, expand_rotations, swap_matrix
from tests import reference
from tests.tolerances import assert_close

DOUBLE = torch.float64
CPU = torch.device("cpu")
DEGREES = [(1, 0), (1, 1), (2, 0), (3, 2), (4, 2), (6, 3), (8, 8)]
LAYOUTS = [layout(lmax, mmax) for lmax, mmax in DEGREES] + [layout(1, 1, lmin=1)]
Y_AXIS = torch.tensor([0.0, 1.0, 0.0], dtype=DOUBLE)

layouts = pytest.mark.parametrize("sizes", LAYOUTS, ids=lambda sizes: str(sizes)[6:])
any_layout = st.integers(0, 8).flatmap(
    lambda lmax: st.builds(Layout, st.just(lmax), st.integers(0, lmax), st.integers(0, lmax))
)
component = st.floats(-1, 1, allow_subnormal=False)
# Any direction, and ones that are nearly, or exactly, along the y axis.
direction = st.one_of(
    st.tuples(component, component, component),
    st.tuples(
        st.sampled_from([0.0, 1e-300, 1e-17, 1e-9, 1e-6, 1e-3]),
        st.sampled_from([-1.0, 1.0]),
        st.sampled_from([0.0, -1e-300, 1e-16, -1e-9, 1e-3]),
    ),
).filter(lambda v: math.hypot(*v) > 1e-3)
angle = st.floats(-math.pi, math.pi)


def random_vectors(count: int) -> torch.Tensor:
    """Edge vectors of any length, the first six along the axes."""
    axes = torch.cat([torch.eye(3, dtype=DOUBLE), -torch.eye(3, dtype=DOUBLE)])
    others = torch.randn(count - 6, 3, dtype=DOUBLE) * torch.rand(count - 6, 1, dtype=DOUBLE) * 10
    return torch.cat([axes, others])


# Layout


@settings(deadline=None)
@given(any_layout)
def test_both_orders_hold_what_the_definition_says(sizes):
    degrees = range(sizes.lmin, sizes.lmax + 1)
    assert list(sizes.l_major) == [(n, m) for n in degrees for m in range(-n, n + 1)]
    assert set(sizes.m_major) == {(n, m) for n, m in sizes.l_major if abs(m) <= sizes.mmax}
    assert len(set(sizes.m_major)) == sizes.num_rows
    assert len(sizes.l_major) == sizes.num_coefficients


@settings(deadline=None)
@given(any_layout)
def test_rows_in_l_major_point_to_the_same_coefficient(sizes):
    assert [sizes.l_major[position] for position in sizes.rows_in_l_major] == list(sizes.m_major)


@settings(deadline=None)
@given(any_layout)
def test_order_slices_cut_the_rows_by_order_plus_before_minus(sizes):
    assert sizes.order_slices[0].start == 0
    assert sizes.order_slices[-1].stop == sizes.num_rows
    assert all(first.stop == second.start for first, second in pairwise(sizes.order_slices))
    for m, rows in enumerate(sizes.order_slices):
        degrees = range(max(m, sizes.lmin), sizes.lmax + 1)
        assert len(degrees) == sizes.num_degrees(m)
        signs = (m, -m) if m else (0,)
        assert list(sizes.m_major[rows]) == [(n, sign) for sign in signs for n in degrees]


def test_layout_written_out():
    assert layout(2, 1).m_major == ((0, 0), (1, 0), (2, 0), (1, 1), (2, 1), (1, -1), (2, -1))
    assert layout(1, 1, 1).m_major == ((1, 0), (1, 1), (1, -1))


@pytest.mark.parametrize("sizes", [(2, 3, 0), (2, -1, 0), (2, 1, 3), (-1, 0, 0), (2, 1, -1)])
def test_impossible_layouts_are_refused(sizes):
    with pytest.raises(ValueError, match="must"):
        Layout(*sizes)


@settings(deadline=None)
@given(any_layout)
def test_rescale_makes_up_for_the_orders_left_out(sizes):
    for (degree, _), factor in zip(sizes.l_major, sizes.truncation_rescale, strict=True):
        kept = sum(abs(m) <= sizes.mmax for m in range(-degree, degree + 1))
        assert math.isclose(factor**2 * kept, 2 * degree + 1)


def test_degree_slices():
    assert [rows.stop - rows.start for rows in degree_slices(8)] == [2 * n + 1 for n in range(9)]
    assert degree_slices(2)[2] == slice(4, 9)


# Frames


@settings(deadline=None, max_examples=40)
@given(direction)
def test_frame_is_a_rotation_that_takes_the_edge_to_y(vector):
    vector = torch.tensor([vector], dtype=DOUBLE)
    rotation = edge_rotation_matrices(vector)[0]
    assert_close(rotation @ rotation.T, torch.eye(3, dtype=DOUBLE), "frames")
    assert math.isclose(rotation.det().item(), 1, rel_tol=1e-14)
    assert_close(rotation @ vector[0], vector[0].norm() * Y_AXIS, "frames")


@settings(deadline=None, max_examples=40)
@given(direction)
def test_frame_has_no_roll(vector):
    vector = torch.tensor([vector], dtype=DOUBLE)
    assert_close(edge_rotation_matrices(vector), reference.edge_frame(vector), "frames")


@settings(deadline=None, max_examples=40)
@given(angle, st.floats(0, math.pi))
def test_angles_are_those_of_e3nn(alpha, beta):
    alpha, beta = torch.tensor([alpha], dtype=DOUBLE), torch.tensor([beta], dtype=DOUBLE)
    found = edge_angles(3.0 * o3.angles_to_xyz(alpha, beta))
    assert_close(o3.angles_to_xyz(*found), o3.angles_to_xyz(alpha, beta), "frames")
    assert 0 <= found[1].item() <= math.pi


def test_edges_along_y_have_azimuth_zero():
    alpha, beta = edge_angles(torch.tensor([[0.0, 2.0, 0.0], [0.0, -2.0, 0.0]]))
    assert alpha.tolist() == [0, 0]
    assert beta.tolist() == [0, math.pi]


@pytest.mark.parametrize("tilt", [1e-12, 1e-9, 1e-6, 1e-3])
def test_small_tilts_keep_full_precision(tilt):
    for sign in (1, -1):
        _, beta = edge_angles(torch.tensor([[tilt, sign, 0]], dtype=DOUBLE))
        found = beta.item() if sign > 0 else math.pi - beta.item()
        assert math.isclose(found, math.atan(tilt), rel_tol=1e-13, abs_tol=1e-15)


# Wigner matrices


@pytest.fixture
def default_double():
    """e3nn makes the generators of its Wigner matrices in torch's default dtype."""
    torch.set_default_dtype(DOUBLE)
    yield
    torch.set_default_dtype(torch.float32)


@layouts
def test_rotations_are_the_wigner_matrices_of_e3nn(sizes, default_double):  # noqa: ARG001
    vectors = random_vectors(12)
    dense = expand_rotations(edge_rotations(vectors, sizes, DOUBLE), sizes)
    alpha, beta = edge_angles(vectors)
    degrees = range(sizes.lmin, sizes.lmax + 1)
    full = [o3.wigner_D(n, alpha, beta, torch.zeros_like(alpha)).transpose(1, 2) for n in degrees]
    full = torch.stack([torch.block_diag(*blocks) for blocks in zip(*full, strict=True)])
    assert_close(dense, full[:, list(sizes.rows_in_l_major)], "wigner")


@settings(deadline=None, max_examples=40)
@given(vector=direction, turned=direction)
def test_rotations_represent_the_frame(vector, turned):
    """D Y(p) = Y(R p), for the harmonics of e3nn and the frame of the edge."""
    sizes = layout(6, 6)
    vector, point = torch.tensor([vector], dtype=DOUBLE), torch.tensor(turned, dtype=DOUBLE)
    dense = expand_rotations(edge_rotations(vector, sizes, DOUBLE), sizes)[0]
    expected = reference.harmonics(6, edge_rotation_matrices(vector)[0] @ point)
    rows = list(sizes.rows_in_l_major)
    assert_close(dense @ reference.harmonics(6, point), expected[rows], "wigner")


@settings(deadline=None, max_examples=40)
@given(direction)
def test_rotations_are_orthogonal(vector):
    sizes = layout(8, 8)
    vector = torch.tensor([vector], dtype=DOUBLE)
    dense = expand_rotations(edge_rotations(vector, sizes, DOUBLE), sizes)[0]
    assert_close(dense @ dense.T, torch.eye(81, dtype=DOUBLE), "wigner")


@settings(deadline=None, max_examples=40)
@given(direction)
def test_an_edge_seen_from_its_frame_is_zonal(vector):
    sizes = layout(8, 3)
    vector = torch.tensor([vector], dtype=DOUBLE)
    dense = expand_rotations(edge_rotations(vector, sizes, DOUBLE), sizes)[0]
    zonal = torch.tensor([float(m == 0) for _, m in sizes.m_major], dtype=DOUBLE)
    assert_close(dense @ reference.harmonics(8, vector[0]), zonal, "wigner")


@layouts
def test_compact_form_stores_what_may_differ_from_zero(sizes):
    compact = edge_rotations(random_vectors(9), sizes, DOUBLE)
    degrees = range(sizes.lmin, sizes.lmax + 1)
    size = sum(min(2 * n + 1, 2 * sizes.mmax + 1) * (2 * n + 1) for n in degrees)
    assert compact.shape == (9, size)
    numbered = expand_rotations(torch.arange(1.0, size + 1)[None], sizes)
    assert sorted(numbered[numbered != 0].tolist()) == list(range(1, size + 1))
    within = torch.tensor([[row == n for n, _ in sizes.l_major] for row, _ in sizes.m_major])
    assert torch.equal(numbered[0] != 0, within)


def test_rotations_in_float32_are_rounded_once():
    sizes, vectors = layout(6, 2), random_vectors(50)
    single = edge_rotations(vectors.float(), sizes, torch.float32)
    assert single.dtype == torch.float32
    assert_close(single, edge_rotations(vectors.float().double(), sizes, DOUBLE), "wigner")


def test_many_edges_are_worked_through_in_pieces():
    sizes, vectors = layout(1, 1), random_vectors(9000)
    compact = edge_rotations(vectors, sizes, DOUBLE)
    for edge in (0, 4095, 4096, 8191, 8192, 8999):
        alone = edge_rotations(vectors[edge : edge + 1], sizes, DOUBLE)
        assert_close(compact[edge : edge + 1], alone, "wigner")


def test_no_edges():
    sizes = layout(2, 1)
    compact = edge_rotations(torch.zeros(0, 3), sizes, torch.float32)
    assert expand_rotations(compact, sizes).shape == (0, 7, 9)


def test_tables_are_made_without_compiled_harmonics(monkeypatch):
    """The first call of e3nn's leaves 19 MB of TorchScript's graphs in the process."""

    def refuse(*_, **__):
        raise AssertionError("e3nn's compiled harmonics were called")

    monkeypatch.setattr(o3, "spherical_harmonics", refuse)
    sizes = layout(5, 2)
    wigner._tables.__wrapped__(sizes, torch.device("cpu"))
    grids._harmonics.__wrapped__(sizes, None, l_major=False)


@pytest.mark.parametrize("degree", range(9))
def test_swap_matrix_is_a_symmetric_involution(degree):
    swap = swap_matrix(degree)
    assert_close(swap @ swap, torch.eye(2 * degree + 1, dtype=DOUBLE), "wigner")
    assert_close(swap, swap.T, "wigner")


# Grids


@pytest.mark.parametrize("resolution", [None, 18, 20])
@pytest.mark.parametrize(("lmax", "mmax"), DEGREES)
def test_to_the_grid_and_back_is_the_identity(lmax, mmax, resolution):
    """Up to the rescale of degrees with orders left out, on the way there and back."""
    sizes = layout(lmax, mmax)
    to_grid, from_grid, _ = grid(sizes, resolution, DOUBLE, CPU)
    rescale = torch.tensor(sizes.truncation_rescale, dtype=DOUBLE)[list(sizes.rows_in_l_major)]
    assert to_grid.shape == from_grid.shape == (len(to_grid), sizes.num_rows)
    assert_close(from_grid.T @ to_grid, torch.diag(rescale**2), "grid")


@pytest.mark.parametrize(("lmax", "resolution"), [(2, None), (3, 14)])
def test_grids_are_those_of_e3nn(lmax, resolution):
    full = layout(lmax, lmax)
    to_grid, from_grid, _ = grid(full, resolution, torch.float32, CPU, l_major=True)
    points = resolution or (2 * lmax + 2, 2 * lmax + 3)
    points = points if isinstance(points, tuple) else (points, points)
    x = torch.randn(5, (lmax + 1) ** 2)
    samples = o3.ToS2Grid(lmax, points)(x)
    assert_close(x @ to_grid.T, samples.flatten(1), "grid")
    assert_close(samples.flatten(1) @ from_grid, o3.FromS2Grid(points, lmax)(samples), "grid")


@pytest.mark.parametrize("resolution", [None, 18])
@pytest.mark.parametrize(("lmax", "mmax"), [(1, 0), (4, 2), (8, 8)])
def test_grids_are_those_of_the_reference(lmax, mmax, resolution):
    sizes = layout(lmax, mmax)
    to_grid, from_grid, _ = grid(sizes, resolution, DOUBLE, CPU)
    expected = reference.sphere(lmax, mmax, resolution)
    rows = list(sizes.rows_in_l_major)
    # Points are in another order: compare what does not depend on it.
    weight = torch.randn(len(rows), 2, dtype=DOUBLE)
    ours = from_grid.T @ torch.tanh(to_grid @ weight)
    theirs = expected.from_grid[rows] @ torch.tanh(expected.to_grid[:, rows] @ weight)
    assert_close(ours, theirs, "grid")


def test_both_orders_of_a_grid_hold_the_same_columns():
    sizes = layout(3, 3)
    rows = list(sizes.rows_in_l_major)
    m_major, l_major = (grid(sizes, 10, DOUBLE, CPU, l_major=major) for major in (False, True))
    assert torch.equal(m_major.to_grid, l_major.to_grid[:, rows])
    assert torch.equal(m_major.from_grid, l_major.from_grid[:, rows])


def product_of_factors(factors, latitude):
    """[P, R], from the halves that the factors hold."""
    values, row, starts = latitude
    place = torch.arange(len(starts) - 1).repeat_interleave(starts.diff())
    south = (values * (1 - 2 * (place % 2))).flip(0)
    sign = 1 - 2 * (torch.arange(len(starts) // 2) >= factors.num_same).long()
    first, unpaired = factors.longitude[: factors.num_pairs], factors.longitude[factors.num_pairs :]
    second = (first * sign).flip(0) if len(unpaired) else first * sign
    longitude = torch.cat([unpaired, first, second])[:, place // 2]
    points = torch.cat([values, south])[:, None] * longitude
    return torch.empty_like(points).index_copy_(2, row, points).flatten(0, 1)


@pytest.mark.parametrize("resolution", [None, 18, 20])
@pytest.mark.parametrize(("lmax", "mmax"), DEGREES)
def test_a_grid_is_the_product_of_its_factors(lmax, mmax, resolution):
    whole = grid(layout(lmax, mmax), resolution, DOUBLE, CPU)
    found = product_of_factors(whole.factors, whole.factors.latitude_in)
    assert_close(found, whole.to_grid, "grid")


@pytest.mark.parametrize("wanted", ["all", "scalars", "others"])
def test_a_grid_gives_back_what_is_wanted(wanted):
    sizes = layout(4, 2)
    whole, part = grid(sizes, None, DOUBLE, CPU), grid(sizes, None, DOUBLE, CPU, wanted=wanted)
    columns = {"all": slice(None), "scalars": slice(1), "others": slice(1, None)}[wanted]
    assert torch.equal(part.to_grid, whole.to_grid)
    assert torch.equal(part.from_grid, whole.from_grid[:, columns])
    assert_close(
        product_of_factors(part.factors, part.factors.latitude_out), part.from_grid, "grid"
    )


def test_an_l_major_grid_holds_all_orders():
    with pytest.raises(ValueError, match="mmax 1 < lmax 2"):
        grid(layout(2, 1), None, DOUBLE, CPU, l_major=True)


@pytest.mark.parametrize("resolution", [13, 12])
def test_a_resolution_that_cannot_resolve_is_refused(resolution):
    with pytest.raises(ValueError, match=f"even resolution of at least 14, got {resolution}"):
        grid(layout(6, 2), resolution, DOUBLE, CPU)


def test_symmetric_tensor_of_its_parts():
    """Parts as e3nn's harmonics of a direction give them: r r^T = |r|^2 / 3 + degree 2."""
    vector = torch.randn(5, 3, dtype=torch.float64)
    square = vector.square().sum(1)
    harmonics = o3.spherical_harmonics(2, vector, normalize=False, normalization="norm")
    built = symmetric_tensor(square / 3**0.5, harmonics * (2 / 3) ** 0.5)
    assert torch.allclose(built, vector[:, :, None] * vector[:, None], atol=1e-6)
