"""Trainings by the command that are damaged, interrupted or fed bad numbers, in this process."""

from __future__ import annotations

import errno
import multiprocessing
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from fairchem.core import _cli
from fairchem.core.common import distutils
from fairchem.core.trainers import OCPTrainer, base_trainer
from submitit.core.job_environment import SignalHandler
from submitit.core.utils import DelayedSubmission, JobPaths
from submitit.slurm.slurm import SlurmJobEnvironment

from fairchem_equiformer.fairchem1 import saving, signals
from fairchem_equiformer.fairchem1.cli import main
from tests.conftest import make_data, make_tiny_config, write_lmdb

# Four structures, one a batch, and two epochs.
STEPS = 8


@pytest.fixture(scope="module")
def kept():
    """What the uninterrupted training saved, once there was one."""
    return {}


@pytest.fixture
def train(tmp_path, tiny_lmdb, monkeypatch, kept):
    """Run a training of eight steps in a folder of its own; its exit status."""
    config = make_tiny_config(tiny_lmdb)
    config["model"] |= {"alpha_drop": 0.0, "drop_path_rate": 0.0, "proj_drop": 0.0}
    config["optim"] |= {"batch_size": 1, "checkpoint_every": 1, "eval_every": 100}
    del config["dataset"]["val"], config["dataset"]["test"], config["dataset"]["relax"]
    monkeypatch.chdir(tmp_path)

    def run(name, *options, **sections):
        """With other sections of the config, if any are given."""
        (tmp_path / "config.yml").write_text(yaml.safe_dump({**config, **sections}))
        given = ["--mode", "train", "--config-yml", "config.yml", "--cpu", "--timestamp-id", name]
        try:
            return main([*given, f"--run-dir={tmp_path}", *options])
        except SystemExit as stopped:
            return stopped.code
        finally:
            distutils.cleanup()  # as the end of a process does

    def uninterrupted():
        if not kept:
            assert run("whole") == 0
            kept.update(run.saved("whole"))
        return kept

    run.whole = uninterrupted
    run.config = config
    run.folder = lambda name: tmp_path / "checkpoints" / name
    run.saved = lambda name: torch.load(run.folder(name) / "checkpoint.pt", weights_only=False)
    return run


def assert_same_training(saved, expected):
    """Weights, averages and the state of optimizer and schedule, to the last bit."""
    assert saved["step"] == expected["step"] == STEPS
    assert saved["scheduler"]["last_epoch"] == expected["scheduler"]["last_epoch"]
    for name, value in expected["state_dict"].items():
        assert torch.equal(saved["state_dict"][name], value), name
    for one, other in zip(
        saved["ema"]["shadow_params"], expected["ema"]["shadow_params"], strict=True
    ):
        assert torch.equal(one, other)
    assert saved["optimizer"]["param_groups"] == expected["optimizer"]["param_groups"]


class CrashError(Exception):
    """Stands for a kill."""


@pytest.fixture
def crash(monkeypatch):
    """Let the next training crash once the checkpoint of a step is written."""

    def at(step):
        save = OCPTrainer.save

        def save_and_crash(trainer, *args, **kwargs):
            save(trainer, *args, **kwargs)
            if trainer.step == step:
                monkeypatch.setattr(OCPTrainer, "save", save)
                raise CrashError

        monkeypatch.setattr(OCPTrainer, "save", save_and_crash)

    return at


def test_a_resumed_training_is_that_of_an_uninterrupted_one(train, crash):
    whole = train.whole()
    for step in (3, 4):  # within an epoch, and at its end
        crash(step)
        with pytest.raises(CrashError):
            train(f"crashed{step}")
        assert train(f"crashed{step}") == 0
        assert_same_training(train.saved(f"crashed{step}"), whole)


def test_a_damaged_checkpoint_is_not_resumed_but_the_one_before(train, crash, caplog):
    crash(5)
    with pytest.raises(CrashError):
        train("damaged")
    path = train.folder("damaged") / "checkpoint.pt"
    content = bytearray(path.read_bytes())
    content[5000:5064] = bytes(64)
    path.write_bytes(content)
    assert train("damaged", "--checkpoint", str(path)) == 0
    messages = [record.getMessage() for record in caplog.records]
    (line,) = [message for message in messages if "the one before it" in message]
    assert str(path) in line
    assert "checkpoint.previous.pt" in line
    assert train.saved("damaged")["step"] == STEPS


def data_with(tmp_path, changes):
    """The structures of `tiny_lmdb`, some labels of which are changed."""
    entries = [make_data(index) for index in range(4)]
    for sid, change in changes.items():
        change(entries[sid])
    return write_lmdb(tmp_path / "bad" / "data.lmdb", entries)


def nan_force(data):
    data.forces[8, 1] = torch.nan  # the hydrogen, which is free


def infinite_energy(data):
    data.energy = float("inf")


def nan_force_on_fixed_atom(data):
    data.forces[0, 0] = torch.nan


def assert_finite(saved):
    for name, value in saved["state_dict"].items():
        assert value.isfinite().all(), name
    for value in saved["ema"]["shadow_params"]:
        assert value.isfinite().all()


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (nan_force, "the label of forces of atom 8 of sid 2, fid 0 is nan"),
        (infinite_energy, "the label of energy of sid 2, fid 0 is inf"),
    ],
)
def test_a_bad_label_is_named_and_stops_the_training(train, tmp_path, caplog, change, named):
    train.config["dataset"]["train"]["src"] = str(data_with(tmp_path, {2: change}))
    assert train("bad") == 1
    saved = train.saved("bad")
    assert f"step {saved['step'] + 1}: {named}" in caplog.text
    error = [record.getMessage() for record in caplog.records if record.levelname == "ERROR"]
    assert len(error) == 1
    assert "weights were not changed" in error[0]
    assert saved["step"] < 4
    assert_finite(saved)


def test_bad_labels_are_skipped_if_asked_to(train, tmp_path, caplog):
    """And nothing is learnt from them: the others alone give the same weights."""
    changes = {1: infinite_energy, 2: nan_force}
    train.config["dataset"]["train"]["src"] = str(data_with(tmp_path, changes))
    train.config["optim"]["nonfinite"] = "skip"
    assert train("bad") == 0
    assert "4 batches were skipped" in caplog.text
    saved = train.saved("bad")
    assert saved["step"] == STEPS
    assert_finite(saved)
    updates = {int(state["step"]) for state in saved["optimizer"]["state"].values()}
    assert updates == {4}


def test_fairchems_behaviour_can_be_had(train, tmp_path):
    train.config["dataset"]["train"]["src"] = str(data_with(tmp_path, {2: nan_force}))
    train.config["optim"]["nonfinite"] = "fairchem"
    assert train("bad") == 0
    saved = train.saved("bad")
    assert saved["step"] == STEPS
    assert all(value.isnan().any() for value in saved["ema"]["shadow_params"])


def test_what_is_not_trained_on_may_be_nan(train, tmp_path):
    changes = {1: nan_force_on_fixed_atom}
    train.config["dataset"]["train"]["src"] = str(data_with(tmp_path, changes))
    assert train("fixed") == 0
    assert_finite(train.saved("fixed"))


def bad_at(step, monkeypatch, change):
    """Change the predictions of the batch of one training step."""
    forward = OCPTrainer._forward

    def changed(trainer, batch):
        out = forward(trainer, batch)
        return change(out) if trainer.step == step and torch.is_grad_enabled() else out

    monkeypatch.setattr(OCPTrainer, "_forward", changed)


def test_a_prediction_that_is_not_finite(train, monkeypatch, caplog):
    """fairchem takes it for zero, so that the loss looks finite."""
    bad_at(3, monkeypatch, lambda out: {**out, "energy": out["energy"] * torch.nan})
    assert train("bad") == 1
    assert "step 3: the prediction of energy of sid" in caplog.text
    assert train.saved("bad")["step"] == 2


def test_a_gradient_that_is_not_finite(train, monkeypatch, caplog):
    """The loss is finite, and its gradient is that of a square root at zero."""
    bad_at(3, monkeypatch, lambda out: {**out, "energy": out["energy"] + root_of_zero(out)})
    assert train("stopped") == 1
    assert "step 3: the gradient of module." in caplog.text
    assert train.saved("stopped")["step"] == 2
    train.config["optim"]["nonfinite"] = "skip"
    assert train("skipped") == 0
    assert "1 batches were skipped" in caplog.text
    assert_finite(train.saved("skipped"))


def root_of_zero(out):
    return (0 * out["energy"]).sqrt()


def test_a_stopped_training_goes_on_as_if_nothing_had_been(train, monkeypatch):
    whole = train.whole()
    with monkeypatch.context() as patch:
        bad_at(3, patch, lambda out: {**out, "energy": out["energy"] * torch.nan})
        assert train("bad") == 1
    assert train("bad") == 0
    assert_same_training(train.saved("bad"), whole)


def test_validation_does_not_look_finite(train, tmp_path, caplog):
    train.config["dataset"]["val"] = {"src": str(data_with(tmp_path, {3: nan_force}))}
    train.config["optim"]["eval_every"] = 4
    assert train("validated") == 0
    assert "(validation): the label of forces of atom 8 of sid 3, fid 0 is nan" in caplog.text
    assert "loss: nan" in caplog.text
    assert_finite(train.saved("validated"))


def test_the_guard_changes_no_number(train):
    """Clipping included: the norms are above the limit."""
    train.config["optim"]["clip_grad_norm"] = 0.1
    for name, policy in (("guarded", "stop"), ("plain", "fairchem")):
        assert train(name, f"--optim.nonfinite={policy}") == 0
    assert_same_training(train.saved("guarded"), train.saved("plain"))


def test_a_full_disk_stops_the_training_in_one_line(train, monkeypatch, caplog):
    sync, calls = os.fsync, []

    def full(handle):
        calls.append(handle)
        if len(calls) > 8:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        sync(handle)

    monkeypatch.setattr(os, "fsync", full)
    assert train("full") == 1
    (error,) = [record.getMessage() for record in caplog.records if record.levelname == "ERROR"]
    assert "No space left on device" in error
    path = train.folder("full") / "checkpoint.pt"
    assert str(path) in error
    assert saving.damage(path) is None
    monkeypatch.undo()


def test_a_worker_that_dies_is_named(train, monkeypatch, caplog):
    """Killed for its memory, as a rule."""
    train.config["optim"]["num_workers"] = 1

    def kill(out):
        (worker,) = multiprocessing.active_children()
        worker.kill()
        worker.join()
        return out

    train.config["optim"]["max_epochs"] = 50  # it may have read ahead
    bad_at(3, monkeypatch, kill)
    assert train("worker") == 1
    (error,) = [record.getMessage() for record in caplog.records if record.levelname == "ERROR"]
    assert "rank 0: DataLoader worker (pid" in error
    assert "optim.num_workers" in error
    assert "--timestamp-id worker" in error
    assert saving.damage(train.folder("worker") / "checkpoint.pt") is None


def signal_at(step, number, monkeypatch):
    """Send this process a signal in the middle of a training step."""

    def send(out):
        os.kill(os.getpid(), number)
        return out

    bad_at(step, monkeypatch, send)


@pytest.fixture
def handled():
    """Signals that are ignored where the tests run in the background, and stay so there."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGHUP, signal.SIGINT)}
    for number in handlers:
        signal.signal(number, signal.SIG_DFL)
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.mark.usefixtures("handled")
@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP", "SIGINT", "SIGUSR2"])
def test_a_signal_finishes_the_step_and_saves(train, monkeypatch, caplog, capfd, name):
    number = signal.Signals[name]
    before = signal.getsignal(number)
    train.config["optim"]["checkpoint_every"] = 100
    with monkeypatch.context() as patch:
        signal_at(3, number, patch)
        assert train("stopped") == 128 + number
    assert signal.getsignal(number) is before
    assert train.saved("stopped")["step"] == 3
    assert f"{name}: stopping after this step" in capfd.readouterr().err
    (error,) = [record.getMessage() for record in caplog.records if record.levelname == "ERROR"]
    assert f"{name}: stopped after step 3" in error
    assert "--timestamp-id stopped" in error


def test_after_a_signal_a_training_goes_on_as_if_nothing_had_been(train, monkeypatch):
    whole = train.whole()
    with monkeypatch.context() as patch:
        signal_at(3, signal.SIGTERM, patch)
        assert train("stopped") == 128 + signal.SIGTERM
    assert train("stopped") == 0
    assert_same_training(train.saved("stopped"), whole)


def test_a_signal_in_a_validation_saves_no_averages(train, monkeypatch, tiny_lmdb):
    """While fairchem validates, the moving averages stand in place of the weights."""
    whole = train.whole()
    train.config["dataset"]["val"] = {"src": str(tiny_lmdb)}
    train.config["optim"] |= {"eval_every": 3, "checkpoint_every": 100}
    forward = OCPTrainer._forward

    def interrupted(trainer, batch):
        if not torch.is_grad_enabled():
            os.kill(os.getpid(), signal.SIGTERM)
        return forward(trainer, batch)

    with monkeypatch.context() as patch:
        patch.setattr(OCPTrainer, "_forward", interrupted)
        assert train("stopped") == 128 + signal.SIGTERM
    assert train.saved("stopped")["step"] == 3
    assert train("stopped", "--optim.eval_every=100", "--optim.checkpoint_every=1") == 0
    assert_same_training(train.saved("stopped"), whole)


def test_submitits_signal_waits_for_the_end_of_the_step(train, monkeypatch):
    """In the middle of a step, it would save weights and a step that do not belong together."""
    steps = []

    def requeue(number, _):
        steps.append((trainers[0].step, trainers[0].scheduler.scheduler.last_epoch, number))
        raise SystemExit(255)

    trainers = []
    forward = OCPTrainer._forward
    monkeypatch.setattr(
        OCPTrainer, "_forward", lambda self, batch: trainers.append(self) or forward(self, batch)
    )
    signal_at(3, signal.SIGUSR2, monkeypatch)
    backward = OCPTrainer._backward

    def slow(trainer, loss):
        assert not steps
        backward(trainer, loss)

    monkeypatch.setattr(OCPTrainer, "_backward", slow)
    before = signal.signal(signal.SIGUSR2, requeue)
    try:
        assert train("requeued") == 255
    finally:
        signal.signal(signal.SIGUSR2, before)
    assert steps == [(3, 2, signal.SIGUSR2)]


@pytest.fixture
def under_submitit(tmp_path):
    """Its handlers of signals, as in a job."""
    numbers = (signal.SIGTERM, signal.SIGCONT, signal.SIGUSR2)
    before = {number: signal.getsignal(number) for number in numbers}
    job = DelayedSubmission(print)
    SlurmJobEnvironment()._handle_signals(JobPaths(tmp_path, "1"), job)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("in_validation", [False, True])
@pytest.mark.usefixtures("under_submitit")
def test_sigterm_in_a_slurm_job_saves_and_goes_on(
    train, monkeypatch, tiny_lmdb, caplog, in_validation
):
    """Who ends by itself when Slurm preempts it is not requeued."""
    whole = train.whole()
    train.config["optim"] |= {"checkpoint_every": 100}
    if in_validation:
        train.config["dataset"]["val"] = {"src": str(tiny_lmdb)}
        train.config["optim"] |= {"eval_every": 3}
    saved, save = [], OCPTrainer.save
    forward = OCPTrainer._forward

    def interrupted(trainer, batch):
        if trainer.step == 3 and torch.is_grad_enabled() != in_validation and not saved:
            os.kill(os.getpid(), signal.SIGTERM)
        return forward(trainer, batch)

    def keep(trainer, *args, **kwargs):
        path = save(trainer, *args, **kwargs)
        if kwargs.get("training_state", True):
            saved.append(train.saved("job"))
        return path

    monkeypatch.setattr(OCPTrainer, "_forward", interrupted)
    monkeypatch.setattr(OCPTrainer, "save", keep)
    handler = signal.getsignal(signal.SIGTERM)
    assert train("job", f"--optim.checkpoint_every={STEPS}") == 0
    assert signal.getsignal(signal.SIGTERM) == handler
    assert saved[0]["step"] == 3
    assert "SIGTERM after step 3, which is saved in" in caplog.text
    assert_same_training(saved[-1], whole)


def test_a_requeue_overrides_the_signal_that_announced_it():
    deferred = signals.Deferred()
    deferred._before = {signal.SIGTERM: SignalHandler(None, None, None).bypass}
    for came in (signal.SIGTERM, signal.SIGUSR2, signal.SIGTERM):
        deferred._note(came, None)
    assert deferred.number == signal.SIGUSR2
    deferred.forget(signal.SIGTERM)  # which another rank had noted
    assert deferred.number == signal.SIGUSR2


def test_a_job_requeued_before_it_began_saves_nothing():
    """fairchem-core's own stops without a trainer; with one, it saves weights of no step."""
    config = {"checkpoint": "start.pt", "timestamp_id": None}
    runner = _cli.Runner()
    again = runner.checkpoint(config)
    assert again.args == (config,)
    assert type(again.function) is _cli.Runner
    runner.trainer = SimpleNamespace(timestamp_id="a", logger=None)
    assert runner.checkpoint(config).args == (config | {"timestamp_id": "a"},)


def test_a_restarted_job_goes_on_from_its_own_checkpoint(train, crash, monkeypatch):
    """And not from the one that it was started with."""
    assert train("start", "--optim.max_epochs=1") == 0
    start = ["--checkpoint", str(train.folder("start") / "checkpoint.pt"), "--optim.max_epochs=3"]
    crash(6)
    with pytest.raises(CrashError):
        train("job", *start)
    first = []
    original = OCPTrainer._compute_loss
    monkeypatch.setattr(
        OCPTrainer,
        "_compute_loss",
        lambda self, *args: first.append(self.step) or original(self, *args),
    )
    monkeypatch.setenv("SLURM_JOB_ID", "1")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    assert train("job", *start) == 0
    assert first[0] == 7
    monkeypatch.delenv("SLURM_RESTART_COUNT")
    first.clear()
    assert train("another", *start) == 0
    assert first[0] == 5


def test_a_signal_that_comes_again_acts_at_once(monkeypatch):
    came = []
    before = signal.signal(signal.SIGTERM, signal.SIG_DFL)
    try:
        deferred = signals.Deferred()
        deferred.start()
        monkeypatch.setattr(os, "kill", lambda _, number: came.append(number))
        for _ in range(2):  # a launcher may send it once more
            signal.raise_signal(signal.SIGTERM)
        assert not came
        monkeypatch.setattr(signals, "AGAIN", 0.0)
        signal.raise_signal(signal.SIGTERM)
        assert came == [signal.SIGTERM]
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
        deferred.stop()
    finally:
        signal.signal(signal.SIGTERM, before)


def test_a_signal_that_is_ignored_stays_so():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as under nohup
    try:
        deferred = signals.Deferred()
        deferred.start()
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
        deferred.stop()
    finally:
        signal.signal(signal.SIGHUP, before)


def test_ids_differ_within_a_second_too():
    """The runs of a sweep start together."""
    ids = {base_trainer.BaseTrainer._get_timestamp(torch.device("cpu"), "x") for _ in range(50)}
    assert len(ids) == 50
    assert len({name[:16] for name in ids}) <= 2  # and begin with the date and time
    assert all(name.endswith("-x") for name in ids)


def test_a_run_resumes_only_its_own_config(train, caplog):
    assert train("run", "--optim.max_epochs=1", "--optim.lr_initial=0.002") == 0
    first = train.saved("run")
    assert train("run", "--optim.max_epochs=1") == 2
    (error,) = [record.getMessage() for record in caplog.records if record.levelname == "ERROR"]
    for part in ("optim.lr_initial was 0.002 and is 0.001", "--task.resume_changed=True"):
        assert part in error
    assert "max_epochs" not in error
    assert train.saved("run")["step"] == first["step"] == 4
    caplog.clear()
    assert train("run", "--task.resume_changed=True") == 0
    assert train.saved("run")["step"] == STEPS
    assert "optim.lr_initial was 0.002 and is 0.001" in caplog.text


def test_how_often_one_saves_may_change(train, crash):
    crash(3)
    with pytest.raises(CrashError):
        train("run")
    assert train("run", "--optim.checkpoint_every=4", "--optim.num_workers=1") == 0
    assert train.saved("run")["step"] == STEPS


def run_elsewhere(*command):
    """A program of this folder in a process of its own; what it printed."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", *command],
        cwd=Path(__file__).parent.parent,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout


def test_killed_trainings_lose_nothing():
    """The short form of `make soak`."""
    shown = run_elsewhere("-m", "tests.soak", "--kills", "2", "--epochs", "3")
    assert "the same to the last bit after 12 steps" in shown


@pytest.mark.long
def test_a_signal_stops_all_ranks(train, tmp_path):
    """Sent to the process that the user started, or to one of the ranks."""
    train.config["optim"] |= {"max_epochs": 200, "checkpoint_every": 10**6}
    for whom in ("first", "rank"):
        (tmp_path / "config.yml").write_text(yaml.safe_dump(train.config))
        command = [sys.executable, "-m", "fairchem_equiformer", "--mode", "train", "--cpu"]
        command += ["--config-yml", "config.yml", "--num-gpus", "2", "--timestamp-id", whom]
        with subprocess.Popen(
            [*command, "--print-every", "1"],
            cwd=tmp_path,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        ) as process:
            shown = []
            for line in process.stdout:
                shown.append(line)
                if "step: 3.00e+00" in line:
                    break
            children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
            os.kill(process.pid if whom == "first" else int(children[-1]), signal.SIGTERM)
            output = "".join(shown) + process.stdout.read()
        assert process.returncode == 128 + signal.SIGTERM, output[-4000:]
        assert output.count("SIGTERM: stopped after step") == 1
        assert train.saved(whom)["step"] >= 3


@pytest.mark.long
def test_one_bad_rank_stops_or_skips_on_all(train, tmp_path):
    train.config["dataset"]["train"]["src"] = str(data_with(tmp_path, {2: nan_force}))
    for policy, status in (("stop", 1), ("skip", 0)):
        (tmp_path / "config.yml").write_text(yaml.safe_dump(train.config))
        command = [sys.executable, "-m", "fairchem_equiformer", "--mode", "train", "--cpu"]
        command += ["--config-yml", "config.yml", "--num-gpus", "2", "--timestamp-id", policy]
        done = subprocess.run(
            [*command, f"--optim.nonfinite={policy}"],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == status, done.stderr[-4000:]
        assert "the label of forces of atom 8 of sid 2, fid 0 is nan" in done.stderr
        assert_finite(train.saved(policy))
    assert train.saved("skip")["step"] == 4
    assert "2 batches were skipped" in done.stderr
