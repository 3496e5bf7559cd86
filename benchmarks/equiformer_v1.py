"""Equiformer (V1) against its authors' way of computing: ``python -m benchmarks.equiformer_v1``.

:mod:`benchmarks.compare` with other defaults: the three models of the poster, by this package and
by e3nn's modules (:mod:`benchmarks.e3nn_equiformer`), on the same weights and structures, taking
turns; inference, and a training step without the optimizer. All options are those of
:mod:`benchmarks.compare`. Examples::

    python -m benchmarks.equiformer_v1               # all three models, 45 and 4 x 45 atoms
    python -m benchmarks.equiformer_v1 --models nonlinear --sizes 153
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from benchmarks import compare
from benchmarks.compare import V1_CONFIGS

if TYPE_CHECKING:
    from collections.abc import Sequence

    from benchmarks.table import Record

DEFAULTS = [
    *("--implementations", "e3nn", "equiformer"),
    *("--tasks", "inference", "training"),
    *("--models", *V1_CONFIGS),
    *("--sizes", "45", "4x45"),
]


def main(arguments: Sequence[str] | None = None) -> list[Record]:
    """Measure, print and write; of an option given twice the latter holds."""
    given = sys.argv[1:] if arguments is None else arguments
    return compare.main([*DEFAULTS, *given])


if __name__ == "__main__":
    main()
