"""Merges an adapter into its base and counts the weights that change in the precision of the base.

A weight in bfloat16 has 8 significant bits: an update smaller than half a step, about 2^-9 of the weight, does not
change it. So merging can lose a few steps of RL with a small learning rate.
"""

from collections.abc import Callable
from functools import partial
from operator import methodcaller

from peft import PeftModel
from peft.tuners.lora import LoraLayer, ParamWrapper
from peft.tuners.trainable_tokens import TrainableTokensLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import PreTrainedModel

Merge = Callable[[PeftModel], PreTrainedModel]


def merged(wrapped: PeftModel, merge: Merge = methodcaller("merge_and_unload")) -> PreTrainedModel:
    """What `merge` makes of an adapted model: a whole one that computes the same.

    An adapter of PEFT may change one end of a base whose embedding and output head are tied, or each in its own way.
    Merged into their common matrix, an update would change the other end too, so the head then gets a matrix of its
    own.
    """
    model = wrapped.get_base_model()
    embeddings = model.get_input_embeddings(), model.get_output_embeddings()
    embedding, head = map(_without_adapter, embeddings)
    weight = head._parameters.get("weight")
    if weight is not None and weight is embedding._parameters.get("weight") and _differ(*embeddings):
        head.weight = nn.Parameter(weight.detach().clone(), requires_grad=False)
    model = merge(wrapped)
    embeddings = model.get_input_embeddings(), model.get_output_embeddings()
    if embeddings[0].weight is not embeddings[1].weight:
        model.config.get_text_config().tie_word_embeddings = model.config.tie_word_embeddings = False
        own = {f"{name}.weight" for name, module in model.named_modules() if module in embeddings}
        # Or a checkpoint of it would lack one of them.
        model.all_tied_weights_keys = {n: tied for n, tied in model.all_tied_weights_keys.items() if n not in own}
    return model


def _without_adapter(end: nn.Module) -> nn.Module:
    layer = getattr(end, "token_adapter", end)
    return layer.get_base_layer() if isinstance(layer, BaseTunerLayer) else layer


def _differ(embedding: nn.Module, head: nn.Module) -> bool:
    """Whether an adapter does not change embedding and output head alike, as trained rows of tied ones do."""
    parts = [[type(module) for module in end.modules()] for end in (embedding, head)]
    low_rank, rows = (
        [any(issubclass(kind, layer) for kind in kinds) for kinds in parts]
        for layer in (LoraLayer, TrainableTokensLayer)
    )
    return any(low_rank) or rows[0] != rows[1]


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
