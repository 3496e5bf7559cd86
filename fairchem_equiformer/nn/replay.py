"""Functions of tensors that are recorded once and run again: CUDA graphs.

The forward pass of one structure of 45 to 400 atoms is hundreds of kernels of a few microseconds:
a GPU waits for Python. A CUDA graph starts them all at once. It reads the tensors that it was
recorded with, so that new input is copied into them, and so are its results read.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Iterator

logger = logging.getLogger(__name__)

Results = dict[str, Tensor]
Buffers = Mapping[str, Tensor]
# Runs a function, and gives what runs it again on the same tensors, and the tensors of its results.
Recorder = Callable[[Callable[[], Results]], tuple[Callable[[], object], Results]]

_MOST = 8  # recorded functions of one model: each holds the memory of a forward pass
_WARM_UP = 3  # calls before: kernels are compiled, TorchScript's profiling comes to its end
_AGREEMENT = 1e-3  # of a replay's results with the function's, relative to the largest


def record_cuda_graph(function: Callable[[], Results]) -> tuple[Callable[[], object], Results]:
    """Record a CUDA graph, and compare what it computes with what the function does.

    Raises:
        RuntimeError: if it cannot be recorded, or its numbers are others.
    """
    with _no_kept_casts():
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(_WARM_UP):
                expected = function()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        # Other threads, such as those of data loaders, may go on using the device.
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            results = function()
    graph.replay()
    for name, value in expected.items():
        difference = (results[name] - value).abs().max()
        if not bool(difference <= _AGREEMENT * value.abs().max()):
            raise RuntimeError(f"its {name} is not that of the pass it was recorded from")
    return graph.replay, results


RECORDERS: dict[str, Recorder] = {"cuda": record_cuda_graph}
"""By type of device; on others functions run as they are."""


@contextmanager
def _no_kept_casts() -> Iterator[None]:
    """Autocast keeps casts of weights until it ends; a recorded pass must not read them then."""
    enabled = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(enabled)


class Recorded:
    """A function recorded on buffers of its own.

    Args:
        function: from buffers to results, both by name.
        buffers: what it reads.
        record: see :data:`Recorder`.
    """

    def __init__(
        self,
        function: Callable[[Buffers], Results],
        buffers: Buffers,
        record: Recorder,
    ) -> None:
        self._buffers = buffers
        self._function = function  # a CUDA graph reads its tensors, but does not hold them
        self._replay, self._results = record(lambda: function(buffers))

    def __call__(self, values: Mapping[str, Tensor | int]) -> Results:
        """Run it again.

        Args:
            values: of the buffers: a number, or a tensor for the first rows. The others stay.

        Returns:
            Tensors that the next call overwrites.
        """
        fill(self._buffers, values)
        self._replay()
        return self._results


Key = tuple[object, ...]


class Recordings:
    """What was recorded for one model, by what it was recorded for: the latest few.

    A function is recorded when it is asked for the second time: single points are not worth it.
    """

    def __init__(self) -> None:
        self._held: OrderedDict[Key, Recorded] = OrderedDict()
        self._asked: set[Key] = set()
        self._failed = False

    def get(self, key: Key) -> Recorded | None:
        """What is held under this key."""
        key = _whole(key)
        if key in self._held:
            self._held.move_to_end(key)
        return self._held.get(key)

    def drop(self, key: Key) -> None:
        """Forget it, to record it anew when it is asked for again."""
        self._held.pop(_whole(key), None)

    def asked_again(self, key: Key) -> bool:
        """Whether this is to be recorded now."""
        key = _whole(key)
        again = key in self._asked and not self._failed
        self._asked.add(key)
        return again

    def record(
        self, key: Key, function: Callable[[Buffers], Results], buffers: Buffers
    ) -> Recorded | None:
        """Record a function on these buffers; None, and a line in the log, if it cannot be."""
        record = RECORDERS[next(iter(buffers.values())).device.type]
        try:
            recorded = Recorded(function, buffers, record)
        except RuntimeError as error:
            self._failed = True
            say_once(logging.WARNING, f"recording one failed: {error}")
            return None
        self._held[_whole(key)] = recorded
        if len(self._held) > _MOST:
            self._held.popitem(last=False)
        return recorded


def _whole(key: Key) -> Key:
    return (*key, torch.get_float32_matmul_precision())


def fill(buffers: Buffers, values: Mapping[str, Tensor | int]) -> None:
    """Write numbers, and tensors into the first rows."""
    for name, value in values.items():
        if isinstance(value, Tensor):
            buffers[name][: len(value)].copy_(value)
        else:
            buffers[name].fill_(value)


_KERNEL_BY_KERNEL = "forward passes run kernel by kernel, not as a CUDA graph"
_said: set[str] = set()


def say_once(level: int, reason: str, what: str = _KERNEL_BY_KERNEL) -> None:
    """Log why forward passes, or a part of them, are not recorded: once for each reason."""
    if reason not in _said:
        _said.add(reason)
        logger.log(level, "%s: %s", what, reason)
