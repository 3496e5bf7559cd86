"""Watches over a training: numbers that go bad, signals, and checkpoints that cannot be written.

fairchem-core's trainers call their own methods `_compute_loss`, `_backward` and `save` at each
step. A `Guard` stands before these three of one trainer while it trains, whatever its class. All
ranks decide together, once a step, where fairchem-core waits for the loss in any case.
"""

from __future__ import annotations

import functools
import logging
import re
import signal
from typing import TYPE_CHECKING, Any

import torch
from fairchem.core.common import distutils
from torch import Tensor
from typing_extensions import Self

from fairchem_equiformer.errors import InputError, StoppedError
from fairchem_equiformer.fairchem1 import finite
from fairchem_equiformer.fairchem1.signals import REQUEUE, SIGNALLED, Deferred, ignore_in_worker

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch_geometric.data import Batch

logger = logging.getLogger(__name__)

# How PyTorch says that a process that reads data has died; of an error in one it says otherwise.
DEAD_WORKER = re.compile(r"DataLoader worker \(pid")

# What `optim.nonfinite` may be: what happens at a batch with NaN or infinity in it.
STOP, SKIP, FAIRCHEM = POLICIES = ("stop", "skip", "fairchem")


class NonFiniteGradientsError(Exception):
    """The gradients' norm is not finite, and they were not applied."""


def guarded(original: Callable[[Any], None]) -> Callable[[Any], None]:
    """For ``TrainTask.run``: the same under a `Guard`; whatever stops it is one line."""

    def run(self: Any) -> None:
        try:
            with Guard(self.trainer) as guard:
                original(self)
                guard.finish()
        except StoppedError as stopped:
            if distutils.is_master():
                logger.error("%s", stopped)  # noqa: TRY400  # the line says all
            distutils.cleanup()
            raise SystemExit(stopped.status) from None

    return in_one_line(run)


def in_one_line(original: Callable[[Any], None]) -> Callable[[Any], None]:
    """For ``run`` of a task: what stops one rank alone ends its process, and so the others."""

    def run(self: Any) -> None:
        try:
            original(self)
        except StoppedError as stopped:
            logger.error("%s", stopped)  # noqa: TRY400  # the line says all
            raise SystemExit(stopped.status) from None
        except RuntimeError as error:
            if not DEAD_WORKER.match(str(error)):
                raise
            logger.error(  # noqa: TRY400
                "rank %d: %s. Out of memory, as a rule: set optim.num_workers lower, or 0. What was"
                " written is in place: go on with the same command and --timestamp-id %s",
                distutils.get_rank(),
                str(error).split(". ", maxsplit=1)[0].rstrip("."),
                self.trainer.timestamp_id,
            )
            raise SystemExit(1) from None

    return run


def policy_of(optim: dict[str, Any]) -> str:
    """What a config says to do with a batch that is not finite.

    Raises:
        InputError: if it says anything unknown.
    """
    policy = optim.get("nonfinite", STOP)
    if policy not in POLICIES:
        raise InputError(f"optim.nonfinite is {policy!r}; it must be {', '.join(POLICIES)}")
    return policy


class Guard:
    """Stands before three methods of a trainer, as a context.

    Args:
        trainer: of fairchem-core, ready to train.

    Attributes:
        skipped: batches from which nothing was learnt.
    """

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer
        self.policy = policy_of(trainer.config["optim"])
        self.skipped = 0
        self._signals = Deferred()
        self._failure: StoppedError | None = None  # of a save, on the rank that saves
        self._status = 0  # with which all ranks will end after this step
        self._skip = False
        self._stepped = False
        self._batch: Batch | None = None
        self._clip: float | None = None
        self._targets = [target for target, _ in getattr(trainer, "loss_functions", [])]

    def __enter__(self) -> Self:
        trainer = self.trainer
        for name, guard in (
            ("_compute_loss", self._compute_loss),
            ("_backward", self._backward),
            ("save", self._save),
        ):
            setattr(trainer, name, functools.partial(guard, getattr(trainer, name)))
        self._hook = trainer.optimizer.register_step_pre_hook(self._before_optimizer)
        for loader in (trainer.train_loader, trainer.val_loader, trainer.test_loader):
            if loader is not None and loader.worker_init_fn is None:
                loader.worker_init_fn = ignore_in_worker
        self._signals.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._signals.stop()
        self._hook.remove()
        for name in ("_compute_loss", "_backward", "save"):
            delattr(self.trainer, name)  # the method of its class is there again

    def finish(self) -> None:
        """After the last step: what could not be said before.

        Raises:
            StoppedError: if the last checkpoint could not be written.
        """
        if self.skipped:
            logger.warning("%d batches were skipped", self.skipped)
        _, status = self._agree(torch.zeros((), dtype=torch.bool))
        self._give_up_if_failed(status)

    def _give_up_if_failed(self, status: int) -> None:
        """End where one rank could not write; only that one knows why."""
        if status and status < SIGNALLED:
            raise self._failure or StoppedError("the first rank could not save", status)

    def _agree(self, bad: Tensor) -> tuple[bool, int]:
        """Whether any rank has a bad batch, and the status with which any rank has to end."""
        failed = self._failure.status if self._failure else 0
        status = SIGNALLED + self._signals.number if self._signals.number else failed
        if distutils.get_world_size() == 1:
            return bool(bad), status
        device = self.trainer.device
        both = torch.stack([bad.to(device).long(), torch.tensor(status, device=device)])
        torch.distributed.all_reduce(both, torch.distributed.ReduceOp.MAX)
        some_bad, status = both.tolist()
        return bool(some_bad), status

    def _compute_loss(
        self, original: Callable[..., Tensor], out: dict[str, Tensor], batch: Batch
    ) -> Tensor:
        """The loss; NaN, not what fairchem makes of it, where a prediction is not finite."""
        loss = original(out, batch)
        self._batch = batch
        good = torch.ones((), dtype=torch.bool)
        if self.policy != FAIRCHEM:
            good = finite.all_finite(loss, out, self._targets)
        bad, status = self._agree(~good)
        if bad and not good:
            self._name(finite.describe(self.trainer, out, batch))
            loss = loss + torch.nan
        if not torch.is_grad_enabled():
            self._in_validation(status)
            return loss
        self._give_up_if_failed(status)
        self._status = status
        if bad:
            self._decide("a batch is not finite")
        return loss

    def _in_validation(self, status: int) -> None:
        """Save in the middle of a validation; the weights there are the moving averages."""
        if not status:
            return
        ema = self.trainer.ema
        if ema:
            ema.restore()
        self._give_up_if_failed(status)
        self._save_and_end(status)
        if ema:
            ema.store()
            ema.copy_to()

    def _name(self, phrases: list[str]) -> None:
        where = "" if torch.is_grad_enabled() else " (validation)"
        logger.warning("step %d%s: %s", self.trainer.step, where, "; ".join(phrases))

    def _decide(self, what: str) -> None:
        """Leave out this step's update, or stop before it; on all ranks alike."""
        trainer = self.trainer
        if self.policy == STOP:
            step = trainer.step
            trainer.step -= 1  # the last one that was made
            trainer.epoch -= 1 / len(trainer.train_loader)
            trainer.save(checkpoint_file="checkpoint.pt", training_state=True)
            raise self._failure or StoppedError(
                f"step {step}: {what}; the weights were not changed, and the checkpoint in "
                f"{trainer.config['cmd']['checkpoint_dir']} is that of step {trainer.step}. Mend "
                "the data, or set optim.nonfinite=skip to leave such batches out"
            )
        self._skip = True
        self.skipped += 1
        if distutils.is_master():
            logger.warning("step %d: %s: skipped, %d so far", trainer.step, what, self.skipped)
        if trainer.logger is not None:
            trainer.logger.log({"skipped_batches": self.skipped}, step=trainer.step, split="train")

    def _backward(self, original: Callable[[Tensor], None], loss: Tensor) -> None:
        """One update, or none; then the end, if a signal asked for it."""
        self._stepped = False
        if not self._skip:
            self._update(original, loss)
        if self._skip:
            self._skip = False
            self.trainer.metrics = {}  # the means since the last line may not be finite
        if self._status:
            self._save_and_end(self._status)

    def _update(self, original: Callable[[Tensor], None], loss: Tensor) -> None:
        trainer = self.trainer
        if self.policy == FAIRCHEM:
            original(loss)
            return
        # Clipping is left to `_before_optimizer`, which looks at the norm.
        clip, trainer.clip_grad_norm = trainer.clip_grad_norm, None
        self._clip = clip
        try:
            original(loss)
        except NonFiniteGradientsError:
            if trainer.scaler:
                trainer.scaler.update()
            self._name([f"the gradient of {self._bad_parameters()}"])
            self._decide("the gradient is not finite")
        else:
            if trainer.scaler and not self._stepped:
                self._overflow(trainer.scaler.get_scale())
        finally:
            trainer.clip_grad_norm = clip

    def _before_optimizer(self, *_: object) -> None:
        """Clip the gradients as the config says, and let no others through than finite ones."""
        self._stepped = True
        if self.policy == FAIRCHEM:
            return
        trainer = self.trainer
        try:
            norm = torch.nn.utils.clip_grad_norm_(
                trainer.model.parameters(), self._clip or torch.inf, error_if_nonfinite=True
            )
        except RuntimeError as error:
            if "non-finite" not in str(error):
                raise
            raise NonFiniteGradientsError from error
        if self._clip and trainer.logger is not None:
            trainer.logger.log({"grad_norm": norm}, step=trainer.step, split="train")

    def _bad_parameters(self) -> str:
        names = [
            name
            for name, parameter in self.trainer.model.named_parameters()
            if parameter.grad is not None and not parameter.grad.isfinite().all()
        ]
        which = f"{names[0]} and {len(names) - 1} more parameters" if names else "its norm"
        of = finite.everyone(self._batch) if self._batch is not None else ""
        return f"{which} is not finite, of {of}"

    def _overflow(self, scale: float) -> None:
        """The scaler left out an update and made its scale smaller: its way of working."""
        self.skipped += 1
        self._name([f"gradients beyond the range of fp16, not applied; the scale is {scale:g} now"])
        if scale < 1:
            self._name([f"the gradient of {self._bad_parameters()}"])
            raise StoppedError(
                f"step {self.trainer.step}: gradients are not finite in fp16 at any scale; train "
                "without --amp, or with a lower optim.lr_initial"
            )

    def _save(self, original: Callable[..., str | None], *args: Any, **settings: Any) -> str | None:
        """As it was; who cannot write says so where all ranks hear it."""
        try:
            return original(*args, **settings)
        except StoppedError as error:
            self._failure = StoppedError(f"step {self.trainer.step}: {error}", error.status)
            if not settings.get("training_state", True) and self.trainer.ema:
                self.trainer.ema.restore()  # which the save has exchanged
            return None

    def _save_and_end(self, status: int) -> None:
        """End this training with its state saved, on all ranks.

        In a Slurm job SIGTERM comes before a cancellation, a preemption and the end of its time.
        Who ends then by itself is not requeued: the training is saved, and goes on.
        """
        trainer, number = self.trainer, status - SIGNALLED
        trainer.save(checkpoint_file="checkpoint.pt", training_state=True)
        distutils.synchronize()
        if self._failure:
            raise self._failure
        where = f"step {trainer.step}, which is saved in {trainer.config['cmd']['checkpoint_dir']}"
        how = f"go on with the same command and --timestamp-id {trainer.timestamp_id}"
        if self._signals.passes(number):
            self._signals.forget(number)
            if distutils.is_master():
                name = signal.Signals(number).name
                logger.warning("%s after %s; if this job is not requeued, %s", name, where, how)
            return
        # Who requeues is the first rank; the others must not end with an error before it has.
        if number == REQUEUE and self._signals.hand_on(number) and not distutils.is_master():
            raise SystemExit(0)
        raise StoppedError(f"{signal.Signals(number).name}: stopped after {where}; {how}", status)
