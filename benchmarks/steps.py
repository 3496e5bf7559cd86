"""Steps without end, in a process of its own: ``python -m benchmarks.steps SPEC.json``.

:mod:`benchmarks.shared_cores` starts it, reads the seconds of each step, and ends it.
"""

from __future__ import annotations

import json
import sys
import time
import warnings
from pathlib import Path

import torch

from benchmarks.measure import TASKS
from benchmarks.spec import Spec


def main() -> None:
    """Step until nobody reads any more."""
    warnings.simplefilter("ignore")
    spec = Spec(**json.loads(Path(sys.argv[1]).read_text()))
    torch.set_num_threads(spec.threads)
    work = TASKS[spec.task](spec)
    try:
        while True:
            start = time.perf_counter()
            work.finish(work.forward())
            print(time.perf_counter() - start, flush=True)
    except BrokenPipeError:
        sys.exit()


if __name__ == "__main__":
    main()
