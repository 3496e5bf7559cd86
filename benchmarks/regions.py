"""How often threads are called to work together and waited for: parallel regions of OpenMP.

PyTorch, MKL within it and our kernels share one OpenMP library, PyTorch's copy of libgomp. A small
library that is preloaded into a process stands before it and counts the regions that more than one
thread works in. It is compiled when it is first needed; without a compiler nothing is counted.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
from pathlib import Path

SOURCE = Path(__file__).with_name("regions.c")


def counting(folder: Path) -> dict[str, str]:
    """Return the environment variables that make a new process count its regions.

    Args:
        folder: where the library is, or is put.

    Returns:
        Nothing where there is no compiler for C, or one that cannot make it.
    """
    library = folder / "regions.so"
    if not library.exists():
        compiler = shutil.which(os.environ.get("CC", "cc"))
        if compiler is None:
            return {}
        command = [compiler, "-O2", "-shared", "-fPIC", "-o", library, SOURCE, "-ldl"]
        if subprocess.run(command, capture_output=True, check=False).returncode != 0:
            return {}
    others = os.environ.get("LD_PRELOAD", "")
    return {"LD_PRELOAD": f"{library.resolve()} {others}".strip()}


def counted(*, with_mkl: bool = True) -> int | None:
    """Return the parallel regions of this process so far, or None where nobody counts them.

    Args:
        with_mkl: Also those that MKL makes products in, which depend on the processor.
    """
    function = getattr(ctypes.CDLL(None), "parallel_regions", None)
    if function is None:
        return None
    function.restype = ctypes.c_long
    return sum(function(by_mkl) for by_mkl in range(1 + with_mkl))
