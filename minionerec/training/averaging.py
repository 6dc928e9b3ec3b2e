"""An average of the weights that a training run passes through."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback, TrainerState, TrainingArguments

POWER = 3  # the weights after step t count about t^POWER


class WeightAverage(TrainerCallback):
    """The average of a model's trained weights after every optimizer step so far, in which later steps count more:
    those of step t by (t + 1) (t + 2) ... (t + POWER), up to a constant.

    Source: polynomial-decay averaging, Shamir and Zhang, Stochastic Gradient Descent for Non-smooth Optimization
    (2013).
    """

    def __init__(self, model: nn.Module):
        self.weights = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.other = {name: p.detach().clone() for name, p in self.weights.items()}  # what the model does not hold now

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: Any, **kwargs: Any) -> None:
        share = (POWER + 1) / (state.global_step + POWER)
        torch._foreach_lerp_(list(self.other.values()), [p.detach() for p in self.weights.values()], share)

    def swap(self) -> None:
        """Exchanges the weights of the model and their average."""
        for name, parameter in self.weights.items():
            self.other[name], parameter.data = parameter.data, self.other[name]

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """While open, the model has the averaged weights."""
        self.swap()
        try:
            yield
        finally:
            self.swap()

    def resume(self, weights: dict[str, torch.Tensor]) -> None:
        """Takes the model's weights for the average, and gives it the `weights` it had."""
        for name, parameter in self.weights.items():
            self.other[name].copy_(parameter.detach())
            parameter.data.copy_(weights[name])
