"""What products in few digits cost: ``python -m benchmarks.precision train``, then ``... table``.

``checkpoint`` does so for a checkpoint and structures of yours: energies, forces and stresses of
the calculator in float32 and in bfloat16 against those in float64. A neighbour list that cuts
between equally far neighbours, as of a perfect crystal, may differ between float64 and the others.

``train`` gives a published model's size weights that look trained: some steps on the demo's data
(examples/emt/generate.py makes them). ``table`` compares energies and forces with products in
float32, TF32, bfloat16 and float16 with those in float64, on the same weights and edges. ``curves``
trains the demo's model in float32 and under autocast in bfloat16.

There is no TF32 on a CPU: there both factors of every matrix product in float32 are rounded to
TF32's 10 bits, and the product is float32's. That is the rounding of a tensor core's inputs, not
its sum.
"""

from __future__ import annotations

import argparse
import copy
import math
import pickle
import sys
import time
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple
from unittest.mock import patch

import lmdb
import numpy as np
import torch
from ase.io import read
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.gpu import keys_of
from fairchem_equiformer.calculator import EquiformerCalculator
from fairchem_equiformer.checkpoints import load
from fairchem_equiformer.graph.edge_graph import EdgeGraph
from fairchem_equiformer.models import EquiformerV2
from fairchem_equiformer.ops.native import loader

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from ase import Atoms
    from torch import Tensor

DATA = Path(__file__).parents[1] / "examples/emt/data/s2ef"
# Mean and spread of the demo's labels, as examples/emt/eqv2_emt.yml has them: eV and eV/Angstrom.
ENERGY_MEAN, ENERGY_SPREAD, FORCE_SPREAD = -0.16, 0.7, 0.5
WARMUP = 20  # steps
UNITS = {"energy": "meV", "forces": "meV/Å", "stress": "meV/Å³"}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# Of examples/emt/eqv2_emt.yml, where it differs from the published models.
DEMO = {
    "max_neighbors": 16,
    "max_radius": 6.0,
    "num_layers": 2,
    "lmax_list": [2],
    "mmax_list": [2],
    "grid_resolution": 8,
    "sphere_channels": 32,
    "attn_hidden_channels": 16,
    "num_heads": 4,
    "attn_alpha_channels": 16,
    "ffn_hidden_channels": 32,
    "edge_channels": 32,
}


def model_of(name: str) -> EquiformerV2:
    """A published model, the demo's or a tiny one, as it begins."""
    keys = keys_of("tiny") | DEMO if name == "demo" else keys_of(name)
    return EquiformerV2(**keys, avg_num_nodes=17.4, avg_degree=20.0)


def frames(split: str, folder: Path) -> list[SimpleNamespace]:
    """The structures of a split with their labels, each a batch of its own."""
    path = folder / split / "data.0000.lmdb"
    found = []
    with lmdb.open(str(path), subdir=False, readonly=True, lock=False) as file:  # noqa: SIM117
        with file.begin() as entries:
            for index in range(pickle.loads(entries.get(b"length"))):  # noqa: S301  our own data
                data = pickle.loads(entries.get(str(index).encode()))  # noqa: S301
                found.append(
                    SimpleNamespace(
                        pos=data["pos"],
                        cell=data["cell"],
                        pbc=torch.ones(1, 3, dtype=torch.bool),
                        natoms=torch.tensor([data["natoms"]]),
                        atomic_numbers=data["atomic_numbers"].long(),
                        fixed=data["fixed"],
                        forces=data["forces"],
                        energy=torch.tensor([data["energy"]], dtype=torch.float32),
                    )
                )
    return found


def joined(batch: Sequence[SimpleNamespace]) -> SimpleNamespace:
    """Several structures as one batch."""
    names = vars(batch[0])
    return SimpleNamespace(**{k: torch.cat([getattr(one, k) for one in batch]) for k in names})


def loss_of(model: EquiformerV2, data: SimpleNamespace) -> tuple[Tensor, Tensor]:
    """The demo's loss of a batch, and the mean error of its free atoms' forces in eV/Angstrom."""
    out = model(data)
    energy = out["energy"].float() - (data.energy - ENERGY_MEAN) / ENERGY_SPREAD
    difference = (out["forces"].float() - data.forces / FORCE_SPREAD)[data.fixed == 0]
    error = FORCE_SPREAD * difference.detach().abs().mean()
    return 2 * energy.abs().mean() + 20 * difference.norm(dim=1).mean(), error


def trained(
    name: str, steps: int, lr: float, folder: Path, *, dtype: str, seed: int, size: int
) -> Iterator[tuple[EquiformerV2, float]]:
    """Train from scratch; after each step, the model and the error of its batch's forces.

    Args:
        name: of the model.
        steps: of AdamW; the rate rises for 20 of them and falls as a cosine.
        lr: the highest rate.
        folder: of the data.
        dtype: of products, a key of :data:`DTYPES`.
        seed: of weights and order.
        size: structures in a batch.
    """
    torch.manual_seed(seed)
    model = model_of(name)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=1e-3)
    data = frames("train", folder)
    order = torch.randperm(len(data)).repeat(1 + steps * size // len(data)).tolist()
    for step in range(steps):
        fall = 0.5 * (1 + math.cos(math.pi * step / steps))
        for group in optimizer.param_groups:
            group["lr"] = lr * min(1.0, (step + 1) / WARMUP) * fall
        batch = joined([data[index] for index in order[step * size : (step + 1) * size]])
        with torch.autocast("cpu", DTYPES[dtype], enabled=dtype != "fp32"):
            loss, error = loss_of(model, batch)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 100)
        optimizer.step()
        yield model, error.item()


def train(options: argparse.Namespace) -> None:
    """Write weights every ten steps, and say how far it is."""
    start, errors = time.monotonic(), []
    progress = trained(
        options.model, options.steps, options.lr, options.data, dtype="fp32", seed=0, size=1
    )
    for step, (model, error) in enumerate(progress, start=1):
        errors.append(error)
        if step % 10 == 0 or step == options.steps:
            mean = sum(errors[-10:]) / len(errors[-10:])
            print(f"step {step}, {time.monotonic() - start:.0f} s: forces {mean:.3f} eV/A")
            content = {"model": options.model, "steps": step, "state_dict": model.state_dict()}
            partial = options.out.with_suffix(".partial")
            torch.save(content, partial)
            partial.replace(options.out)


# What products cost


class RoundedToTF32(TorchDispatchMode):
    """Rounds both factors of matrix products in float32 to the 10 bits of TF32."""

    FACTORS: ClassVar = {"mm": 0, "bmm": 0, "addmm": 1, "addmm_": 1, "baddbmm": 1}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation, on rounded factors if it is such a product."""
        first = self.FACTORS.get(func.overloadpacket.__name__)
        if first is not None and args[first].dtype == torch.float32:
            factors = [tf32(factor) for factor in args[first : first + 2]]
            args = (*args[:first], *factors, *args[first + 2 :])
        return func(*args, **(kwargs or {}))


def tf32(x: Tensor) -> Tensor:
    """Float32 rounded to 10 bits of mantissa, ties to even."""
    bits = x.contiguous().view(torch.int32)
    bits = bits + 0xFFF + ((bits >> 13) & 1)
    return (bits & ~0x1FFF).view(torch.float32)


@contextmanager
def products(mode: str, device: str) -> Iterator[None]:
    """Within, matrix products are fp32, tf32, bf16 or fp16."""
    on_cpu = device == "cpu"
    torch.set_float32_matmul_precision("high" if mode == "tf32" else "highest")
    emulated = mode == "tf32" and on_cpu
    # The CPU's compiled kernels are none of PyTorch's operations.
    in_pytorch = patch.object(loader, "library", lambda: None) if emulated else nullcontext()
    rounded = RoundedToTF32() if emulated else nullcontext()
    dtype = DTYPES.get(mode, torch.float32)
    reduced = torch.autocast(device, dtype, enabled=dtype != torch.float32)
    try:
        with in_pytorch, rounded, reduced:
            yield
    finally:
        torch.set_float32_matmul_precision("highest")


class Errors(NamedTuple):
    """Differences from float64 over some structures."""

    energy: float  # meV, mean
    forces: float  # meV/Angstrom, mean over components
    worst: float  # meV/Angstrom, of a component
    relative: float  # mean of forces over the mean force


def exact_results(model: EquiformerV2, graph: EdgeGraph) -> dict[str, Tensor]:
    """Results in float64 on the edges that float32 finds, and their float32 vectors."""
    vector = graph.vector.double()
    wide = replace(graph, vector=vector, distance=vector.norm(dim=1))
    return copy.deepcopy(model).double().of_graph(wide)


def errors(
    model: EquiformerV2, data: Sequence[SimpleNamespace], device: str
) -> dict[str, Errors | str]:
    """Errors in each mode; in words where a mode cannot run."""
    graphs = [model.read(one) for one in data]
    exact = [exact_results(model, graph) for graph in graphs]
    found: dict[str, Errors | str] = {}
    for mode in ("fp32", "tf32", "bf16", "fp16"):
        try:
            with products(mode, device):
                results = [model.of_graph(graph) for graph in graphs]
        except RuntimeError as error:
            found[mode] = str(error).splitlines()[0]
            continue
        pairs = list(zip(results, exact, strict=True))
        energy = torch.cat([got["energy"].double() - want["energy"] for got, want in pairs])
        forces = torch.cat([got["forces"].double() - want["forces"] for got, want in pairs])
        scale = torch.cat([want["forces"] for _, want in pairs]).abs().mean()
        found[mode] = Errors(
            1e3 * ENERGY_SPREAD * energy.abs().mean().item(),
            1e3 * FORCE_SPREAD * forces.abs().mean().item(),
            1e3 * FORCE_SPREAD * forces.abs().max().item(),
            (forces.abs().mean() / scale).item(),
        )
    return found


@torch.no_grad()
def table(options: argparse.Namespace) -> None:
    """Print a row for each model and mode."""
    data = frames("val_id", options.data)
    data = data[:: max(1, len(data) // options.structures)][: options.structures]
    print("| model | steps | products | energy / meV | forces / meV/Å | worst | relative |")
    print("|---|---|---|---|---|---|---|")
    for path in options.weights:
        content = torch.load(path, weights_only=True)
        model = model_of(content["model"]).eval().to(options.device)
        model.load_state_dict(content["state_dict"])
        here = [
            SimpleNamespace(**{k: v.to(options.device) for k, v in vars(one).items()})
            for one in data
        ]
        for mode, made in errors(model, here, options.device).items():
            cells = made if isinstance(made, str) else " | ".join(f"{value:.2g}" for value in made)
            name = "tf32, emulated" if mode == "tf32" and options.device == "cpu" else mode
            print(f"| {content['model']} | {content['steps']} | {name} | {cells} |", flush=True)


def checkpoint(options: argparse.Namespace) -> None:
    """Print errors of a checkpoint on the structures of files that ASE reads."""
    structures = [atoms for path in options.structures for atoms in read(path, index=":")]
    loaded = load(options.checkpoint)
    exact = calculated(EquiformerCalculator(loaded, dtype="float64"), structures)
    print("| products | property | mean | largest | relative |")
    print("|---|---|---|---|---|")
    for dtype in ("float32", "bfloat16"):
        found = calculated(EquiformerCalculator(loaded, dtype=dtype), structures)
        for name, wanted in exact.items():
            error = np.abs(found[name] - wanted)
            relative = error.mean() / np.abs(wanted).mean()
            unit = UNITS[name]
            print(
                f"| {dtype} | {name} / {unit} | {1e3 * error.mean():.2g} | "
                f"{1e3 * error.max():.2g} | {relative:.2g} |"
            )


def calculated(calculator: EquiformerCalculator, structures: Sequence[Atoms]) -> dict[str, Any]:
    """Energies, forces and stresses, those of them that it predicts, in one row."""
    names = [name for name in UNITS if name in calculator.implemented_properties]
    rows: dict[str, list[Any]] = {name: [] for name in names}
    for atoms in structures:
        for name in names:
            rows[name].append(np.ravel(calculator.get_property(name, atoms)))
    return {name: np.concatenate(row) for name, row in rows.items()}


# Training


@torch.no_grad()
def validation(model: EquiformerV2, data: Sequence[SimpleNamespace]) -> float:
    """Mean error of free atoms' forces, meV/Angstrom."""
    model.eval()
    found = [loss_of(model, joined(data[i : i + 16]))[1] for i in range(0, len(data), 16)]
    model.train()
    return 1e3 * torch.stack(found).mean().item()


def curves(options: argparse.Namespace) -> None:
    """Train the demo's model in float32 and in bfloat16; print its errors as they fall."""
    data = frames("val_id", options.data)
    columns = [(dtype, seed) for dtype in ("fp32", "bf16") for seed in range(options.seeds)]
    rows: dict[int, list[float]] = {}
    for dtype, seed in columns:
        training = trained(
            "demo", options.steps, 0.005, options.data, dtype=dtype, seed=seed, size=4
        )
        for step, (model, _) in enumerate(training, start=1):
            if step % options.every == 0 or step == options.steps:
                rows.setdefault(step, []).append(validation(model, data))
                print(f"{dtype}, seed {seed}, step {step}: {rows[step][-1]:.1f}", file=sys.stderr)
    print("| step | " + " | ".join(f"{dtype}, seed {seed}" for dtype, seed in columns) + " |")
    print("|---" * (1 + len(columns)) + "|")
    for step, values in rows.items():
        print(f"| {step} | " + " | ".join(f"{value:.1f}" for value in values) + " |")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a command."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.precision", description=__doc__)
    commands = parser.add_subparsers(required=True)
    training = commands.add_parser("train", help="weights that look trained")
    training.add_argument("--model", default="31M", help="31M, 83M, 153M, demo or tiny")
    training.add_argument("--steps", type=int, default=250)
    training.add_argument("--lr", type=float, default=4e-4)
    training.add_argument("--out", type=Path, required=True)
    training.set_defaults(run=train)
    comparing = commands.add_parser("table", help="errors of products in few digits")
    comparing.add_argument("weights", type=Path, nargs="+", help="files that train wrote")
    comparing.add_argument("--structures", type=int, default=8)
    comparing.add_argument("--device", default="cpu")
    comparing.set_defaults(run=table)
    checking = commands.add_parser("checkpoint", help="errors of a checkpoint in bfloat16")
    checking.add_argument("checkpoint", type=Path)
    checking.add_argument("structures", type=Path, nargs="+", help="files that ASE reads")
    checking.set_defaults(run=checkpoint)
    drawing = commands.add_parser("curves", help="the demo's model in float32 and in bfloat16")
    drawing.add_argument("--steps", type=int, default=300)
    drawing.add_argument("--every", type=int, default=100)
    drawing.add_argument("--seeds", type=int, default=2)
    drawing.set_defaults(run=curves)
    for command in (training, comparing, drawing):
        command.add_argument("--data", type=Path, default=DATA, help="folder with train, val_id")
    options = parser.parse_args(arguments)
    options.run(options)


if __name__ == "__main__":
    main()
