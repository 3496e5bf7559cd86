"""Computing a part again in the backward pass, in place of keeping what it made."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

from torch.utils.checkpoint import checkpoint

if TYPE_CHECKING:
    from collections.abc import Callable

# torch 2.4 enters autocast there by a name that it has deprecated itself: no user can cure that.
warnings.filterwarnings(
    "ignore",
    r"`torch\.cpu\.amp\.autocast\(args\.\.\.\)` is deprecated",
    category=FutureWarning,
    module=r"torch\.utils\.checkpoint",
)


def recomputed(function: Callable[..., Any], *args: Any, random: bool) -> Any:
    """Call a function of which only the arguments are kept for the backward pass.

    Args:
        function: what to call, there and then again.
        args: its arguments.
        random: it draws random numbers, and has to draw the same ones again.
    """
    return checkpoint(function, *args, use_reentrant=False, preserve_rng_state=random)
