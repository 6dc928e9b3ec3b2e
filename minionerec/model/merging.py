"""Merges an adapter into its base and counts the weights that change in the precision of the base.

A weight in bfloat16 has 8 significant bits: an update smaller than half a step, about 2^-9 of the weight, does not
change it. So merging can lose a few steps of RL with a small learning rate.
"""

from collections.abc import Callable
from functools import partial

from peft import PeftModel
from peft.tuners.lora import LoraLayer, ParamWrapper
from torch import nn
from transformers import PreTrainedModel


class CountingMerge:
    """Merges an adapter, and counts the weights of its target matrices. Matrices are compared one at a time, so no
    second copy of the base is in memory. SID rows are not counted.

    Attributes:
        updated: the weights in these matrices.
        changed: those of them that then differ from the base.
    """

    def __init__(self) -> None:
        self.updated = self.changed = 0

    def __call__(self, wrapped: PeftModel) -> PreTrainedModel:
        """The merged model."""
        for module in wrapped.modules():
            if isinstance(module, LoraLayer):
                module.merge = partial(self._counted, module, module.merge)
        return wrapped.merge_and_unload()

    def _counted(self, layer: LoraLayer, merge: Callable[..., None], *args: object, **kwargs: object) -> None:
        before = _weight(layer).detach().clone()
        merge(*args, **kwargs)
        self.changed += (_weight(layer) != before).sum().item()
        self.updated += before.numel()


def _weight(layer: LoraLayer) -> nn.Parameter:
    """The weight that a LoRA layer updates: that of a linear layer, or a parameter of many experts."""
    return layer.get_param() if isinstance(layer, ParamWrapper) else layer.get_base_layer().weight
