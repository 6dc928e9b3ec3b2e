"""The SFT trainer: a Hugging Face `Trainer` whose loss runs the output head on response positions only.

Dimensions: `B` rows, `L` tokens, `N` response tokens in the batch, `H` hidden, `V` vocabulary.
"""

import json
import logging
import os
import pickle
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import fields, replace

import numpy as np
import torch
import torch.nn.functional as F
from accelerate.utils import AutocastKwargs, gather_object
from safetensors import SafetensorError
from torch.utils.data import Sampler
from transformers import EarlyStoppingCallback, Trainer, TrainerCallback, TrainerState

import lora_utils
from minionerec import modeling
from minionerec.checkpoint import (
    RUN_FILE,
    check_trainer_state,
    make_portable,
    read_run,
    record_dtype,
    write_json,
)
from minionerec.cli import InputError, RunError
from minionerec.dataset import IGNORE
from minionerec.head import head_on
from minionerec.resident import peak_rss_gb, reset_peak_rss
from minionerec.sharding import local_shard, with_sid_rows_merged


def response_logits(model, inputs: dict[str, torch.Tensor], unwrapped=None) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits [N, V] that predict the response tokens of a batch, and those tokens [N].

    No token sees what stands behind it, so none sees the padding, and attention needs no mask for it: it runs in the
    kernels that know the causal one alone.

    Args:
        model: a causal LM, wrapped for distributed training or not.
        inputs: input_ids, labels [B, L], padded on the right.
        unwrapped: the model inside the wrappers, where there are any.
    """
    targets = inputs["labels"][:, 1:]
    predicts = F.pad(targets != IGNORE, (0, 1))  # position t predicts token t + 1; the last one predicts none
    with head_on(unwrapped if unwrapped is not None else model, predicts):
        logits = model(input_ids=inputs["input_ids"], use_cache=False).logits
    return logits, targets[targets != IGNORE]


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

    def train(self, resume_from_checkpoint: str | None = None, **kwargs):
        self._seconds_before = read_run(resume_from_checkpoint).get("seconds", 0.0) if resume_from_checkpoint else 0.0
        self._started = time.perf_counter()
        forget_peak_of_loading()
        with _stop_on_signals(self) as stop, _unpickling_nothing(resume_from_checkpoint):
            result = super().train(resume_from_checkpoint, **kwargs)
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

    def _run_epoch(self, *args, **kwargs):
        """The Trainer's, unless the run it goes on from had ended by itself: then nothing is left to train."""
        stops = (c for c in self.callback_handler.callbacks if isinstance(c, EarlyStoppingCallback))
        if any(stop.early_stopping_patience_counter >= stop.early_stopping_patience for stop in stops):
            self.control.should_training_stop = True
        else:
            super()._run_epoch(*args, **kwargs)

    def _prepare_for_training(self, *args, **kwargs):
        with lora_utils.ready_for_fsdp(self.model) if self.is_fsdp_enabled else nullcontext():
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


class StepSampler(Sampler):
    """A random order of the examples, in which those of an optimizer step stand from the longest to the shortest.

    A step's gradient does not depend on how its examples are spread over micro-batches; its padding does, and so does
    the time it takes. What needs the most memory comes first. The order follows from the seed and the epoch only, so
    that a resumed run meets the same steps.

    Args:
        lengths: tokens of every example.
        step_rows: examples of an optimizer step, over all processes.
        seed: of the order, which is another one every epoch.
        group_by_length: sort the examples of up to 50 steps, but at most a quarter of all, together: those of a step
            are then of similar length. The longest example comes first of all.
    """

    def __init__(self, lengths: Sequence[int], step_rows: int, seed: int, group_by_length: bool = False):
        self.lengths, self.seed = np.asarray(lengths), seed
        steps = min(50, len(self.lengths) // (4 * step_rows)) if group_by_length else 1
        self.sorted_rows, self.group_by_length = step_rows * max(steps, 1), group_by_length
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        order = np.random.default_rng((self.seed, self.epoch)).permutation(len(self))
        if self.group_by_length:
            longest = self.lengths[order].argmax()
            order[[0, longest]] = order[[longest, 0]]
        for start in range(0, len(order), self.sorted_rows):
            rows = order[start : start + self.sorted_rows]
            yield from rows[np.argsort(-self.lengths[rows], kind="stable")].tolist()


class SFTTrainer(DurableRun, Trainer):
    """Supervised fine-tuning on prompts and responses.

    The loss of an optimizer step is the mean cross-entropy over its response tokens, however they are spread over
    micro-batches and processes.
    """

    def __init__(self, *args, run: dict, **kwargs):
        super().__init__(*args, **kwargs)
        self.run = run
        # The Trainer then counts the response tokens of an accumulated batch and leaves the division to compute_loss.
        self.model_accepts_loss_kwargs = True

    def _build_accelerator_args(self, **kwargs) -> dict:
        args = super()._build_accelerator_args(**kwargs)
        # Autocast would keep its 16-bit copy of all weights to the end of a forward pass, which uses each once.
        if self.args.activation_checkpointing:
            args["kwargs_handlers"].append(AutocastKwargs(cache_enabled=False))
        return args

    def _get_train_sampler(self, train_dataset=None) -> Sampler:
        args = self.args
        if args.train_sampling_strategy not in ("random", "group_by_length"):
            return super()._get_train_sampler(train_dataset)
        step_rows = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
        grouped = args.train_sampling_strategy == "group_by_length"
        return StepSampler(self.train_dataset["length"][:], step_rows, args.seed, grouped)

    def _get_eval_sampler(self, eval_dataset) -> Sampler:
        """From the longest to the shortest: little padding, and rows that do not fit are met first."""
        return StepSampler(eval_dataset["length"][:], len(eval_dataset), self.args.seed)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        unwrapped = self.accelerator.unwrap_model(model)
        logits, targets = response_logits(model, inputs, unwrapped)
        losses = F.cross_entropy(logits.float(), targets, reduction="none")
        if not unwrapped.training:
            # The mean over rows of each one's mean: it does not depend on which rows share a batch.
            answered = inputs["labels"][:, 1:] != IGNORE
            weights = 1 / answered.sum(dim=1, keepdim=True).expand_as(answered)[answered]
            loss = (losses * weights).sum() / len(answered)
        else:
            # Gradients are averaged over processes; the count is that of all of them.
            loss = losses.sum() / num_items_in_batch * self.accelerator.num_processes
        return (loss, {"loss": loss}) if return_outputs else loss


def is_complete(checkpoint: str) -> bool:
    """Whether a checkpoint was written to its end: it has a whole trainer state, which comes last."""
    try:
        with open(os.path.join(checkpoint, "trainer_state.json"), encoding="utf-8") as file:
            return isinstance(json.load(file), dict)
    except (OSError, ValueError):
        return False


def newest_checkpoint(output_dir: str) -> str | None:
    """The complete checkpoint of the latest step under `output_dir`, or None."""
    found = []
    for name in os.listdir(output_dir) if os.path.isdir(output_dir) else []:
        step = name.removeprefix("checkpoint-")
        if name != step and step.isdigit() and is_complete(os.path.join(output_dir, name)):
            found.append((int(step), os.path.join(output_dir, name)))
    return max(found)[1] if found else None


# Flags that may differ between a run and its continuation without a word, and those that may not differ at all.
NOT_OF_THE_TRAINING = ("output_dir", "resume_from_checkpoint", "wandb_project", "wandb_run_name", "report_to")
OF_THE_ADAPTER = ("lora_r", "lora_alpha", "lora_target_modules", "use_rslora", "use_dora", "load_in_8bit")


def resume_point(
    output_dir: str, resume_from_checkpoint: str | None, run: dict, say: Callable[[str], None]
) -> str | None:
    """The checkpoint that `--resume_from_checkpoint` means: itself, or for True the newest one, None where there is
    none yet. Where other flags differ from those of the run that wrote it, that is said.

    Raises InputError for one that was not written to its end, or that `run` cannot go on from: of another command,
    method, adapter or base.
    """
    checkpoint = _checkpoint_meant(output_dir, resume_from_checkpoint, say)
    if checkpoint:
        check_trainer_state(checkpoint, {field.name for field in fields(TrainerState)})
    recorded = read_run(checkpoint) if checkpoint else {}
    if not recorded:
        return checkpoint
    flags, before = run["flags"], recorded.get("flags", {})
    adapted = OF_THE_ADAPTER if run["method"] in ("lora", "qlora") else ()
    problems = [
        f"--resume_from_checkpoint: {checkpoint} is of another run: {what} was {old} there and is {new} here"
        for what, old, new in (
            ("the command", recorded.get("command"), run["command"]),
            ("the method", recorded.get("method"), run["method"]),
            ("the base", recorded.get("base_fingerprint"), run["base_fingerprint"]),
            *((f"--{name}", before.get(name), flags[name]) for name in adapted),
        )
        if old != new
    ]
    if problems:
        raise InputError(problems)
    for name in sorted(set(flags) & set(before) - {*NOT_OF_THE_TRAINING, *adapted}):
        if flags[name] != before[name]:
            say(f"warning: --{name} is {flags[name]} here and was {before[name]} up to {checkpoint}")
    return checkpoint


def _checkpoint_meant(output_dir: str, resume_from_checkpoint: str | None, say: Callable[[str], None]) -> str | None:
    if resume_from_checkpoint not in ("True", "true"):
        if resume_from_checkpoint is not None and not is_complete(resume_from_checkpoint):
            raise InputError(
                f"--resume_from_checkpoint {resume_from_checkpoint}: is no complete checkpoint of a training run; True "
                "takes the newest one that is"
            )
        return resume_from_checkpoint
    newest = newest_checkpoint(output_dir)
    say(f"resuming from {newest}" if newest else f"nothing to resume in {output_dir}; starting anew")
    return newest


def forget_peak_of_loading() -> None:
    """Starts the count of `peak_memory_gb` anew, for the peak of training: loading may hold a weight twice, and on a
    CPU Linux counts the pages of the weight files as resident until they are wanted elsewhere."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    with suppress(OSError):  # where it is forbidden, or no Linux, the peak is that of the whole process
        reset_peak_rss()


def peak_memory_gb() -> float:
    """The most memory this process has held, in GB (1e9 bytes): on the GPU where there is one, else resident, since it
    started or `forget_peak_of_loading`."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e9
    try:
        return peak_rss_gb()
    except OSError:  # not Linux
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e9


def folder_size_mb(path: str) -> float:
    """The size of the files in a folder, in MB (1e6 bytes)."""
    return sum(os.path.getsize(os.path.join(path, name)) for name in os.listdir(path)) / 1e6


def save_final(trainer: Trainer, path: str, merge: bool = False, dtype: torch.dtype | None = None) -> None:
    """Saves the trainer's model, tokenizer and resolved configuration as a folder that appears whole or not at all.

    With `merge` trained rows are written into the base and a standalone model is saved. `dtype` is that of the saved
    weights, where it is not that of training: the float32 weights of full fine-tuning stay in the checkpoints that a
    run resumes from. Every process must call it.
    """
    partial = f"{path}.partial"
    if trainer.args.should_save:
        shutil.rmtree(partial, ignore_errors=True)
    trainer.save_dtype = dtype
    if merge:
        state = _merge(trainer)
        if trainer.args.should_save and dtype not in (None, trainer.model.dtype):  # the base was rounded when loaded
            state = state if state is not None else trainer.model.state_dict()
            state = modeling.unrounded(state, trainer.model.config._name_or_path, dtype)
        trainer.model.config.use_cache = True
        trainer._save(partial, state)  # not by the engine: it knows the model that was
    else:
        trainer.model.config.use_cache = True
        trainer.save_model(partial)
    if trainer.args.should_save:
        make_portable(partial)
        shutil.rmtree(path, ignore_errors=True)
        os.replace(partial, path)
    trainer.accelerator.wait_for_everyone()


def _merge(trainer: Trainer) -> dict[str, torch.Tensor] | None:
    """Puts a plain model with the trained rows in the trainer's place of the adapted one. Where weights are sharded, it
    has no weights itself: its whole state is returned, in the first process."""
    if not modeling.shares_weights_out():
        trainer.model = trainer.model.merge_and_unload()
        return None
    base = trainer.accelerator.unwrap_model(trainer.model).get_base_model()
    state = trainer.accelerator.get_state_dict(trainer.model_wrapped)
    state = with_sid_rows_merged(base, state) if trainer.args.should_save else {}
    with torch.device("meta"):
        trainer.model = type(base)(base.config).to(base.dtype)
    trainer.model.generation_config = base.generation_config
    return state


def finish(
    trainer: Trainer,
    output_dir: str,
    metrics: dict,
    panels: dict,
    merge: bool = False,
    dtype: torch.dtype | None = None,
) -> dict:
    """Saves final_checkpoint, metrics.json and curves.png under `output_dir`; returns the metrics with what they cost.

    Every process must call it; `merge` and `dtype` as in `save_final`.
    """
    metrics = {**metrics, "peak_memory_gb": peak_memory_gb()}
    final = os.path.join(output_dir, "final_checkpoint")
    with writing(final):
        save_final(trainer, final, merge, dtype)
    if trainer.args.should_save:
        from minionerec.plots import plot_curves

        metrics["checkpoint_mb"] = folder_size_mb(final)
        history = trainer.state.log_history
        write_json(os.path.join(output_dir, "metrics.json"), {**metrics, "history": history})
        plot_curves(history, os.path.join(output_dir, "curves.png"), panels)
        print(f"saved {final}")
    return metrics
