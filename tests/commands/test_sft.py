import json
import os
import signal
import time

import pytest
import torch
from helpers import ADAPTER, STATE, WHOLE, sft_flags, succeed
from peft import AutoPeftModelForCausalLM
from processes import start_command
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from minionerec.model import adapters, loading


def run_sft(files, base, output, **flags) -> dict:
    result = succeed("sft.py", **sft_flags(files, base, output, **flags))
    assert "deprecated" not in result.stderr
    return json.loads((output / "metrics.json").read_text())


@pytest.fixture(scope="module")
def lora_run(sft_run):
    output = sft_run("lora")
    return output, json.loads((output / "metrics.json").read_text())


def test_a_lora_run_writes_these_files_and_no_others(lora_run):
    output, metrics = lora_run
    checkpoints = [name for name in os.listdir(output) if name.startswith("checkpoint-")]
    assert set(os.listdir(output)) == {"curves.png", "final_checkpoint", "metrics.json", *checkpoints}
    assert 1 <= len(checkpoints) <= 2
    assert set(os.listdir(output / "final_checkpoint")) == ADAPTER
    for name in checkpoints:
        assert set(os.listdir(output / name)) == ADAPTER | STATE
    assert metrics["method"] == "lora"
    assert 0 < metrics["trainable_parameters"] < metrics["total_parameters"]
    losses = [entry["eval_loss"] for entry in metrics["history"] if "eval_loss" in entry]
    assert metrics["best_eval_loss"] == min(losses)
    assert losses[-1] < losses[0]


def test_the_adapter_loads_with_peft_alone(lora_run, base):
    final = str(lora_run[0] / "final_checkpoint")
    tokenizer = AutoTokenizer.from_pretrained(final)
    model = loading.load_base(base)
    loading.fit_embeddings(model, tokenizer)
    ours = adapters.load_adapter(model, final).eval()
    stock = AutoPeftModelForCausalLM.from_pretrained(final).eval()
    ids = tokenizer("Purchases: <a_0><b_0><c_0>", return_tensors="pt").input_ids
    torch.testing.assert_close(stock(input_ids=ids).logits, ours(input_ids=ids).logits, atol=1e-6, rtol=1e-5)
    with stock.disable_adapter():
        assert not torch.allclose(stock(input_ids=ids).logits, ours(input_ids=ids).logits, atol=1e-3)


@pytest.mark.parametrize("method", ["full", "freeze_LLM", "use_qlora", "load_in_8bit", "train_from_scratch"])
def test_other_methods(files, base, tmp_path, method):
    output = tmp_path / "run"
    flags = {} if method == "full" else {method: True, "use_lora": method == "load_in_8bit"}
    metrics = run_sft(files, base, output, sample=10, **flags)
    final = output / "final_checkpoint"
    names = {"use_qlora": "qlora", "load_in_8bit": "lora", "train_from_scratch": "full"}
    assert metrics["method"] == names.get(method, method)
    if metrics["method"] in ("lora", "qlora"):
        assert set(os.listdir(final)) == ADAPTER
        return
    assert set(os.listdir(final)) == WHOLE
    before = AutoModelForCausalLM.from_pretrained(base)
    after = AutoModelForCausalLM.from_pretrained(final)
    old = before.get_input_embeddings().weight
    new = after.get_input_embeddings().weight
    sids = AutoTokenizer.from_pretrained(final).convert_tokens_to_ids(["<a_0>", "<c_2>"])
    assert min(sids) >= len(old) and len(new) == len(AutoTokenizer.from_pretrained(final))
    assert torch.equal(old, new[: len(old)]) == (method == "freeze_LLM")
    layer = "model.layers.0.mlp.up_proj.weight"
    assert torch.equal(before.state_dict()[layer], after.state_dict()[layer]) == (method == "freeze_LLM")


def losses_of(metrics: dict) -> list[tuple]:
    keys = ("loss", "eval_loss", "grad_norm", "learning_rate")
    return [(entry["step"], *(entry.get(key) for key in keys)) for entry in metrics["history"]][:-1]


@pytest.mark.slow
def test_a_killed_run_continues_exactly(files, base, tmp_path):
    flags = {"use_lora": True, "num_epochs": 3, "eval_step": 0.2, "learning_rate": 1e-3}
    whole = run_sft(files, base, tmp_path / "whole", **flags)
    output = tmp_path / "killed"
    killed = start_command("sft.py", sft_flags(files, base, output, **flags))
    killed.wait_for_checkpoint(output)
    killed.kill(signal.SIGKILL)
    assert killed.wait() == [-signal.SIGKILL]
    assert not (output / "final_checkpoint").exists()
    resumed = run_sft(files, base, output, **flags, resume_from_checkpoint=True)
    assert losses_of(resumed) == losses_of(whole)
    started = time.perf_counter()
    again = run_sft(files, base, output, **flags, resume_from_checkpoint=True)  # nothing is left to do
    assert 0 <= again["seconds"] - resumed["seconds"] < time.perf_counter() - started
    tensors = [
        load_file(run / "final_checkpoint" / "adapter_model.safetensors") for run in (tmp_path / "whole", output)
    ]
    assert all(torch.equal(tensor, tensors[1][name]) for name, tensor in tensors[0].items())
