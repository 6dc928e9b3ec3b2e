"""An average of the weights that a training run passes through."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import TrainerCallback, TrainerState, TrainingArguments

from minionerec.model.sharding import OwnedWeights

POWER = 3  # the weights after step t count about t^POWER


class WeightAverage(TrainerCallback):
    """The average of a model's trained weights after every optimizer step so far, in which later steps count more:
    those of step t by (t + 1) (t + 2) ... (t + POWER), up to a constant. A process averages the weights that it owns.

    Source: polynomial-decay averaging, Shamir and Zhang, Stochastic Gradient Descent for Non-smooth Optimization
    (2013).
    """

    def __init__(self, weights: OwnedWeights):
        self.weights = weights
        self.other = [tensor.clone() for tensor in weights.tensors]  # what the model does not hold now

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: Any, **kwargs: Any) -> None:
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
