"""How threads of OpenMP wait for each other: briefly awake, then asleep.

libgomp, which torch and our kernels share, lets threads that wait turn in a loop for milliseconds.
Where something else wants the same cores, that loop takes the time of the thread that is waited
for. libgomp reads its settings once, when torch is imported, so they must be made before that: on
the import of this package, or of fairchem-core 1.10 (``startup/``). Whoever set a variable of
OpenMP's waiting is left alone.
"""

from __future__ import annotations

import os
import sys

SPIN_COUNT = "GOMP_SPINCOUNT"
WAIT_POLICY = "OMP_WAIT_POLICY"
_TURNS = 10_000  # a fraction of a millisecond; with 1,000 a step is slower on idle cores, too


def wait_asleep() -> None:
    """Let threads that wait go to sleep after a while; too late once torch is imported."""
    if "torch" not in sys.modules:
        os.environ.update(settings())


def settings() -> dict[str, str]:
    """The variables that this sets; none where somebody has set one of them."""
    somebody_has = SPIN_COUNT in os.environ or WAIT_POLICY in os.environ
    return {} if somebody_has else {SPIN_COUNT: str(_TURNS)}


def waiting() -> str:
    """The variables that say how threads wait."""
    found = [
        f"{name}={os.environ[name]}" for name in (SPIN_COUNT, WAIT_POLICY) if name in os.environ
    ]
    return ", ".join(found) or f"neither {SPIN_COUNT} nor {WAIT_POLICY} is set"
