"""An average of the weights that a training run passes through."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from minionerec.model.sharding import OwnedWeights, whole_tensors
from minionerec.training.resume import load_tensors

POWER = 3  # the weights after step t count about t^POWER
UNAVERAGED_FILE = "unaveraged.safetensors"  # in a checkpoint: the weights that train on, since it has their average


class WeightAverage(TrainerCallback):
    """The average of a model's trained weights after every optimizer step so far, in which later steps count more:
    those of step t, counted from 0, by (t + 1) (t + 2) ... (t + POWER), up to a constant. A process averages the
    weights that it owns.

    Source: polynomial-decay averaging, Shamir and Zhang, Stochastic Gradient Descent for Non-smooth Optimization
    (2013).
    """

    def __init__(self, weights: OwnedWeights):
        self.weights = weights
        self.other = [tensor.clone() for tensor in weights.tensors]  # what the model does not hold now

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        share = (POWER + 1) / (state.global_step + POWER)
        torch._foreach_lerp_(self.other, self.weights.tensors, share)

    def swap(self) -> None:
        """Exchanges the weights of the model and their average. All processes must call it."""
        for mine, other in zip(self.weights.tensors, self.other, strict=True):
            before = mine.clone()
            mine.copy_(other)
            other.copy_(before)
        self.weights.spread()

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """While open, the model has the weights that it does not have now: the averaged ones."""
        self.swap()
        try:
            yield
        finally:
            self.swap()

    def state(self, keep: bool) -> dict[str, torch.Tensor]:
        """What a checkpoint keeps while the model has the average: the weights that train on, in the processes that
        `keep` them. All processes must call it."""
        with self.in_place():
            return whole_tensors(self.weights.named, keep)

    def resume(self, checkpoint: str) -> None:
        """Writes them into the model, which has loaded the average. Raises InputError if the checkpoint has lost
        them."""
        self.weights.overwrite(load_tensors(checkpoint, UNAVERAGED_FILE))
