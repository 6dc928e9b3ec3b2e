"""Merging counts the weights that change in the precision of the base."""

import copy

import pytest
import torch
from adapting import adapted
from models import make_model
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from minionerec.model.merging import CountingMerge, merged


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


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(
    ("changed", "stay_tied"),
    [
        ({"target_modules": ["q_proj"], "trainable_token_indices": [90, 91]}, True),
        ({"target_modules": ["q_proj"], "trainable_token_indices": {"lm_head": [90, 91]}}, False),
        ({"target_modules": ["q_proj", "embed_tokens"]}, False),
        ({"target_modules": ["q_proj", "lm_head"]}, False),
        ({"target_modules": ["q_proj", "embed_tokens", "lm_head"]}, False),
        ({"target_modules": ["q_proj", "embed_tokens", "lm_head"], "ensure_weight_tying": True}, False),
        ({"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}, False),
    ],
)
@pytest.mark.filterwarnings("ignore::UserWarning")  # of PEFT, about tied ends
def test_a_merged_model_computes_what_its_adapter_did(tmp_path, tied, changed, stay_tied):
    """PEFT merges an update of one end of a tied base into the matrix of both."""
    torch.manual_seed(1)
    wrapped = get_peft_model(make_model(scale=2.0, tie_word_embeddings=tied), LoraConfig(r=4, **changed)).eval()
    ids = torch.arange(60, 95).view(5, 7)
    with torch.no_grad():
        for parameter in wrapped.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn_like(parameter))
        expected = wrapped(input_ids=ids).logits
        model = merged(wrapped)
        torch.testing.assert_close(model(input_ids=ids).logits, expected, atol=1e-5, rtol=1e-5)
        assert (
            model.config.tie_word_embeddings
            == (tied and stay_tied)
            == ("lm_head.weight" in model.all_tied_weights_keys)
        )
        model.save_pretrained(tmp_path)
        again = AutoModelForCausalLM.from_pretrained(tmp_path)
        torch.testing.assert_close(again(input_ids=ids).logits, expected, atol=1e-5, rtol=1e-5)
