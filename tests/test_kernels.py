"""What the compiler makes of Triton's kernels, without a GPU: ``python -m benchmarks.kernels``."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from benchmarks import kernels, time_model
from benchmarks.sizes import SIZES

# In a process of its own, since Triton in this one has only its interpreter.
COMPILE = """
import json, sys
from dataclasses import asdict
from benchmarks import kernels
size, capability, *names = sys.argv[1:]
found = {}
for launch in kernels.launches(kernels.SIZES[size], int(capability)):
    if not names or launch.name in names:
        made = asdict(kernels.compile_for(launch, int(capability)))
        made["limit"] = kernels.SHARED_LIMIT[int(capability)]
        made["narrow"] = kernels.narrow_addresses(launch) if capability == "80" else []
        found.setdefault(launch.name, []).append(made)
print(json.dumps(found))
"""


def compiled(size, capability, *names):
    """What the assembler says of each kernel of a model, by name."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", COMPILE, size, str(capability), *names]
    output = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
    return json.loads(output.stdout)


def assert_fit(found):
    for name, launches in found.items():
        for made in launches:
            assert made["registers"] > 0, name
            assert made["spilled"] <= 64, f"{name}: {made['spilled']} bytes go through memory"
            assert made["shared"] <= made["limit"], (
                f"{name}: {made['shared']} bytes of shared memory"
            )
            assert not made["narrow"], f"{name}: {made['narrow']} overflow beyond 2^31"
            makes_products = name.startswith(("s2_", "grid_mlp_", "gaussians_"))
            assert bool(made["products"]) == makes_products, f"{name}: {made['products']}"


def test_kernels_fit_the_card():
    names = (
        *("message_forward", "aggregate_backward", "s2_forward bfloat16"),
        *("norm_backward", "norm_silu_backward", "gate_backward", "grid_mlp_backward tf32"),
    )
    found = compiled("31M", 80, *names)
    assert set(found) == set(names)
    assert_fit(found)


@pytest.mark.long
@pytest.mark.parametrize("capability", [70, 80, 90])
@pytest.mark.parametrize("size", SIZES)
def test_all_kernels_fit_every_card(size, capability):
    found = compiled(size, capability)
    assert len(found) == (17 if capability < 80 else 36)
    assert_fit(found)
    if capability == 90:  # the instructions that reach Hopper's rate, where M allows
        for name, launches in found.items():
            if name.startswith("grid_mlp_") and not name.endswith("tf32x3"):
                assert launches[0]["products"] == ["wgmma.mma_async"], name


@pytest.mark.parametrize(
    ("use", "seen"),
    [
        ("%2 = arith.muli %program, %1 : i32", True),
        ("%2 = arith.extsi %program : i32 to i64 loc(#loc)", False),
        ("%2 = arith.muli %program_1, %1 : i64", False),
    ],
)
def test_a_narrow_use_of_a_program_is_seen(use, seen):
    found = kernels.narrow_programs("%program = tt.get_program_id x : i32 loc(#loc)\n" + use)
    assert bool(found) == seen


def test_a_pointer_with_a_narrow_offset_is_seen():
    text = """
    tt.func public @k(%arg0: !tt.ptr<f32>, %arg1: !tt.ptr<f32>) {
    %5 = tt.splat %arg0 : !tt.ptr<f32> -> tensor<4x!tt.ptr<f32>>
    %6 = tt.addptr %5, %4 : tensor<4x!tt.ptr<f32>>, tensor<4xi32>
    %7 = tt.load %6 : tensor<4x!tt.ptr<f32>>
    %8 = tt.addptr %arg1, %3 : !tt.ptr<f32>, i64
    %9 = tt.addptr %8, %2 : !tt.ptr<f32>, i32
    tt.store %9, %7 : !tt.ptr<f32>
    """
    assert kernels.narrow_pointers(text, {"%arg0", "%arg1"}) == ["%arg0 by %6"]


@pytest.mark.parametrize("size", SIZES)
def test_model_of_time_counts_what_was_counted_by_hand(size):
    """MFLOP of an edge and block, forward: SO(2) layers by four products, and the S2 transforms."""
    first, second, sphere = {
        "31M": (5.6, 2.1, 1.6),
        "83M": (11.7, 4.8, 2.4),
        "153M": (13.8, 5.9, 3.1),
    }[size]
    counts = time_model._Counts(SIZES[size])
    assert counts.so2_flop(256, 64, 8 * 64 + 64, 4) / 1e6 == pytest.approx(first, abs=0.06)
    assert counts.so2_flop(64, 128, 0, 4) / 1e6 == pytest.approx(second, abs=0.06)
    (stage,) = (
        s for s in time_model.ours(SIZES[size], tensor_cores=True) if s.name.startswith("S2")
    )
    assert stage.flop / 1e6 == pytest.approx(sphere, abs=0.08)  # l = 0 is not taken back
    assert stage.silu == 20736


def test_bounds_fall_with_the_rates_of_a_card():
    for stage in (
        *time_model.ours(SIZES["31M"], tensor_cores=True),
        *time_model.stock(SIZES["31M"]),
    ):
        bounds = [stage.seconds(card, tensor_cores=True) for card in time_model.CARDS]
        assert bounds[0] > bounds[1] > bounds[2] > 0
        assert stage.seconds(time_model.CARDS[2], tensor_cores=False) >= bounds[2]


@pytest.mark.parametrize("size", SIZES)
def test_three_products_pay_without_tensor_cores_alone(size):
    """As ops/so2_linear.py chooses."""
    for card in time_model.CARDS:
        for widths in time_model.so2_layers(SIZES[size]).values():
            for kind, cheaper in (("fp32", 3), ("TF32", 4), ("bf16", 4)):
                if kind == "TF32" and card.matrix == card.vector:
                    continue  # none there
                four, three = (
                    time_model.so2_seconds(SIZES[size], *widths, n, card, kind) for n in (4, 3)
                )
                assert (three < four) == (cheaper == 3), (card.name, kind)


def test_grid_mlp_is_counted_by_hand():
    """Of an atom at lmax 4: 324 points, 25 coefficients, 128 channels; shared by 20 edges."""
    (stage,) = (
        s for s in time_model.ours(SIZES["31M"], tensor_cores=True) if s.name.startswith("grid MLP")
    )
    assert stage.flop * 20 == 2 * 324 * 128 * (25 + 25 + 128)
    assert stage.silu * 20 == 2 * 324 * 128
    assert stage.floats * 20 == 2 * 25 * 128
    v100, _, h200 = time_model.CARDS
    assert stage.seconds(h200, tensor_cores=False) == pytest.approx(stage.flop / (494e12 / 3))
    assert stage.seconds(v100, tensor_cores=False) == pytest.approx(stage.flop / 15.7e12)
