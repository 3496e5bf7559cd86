"""Several processes, by gloo on the CPU: data-parallel, and graph-parallel (`--gp-gpus`).

The processes give the outputs of one, and data-parallel averaging leaves the gradient of one.
"""

from __future__ import annotations

import os
from datetime import timedelta
from typing import TYPE_CHECKING

import pytest
import torch
import torch.distributed as dist
from fairchem.core.common import gp_utils
from fairchem.core.modules.loss import DDPLoss
from torch.nn.parallel import DistributedDataParallel

from fairchem_equiformer import Equiformer
from tests.models import ours, results, scatter_weights
from tests.structures import batch_of, in_double, noisy, single_atom, slab
from tests.test_equiformer_v1 import DERIVED
from tests.test_equiformer_v1 import KEYS as EQUIFORMER_KEYS
from tests.test_hydra import hydra
from tests.tolerances import assert_all_close, assert_close

if TYPE_CHECKING:
    from pathlib import Path

# torch 2.4's own activation checkpointing calls autocast by its old name.
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.cpu.amp.autocast:FutureWarning")

PROCESSES = 2

MODELS = {
    "flat": ours,
    "flat, gate, activation_checkpoint": lambda: ours(
        use_gate_act=True, activation_checkpoint=True
    ),
    "hydra": hydra,
    "Equiformer": lambda: equiformer(regress_forces=True),
    "Equiformer, derivatives": lambda: equiformer(**DERIVED).double(),
    "Equiformer, derivatives, dot products, smooth cutoff": lambda: equiformer(
        **DERIVED, attention="dot_product", smooth_cutoff=True, vector_outputs=["other"]
    ).double(),
    "DeNS": lambda: hydra(
        {
            "energy": {"module": "fairchem_equiformer.DeNSEnergyHead", "use_denoising": False},
            "forces": {"module": "fairchem_equiformer.DeNSForceHead"},
        },
        keys={
            "model": "fairchem_equiformer.DeNSBackbone",
            "use_noise_schedule_sigma_encoding": True,
        },
    ),
}
DATA_PARALLEL = ["flat", "Equiformer", "hydra", "DeNS"]
# Of the loss of labelled atoms: how many each process has.
LABELLED = {"unlike numbers": (2, 7), "one process without": (0, 3), "none": (0, 0)}


def equiformer(**changes):
    return scatter_weights(Equiformer(**{**EQUIFORMER_KEYS, **changes}))


def model_of(name):
    torch.manual_seed(0)
    return MODELS[name]()


def two_structures(name):
    """21 atoms: shares of unlike size, and the second structure is in both."""
    batch = batch_of(slab("Cu", "CO", 1), slab("Pt", "H2O", 2))
    if "derivatives" in name:
        return in_double(batch)
    return noisy(batch, mask=0.5) if name == "DeNS" else batch


def work(rank: int, folder: Path) -> None:
    """What each process does; results go to a file for each rank."""
    torch.set_num_threads(1)
    os.environ["LOCAL_RANK"] = str(rank)  # which fairchem's own set-up reads
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder / 'rendezvous'}",
        rank=rank,
        world_size=PROCESSES,
        timeout=timedelta(minutes=5),
    )
    saved = {}
    for name in DATA_PARALLEL:
        model = DistributedDataParallel(model_of(name))
        for seed in range(2):  # a second step fails if a parameter had no gradient in the first
            saved[f"data-parallel, {name}"] = results(model, shard(name, rank, seed))
    saved["masked_mae"] = {
        case: masked_loss(DistributedDataParallel(layer()), *partly_labelled(rank, sizes[rank]))
        for case, sizes in LABELLED.items()
    }
    gp_utils.setup_gp({"gp_gpus": PROCESSES, "distributed_backend": "gloo"})
    for name in MODELS:
        model = DistributedDataParallel(model_of(name))
        saved[f"graph-parallel, {name}"] = results(model, two_structures(name))
    saved["graph-parallel, single atom"] = results(
        DistributedDataParallel(model_of("flat")), batch_of(single_atom())
    )
    torch.save(saved, folder / f"{rank}.pt")
    gp_utils.cleanup_gp()
    dist.destroy_process_group()


def shard(name, rank, seed=1):
    """A batch of its own for each process; with DeNS, that of one process is noisy."""
    batch = batch_of(slab("Cu", "CO", 10 * seed + rank), slab("Ni", "H2O", 20 * seed + rank))
    return noisy(batch) if name == "DeNS" and rank == seed else batch


def layer():
    torch.manual_seed(0)
    return torch.nn.Linear(3, 3, bias=False)


def partly_labelled(seed, labelled):
    """Inputs and targets of eight atoms; beyond the first few the targets are NaN."""
    x, target = torch.randn(2, 8, 3, generator=torch.Generator().manual_seed(seed))
    target[labelled:] = torch.nan
    return x, target


def masked_loss(model, x, target):
    """The loss, and the gradient of the model's one parameter."""
    loss = DDPLoss("masked_mae", None)(model(x), target, torch.tensor([len(x)]))
    loss.backward()
    return loss.item(), next(model.parameters()).grad


@pytest.fixture(scope="module")
def processes(tmp_path_factory):
    """What two processes computed: one dict for each."""
    folder = tmp_path_factory.mktemp("processes")
    torch.multiprocessing.spawn(work, (folder,), nprocs=PROCESSES)
    return [torch.load(folder / f"{rank}.pt") for rank in range(PROCESSES)]


def assert_gradients(by_process, expected):
    for gradients in by_process:
        for name, value in expected.items():
            assert_close(gradients[f"module.{name}"], value, "gradients", name=name)


@pytest.mark.parametrize("name", DATA_PARALLEL)
def test_data_parallel(processes, name):
    single = [results(model_of(name), shard(name, rank)) for rank in range(PROCESSES)]
    for saved, (expected, _) in zip(processes, single, strict=True):
        for key, value in expected.items():
            assert torch.equal(saved[f"data-parallel, {name}"][0][key], value), key
    mean = {
        parameter: sum(gradients[parameter] for _, gradients in single) / PROCESSES
        for parameter in single[0][1]
    }
    assert_gradients([saved[f"data-parallel, {name}"][1] for saved in processes], mean)


@pytest.mark.parametrize("name", MODELS)
def test_graph_parallel(processes, name):
    expected, gradients = results(model_of(name), two_structures(name))
    for saved in processes:
        assert_all_close(saved[f"graph-parallel, {name}"][0], expected, "outputs")
    assert_gradients([saved[f"graph-parallel, {name}"][1] for saved in processes], gradients)


def test_graph_parallel_with_fewer_atoms_than_processes(processes):
    expected, gradients = results(model_of("flat"), batch_of(single_atom()))
    by_process = [saved["graph-parallel, single atom"] for saved in processes]
    for outputs, _ in by_process:
        assert torch.equal(outputs["forces"], expected["forces"])
        assert_close(outputs["energy"], expected["energy"], "outputs")
    assert_gradients([of_process for _, of_process in by_process], gradients)


@pytest.mark.parametrize("case", LABELLED)
def test_masked_mae_is_the_mean_over_the_labels_of_all_processes(processes, case):
    parts = [partly_labelled(rank, size) for rank, size in enumerate(LABELLED[case])]
    x, target = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
    loss, grad = masked_loss(layer(), x, target)
    found = [saved["masked_mae"][case] for saved in processes]
    assert sum(value for value, _ in found) / PROCESSES == pytest.approx(loss)
    for _, of_process in found:
        torch.testing.assert_close(of_process, grad)
