"""A learning rate of their own for the rows of SID tokens, whatever trains them."""

from collections.abc import Sequence

import torch
from torch import nn

from minionerec.model.sid_rows import SidRows, give_own_rows, own_rows


def sid_weights(model: nn.Module, ids: Sequence[int]) -> list[nn.Parameter]:
    """The trained parameters [n, H] that hold the rows of SID tokens `ids` and nothing else: an adapter has them; in
    full fine-tuning they are made here."""
    adapted = [layer for layer in model.modules() if isinstance(layer, SidRows)]
    rows = [rows for layer in adapted for rows in layer.trainable_tokens_delta.values()]
    if not rows:
        give_own_rows(model, ids)
        rows = list(own_rows(model).values())
    return list(dict.fromkeys(rows))


def give_rate(optimizer: torch.optim.Optimizer, weights: Sequence[nn.Parameter], rate: float) -> None:
    """Gives some of the weights of a new optimizer a learning rate of their own, as groups at the end."""
    mine = set(weights)
    before, optimizer.param_groups = optimizer.param_groups, []
    for group in before:
        rest = [weight for weight in group["params"] if weight not in mine]
        if rest:
            optimizer.param_groups.append({**group, "params": rest})
    for group in before:
        taken = [weight for weight in group["params"] if weight in mine]
        if taken:
            optimizer.param_groups.append({**group, "params": taken, "lr": rate})
