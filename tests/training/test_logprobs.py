from functools import cache

import numpy as np
import pytest
import torch
from models import make_model
from plain import COMPLETIONS, PROMPTS, batch, fuzz_seeds, gradients, one_by_one, with_adapter
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from minionerec.model import token_trees
from minionerec.model.token_trees import attend_in_blocks, tree_rows
from minionerec.training import logprobs
from minionerec.training.logprobs import completion_logps


def pairs():
    return zip(PROMPTS, COMPLETIONS, strict=True)


@cache
def blockwise_model():
    model = with_adapter(make_model(scale=2.0))
    assert attend_in_blocks(model)
    return model


def check(model, inputs, shared, tolerance=1e-5):
    expected, expected_entropy = one_by_one(model, *inputs)
    expected_grads = gradients(model, expected)
    logps, entropy = completion_logps(model, *inputs, shared=shared)
    torch.testing.assert_close(logps, expected, atol=tolerance, rtol=0)
    torch.testing.assert_close(entropy, expected_entropy, atol=10 * tolerance, rtol=0)
    grads = gradients(model, logps)
    assert grads.keys() == expected_grads.keys()
    for name, grad in expected_grads.items():
        torch.testing.assert_close(grads[name], grad, atol=tolerance * max(1, grad.abs().max().item()), rtol=1e-3)


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("architecture", ["qwen2", "qwen3", "llama", "mistral"])
def test_sharing_prompts_changes_nothing(architecture, tied, shared):
    model = with_adapter(make_model(architecture, scale=2.0, tie_word_embeddings=tied))
    check(model, batch(), shared)
    check(model, batch(slice(1, 4)), shared)  # a group split over micro-batches, and a part of the next one


@pytest.mark.parametrize("architecture", ["qwen2", "qwen3", "llama"])
def test_one_tree_of_all_prompts_changes_nothing(architecture, monkeypatch):
    model = with_adapter(make_model(architecture, scale=2.0))
    assert attend_in_blocks(model)
    made = []
    monkeypatch.setattr(logprobs, "tree_rows", lambda *args: made.append(tree_rows(*args)) or made[-1])
    check(model, batch(), None)
    check(model, batch(slice(1, 4)), None)
    prompt_ids, prompt_mask, completion_ids, completion_mask = batch()
    uncounted = completion_mask * torch.tensor([1, 0, 1, 0, 0, 1, 0]).unsqueeze(1)
    check(model, (prompt_ids, prompt_mask, completion_ids, uncounted), None)
    nodes = {(*prompt, *completion[:i]) for prompt, completion in pairs() for i in range(len(completion))}
    nodes |= {tuple(prompt[: i + 1]) for prompt, _ in pairs() for i in range(len(prompt))}
    assert made[0][0]["input_ids"].shape == (1, len(nodes))  # every beginning once, without the last tokens


@pytest.mark.parametrize("seed", fuzz_seeds(12))
def test_trees_of_random_completions(seed, monkeypatch):
    """Few tokens, so that prompts and completions share much, are equal, or begin one another."""
    chance = np.random.default_rng(seed)
    model = blockwise_model()
    monkeypatch.setattr(token_trees, "BLOCK", int(chance.choice([3, 128])))
    tokens, most, length = int(chance.integers(1, 5)), int(chance.integers(1, 6)), int(chance.integers(1, 4))

    def random_rows(count, width, left):
        size = torch.from_numpy(chance.integers(1, width + 1, (count, 1)))
        column = torch.arange(width)
        there = column >= width - size if left else column < size
        return torch.from_numpy(chance.integers(5, 5 + tokens, (count, width))) * there, there.long()

    prompts = random_rows(int(chance.integers(1, 4)), most, True)
    of = torch.from_numpy(np.sort(chance.integers(0, len(prompts[0]), int(chance.integers(1, 9)))))
    completions, there = random_rows(len(of), length, False)
    counts = torch.from_numpy(chance.random((len(of), 1)) < 0.8)
    check(model, (*(part[of] for part in prompts), completions, there * counts), None)


def test_all_parameters_and_eager_attention():
    check(make_model(scale=2.0), batch(), True)
    model = make_model(scale=2.0)
    model.set_attn_implementation("eager")
    check(model, batch(), True)


@pytest.mark.parametrize("quantized", [False, True])
def test_gradient_checkpointing_and_4_bits(tmp_path, quantized):
    make_model(scale=2.0).save_pretrained(tmp_path)
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path, dtype=torch.float32, quantization_config=config if quantized else None
    )
    if quantized:
        assert model.is_loaded_in_4bit
    model = with_adapter(model)
    check(model, batch(), True)
    plain, _ = completion_logps(model, *batch(), shared=True)
    expected = gradients(model, plain)
    model.activation_checkpointing_enable({"use_reentrant": False})
    model.enable_input_require_grads()
    model.train()
    logps, _ = completion_logps(model, *batch(), shared=True)
    torch.testing.assert_close(logps, plain)
    for name, grad in gradients(model, logps).items():
        torch.testing.assert_close(grad, expected[name], atol=1e-6, rtol=1e-4)


def test_temperature_divides_the_logits():
    model = make_model(scale=2.0)
    logps, entropy = completion_logps(model, *batch(), temperature=0.7)
    expected, expected_entropy = one_by_one(model, *batch(), temperature=0.7)
    torch.testing.assert_close(logps, expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(entropy, expected_entropy, atol=1e-4, rtol=0)
