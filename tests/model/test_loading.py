"""In which precision and layout a base is loaded."""

import json

import pytest
import torch
from adapting import adapted, state_of
from architectures import build
from as_on_gpu import answer
from models import IDS, config_of, make_model
from safetensors.torch import load_file, save_file

import lora_utils
from minionerec.errors import InputError
from minionerec.flags import AdapterFlags
from minionerec.model import device, loading
from minionerec.model.loading import load_base


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


@pytest.mark.parametrize("name", ["float16", "bfloat16"])
def test_a_frozen_base_is_loaded_in_what_the_device_computes(base, monkeypatch, name):
    monkeypatch.setattr(device, "compute_dtype", answer(name))
    dtype = getattr(torch, name)
    assert loading.load_base(base).dtype == dtype
    quantized = loading.load_base(base, lora_utils.quantization_config(AdapterFlags(use_qlora=True)))
    assert quantized.get_input_embeddings().weight.dtype == dtype
    adapted = lora_utils.add_lora(quantized, lora_utils.lora_config(quantized, IDS))
    assert {p.dtype for p in adapted.parameters() if p.requires_grad} == {torch.float32}
    rows = lora_utils.train_sid_rows_only(loading.load_base(base), IDS)
    assert {p.dtype for p in rows.parameters() if p.requires_grad} == {torch.float32}


def test_a_base_that_float16_does_not_fit_is_named(tmp_path, monkeypatch, capsys):
    config_of("gemma2").save_pretrained(tmp_path)
    for dtype, warned in (("bfloat16", False), ("float16", True)):
        monkeypatch.setattr(device, "compute_dtype", answer(dtype))
        loading.load_base(str(tmp_path), from_scratch=True)
        assert ("gemma2 models often overflow float16" in capsys.readouterr().out) == warned


def test_a_name_that_is_looked_up_on_the_hub_is_said_first(monkeypatch, capsys):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    loading._look_up.cache_clear()
    with pytest.raises(InputError, match="there is no such folder, and no hub model of this name can be reached"):
        loading.load_config("owner/nowhere")
    with pytest.raises(InputError, match="no tokenizer can be loaded; there is no such folder"):
        loading.load_tokenizer("owner/nowhere")
    assert capsys.readouterr().err.count("owner/nowhere: is not a folder here; looking it up on the hub") == 1


def _without(name: str):
    def change(folder, config, weights):
        del weights[name]

    return change


def _other(key: str, value: object):
    def change(folder, config, weights):
        config[key] = value

    return change


def _index(text: str):
    def change(folder, config, weights):
        weights.clear()
        (folder / "model.safetensors.index.json").write_text(text)

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            _without("model.norm.weight"),
            r"1 of the weights .* missing .*, such as model\.norm\.weight; take a complete",
        ),
        (_without("lm_head.weight"), r"such as lm_head\.weight"),
        (_other("vocab_size", 80), r"2 of the weights that its config.json asks for are missing or have another shape"),
        (_other("num_hidden_layers", "two"), "no model configuration can be loaded"),
        (_index("{"), r"index\.json: is damaged, it does not say which file has which weight"),
        (_index("{}"), r"index\.json: is damaged"),
    ],
)
def test_a_base_that_is_not_whole_is_refused(tmp_path, change, message):
    """transformers would go on with random weights."""
    make_model(tie_word_embeddings=False).save_pretrained(tmp_path)
    config, weights = json.loads((tmp_path / "config.json").read_text()), load_file(tmp_path / "model.safetensors")
    change(tmp_path, config, weights)
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").unlink()
    if weights:  # else an index says where they are
        save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(InputError, match=message):
        loading.fingerprint(str(tmp_path))
        load_base(str(tmp_path))
    (tmp_path / "model.safetensors").unlink(missing_ok=True)
    with pytest.raises(InputError):
        load_base(str(tmp_path))


def _cut(path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.parametrize("quantized", [False, True])
def test_a_damaged_file_of_weights_is_named(tmp_path, quantized):
    flags = AdapterFlags(use_lora=not quantized, use_qlora=quantized)
    model = make_model()
    model.save_pretrained(tmp_path, max_shard_size="50KB")
    shard = min(tmp_path.glob("model-*"))
    _cut(shard)
    with pytest.raises(InputError, match=f"{shard.name}: the weights cannot be loaded"):
        load_base(str(tmp_path), lora_utils.quantization_config(flags))
    for file in tmp_path.glob("model*safetensors*"):
        file.unlink()
    single = tmp_path / "pytorch_model.bin"
    torch.save(model.state_dict(), single)
    for damage in (lambda: _cut(single), lambda: single.write_bytes(b"")):
        damage()
        with pytest.raises(InputError, match=r"pytorch_model\.bin: the weights cannot be loaded"):
            load_base(str(tmp_path), lora_utils.quantization_config(flags))


@pytest.mark.parametrize(
    ("architecture", "changes", "bits", "message"),
    [
        ("qwen2", {"vocab_size": 80}, 4, "of the weights that its config.json asks for .*; take a complete"),
        ("qwen2", {"intermediate_size": 24}, 4, r"6 of the weights .*, such as model\.layers\.0\.mlp\.down_proj"),
        ("qwen2", {"intermediate_size": 24}, 8, r"6 of the weights .*, such as model\.layers\.0\.mlp\.down_proj"),
        ("gpt2", {"n_inner": 24}, 4, r"6 of the weights .*, such as transformer\.h\.0\.mlp\.c_fc\.bias"),
        ("mixtral", {"intermediate_size": 24}, 4, r"such as model\.layers\.0\.mlp\.experts\.down_proj"),
        ("qwen2", {"vocab_size": -5}, 4, "the weights cannot be loaded"),
        ("qwen2", {"pad_token_id": 5000}, 4, "the weights cannot be loaded"),
    ],
)
def test_a_quantized_base_whose_config_has_other_sizes_is_refused(tmp_path, architecture, changes, bits, message):
    """transformers compares no shapes of what it quantizes. Such a base computed, and an adapter around it, made by the
    config, ended the first step in a traceback."""
    build(architecture).save_pretrained(tmp_path)
    flags = AdapterFlags(use_qlora=bits == 4, use_lora=bits == 8, load_in_8bit=bits == 8)
    if architecture == "gpt2":  # which stores [in, out]
        assert load_base(str(tmp_path), lora_utils.quantization_config(flags))
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, **changes}))
    with pytest.raises(InputError, match=message):
        load_base(str(tmp_path), lora_utils.quantization_config(flags))


def test_a_leftover_index_does_not_change_the_fingerprint(tmp_path):
    make_model().save_pretrained(tmp_path)
    before = loading.fingerprint(str(tmp_path))
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {"lm_head.weight": "old.safetensors"}}')
    assert before and loading.fingerprint(str(tmp_path)) == before
    load_base(str(tmp_path))
