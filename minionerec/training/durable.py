"""Makes a Trainer's run durable: it leaves checkpoints to resume from, however it ends."""

import math
import time
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import EarlyStoppingCallback, TrainerCallback
from transformers.trainer_utils import TrainOutput

from minionerec.checkpoint import Checkpoint
from minionerec.errors import RunError
from minionerec.output import why_not_written
from minionerec.process_memory import forget_peak_of_loading
from minionerec.training.engines import bfloat16_files
from minionerec.training.saved_run import SavedRun, unpickling_nothing
from minionerec.training.stopping import Grace, StateOfStep, StepDropped, Stop, stop_on_signals


class DurableRun(SavedRun):
    """A mixin for a Trainer whose run leaves checkpoints to resume from, however it ends.

    Ctrl-C and SIGTERM stop the run between micro-batches, with a checkpoint of the last complete step. A loss that is
    NaN or infinite, a checkpoint that cannot be written, or a process that is gone, ends the run with a RunError that
    names the last good checkpoint.
    """

    _stop: Stop | None = None  # what signals tell, while the run trains
    _after_step: StateOfStep | None = None  # of the last complete step
    _unread: list[torch.Tensor]  # the losses of the micro-batches of this step

    def __init__(self, *args: object, **kwargs: object):
        super().__init__(*args, **kwargs)
        self._unread = []

    def train(self, resume: Checkpoint | None = None, **kwargs: object) -> TrainOutput:
        """As the Trainer's, from a checkpoint if one is given (see `training.resume`)."""
        path, record = (resume.path, resume.run) if resume else (None, {})
        self._seconds_before, self._started = record.get("seconds", 0.0), time.perf_counter()
        self._peak_before = record.get("peak_memory_gb", 0.0)
        if before := record.get("unlogged"):  # a checkpoint of an older release has none
            self.add_callback(_LogGoesOn(self, before))
        self._failures.resumed = path
        self._grace = Grace(self.accelerator.print)
        forget_peak_of_loading()
        with (
            stop_on_signals(self) as self._stop,
            unpickling_nothing(path),
            bfloat16_files(self.is_deepspeed_enabled),
            self._failures.naming_last_good(),
        ):
            try:
                result = super().train(path, **kwargs)
            except StepDropped:
                self._save_last_step()
            except Exception as error:
                if not (why := why_not_written(error)):  # a checkpoint raises RunError; this was a tracker's log
                    raise
                raise RunError(f"the run cannot write its log: {why}; {self._failures.how_to_go_on()}") from None
        if self._stop.stopped:
            raise RunError(f"stopped at step {self._last_step()}", exit_code=130, everywhere=True)
        return result

    def _last_step(self) -> str:
        """Where a run was stopped, and how it goes on."""
        done, steps = self.state.global_step, self.state.max_steps
        if not self._saved_step:
            return f"{done} of {steps}, before there was anything to save; {self._failures.again()}"
        return f"{done} of {steps} and saved {self._failures.last_good()}; {self._failures.again()}"

    # --- Steps --------------------------------------------------------------------------------------------------------

    def _run_epoch(self, *args: object, **kwargs: object) -> None:
        """As the Trainer's, but trains nothing if the run it resumes had already stopped early."""
        stops = (c for c in self.callback_handler.callbacks if isinstance(c, EarlyStoppingCallback))
        if any(stop.early_stopping_patience_counter >= stop.early_stopping_patience for stop in stops):
            self.accelerator.print(
                f"nothing is left to train: {self._failures.resumed} is of a run that stopped early; its best "
                "checkpoint becomes final_checkpoint"
            )
            self.control.should_training_stop = True
        else:
            super()._run_epoch(*args, **kwargs)

    def training_step(
        self, model: nn.Module, inputs: Any, num_items_in_batch: torch.Tensor | int | None = None
    ) -> torch.Tensor:
        together = self.accelerator.sync_gradients or self._micro_batches_are_collective()
        if self._drops_step(together):
            raise StepDropped
        if self._stop and self._stop.requested and not together:
            return torch.zeros((), device=self.args.device)  # of a step that will be dropped
        with self._grace.measuring("micro-batch"):
            loss = super().training_step(model, inputs, num_items_in_batch)
        self._unread.append(loss)
        if self.accelerator.sync_gradients:  # before the optimizer uses the gradients
            self._check_losses()
        return loss

    def _check_losses(self) -> None:
        """Ends the run in all processes if any loss of the step is NaN or infinite, or if any process has failed. The
        host waits for a GPU here, once in a step."""
        losses, self._unread = torch.stack(self._unread), []
        good = losses.isfinite().all()
        if self._failures.problem is not None:
            good = torch.zeros_like(good)
        if self.args.world_size > 1:
            good = self.accelerator.gather(good.unsqueeze(0)).all()
        if good:
            return
        bad = [loss for loss in losses.tolist() if not math.isfinite(loss)]
        if bad:
            overflow = (
                " or use a GPU of compute capability 8, because this one computes in float16" if self.args.fp16 else ""
            )
            self._failures.later(
                f"the loss is {bad[0]} at step {self.state.global_step + 1}; the last good checkpoint is "
                f"{self._failures.last_good()}. Try a smaller --learning_rate{overflow}"
            )
        self._failures.together()

    def _maybe_log_save_evaluate(
        self, tr_loss: torch.Tensor, grad_norm: torch.Tensor | float | None, *args: object, **kwargs: object
    ) -> None:
        """As the Trainer's, which would wait for a GPU once for the loss and once for the norm."""
        logs = self.control.should_log and self.state.global_step > self._globalstep_last_logged
        plain = isinstance(grad_norm, torch.Tensor) and not isinstance(grad_norm, DTensor)  # which FSDP has
        if logs and self.args.world_size == 1 and plain:
            loss, grad_norm = torch.stack([tr_loss, torch.as_tensor(grad_norm).to(tr_loss)]).tolist()
            tr_loss.zero_()  # now, because a checkpoint that is saved in there keeps the losses that are not logged yet
            super()._maybe_log_save_evaluate(torch.tensor(loss, dtype=tr_loss.dtype), grad_norm, *args, **kwargs)
        else:
            super()._maybe_log_save_evaluate(tr_loss, grad_norm, *args, **kwargs)
        self._after_step = StateOfStep(self)
        self._grace.step_ended(self.current_gradient_accumulation_steps)

    def _evaluate(self, *args: object, **kwargs: object) -> dict[str, float]:
        with self._grace.measuring("evaluation"):
            return super()._evaluate(*args, **kwargs)

    # --- The log ------------------------------------------------------------------------------------------------------

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """As the Trainer's. The mean loss at the end is that of the whole run, also if it resumed."""
        if "train_loss" in logs:
            logs["train_loss"] = self._total_loss_scalar / max(self.state.global_step, 0.001)
        super().log(logs, start_time)

    @property
    def unlogged_metrics(self) -> dict[str, list]:
        """What steps have added to the next entry of the log, next to the loss."""
        return {}

    # --- Stopping -----------------------------------------------------------------------------------------------------

    def _micro_batches_are_collective(self) -> bool:
        """Whether every micro-batch has collectives; else only the last one of a step, in which gradients are
        averaged."""
        return True

    def _drops_step(self, together: bool) -> bool:
        """Whether the step that this micro-batch belongs to is not finished, because the run is to stop. `together`:
        all processes are at this micro-batch, so that they can get the same answer."""
        if self._stop is None:
            return False
        if self.args.world_size == 1:
            return self._stop.requested
        if not together or self.current_gradient_accumulation_steps == 1:  # a single one: asked after the step
            return False
        requested = torch.tensor([self._stop.requested], device=self.args.device)
        return bool(self.accelerator.gather(requested).any())

    def stop_between_passes(self) -> None:
        """Drops a step that is made in several passes, if the run is to stop; only where no other process waits."""
        if self.args.world_size == 1 and self._stop and self._stop.requested:
            raise StepDropped

    def _save_last_step(self) -> None:
        """Saves the last complete step, after a part of the next one."""
        assert self._stop is not None
        self._stop.stopped = True
        if self._after_step and self._saved_step != self.state.global_step:
            self._after_step.restore(self)
            self._save_checkpoint(self.model, None)


class _LogGoesOn(TrainerCallback):
    """Continues the log of the run that is resumed, as soon as the Trainer has begun one."""

    def __init__(self, trainer: SavedRun, before: dict):
        self.trainer, self.before = trainer, before

    def on_train_begin(self, *args: object, **kwargs: object) -> None:
        self.trainer.continue_log(self.before)
