"""Makes a Trainer's run durable: it leaves checkpoints to resume from, however it ends."""

import logging
import math
import os
import pickle
import shutil
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import gather_object
from bitsandbytes.optim import GlobalOptimManager
from peft import PeftModel
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import (
    EarlyStoppingCallback,
    TrainerCallback,
)
from transformers.trainer_utils import TrainOutput

from minionerec import world
from minionerec.checkpoint import RUN_FILE, Checkpoint, is_complete, newest_checkpoint
from minionerec.errors import InputError, RunError
from minionerec.model import adapters, sid_rows
from minionerec.model.sharding import local_shard
from minionerec.model_card import write_card
from minionerec.output import why_not_written, writing
from minionerec.process_memory import forget_peak_of_loading
from minionerec.saving import make_readable, record_dtype, write_json
from minionerec.training.stopping import Grace, StateOfStep, StepDropped, Stop, stop_on_signals

if TYPE_CHECKING:
    from transformers import Trainer as _Trainer  # what `DurableRun` is mixed into
else:
    _Trainer = object


class DurableRun(_Trainer):
    """A mixin for a Trainer whose run leaves checkpoints to resume from, however it ends.

    Every checkpoint holds `run`, the resolved configuration, with the seconds trained so far. Its trainer state is
    written last, after all processes have written their files. Ctrl-C and SIGTERM stop the run between micro-batches,
    with a checkpoint of the last complete step. A loss that is NaN or infinite, a checkpoint that cannot be written, or
    a process that is gone, ends the run with a RunError that names the last good checkpoint.
    """

    run: dict[str, Any]
    save_dtype: torch.dtype | None = None  # of saved weights; None for the type they train in
    _seconds_before = 0.0
    _log_before: dict[str, Any]  # of the checkpoint that the run resumes from, see `unlogged`
    _log_now: dict[str, Any]  # of the checkpoint that is being written
    _started: float | None = None  # None if nothing was trained
    _problem: str | None = None  # why this process must end the run, once all processes know
    _stop: Stop | None = None  # what signals tell, while the run trains
    _saved_step = 0  # of the newest checkpoint
    _resumed: str | None = None  # the checkpoint that the run resumed from
    _after_step: StateOfStep | None = None  # of the last complete step
    _unread: list[torch.Tensor]  # the losses of the micro-batches of this step

    def __init__(self, *args: Any, **kwargs: Any):
        # Without a launcher, transformers would wrap the model in nn.DataParallel for all visible GPUs and multiply the
        # batch size; for a quantized model it would only multiply the batch size.
        kwargs["args"]._n_gpu = min(kwargs["args"].n_gpu, 1)
        super().__init__(*args, **kwargs)
        self._unread, self._grace = [], Grace(self.accelerator.print)
        plugin = self.accelerator.state.fsdp_plugin if self.is_fsdp_enabled else None
        if plugin and plugin.mixed_precision_policy:  # accelerate would reduce gradients and return logits in 16 bits
            policy = replace(plugin.mixed_precision_policy, reduce_dtype=torch.float32, output_dtype=None)
            plugin.mixed_precision_policy = policy
        if self.is_deepspeed_enabled and self.args.bf16:
            # DeepSpeed would round what trains to bfloat16, compute and save that, and keep float32 to itself. Its
            # float16 stays, because its autocast clips gradients before it unscales them.
            config = self.accelerator.state.deepspeed_plugin.deepspeed_config
            config["bf16"] = {"enabled": False}
            config["torch_autocast"] = {"enabled": True, "dtype": "bfloat16", "lower_precision_safe_modules": []}

    def _build_accelerator_args(self, **kwargs: Any) -> dict[str, Any]:
        """As the Trainer's. Under DDP, gradients are views of its buckets instead of a second copy."""
        args = super()._build_accelerator_args(**kwargs)
        args["kwargs_handlers"][0].gradient_as_bucket_view = True
        return args

    def autocast(self) -> AbstractContextManager[None]:
        """While open, matmuls compute in 16 bits, as in training. Under DeepSpeed accelerate leaves that to the engine,
        which evaluations and decoding do not go through."""
        if self.is_deepspeed_enabled:
            return torch.autocast(self.args.device.type, torch.bfloat16, enabled=self.args.bf16)
        return self.accelerator.autocast()

    def autocast_smart_context_manager(self, *args: Any, **kwargs: Any) -> AbstractContextManager[None]:
        """As the Trainer's, which opens it around every loss and leaves autocast to accelerate."""
        return self.autocast() if self.is_deepspeed_enabled else super().autocast_smart_context_manager(*args, **kwargs)

    def unwrapped(self, model: nn.Module) -> nn.Module:
        """The model inside what accelerate has wrapped it in. accelerate visits every module to find it, which takes
        milliseconds in each micro-batch, so it is asked once."""
        known = self.__dict__.setdefault("_unwrapped", {})
        if model not in known:
            known[model] = self.accelerator.unwrap_model(model)
        return known[model]

    def train(self, resume: Checkpoint | None = None, **kwargs: Any) -> TrainOutput:
        """As the Trainer's, from a checkpoint if one is given (see `training.resume`)."""
        path = resume.path if resume else None
        self._seconds_before = resume.run.get("seconds", 0.0) if resume else 0.0
        self._log_before = resume.run.get("unlogged", {}) if resume else {}
        self.add_callback(_LogGoesOn(self))
        self._started, self._resumed = time.perf_counter(), path
        self._grace = Grace(self.accelerator.print)
        forget_peak_of_loading()
        with (
            stop_on_signals(self) as self._stop,
            _unpickling_nothing(path),
            _bfloat16_files(self.is_deepspeed_enabled),
            self._naming_last_good(),
        ):
            try:
                result = super().train(path, **kwargs)
            except StepDropped:
                self._save_last_step()
            except Exception as error:
                if not (why := why_not_written(error)):  # checkpoints are written below; this was a tracker's log
                    raise
                raise RunError(f"the run cannot write its log: {why}; {self._how_to_go_on()}") from None
        if self._stop.stopped:
            raise RunError(f"stopped at step {self._last_step()}", exit_code=130, everywhere=True)
        return result

    def _last_step(self) -> str:
        """Where a run was stopped, and how it goes on."""
        done, steps = self.state.global_step, self.state.max_steps
        if not self._saved_step:
            return (
                f"{done} of {steps}, before there was anything to save; the same command with "
                "--resume_from_checkpoint True starts anew"
            )
        return (
            f"{done} of {steps} and saved {self._last_good()}; the same command with --resume_from_checkpoint True "
            "continues from there"
        )

    @contextmanager
    def _naming_last_good(self) -> Iterator[None]:
        """While open, a process of the run that is gone ends this one with a line that names the last good
        checkpoint."""

        def what_is_left() -> str:
            goes_on = "continues from it" if newest_checkpoint(self.args.output_dir) or self._resumed else "starts anew"
            return (
                f"the last good checkpoint is {self._last_good()}; the same command with --resume_from_checkpoint True "
                f"{goes_on}"
            )

        world.say_at_the_end(what_is_left)
        try:
            yield
        except RuntimeError as error:
            if not world.lost_a_process(error):
                raise
            raise RunError(f"another process of the run no longer answers; {what_is_left()}") from error
        finally:
            world.say_at_the_end(None)

    @property
    def unlogged_metrics(self) -> dict[str, list]:
        """What steps have added to the next entry of the log, next to the loss."""
        return {}

    def unlogged(self) -> dict[str, Any]:
        """What a checkpoint keeps so that the log of a resumed run is that of the whole one: the sum of the losses, and
        those of the steps since the last entry. Every process must call it."""
        loss = self._tr_loss.detach()
        if self.args.world_size > 1:
            loss = self.accelerator.gather(loss).mean()
        return {"total": self._total_loss_scalar, "loss": loss.item(), "step": self._globalstep_last_logged}

    def continue_log(self, before: dict[str, Any]) -> None:
        """Takes over what `unlogged` gave when the checkpoint was written."""
        self._total_loss_scalar, self._globalstep_last_logged = before["total"], before["step"]
        self._tr_loss += before["loss"]

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """As the Trainer's. The mean loss at the end is that of the whole run, also if it resumed."""
        if "train_loss" in logs:
            logs["train_loss"] = self._total_loss_scalar / max(self.state.global_step, 0.001)
        super().log(logs, *args, **kwargs)

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

    def _init_training_state(
        self, max_steps: int, steps_per_epoch: int, epochs: int, resume_from_checkpoint: str | None, trial: Any
    ) -> tuple[int, int]:
        """As the Trainer's, which looks for the best checkpoint at its recorded path. Here it is looked for next to the
        checkpoint that the run resumes from, because the run's folder may have been moved."""
        with _without_log("The best checkpoint", "Warning: The following arguments do not match"):
            trained = super()._init_training_state(max_steps, steps_per_epoch, epochs, resume_from_checkpoint, trial)
        done, step = self.state.global_step, self.state.best_global_step
        self._saved_step = done if resume_from_checkpoint else 0
        if resume_from_checkpoint and step is not None:
            folder = os.path.dirname(os.path.normpath(resume_from_checkpoint)) or os.curdir
            if os.path.isdir(self.args.output_dir) and os.path.samefile(folder, self.args.output_dir):
                # The Trainer keeps the best checkpoint by comparing paths as text, so they must be spelled alike.
                folder = self.args.output_dir
            best = os.path.join(folder, f"checkpoint-{step}")
            self.state.best_model_checkpoint = best if is_complete(best) else None
            if not is_complete(best):
                self.accelerator.print(f"warning: the best checkpoint, {best}, no longer exists")
        if resume_from_checkpoint and done >= max_steps:
            self.accelerator.print(
                f"nothing is left to train: {resume_from_checkpoint} is at step {done} of {max_steps}; "
                f"{'the best checkpoint' if self.loads_best else 'it'} becomes final_checkpoint"
            )
        return trained

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        """As the Trainer's, without warnings about tied weights: a checkpoint has one of their names, and loading it
        fills both."""
        tied = {
            *getattr(self.model, "all_tied_weights_keys", {}),
            *(f"{name}.{sid_rows.OWN_ROWS}" for name in sid_rows.own_rows(self.model)),
        }
        missing = [name for name in load_result.missing_keys if name not in tied]
        super()._issue_warnings_after_load(load_result._replace(missing_keys=missing))

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        """As the Trainer's, but trains nothing if the run it resumes had already stopped early."""
        stops = (c for c in self.callback_handler.callbacks if isinstance(c, EarlyStoppingCallback))
        if any(stop.early_stopping_patience_counter >= stop.early_stopping_patience for stop in stops):
            self.control.should_training_stop = True
        else:
            super()._run_epoch(*args, **kwargs)

    def _evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        with self._grace.measuring("evaluation"):
            return super()._evaluate(*args, **kwargs)

    def _prepare_for_training(self, *args: Any, **kwargs: Any) -> tuple[nn.Module, Any]:
        with adapters.ready_for_fsdp(self.model) if self.is_fsdp_enabled else nullcontext():
            return super()._prepare_for_training(*args, **kwargs)

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        """As the Trainer's. It has bitsandbytes keep the states of every embedding in 32 bits, also of frozen ones, of
        which those in 8 bits have no weight to register, and of earlier models in this process."""
        manager = GlobalOptimManager.get_instance()
        manager.initialize()
        optimizer = super().create_optimizer(*args, **kwargs)
        registered = manager.module_weight_config_triple
        manager.module_weight_config_triple = [entry for entry in registered if entry[0].weight.requires_grad]
        return optimizer

    @property
    def seconds(self) -> float:
        """Seconds of training up to now, including those before the checkpoint that the run resumed from."""
        return self._seconds_before + (time.perf_counter() - self._started if self._started is not None else 0.0)

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        together = self.accelerator.sync_gradients or self._micro_batches_are_collective()
        if self._drops_step(together):
            raise StepDropped
        if self._stop and self._stop.requested and not together:
            return torch.zeros((), device=self.args.device)  # of a step that will be dropped
        with self._grace.measuring("micro-batch"):
            loss = super().training_step(*args, **kwargs)
        self._unread.append(loss)
        if self.accelerator.sync_gradients:  # before the optimizer uses the gradients
            self._check_losses()
        return loss

    def _check_losses(self) -> None:
        """Ends the run in all processes if any loss of the step is NaN or infinite, or if any process has failed. The
        host waits for a GPU here, once in a step."""
        losses, self._unread = torch.stack(self._unread), []
        good = losses.isfinite().all()
        if self._problem is not None:
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
            self._fail_later(
                f"the loss is {bad[0]} at step {self.state.global_step + 1}; the last good checkpoint is "
                f"{self._last_good()}. Try a smaller --learning_rate{overflow}"
            )
        self._fail_together()

    def _maybe_log_save_evaluate(
        self, tr_loss: torch.Tensor, grad_norm: torch.Tensor | float | None, *args: Any, **kwargs: Any
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

    def _fail_later(self, problem: str) -> None:
        """Keeps a reason to end the run until `_fail_together`. If this process raised now, the others would wait for
        it in their next collective."""
        self._problem = self._problem or problem

    def _fail_together(self) -> None:
        """Raises RunError in every process if any of them has a reason. All processes must call it."""
        problems = [problem for problem in gather_object([self._problem]) if problem]
        self._problem = None
        if problems:
            raise RunError(problems[0], everywhere=True)

    @contextmanager
    def _writing_checkpoint(self, at_once: bool = False) -> Iterator[None]:
        """While open, a file that cannot be written ends the run: at the next `_fail_together`, or `at_once`."""
        try:
            with writing(f"the checkpoint of step {self.state.global_step}"):
                yield
        except RunError as error:
            if error.everywhere:
                raise
            problem = f"{error}; {self._how_to_go_on()}"
            if at_once:
                raise RunError(problem) from None
            self._fail_later(problem)

    def _how_to_go_on(self) -> str:
        """What is left where a file could not be written, and what to do."""
        goes_on = "continues from it" if newest_checkpoint(self.args.output_dir) else "starts anew"
        return (
            f"the last good checkpoint is {self._last_good()}. Make room, then the same command with "
            f"--resume_from_checkpoint True {goes_on}"
        )

    def _last_good(self) -> str:
        return newest_checkpoint(self.args.output_dir) or self._resumed or "none: nothing has been saved yet"

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        if self.is_deepspeed_enabled and self.args.fp16:
            state_dict = {**(state_dict or {}), **self._float32_weights()}
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
                write_json(os.path.join(folder, RUN_FILE), {**self.run, "seconds": self.seconds, **unlogged})
                write_card(folder, self.run)
                make_readable(folder)

    def _float32_weights(self) -> dict[str, torch.Tensor]:
        """What trains, whole and in float32, which DeepSpeed rounds to float16 for the passes. All processes must call
        it."""
        from deepspeed.utils import safe_get_full_fp32_param

        named = ((name, parameter) for name, parameter in self.model.named_parameters() if parameter.requires_grad)
        whole = ((name, safe_get_full_fp32_param(parameter)) for name, parameter in named)
        return {name: tensor.cpu() for name, tensor in whole if self.args.should_save}

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        self._fail_together()
        super()._save_optimizer_and_scheduler(output_dir)

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        self._fail_together()  # the trainer state is written only if all processes have written their files

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        step = self.state.global_step
        trained = [local_shard(p) for p in self.model.parameters() if p.requires_grad]
        if not _all_finite([tensor for tensor in trained if tensor.numel()]):
            self._fail_later(
                f"weights are NaN or infinite at step {step}; the last good checkpoint is {self._last_good()}. Try a "
                "smaller --learning_rate"
            )
        self._fail_together()
        self._log_now = self.unlogged()
        try:
            # An engine writes its files between collectives of its own, where the processes cannot fail together.
            at_once = self.is_deepspeed_enabled or self.is_fsdp_enabled
            with self._grace.measuring("checkpoint"), self._writing_checkpoint(at_once):
                super()._save_checkpoint(model, trial)
            self._fail_together()
            self._saved_step = step
        except BaseException:
            shutil.rmtree(os.path.join(self.args.output_dir, f"checkpoint-{step}"), ignore_errors=True)
            raise


def _all_finite(tensors: list[torch.Tensor]) -> bool:
    """Whether no tensor holds NaN or an infinite value: their largest absolute values, read together."""
    if not tensors:
        return True
    largest = torch._foreach_norm([tensor.detach() for tensor in tensors], math.inf)
    return bool(torch.stack([value.float() for value in largest]).isfinite().all())


@contextmanager
def _bfloat16_files(with_deepspeed: bool) -> Iterator[None]:
    """While open, DeepSpeed also finds the files of a checkpoint of 0.1.0, whose names say that it was in bfloat16."""
    if not with_deepspeed:
        yield
        return
    from deepspeed import DeepSpeedEngine

    names = DeepSpeedEngine._get_all_zero_checkpoint_names

    def found(engine: Any, folder: str, tag: str, bf16_mode: bool) -> list[str]:
        either = [names(engine, folder, tag, mode) for mode in (bf16_mode, not bf16_mode)]
        return next((files for files in either if all(map(os.path.exists, files))), either[0])

    DeepSpeedEngine._get_all_zero_checkpoint_names = found
    try:
        yield
    finally:
        DeepSpeedEngine._get_all_zero_checkpoint_names = names


@contextmanager
def _unpickling_nothing(checkpoint: str | None) -> Iterator[None]:
    """Turns the error that torch raises for a state file with code in it into InputError."""
    try:
        yield
    except RuntimeError as error:
        if "PytorchStreamReader" not in str(error):
            raise
        raise InputError(
            f"--resume_from_checkpoint {checkpoint}: a .pt or .pth file there is damaged; resume from "
            "another checkpoint"
        ) from None
    except pickle.UnpicklingError:
        raise InputError(
            f"--resume_from_checkpoint {checkpoint}: a .pt or .pth file there contains more than tensors and plain "
            "values and is not loaded; resume from another checkpoint"
        ) from None


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


class _LogGoesOn(TrainerCallback):
    """Continues the log of the run that is resumed, as soon as the Trainer has begun one."""

    def __init__(self, trainer: DurableRun):
        self.trainer = trainer

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        if self.trainer._log_before:  # a checkpoint of an older release has none
            self.trainer.continue_log(self.trainer._log_before)
