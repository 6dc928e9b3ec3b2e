"""What makes a Trainer's run durable: checkpoints to resume from, however it ends."""

import logging
import os
import pickle
import shutil
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace

import torch
from accelerate.utils import gather_object
from safetensors import SafetensorError
from transformers import EarlyStoppingCallback, Trainer, TrainerCallback

from minionerec.checkpoint import RUN_FILE, Checkpoint, is_complete, newest_checkpoint
from minionerec.errors import InputError, RunError
from minionerec.model import adapters
from minionerec.model.sharding import local_shard
from minionerec.process_memory import forget_peak_of_loading
from minionerec.saving import record_dtype, write_json


class DurableRun:
    """For a Trainer: a run that leaves checkpoints to go on from, however it ends.

    Every checkpoint holds `run`, the resolved configuration, with the seconds trained so far. Its trainer state is
    written last, when all processes have written theirs. Ctrl-C and SIGTERM save one before they stop the run. A loss
    that is no number, or a checkpoint that cannot be written, ends it with the last good checkpoint named (RunError).
    """

    run: dict
    save_dtype: torch.dtype | None = None  # of the weights that are saved; None as they train
    _seconds_before = 0.0
    _started: float | None = None  # where it never is, nothing was trained
    _problem: str | None = None  # what ends the run as soon as all processes know

    def __init__(self, *args, **kwargs):
        # Without a launcher transformers would wrap the model for all visible GPUs in nn.DataParallel and multiply the
        # batch, of a quantized model without a word.
        kwargs["args"]._n_gpu = min(kwargs["args"].n_gpu, 1)
        super().__init__(*args, **kwargs)
        plugin = self.accelerator.state.fsdp_plugin if self.is_fsdp_enabled else None
        if plugin and plugin.mixed_precision_policy:  # accelerate's also adds gradients and returns logits in 16 bits
            policy = replace(plugin.mixed_precision_policy, reduce_dtype=torch.float32, output_dtype=None)
            plugin.mixed_precision_policy = policy

    def _build_accelerator_args(self, **kwargs) -> dict:
        """The Trainer's; under DDP gradients then are views of its buckets, not a second copy."""
        args = super()._build_accelerator_args(**kwargs)
        args["kwargs_handlers"][0].gradient_as_bucket_view = True
        return args

    def train(self, resume: Checkpoint | None = None, **kwargs):
        """The Trainer's, from a checkpoint where one is given (`training.resume`)."""
        path = resume.path if resume else None
        self._seconds_before = resume.run.get("seconds", 0.0) if resume else 0.0
        self._started = time.perf_counter()
        forget_peak_of_loading()
        with _stop_on_signals(self) as stop, _unpickling_nothing(path):
            result = super().train(path, **kwargs)
        if stop.stopped:
            raise RunError(
                f"stopped at step {self.state.global_step} of {self.state.max_steps} and saved {self._last_good()}; "
                "the same command with --resume_from_checkpoint True goes on from there",
                exit_code=130,
                everywhere=True,
            )
        return result

    @property
    def best_checkpoint(self) -> str | None:
        """The best checkpoint, as seen from the run's folder, which may be moved."""
        best = self.state.best_model_checkpoint
        return os.path.relpath(best, self.args.output_dir) if best else None

    def _init_training_state(self, max_steps, steps_per_epoch, epochs, resume_from_checkpoint, trial):
        """The Trainer's, which records where the best checkpoint was; here it is looked for beside the one that the run
        goes on from, wherever the two are now."""
        with _without("The best checkpoint"):
            trained = super()._init_training_state(max_steps, steps_per_epoch, epochs, resume_from_checkpoint, trial)
        step = self.state.best_global_step
        if resume_from_checkpoint and step:
            folder = os.path.dirname(os.path.normpath(resume_from_checkpoint)) or os.curdir
            if os.path.isdir(self.args.output_dir) and os.path.samefile(folder, self.args.output_dir):
                folder = self.args.output_dir  # the same text too, by which the best one is spared when others go
            best = os.path.join(folder, f"checkpoint-{step}")
            self.state.best_model_checkpoint = best if is_complete(best) else None
            if not is_complete(best):
                self.accelerator.print(f"warning: the best checkpoint, {best}, is not there any more")
        return trained

    def _issue_warnings_after_load(self, load_result) -> None:
        """The Trainer's, without tied weights: a checkpoint holds one of their names, and loading it fills both."""
        tied = getattr(self.model, "all_tied_weights_keys", {})
        missing = [name for name in load_result.missing_keys if name not in tied]
        super()._issue_warnings_after_load(load_result._replace(missing_keys=missing))

    def _run_epoch(self, *args, **kwargs):
        """The Trainer's, unless the run it goes on from had ended by itself: then nothing is left to train."""
        stops = (c for c in self.callback_handler.callbacks if isinstance(c, EarlyStoppingCallback))
        if any(stop.early_stopping_patience_counter >= stop.early_stopping_patience for stop in stops):
            self.control.should_training_stop = True
        else:
            super()._run_epoch(*args, **kwargs)

    def _prepare_for_training(self, *args, **kwargs):
        with adapters.ready_for_fsdp(self.model) if self.is_fsdp_enabled else nullcontext():
            return super()._prepare_for_training(*args, **kwargs)

    @property
    def seconds(self) -> float:
        """Seconds of training up to now, those before the checkpoint that it goes on from included."""
        return self._seconds_before + (time.perf_counter() - self._started if self._started is not None else 0.0)

    def training_step(self, *args, **kwargs):
        loss = super().training_step(*args, **kwargs)
        if not torch.isfinite(loss):
            overflow = (
                ", or a GPU of compute capability 8, since this one computes in float16" if self.args.fp16 else ""
            )
            self._fail_later(
                f"the loss is {loss.item()} at step {self.state.global_step + 1}; the last good checkpoint is "
                f"{self._last_good()}. A smaller --learning_rate is the usual remedy{overflow}"
            )
        if self.accelerator.sync_gradients:  # before the optimizer sees the gradients
            failed = torch.tensor([self._problem is not None], device=self.args.device)
            if self.args.world_size > 1:
                failed = self.accelerator.gather(failed)
            if failed.any():
                self._fail_together()
        return loss

    def _fail_later(self, problem: str) -> None:
        """Keeps a reason to end the run until all processes ask for one: those that do not know of it would wait for
        this one in their next collective."""
        self._problem = self._problem or problem

    def _fail_together(self) -> None:
        """Raises RunError in every process where any of them has a reason. All must call it."""
        problems = [problem for problem in gather_object([self._problem]) if problem]
        self._problem = None
        if problems:
            raise RunError(problems[0], everywhere=True)

    @contextmanager
    def _writing_checkpoint(self, at_once: bool = False) -> Iterator[None]:
        """What cannot be written ends the run, at the next `_fail_together` or `at_once`."""
        try:
            with writing(f"the checkpoint of step {self.state.global_step}"):
                yield
        except RunError as error:
            if error.everywhere:
                raise
            problem = (
                f"{error}; the last good checkpoint is {self._last_good()}. With room to write, the same command with "
                "--resume_from_checkpoint True goes on from it"
            )
            if at_once:
                raise RunError(problem) from None
            self._fail_later(problem)

    def _last_good(self) -> str:
        return newest_checkpoint(self.args.output_dir) or "none, the run has saved none yet"

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        if self.save_dtype is not None and self.args.should_save:
            state_dict = state_dict if state_dict is not None else self.model.state_dict()
            state_dict = {n: t.to(self.save_dtype) if t.is_floating_point() else t for n, t in state_dict.items()}
        if state_dict is not None:  # gathered by an engine, tied matrices twice
            tied = getattr(self.model, "all_tied_weights_keys", {})
            state_dict = {name: tensor for name, tensor in state_dict.items() if name not in tied}
        folder = output_dir or self.args.output_dir
        in_checkpoint = os.path.basename(folder) == f"checkpoint-{self.state.global_step}"
        with self._writing_checkpoint() if in_checkpoint else nullcontext():
            super()._save(output_dir, state_dict)
            if self.args.should_save:
                if self.save_dtype is not None:
                    record_dtype(folder, str(self.save_dtype).removeprefix("torch."))
                os.remove(os.path.join(folder, "training_args.bin"))  # a pickle that nothing here reads
                write_json(os.path.join(folder, RUN_FILE), {**self.run, "seconds": self.seconds})

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        self._fail_together()
        super()._save_optimizer_and_scheduler(output_dir)

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        self._fail_together()  # the trainer state is written when all processes have written theirs

    def _save_checkpoint(self, model, trial) -> None:
        step = self.state.global_step
        trained = (local_shard(p) for p in self.model.parameters() if p.requires_grad)
        if not all(torch.isfinite(tensor).all() for tensor in trained):
            self._fail_later(
                f"weights are no finite numbers any more at step {step}; the last good checkpoint is "
                f"{self._last_good()}. A smaller --learning_rate is the usual remedy"
            )
        self._fail_together()
        try:
            # An engine's own files are written between collectives: its processes can agree on nothing there.
            with self._writing_checkpoint(at_once=self.is_deepspeed_enabled or self.is_fsdp_enabled):
                super()._save_checkpoint(model, trial)
            self._fail_together()
        except RunError:
            shutil.rmtree(os.path.join(self.args.output_dir, f"checkpoint-{step}"), ignore_errors=True)
            raise


@contextmanager
def _unpickling_nothing(checkpoint: str | None) -> Iterator[None]:
    """Turns what torch raises for a state file that would run code into InputError."""
    try:
        yield
    except pickle.UnpicklingError:
        raise InputError(
            f"--resume_from_checkpoint {checkpoint}: a .pt or .pth file there holds more than tensors and plain values "
            "and is not loaded; resume from another checkpoint"
        ) from None


@contextmanager
def writing(what: str) -> Iterator[None]:
    """Turns what the libraries raise when a file cannot be written into RunError."""
    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "inline_container" not in str(error):  # of torch.save
            raise
        raise RunError(f"{what} cannot be written: {str(error).strip().splitlines()[0]}") from None


@contextmanager
def _without(beginning: str) -> Iterator[None]:
    """While open, the Trainer logs nothing that begins so."""
    logger = logging.getLogger("transformers.trainer")

    def wanted(record: logging.LogRecord) -> bool:
        return not record.getMessage().startswith(beginning)

    logger.addFilter(wanted)
    try:
        yield
    finally:
        logger.removeFilter(wanted)


class _Stop(TrainerCallback):
    """Ends a training at the end of the step in which a signal came, with a checkpoint."""

    def __init__(self, trainer: Trainer):
        self.trainer = trainer
        self.asked = self.stopped = False

    def on_signal(self, number, frame) -> None:
        if self.asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        if not self.asked and self.trainer.is_world_process_zero():
            print("\nstopping behind this step, to save it; Ctrl-C again stops at once", file=sys.stderr, flush=True)
        self.asked = True

    def on_step_end(self, args, state, control, **kwargs):
        asked = torch.tensor([self.asked], device=args.device)
        if args.world_size > 1:  # all processes stop behind the same step
            asked = self.trainer.accelerator.gather(asked)
        if asked.any() and state.global_step < state.max_steps:
            self.stopped = control.should_save = control.should_training_stop = True


@contextmanager
def _stop_on_signals(trainer: Trainer) -> Iterator[_Stop]:
    stop = _Stop(trainer)
    trainer.add_callback(stop)
    numbers = (signal.SIGINT, signal.SIGTERM) if threading.current_thread() is threading.main_thread() else ()
    before = {number: signal.signal(number, stop.on_signal) for number in numbers}
    try:
        yield stop
    finally:
        trainer.remove_callback(stop)
        for number, handler in before.items():
            signal.signal(number, handler)
