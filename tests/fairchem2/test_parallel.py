"""Graph-parallel by 2.x's own groups: two processes share a batch and give what one gives."""

from __future__ import annotations

import os
import warnings
from datetime import timedelta
from types import SimpleNamespace
from typing import TYPE_CHECKING

import pytest
import torch
import torch.distributed as dist

from tests import golden

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from fairchem.core.common import gp_utils
    from fairchem.core.datasets.atomic_data import AtomicData, atomicdata_list_to_batch
    from fairchem.core.modules.loss import DDPMTLoss, L2NormLoss, MAELoss

    from fairchem_equiformer.fairchem2 import HydraModel, load_predict_unit

if TYPE_CHECKING:
    from pathlib import Path

PROCESSES = 2
EQUIFORMER = {
    "max_neighbors": 12,
    "max_num_elements": 90,
    "use_tag_embedding": False,
    "regress_forces": True,
    "num_layers": 2,
    "irreps_node_embedding": "16x0e+8x1e",
    "irreps_head": "8x0e+4x1e",
    "num_heads": 2,
    "irreps_mlp_mid": "16x0e+8x1e",
    "irreps_feature": "16x0e+8x1e",
    "alpha_drop": 0.0,
}
BATCHES = {
    "slab, molecule, crystal": ("CO on Cu", "ethanol without a cell", "MgO"),
    "one atom": ("one atom alone",),
}


def batch(names):
    structures = [golden.structure(name) for name in names]
    return atomicdata_list_to_batch([AtomicData.from_ase(a, task_name="omat") for a in structures])


def outputs_and_gradients(model, data):
    """Results of the heads, and the gradients of a loss of fairchem's, averaged over processes."""
    model.zero_grad()
    found = model(data)
    atoms, systems = (torch.ones(n, dtype=torch.bool) for n in (len(data.pos), len(data.natoms)))
    terms = [
        (MAELoss(), found["energy"]["energy"], systems),
        (L2NormLoss(), found["forces"]["forces"], atoms),
    ]
    if "stress" in found:
        terms.append((MAELoss(), found["stress"]["stress"], systems[:, None].expand(-1, 9)))
    loss = sum(
        DDPMTLoss(fn)(value, torch.ones_like(value), mult_mask=mask, natoms=data.natoms)
        for fn, value, mask in terms
    )
    loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters()}
    if dist.is_initialized():
        for gradient in gradients.values():
            dist.all_reduce(gradient)
            gradient.div_(PROCESSES)  # as DistributedDataParallel does
    results = {head: value[head].detach() for head, value in found.items()}
    return results, gradients


def trainable():
    unit = load_predict_unit(golden.checkpoint("hydra"), device="cpu")
    return unit, unit.model.module.requires_grad_(True)


def equiformer(**keys):
    torch.manual_seed(0)
    here = "fairchem_equiformer.fairchem2"
    heads = {
        name: {"module": f"{here}.EquiformerHead", "output_name": name}
        for name in ("energy", "forces")
    }
    return HydraModel({"model": f"{here}.EquiformerBackbone", **EQUIFORMER, **keys}, heads)


def work(rank: int, folder: Path) -> None:
    """What each process does; results go to a file for each rank."""
    torch.set_num_threads(1)
    os.environ["LOCAL_RANK"] = str(rank)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder / 'rendezvous'}",
        rank=rank,
        world_size=PROCESSES,
        timeout=timedelta(minutes=5),
    )
    gp_utils.setup_graph_parallel_groups(PROCESSES, "gloo")
    unit, model = trainable()
    saved = {}
    for case, names in BATCHES.items():
        saved[case] = outputs_and_gradients(model, batch(names))
        saved[f"predicted {case}"] = unit.predict(batch(names))
        model.requires_grad_(True)
    names = BATCHES["slab, molecule, crystal"]
    saved["equiformer"] = outputs_and_gradients(equiformer(), batch(names))
    with pytest.raises(ValueError, match="leave out graph_parallel"):
        equiformer(direct_forces=False)(batch(names))
    torch.save(saved, folder / f"{rank}.pt")
    gp_utils.cleanup_gp()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def processes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("processes")
    torch.multiprocessing.spawn(work, (folder,), nprocs=PROCESSES)
    return [torch.load(folder / f"{rank}.pt") for rank in range(PROCESSES)]


@pytest.mark.parametrize("case", [*BATCHES, "equiformer"])
def test_outputs_and_gradients(processes, case):
    model = equiformer() if case == "equiformer" else trainable()[1]
    names = BATCHES.get(case, BATCHES["slab, molecule, crystal"])
    outputs, gradients = outputs_and_gradients(model, batch(names))
    for saved in processes:
        for key, value in outputs.items():
            assert golden.error(saved[case][0][key], value.numpy()) < golden.TOLERANCE, key
        for name, value in gradients.items():
            assert golden.error(saved[case][1][name], value.numpy()) < 3e-5, name


def test_predictions(processes):
    names = BATCHES["slab, molecule, crystal"]
    for saved in processes:
        found = saved["predicted slab, molecule, crystal"]
        energies = [golden.predicted(name, "hydra")["energy"] for name in names]
        for energy, expected in zip(found["energy"], energies, strict=True):
            assert golden.error(energy, expected) < golden.TOLERANCE


def test_settings_of_fairchem_are_read_when_asked():
    """Without groups, nothing is shared."""
    _, model = trainable()
    graph = SimpleNamespace(num_nodes=3, target=torch.zeros(0))
    assert model.backbone.node_share(graph) is None
