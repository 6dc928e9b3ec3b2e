"""What the dry runs print: sizes that fit, settings to try, and times."""

import json
import re
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from architectures import configuration
from helpers import refused, rl_flags, run_command, sft_flags, succeed
from models import IDS, config_of, make_model
from peft import LoraConfig, get_peft_model

import lora_utils
from minionerec.dryrun import memory, report
from minionerec.dryrun.memory import Prediction, predict
from minionerec.dryrun.passes import Measured, Step, Work
from minionerec.dryrun.report import smaller_micro_batches, smaller_passes, suggestion
from minionerec.errors import InputError
from minionerec.model.adapters import load_adapter
from minionerec.process_memory import rss_gb
from rl import RLFlags
from sft import SFTFlags

ONE_ROW = {"length": [9], "prompt_length": [7]}
QWEN2 = report.Inputs(config_of("qwen2"), range(96), IDS, None, None, lora_utils.adapt)


@pytest.mark.parametrize("architecture", ["bloom", "mamba", "gpt_neo", "mpt", "lfm2", "qwen3_5_text"])
def test_a_dry_run_of_rl_takes_plain_rows_where_rl_does(architecture, monkeypatch, capsys):
    steps = []
    monkeypatch.setattr(report, "print_flags", lambda flags: None)
    monkeypatch.setattr(report, "print_tasks", lambda *_: None)
    monkeypatch.setattr(report, "predict", lambda *a, **k: steps.append(a[3]) or predict(*a, **k))
    flags = RLFlags(beta=0.0, gpu_memory="12GB", train_batch_size=4, num_generations=2, test_during_training=False)
    inputs = report.Inputs(configuration(architecture), range(96), [], None, None, lora_utils.adapt)
    found = report.rl(flags, inputs, [[1] * 20], 1, 4, shape=None)
    assert steps[0] == Step(4, 24, 16, False, False, rewarded=True) and found.total > 0
    assert "each repeat their prompt" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("architecture", "step"),
    [
        ("qwen2", Step(2, 20 + 3 * 3, 2 + 6 * 3, True, False, rewarded=True)),
        ("bloom", Step(6, 24, 24, False, False, True)),
    ],
)
def test_a_target_to_learn_is_one_more_completion(architecture, step, monkeypatch):
    """4 completions of 2 prompts of 20 tokens, and SIDs of 4."""
    steps = []
    monkeypatch.setattr(report, "print_flags", lambda flags: None)
    monkeypatch.setattr(report, "print_tasks", lambda *_: None)
    monkeypatch.setattr(report, "predict", lambda *a, **k: steps.append(a[3]) or predict(*a, **k))
    flags = RLFlags(gpu_memory="12GB", train_batch_size=4, num_generations=2, sft_weight=1.0)
    inputs = report.Inputs(configuration(architecture), range(96), [], None, None, lora_utils.adapt)
    report.rl(flags, inputs, [[1] * 20], 1, 4, shape=None)
    assert steps[0] == step


def test_a_pass_of_rl_is_as_large_as_the_memory():
    flags = RLFlags(train_batch_size=4, gradient_accumulation_steps=6, num_generations=4, use_lora=True)
    sizes = []
    for completions in (24, 12, 8, 4):  # the next smaller size does not fit in what the one before it needs
        exact = replace(flags, train_batch_size=completions, gradient_accumulation_steps=24 // completions)
        needed = report.predict_rl(exact, QWEN2, 200, 4, False, on_gpu=True).total / (1 - report.SPARE)
        sizes.append(report.largest_pass(flags, QWEN2, 200, 4, False, needed * 1.00001))
    assert sizes == [24, 12, 8, 4]
    assert report.largest_pass(flags, QWEN2, 200, 4, False, 0.0) == 4


def test_passes_of_a_part_of_a_step_come_next_to_gradients(monkeypatch):
    steps = []
    monkeypatch.setattr(report, "predict_rl", lambda flags, *_, **__: steps.append(flags) or SimpleNamespace(total=9.0))
    flags = RLFlags(train_batch_size=4, gradient_accumulation_steps=4, num_generations=4)
    assert report.largest_pass(flags, QWEN2, 200, 4, False, 1.0) == 4
    sized = [(of.train_batch_size, report._rl_step(of, QWEN2.config, 200, 4).accumulate) for of in steps]
    assert sized == [(16, False), (8, True)]


def test_what_cannot_be_predicted_trains_as_its_flags_say(monkeypatch):
    """The message of a dry run would end a run that is none."""

    def refuse(*_: object, **__: object):
        raise InputError("--dry_run True: the memory cannot be predicted")

    monkeypatch.setattr(report, "predict_rl", refuse)
    flags = RLFlags(train_batch_size=4, gradient_accumulation_steps=6, num_generations=4)
    assert report.largest_pass(flags, QWEN2, 200, 4, False, 80.0) == 4
    auto = SFTFlags(batch_size=24, micro_batch_size="auto", pack_rows=0)
    assert report.largest_micro_batch(auto, SimpleNamespace(predict=refuse), ONE_ROW, 80.0) == auto.micro_rows


def parts_of_rl(**flags) -> dict[str, float]:
    continues = flags.pop("continues", False)
    flags = RLFlags(train_batch_size=4, num_generations=2, use_lora=True, **flags)
    return report.predict_rl(flags, QWEN2, 20, 4, continues, on_gpu=True).parts


def test_rl_is_predicted_without_dropout():
    assert parts_of_rl(use_dora=True, lora_dropout=0.5) == parts_of_rl(use_dora=True, lora_dropout=0.0)


def test_a_reference_that_follows_is_a_second_adapter():
    one, off = parts_of_rl()["adapter"], {"sync_ref_model": False, "continues": True}
    two = [parts_of_rl(**way)["adapter"] for way in ({"sync_ref_model": True}, off)]
    assert two == [2 * one, 2 * one] and parts_of_rl(beta=0.0, continues=True)["adapter"] == one


def test_the_logits_of_an_evaluation_count():
    few, many = (parts_of_rl(eval_batch_size=size)["cache"] for size in (20, 200_000))
    assert few == 0 and many > 3 * 4 * 200_000 * 96 / report.GB


def test_a_micro_batch_of_sft_is_as_large_as_the_memory():
    """Of the divisors of the rows of a process."""
    flags, tried = SFTFlags(batch_size=24, micro_batch_size="auto", pack_rows=0), []

    def predict(step: Step, *_: object, **__: object) -> SimpleNamespace:
        tried.append(step.rows)
        return SimpleNamespace(total=float(step.rows))

    room = [rows / (1 - report.SPARE) + 1e-9 for rows in (100, 23, 7, 3, 0.5)]
    found = [report.largest_micro_batch(flags, SimpleNamespace(predict=predict), ONE_ROW, memory) for memory in room]
    assert found == [24, 12, 6, 3, 1] and not set(tried) - {1, 2, 3, 4, 6, 8, 12, 24}
    assert [SFTFlags(batch_size=rows, micro_batch_size="auto").micro_rows for rows in (128, 12, 5)] == [8, 6, 5]


def test_a_dry_run_sizes_the_micro_batch(files, base, tmp_path):
    flags = sft_flags(files, base, tmp_path / "run", batch_size=32, micro_batch_size="auto", use_lora=True)
    done = succeed("sft.py", **flags, dry_run=True, gpu_memory="12GB")
    assert "--micro_batch_size auto: 32 rows" in done.stdout and "fits a GPU with 12GB" in done.stdout
    refused(
        "sft.py", "--micro_batch_size 'most' is not valid; expected a whole number or auto", micro_batch_size="most"
    )
    refused("sft.py", "--micro_batch_size 0: must be above 0", **{**flags, "micro_batch_size": 0})


def test_a_dry_run_of_sft(files, base, tmp_path):
    flags = sft_flags(files, base, tmp_path / "run", use_lora=True, dry_run=True)
    done = succeed("sft.py", **flags, gpu_memory="24GB")
    assert "title_history_to_sid" in done.stdout and "240 examples; 15 steps an epoch" in done.stdout
    assert "fits a GPU with 24GB" in done.stdout and '"lora_r": 16' in done.stdout
    trained = succeed("sft.py", **sft_flags(files, base, tmp_path / "run", use_lora=True, sample=8))
    printed = next(line for line in done.stdout.splitlines() if line.startswith("trainable parameters: "))
    assert trained.stdout.startswith(printed)

    total = float(next(line for line in done.stdout.splitlines() if line.startswith("  total")).split()[1])
    done = run_command("sft.py", **{**flags, "output_dir": tmp_path / "other"}, gpu_memory=f"{total - 0.003}GB")
    assert done.returncode == 0 and not (tmp_path / "other").exists()
    assert "does not fit a GPU" in done.stdout and " s a step" not in done.stdout
    assert "this fits: --micro_batch_size " in done.stdout or "no other setting tried here fits" in done.stdout
    refused("sft.py", "--gpu_memory 'big'", **{**flags, "output_dir": tmp_path / "other"}, gpu_memory="big")


def test_a_dry_run_of_rl(files, base, tmp_path):
    succeed("sft.py", **sft_flags(files, base, tmp_path / "sft", use_lora=True, sample=8, lora_r=8))
    flags = rl_flags(
        files, tmp_path / "sft" / "final_checkpoint", tmp_path / "rl", use_lora=True, dry_run=True, lora_r=4
    )
    done = succeed("rl.py", **flags)
    assert re.search(r"\nsid_history_to_sid +40 +1 ", done.stdout)
    assert "40 prompts of" in done.stdout and "10 steps" in done.stdout and "cache" in done.stdout
    assert "--lora_r 4 is ignored: " in done.stdout and "was trained with 8\n" in done.stdout
    trainable = json.loads((tmp_path / "sft" / "metrics.json").read_text())["trainable_parameters"]
    assert f"trainable parameters: {trainable:,}\n" in done.stdout
    assert not (tmp_path / "rl").exists() and rss_gb() > 0.1


@pytest.mark.parametrize(
    ("settings", "bits"),
    [
        ({"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]}, 16),
        ({"target_modules": r".*\.(up|down)_proj", "use_rslora": True, "lora_alpha": 12.5}, 4),
        ({"target_modules": ["q_proj", "k_proj"], "rank_pattern": {"k_proj": 2}, "use_dora": True}, 16),
    ],
)
def test_the_adapter_that_rl_continues_is_the_one_that_is_predicted(tmp_path, settings, bits):
    """Also where PEFT made it, with other layers or whole matrices."""
    get_peft_model(make_model(), LoraConfig(r=4, task_type="CAUSAL_LM", **settings)).save_pretrained(tmp_path)
    trained, _ = lora_utils.count_parameters(load_adapter(make_model(), str(tmp_path), trainable=True))
    inputs = replace(QWEN2, adapt=partial(lora_utils.adapt, adapter_path=str(tmp_path)))
    flags = RLFlags(use_lora=bits == 16, use_qlora=bits == 4, train_batch_size=4, num_generations=2)
    assert report.predict_rl(flags, inputs, 20, 4, continues=True, on_gpu=True).trainable == trained
    if "modules_to_save" in settings:
        with pytest.raises(InputError, match="it trains all of embed_tokens, lm_head, which a quantized base cannot"):
            report.predict_rl(replace(flags, use_qlora=True), inputs, 20, 4, continues=True, on_gpu=True)


def test_a_search_halves_what_is_left():
    flags = SFTFlags(use_lora=True, gradient_checkpointing=True, micro_batch_size=128)
    for largest in range(1, 128):
        tried = []
        said = suggestion(
            flags,
            "micro_batch_size",
            [128, 64, 32, 16, 8, 4, 2, 1],
            largest,
            lambda changed, tried=tried: tried.append(changed) or changed.micro_batch_size,
        )
        fits = max(2**power for power in range(8) if 2**power <= largest)
        assert said == f"this fits: --micro_batch_size {fits}"
        assert len(tried) <= 4


def test_an_8_bit_base_and_an_8_bit_optimizer_are_tried_too():
    flags = SFTFlags(use_lora=True, micro_batch_size=1)
    tried = []
    said = suggestion(flags, "micro_batch_size", [1], 0.0, lambda changed: tried.append(changed) or 1.0)
    assert said == "no other setting tried here fits: take a smaller model, or a smaller --cutoff_len"
    ways = [(way.bits, way.gradient_checkpointing, way.optim) for way in tried]
    assert ways == [
        *((bits, checkpointing, flags.optim) for bits in (16, 8, 4) for checkpointing in (False, True)),
        (4, True, "adamw_8bit"),
    ]


def test_what_the_other_flags_refuse_is_not_tried():
    tried = []
    flags = SFTFlags(use_lora=True, init_lora_weights="orthogonal", micro_batch_size=1)
    suggestion(flags, "micro_batch_size", [1], 0.0, lambda changed: tried.append(changed) or 1.0)
    assert {way.bits for way in tried} == {16} and len(tried) == 3


def test_rows_are_said_where_auto_would_take_more(monkeypatch, capsys):
    """On a CPU auto takes 16 rows with 4 bits, and 8 without."""
    monkeypatch.setattr(report, "print_flags", lambda flags: None)
    monkeypatch.setattr(report, "print_tasks", lambda *_: report.Tasks(32, 320, 10, 4))
    monkeypatch.setattr(report, "detect_device", lambda _: report.Device("a CPU", 1.0, on_gpu=False))

    def predict(_: object, step: Step, flags: SFTFlags, on_gpu: bool) -> Prediction:
        return Prediction({"weights": step.rows / (8 if flags.use_qlora else 0.5)}, 1, Work(), Work(), Work())

    monkeypatch.setattr(report.Inputs, "predict", predict)
    report.sft(SFTFlags(use_lora=True, micro_batch_size="auto", batch_size=32, pack_rows=0), QWEN2, list)
    printed = capsys.readouterr().out
    assert "this fits: --use_qlora True --use_lora False --micro_batch_size 8\n" in printed


def test_bits_that_an_architecture_refuses_are_not_suggested(monkeypatch):
    """Of Falcon bitsandbytes takes no layer, and DoRA on a CPU no base in 8 bits."""
    monkeypatch.setattr(memory, "run", lambda *_: Measured(0, 0, 0, Work(), Work(), Work()))
    monkeypatch.setattr(report.device, "local_device", lambda: torch.device("cpu"))

    def suggested(architecture: str, on_gpu: bool, **flags) -> list[int]:
        inputs = report.Inputs(configuration(architecture), range(96), IDS, None, None, lora_utils.adapt)
        tried = []

        def total(flags: SFTFlags) -> float:
            inputs.predict(Step(1, 8, 2), flags, on_gpu)
            tried.append(flags.bits)
            return 1.0

        suggestion(SFTFlags(micro_batch_size=1, **flags), "micro_batch_size", [1], 0.0, total)
        return sorted(set(tried))

    assert suggested("falcon", True) == [16]
    assert suggested("qwen2", False, use_lora=True, use_dora=True) == [4, 16]


def test_an_adapter_that_is_suggested_has_the_shape_of_the_checkpoint(monkeypatch):
    monkeypatch.setattr(report, "print_flags", lambda flags: None)
    monkeypatch.setattr(report, "print_tasks", lambda *_: None)
    seen, flags = [], RLFlags(train_batch_size=4, num_generations=2, gpu_memory="0.001GB")
    whole = Prediction({"weights": 1.0}, 1, Work(), Work(), Work())

    def predict_rl(flags: RLFlags, *arguments: object):
        seen.append((flags.method, flags.lora_r, arguments[3]))
        return whole

    monkeypatch.setattr(report, "predict_rl", predict_rl)
    report.rl(flags, QWEN2, [[1] * 20], 1, 4, shape={"lora_r": 64})
    assert set(seen) == {("full", 16, False), ("lora", 64, True), ("qlora", 64, True)}
    seen.clear()
    report.rl(flags, QWEN2, [[1] * 20], 1, 4, shape=None)
    assert set(seen) == {("full", 16, False), ("lora", 16, False), ("qlora", 16, False)}


def test_random_weights_are_not_told_to_take_an_adapter():
    tried = []
    flags = SFTFlags(train_from_scratch=True)
    suggestion(flags, "micro_batch_size", [1], 0.0, lambda changed: tried.append(changed) or 1.0)
    assert {way.method for way in tried} == {"full"} and len(tried) == 3


def test_what_is_suggested_would_be_taken():
    """Micro-batches divide the step, and passes hold whole groups, also where halves do not."""
    assert smaller_micro_batches(SFTFlags(batch_size=30, micro_batch_size=30)) == [30, 15, 10, 6, 5, 3, 2, 1]
    assert smaller_micro_batches(SFTFlags(batch_size=24, micro_batch_size=8)) == [8, 6, 4, 3, 2, 1]
    assert smaller_passes(RLFlags(train_batch_size=24, num_generations=4)) == [24, 12]
    assert smaller_passes(RLFlags(train_batch_size=68, num_generations=4)) == [68, 4]  # not 8
    assert smaller_passes(RLFlags(train_batch_size=8, num_generations=16, gradient_accumulation_steps=2)) == [8]


def test_a_smaller_pass_leaves_the_step_of_rl_as_large():
    flags, tried = RLFlags(use_qlora=True, train_batch_size=24, num_generations=4, gradient_accumulation_steps=2), []

    def total(changed: RLFlags) -> float:
        tried.append(changed.train_batch_size * changed.gradient_accumulation_steps)
        return float(changed.train_batch_size)

    said = suggestion(flags, "train_batch_size", smaller_passes(flags), 12.0, total)
    assert said == "this fits: --train_batch_size 12 --gradient_accumulation_steps 4" and set(tried) == {48}


def test_rl_is_not_told_of_a_flag_that_it_lacks():
    said = suggestion(RLFlags(use_qlora=True), "train_batch_size", [16], 0.0, lambda changed: 1.0)
    assert said == "no other setting tried here fits: take a smaller model"


def test_a_dry_run_estimates_the_time_on_a_card_that_is_named(files, base, sft_run, tmp_path):
    flags = sft_flags(files, base, tmp_path / "run", use_lora=True, dry_run=True)
    done = succeed("sft.py", **flags, gpu="rtx 4090")
    assert "\nfits RTX 4090: " in done.stdout and " of 24.0 GB\n" in done.stdout
    assert "\nestimated for RTX 4090: " in done.stdout and " h in all, without evaluations. Of a step, " in done.stdout
    flags = rl_flags(files, sft_run("lora") / "final_checkpoint", tmp_path / "rl", use_lora=True, dry_run=True)
    done = succeed("rl.py", **flags, gpu="T4")
    assert "\nfits T4: " in done.stdout and "\nestimated for T4: " in done.stdout and " s a step, " in done.stdout
    done = run_command("rl.py", **flags)  # on this machine
    assert done.returncode == 0 and " s a step, " in done.stdout, done.stderr


def test_a_card_is_named_once_and_only_in_a_dry_run(files, base, tmp_path):
    flags = sft_flags(files, base, tmp_path / "run")
    refused("sft.py", "--gpu T4 has no effect without --dry_run True", **flags, gpu="T4")
    both = {"gpu": "T4", "gpu_memory": "12GB", "dry_run": True}
    refused("sft.py", "--gpu T4 includes its memory; drop --gpu_memory 12GB, or --gpu", **flags, **both)
    unknown = {"gpu": "RTX 4091", "dry_run": True}
    refused("sft.py", "--gpu 'RTX 4091': is not in the table of cards; did you mean RTX 4090", **flags, **unknown)
