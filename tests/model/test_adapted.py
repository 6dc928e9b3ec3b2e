"""How a checkpoint is loaded to be ranked with: its adapter merged where that only rounds, else as in training."""

import pytest
import torch
from architectures import build
from models import config_of, make_model, numbers_as_words
from peft import PeftModel
from plain import moved
from transformers import AutoModelForCausalLM

import lora_utils
from minionerec.checkpoint import Checkpoint
from minionerec.errors import InputError
from minionerec.flags import AdapterFlags
from minionerec.model import device, loading
from minionerec.model.adapted import load_adapted, load_checkpoint, quantization_config

TOKENS = torch.arange(3, 60).view(3, 19)


def test_an_adapter_is_merged_into_float32_only(sft_run, monkeypatch):
    checkpoint = Checkpoint.read(str(sft_run("lora") / "final_checkpoint"))
    tokenizer, base = loading.load_tokenizer(checkpoint.path), checkpoint.base()
    ids = torch.cat([TOKENS, torch.full((3, 1), len(tokenizer) - 1)], dim=1)  # and a SID token
    merged, adapted = load_checkpoint(checkpoint, tokenizer, base), load_adapted(checkpoint, tokenizer, base).eval()
    assert not isinstance(merged, PeftModel) and isinstance(adapted, PeftModel)
    with torch.no_grad():
        found, expected = (model(input_ids=ids).logits.log_softmax(dim=-1) for model in (merged, adapted))
        with adapted.disable_adapter():
            start = adapted(input_ids=ids).logits.log_softmax(dim=-1)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-5)
    assert (start - expected).abs().max() > 0.1

    monkeypatch.setattr(device, "compute_dtype", lambda quantized=False: torch.bfloat16)
    assert isinstance(load_checkpoint(checkpoint, tokenizer, base), PeftModel)
    assert isinstance(load_checkpoint(checkpoint, tokenizer, base, fast=True), PeftModel)  # on a CPU
    monkeypatch.setattr(device, "starts_kernels", lambda _: True)
    assert not isinstance(load_checkpoint(checkpoint, tokenizer, base, fast=True), PeftModel)


def test_an_adapter_of_a_quantized_base_stays(sft_run):
    checkpoint = Checkpoint.read(str(sft_run("qlora") / "final_checkpoint"))
    model = load_checkpoint(checkpoint, loading.load_tokenizer(checkpoint.path), checkpoint.base(), fast=True)
    assert isinstance(model, PeftModel)


def adapter_of(folder, path, **settings):
    """A moved adapter on a base, saved, and the logits of its model for `TOKENS`."""
    flags = AdapterFlags(lora_r=4, lora_dropout=0.0, **settings)
    tokenizer = loading.load_tokenizer(str(folder))
    model = loading.load_base(str(folder), quantization_config(flags))
    ids = loading.add_sid_tokens(model, tokenizer, ["<a_1>", "<a_2>"])
    model = moved(lora_utils.adapt(model, flags, ids).eval())
    with torch.no_grad():
        logits = model(input_ids=TOKENS.clamp(max=95)).logits.float()
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return flags, logits


@pytest.mark.parametrize("stored", [False, True])
@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
@pytest.mark.parametrize("settings", [{"use_qlora": True}, {"use_lora": True, "load_in_8bit": True}], ids=[4, 8])
def test_what_is_merged_into_a_quantized_base_loads_again(tmp_path, architecture, settings, stored):
    base, adapter, merged = (str(tmp_path / name) for name in ("base", "adapter", "merged"))
    model = make_model(architecture, scale=2.0)
    model.save_pretrained(base)
    if stored:
        quantization = quantization_config(AdapterFlags(**settings))
        model = AutoModelForCausalLM.from_pretrained(base, quantization_config=quantization, dtype=torch.bfloat16)
        model.save_pretrained(base)
    numbers_as_words().save_pretrained(base)
    flags, expected = adapter_of(base, adapter, **settings)
    tokenizer, quantization = loading.load_tokenizer(adapter), quantization_config(flags)
    load_adapted(Checkpoint.read(adapter), tokenizer, base, quantization, merge_in=torch.float32).save_pretrained(
        merged
    )
    with torch.no_grad():
        found = AutoModelForCausalLM.from_pretrained(merged, dtype=torch.float32)(input_ids=TOKENS.clamp(max=95)).logits
    torch.testing.assert_close(found, expected, atol=0.05, rtol=0)  # the base computed in bfloat16
    assert expected.std() > 0.3


@pytest.mark.parametrize(
    ("bits", "flags", "remedy"),
    [
        (4, {"use_lora": True}, "stored in 4 bits; train it with --use_qlora True"),
        (4, {"use_lora": True, "load_in_8bit": True}, "stored in 4 bits; train it with --use_qlora True"),
        (8, {"use_qlora": True}, "stored in 8 bits; train it with --use_lora True --load_in_8bit True"),
        (4, {}, "stored in 4 bits; train it with --use_qlora True"),
        (8, {}, "stored in 8 bits; train it with --use_lora True --load_in_8bit True"),
    ],
)
def test_the_bits_of_a_stored_base_are_those_of_the_run(bits, flags, remedy):
    config = config_of("llama")
    config.quantization_config = {"quant_method": "bitsandbytes", f"load_in_{bits}bit": True}
    with pytest.raises(InputError, match=f"--model_path: .*{remedy}"):
        lora_utils.check_stored(config, AdapterFlags(**flags), "model_path")


@pytest.mark.parametrize("architecture", ["gemma3n_text", "gemma4_text"])
def test_rows_that_no_adapter_holds_are_the_same_at_every_load(tmp_path, architecture):
    """Gemma 3n and 4 have a second embedding, of every layer."""
    base, adapter = str(tmp_path / "base"), str(tmp_path / "adapter")
    build(architecture).save_pretrained(base)
    numbers_as_words().save_pretrained(base)
    _, expected = adapter_of(base, adapter, use_lora=True)
    model = load_adapted(Checkpoint.read(adapter), loading.load_tokenizer(adapter), base).eval()
    with torch.no_grad():
        torch.testing.assert_close(model(input_ids=TOKENS.clamp(max=95)).logits, expected, atol=1e-5, rtol=1e-5)
