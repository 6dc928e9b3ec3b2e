import json
from pathlib import Path

import pytest
import torch
from adapting import adapted
from models import ARCHITECTURES, config_of, make_model
from peft.tuners.lora import LoraLayer
from plain import IDS
from transformers import CONFIG_MAPPING

import lora_utils
from minionerec.errors import InputError
from minionerec.flags import AdapterFlags
from minionerec.model.architecture import meta_model
from minionerec.model.loading import load_base

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


def test_a_layer_of_a_list_is_told_from_the_layers_of_the_decoder():
    wanted, others = ["model.projections.0", "model.projections.1"], ["model.layers.0", "model.layers.1"]
    assert lora_utils._suffixes(wanted, others) == ["projections.0", "projections.1"]
    assert lora_utils._suffixes(["0"], ["a.0"]) == ["0"]  # no ending tells them apart: the whole name
