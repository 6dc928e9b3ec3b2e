import pytest
import torch
from models import make_model
from plain import batch, gradients, one_by_one, with_adapter
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from minionerec.training.logprobs import completion_logps


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
