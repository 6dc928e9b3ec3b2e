"""SFT, RL, evaluation and merging with every method as on a GPU: 16 bits, on the CPU, in this process."""

import json
import shutil
from functools import cache
from pathlib import Path

import pytest
import torch
from as_on_gpu import answer, starts_kernels
from helpers import cut_short, logged, newest, rl_flags, sft_flags, strings, tensors_of
from peft import PeftModel
from transformers import AutoConfig, AutoModelForCausalLM

import evaluate
import lora_utils
import merge_lora
import rl
import sft
from minionerec.checkpoint import Checkpoint
from minionerec.model import device, loading
from minionerec.model.groups import JoinedLinear
from minionerec.training import sft_trainer

SFT = {
    "full": {},
    "train_from_scratch": {"train_from_scratch": True},
    "freeze_LLM": {"freeze_LLM": True},
    "lora": {"use_lora": True},
    "lora8": {"use_lora": True, "load_in_8bit": True},
    "qlora": {"use_qlora": True},
}
WHOLE = ("full", "train_from_scratch", "freeze_LLM")


@pytest.fixture(autouse=True)
def on_gpu(monkeypatch):
    monkeypatch.setattr(device, "compute_dtype", answer("bfloat16"))
    monkeypatch.setattr(device, "starts_kernels", starts_kernels)
    monkeypatch.setattr(device, "free_memory_gb", lambda: 12.0)


@pytest.fixture(scope="module")
def published(base, tmp_path_factory) -> str:
    """The base as bases are published, in bfloat16."""
    folder = str(tmp_path_factory.mktemp("published"))
    AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16).save_pretrained(folder)
    loading.load_tokenizer(base).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def trained(files, published, tmp_path_factory):
    """`trained(method)`: the folder of an SFT run, made once."""

    @cache
    def folder(method: str) -> Path:
        output = tmp_path_factory.mktemp("sft") / method
        # The head of a frozen model learns only through its SID rows.
        rate = 3e-2 if method == "freeze_LLM" else 1e-2
        sft.train(**strings(sft_flags(files, published, output, learning_rate=rate, **SFT[method])))
        return output

    return folder


def dtypes_of(folder: Path) -> set[torch.dtype]:
    return {tensor.dtype for tensor in tensors_of(folder).values()}


@pytest.mark.parametrize("method", SFT)
def test_sft(trained, published, method):
    run = trained(method)
    losses, validation = logged(run, "loss"), logged(run, "eval_loss")
    assert losses[-1] < losses[0] - 0.1 and validation[-1] < validation[0]
    final, checkpoint = run / "final_checkpoint", newest(run)
    # Everything that trains does so in float32, and is resumed from float32.
    assert dtypes_of(checkpoint) == {torch.float32}
    if method not in WHOLE:
        assert dtypes_of(final) == {torch.float32}
        return
    assert dtypes_of(final) == {torch.bfloat16}
    assert AutoConfig.from_pretrained(final).dtype == torch.bfloat16
    before, after = tensors_of(Path(published)), tensors_of(final)
    assert before.keys() == after.keys()
    moved = {name for name, old in before.items() if not torch.equal(after[name][: len(old)], old)}
    assert moved == (set() if method == "freeze_LLM" else set(before))
    assert AutoModelForCausalLM.from_pretrained(final).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("start", "flags"),
    [
        ("full", {}),
        ("full", {"use_lora": True}),
        ("full", {"use_qlora": True}),
        ("freeze_LLM", {"use_lora": True, "load_in_8bit": True}),
        ("lora", {"use_lora": True}),
        ("lora8", {"use_lora": True, "load_in_8bit": True}),
        ("qlora", {"use_qlora": True}),
        ("lora", {}),
    ],
)
def test_rl(files, trained, tmp_path, start, flags):
    run = tmp_path / "run"
    rl.train(**strings(rl_flags(files, trained(start) / "final_checkpoint", run, add_gt=True, **flags)))
    kl, final = logged(run, "kl"), run / "final_checkpoint"
    assert kl[0] == 0.0 and kl[-1] > 0
    assert all(abs(loss) < 10 for loss in logged(run, "loss"))
    assert all(0 <= value <= 1 for value in logged(run, "eval_NDCG@10"))
    assert dtypes_of(newest(run)) == {torch.float32}
    assert dtypes_of(final) == ({torch.float32} if flags else {torch.bfloat16})
    if flags and start == "full":
        return
    # In float32: ten small steps from a norm's 1.0 are less than half a step of bfloat16.
    before, after = (tensors_of(folder) for folder in (trained(start) / "final_checkpoint", newest(run)))
    if before.keys() == after.keys():
        assert not any(torch.equal(after[name], before[name].float()) for name in before)


@pytest.mark.parametrize("method", SFT)
def test_evaluation_ranks_as_in_float32(files, trained, tmp_path, method, monkeypatch):
    flags = {"base_model": str(trained(method) / "final_checkpoint"), "info_file": files["info"], "category": "bolts"}
    flags |= {"test_data_path": files["test"], "num_beams": 20}
    found = []
    for dtype in ("bfloat16", "float32"):
        monkeypatch.setattr(device, "compute_dtype", answer(dtype))
        path = tmp_path / f"{dtype}.json"
        metrics = evaluate.evaluate(**flags, result_json_data=str(path))
        assert 0 < metrics["HR@20"] <= 1
        found.append([row["predict"] for row in json.loads(path.read_text())])
    shared = [len({*one} & {*two}) / 20 for one, two in zip(*found, strict=True)]
    assert sum(shared) / len(shared) > 0.9


@pytest.mark.parametrize("method", ["lora", "lora8", "qlora"])
def test_merging(files, trained, tmp_path, method):
    adapter, merged = trained(method) / "final_checkpoint", tmp_path / "merged"
    merge_lora.merge(adapter=str(adapter), output_dir=str(merged))
    assert dtypes_of(merged) == {torch.bfloat16}
    found = []
    for folder in (adapter, merged):
        flags = {"base_model": str(folder), "info_file": files["info"], "category": "bolts", "num_beams": 20}
        path = tmp_path / "result.json"
        evaluate.evaluate(**flags, test_data_path=files["test"], result_json_data=str(path))
        found.append([row["predict"] for row in json.loads(path.read_text())])
    shared = [len({*one} & {*two}) / 20 for one, two in zip(*found, strict=True)]
    assert sum(shared) / len(shared) > 0.9


def test_a_run_in_full_goes_on_exactly(trained, tmp_path):
    """From its float32 weights: those in the base's precision would have lost the last steps."""
    whole, again = trained("full"), tmp_path / "again"
    shutil.copytree(whole, again)
    cut_short(again)
    flags = json.loads((whole / "final_checkpoint" / "minionerec.json").read_text())["flags"]
    sft.train(**{**flags, "output_dir": str(again), "resume_from_checkpoint": "True"})
    one, two = tensors_of(newest(whole)), tensors_of(newest(again))
    assert all(torch.equal(two[name], tensor) for name, tensor in one.items())


def test_a_served_adapter_is_merged(trained):
    """In 16 bits, which a server takes for speed: recommendations are nearly those of the adapter."""
    folder = trained("lora") / "final_checkpoint"
    checkpoint, tokenizer = Checkpoint.read(str(folder)), loading.load_tokenizer(str(folder))
    whole, adapted = (lora_utils.load_checkpoint(checkpoint, tokenizer, "", fast=fast) for fast in (True, False))
    assert not isinstance(whole, PeftModel) and isinstance(adapted, PeftModel)
    assert any(isinstance(module, JoinedLinear) for module in whole.modules())
    ids = torch.tensor([tokenizer("Purchases: a bolt, M5").input_ids])
    with torch.no_grad():
        found, expected = (model(input_ids=ids).logits[0].float() for model in (whole, adapted))
        with adapted.disable_adapter():
            without = adapted(input_ids=ids).logits[0].float()
    assert (found - expected).abs().mean() < 0.1 * (expected - without).abs().mean()


def test_sft_sizes_its_micro_batches(files, published, tmp_path, monkeypatch, capsys):
    """By the predicted memory, then by a trial, which fails here above 4 rows."""
    real, tried = sft_trainer.fits, []

    def trial(model, dataset, trees, rows, pad_token_id):
        tried.append(rows)
        return rows <= 4 and real(model, dataset, trees, rows, pad_token_id)

    monkeypatch.setattr(sft_trainer, "fits", trial)
    flags = sft_flags(files, published, tmp_path / "run", micro_batch_size="auto", use_lora=True, eval_step=0.9)
    metrics = sft.train(**strings(flags))
    assert tried == [16, 8, 4] and metrics["steps"] > 0
    printed = capsys.readouterr().out
    assert "--micro_batch_size auto: 16 rows" in printed
    assert printed.count("out of memory in a trial: ") == 2 and "trial: 4 rows in a micro-batch" in printed


def test_rl_sizes_its_passes(files, trained, tmp_path, capsys):
    flags = {"train_batch_size": 8, "gradient_accumulation_steps": 2, "use_lora": True, "test_during_training": False}
    rl.train(**strings(rl_flags(files, trained("lora") / "final_checkpoint", tmp_path / "run", **flags)))
    assert "passes of up to 16 completions, by the predicted memory" in capsys.readouterr().out
