"""What the checkpoints of a run hold, which of them is the best, and how a run goes on from one."""

import logging
import math
import os
import pickle
import shutil
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from peft import PeftModel
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from minionerec.checkpoint import RUN_FILE, is_complete
from minionerec.errors import InputError
from minionerec.model import adapters, sid_rows
from minionerec.model.sharding import local_shard
from minionerec.model_card import write_card
from minionerec.process_memory import peak_memory_gb
from minionerec.saving import make_readable, record_dtype, write_json
from minionerec.training.engines import AnyEngine
from minionerec.training.failures import Failures
from minionerec.training.stopping import Grace


class SavedRun(AnyEngine):
    """A mixin for a Trainer whose checkpoints are complete or absent, and that resumes exactly.

    Every checkpoint holds `run`, the resolved configuration, with the seconds and the peak memory of the training
    so far, and what the log still lacks. Its trainer state is written last, after all processes have written their
    files.
    """

    run: dict
    save_dtype: torch.dtype | None = None  # of saved weights; None for the type they train in
    _seconds_before = _peak_before = 0.0  # of the run that is resumed
    _started: float | None = None  # None if nothing was trained
    _log_now: dict[str, object]  # of the checkpoint that is being written
    _saved_step = 0  # of the newest checkpoint
    _rates: list[float]  # learning rates of the parameter groups, before the schedule

    def __init__(self, *args: object, **kwargs: object):
        super().__init__(*args, **kwargs)
        self._failures, self._grace = Failures(self.args.output_dir), Grace(self.accelerator.print)
        self._rates = []

    @property
    def seconds(self) -> float:
        """Seconds of training up to now, including those before the checkpoint that the run resumed from."""
        return self._seconds_before + (time.perf_counter() - self._started if self._started is not None else 0.0)

    @property
    def peak_memory_gb(self) -> float:
        """The peak memory of training up to now, including that before the checkpoint that the run resumed from."""
        return max(self._peak_before, peak_memory_gb())

    # --- The best checkpoint ------------------------------------------------------------------------------------------

    @property
    def loads_best(self) -> bool:
        """Whether the best checkpoint becomes the model at the end. A run that resumed without evaluations may still
        know one from before."""
        return self.args.load_best_model_at_end and self.state.best_model_checkpoint is not None

    @property
    def best_metric(self) -> float | None:
        """The metric of `best_checkpoint`."""
        return self.state.best_metric if self.loads_best else None

    @property
    def best_checkpoint(self) -> str | None:
        """The checkpoint that the model has at the end as the best one, relative to the run's folder, which may be
        moved; `start` for the model before the first step, None for the last model."""
        best = self.state.best_model_checkpoint if self.loads_best else None
        if best and self.state.best_global_step == 0:
            return "start"
        return os.path.relpath(best, self.args.output_dir) if best else None

    # --- Resuming -----------------------------------------------------------------------------------------------------

    def unlogged(self) -> dict[str, object]:
        """What a checkpoint keeps so that the log of a resumed run is that of the whole one: the sum of the losses, and
        those of the steps since the last entry. Every process must call it."""
        loss = self._tr_loss.detach()
        if self.args.world_size > 1:
            loss = self.accelerator.gather(loss).mean()
        return {"total": self._total_loss_scalar, "loss": loss.item(), "step": self._globalstep_last_logged}

    def continue_log(self, before: dict) -> None:
        """Takes over what `unlogged` gave when the checkpoint was written."""
        self._total_loss_scalar, self._globalstep_last_logged = before["total"], before["step"]
        self._tr_loss += before["loss"]

    def _init_training_state(
        self, max_steps: int, steps_per_epoch: int, epochs: int, resume_from_checkpoint: str | None, trial: None
    ) -> tuple[int, int]:
        """As the Trainer's, which looks for the best checkpoint at its recorded path. Here it is looked for next to the
        checkpoint that the run resumes from first, because the run's folder may have been moved."""
        with _without_log("The best checkpoint", "Warning: The following arguments do not match"):
            trained = super()._init_training_state(max_steps, steps_per_epoch, epochs, resume_from_checkpoint, trial)
        self.state.compute_steps(self.args, max_steps)  # else evaluations and saves are those of the earlier run
        done, step = self.state.global_step, self.state.best_global_step
        self._saved_step = done if resume_from_checkpoint else 0
        if resume_from_checkpoint and step is not None:
            folder = os.path.dirname(os.path.normpath(resume_from_checkpoint)) or os.curdir
            if os.path.isdir(self.args.output_dir) and os.path.samefile(folder, self.args.output_dir):
                # The Trainer keeps the best checkpoint by comparing paths as text, so they must be spelled alike.
                folder = self.args.output_dir
            best, recorded = os.path.join(folder, f"checkpoint-{step}"), self.state.best_model_checkpoint
            if recorded and is_complete(recorded) and not is_complete(best):  # the run resumed from another folder
                best = recorded
            self.state.best_model_checkpoint = best if is_complete(best) else None
            if not is_complete(best):
                self.accelerator.print(f"warning: the best checkpoint, {best}, no longer exists")
        if resume_from_checkpoint and done >= max_steps:
            self.accelerator.print(
                f"nothing is left to train: {resume_from_checkpoint} is at step {done} of {max_steps}; "
                f"{'the best checkpoint' if self.loads_best else 'it'} becomes final_checkpoint"
            )
        return trained

    def create_scheduler(self, *args: object, **kwargs: object) -> torch.optim.lr_scheduler.LRScheduler:
        scheduler = super().create_scheduler(*args, **kwargs)
        self._rates[:] = scheduler.base_lrs  # in place: DeepSpeed has a copy of the trainer make the scheduler
        return scheduler

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """As the Trainer's, but the learning rates are those of this run's flags and of its steps: a checkpoint brings
        its own back."""
        super()._load_optimizer_and_scheduler(checkpoint)
        scheduler = getattr(self.lr_scheduler, "scheduler", self.lr_scheduler)  # accelerate wraps it
        if checkpoint is None or not isinstance(scheduler, LambdaLR):
            return
        scheduler.base_lrs = self._rates
        shares = [share(scheduler.last_epoch) for share in scheduler.lr_lambdas]
        for group, rate, share in zip(self.optimizer.param_groups, self._rates, shares, strict=True):
            group["initial_lr"], group["lr"] = rate, rate * share
        scheduler._last_lr = [group["lr"] for group in self.optimizer.param_groups]

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        """As the Trainer's, without warnings about tied weights: a checkpoint has one of their names, and loading it
        fills both."""
        tied = {
            *getattr(self.model, "all_tied_weights_keys", {}),
            *(f"{name}.{sid_rows.OWN_ROWS}" for name in sid_rows.own_rows(self.model)),
        }
        missing = [name for name in load_result.missing_keys if name not in tied]
        super()._issue_warnings_after_load(load_result._replace(missing_keys=missing))

    # --- Saving -------------------------------------------------------------------------------------------------------

    def _save_checkpoint(self, model: nn.Module, trial: None) -> None:
        step = self.state.global_step
        trained = [local_shard(p) for p in self.model.parameters() if p.requires_grad]
        if not _all_finite([tensor for tensor in trained if tensor.numel()]):
            good = self._failures.last_good()
            self._failures.later(
                f"weights are NaN or infinite at step {step}; the last good checkpoint is {good}. Try a smaller "
                "--learning_rate"
            )
        self._failures.together()
        self._log_now = self.unlogged()
        try:
            # An engine writes its files between collectives of its own, where the processes cannot fail together.
            at_once = self.is_deepspeed_enabled or self.is_fsdp_enabled
            with self._grace.measuring("checkpoint"), self._writing_checkpoint(at_once):
                super()._save_checkpoint(model, trial)
            self._failures.together()
            self._saved_step = step
        except BaseException:
            shutil.rmtree(os.path.join(self.args.output_dir, f"checkpoint-{step}"), ignore_errors=True)
            raise

    def _writing_checkpoint(self, at_once: bool = False) -> AbstractContextManager[None]:
        """As `Failures.writing`."""
        return self._failures.writing(f"the checkpoint of step {self.state.global_step}", at_once)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        """As the Trainer's, with the resolved configuration and without a pickle. SID rows with a rate of their own are
        put into their matrices, tied weights are saved once, and of an adapted model its adapter."""
        if self.is_deepspeed_enabled and self.args.fp16:
            state_dict = {**(state_dict or {}), **self.float32_weights()}
        if sid_rows.own_rows(self.model) and self.args.should_save:
            state_dict = dict(state_dict if state_dict is not None else self.model.state_dict())
            sid_rows.merge_own_rows(self.model, state_dict)
        if self.save_dtype is not None and self.args.should_save:
            state_dict = state_dict if state_dict is not None else self.model.state_dict()
            state_dict = {n: t.to(self.save_dtype) if t.is_floating_point() else t for n, t in state_dict.items()}
        if state_dict is not None:  # an engine gathers tied matrices twice
            tied = getattr(self.model, "all_tied_weights_keys", {})
            state_dict = {name: tensor for name, tensor in state_dict.items() if name not in tied}
        elif isinstance(self.model, PeftModel):  # of the whole base, bitsandbytes would read a value of every layer
            state_dict = adapters.adapter_state(self.model)
        folder = output_dir or self.args.output_dir
        in_checkpoint = os.path.basename(folder) == f"checkpoint-{self.state.global_step}"
        with self._writing_checkpoint() if in_checkpoint else nullcontext():
            super()._save(output_dir, state_dict)
            if self.args.should_save:
                if self.save_dtype is not None:
                    record_dtype(folder, str(self.save_dtype).removeprefix("torch."))
                os.remove(os.path.join(folder, "training_args.bin"))  # a pickle, which nothing here reads
                unlogged = {"unlogged": self._log_now} if in_checkpoint else {}
                cost = {"seconds": self.seconds, "peak_memory_gb": self.peak_memory_gb}
                write_json(os.path.join(folder, RUN_FILE), {**self.run, **cost, **unlogged})
                write_card(folder, self.run)
                make_readable(folder)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        self._failures.together()
        super()._save_optimizer_and_scheduler(output_dir)

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        self._failures.together()  # the trainer state is written only if all processes have written their files


def _all_finite(tensors: list[torch.Tensor]) -> bool:
    """Whether no tensor holds NaN or an infinite value: their largest absolute values, read together."""
    if not tensors:
        return True
    largest = torch._foreach_norm([tensor.detach() for tensor in tensors], math.inf)
    return bool(torch.stack([value.float() for value in largest]).isfinite().all())


@contextmanager
def unpickling_nothing(checkpoint: str | None) -> Iterator[None]:
    """Turns the error that torch raises for a state file with code in it into InputError."""
    problem = ""
    try:
        yield
    except RuntimeError as error:
        if "PytorchStreamReader" not in str(error):
            raise
        problem = "is damaged"
    except pickle.UnpicklingError:
        problem = "contains more than tensors and plain values and is not loaded"
    if problem:
        raise InputError(
            f"--resume_from_checkpoint {checkpoint}: a .pt or .pth file there {problem}; resume from another checkpoint"
        )


@contextmanager
def _without_log(*beginnings: str) -> Iterator[None]:
    """While open, the Trainer logs no message that starts with one of these."""
    loggers = [logging.getLogger(f"transformers.{name}") for name in ("trainer", "trainer_utils")]

    def wanted(record: logging.LogRecord) -> bool:
        return not record.getMessage().startswith(beginnings)

    for logger in loggers:
        logger.addFilter(wanted)
    try:
        yield
    finally:
        for logger in loggers:
            logger.removeFilter(wanted)
