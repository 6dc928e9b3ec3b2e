"""Stopping a run in the middle: signals, what a step that is dropped leaves behind, and how long a stop takes."""

import math
import random
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Protocol

import numpy as np
import torch
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments


class StepDropped(Exception):
    """The run stops in the middle of a step, which is not finished."""


class Run(Protocol):
    """What a step of a Trainer changes."""

    state: TrainerState
    unlogged_metrics: dict[str, list[float]]
    _tr_loss: torch.Tensor


class StateOfStep:
    """What a part of a step changes, as it was before: the random states, and what is summed for the log."""

    def __init__(self, trainer: Run):
        self.tokens, self.loss = trainer.state.num_input_tokens_seen, trainer._tr_loss.detach().clone()
        self.metrics = {name: list(values) for name, values in trainer.unlogged_metrics.items()}
        self.python, self.numpy, self.torch = random.getstate(), np.random.get_state(), torch.get_rng_state()
        self.cuda = torch.cuda.get_rng_state() if torch.cuda.is_available() else None

    def restore(self, trainer: Run) -> None:
        trainer.state.num_input_tokens_seen, trainer._tr_loss = self.tokens, self.loss
        trainer.unlogged_metrics.clear()
        trainer.unlogged_metrics.update(self.metrics)
        random.setstate(self.python)
        np.random.set_state(self.numpy)
        torch.set_rng_state(self.torch)
        if self.cuda is not None:
            torch.cuda.set_rng_state(self.cuda)


class Grace:
    """How long a run may take to stop after a signal: it ends what it is in the middle of, and saves a checkpoint."""

    def __init__(self, say: Callable[[str], None]):
        self.say, self.said = say, 0
        self.longest = dict.fromkeys(("micro-batch", "evaluation", "checkpoint"), 0.0)
        self.started: float | None = None  # when the first micro-batch of this step did
        self.elsewhere = 0.0  # seconds since then in evaluations and checkpoints

    @contextmanager
    def measuring(self, what: str) -> Iterator[None]:
        """While open, what cannot be interrupted."""
        started = time.perf_counter()
        if what == "micro-batch" and self.started is None:
            self.started, self.elsewhere = started, 0.0
        yield
        took = time.perf_counter() - started
        self.longest[what] = max(self.longest[what], took)
        self.elsewhere += took if what != "micro-batch" else 0.0

    def step_ended(self, micro_batches: int) -> None:
        """Says how long, after the first step, and whenever it has become longer."""
        if self.started is None:
            return
        # A GPU may still be at work when a micro-batch is over for the CPU.
        step = time.perf_counter() - self.started - self.elsewhere
        self.longest["micro-batch"] = max(self.longest["micro-batch"], step / micro_batches)
        self.started = None
        takes = max(self.longest["micro-batch"], self.longest["evaluation"]) + self.longest["checkpoint"]
        if math.ceil(takes) > 1.2 * self.said:
            self.said = math.ceil(takes)
            grace = 2 * self.said + 5
            parts = ", ".join(f"{what} {seconds:.1f} s" for what, seconds in self.longest.items() if seconds)
            self.say(
                f"a stop takes up to {self.said} s ({parts}); launchers should wait longer before they kill: torchrun "
                f"--shutdown-timeout {grace}, Slurm --signal=TERM@{grace}, Kubernetes "
                f"terminationGracePeriodSeconds: {grace}"
            )


class Stop(TrainerCallback):
    """Ends the training after a signal, with a checkpoint: after the step, if it comes in its last micro-batch."""

    def __init__(self, trainer: Trainer):
        self.trainer = trainer
        self.requested = self.stopped = False

    def on_signal(self, number: int, frame: FrameType | None) -> None:
        if self.requested and number == signal.SIGINT:
            raise KeyboardInterrupt
        if not self.requested and self.trainer.is_world_process_zero():
            print(
                "\nstopping after this micro-batch and saving a checkpoint; press Ctrl-C again to stop at once",
                file=sys.stderr,
                flush=True,
            )
        self.requested = True

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        requested = self.requested
        if args.world_size > 1:  # all processes stop after the same step
            requested = bool(self.trainer.accelerator.gather(torch.tensor([requested], device=args.device)).any())
        if requested and state.global_step < state.max_steps:
            self.stopped = control.should_save = control.should_training_stop = True


@contextmanager
def stop_on_signals(trainer: Trainer) -> Iterator[Stop]:
    """While open, SIGINT and SIGTERM stop the trainer as `Stop` does."""
    stop = Stop(trainer)
    trainer.add_callback(stop)
    numbers = (signal.SIGINT, signal.SIGTERM) if threading.current_thread() is threading.main_thread() else ()
    before = {number: signal.signal(number, stop.on_signal) for number in numbers}
    try:
        yield stop
    finally:
        trainer.remove_callback(stop)
        for number, handler in before.items():
            signal.signal(number, handler)
