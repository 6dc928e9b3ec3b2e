"""Merging counts the weights that change in the precision of the base."""

import copy

import torch
from adapting import adapted
from models import make_model

from minionerec.model.merging import CountingMerge


def test_weights_that_change_in_the_precision_of_the_base_are_counted():
    """Many updates here are smaller than half a step of bfloat16, and are lost."""
    base = make_model(scale=2.0).bfloat16()
    before = {name: tensor.clone() for name, tensor in base.named_parameters() if "_proj.weight" in name}
    wrapped = adapted(base, lora_r=4)
    torch.manual_seed(1)
    for name, parameter in wrapped.named_parameters():
        if "lora_B" in name or "trainable_tokens_delta" in name:
            parameter.data += 1e-4 * torch.randn_like(parameter)
    expected, counting = copy.deepcopy(wrapped).merge_and_unload().state_dict(), CountingMerge()
    merged = counting(wrapped).state_dict()
    assert all(torch.equal(merged[name], tensor) for name, tensor in expected.items())
    assert counting.updated == sum(tensor.numel() for tensor in before.values())
    assert counting.changed == sum(int((merged[name] != tensor).sum()) for name, tensor in before.items())
    assert 0 < counting.changed < counting.updated / 2
