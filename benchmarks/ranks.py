"""Memory of each rank, and what ranks send each other, where several share one structure.

    python -m benchmarks.ranks --config configs/oc20/all_md/eqv2_31M.yml --atoms 153 --ranks 1 2 3

One training step, forward and backward, on the CPU with gloo, as `fairchem main --gp-gpus` takes
it. Then the same within a budget of memory that one rank exceeds: half-way between the peaks of one
and two. Memory is that above the model and its gradients. Bytes are those that one rank hands to
collectives of the graph's group, in features and results, forward and backward.
"""

from __future__ import annotations

import argparse
import functools
import json
import logging
import os
import tempfile
import threading
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from fairchem.core.common import gp_utils
from fairchem.core.common.registry import registry
from torch.nn.parallel import DistributedDataParallel

from benchmarks.instruments import CpuMeter
from benchmarks.measure import batch_of, model_config
from benchmarks.slab import SEED

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

MB = 1e6
OUT_OF_MEMORY = 137  # status of a process that was killed for its memory


@dataclass
class Result:
    """Of one rank.

    Attributes:
        peak: bytes above the model.
        calls: of collectives with tensors of features or results.
        gathered: bytes that it contributed to gathers (forward).
        summed: bytes that it handed to sums (backward).
        blocks: of the model.
    """

    peak: int
    calls: int
    gathered: int
    summed: int
    blocks: int


class Traffic:
    """Counts what goes through the collectives that the graph's ranks use."""

    def __init__(self) -> None:
        self.calls = self.gathered = self.summed = 0

    def start(self) -> None:
        """Stand before them, for the rest of this process."""
        gather, reduce = dist.all_gather, gp_utils.all_reduce

        @functools.wraps(gather)
        def counted_gather(tensors: Any, tensor: torch.Tensor, *args: Any, **settings: Any) -> Any:
            if tensor.is_floating_point():
                self.calls += 1
                self.gathered += tensor.nbytes
            return gather(tensors, tensor, *args, **settings)

        @functools.wraps(reduce)
        def counted_reduce(tensor: torch.Tensor, *args: Any, **settings: Any) -> torch.Tensor:
            self.calls += 1
            self.summed += tensor.nbytes if dist.get_world_size() > 1 else 0
            return reduce(tensor, *args, **settings)

        dist.all_gather, gp_utils.all_reduce = counted_gather, counted_reduce


def step(rank: int, ranks: int, config: str, atoms: int, budget: int, folder: str) -> None:
    """Make one training step as one of so many ranks, and write a :class:`Result`.

    Args:
        budget: bytes that may be resident above the model; 0 for any number.
    """
    torch.set_num_threads(1)
    os.environ["LOCAL_RANK"] = str(rank)
    rendezvous = f"file://{folder}/rendezvous"
    dist.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=ranks)
    gp_utils.setup_gp({"gp_gpus": ranks, "distributed_backend": "gloo"})
    torch.manual_seed(SEED)
    keys = model_config(config)
    bare = registry.get_model_class("fairchem_equiformer.EquiformerV2")(**keys)
    model = DistributedDataParallel(bare)
    differentiate(model, 13)  # leaves gradients, and the tables of the first call, in their place
    traffic, meter = Traffic(), CpuMeter()
    traffic.start()
    before = meter.allocated()
    meter.reset_peak()
    if budget:
        end_beyond(before + budget)
    differentiate(model, atoms)
    result = Result(
        meter.peak() - before, traffic.calls, traffic.gathered, traffic.summed, bare.num_layers
    )
    Path(folder, f"{rank}.json").write_text(json.dumps(asdict(result)))


def differentiate(model: torch.nn.Module, atoms: int) -> None:
    """The forward and backward pass of a training step on one slab."""
    out = model(batch_of(atoms, 1))
    (out["energy"].abs().mean() + 100 * out["forces"].norm(dim=-1).mean()).backward()


def end_beyond(limit: int) -> None:
    """End this process, as a container does, once more than so many bytes are resident."""

    def watch() -> None:
        while CpuMeter._status("VmRSS") <= limit:  # noqa: SLF001
            time.sleep(0.002)
        os._exit(OUT_OF_MEMORY)

    threading.Thread(target=watch, daemon=True).start()


def on_ranks(ranks: int, config: str, atoms: int, budget: int = 0) -> list[Result] | str:
    """What each of so many ranks found, or why one failed."""
    with tempfile.TemporaryDirectory() as folder:
        arguments = (ranks, config, atoms, budget, folder)
        try:
            torch.multiprocessing.start_processes(step, arguments, ranks, start_method="fork")
        except torch.multiprocessing.ProcessExitedException as error:
            if error.exit_code != OUT_OF_MEMORY:
                raise
            return "does not fit"
        files = [Path(folder, f"{rank}.json") for rank in range(ranks)]
        return [Result(**json.loads(file.read_text())) for file in files]


def table(found: dict[int, list[Result]]) -> Iterator[str]:
    """Lines of Markdown, one row for a number of ranks."""
    yield "| ranks | peak of a rank / MB | gathered in a block / MB | summed in a block / MB |"
    yield "|---|---|---|---|"
    for ranks, results in found.items():
        largest = max(result.peak for result in results) / MB
        gathered, summed = (
            max(getattr(result, name) / result.blocks for result in results) / MB
            for name in ("gathered", "summed")
        )
        yield f"| {ranks} | {largest:.0f} | {gathered:.2f} | {summed:.2f} |"


def main() -> None:
    """Measure, print the table, and try the budget."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--config", default="configs/oc20/all_md/eqv2_31M.yml")
    parser.add_argument("--atoms", type=int, default=153)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 3])
    given = parser.parse_args()
    logging.disable(logging.WARNING)  # on ties between neighbours
    run: Callable[..., list[Result] | str] = functools.partial(
        on_ranks, config=given.config, atoms=given.atoms
    )
    found = {ranks: run(ranks) for ranks in given.ranks}
    print(*table(found), sep="\n")
    peaks = {ranks: max(result.peak for result in results) for ranks, results in found.items()}
    if {1, 2} <= peaks.keys():
        budget = (peaks[1] + peaks[2]) // 2
        for ranks in (1, 2):
            result = run(ranks, budget=budget)
            said = result if isinstance(result, str) else "fits"
            print(f"within {budget / MB:.0f} MB on {ranks}: {said}")


if __name__ == "__main__":
    main()
