"""Warnings soon after the start of a run that cannot learn."""

from types import SimpleNamespace

import pytest
from helpers import run_rl
from transformers import TrainerControl, TrainerState

from minionerec.training import rewards
from minionerec.training.early_warning import EarlyWarning


def said(
    capsys, entries: list[dict], steps: int, names=("rule", "rank_penalty"), ends=False, first=True, **about_loss: bool
) -> list[str]:
    """What is said about a run of `steps` steps with these entries of the log, one a step."""
    args = SimpleNamespace(num_generations=8, learning_rate=1e-3, beta=0.01)
    state = TrainerState(max_steps=steps, is_world_process_zero=first)
    watch = EarlyWarning(names, **{"ranks": True, "supervised": False, **about_loss})
    for step, entry in enumerate(entries, 1):
        state.global_step = step
        state.log_history.append({"step": step, **entry})
        watch.on_log(args, state, TrainerControl())
    if ends:
        watch.on_train_end(args, state, TrainerControl())
    return capsys.readouterr().err.splitlines()


def idle(*fractions: float) -> list[dict]:
    return [{"frac_reward_zero_std": fraction} for fraction in fractions]


@pytest.mark.parametrize(("steps", "due"), [(2, 2), (20, 3), (100, 5), (1000, 10), (100_000, 10)])
def test_idle_groups_are_judged_in_time_and_once(capsys, steps, due):
    (line,) = said(capsys, idle(*[0.7] * 20), steps)
    assert line == (
        f"warning: 70% of the groups up to step {due} teach nothing, because their completions have equal rewards. "
        "Add a dense reward, such as --reward_type ranking,prefix, or try a --num_generations above 8"
    )
    assert not said(capsys, idle(*[0.7] * (due - 1)), steps)
    assert not said(capsys, [*idle(*[0.4] * due), *idle(*[0.9] * 20)], steps)


def test_a_dense_reward_is_not_told_to_be_dense(capsys):
    (line,) = said(capsys, idle(*[0.7] * 3), 20, names=("rule", "rank_penalty", "prefix"))
    assert line.endswith("have equal rewards. Try a --num_generations above 8")


def test_a_penalty_by_rank_is_not_suggested_where_nothing_has_a_rank(capsys):
    (line,) = said(capsys, idle(*[0.7] * 3), 20, names=("rule",), ranks=False)
    assert "Add a dense reward, such as --reward_type rule,prefix, or try" in line


def test_idle_groups_that_learn_their_targets_are_no_waste(capsys):
    assert not said(capsys, idle(*[0.9] * 20), 20, supervised=True)


def test_a_policy_that_runs_away_is_named_once(capsys):
    (line,) = said(capsys, [{"kl": 0.0}, {"kl": 0.5}, {"kl": 1.5}, {"kl": 3.0}], 40)
    assert line == (
        "warning: the policy is far from its start at step 3 of 40: KL is 1.5 nats per token. A --learning_rate below "
        "0.001 helps, or a --beta above 0.01"
    )
    assert not said(capsys, [{"kl": 0.2}] * 4 + [{"kl": 3.0}], 40)  # far from the start late may be progress
    assert not said(capsys, [{"eval_MRR": 0.5}, {"loss": 1.0}, {"kl": None}], 40)  # None: no group had a signal


def test_a_run_without_any_signal_does_not_end_without_a_word(capsys):
    lines = said(capsys, idle(*[1.0] * 20), 20, ends=True)
    assert not said(capsys, [*idle(*[1.0] * 20), {"kl": 9.0}], 20, ends=True, first=False)  # another process does
    assert len(lines) == 2 and lines[1].startswith("warning: no group had completions with different rewards: nothing")
    assert "learned from rewards. " in lines[1]  # from targets, with --sft_weight, maybe
    assert len(said(capsys, idle(*[1.0] * 19, 0.98), 20, ends=True)) == 1


@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_run_says_that_nothing_can_be_learned(files, sft_run, tmp_path, monkeypatch, accumulation):
    monkeypatch.setattr(rewards, "rule", lambda sids, targets: [0.0] * len(sids))
    flags = {"use_lora": True, "reward_type": "rule", "mask_all_zero": True, "test_during_training": False}
    flags |= {"gradient_accumulation_steps": accumulation, "train_batch_size": 16 // accumulation}
    _, result = run_rl(files, sft_run("lora") / "final_checkpoint", tmp_path / "run", **flags)
    lines = [line for line in result.stderr.splitlines() if line.startswith("warning: ")]
    assert [line.split(",")[0].split(":")[1] for line in lines] == [
        " 100% of the groups up to step 3 teach nothing",
        " no group had completions with different rewards",
    ]
