import gc
import hashlib
import json
import os
import shutil
import weakref
from pathlib import Path

import pytest
import torch
from helpers import largest_file, refused, run_command, sft_flags, succeed
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import lora_utils
import sft
from merge_lora import merge
from minionerec.checkpoint import Checkpoint
from minionerec.flags import AdapterFlags
from minionerec.model import adapters, loading


def digests(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in Path(folder).iterdir()}


@pytest.fixture(scope="module")
def untied_base(files, tmp_path_factory) -> str:
    folder = str(tmp_path_factory.mktemp("untied") / "base")
    size = {"vocab_size": 400, "hidden_size": 64, "num_hidden_layers": 2, "intermediate_size": 128}
    succeed("scripts/make_base.py", item_meta_path=files["item"], output_dir=folder, tie_word_embeddings=False, **size)
    return folder


@pytest.fixture(scope="module")
def trained(files, base, untied_base, tmp_path_factory) -> dict[str, str]:
    """Adapter checkpoints that moved far from their base."""
    checkpoints = {}
    for name, on, flags in (
        ("tied", base, {"use_lora": True, "use_dora": True}),
        ("untied", untied_base, {"use_lora": True}),
        ("4 bits", base, {"use_qlora": True}),
        ("8 bits", base, {"use_lora": True, "load_in_8bit": True}),
    ):
        output = tmp_path_factory.mktemp("trained") / "run"
        succeed("sft.py", **sft_flags(files, on, output, sample=20, learning_rate=2e-2, **flags))
        checkpoints[name] = str(output / "final_checkpoint")
    return checkpoints


def logits_of(model, ids):
    with torch.no_grad():
        return model.eval()(input_ids=ids).logits.float()


@pytest.mark.parametrize("name", ["tied", "untied", "4 bits", "8 bits"])
def test_a_merged_checkpoint_equals_its_adapter(trained, base, untied_base, tmp_path, name):
    adapter, on = trained[name], untied_base if name == "untied" else base
    before = digests(adapter), digests(on)
    merge(adapter=adapter, output_dir=str(tmp_path / "merged"), max_shard_size="100KB")
    assert (digests(adapter), digests(on)) == before
    assert not (tmp_path / "merged.partial").exists()
    assert len(list((tmp_path / "merged").glob("*.safetensors"))) > 1
    assert len({file.stat().st_mode for file in (tmp_path / "merged").iterdir()}) == 1
    assert "library_name: transformers" in (tmp_path / "merged" / "README.md").read_text(encoding="utf-8")

    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "merged")
    assert merged.get_input_embeddings().weight.shape[0] == len(tokenizer) == merged.config.vocab_size
    assert merged.config.tie_word_embeddings == (name != "untied")
    assert merged.dtype == torch.float32  # as the base was saved
    flags = Checkpoint.read(adapter).run["flags"]
    quantization = lora_utils.quantization_config(
        AdapterFlags(use_qlora=flags["use_qlora"], load_in_8bit=flags["load_in_8bit"])
    )
    adapted = lora_utils.load_adapted(Checkpoint.read(adapter), tokenizer, on, quantization)
    ids = tokenizer("Purchases: <a_0><b_0><c_0>, <a_1><b_0><c_1>\nAnswer:\n<a_2>", return_tensors="pt").input_ids
    if quantization is not None:  # their errors are compared: many tokens, because the mean of a few says little
        ids = torch.randint(3, len(tokenizer), (32, 24), generator=torch.Generator().manual_seed(0))
    ours, theirs = logits_of(merged, ids), logits_of(adapted, ids)
    with adapted.disable_adapter():
        without = logits_of(adapted, ids)
    far = (theirs - without).abs().mean()
    assert far > 0.1
    if quantization is None:
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-5)
    else:  # the adapter's own products are in 16 or 8 bits
        assert (ours - theirs).abs().mean() < 0.02 * far
        original = lora_utils.load_adapted(Checkpoint.read(adapter), tokenizer, on, merge_in=torch.float32)
        assert (ours - theirs).abs().mean() < (logits_of(original, ids) - theirs).abs().mean()


def test_four_bit_weights_are_merged_as_what_they_stand_for(trained, base):
    tokenizer = loading.load_tokenizer(trained["4 bits"])
    quantization = lora_utils.quantization_config(AdapterFlags(use_qlora=True))
    merged = lora_utils.load_adapted(
        Checkpoint.read(trained["4 bits"]), tokenizer, base, quantization, merge_in=torch.float32
    )
    plain = (
        loading.load_base(base, quantization, embeddings_in_8_bits=False).dequantize(torch.float32).to(torch.float32)
    )
    published = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).state_dict()
    plain.load_state_dict({n: t for n, t in published.items() if "proj.weight" not in n}, strict=False)
    loading.fit_embeddings(plain, tokenizer)
    adapted = adapters.load_adapter(plain, trained["4 bits"])
    ids = torch.arange(30).unsqueeze(0)
    torch.testing.assert_close(logits_of(merged, ids), logits_of(adapted, ids), atol=1e-5, rtol=1e-5)


def test_into_the_original_base_says_how_the_rankings_differ(trained, tmp_path):
    done = succeed("merge_lora.py", adapter=trained["4 bits"], output_dir=tmp_path / "m", into="original", sample=5)
    assert "5 rows: the same first item in" in done.stdout
    report = Checkpoint.read(str(tmp_path / "m")).run["merged"]
    assert report["compared_rows"] == 5 and 0 < report["same_of_10"] <= 1
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "m")
    tokenizer = loading.load_tokenizer(trained["4 bits"])
    base_model = Checkpoint.read(trained["4 bits"]).run["flags"]["base_model"]
    expected = lora_utils.load_adapted(
        Checkpoint.read(trained["4 bits"]), tokenizer, base_model, merge_in=torch.float32
    )
    ids = torch.arange(30).unsqueeze(0)
    torch.testing.assert_close(logits_of(merged, ids), logits_of(expected, ids), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("name", "on"), [("untied", "base"), ("4 bits", "quantized base")])
def test_every_merge_says_how_it_ranks_and_what_changed(trained, tmp_path, capsys, name, on):
    report = merge(adapter=trained[name], output_dir=str(tmp_path / "m"), sample=5)
    printed = capsys.readouterr().out
    assert f"against the adapter on its {on}, 5 rows: the same first item in" in printed
    assert report["compared_rows"] == 5 and report["same_of_10"] > 0.9
    assert f"of {report['updated_weights']:,} weights that the adapter updates, " in printed
    assert "changed in float32" in printed and "recommended" not in printed
    assert report["changed_weights"] > 0.99 * report["updated_weights"] > 0
    assert Checkpoint.read(str(tmp_path / "m")).run["merged"] == report


def test_a_merge_holds_one_model_at_a_time(checkpoint, tmp_path, monkeypatch):
    held, counts = [], []

    def load(*args, real=loading.load_base, **kwargs):
        counts.append(sum(weight() is not None for weight in held))
        model = real(*args, **kwargs)
        held.extend(map(weakref.ref, model.parameters()))
        return model

    monkeypatch.setattr(loading, "load_base", load)
    gc.collect()
    gc.disable()  # Python collects cycles at times of its own
    try:
        merge(adapter=checkpoint, output_dir=tmp_path / "merged")
    finally:
        gc.enable()
    assert counts == [0, 0, 0] and held  # on its base, merged, and what was saved


def test_updates_that_the_saved_precision_loses(trained, untied_base, tmp_path, capsys):
    """bfloat16 keeps steps of some 2^-8 of a weight; what changes is counted by hand."""
    small = tmp_path / "small"
    shutil.copytree(trained["untied"], small)
    tensors = load_file(small / "adapter_model.safetensors")
    save_file({n: t * 3e-4 if "lora_B" in n else t for n, t in tensors.items()}, small / "adapter_model.safetensors")
    report = merge(adapter=str(small), output_dir=str(tmp_path / "half"), dtype="bfloat16", sample=1)
    printed = capsys.readouterr().out
    before = load_file(os.path.join(untied_base, "model.safetensors"))
    after = load_file(tmp_path / "half" / "model.safetensors")
    linear = [name for name in after if name.endswith("_proj.weight")]
    assert report["updated_weights"] == sum(before[name].numel() for name in linear)
    changed = sum((before[name].bfloat16() != after[name]).sum().item() for name in linear)
    assert report["changed_weights"] == changed and 0 < changed < report["updated_weights"] / 2
    assert f" updates, {changed / report['updated_weights']:.1%} changed in bfloat16" in printed
    assert "recommended: --dtype float32" in printed
    merge(adapter=str(small), output_dir=str(tmp_path / "whole"), dtype="float32", sample=1)
    assert "recommended" not in capsys.readouterr().out


def test_without_its_files_a_merge_says_why_it_compares_nothing(trained, tmp_path, capsys):
    shutil.copytree(trained["untied"], tmp_path / "moved")
    run = json.loads((tmp_path / "moved" / "minionerec.json").read_text())
    run["flags"]["eval_file"] = str(tmp_path / "gone.csv")
    (tmp_path / "moved" / "minionerec.json").write_text(json.dumps(run))
    report = merge(adapter=str(tmp_path / "moved"), output_dir=str(tmp_path / "m"))
    printed = capsys.readouterr().out
    assert f"rankings are not compared with the adapter's: --eval_file {tmp_path / 'gone.csv'}: no such file" in printed
    assert "compared_rows" not in report and "changed in float32" in printed


def test_sampling_defaults_of_a_base_stay_behind(trained, files, base, tmp_path):
    """In merged checkpoints and in those of full runs; token ids stay."""
    shutil.copytree(base, tmp_path / "chat")
    path = tmp_path / "chat" / "generation_config.json"
    ids = {name: value for name, value in json.loads(path.read_text()).items() if name.endswith("_token_id")}
    ids["eos_token_id"] = [ids["eos_token_id"], 7]
    sampling = {"do_sample": True, "temperature": 0.6, "top_k": 20, "top_p": 0.8, "repetition_penalty": 1.1}
    path.write_text(json.dumps({**ids, **sampling, "max_new_tokens": 2048}))
    merge(adapter=trained["tied"], base_model=str(tmp_path / "chat"), output_dir=str(tmp_path / "merged"), sample=1)
    sft.train(**sft_flags(files, str(tmp_path / "chat"), str(tmp_path / "run"), sample=8, eval_step=0.5))
    eos = loading.load_tokenizer(base).eos_token_id
    for folder in (tmp_path / "merged", tmp_path / "run" / "final_checkpoint"):
        saved = json.loads((folder / "generation_config.json").read_text())
        saved.pop("transformers_version")
        assert eos in saved["eos_token_id"] and saved["pad_token_id"] == eos
        assert saved == ids


def test_a_merge_that_cannot_finish_leaves_no_checkpoint(trained, tmp_path):
    limit = os.path.getsize(Path(trained["tied"]) / "adapter_model.safetensors")
    flags = {"adapter": trained["tied"], "output_dir": tmp_path / "m"}
    with largest_file(limit):
        done = run_command("merge_lora.py", **flags)
    assert done.returncode == 1
    assert done.stderr.strip().splitlines()[-1].startswith("merge_lora.py: error: ")
    assert "cannot be written" in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "m").exists()


def test_merge_refuses(trained, base, untied_base, tmp_path):
    good = {"adapter": trained["tied"], "output_dir": tmp_path / "m"}
    (tmp_path / "there").mkdir()
    for flags, message in (
        ({"adapter": base}, "no adapter_config.json there"),
        ({"output_dir": tmp_path / "there"}, "exists already"),
        ({"into": "nothing"}, "--into 'nothing'"),
        ({"dtype": "int3"}, "--dtype 'int3'"),
        ({"max_shard_size": "many"}, "--max_shard_size 'many'"),
        ({"max_shard_size": "5MGB"}, "--max_shard_size '5MGB'"),
        ({"base_model": trained["untied"]}, "is an adapter, not a model"),
        ({"base_model": untied_base}, "does not fit the base"),
        ({"adapter": trained["4 bits"], "into": "original", "eval_file": "nowhere.csv"}, "--eval_file nowhere.csv"),
    ):
        refused("merge_lora.py", message, **{**good, **flags})
    assert not (tmp_path / "m").exists()


def test_a_base_that_does_not_say_its_precision(trained, base, tmp_path):
    shutil.copytree(base, tmp_path / "base")
    config = json.loads((tmp_path / "base" / "config.json").read_text())
    del config["dtype"]
    (tmp_path / "base" / "config.json").write_text(json.dumps(config))
    merge(adapter=trained["tied"], base_model=str(tmp_path / "base"), output_dir=str(tmp_path / "merged"))
    assert (tmp_path / "merged" / "model.safetensors").exists()
    assert not (tmp_path / "merged" / "adapter_config.json").exists()


def test_a_merged_checkpoint_is_another_base(trained, base, tmp_path):
    merge(adapter=trained["tied"], output_dir=str(tmp_path / "merged"))
    assert loading.fingerprint(str(tmp_path / "merged")) != loading.fingerprint(base)
    refused(
        "merge_lora.py",
        "does not fit",
        adapter=trained["tied"],
        base_model=tmp_path / "merged",
        output_dir=tmp_path / "m",
    )
    # In other shards and another precision it is the same.
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "shards", max_shard_size="100KB")
    assert loading.fingerprint(str(tmp_path / "shards")) == loading.fingerprint(base)


def test_damaged_weights_are_named(trained, files, base, tmp_path):
    shutil.copytree(trained["tied"], tmp_path / "adapter")
    shutil.copytree(base, tmp_path / "base")
    for path in (tmp_path / "adapter" / "adapter_model.safetensors", tmp_path / "base" / "model.safetensors"):
        path.write_bytes(path.read_bytes()[:-100])
    refused("merge_lora.py", "the file is damaged", adapter=tmp_path / "adapter", output_dir=tmp_path / "m")
    refused("sft.py", "cannot be read", **sft_flags(files, str(tmp_path / "base"), tmp_path / "run"))
    (tmp_path / "adapter" / "adapter_model.safetensors").unlink()
    refused("merge_lora.py", "has no adapter_model", adapter=tmp_path / "adapter", output_dir=tmp_path / "m")
