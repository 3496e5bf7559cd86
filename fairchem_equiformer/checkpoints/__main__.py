"""List the published checkpoints of EquiformerV2, or say what is in one.

python -m fairchem_equiformer.checkpoints
python -m fairchem_equiformer.checkpoints eqV2_31M_omat.pt
"""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING

from fairchem_equiformer.checkpoints.checkpoint import load
from fairchem_equiformer.checkpoints.published import PUBLISHED
from fairchem_equiformer.errors import InputError
from fairchem_equiformer.models import DeNSBackbone
from fairchem_equiformer.models.config_v1 import EquiformerConfig

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from fairchem_equiformer.checkpoints.checkpoint import Checkpoint
    from fairchem_equiformer.models.config import ModelConfig

NOTES = """\
facebook/OMAT24 is a repository of the Hugging Face hub, behind its licence. fairchem-core 1.10
downloads any of them by its name: OCPCalculator(model_name=..., local_cache=...).

The files could not be had where this was written. Tested of each, at full size: a checkpoint of its
class and keys, written by fairchem-core 1.10 with random weights, loads, and its energies,
forces and stresses equal fairchem-core 1.10's to 1e-5."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return its exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m fairchem_equiformer.checkpoints",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("file", nargs="?", help="checkpoint to describe")
    parser.add_argument(
        "--trusted",
        action="store_true",
        help="run whatever the checkpoint, a pickle, asks for: only for a source you trust",
    )
    options = parser.parse_args(arguments)
    if options.file is None:
        sys.stdout.write("\n".join([*published_table(), "", NOTES, ""]))
        return 0
    try:
        checkpoint = load(options.file, trusted=options.trusted)
        checkpoint.model()  # do the weights belong to the config?
    except InputError as error:
        sys.stderr.write(f"checkpoints: error: {error}\n")
        return 2
    sys.stdout.write("\n".join([*description(checkpoint), ""]))
    return 0


def published_table() -> list[str]:
    """One line for each published checkpoint, below a line of headings."""
    rows = [("file", "trained on", "parameters", "form", "predicts", "fairchem's name", "from")]
    rows += [
        (
            one.file,
            one.data,
            f"{one.parameters:,}",
            "hydra, DeNS" if one.backbone_class is DeNSBackbone else one.form,
            ", ".join(one.outputs),
            one.name,
            one.source,
        )
        for one in PUBLISHED
    ]
    return list(_aligned(rows))


def _aligned(rows: Sequence[tuple[str, ...]]) -> Iterable[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        yield "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()


def description(checkpoint: Checkpoint) -> list[str]:
    """What a checkpoint is, line by line."""
    kind = "hydra (backbone and heads)" if checkpoint.form == "hydra" else "flat"
    kind += ", with DeNS" if checkpoint.backbone_class is DeNSBackbone else ""
    count = sum(value.numel() for value in checkpoint.weights.values())
    like = [f"{one.file} ({one.data})" for one in PUBLISHED if one.is_like(checkpoint)]
    config = checkpoint.model_config
    size = f"{config.num_layers} blocks, {_size(config)}"
    reads = f"{config.max_neighbors} neighbours within {config.max_radius:g} Angstrom"
    rows = [
        ("form", kind),
        ("size", f"{size}, {count:,} parameters"),
        ("reads", f"{reads}, atomic numbers up to {config.max_num_elements - 1}"),
        ("weights", "moving averages (EMA)" if checkpoint.averaged else "as saved, no EMA beside"),
        *(("predicts", _target(checkpoint, target)) for target in checkpoint.outputs),
        ("looks like", " or ".join(like) or "none of the published ones"),
    ]
    v2 = None if isinstance(config, EquiformerConfig) else config
    if v2 and v2.load_energy_lin_ref and not v2.use_energy_lin_ref:
        note = "energies lack the references energy_lin_ref, see use_energy_lin_ref in the config"
        rows.append(("note", note))
    return [str(checkpoint.path), *(f"  {line}" for line in _aligned(rows))]


def _size(config: ModelConfig | EquiformerConfig) -> str:
    if isinstance(config, EquiformerConfig):
        return f"irreps {config.irreps_node_embedding}"
    return f"Lmax {config.lmax}, Mmax {config.mmax}, {config.sphere_channels} channels"


def _target(checkpoint: Checkpoint, target: str) -> str:
    names = dict.fromkeys((*checkpoint.outputs[target].parts, target))
    scales = [
        f"{'' if name == target else f'{name}: '}mean {scale.mean:.6g}, std {scale.std:.6g}"
        for name in names
        if (scale := checkpoint.normalizers.get(name)) is not None
    ]
    if target in checkpoint.references:
        count = int(checkpoint.references[target].count_nonzero())
        scales.append(f"references of {count} elements")
    return f"{target} ({'; '.join(scales) or 'not normalised'})"


if __name__ == "__main__":
    sys.exit(main())
