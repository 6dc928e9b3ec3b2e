import copy
import json
import warnings
from pathlib import Path

import pytest
import torch
from models import ARCHITECTURES, config_of, make_model
from peft import get_peft_model
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file
from transformers import CONFIG_MAPPING

import lora_utils
from minionerec.errors import InputError
from minionerec.flags import AdapterFlags
from minionerec.model import adapters, low_rank, sid_rows
from minionerec.model.architecture import meta_model
from minionerec.model.loading import load_base

IDS = [90, 91, 5]  # SID rows need not be the last ones

QWEN = ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]
ATTENTION = ["k_proj", "o_proj", "q_proj", "v_proj"]
TARGETS = {
    "qwen2": (QWEN, ATTENTION),
    "qwen3": (QWEN, ATTENTION),
    "llama": (QWEN, ATTENTION),
    "mistral": (QWEN, ATTENTION),
    "gemma2": (QWEN, ATTENTION),
    "phi3": (["down_proj", "gate_up_proj", "o_proj", "qkv_proj"], ["o_proj", "qkv_proj"]),
    "gpt2": (["c_attn", "c_fc", "c_proj"], ["attn.c_proj", "c_attn"]),
}


def adapted(model, ids=IDS, **settings):
    return lora_utils.add_lora(
        model, lora_utils.lora_config(model, ids, AdapterFlags(**{"lora_dropout": 0.0, **settings}))
    )


def train(model, steps: int = 3) -> None:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    torch.manual_seed(3)
    ids = torch.tensor([[1, 90, 5, 7, 91, 3], [2, 5, 90, 91, 8, 4]])
    for _ in range(steps):
        with torch.autocast("cpu", torch.bfloat16, enabled=getattr(model, "is_quantized", False)):
            model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def state_of(model) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items() if isinstance(value, torch.Tensor)}


@pytest.fixture(scope="module")
def saved_base(tmp_path_factory):
    """Folders of a tied and an untied base."""
    folders = {}
    for tied in (True, False):
        folders[tied] = str(tmp_path_factory.mktemp(f"tied_{tied}"))
        make_model(tie_word_embeddings=tied, scale=2.0).save_pretrained(folders[tied])
    return folders


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_target_modules_are_found_without_weights(architecture):
    model = meta_model(config_of(architecture))
    assert all(parameter.is_meta for parameter in model.parameters())
    every, attention = TARGETS[architecture]
    assert lora_utils.find_target_modules(model, "all") == every
    assert lora_utils.find_target_modules(model, "qkv") == attention
    assert lora_utils.find_target_modules(model, f"{every[0]}, {every[-1]}") == sorted({every[0], every[-1]})
    with pytest.raises(InputError, match=f"nope matches no linear layer.*{every[0]}"):
        lora_utils.find_target_modules(model, f"{every[0]},nope")


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("spec", ["all", "qkv"])
def test_exactly_the_found_layers_are_adapted(architecture, spec):
    model = adapted(make_model(architecture), lora_target_modules=spec)
    names = {name for name, module in model.named_modules() if isinstance(module, LoraLayer)}
    assert names
    assert not any("lm_head" in name or "embed" in name or "wte" in name for name in names)
    assert any("mlp" in name for name in names) == (spec == "all")
    ids = torch.tensor([[1, 90, 5]])
    model(input_ids=ids, labels=ids).loss.backward()


def test_lora_config_takes_every_setting():
    model = make_model()
    config = lora_utils.lora_config(
        model,
        IDS,
        AdapterFlags(
            lora_r=8,
            lora_alpha=16,
            lora_dropout=0.1,
            lora_target_modules="qkv",
            use_rslora=True,
            use_dora=True,
            init_lora_weights="gaussian",
        ),
    )
    assert (config.r, config.lora_alpha, config.lora_dropout) == (8, 16, 0.1)
    assert config.use_rslora and config.use_dora and config.init_lora_weights == "gaussian"
    assert config.trainable_token_indices == {"model.embed_tokens": IDS, "lm_head": IDS}
    assert lora_utils.lora_config(make_model(tie_word_embeddings=True), IDS).trainable_token_indices == {
        "model.embed_tokens": IDS
    }
    assert lora_utils.lora_config(make_model("gpt2"), IDS).fan_in_fan_out


def test_quantization_configs():
    config = lora_utils.quantization_config(AdapterFlags(use_qlora=True))
    assert (config.load_in_4bit, config.bnb_4bit_quant_type, config.bnb_4bit_use_double_quant) == (True, "nf4", True)
    assert config.bnb_4bit_compute_dtype == torch.bfloat16
    assert lora_utils.quantization_config(AdapterFlags(load_in_8bit=True)).load_in_8bit
    assert lora_utils.quantization_config() is None


@pytest.mark.parametrize("architecture", ["qwen2", "gemma2", "gpt2"])
@pytest.mark.parametrize("tied", [True, False])
def test_row_only_forward_equals_pefts_layer(architecture, tied):
    model = make_model(architecture, scale=2.0, tie_word_embeddings=tied)
    config = lora_utils.lora_config(model, IDS, AdapterFlags(lora_dropout=0.0))
    plain = get_peft_model(copy.deepcopy(model), copy.deepcopy(config))
    fast = lora_utils.add_lora(model, config)
    torch.manual_seed(2)
    for parameter in fast.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn_like(parameter)
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


def test_evaluation_does_not_cut_the_gradients_of_4_bit_layers(saved_base):
    model = adapted(load_base(saved_base[True], lora_utils.quantization_config(AdapterFlags(use_qlora=True))))
    before = state_of(model)
    model.eval()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        model(input_ids=torch.tensor([[1, 2, 3]]))
    model.train()
    ids = torch.tensor([[1, 90, 5, 7]])
    with torch.autocast("cpu", torch.bfloat16):
        model(input_ids=ids, labels=ids).loss.backward()
    lowest = [p.grad for n, p in model.named_parameters() if "layers.0" in n and "q_proj.lora_B" in n]
    assert lowest[0] is not None and lowest[0].abs().sum() > 0
    assert all(torch.equal(value, before[name]) for name, value in state_of(model).items())


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


def test_parameters_are_counted_once_and_as_what_they_stand_for(saved_base):
    model = make_model(tie_word_embeddings=True)
    total = sum(p.numel() for p in model.parameters())
    wrapped = adapted(model, lora_r=4, lora_target_modules="q_proj")
    expected = 2 * 4 * (64 + 64) + len(IDS) * 64
    assert lora_utils.count_parameters(wrapped) == (expected, total + expected)
    assert lora_utils.trainable_report(wrapped).startswith(f"trainable parameters: {expected:,} of")
    plain, quantized = (
        load_base(saved_base[True], q) for q in (None, lora_utils.quantization_config(AdapterFlags(use_qlora=True)))
    )
    assert lora_utils.count_parameters(quantized)[1] == lora_utils.count_parameters(plain)[1]


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


def test_an_adapter_names_its_base_from_any_directory(saved_base, tmp_path, monkeypatch):
    folder = Path(saved_base[True])
    monkeypatch.chdir(folder.parent)
    adapted(load_base(folder.name)).save_pretrained(tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["base_model_name_or_path"] == str(folder)


def test_the_adapter_of_a_7b_model_is_small():
    config = CONFIG_MAPPING["qwen2"](
        vocab_size=152064, hidden_size=3584, intermediate_size=18944, num_hidden_layers=28, num_attention_heads=28,
        num_key_value_heads=4, tie_word_embeddings=False,
    )  # fmt: skip
    model = meta_model(config)
    with torch.device("meta"):
        wrapped = lora_utils.add_lora(model, lora_utils.lora_config(model, list(range(151_665, 151_665 + 560))))
    trainable, _ = lora_utils.count_parameters(wrapped)
    assert trainable == 40_370_176 + 2 * 560 * 3584
    assert 4 * trainable < 180e6  # bytes on disk, in float32


# --- The lean low-rank update -----------------------------------------------------------------------------------------


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
        model = load_base(saved_base[True], storage, ends_in_8_bits=False)  # PEFT's own layers read weights
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


def test_a_layer_of_a_list_is_told_from_the_layers_of_the_decoder():
    wanted, others = ["model.projections.0", "model.projections.1"], ["model.layers.0", "model.layers.1"]
    assert lora_utils._suffixes(wanted, others) == ["projections.0", "projections.1"]
    assert lora_utils._suffixes(["0"], ["a.0"]) == ["0"]  # no ending tells them apart: the whole name
