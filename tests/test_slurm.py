"""Jobs under a real Slurm: `make test-slurm` sets one up by `tools/slurm.sh`, and takes it down.

Jobs are submitted by the command in this process, which has imported fairchem already, and run in
processes that Slurm starts.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import time

import pytest
import torch
import yaml

from fairchem_equiformer.fairchem1.cli import main
from tests.conftest import make_tiny_config

pytestmark = [
    pytest.mark.slurm,
    pytest.mark.skipif(shutil.which("sbatch") is None, reason="there is no Slurm"),
]

# A training that saves only what it is asked to.
ENDLESS = ["--optim.max_epochs=100000", "--optim.checkpoint_every=1000000"]
LOGS = ("err", "out")  # of which the last has the steps
BEGIN = "Starting with JobEnvironment"
ID = re.compile(r"timestamp_id: (\S+)")
SAVED = re.compile(r"SIGTERM after step (\d+), which is saved in .*")
STEP = re.compile(r"epoch: \S+, step: (\S+)")  # of a training's lines, one for each step
PATIENCE = 180.0  # seconds; for a machine on which much else runs


def slurm(*command, check=True):
    """What a program of Slurm's printed."""
    return subprocess.run(command, check=check, capture_output=True, text=True).stdout.strip()


def wait_for(what, found, patience=PATIENCE):
    """What `found` returns once that is true."""
    end = time.monotonic() + patience
    while time.monotonic() < end:
        if value := found():
            return value
        time.sleep(0.2)
    pytest.fail(f"waited {patience:.0f} s for {what}")


class Job:
    """One job, or one element of an array.

    Args:
        folder: in which it was submitted.
        record: its line of the experiment log.
    """

    def __init__(self, folder, record):
        self.folder, self.id, self.config = folder, record["slurm_id"], record["config"]

    def log(self, task=0):
        texts = [self.folder / "logs" / self.id / f"{self.id}_{task}_log.{end}" for end in LOGS]
        return "".join(text.read_text() for text in texts if text.exists())

    def runs(self):
        """Steps of each run: a requeued job has more than one, and one log."""
        runs = self.log().split(BEGIN)[1:]
        return [[int(float(step)) for step in STEP.findall(run)] for run in runs]

    def trains(self, run=1):
        """Wait until a run of it has made some steps, and not the first alone; these."""

        def found():
            runs = self.runs()
            return len(runs) == run and len(runs[-1]) > 3 and runs[-1]

        return wait_for(f"steps of run {run}", found)

    def state(self):
        shown = slurm("scontrol", "show", "job", self.id)
        return re.search(r"JobState=(\w+)", shown).group(1)

    def ends(self):
        over = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "PREEMPTED")
        return wait_for("the end of a job", lambda: (s := self.state()) in over and s)

    def script(self):
        name = self.id.partition("_")[0]
        (path,) = self.folder.glob(f"logs/**/{name}_submission.sh")
        return path.read_text()

    def timestamp_id(self):
        return ID.search(self.log()).group(1)

    def saved(self, name="checkpoint.pt"):
        path = self.folder / "checkpoints" / self.timestamp_id() / name
        return torch.load(path, weights_only=False)


@pytest.fixture
def submit(tmp_path, tiny_lmdb, monkeypatch):
    """Submit trainings of the tiny model; their jobs, which are cancelled at the end."""
    config = make_tiny_config(tiny_lmdb)
    config["model"] |= {"alpha_drop": 0.0, "drop_path_rate": 0.0, "proj_drop": 0.0}
    del config["dataset"]["val"], config["dataset"]["test"], config["dataset"]["relax"]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    jobs = []

    def run(*options, here=False, **sections):
        """With other sections of the config; in this process, if it is `here`."""
        (tmp_path / "config.yml").write_text(yaml.safe_dump(config | sections))
        before = set(tmp_path.glob("logs/exp/*.log"))
        given = ["--mode", "train", "--config-yml", "config.yml", "--cpu", f"--run-dir={tmp_path}"]
        if here:
            assert main([*given, *options]) == 0
            return []
        given += ["--submit", "--slurm-mem", "1", "--print-every", "1"]
        time.sleep(1)  # the name of an experiment log is the second
        assert main([*given, *options]) == 0
        (log,) = set(tmp_path.glob("logs/exp/*.log")) - before
        made = [Job(tmp_path, json.loads(line)) for line in log.read_text().splitlines()]
        jobs.extend(made)
        return made

    yield run
    for job in jobs:
        slurm("scancel", "--signal=KILL", "--full", job.id, check=False)  # if it is still there
        slurm("scancel", job.id, check=False)


def test_two_tasks_train_one_model(submit, tmp_path):
    (job,) = submit("--num-gpus", "2", "--identifier", "two")
    lines = job.script().splitlines()
    for line in ("--ntasks-per-node=2", "--nodes=1", "--job-name=two", "--signal=USR2@90"):
        assert f"#SBATCH {line}" in lines
    assert "gpu" not in job.script()
    assert "gpus_per_node" not in job.config["slurm"]
    assert job.config["world_size"] == 2
    assert job.ends() == "COMPLETED"
    assert job.saved()["step"] == 2  # two epochs of four structures, two at a time on two ranks
    folder = tmp_path / "logs" / job.id
    for task in (0, 1):
        assert "Job completed successfully" in job.log(task)
        assert (folder / f"{job.id}_{task}_result.pkl").exists()
    assert job.timestamp_id().endswith("-two")
    assert job.runs() == [[1, 2]]
    assert not STEP.search(job.log(1))  # only the first says it


def test_a_sweep_is_an_array(submit, tmp_path):
    (tmp_path / "sweep.yml").write_text("optim.lr_initial: [0.001, 0.002]\n")
    jobs = submit("--sweep-yml", "sweep.yml", "--identifier", "array")
    assert [job.id.partition("_")[2] for job in jobs] == ["0", "1"]
    assert "#SBATCH --array=0-1%2" in jobs[0].script().splitlines()
    assert [job.ends() for job in jobs] == ["COMPLETED", "COMPLETED"]
    assert [job.saved()["step"] for job in jobs] == [4, 4]
    rates = [job.saved()["config"]["optim"]["lr_initial"] for job in jobs]
    assert rates == [0.001, 0.002]
    ids = [job.timestamp_id() for job in jobs]
    assert [name[-len("array_run0") :] for name in ids] == ["array_run0", "array_run1"]


def limit(job, minutes):
    """Change the time that Slurm allows a job."""
    slurm("scontrol", "update", f"job={job.id}", f"TimeLimit={minutes}")


def test_at_the_end_of_its_time_a_job_is_requeued(submit):
    """It saves on both ranks, and goes on under its own id."""
    (job,) = submit("--num-gpus", "2", "--optim.num_workers=1", *ENDLESS)
    job.trains()
    name = job.timestamp_id()
    limit(job, 2)  # 90 s before its end a job gets a signal
    wait_for("the job to be requeued", lambda: "Requeued job" in job.log())
    limit(job, 60)
    saved, before = job.saved()["step"], job.runs()[0]
    assert before[-1] <= saved <= before[-1] + 1
    assert job.trains(run=2)[0] == saved + 1
    assert set(ID.findall(job.log())) == {name}
    for task in (0, 1):  # no rank fails because another one has gone
        assert "Traceback" not in job.log(task)
        assert "triggered an exception" not in job.log(task)


def test_a_preempted_job_goes_on_where_it_was(submit):
    """Slurm sends it SIGTERM, SIGTERM again and SIGKILL 10 s later each, and starts it again."""
    (job,) = submit("--num-gpus", "2", *ENDLESS)
    job.trains()
    name = job.timestamp_id()
    urgent = ["sbatch", "--parsable", "--partition=urgent", "--ntasks=4", "--output=/dev/null"]
    slurm(*urgent, "--wrap=true")
    wait_for("the job to be requeued", lambda: "DUE TO PREEMPTION" in job.log())
    steps = job.trains(run=2)
    saved = [int(step) for step in SAVED.findall(job.log())]
    assert steps[0] == saved[-1] + 1
    assert saved[0] < job.runs()[0][-1]  # it went on until it was killed
    assert set(ID.findall(job.log())) == {name}


def test_a_job_whose_node_fails_goes_on_from_its_last_checkpoint(submit, tmp_path):
    """And not from the one that the user started it with."""
    submit("--optim.max_epochs=1", "--timestamp-id=start", here=True)
    start = tmp_path / "checkpoints" / "start" / "checkpoint.pt"
    longer = ["--optim.max_epochs=100000", "--optim.checkpoint_every=5"]
    (job,) = submit("--checkpoint", str(start), *longer)
    wait_for("a checkpoint", lambda: job.runs() and [step for step in job.runs()[0] if step > 12])
    assert job.runs()[0][0] == 3
    slurm("scontrol", "requeue", job.id)  # kills at once what does not end by itself
    wait_for("the job to be requeued", lambda: "DUE TO JOB REQUEUE" in job.log())
    wait_for("the job to wait", lambda: job.state() == "PENDING")
    saved = job.saved()["step"]
    assert saved >= 10
    assert job.trains(run=2)[0] == saved + 1


def test_a_cancelled_job_is_resubmitted_under_its_id(submit):
    (job,) = submit(*ENDLESS)
    job.trains()
    slurm("scancel", job.id)
    announced = wait_for("the signal", lambda: SAVED.search(job.log()))
    assert job.ends() == "CANCELLED"
    saved = job.saved()["step"]
    assert saved == int(announced.group(1))
    assert f"--timestamp-id {job.timestamp_id()}" in announced.group(0)
    (again,) = submit("--timestamp-id", job.timestamp_id(), *ENDLESS)
    assert again.trains()[0] == saved + 1


def test_a_job_that_slurm_refuses_is_one_line(submit, capsys):
    with pytest.raises(AssertionError):
        submit("--slurm-partition", "nosuch")
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert line.startswith("fairchem: error: Slurm took no job: ")
    assert "invalid partition specified: nosuch" in line
