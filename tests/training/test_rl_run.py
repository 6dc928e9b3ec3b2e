"""An RL run never ends below its starting model, whose evaluation counts as every other."""

import json
import shutil
import signal
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from helpers import flag_words, newest, rl_flags, run_command, run_rl, succeed, tensors_of
from processes import ENGINES_AND_STARTS, two_processes
from processes import start as start_processes
from rl_trainers import make_trainer
from transformers import AutoModelForCausalLM, AutoTokenizer

import lora_utils
import rl
from minionerec.checkpoint import Checkpoint
from minionerec.decoding import beam_search
from minionerec.training import rl_run

EVERY_2 = {"eval_step": 0.2, "save_steps": 0.2}  # of 10 steps


@pytest.fixture
def scored(monkeypatch):
    """`scored(by_step, stop)`: evaluations find these (HR@10, NDCG@10), and the run is killed at step `stop`."""
    evaluate = rl_run.RLRun.evaluate

    def use(by_step: dict[int, tuple[float, float]], stop: int | None = None) -> None:
        def scripted(trainer, *args, **kwargs):
            step = trainer.state.global_step
            if step == stop:
                raise KeyboardInterrupt
            hr, ndcg = by_step.get(step, (0.1, 0.1))
            found = {"HR@10": hr, "NDCG@10": ndcg, "MRR": ndcg}
            monkeypatch.setattr(rl_run, "ranking_metrics", lambda ranks, length: dict(found))
            return evaluate(trainer, *args, **kwargs)

        monkeypatch.setattr(rl_run.RLRun, "evaluate", scripted)

    return use


def scores(path: Path) -> torch.Tensor:
    """What a checkpoint computes for a few tokens."""
    tokenizer, checkpoint = AutoTokenizer.from_pretrained(path), Checkpoint.read(str(path))
    if checkpoint.adapter is None:
        model = AutoModelForCausalLM.from_pretrained(path)
    else:
        model = lora_utils.load_adapted(checkpoint, tokenizer, checkpoint.base(), None)
    with torch.no_grad():
        return model.eval()(input_ids=torch.arange(3, len(tokenizer)).view(1, -1)).logits


@pytest.mark.parametrize(
    ("start", "flags"),
    [
        ("full", {}),
        ("full", {"use_lora": True}),
        ("lora", {"use_lora": True, "gradient_accumulation_steps": 2, "train_batch_size": 8}),
        ("lora", {"use_lora": True, "sync_ref_model": True}),
        ("qlora", {"use_qlora": True}),
        ("lora", {}),
    ],
)
def test_a_run_that_finds_nothing_better_ends_with_its_start(files, sft_run, tmp_path, scored, start, flags):
    scored({0: (0.4, 0.2), 4: (0.4, 0.2)})  # as good is not better
    sft, run = sft_run(start) / "final_checkpoint", tmp_path / "run"
    metrics, result = run_rl(files, sft, run, **flags, **EVERY_2)
    assert metrics["best_checkpoint"] == "start" and metrics["improved"] is False
    assert metrics["best_eval_mean@10"] == pytest.approx(0.08**0.5)
    assert result.stdout.splitlines()[-1] == (
        "no checkpoint is better than the starting model on the validation file (HR@10 0.4000, NDCG@10 0.2000); "
        "final_checkpoint is the starting model"
    )
    assert {path.name for path in run.glob("checkpoint-*")} == {"checkpoint-0", "checkpoint-10"}
    final, before = tensors_of(run / "final_checkpoint"), tensors_of(sft)
    trained = tensors_of(run / "checkpoint-10")
    if final.keys() == before.keys():
        assert all(torch.equal(final[name], before[name]) for name in before)
        assert not any(torch.equal(final[name], trained[name]) for name in before)
    else:  # a new adapter, or one that was merged
        torch.testing.assert_close(scores(run / "final_checkpoint"), scores(sft), atol=1e-5, rtol=1e-5)
        assert not torch.allclose(scores(run / "checkpoint-10"), scores(sft), atol=1e-3)


@pytest.mark.parametrize(("best_by", "best"), [("ndcg", 6), ("hr", 2), ("mean", 4)])
def test_the_best_is_chosen_by_the_metric_that_was_asked_for(files, sft_run, tmp_path, scored, best_by, best):
    scored({0: (0.5, 0.3), 2: (0.6, 0.2), 4: (0.55, 0.35), 6: (0.4, 0.4)})
    start, run = sft_run("lora") / "final_checkpoint", tmp_path / "run"
    metrics, result = run_rl(files, start, run, use_lora=True, best_by=best_by, **EVERY_2)
    assert metrics["best_checkpoint"] == f"checkpoint-{best}" and metrics["improved"] is True
    assert {path.name for path in run.glob("checkpoint-*")} == {f"checkpoint-{best}", "checkpoint-10"}
    shown = {6: "HR@10 0.5000 -> 0.4000, NDCG@10 0.3000 -> 0.4000"}.get(best, "")
    last = result.stdout.splitlines()[-1]
    assert last.startswith("better than the starting model on the validation file (") and shown in last
    assert last.endswith(f"; final_checkpoint is checkpoint-{best}")
    final, chosen = (tensors_of(run / name) for name in ("final_checkpoint", f"checkpoint-{best}"))
    assert all(torch.equal(final[name], chosen[name]) for name in final)


def test_without_evaluations_the_last_model_is_final(files, sft_run, tmp_path):
    run = tmp_path / "run"
    metrics, result = run_rl(
        files, sft_run("lora") / "final_checkpoint", run, use_lora=True, test_during_training=False, **EVERY_2
    )
    assert metrics["best_checkpoint"] is None and "improved" not in metrics
    assert {path.name for path in run.glob("checkpoint-*")} == {"checkpoint-8", "checkpoint-10"}
    assert result.stdout.splitlines()[-1] == f"saved {run}/final_checkpoint"
    final, last = tensors_of(run / "final_checkpoint"), tensors_of(run / "checkpoint-10")
    assert all(torch.equal(final[name], last[name]) for name in final)


GOOD, BETTER = (0.4, 0.2), (0.5, 0.3)


@pytest.mark.parametrize(
    ("by_step", "stop", "best"),
    [
        ({0: GOOD}, 2, "start"),  # starts anew
        ({0: GOOD}, 8, "start"),
        ({0: GOOD, 8: BETTER}, 6, "checkpoint-8"),
        ({0: GOOD, 4: BETTER}, 8, "checkpoint-4"),
    ],
)
def test_a_killed_run_ends_as_the_whole_one(files, sft_run, tmp_path, scored, by_step, stop, best):
    start = sft_run("lora") / "final_checkpoint"
    flags = {"use_lora": True, "beam_search": False, "gradient_accumulation_steps": 2, "train_batch_size": 8, **EVERY_2}
    scored(by_step)
    whole, _ = run_rl(files, start, tmp_path / "whole", **flags)
    scored(by_step, stop)
    killed = run_command("rl.py", **rl_flags(files, start, tmp_path / "killed", **flags))
    assert killed.returncode == 130 and newest(tmp_path / "killed").name == f"checkpoint-{stop - 2}"
    shutil.move(tmp_path / "killed", tmp_path / "moved")
    scored(by_step)
    resumed, result = run_rl(files, start, tmp_path / "moved", **flags, resume_from_checkpoint=True)
    assert whole["best_checkpoint"] == resumed["best_checkpoint"] == best
    assert resumed["improved"] is (best != "start") and "no longer exists" not in result.stdout
    for key in ("loss", "kl", "reward", "eval_mean@10"):
        curves = [[(e["step"], e[key]) for e in run["history"] if key in e] for run in (whole, resumed)]
        assert curves[0] == curves[1], key
    final, expected = (tensors_of(tmp_path / run / "final_checkpoint") for run in ("moved", "whole"))
    assert all(torch.equal(final[name], expected[name]) for name in expected)


def test_a_start_that_is_gone_is_not_promised(files, sft_run, tmp_path, scored):
    flags = rl_flags(files, sft_run("lora") / "final_checkpoint", tmp_path / "run", use_lora=True, **EVERY_2)
    scored({0: GOOD}, 6)
    assert run_command("rl.py", **flags).returncode == 130
    shutil.rmtree(tmp_path / "run" / "checkpoint-0")
    scored({0: GOOD})
    resumed = run_command("rl.py", **flags, resume_from_checkpoint=True)
    assert "checkpoint-0, no longer exists" in resumed.stdout
    assert resumed.stdout.splitlines()[-1].endswith(
        "(HR@10 0.4000, NDCG@10 0.2000); final_checkpoint is the last model"
    )


@pytest.mark.parametrize(
    ("start", "average", "finished"), [("lora", False, False), ("lora", True, True), ("full", True, False)]
)
def test_a_run_resumed_without_evaluations_ends_with_its_last_model(
    files, sft_run, tmp_path, scored, start, average, finished
):
    """The best model from before is not final, and metrics.json does not name it."""
    flags = {"use_lora": start == "lora", "average_weights": average, **EVERY_2}
    flags = rl_flags(files, sft_run(start) / "final_checkpoint", tmp_path / "run", **flags)
    scored({0: GOOD, 4: BETTER}, None if finished else 8)
    assert run_command("rl.py", **flags).returncode == (0 if finished else 130)
    scored({})
    flags |= {"resume_from_checkpoint": True, "test_during_training": False}
    resumed = succeed("rl.py", **flags)
    assert ("checkpoint-10 is at step 10 of 10; it becomes final_checkpoint" in resumed.stdout) == finished
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert metrics["best_checkpoint"] is None and metrics["best_eval_mean@10"] is None and "improved" not in metrics
    final, last = (tensors_of(tmp_path / "run" / name) for name in ("final_checkpoint", "checkpoint-10"))
    assert all(torch.equal(final[name], last[name]) for name in final)
    # With evaluations again, the best one is still there.
    assert run_command("rl.py", **flags | {"test_during_training": True}).returncode == 0
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert metrics["best_checkpoint"] == "checkpoint-4" and metrics["best_eval_mean@10"] == pytest.approx(0.15**0.5)


@pytest.mark.slow
@pytest.mark.parametrize(("engine", "start"), ENGINES_AND_STARTS)
def test_the_start_is_kept_by_several_processes(files, sft_run, tmp_path, engine, start):
    """Killed and resumed."""
    sft, run = sft_run(start) / "final_checkpoint", tmp_path / "run"
    flags = rl_flags(files, sft, run, use_lora=start == "lora", train_batch_size=8, **EVERY_2)
    killed = start_processes("finds_less", tmp_path, "rl.py", *flag_words(flags), ranks=2, engine=engine)
    killed.wait_for_checkpoint(run)
    killed.kill(signal.SIGKILL)
    killed.wait()
    two_processes(engine, tmp_path, "rl.py", {**flags, "resume_from_checkpoint": True}, "finds_less")
    metrics = json.loads((run / "metrics.json").read_text())
    assert metrics["best_checkpoint"] == "start" and metrics["improved"] is False
    final, before = tensors_of(run / "final_checkpoint"), tensors_of(sft)
    trained = tensors_of(run / "checkpoint-10")
    assert all(torch.equal(final[name], before[name]) for name in before)
    assert not any(torch.equal(trained[name], before[name]) for name in before)


def test_evaluation_ranks_the_validation_prompts(sft, tmp_path):
    trainer = make_trainer(sft, "new LoRA", tmp_path, rows=5)
    metrics = trainer.evaluate()
    names = {f"eval_{metric}@{k}" for metric in ("HR", "NDCG") for k in (1, 3, 5, 10)} | {"eval_MRR", "eval_mean@10"}
    assert set(metrics) == names
    # Against targets that are each prompt's own best item.
    best = []
    for prompt in trainer.eval_dataset["prompt"]:
        ids = torch.tensor([prompt])
        rows, _ = beam_search.constrained_beam_search(trainer.model, ids, torch.ones_like(ids), trainer.trie, 10)
        best.append(trainer.sids[trainer.trie.source[rows[0, 0]]])
    dataset = Dataset.from_dict({"prompt": list(trainer.eval_dataset["prompt"]), "target": best})
    assert set(trainer.evaluate(dataset).values()) == {1.0}


def test_a_model_is_saved_where_one_was_evaluated(tmp_path):
    """Rounded up, a save may come after the last evaluation: then the starting model would always be the best."""
    flags = rl.RLFlags(output_dir=str(tmp_path), eval_step=0.1, save_steps=0.9)
    for steps in (1, 2, 35, 71, 100):
        settings = rl.grpo_config(flags, steps, 4, "mean@10", [1.0], resumes=False)
        assert settings.save_steps <= steps and settings.save_steps % settings.eval_steps == 0
