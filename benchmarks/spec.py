"""What one measurement is told: shared by the process that asks and the one that measures."""

from __future__ import annotations

from dataclasses import dataclass

CLASSES = {
    "ours": "fairchem_equiformer.EquiformerV2",
    "ours_bf16": "fairchem_equiformer.EquiformerV2",  # under autocast in bfloat16
    "stock": "fairchem.core.models.equiformer_v2.equiformer_v2_deprecated.EquiformerV2",
    # Equiformer (V1), and its authors' way of computing it
    "equiformer": "fairchem_equiformer.Equiformer",
    "e3nn": "benchmarks.e3nn_equiformer.E3nnEquiformer",
}
TASKS = ("inference", "training", "relaxation", "neighbors")


@dataclass(frozen=True)
class Spec:
    """What to measure.

    Attributes:
        implementation: A key of :data:`CLASSES` or of :data:`benchmarks.context.CONTEXT`.
        task: One of :data:`TASKS`.
        config: YAML file whose ``model`` section gives the size of those in :data:`CLASSES`.
        atoms: Atoms of one structure, see :func:`benchmarks.slab.slab`.
        batch: Structures in the batch.
        device: ``cpu`` or ``cuda``.
        threads: CPU threads of one operation.
        seconds: Repeat the timed call until this much time has passed.
        round: Seeds what an implementation draws while it runs (the stock model's random roll).
        memory_limit: Bytes of memory that the process may allocate (CPU only).
        weights: File of the parameters that those share; the first process to come writes it.
        record: JSON file to write: times, bytes, FLOPs, parallel regions.
        results: File of tensors to write: what must be equal for every implementation.
    """

    implementation: str
    task: str
    config: str
    atoms: int
    batch: int
    device: str
    threads: int
    seconds: float
    round: int
    memory_limit: int
    weights: str
    record: str
    results: str
