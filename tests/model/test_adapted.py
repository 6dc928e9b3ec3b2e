"""How a checkpoint is loaded to be ranked with: its adapter merged where that only rounds, else as in training."""

import torch
from peft import PeftModel

from minionerec.checkpoint import Checkpoint
from minionerec.model import device, loading
from minionerec.model.adapted import load_adapted, load_checkpoint

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
