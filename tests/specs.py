"""What a benchmark measures in tests: one small call."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from benchmarks.spec import Spec


def spec_in(folder: Path, implementation: str, task: str, **changes: Any) -> Spec:
    """Of a structure of 45 atoms on the CPU, called once; the results go into the folder."""
    usual: dict[str, Any] = {
        "config": "",
        "atoms": 45,
        "batch": 1,
        "device": "cpu",
        "threads": torch.get_num_threads(),
        "seconds": 0.0,
        "round": 0,
        "memory_limit": 0,
        "weights": "",
        "record": str(folder / "record.json"),
        "results": str(folder / "results.pt"),
    }
    return Spec(implementation=implementation, task=task, **usual | changes)
