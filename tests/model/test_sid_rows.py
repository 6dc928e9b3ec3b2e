"""The lean layers that hold SID rows, against PEFT's."""

import copy

import pytest
import torch
from models import make_model
from peft import get_peft_model
from plain import IDS, moved

import lora_utils
from minionerec.flags import AdapterFlags
from minionerec.model import sid_rows


@pytest.mark.parametrize("architecture", ["qwen2", "gemma2", "gpt2"])
@pytest.mark.parametrize("tied", [True, False])
def test_row_only_forward_equals_pefts_layer(architecture, tied):
    model = make_model(architecture, scale=2.0, tie_word_embeddings=tied)
    config = lora_utils.lora_config(model, IDS, AdapterFlags(lora_dropout=0.0))
    plain = get_peft_model(copy.deepcopy(model), copy.deepcopy(config))
    fast = moved(lora_utils.add_lora(model, config), seed=2, by=0.1)
    plain.load_state_dict(fast.state_dict())
    ids = torch.tensor([[1, 90, 5, 7, 91, 3], [2, 5, 90, 91, 8, 4]])
    outputs = [m(input_ids=ids, labels=ids) for m in (plain, fast)]
    torch.testing.assert_close(outputs[0].logits, outputs[1].logits, atol=1e-5, rtol=1e-5)
    for output in outputs:
        output.loss.backward()
    gradients = [{n: p.grad for n, p in m.named_parameters() if p.requires_grad} for m in (plain, fast)]
    rows = [name for name in gradients[1] if "trainable_tokens_delta" in name]
    assert len(rows) == (1 if tied else 2)
    assert any(isinstance(m, sid_rows.SidRows) for m in fast.modules())
    assert not any(isinstance(m, sid_rows.SidRows) for m in plain.modules())
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, atol=1e-6, rtol=1e-4)
    # With the adapter off, both are the base again.
    with fast.disable_adapter(), plain.disable_adapter():
        torch.testing.assert_close(fast(input_ids=ids).logits, plain(input_ids=ids).logits)


@pytest.mark.parametrize("tied", [True, False])
def test_rows_that_are_merged_leave_with_the_adapter(tied):
    model = make_model("qwen2", scale=2.0, tie_word_embeddings=tied)
    ids = torch.tensor([[1, 90, 5, 7, 91, 3]])
    with torch.no_grad():
        base = model(input_ids=ids).logits
        model = lora_utils.add_lora(model, lora_utils.lora_config(model, IDS, AdapterFlags(lora_dropout=0.0)))
        for name, parameter in model.named_parameters():
            if "trainable_tokens_delta" in name:
                parameter.add_(0.5)
        trained = model(input_ids=ids).logits
        model.merge_adapter()
        torch.testing.assert_close(model(input_ids=ids).logits, trained, atol=1e-5, rtol=1e-5)
        with model.disable_adapter():
            torch.testing.assert_close(model(input_ids=ids).logits, base, atol=1e-5, rtol=1e-5)
    assert (trained - base).abs().max() > 0.1


AGAIN = [90, 91, 5], [3, 7, 91]


def test_an_adapter_that_comes_again_has_its_own_rows():
    base = make_model("qwen2", scale=2.0)
    first, *others = (lora_utils.lora_config(base, rows, AdapterFlags(lora_dropout=0.0)) for rows in ([90], *AGAIN))
    plain = get_peft_model(copy.deepcopy(base), copy.deepcopy(first))
    model = lora_utils.add_lora(base, first)
    ids = torch.tensor([[1, 90, 5, 7, 91, 3]])
    for config in others:
        for one in (plain, model):
            if "other" in one.peft_config:
                one.delete_adapter("other")
            one.add_adapter("other", copy.deepcopy(config))
            one.set_adapter("other")
        torch.manual_seed(4)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "other" in name:
                    parameter.add_(0.2 * torch.randn_like(parameter))
            plain.load_state_dict(model.state_dict())
            found = model(input_ids=ids).logits
            torch.testing.assert_close(found, plain(input_ids=ids).logits, atol=1e-5, rtol=1e-5)
