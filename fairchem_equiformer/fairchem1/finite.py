"""Names NaN and infinity in the labels and predictions of a batch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fairchem_equiformer.fairchem1.loss import MaskedMAE

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch_geometric.data import Batch

NAMED = 5  # entries that are named one by one


def all_finite(loss: Tensor, out: dict[str, Tensor], targets: list[str]) -> Tensor:
    """Whether a loss and the predictions that it compares are finite, as a tensor [].

    Nothing waits for a GPU here. The predictions are looked at, since fairchem's loss takes those
    that are NaN for zero.
    """
    values = [loss, *(out[target] for target in targets if target in out)]
    return (
        torch.stack([value.detach().sum(dtype=torch.float32) for value in values]).isfinite().all()
    )


def describe(trainer: Any, out: dict[str, Tensor], batch: Batch) -> list[str]:
    """What is not finite in a batch: target, label or prediction, and whose.

    Args:
        trainer: one of fairchem's.
        out: predictions by target, [B, n] or [N, n].
        batch: with the labels.

    Returns:
        A phrase for each of the first few entries, and one for how many more there are.
    """
    found = [
        f"the {kind} of {target} of {whose(batch, row, level)} is {value}"
        for target, info in trainer.loss_functions
        for level in [trainer.output_targets.get(target, {}).get("level", "system")]
        for kind, rows in _values(trainer, target, info["fn"].loss_fn, out, batch)
        for row, value in _bad_rows(rows)
    ]
    if len(found) > NAMED:
        return [*found[:NAMED], f"{len(found) - NAMED} more are not finite"]
    return found or [f"the loss of {everyone(batch)} is not finite, though what it compares is"]


def _values(
    trainer: Any, target: str, loss: Any, out: dict[str, Tensor], batch: Batch
) -> Iterator[tuple[str, Tensor]]:
    """Labels and predictions by rows of a target; zero where the loss does not look."""
    settings = trainer.output_targets.get(target, {})
    of_atoms = settings.get("level") == "atom"
    count = int(batch.natoms.sum()) if of_atoms else len(batch.natoms)
    if target in batch:
        label = batch[target].detach().reshape(count, -1).clone()
        if of_atoms and settings.get("train_on_free_atoms"):
            label[batch.fixed != 0] = 0
        if isinstance(loss, MaskedMAE):
            label[label.isnan()] = 0  # means that there is none
        yield "label", label
    if target in out:
        yield "prediction", out[target].detach().reshape(count, -1)


def _bad_rows(rows: Tensor) -> Iterator[tuple[int, float]]:
    """Indices of the rows that are not finite, and the first such value of each."""
    for row in (~rows.isfinite()).any(dim=1).nonzero().flatten().tolist():
        values = rows[row]
        yield row, values[~values.isfinite()][0].item()


def whose(batch: Batch, row: int, level: str) -> str:
    """The structure, and the atom in it, that a row of a target belongs to."""
    if level != "atom":
        return _structure(batch, row)
    ends = batch.natoms.cumsum(0).tolist()
    system = next(index for index, end in enumerate(ends) if row < end)
    first = ends[system - 1] if system else 0
    return f"atom {row - first} of {_structure(batch, system)}"


def everyone(batch: Batch) -> str:
    """All structures of a batch."""
    return "; ".join(_structure(batch, system) for system in range(len(batch.natoms)))


def _structure(batch: Batch, system: int) -> str:
    names = []
    for key in ("sid", "fid"):
        if key in batch:
            value = batch[key][system]
            names.append(f"{key} {value.item() if isinstance(value, Tensor) else value}")
    return ", ".join(names) or f"structure {system} of the batch"
