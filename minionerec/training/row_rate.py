"""A learning rate of their own for the rows of SID tokens, whatever trains them."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback

from minionerec.model.sid_rows import SidRows


def sid_weights(model: nn.Module, ids: Sequence[int]) -> list[tuple[nn.Parameter, torch.Tensor]]:
    """The trained tensors that hold the rows of SID tokens `ids`, each with the indices [n] of these rows in it: of an
    adapter, tensors [n, H] of nothing else; otherwise the embedding matrix [V, H] and an untied output head."""
    adapted = [layer for layer in model.modules() if isinstance(layer, SidRows)]
    rows = [rows for layer in adapted for rows in layer.trainable_tokens_delta.values()]
    if rows:
        return [(weight, torch.arange(len(weight), device=weight.device)) for weight in dict.fromkeys(rows)]
    ends = dict.fromkeys(end.weight for end in (model.get_input_embeddings(), model.get_output_embeddings()))
    return [(weight, torch.tensor(ids, device=weight.device)) for weight in ends]


class SidRowRate(TrainerCallback):
    """Makes every optimizer step of some rows `times` as long.

    An optimizer has one rate per tensor, and in full fine-tuning these rows are part of the embedding matrix. So what a
    step changed in them is multiplied after the step, which is what a rate of `times` the optimizer's would have done,
    decoupled weight decay included.
    """

    def __init__(self, weights: Sequence[tuple[nn.Parameter, torch.Tensor]], times: float):
        self.weights, self.times = weights, times
        self.before: list[torch.Tensor] = []

    def on_pre_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        self.before = [weight.detach()[ids] for weight, ids in self.weights]

    def on_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        for (weight, ids), before in zip(self.weights, self.before, strict=True):
            rows = weight.detach()
            rows[ids] = torch.lerp(before, rows[ids], self.times)
