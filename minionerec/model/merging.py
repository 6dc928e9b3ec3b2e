"""Merges an adapter into its base and counts the weights that change in the precision of the base.

A weight in bfloat16 has 8 significant bits: an update smaller than half a step, about 2^-9 of the weight, does not
change it. So merging can lose a few steps of RL with a small learning rate.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

from peft import PeftModel
from peft.tuners.lora import LoraLayer, ParamWrapper
from torch import nn


def merge_and_count(wrapped: PeftModel) -> tuple[nn.Module, int, int]:
    """The merged model, the number of weights in its target matrices that differ from the base, and the number of
    weights in these matrices.

    Matrices are compared one at a time, so no second copy of the base is in memory. SID rows are not counted.
    """
    changed = updated = 0

    def counted(layer: LoraLayer, merge: Callable[..., None], *args: Any, **kwargs: Any) -> None:
        nonlocal changed, updated
        before = _weight(layer).detach().clone()
        merge(*args, **kwargs)
        changed += (_weight(layer) != before).sum().item()
        updated += before.numel()

    for module in wrapped.modules():
        if isinstance(module, LoraLayer):
            module.merge = partial(counted, module, module.merge)
    return wrapped.merge_and_unload(), changed, updated


def _weight(layer: LoraLayer) -> nn.Parameter:
    """The weight that a LoRA layer updates: that of a linear layer, or a parameter of many experts."""
    return layer.get_param() if isinstance(layer, ParamWrapper) else layer.get_base_layer().weight
