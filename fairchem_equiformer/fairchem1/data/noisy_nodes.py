"""Noisy Nodes (Godwin et al., ICLR 2022): corrupt positions in training, and learn to undo it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from fairchem.core.datasets.lmdb_dataset import LmdbDataset

if TYPE_CHECKING:
    from torch import Tensor
    from torch_geometric.data import Data

MOVING_TAGS = (1, 2)
"""OC20's tags of the atoms that relax: surface and adsorbate."""


@dataclass(frozen=True)
class NoisyNodes:
    """How structures are corrupted (EquiformerV2 paper, sections D.5 and F.3).

    Raises:
        ValueError: for a value outside its range; names it.
    """

    std: float  # of the noise, per component, Angstrom
    probability: float = 0.5  # that a structure is corrupted at all
    corrupt_ratio: float = 1.0  # probability of each of its atoms, if it is
    interpolate: bool = False  # begin from a random point on the way to the relaxed position

    def __post_init__(self) -> None:
        ranges = {"std": float("inf"), "probability": 1, "corrupt_ratio": 1}
        for key, most in ranges.items():
            if not 0 <= getattr(self, key) <= most:
                raise ValueError(
                    f"noisy_nodes: {key} is {getattr(self, key)!r}, it must be from 0 to {most}"
                )


def noise_of(config: dict[str, Any]) -> NoisyNodes | None:
    """The key ``noisy_nodes`` of a dataset's config; None without it.

    Raises:
        ValueError: for an unknown key or a bad value in it; names it.
    """
    settings = config.get("noisy_nodes")
    try:
        return None if settings is None else NoisyNodes(**settings)
    except TypeError as error:
        raise ValueError(f"noisy_nodes: {error}") from error


def corrupt(
    pos: Tensor,
    noise: NoisyNodes,
    generator: torch.Generator,
    *,
    movable: Tensor | None = None,
    relaxed: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Corrupt one structure, or leave it as it is: f x + (1 - f) x_relaxed + N(0, std^2).

    f is uniform in 0 to 1 for each atom with ``interpolate``, else 1.

    Args:
        pos: [N, 3] Angstrom.
        noise: the law.
        generator: all that is random comes from it.
        movable: [N] bool, atoms that may be chosen; by default all.
        relaxed: [N, 3] Angstrom, read with ``interpolate``.

    Returns:
        New positions [N, 3], and the atoms chosen [N] bool: none in a structure left as it is.

    Raises:
        ValueError: for ``interpolate`` without ``relaxed``.
    """
    chosen = torch.zeros(len(pos), dtype=torch.bool)
    if torch.rand((), generator=generator) >= noise.probability:
        return pos.clone(), chosen
    chosen = torch.rand(len(pos), generator=generator) < noise.corrupt_ratio
    if movable is not None:
        chosen = chosen & movable
    start = pos
    if noise.interpolate:
        if relaxed is None:
            raise ValueError("noisy_nodes: interpolate is True, but there are no relaxed positions")
        share = torch.rand(len(pos), 1, generator=generator, dtype=pos.dtype)
        start = share * pos + (1 - share) * relaxed
    moved = start + noise.std * torch.randn(pos.shape, generator=generator, dtype=pos.dtype)
    return torch.where(chosen[:, None], moved, pos), chosen


def item_generator(index: int) -> torch.Generator:
    """Randomness for one item of a dataset: of its own each time, and fixed by the run's seed.

    It continues PyTorch's global state, which a DataLoader sets anew in each worker and epoch. The
    index keeps apart the processes of a parallel training, whose seeds are equal.
    """
    draw = int(torch.empty((), dtype=torch.int64).random_())
    seed = np.random.SeedSequence([draw, int(index)]).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(seed))


class NoisyNodesLmdb(LmdbDataset):
    """OC20 IS2RE with the auxiliary task IS2RS: how far each atom still is from where it relaxes.

    Adds ``displacement`` [N, 3] in Angstrom to each structure that has ``pos_relaxed``: from the
    position in the input to the relaxed one, NaN for bulk atoms (tag 0). Its scale is a normalizer
    of fairchem's. A relaxed position on the other side of the cell is taken back by a lattice
    vector.

    With ``noisy_nodes`` (the keys of :class:`NoisyNodes`) surface and adsorbate atoms are
    corrupted, and the displacement is that from the corrupted position. It stands under
    ``train_split_settings``, which fairchem hands to the training set alone.
    """

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__(config)
        self.noise = noise_of(config)

    def __getitem__(self, idx: int) -> Data:
        """One structure.

        Raises:
            ValueError: if it lacks what the target or the noise is made from.
        """
        data = super().__getitem__(idx)
        relaxed = getattr(data, "pos_relaxed", None)
        if relaxed is None:
            if self.noise is not None:
                raise ValueError(f"{self._name(data, idx)}: no pos_relaxed, which noise needs")
            return data
        if getattr(data, "tags", None) is None or relaxed.shape != data.pos.shape:
            raise ValueError(
                f"{self._name(data, idx)}: a displacement needs tags, and pos_relaxed of the shape "
                f"of pos, {tuple(data.pos.shape)}; this one's is {tuple(relaxed.shape)}"
            )
        movable = torch.isin(data.tags, torch.tensor(MOVING_TAGS))
        relaxed = relaxed - _whole_cells(relaxed - data.pos, data.cell)
        if self.noise is not None:
            generator = item_generator(idx)
            data.pos, _ = corrupt(data.pos, self.noise, generator, movable=movable, relaxed=relaxed)
        data.displacement = (relaxed - data.pos).masked_fill(~movable[:, None], torch.nan)
        return data

    def _name(self, data: Data, idx: int) -> str:
        return f"{self.path}: structure {idx} (sid {getattr(data, 'sid', 'unknown')})"


def _whole_cells(vectors: Tensor, cell: Tensor) -> Tensor:
    """The lattice vector in each vector [N, 3] that a jump across the cell put there."""
    lattice = cell.reshape(3, 3)
    return torch.linalg.solve(lattice, vectors, left=False).round() @ lattice
