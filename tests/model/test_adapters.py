"""What an adapter trains, and adapters that are saved and loaded."""

import warnings

import pytest
import torch
from adapting import adapted, state_of, train
from models import ARCHITECTURES, IDS, make_model
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file

import lora_utils
from minionerec.errors import InputError
from minionerec.flags import AdapterFlags
from minionerec.model import adapters
from minionerec.model.loading import load_base


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("method", ["lora", "qlora", "freeze_LLM"])
def test_the_adapter_moves_and_nothing_else(saved_base, method, tied):
    quantization = lora_utils.quantization_config(AdapterFlags(use_qlora=method == "qlora"))
    model = load_base(saved_base[tied], quantization)
    model = lora_utils.train_sid_rows_only(model, IDS) if method == "freeze_LLM" else adapted(model)
    before = state_of(model)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    train(model)
    moved = {name for name, value in state_of(model).items() if not torch.equal(value, before[name])}
    assert sum("trainable_tokens_delta" in name for name in trained) == (1 if tied else 2)
    shared = {name for name in moved if "lm_head.token_adapter" in name or "lm_head.trainable" in name}
    assert trained <= moved
    assert moved - trained <= (shared if tied else set())


def test_norms_alone_are_in_float32(saved_base):
    model = load_base(saved_base[False], lora_utils.quantization_config(AdapterFlags(use_qlora=True)))
    adapters.prepare_quantized(model)
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point():
            assert (parameter.dtype == torch.float32) == ("norm" in name), name
        assert not parameter.requires_grad


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpointing_gives_the_same_gradients(use_reentrant):
    ids = torch.tensor([[1, 90, 5, 7]])
    gradients = []
    for checkpointing in (False, True):
        base = make_model(scale=2.0)
        config = lora_utils.lora_config(base, [], AdapterFlags(lora_dropout=0.0))
        model = lora_utils.add_lora(base, config, gradient_checkpointing=checkpointing)
        if checkpointing:
            base.activation_checkpointing_enable({"use_reentrant": use_reentrant})
        model.train()
        model(input_ids=ids, labels=ids).loss.backward()
        gradients.append([p.grad for p in model.parameters() if p.requires_grad])
    for plain, recomputed in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, recomputed)


@pytest.mark.parametrize("tied", [True, False])
def test_a_saved_adapter_is_small_loads_and_refuses_another_base(saved_base, tmp_path, tied):
    model = load_base(saved_base[tied])
    model.resize_token_embeddings(100, mean_resizing=False)
    model = adapted(model, [90, *range(96, 100)])
    train(model)
    model.eval()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    assert all("lora_" in name or "trainable_tokens_delta" in name for name in tensors)
    assert sum("trainable_tokens_delta" in name for name in tensors) == (1 if tied else 2)
    ids = torch.tensor([[1, 90, 5, 7]])
    base = load_base(saved_base[tied])
    base.resize_token_embeddings(100, mean_resizing=False)
    untrained = base(input_ids=ids).logits.detach()
    loaded = adapters.load_adapter(base, str(tmp_path)).eval()
    assert torch.equal(loaded(input_ids=ids).logits, model(input_ids=ids).logits)
    assert not torch.allclose(loaded(input_ids=ids).logits, untrained)


def change(**changes):
    return changes


@pytest.mark.parametrize(
    ("architecture", "changes"),
    [
        ("qwen2", change(hidden_size=32)),
        ("qwen2", change(num_hidden_layers=1)),
        ("qwen2", change(num_hidden_layers=3)),
        ("qwen2", change(tie_word_embeddings=True)),
        ("qwen2", change(vocab_size=80)),
        ("gpt2", change()),
    ],
)
def test_an_adapter_of_another_base_is_refused(tmp_path, architecture, changes):
    adapted(make_model(tie_word_embeddings=False)).save_pretrained(tmp_path)
    adapters.load_adapter(make_model(tie_word_embeddings=False), str(tmp_path))
    with pytest.raises(InputError, match="does not fit the base"):
        adapters.load_adapter(make_model(architecture, **{"tie_word_embeddings": False, **changes}), str(tmp_path))


@pytest.mark.parametrize("settings", [{}, {"use_dora": True}, {"use_rslora": True, "lora_target_modules": "qkv"}])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_kind_of_adapter_loads_again(tmp_path, architecture, settings):
    model = adapted(make_model(architecture, scale=2.0), **settings)
    before = model(input_ids=torch.tensor([[1, 90, 5, 7]])).logits.detach()
    train(model, steps=1)
    model.save_pretrained(tmp_path)
    loaded = adapters.load_adapter(make_model(architecture, scale=2.0), str(tmp_path)).eval()
    logits = loaded(input_ids=torch.tensor([[1, 90, 5, 7]])).logits
    torch.testing.assert_close(logits, model.eval()(input_ids=torch.tensor([[1, 90, 5, 7]])).logits)
    assert not torch.allclose(logits, before, atol=1e-4)


@pytest.mark.parametrize("start", ["gaussian", "pissa", "olora"])
def test_a_copy_of_an_adapter_changes_no_weight_of_the_base(tmp_path, start):
    """Some starts of PEFT take the adapter's first update from the base."""
    ids = torch.tensor([[1, 90, 5, 7]])
    config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=start)
    model = get_peft_model(make_model(scale=2.0), config)
    train(model, steps=1)
    model.save_pretrained(tmp_path)
    loaded = adapters.load_adapter(make_model(scale=2.0), str(tmp_path), trainable=True).eval()
    logits = loaded(input_ids=ids).logits
    adapters.copy_adapter(loaded, "default", "reference")
    for name in ("default", "reference"):
        loaded.set_adapter(name)
        assert torch.equal(loaded(input_ids=ids).logits, logits)


@pytest.mark.parametrize("settings", [{"use_qlora": True}, {"use_lora": True, "load_in_8bit": True}], ids=[4, 8])
def test_an_adapter_with_an_orthogonal_start_trains_on_over_a_quantized_base(saved_base, tmp_path, settings):
    """PEFT cannot start so there."""
    ids, errors = torch.arange(60, 95).view(5, 7), {}
    for start in ("gaussian", "orthogonal"):
        torch.manual_seed(1)
        model = adapted(load_base(saved_base[True]), lora_r=4, init_lora_weights=start)
        train(model, steps=1)
        model.save_pretrained(tmp_path / start)
        quantized = load_base(saved_base[True], lora_utils.quantization_config(AdapterFlags(**settings)))
        loaded = adapters.load_adapter(quantized, str(tmp_path / start), trainable=True).eval()
        with torch.no_grad():
            exact = model.eval()(input_ids=ids).logits
            error, far = loaded(input_ids=ids).logits - exact, exact.std()
        errors[start] = (error.std() / far).item()
        for name, parameter in adapters.adapter_parameters(model, "default").items():
            assert torch.equal(adapters.adapter_parameters(loaded, "default")[name], parameter)
    assert errors["orthogonal"] < 2 * errors["gaussian"] < 1


def test_whole_matrices_do_not_train_on_a_quantized_base(saved_base, tmp_path):
    config = LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["embed_tokens", "lm_head"])
    get_peft_model(load_base(saved_base[False]), config).save_pretrained(tmp_path)
    quantized = load_base(saved_base[False], lora_utils.quantization_config(AdapterFlags(use_qlora=True)))
    with pytest.raises(
        InputError, match="it trains all of embed_tokens, lm_head, which a quantized base cannot; leave"
    ):
        adapters.load_adapter(quantized, str(tmp_path), trainable=True)
    assert adapters.load_adapter(load_base(saved_base[False]), str(tmp_path), trainable=True)


@pytest.mark.parametrize(
    ("architecture", "implementation"),
    [("qwen2", "sdpa"), ("qwen2", "eager"), ("qwen3", "sdpa"), ("gemma2", "eager"), ("phi3", "sdpa"), ("gpt2", "sdpa")],
)
def test_the_rounded_reference_computes_what_the_policy_does(architecture, implementation):
    model = make_model(architecture, attn_implementation=implementation)
    ids = torch.arange(1, 40).view(3, 13)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        expected = model(input_ids=ids).logits
        adapters.round_weights(model, torch.bfloat16)
        assert torch.equal(model(input_ids=ids).logits, expected)
    dtypes = {name: p.dtype for name, p in model.named_parameters()}
    assert {torch.bfloat16, torch.float32} == set(dtypes.values())
