"""rl.py by its command line, from checkpoints that sft.py made."""

import json
import os
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import (
    ADAPTER,
    STATE,
    WHOLE,
    newest,
    rl_flags,
    run_command,
    run_rl,
    sft_flags,
    succeed,
    tensors_of,
    write_csv,
)
from peft import AutoPeftModelForCausalLM
from processes import start_command
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import rl
from minionerec import sasrec
from minionerec.checkpoint import Checkpoint
from minionerec.data.files import read_info
from minionerec.data.prompts import RECOMMENDATION
from minionerec.decoding import probe
from minionerec.decoding.trie import Trie
from minionerec.errors import InputError
from minionerec.model import loading
from minionerec.training.policy_loss import PolicyLoss
from minionerec.training.rl_trainer import ReReTrainer


@pytest.fixture(scope="module")
def sft(sft_run) -> dict[str, str]:
    """Checkpoints of sft.py by method."""
    return {method: str(sft_run(method) / "final_checkpoint") for method in ("full", "lora", "qlora")}


def first_logged(metrics, key):
    return next(entry[key] for entry in metrics["history"] if key in entry)


def test_no_pass_probes_a_model(files, sft, tmp_path, monkeypatch):
    """All processes must take part in a probe, but later not all make the same passes: one would wait forever."""
    start = Path(shutil.copytree(sft["full"], tmp_path / "start"))
    cutoff, depth, completions = 64, 4, 16 + 4  # tokens of a SID with its end, completions of a pass with the targets
    # No layer has the window, but it is named; only rows with all completions of a pass are longer.
    window = {"use_sliding_window": True, "max_window_layers": 99, "sliding_window": cutoff + (completions - 2) * depth}
    config, record = (json.loads((start / name).read_text()) for name in ("config.json", "minionerec.json"))
    (start / "config.json").write_text(json.dumps({**config, **window}))
    record["flags"]["cutoff_len"] = cutoff
    (start / "minionerec.json").write_text(json.dumps(record))
    events = []
    try_all, train = probe._try_all, ReReTrainer.train
    monkeypatch.setattr(probe, "_try_all", lambda *args: events.append("probe") or try_all(*args))
    monkeypatch.setattr(ReReTrainer, "train", lambda *args: events.append("train") or train(*args))
    metrics, result = run_rl(files, start, tmp_path / "run", beta=0.1, sft_weight=0.5, mask_all_zero=True)
    assert events == ["probe", "probe", "train"]
    assert "share a row with their prompt" in result.stdout and first_logged(metrics, "kl") == 0.0


def test_items_that_the_catalogue_lacks_are_not_asked_for(files, sft, tmp_path):
    """An item of the index that is not sold has no place in the info file, and no completions."""
    sids = [json.loads(Path(files[name]).read_text()) for name in ("index", "item")]
    sids[0]["40"], sids[1]["40"] = ["<a_0>", "<b_1>", "<c_0>"], {"title": "Bolt forty", "description": "A bolt."}
    assert list(sids[0].values()).count(sids[0]["40"]) == 1
    own = {**files, "index": str(tmp_path / "index.json"), "item": str(tmp_path / "item.json")}
    for name, content in zip(("index", "item"), sids, strict=True):
        Path(own[name]).write_text(json.dumps(content))
    flags = {"use_lora": True, "test_during_training": False, "num_train_epochs": 1}
    _, result = run_rl(own, sft["lora"], tmp_path / "run", **flags, tasks="title_to_sid")
    assert "1 SIDs of the index are not in" in result.stdout


def test_a_run_resumes_with_the_metric_that_chose_its_best():
    before = Checkpoint("out/checkpoint-4", None, {"flags": {"test_beam": 20}})
    assert rl.chosen_by(rl.RLFlags(test_beam=30), 99, before) == rl.chosen_by(rl.RLFlags(test_beam=20), 99, None) == 10
    assert rl.chosen_by(rl.RLFlags(test_beam=5), 4, before) == 3  # of four SIDs
    with pytest.raises(
        InputError, match="at 5, and was by those at 10 up to out/checkpoint-4; resume with --test_beam 20"
    ):
        rl.chosen_by(rl.RLFlags(test_beam=5), 99, before)


def test_a_lora_run_continues_its_own_adapter(files, sft, base, tmp_path):
    flags = {"use_lora": True, "tasks": "all", "train_batch_size": 64}
    metrics, result = run_rl(files, sft["lora"], tmp_path / "run", **flags)
    assert "continuing the adapter" in result.stdout and "warning" not in result.stdout
    assert "eprecat" not in result.stderr
    checkpoints = [name for name in os.listdir(tmp_path / "run") if name.startswith("checkpoint-")]
    assert set(os.listdir(tmp_path / "run")) == {"curves.png", "final_checkpoint", "metrics.json", *checkpoints}
    assert 1 <= len(checkpoints) <= 2
    final = tmp_path / "run" / "final_checkpoint"
    assert set(os.listdir(final)) == ADAPTER
    for name in checkpoints:
        state = STATE - {"optimizer.pt", "scheduler.pt"} if name == "checkpoint-0" else STATE
        assert set(os.listdir(tmp_path / "run" / name)) == ADAPTER | state
    assert json.loads((final / "minionerec.json").read_text())["command"] == "rl"
    assert first_logged(metrics, "kl") == 0.0
    assert {"reward", "eval_HR@10", "eval_NDCG@10"} <= {key for entry in metrics["history"] for key in entry}
    # 40 rows in two tasks, 40 items with a title and a description in two more; 16 prompts a step.
    assert (metrics["train_prompts"], metrics["steps"]) == (160, 10)
    # The adapter needs nothing of the SFT folder, and it has moved.
    moved = tmp_path / "moved"
    shutil.copytree(final, moved)
    assert json.loads((moved / "adapter_config.json").read_text())["base_model_name_or_path"] == base
    AutoPeftModelForCausalLM.from_pretrained(moved)
    before, after = tensors_of(Path(sft["lora"])), tensors_of(newest(tmp_path / "run"))
    assert before.keys() == after.keys() and not any(torch.equal(after[name], before[name]) for name in before)


@pytest.mark.parametrize(
    ("start", "flags", "written", "said"),
    [
        ("full", {}, WHOLE, None),
        ("full", {"use_lora": True}, ADAPTER, None),
        ("qlora", {"use_qlora": True}, ADAPTER, "continuing the adapter"),
        (
            "lora",
            {"use_qlora": True},
            ADAPTER,
            "continues on a 4-bit base here",
        ),
        (
            "qlora",
            {"use_lora": True},
            ADAPTER,
            "continues on an unquantized base here",
        ),
        ("lora", {}, WHOLE, "merging the adapter"),
    ],
)
def test_starts(files, sft, tmp_path, start, flags, written, said):
    metrics, result = run_rl(files, sft[start], tmp_path / "run", **flags, test_during_training=False)
    final = tmp_path / "run" / "final_checkpoint"
    assert set(os.listdir(final)) == written
    assert said is None or said in result.stdout
    assert first_logged(metrics, "kl") == 0.0
    assert [entry["kl"] for entry in metrics["history"] if "kl" in entry][-1] > 0
    if written == WHOLE:
        AutoModelForCausalLM.from_pretrained(final)


@pytest.mark.parametrize(
    ("reward_type", "beam_search", "warns"),
    [
        *(("ranking", False, True), ("ranking_only", False, True), ("prefix, ranking", False, True)),
        *(("ranking", True, False), ("ranking_only,rule", True, False), ("rule,prefix", False, False)),
    ],
)
def test_a_penalty_by_rank_needs_beams_that_have_one(files, sft, reward_type, beam_search, warns):
    flags = rl_flags(files, sft["lora"], "never", reward_type=reward_type, beam_search=beam_search)
    notes = [note for note in rl.read_input(rl.RLFlags(**flags)).notes if "rank" in note]
    assert notes == warns * [
        f"warning: --reward_type {reward_type} penalizes wrong items by rank, but sampled completions have no rank, "
        "only the order they were sampled in; give --beam_search True"
    ]


@pytest.mark.parametrize(
    ("flags", "sids", "named"),
    [
        ({"gspo": True}, [[5, 6], [7]], "--gspo changes nothing: completions are learned once"),
        ({"dapo": True}, [[5, 6], [5, 7]], "--dapo changes nothing: all completions have 3 tokens"),
        ({"dapo": True}, [[5, 6], [7]], ""),
        ({}, [[5, 6], [5, 7]], ""),
    ],
)
def test_a_loss_that_is_the_plain_one_is_named(flags, sids, named):
    lines = rl.without_effect(rl.RLFlags(**flags), Trie(sids, eos_token_id=2))
    assert [line.startswith(named) for line in lines] == [True] * bool(named)


@pytest.mark.parametrize(
    "flags",
    [
        {"reward_type": "rule", "beam_search": False, "dynamic_sampling": True, "gradient_accumulation_steps": 2},
        {"reward_type": "ranking_only", "add_gt": True, "mask_all_zero": True, "dapo": True, "sample_train": True},
        {"reward_type": "semantic", "gspo": True, "sync_ref_model": True, "gradient_checkpointing": True},
        {"reward_type": "sasrec", "beta": 0.0, "temperature": 1.5, "tasks": "all", "train_batch_size": 64},
        {"reward_type": "ranking,prefix", "reward_weights": "1,0.5", "learning_rate": 1e-9},
    ],
)
def test_switches_run(files, sft, tmp_path, flags):
    if flags["reward_type"] == "semantic":
        np.save(tmp_path / "e.npy", np.random.default_rng(0).normal(size=(40, 8)))
        flags = {**flags, "ada_path": tmp_path / "e.npy"}
    if flags["reward_type"] == "sasrec":
        sasrec.save(sasrec.SASRec(read_info(files["info"]), hidden_size=8), str(tmp_path / "cf"))
        flags = {**flags, "cf_path": tmp_path / "cf"}
    metrics, result = run_rl(files, sft["lora"], tmp_path / "run", use_lora=True, **flags)
    assert ("--sync_ref_model changes nothing: the reference" in result.stdout) == ("sync_ref_model" in flags)
    assert metrics["train_prompts"] == {"sample_train": 32, "temperature": 160}.get(
        "sample_train" if "sample_train" in flags else "temperature" if "temperature" in flags else "", 40
    )
    assert all(np.isfinite(entry["loss"]) for entry in metrics["history"] if "loss" in entry)
    if "reward_weights" in flags:
        steps = [entry for entry in metrics["history"] if "reward" in entry]
        names = {f"rewards/{name}/{what}" for name in ("rule", "rank_penalty", "prefix") for what in ("mean", "std")}
        assert all(names <= set(entry) and 0 < entry["rewards/prefix/mean"] < 1 for entry in steps)
        for entry in steps:
            rule, penalty, prefix = (entry[f"rewards/{name}/mean"] for name in ("rule", "rank_penalty", "prefix"))
            assert entry["reward"] == pytest.approx(rule + penalty + 0.5 * prefix, abs=1e-5)


def what_happened(metrics: dict) -> list[tuple]:
    keys = ("loss", "kl", "reward", "grad_norm", "learning_rate", "eval_NDCG@10")
    return [(entry["step"], *(entry.get(key) for key in keys)) for entry in metrics["history"]][:-1]


def test_a_run_that_is_stopped_in_the_middle_of_a_step_continues_exactly(files, sft, tmp_path, monkeypatch):
    flags = {"use_lora": True, "beam_search": False, "gradient_accumulation_steps": 2, "average_weights": True}
    flags |= {"eval_step": 0.4, "save_steps": 0.4, "reward_type": "rule"}
    whole, _ = run_rl(files, sft["lora"], tmp_path / "whole", **flags)
    output, compute, passes = tmp_path / "run", PolicyLoss.of_pass, []

    def stopped(*args, **kwargs):
        passes.append(None)
        if len(passes) == 7:  # the first of two passes of the fourth step
            os.kill(os.getpid(), signal.SIGTERM)
        return compute(*args, **kwargs)

    with monkeypatch.context() as patched:
        patched.setattr(PolicyLoss, "of_pass", stopped)
        done = run_command("rl.py", **rl_flags(files, sft["lora"], output, **flags))
    assert done.returncode == 130 and f"stopped at step 3 of 5 and saved {output}/checkpoint-3;" in done.stderr
    resumed, _ = run_rl(files, sft["lora"], output, **flags, resume_from_checkpoint=True)
    assert what_happened(resumed) == what_happened(whole)


@pytest.mark.slow
def test_a_killed_run_continues_exactly(files, sft, tmp_path):
    """Over an epoch's end, with sampling and a reference that moves."""
    flags = {"use_lora": True, "beam_search": False, "num_train_epochs": 2, "eval_step": 0.1, "save_steps": 0.1}
    flags |= {"sync_ref_model": True, "reward_type": "rule"}
    whole, _ = run_rl(files, sft["lora"], tmp_path / "whole", **flags)
    output = tmp_path / "killed"
    killed = start_command("rl.py", rl_flags(files, sft["lora"], output, **flags))
    killed.wait_for_checkpoint(output)
    killed.kill(signal.SIGKILL)
    assert killed.wait() == [-signal.SIGKILL]
    assert not (output / "final_checkpoint").exists()
    resumed, result = run_rl(files, sft["lora"], output, **flags, resume_from_checkpoint=True)
    assert "resuming from" in result.stdout
    assert what_happened(resumed) == what_happened(whole)
    runs = [load_file(run / "final_checkpoint" / "adapter_model.safetensors") for run in (tmp_path / "whole", output)]
    assert all(torch.equal(tensor, runs[1][name]) for name, tensor in runs[0].items())


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"num_generations": 5}, "--num_generations 5 does not divide --train_batch_size 16"),
        ({"num_generations": 1}, "a group needs 2 completions"),
        ({"reward_type": "nice"}, "--reward_type 'nice': must be one of rule, ranking"),
        ({"reward_type": "rule,nice"}, "--reward_type 'rule,nice': must be one of rule, ranking"),
        ({"reward_type": "rule,rule"}, "--reward_type 'rule,rule': names a reward twice"),
        ({"reward_type": "rule,prefix", "reward_weights": "1"}, "has 1 weights for the 2 rewards"),
        ({"reward_weights": "x"}, "--reward_weights 'x': must be numbers above 0"),
        ({"reward_weights": "0"}, "--reward_weights '0': must be numbers above 0"),
        ({"reward_type": "semantic"}, "needs a file of item embeddings"),
        ({"reward_type": "sasrec", "cf_path": "nowhere"}, "--cf_path nowhere: no SASRec model is there"),
        ({"dapo": True, "gspo": True}, "--dapo and --gspo exclude each other"),
        (
            {"listwise": True, "beam_search": False, "reward_type": "rule"},
            "--listwise weighs beams by their probability",
        ),
        (
            {"listwise": True, "beam_search": True, "add_gt": True, "reward_type": "rule"},
            "--listwise and --add_gt exclude each other",
        ),
        (
            {"listwise": True, "beam_search": True, "gspo": True, "reward_type": "rule"},
            "--dapo and --gspo have no effect",
        ),
        ({"listwise": True, "beam_search": True, "reward_type": "ranking"}, "and ranking may be negative"),
        (
            {
                "listwise": True,
                "beam_search": True,
                "reward_type": "rule",
                "train_batch_size": 8,
                "num_generations": 16,
                "gradient_accumulation_steps": 2,
            },
            "with --listwise a forward pass has whole groups",
        ),
        ({"beta": 0.0, "sync_ref_model": True}, "--sync_ref_model needs a reference"),
        ({"eval_step": 0.2, "save_steps": 0.3}, "must be a multiple of --eval_step"),
        ({"use_lora": True, "use_qlora": True}, "exclude each other"),
        ({"model_path": "./nowhere"}, "--model_path ./nowhere: no such folder"),
        ({"tasks": "sid_to_dream"}, "unknown sid_to_dream"),
        ({"tasks": "sid_to_title"}, "sid_to_title asks for a title; RL rewards items"),
        ({"base_model": "base"}, "--base_model names the base of an adapter checkpoint"),
        ({"num_generations": 48, "train_batch_size": 48}, "has only 39 different SIDs"),
        ({"lora_rr": 8}, "did you mean --lora_r?"),
    ],
)
def test_bad_input_is_refused_at_once(files, base, tmp_path, monkeypatch, flags, message):
    for name in ("load_config", "load_tokenizer", "load_base"):
        monkeypatch.setattr(loading, name, lambda *_, **__: pytest.fail("something was loaded"))
    output = tmp_path / "run"
    result = run_command("rl.py", **rl_flags(files, base, output, **flags))
    assert result.returncode == 2, result.stderr
    assert message in result.stderr and "Traceback" not in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1
    assert not output.exists()


def test_an_info_file_without_the_targets_is_refused(files, base, tmp_path):
    info = tmp_path / "info.json"
    lines = Path(files["info"]).read_text(encoding="utf-8").splitlines()
    info.write_text("\n".join(lines[:20]), encoding="utf-8")
    result = run_command("rl.py", **rl_flags(files, base, tmp_path / "run", info_file=info))
    assert result.returncode == 2
    assert "is not in the index or info file" in result.stderr and "train.csv, line" in result.stderr


def test_a_checkpoint_without_sid_tokens_is_refused(files, base, tmp_path):
    result = run_command("rl.py", **rl_flags(files, base, tmp_path / "run"))
    assert result.returncode == 2
    assert "its tokenizer lacks" in result.stderr and not (tmp_path / "run").exists()


@pytest.mark.slow
def test_two_processes_do_what_one_does(files, sft, tmp_path):
    histories = []
    for processes in (1, 2):
        output = tmp_path / str(processes)
        flags = rl_flags(files, sft["lora"], output, use_lora=True, mask_all_zero=True)
        flags["train_batch_size"] = 16 // processes
        started = start_command("rl.py", flags, ranks=processes)
        assert started.wait() == [0] * processes, started.errors[-3000:]
        histories.append(what_happened(json.loads((output / "metrics.json").read_text())))
    assert len(histories[0]) == len(histories[1])
    for one, two in zip(*histories, strict=True):
        assert [value is None for value in one] == [value is None for value in two]
        pairs = [(a, b) for a, b in zip(one, two, strict=True) if a is not None]
        assert [a for a, _ in pairs] == pytest.approx([b for _, b in pairs], abs=1e-4, rel=1e-3)


def test_the_best_model_is_one_that_was_saved(files, sft, tmp_path):
    """Whatever way the shares round: of 10 steps, an evaluation every 2 and a save every 6, but not every 5."""
    flags = {"use_lora": True, "eval_step": 0.15, "save_steps": 0.45, "learning_rate": 1e-2, "add_gt": True}
    flags["best_by"] = "ndcg"
    metrics, _ = run_rl(files, sft["lora"], tmp_path / "run", **flags)
    evaluated = {entry["step"]: entry["eval_NDCG@10"] for entry in metrics["history"] if "eval_NDCG@10" in entry}
    assert set(evaluated) == {0, 2, 4, 6, 8, 10}
    best = max((0, 6, 10), key=evaluated.get)
    assert metrics["best_checkpoint"] == (f"checkpoint-{best}" if best else "start")
    assert metrics["best_eval_NDCG@10"] == evaluated[best]


def test_a_checkpoint_keeps_its_wording_and_its_cut(files, base, tmp_path):
    wording = {"tasks": {"sid_history_to_sid": {"instruction": "What next?"}}}
    (tmp_path / "prompts.json").write_text(json.dumps(wording))
    flags = {
        "use_lora": True,
        "cutoff_len": 300,
        "tasks": "sid_history_to_sid",
        "prompt_file": tmp_path / "prompts.json",
    }
    succeed("sft.py", **sft_flags(files, base, tmp_path / "sft", sample=20, **flags))
    flags = {"use_lora": True, "tasks": "title_history_to_sid", "category": "", "test_during_training": False}
    run_rl(files, tmp_path / "sft" / "final_checkpoint", tmp_path / "rl", **flags)
    recorded = Checkpoint.read(tmp_path / "rl" / "final_checkpoint").run
    assert recorded["flags"]["cutoff_len"] == 300 and recorded["prompts"]["category"] == "bolts"
    prompts = Checkpoint.read(str(tmp_path / "rl" / "final_checkpoint")).prompts("", None, RECOMMENDATION)
    assert prompts.tasks[RECOMMENDATION].instruction == "What next?"


def test_a_small_catalogue_is_watched_at_a_shorter_cut(files, base, tmp_path):
    index = dict(list(json.loads(Path(files["index"]).read_text()).items())[:7])  # two of them share a SID
    items = json.loads(Path(files["item"]).read_text(encoding="utf-8"))
    small = {name: str(tmp_path / name) for name in ("train", "valid", "index", "item", "info")}
    Path(small["index"]).write_text(json.dumps(index))
    Path(small["item"]).write_text(json.dumps({i: items[i] for i in index}))
    lines = [f"{''.join(tokens)}\t{items[i]['title']}\t{i}\n" for i, tokens in index.items()]
    Path(small["info"]).write_text("".join(lines))
    for split in ("train", "valid"):
        write_csv(Path(small[split]), [[u % 7, (u + 1) % 7, (u + 3) % 7] for u in range(16)], index, items)
    succeed("sft.py", **sft_flags(small, base, tmp_path / "sft", use_lora=True))
    metrics, _ = run_rl(small, tmp_path / "sft" / "final_checkpoint", tmp_path / "rl", use_lora=True)
    assert metrics["best_eval_mean@5"] > 0


def test_sid_rows_alone_are_no_start(files, base, tmp_path):
    succeed("sft.py", **sft_flags(files, base, tmp_path / "sft", freeze_LLM=True))
    start = next((tmp_path / "sft").glob("checkpoint-*"))
    result = run_command("rl.py", **rl_flags(files, start, tmp_path / "rl", use_lora=True))
    assert result.returncode == 2 and "is a checkpoint from the middle of a --freeze_LLM run" in result.stderr


def test_another_run_is_not_continued(files, sft):
    folder = Path(sft["lora"]).parent
    before = sorted(os.listdir(folder))
    result = run_command("rl.py", **rl_flags(files, sft["lora"], folder, use_lora=True, resume_from_checkpoint=True))
    assert result.returncode == 2 and "the command is sft there, rl here" in result.stderr
    assert sorted(os.listdir(folder)) == before


def test_what_differs_from_the_sft_run_is_named(files, sft, tmp_path):
    checkpoint = Checkpoint.read(sft["lora"])
    flags = rl.RLFlags(**rl_flags(files, sft["lora"], str(tmp_path / "rl"), use_qlora=True, lora_r=99))
    start = rl.read_input(flags)
    r = checkpoint.flags["lora_r"]
    assert start.notes[-3:] == [
        f"continuing the adapter of {sft['lora']}",
        "warning: it was trained on an unquantized base, and it continues on a 4-bit base here; expect a small "
        "mismatch",
        f"warning: --lora_r 99 is ignored: {sft['lora']} was trained with {r}",
    ]
    assert start.flags.lora_r == r  # what the run then records
