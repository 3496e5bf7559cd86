"""Jobs under Slurm on machines without GPUs, and what becomes of a job that Slurm ends."""

from __future__ import annotations

import os
import subprocess
from typing import TYPE_CHECKING, Any

from submitit.helpers import DelayedSubmission

if TYPE_CHECKING:
    from collections.abc import Callable

JOB = "SLURM_JOB_ID"
RESTARTS = "SLURM_RESTART_COUNT"
# From Slurm 22.05 on, srun gives each task of a job one processor unless it is told.
TASKS_GET_THEIR_PROCESSORS = "export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK"
# Below the ports that systems hand out by themselves; one job's ranks meet at one of these.
FIRST_PORT, PORTS = 15000, 15000


def without_gpus(original: type) -> type:
    """For ``AutoExecutor``: with ``--cpu``, jobs ask for no GPUs; ``--num-gpus`` counts tasks."""

    class Executor(original):
        def map_array(self, function: Any, configs: list[dict[str, Any]]) -> list[Any]:
            if configs[0]["cpu"]:
                for parameters in (self.parameters, *(config["slurm"] for config in configs)):
                    parameters.pop("gpus_per_node", None)
                    parameters["setup"] = [TASKS_GET_THEIR_PROCESSORS]
            return super().map_array(function, configs)

    return Executor


def ranks_on_cpus(original: Callable[[dict[str, Any]], None]) -> Callable[[dict[str, Any]], None]:
    """For ``distutils.setup``: the tasks of a Slurm job with ``--cpu`` are ranks over gloo.

    They are set up as fairchem-core sets up ranks of one machine, from variables of Slurm's in
    place of those of torch's launcher.
    """

    def setup(config: dict[str, Any]) -> None:
        if not (config["submit"] and config.get("cpu") and JOB in os.environ):
            original(config)
            return
        os.environ.update(rendezvous())
        config["submit"] = False
        try:
            original(config)
        finally:
            config["submit"] = True

    return setup


def rendezvous() -> dict[str, str]:
    """Variables by which torch's ranks find each other, of the task of a Slurm job.

    The port follows from the job's number: jobs that share a machine do not meet.
    """
    nodes = os.environ.get("SLURM_STEP_NODELIST") or os.environ["SLURM_JOB_NODELIST"]
    hosts = subprocess.run(  # noqa: S603  # Slurm's own variable
        ["scontrol", "show", "hostnames", nodes],  # noqa: S607  # wherever Slurm's programs are
        check=True,
        capture_output=True,
        text=True,
    ).stdout.split()
    return {
        "MASTER_ADDR": hosts[0],
        "MASTER_PORT": str(FIRST_PORT + int(os.environ[JOB]) % PORTS),
        "RANK": os.environ["SLURM_PROCID"],
        "LOCAL_RANK": os.environ["SLURM_LOCALID"],
    }


def restarted() -> bool:
    """Whether this is a job that Slurm has started before."""
    return JOB in os.environ and int(os.environ.get(RESTARTS, "0")) > 0


def begin_again(_: Any) -> Callable[..., DelayedSubmission]:
    """For ``Runner.checkpoint``: what a requeued job runs. It saves nothing.

    A training's `Guard` has saved by then, or there was nothing to save: before it begins, the
    weights are those of no step, and would take the place of a checkpoint that is to be resumed.
    """

    def checkpoint(self: Any, config: dict[str, Any]) -> DelayedSubmission:
        trainer = getattr(self, "trainer", None)
        if trainer is None:
            return DelayedSubmission(type(self)(), config)
        if trainer.logger is not None:
            trainer.logger.mark_preempting()
        return DelayedSubmission(type(self)(), config | {"timestamp_id": trainer.timestamp_id})

    return checkpoint
