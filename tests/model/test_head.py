"""With 16-bit weights the logits of the wanted positions are those of a head in float32."""

import copy
from contextlib import nullcontext

import pytest
import torch
from models import make_model
from plain import EOS, IDS, Made, batch, gradients, one_by_one, random_sids, with_adapter

from minionerec.decoding import beams
from minionerec.decoding.beam_search import constrained_beam_search
from minionerec.decoding.trie import Trie
from minionerec.model import head
from minionerec.training.logprobs import completion_logps

# What an architecture does after its head: nothing, a cap, a bias in the head.
HEADS = {"qwen2": {}, "gemma2": {"final_logit_softcapping": 3.0}, "phi3": {}, "codegen": {}}
HALF = [torch.bfloat16, torch.float16]


def in_half(architecture="qwen2", dtype=torch.bfloat16, **changes):
    if architecture == "codegen":  # its head has a bias
        from transformers import AutoModelForCausalLM, CodeGenConfig

        torch.manual_seed(0)
        config = CodeGenConfig(vocab_size=96, n_embd=64, n_layer=2, n_head=4, rotary_dim=8, n_positions=256, n_ctx=256)
        model = AutoModelForCausalLM.from_config(config).eval()
        with torch.no_grad():
            model.lm_head.bias.uniform_(-2, 2)
        return model.to(dtype)
    return make_model(architecture, scale=2.0, **changes).to(dtype)


def twin_of(model):
    """The same model with a head whose weight is a float32 copy."""
    twin = copy.deepcopy(model)
    layer = twin.get_output_embeddings()
    layer.weight = torch.nn.Parameter(layer.weight.detach().float())
    if layer.bias is not None:
        layer.bias = torch.nn.Parameter(layer.bias.detach().float())
    layer.register_forward_pre_hook(lambda _module, args: (args[0].float(),))
    return twin


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("architecture", HEADS)
def test_values_and_gradients_are_those_of_a_head_in_float32(architecture, tied, dtype, monkeypatch):
    monkeypatch.setattr(head, "CHUNK", 40)  # does not divide the vocabulary
    model = in_half(architecture, dtype, **HEADS[architecture], tie_word_embeddings=tied)
    twin, shared = twin_of(model), model.get_output_embeddings().weight is model.get_input_embeddings().weight
    logps, entropies = completion_logps(model, *batch(), shared=True)
    expected, expected_entropies = completion_logps(twin, *batch(), shared=True)
    assert logps.dtype == torch.float32
    torch.testing.assert_close(logps, expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(entropies, expected_entropies, atol=1e-4, rtol=1e-5)
    found, wanted = gradients(model, logps), gradients(twin, expected)
    if shared:  # the twin's head has a gradient of its own
        name = next(n for n, p in model.named_parameters() if p is model.get_input_embeddings().weight)
        own = next(n for n, p in twin.named_parameters() if p is twin.get_output_embeddings().weight)
        wanted[name] = wanted[name] + wanted.pop(own)
    assert found.keys() == wanted.keys()
    for name, gradient in wanted.items():
        rounding = 3 * torch.finfo(dtype).eps * gradient.abs().max().item()
        torch.testing.assert_close(found[name].float(), gradient.float(), atol=rounding, rtol=0)


@pytest.mark.parametrize("tied", [True, False])
def test_trained_rows_are_in_float32_too(tied):
    model = with_adapter(in_half(tie_word_embeddings=tied))
    logps, _ = completion_logps(model, *batch(), shared=True)
    hidden = []
    model.get_output_embeddings().register_forward_pre_hook(lambda _module, args: hidden.append(args[0].detach()))
    again, _ = completion_logps(model, *batch(), shared=True)
    torch.testing.assert_close(again, logps)
    base = model.get_base_model()
    weight = base.get_input_embeddings().original_module.weight if tied else base.lm_head.original_module.weight
    weight = weight.detach().float().clone()
    rows = dict(model.named_parameters())
    rows = next(p for n, p in rows.items() if "trainable_tokens_delta" in n and ("lm_head" in n or tied))
    weight[IDS] = rows.detach().float()
    after_prompt = (hidden[0][0, 4].float() @ weight.T).log_softmax(-1)  # the first prompt has five tokens
    torch.testing.assert_close(logps[0, 0], after_prompt[batch()[2][0, 0]], atol=1e-5, rtol=1e-5)
    assert all(gradient.abs().max() > 0 for gradient in gradients(model, again).values())


def test_autocast_does_not_round_the_logits():
    model = in_half()
    plain, _ = completion_logps(model, *batch(), shared=True)
    with torch.autocast("cpu", torch.bfloat16):
        cast, _ = completion_logps(model, *batch(), shared=True)
    torch.testing.assert_close(cast, plain, atol=1e-6, rtol=0)

    whole = make_model(scale=2.0)  # float32 weights, as of a full run
    expected, _ = one_by_one(whole, *batch())
    with torch.autocast("cpu", torch.bfloat16):
        seen = []
        whole.model.register_forward_hook(lambda *args: seen.append(args[2].last_hidden_state))
        cast, _ = completion_logps(whole, *batch(), shared=False)
        with torch.autocast("cpu", enabled=False):
            length = int(batch()[1][0].sum())
            first = torch.nn.functional.linear(seen[-1][0, length - 1].float(), whole.lm_head.weight).log_softmax(-1)
    torch.testing.assert_close(cast[0, 0], first[batch()[2][0, 0]], atol=1e-6, rtol=0)
    torch.testing.assert_close(cast, expected, atol=0.05, rtol=0)


def test_no_copy_of_the_head_in_float32_is_made(monkeypatch):
    monkeypatch.setattr(head, "CHUNK", 32)
    model = make_model(vocab_size=960, scale=2.0).bfloat16()
    with Made() as made:
        completion_logps(model, *batch(), shared=True)[0].sum().backward()
        constrained_beam_search(model, *batch()[:2], Trie(random_sids(20, (3,)), EOS), 5, tree=True)
    assert max(made.sizes[torch.float32]) < 960 * 64


def test_the_head_is_left_as_it_was():
    model = in_half()
    layer, called = model.get_output_embeddings(), []
    layer.register_forward_pre_hook(lambda *_: called.append(1))  # as FSDP and ZeRO-3 gather its weight
    before = dict(vars(layer))
    completion_logps(model, *batch(), shared=True)
    constrained_beam_search(model, *batch()[:2], Trie(random_sids(5, (1,)), EOS), 2, tree=True)
    assert len(called) == 3 and vars(layer) == before
    with pytest.raises(ZeroDivisionError), head.float32_head(model):
        raise ZeroDivisionError
    assert vars(layer) == before
    with head.float32_head(model):
        assert model(input_ids=batch()[0]).logits.dtype == torch.float32
    assert model(input_ids=batch()[0]).logits.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("of_hidden", "of_weight"), [(torch.bfloat16,) * 2, (torch.float16,) * 2, (torch.float32, torch.bfloat16)]
)
def test_instructions_for_bfloat16_round_no_factor(of_hidden, of_weight, monkeypatch):
    """Large enough that a CPU which has them takes them."""
    monkeypatch.setattr(head, "CHUNK", 700)
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(256, 512, generator=generator).to(of_hidden)
    weight = torch.randn(1500, 512, generator=generator).to(of_weight)
    expected = hidden.double() @ weight.double().T
    torch.testing.assert_close(head.float32_linear(hidden, weight).double(), expected, atol=2e-4, rtol=0)
    # Products of float32 matrices are exact afterwards: rounding them would be off by 0.2.
    hidden, weight = hidden.float() * 1.001, weight.float() * 1.001
    torch.testing.assert_close((hidden @ weight.T).double(), hidden.double() @ weight.double().T, atol=2e-4, rtol=0)


def test_a_weak_model_ranks_as_in_float32(monkeypatch):
    """Logits near 16 that differ by little: in bfloat16 they are 0.125 apart."""
    model = make_model(scale=2.0, tie_word_embeddings=False)
    ids = torch.randint(1, 96, (300, 12), generator=torch.Generator().manual_seed(1))
    mask, trie = torch.ones_like(ids), Trie(random_sids(300, (3,)), EOS)
    with torch.no_grad():
        model.model.embed_tokens.weight[:, 0] = 1.0
        level = model.model(input_ids=ids).last_hidden_state[:, -1, 0].mean()
        model.lm_head.weight[:, 0] = 16 / level
    model.bfloat16()

    def equal() -> float:
        found = [constrained_beam_search(one, ids, mask, trie, 5)[0][:, 0] for one in (model, twin)]
        return (found[0] == found[1]).float().mean().item()

    twin = copy.deepcopy(model).float()
    assert equal() > 0.93
    monkeypatch.setattr(beams, "float32_head", lambda _: nullcontext())
    assert equal() < 0.8
