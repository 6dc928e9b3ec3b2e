"""The lean low-rank update against PEFT's."""

import copy

import pytest
import torch
from adapting import adapted
from models import make_model
from peft import get_peft_model
from plain import IDS

import lora_utils
from minionerec.flags import AdapterFlags
from minionerec.model import low_rank
from minionerec.model.loading import load_base


@pytest.mark.parametrize("architecture", ["qwen2", "phi3", "gpt2"])
def test_the_lean_update_is_pefts(architecture):
    plain, lean = make_model(architecture, scale=2.0), make_model(architecture, scale=2.0)
    config = lora_utils.lora_config(plain, IDS, AdapterFlags(lora_dropout=0.0))
    plain, lean = get_peft_model(plain, config), lora_utils.add_lora(lean, copy.deepcopy(config))
    torch.manual_seed(5)
    values = {name: 0.1 * torch.randn_like(p) for name, p in plain.named_parameters() if p.requires_grad}
    ids = torch.tensor([[1, 90, 5, 7, 91, 3]])
    results = []
    for model in (plain, lean):
        for name, parameter in model.named_parameters():
            if name in values:
                parameter.data = values[name].clone()
        output = model(input_ids=ids, labels=ids)
        output.loss.backward()
        results.append((output.logits, {name: p.grad for name, p in model.named_parameters() if name in values}))
    assert any(isinstance(module, low_rank._LeanForward) for module in lean.modules())
    torch.testing.assert_close(results[1][0], results[0][0])
    for name, grad in results[0][1].items():
        torch.testing.assert_close(results[1][1][name], grad, msg=name)


def test_the_lean_update_on_4_bits_is_pefts(saved_base):
    results, storage = [], lora_utils.quantization_config(AdapterFlags(use_qlora=True))
    for lean in (False, True):
        model = load_base(saved_base[True], storage, embeddings_in_8_bits=False)  # PEFT's own layers read weights
        config = lora_utils.lora_config(model, IDS, AdapterFlags(lora_dropout=0.0))
        model = lora_utils.add_lora(model, config) if lean else get_peft_model(model, config)
        torch.manual_seed(5)
        for _, parameter in sorted((n, p) for n, p in model.named_parameters() if p.requires_grad):
            parameter.data = 0.1 * torch.randn(parameter.shape)
        ids = torch.tensor([[1, 90, 5, 7, 91, 3]])
        with torch.autocast("cpu", torch.bfloat16):
            model.train()(input_ids=ids, labels=ids).loss.backward()
        results.append({n: p.grad for n, p in model.named_parameters() if "lora_" in n and p.grad is not None})
    assert results[0].keys() == results[1].keys() and results[0]
    for name, grad in results[0].items():
        scale = grad.abs().max()
        torch.testing.assert_close(results[1][name] / scale, grad / scale, atol=0.05, rtol=0.1)


@pytest.mark.parametrize("dropout", [0.0, 0.25])
@pytest.mark.parametrize("base", ["joined", "fresh", "view", "leaf"])
@pytest.mark.parametrize("transposed", [False, True])
def test_the_update_in_place_and_joined_with_its_matmul(base, dropout, transposed):
    """Values and gradients of the sum as written, with one dropout mask in both passes."""
    torch.manual_seed(0)
    x, a, b = (torch.randn(*shape, requires_grad=True) for shape in ((4, 3, 16), (2, 16), (8, 2)))
    x = x.transpose(0, 1) if transposed else x
    inputs = x, a, b
    weight, bias = torch.randn(8, 16), torch.randn(8)
    kept = low_rank._dropout_mask(x, dropout, 11) / (1 - dropout) if dropout else 1
    plain_base = torch.nn.functional.linear(x.detach() if base == "leaf" else x, weight, bias)
    expected = plain_base + (x * kept) @ a.T @ b.T * 0.5
    of_base = torch.nn.functional.linear(x, weight, bias).clone()
    given = {"joined": None, "fresh": of_base, "view": of_base.view_as(of_base), "leaf": of_base.detach()}[base]
    matmul = (weight, bias) if base == "joined" else ()
    updated = low_rank._LowRankUpdate.apply(given, *inputs, 0.5, dropout, 11, torch.float32, *matmul)
    assert (updated is given) == (base == "fresh")  # in place
    torch.testing.assert_close(updated, expected)
    weights = torch.randn_like(updated)
    found = torch.autograd.grad((updated * weights).sum(), inputs)
    for ours, plain in zip(found, torch.autograd.grad((expected * weights).sum(), inputs), strict=True):
        torch.testing.assert_close(ours, plain)


def test_a_base_layer_that_is_more_than_a_matmul_is_called():
    """As ZeRO-3 needs it, whose hooks gather a layer's weight, and accelerate, which replaces its forward."""
    ids = torch.tensor([[1, 90, 5, 7, 91, 3]])
    model = adapted(make_model(scale=2.0))
    layers = [module.base_layer for module in model.modules() if isinstance(module, low_rank._LeanForward)]
    assert layers and all(low_rank._is_frozen_matmul(layer) for layer in layers)
    logits = model(input_ids=ids).logits
    called = []
    handles = [layer.register_forward_hook(lambda *_: called.append(1)) for layer in layers]
    torch.testing.assert_close(model(input_ids=ids).logits, logits)
    assert len(called) == len(layers)
    for handle in handles:
        handle.remove()
    layers[0].forward = lambda x: called.append(2) or torch.nn.Linear.forward(layers[0], x)
    torch.testing.assert_close(model(input_ids=ids).logits, logits)
    assert called[-1] == 2 and len(called) == len(layers) + 1
    layers[1].weight.requires_grad_(True)
    model(input_ids=ids, labels=ids).loss.backward()
    assert layers[1].weight.grad.abs().sum() > 0


@pytest.mark.parametrize("dropout", [0.05, 0.5])
def test_dropout_masks_are_fair(dropout):
    kept = low_rank._dropout_mask(torch.empty(401, 1001), dropout, 3)
    assert abs(low_rank._kept_fraction(dropout) - (1 - dropout)) < 1e-5
    error = 4 * (dropout * (1 - dropout) / (kept.numel() // 4)) ** 0.5  # four standard deviations of a lane's mean
    for lane in range(4):
        assert abs(kept.flatten()[lane::4].float().mean().item() - (1 - dropout)) < error
    neighbours = kept.flatten()[:-1].float(), kept.flatten()[1:].float()
    assert abs(torch.corrcoef(torch.stack(neighbours))[0, 1].item()) < 0.01
    assert not torch.equal(kept, low_rank._dropout_mask(kept, dropout, 4))


def test_dropout_is_on_in_training_alone_and_follows_the_seed():
    model = adapted(make_model(), lora_dropout=0.5)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    ids = torch.tensor([[1, 90, 5, 7]])

    def logits(seed: int) -> torch.Tensor:
        torch.manual_seed(seed)
        return model(input_ids=ids).logits

    model.train()
    assert torch.equal(logits(1), logits(1)) and not torch.equal(logits(1), logits(2))
    model.eval()
    assert torch.equal(logits(1), logits(2))
