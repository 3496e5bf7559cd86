"""Convolutions of V1 and V2 against Lmax: equal results, counted costs, fitted exponents."""

from __future__ import annotations

import math

import pytest
import torch

from benchmarks import lmax as benchmark
from benchmarks.lmax import E3NN, V1, V2, convolutions, exponent, slab_graph
from tests.tolerances import assert_close


def test_ours_and_e3nns_tensor_product_give_the_same():
    found = convolutions(slab_graph(13), lmax=2, channels=16, highest_of_e3nn=2)
    with torch.no_grad():
        ours, expected = found[V1].call(), found[E3NN].call()
        other = found[V2].call()
    assert_close(ours, expected, "depthwise", slack=5)
    assert other.flatten(1).shape == ours.shape


def test_costs_grow_as_the_paper_says():
    """Multiplications of one edge, channels so few that the products over irreps matter most."""
    degrees = range(1, 13)
    fitted = {}
    for name, count in {
        V2: lambda degree: benchmark.multiplications_v2(degree, 1),
        E3NN: lambda degree: v1_multiplications(degree, by_e3nn=True),
        V1: lambda degree: v1_multiplications(degree, by_e3nn=False),
    }.items():
        fitted[name] = exponent({degree: count(degree) for degree in degrees})
    assert fitted[V2] == pytest.approx(3, abs=0.4)
    assert fitted[E3NN] == pytest.approx(6, abs=0.7)
    assert fitted[V2] + 1 < fitted[V1] < fitted[E3NN]


def v1_multiplications(degree, *, by_e3nn):
    """For 64 channels, as of e3nn, without the linear layer."""
    irreps = benchmark.o3.Irreps([(64, (order, 1)) for order in range(degree + 1)])
    sh = benchmark.o3.Irreps([(1, ir) for _, ir in irreps])
    paths = benchmark.depthwise_paths(irreps, sh, irreps)
    nothing = benchmark.o3.Irreps([(0, ir) for _, ir in irreps])
    return benchmark.multiplications_v1(paths, nothing, by_e3nn=by_e3nn)


def test_exponents_are_those_of_powers():
    assert exponent({n: 5 * n**3 for n in (1, 2, 3, 4)}) == pytest.approx(3)
    assert exponent({1: 1, 2: 8, 3: 27}) == pytest.approx(3)
    assert math.isnan(exponent({1: 1}))


def test_the_command_prints_writes_and_draws(tmp_path, capsys):
    command = ["--lmax", "1", "2", "--channels", "16", "--atoms", "13", "--seconds", "0"]
    threads = ["--threads", str(torch.get_num_threads()), "--e3nn-lmax", "1"]
    records = benchmark.main([*command, *threads, "--out", str(tmp_path)])
    assert [(record["lmax"], record["convolution"]) for record in records] == [
        *((1, V1), (1, V2), (1, E3NN)),
        *((2, V1), (2, V2)),
    ]
    assert "power" in capsys.readouterr().out
    assert len((tmp_path / "lmax.jsonl").read_text().splitlines()) == 5
    assert (tmp_path / "lmax.png").read_bytes().startswith(b"\x89PNG")
