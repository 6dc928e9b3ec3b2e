"""Merges an adapter into its base and counts what comes of it in the precision of the base's weights.

A weight in bfloat16 has 8 significant bits: an update smaller than half a step, some 2^-9 of the weight, leaves it as
it was. Few steps of RL with a small learning rate can so vanish when they are merged.
"""

from functools import partial

from peft import PeftModel
from peft.tuners.lora import LoraLayer, ParamWrapper
from torch import nn


def merge_and_count(wrapped: PeftModel) -> tuple[nn.Module, int, int]:
    """(the merged model, how many weights of its target matrices differ from the base's, how many these have).

    Compared one matrix at a time, so that no second copy of the base is held. SID rows are not counted.
    """
    changed = updated = 0

    def counted(layer: LoraLayer, merge, *args, **kwargs) -> None:
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
    """What a LoRA layer updates: the weight of a linear layer, or a parameter of many experts."""
    return layer.get_param() if isinstance(layer, ParamWrapper) else layer.get_base_layer().weight
