"""Whose forces are rounded how much: ``python -m benchmarks.rounding --size 409``.

Energy and forces of both models in float32 against ours in float64, on the same edges and the same
float32 edge vectors, relative to the largest of float64. fairchem's model needs 20 GB at 409 atoms.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from unittest.mock import patch

import torch
from fairchem.core.models.equiformer_v2.equiformer_v2_deprecated import EquiformerV2 as Stock

from benchmarks.compare import CONFIGS
from benchmarks.measure import batch_of, model_config
from fairchem_equiformer import EquiformerV2
from fairchem_equiformer.models import backbone


def main() -> None:
    """Print a line for each model."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="31M", choices=CONFIGS)
    parser.add_argument("--size", type=int, default=45, help="atoms")
    options = parser.parse_args()
    config, data = model_config(CONFIGS[options.model]), batch_of(options.size, 1)
    torch.manual_seed(0)
    stock, ours = Stock(**config).eval(), EquiformerV2(**config).eval()
    ours.load_state_dict(stock.state_dict())
    with torch.no_grad():
        single = {"ours": ours(data.clone())}
        exact = in_double(ours, data)
        single["stock"] = stock(data.clone())
    for name, found in single.items():
        errors = {
            key: ((found[key] - value).abs().max() / value.abs().max()).item()
            for key, value in exact.items()
        }
        print(name, ", ".join(f"{key} {error:.1e}" for key, error in errors.items()))


def in_double(model: EquiformerV2, data: object) -> dict[str, torch.Tensor]:
    """Results in float64 on the edges that float32 finds; leaves the model in float64."""
    build = backbone.build_graph

    def build_and_widen(*arguments: object, **options: object) -> object:
        graph = build(*arguments, **options)
        vector = graph.vector.double()
        return replace(graph, vector=vector, distance=vector.norm(dim=1))

    with patch.object(backbone, "build_graph", build_and_widen):
        found: dict[str, torch.Tensor] = model.double()(data.clone())
    return found


if __name__ == "__main__":
    main()
