"""The rows of steps as token trees: counts, order and shares, and runs against those on separate rows."""

import json
import re
import shutil
from collections import Counter
from itertools import combinations, pairwise

import models
import numpy as np
import pytest
import torch
from datasets import Dataset
from helpers import cut_short, run_command, sft_flags, succeed
from hypothesis import given
from hypothesis import strategies as st
from processes import assert_same_run, two_processes
from trees import batches_of_rows, examples, inputs_of, of_users, size_of

from minionerec.checkpoint import Checkpoint
from minionerec.training.row_batches import StepSampler
from minionerec.training.sft_trainer import SFTTrainer, step_order
from minionerec.training.tree_batches import Prefixes, Size, TreeBatches
from sft import SFTFlags


def shared(a: list[int], b: list[int]) -> int:
    return next((at for at, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def plan(rows: list[dict], step_rows: int, micro_rows: int, epochs=1, seed=3, pack_rows=16, processes=1, process=0):
    prefixes = Prefixes(Dataset.from_list(rows))
    order = step_order(prefixes, pack_rows, step_rows, seed)
    return TreeBatches(prefixes, order, epochs, micro_rows, step_rows, processes, process)


@given(batches_of_rows, st.integers(1, 5), st.data())
def test_nodes_are_counted_without_their_tokens(rows, step_rows, data):
    inputs = inputs_of(rows)
    prefixes = Prefixes(Dataset.from_list(rows))
    chosen = data.draw(st.lists(st.sampled_from(range(len(rows))), unique=True))
    assert prefixes.size(np.array(chosen, dtype=int)) == size_of([rows[i] for i in chosen])
    order, common = prefixes.sorted(np.array(chosen, dtype=int))
    assert sorted(order) == sorted(chosen)
    assert common.tolist() == [0, *(shared(inputs[a], inputs[b]) for a, b in pairwise(order))][: len(chosen)]
    # As many parts as keep the largest one of any step within a size.
    sizes = [size_of([row]) for row in rows]
    most = Size(*(data.draw(st.integers(max(of_rows), 25)) for of_rows in zip(*sizes, strict=True)))
    order = data.draw(st.permutations(range(len(rows))))
    needed = 0
    for start in range(0, len(rows), step_rows):
        of_step = prefixes.sorted(np.array(order[start : start + step_rows]))[0].tolist()
        fits = [
            parts
            for parts in range(1, len(of_step) + 1)
            for ends in combinations(range(1, len(of_step)), parts - 1)
            if all(
                nodes <= most.nodes and responses <= most.responses
                for a, b in pairwise([0, *ends, len(of_step)])
                for nodes, responses in [size_of([rows[i] for i in of_step[a:b]])]
            )
        ]
        needed = max(needed, min(fits))
    assert prefixes.parts_needed(np.array(order), step_rows, most) == needed


def steps_of(batches: TreeBatches, epoch: int = 0) -> list[list[int]]:
    batches.set_epoch(epoch)
    return [np.concatenate(parts).tolist() for parts in batches.steps()]


def test_a_user_stays_together_in_an_order_that_is_another_one_every_epoch():
    rows = of_users(40)
    batches = plan(rows, 16, 4, epochs=3, seed=5)
    for epoch in range(2):
        steps = steps_of(batches, epoch)
        assert sorted(row for step in steps for row in step) == list(range(len(rows)))
        assert [len(step) for step in steps[:-1]] == [16] * (len(rows) // 16)
        # A user's rows are in two steps only where the first ends among them.
        met = [{rows[row]["user"] for row in step} for step in steps]
        assert sum(map(len, met)) <= 40 + len(steps) - 1
    assert steps_of(batches, 0) == steps_of(batches, 0) != steps_of(batches, 1)
    assert steps_of(plan(rows, 16, 4, seed=6)) != steps_of(batches)


def test_large_groups_are_cut():
    rows = [[1, 2, 3, 4, 5, 6, 7, 8 + i // 40, i] for i in range(80)]  # two users, as it were
    prefixes = Prefixes(Dataset.from_list([{"input_ids": ids, "prompt_length": 8} for ids in rows]))
    assert sorted(Counter(prefixes.groups(8, 16).tolist()).values()) == [1] * 80  # shared in any step of 8 rows
    assert sorted(Counter(prefixes.groups(60, 16).tolist()).values()) == [8, 8, 16, 16, 16, 16]
    assert len(prefixes.groups(1, 16)) == 80
    assert Prefixes(Dataset.from_list(of_users(1)[:1])).groups(5, 16).tolist() == [0]


def test_one_row_of_a_user_makes_the_steps_of_the_plain_way():
    rows = of_users(40)
    batches = plan(rows, 16, 4, epochs=2, seed=5, pack_rows=1)
    for epoch in range(2):
        sampler = StepSampler([row["length"] for row in rows], 16, seed=5)
        sampler.set_epoch(epoch)
        order = list(sampler)
        expected = [set(order[start : start + 16]) for start in range(0, len(rows), 16)]
        assert list(map(set, steps_of(batches, epoch))) == expected


@pytest.mark.parametrize("make", [of_users, examples])
@pytest.mark.parametrize(("step_rows", "micro_rows"), [(24, 1), (24, 2), (24, 6), (24, 12)])
def test_processes_share_a_step_equally(make, step_rows, micro_rows):
    rows = make(41)
    longest = Size(*map(max, zip(*(size_of([row]) for row in rows), strict=True)))
    alone = plan(rows, step_rows, micro_rows, 2, 5)
    for processes in (1, 2):
        sizes = step_rows, micro_rows, 2, 5, 16, processes
        plans = [plan(rows, *sizes, rank) for rank in range(processes)]
        accumulation = plans[0].accumulation
        assert accumulation <= step_rows // (micro_rows * processes)
        for epoch in range(2):
            for of_process in plans:
                of_process.set_epoch(epoch)
            batches = [list(of_process) for of_process in plans]
            assert {len(of_process) for of_process in batches} == {len(plans[0])}
            assert len(plans[0]) == accumulation * -(-len(rows) // step_rows)
            for number, step in enumerate(steps_of(alone, epoch)):
                parts = [b for of_process in batches for b in of_process[number * accumulation :][:accumulation]]
                assert Counter(row for part in parts for row in part) == Counter(step)
                sizes = [size_of([rows[row] for row in part]) for part in parts]
                for of_parts, of_row in zip(zip(*sizes, strict=True), longest, strict=True):
                    assert max(of_parts) <= micro_rows * of_row
                most = plans[0].most
                filled = [max(size.nodes / most.nodes, size.responses / most.responses) * micro_rows for size in sizes]
                if len(step) == step_rows:
                    assert max(filled) - min(filled) <= 2


def trainer_of(folder, rows: list[dict], trees: TreeBatches | None, micro: int, accumulation: int, **more):
    """An SFT trainer on `rows`, in their order where there are no `trees`."""
    epoch = {"output_dir": str(folder), "max_steps": -1, "num_train_epochs": 1, "max_grad_norm": 1.0}
    epoch |= {"gradient_accumulation_steps": accumulation, "per_device_eval_batch_size": 4}
    epoch |= {"eval_strategy": "steps", "eval_steps": 1, "prediction_loss_only": True}
    epoch |= {"restore_callback_states_from_checkpoint": True, **more}
    return models.trainer_of(folder, micro, rows=rows, trees=trees, eval_rows=of_users(5, seed=9), **epoch)


def curve_and_weights(trainer: SFTTrainer, resume: str | None = None):
    trainer.train(Checkpoint(resume) if resume else None)
    keys = ("loss", "grad_norm", "eval_loss")
    curve = [entry[key] for entry in trainer.state.log_history for key in keys if key in entry]
    return curve, {name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}


def test_a_run_on_trees_is_the_run_on_rows(tmp_path):
    rows = of_users(9)[:-1]
    step_rows = 16
    assert len(rows) % step_rows  # the last step is shorter
    order = [row for step in steps_of(plan(rows, step_rows, 1)) for row in step]
    curve, weights = curve_and_weights(trainer_of(tmp_path / "rows", [rows[i] for i in order], None, 4, 4))
    assert len(curve) == 3 * -(-len(rows) // step_rows)
    accumulations = []
    for micro in (1, 16):
        batches = plan(rows, step_rows, micro)
        accumulations.append(batches.accumulation)
        found = curve_and_weights(trainer_of(tmp_path / str(micro), rows, batches, micro, batches.accumulation))
        assert found[0] == pytest.approx(curve, rel=1e-4)
        for name, weight in weights.items():
            torch.testing.assert_close(found[1][name], weight, atol=1e-6, rtol=1e-4)
    assert accumulations == sorted(set(accumulations), reverse=True)


def test_a_run_on_trees_continues_exactly_in_its_second_epoch(tmp_path):
    rows = of_users(9)
    settings = {
        "num_train_epochs": 3,
        "eval_steps": 2,
        "save_strategy": "steps",
        "save_steps": 1,
        "optim": "adamw_torch",
    }

    def trainer():
        batches = plan(rows, 16, 2, 3)
        return trainer_of(tmp_path / "run", rows, batches, 2, batches.accumulation, **settings)

    curve, weights = curve_and_weights(trainer())
    steps = -(-len(rows) // 16)
    shutil.rmtree(tmp_path / "run" / f"checkpoint-{3 * steps}")
    for kept in (steps + 1, 2 * steps):  # within the second epoch, and at its end
        again, resumed = curve_and_weights(trainer(), str(tmp_path / "run" / f"checkpoint-{kept}"))
        assert again == curve
        assert all(torch.equal(weight, resumed[name]) for name, weight in weights.items())


def test_layers_that_ignore_the_mask_get_rows_one_by_one(files, checkpoint_of, tmp_path):
    lfm2 = checkpoint_of("lfm2", num_key_value_heads=2, block_ff_dim=64, layer_types=["conv", "full_attention"])
    flags = sft_flags(files, lfm2, tmp_path / "run", sample=8, tasks="sid_history_to_sid")
    done = succeed("sft.py", **flags)
    way = [line for line in done.stdout.splitlines() if line.startswith("token trees: ")]
    assert way == ["token trees: off; every row is computed by itself, since conv layers ignore a tree mask"]
    dry = run_command("sft.py", **{**flags, "output_dir": tmp_path / "dry"}, dry_run=True)
    assert dry.returncode == 0 and "token trees: off; " in dry.stdout, dry.stderr[-3000:]


@pytest.mark.slow
def test_two_processes_train_as_one_which_goes_on_in_the_second_epoch(files, base, tmp_path):
    flags = {"use_lora": True, "lora_dropout": 0.0, "learning_rate": 1e-3, "num_epochs": 2}
    # 42 examples: the last step of an epoch has 2, for 2 micro-batches on each process.
    flags |= {"tasks": "sid_history_to_sid,title_to_sid", "sample": 21, "batch_size": 8, "micro_batch_size": 2}
    flags |= {"pack_rows": 4}
    one, two = (sft_flags(files, base, tmp_path / name, **flags) for name in ("one", "two"))
    done = succeed("sft.py", **one)
    said = re.search(r"^token trees: .*", done.stdout, re.M)[0]
    rows, tokens, nodes = (int(n.replace(",", "")) for n in re.findall(r"[\d,]*\d", said))
    assert rows == 8 and 0 < nodes < 0.8 * tokens
    dry = run_command("sft.py", **{**one, "output_dir": tmp_path / "dry"}, dry_run=True)
    assert dry.returncode == 0 and said in dry.stdout.splitlines(), dry.stderr[-3000:]
    two_processes("torchrun", tmp_path, "sft.py", two)
    assert_same_run(tmp_path / "one", tmp_path / "two", 1e-5)
    # One process finds the place where two of them stopped.
    state = json.loads((cut_short(tmp_path / "two") / "trainer_state.json").read_text())
    assert 1 < state["epoch"] < 2
    succeed("sft.py", **two, resume_from_checkpoint=True)
    assert_same_run(tmp_path / "one", tmp_path / "two", 1e-5)


def test_rows_of_a_user_are_a_32nd_of_a_step_unless_a_flag_says_otherwise():
    found = [SFTFlags(batch_size=size).rows_together for size in (16, 32, 63, 64, 128, 512)]
    assert found == [1, 1, 1, 2, 4, 16]
    assert [SFTFlags(pack_rows=rows).rows_together for rows in (0, 1, 7)] == [0, 1, 7]


def test_steps_at_random_give_the_curve_of_the_plain_way(files, base, tmp_path):
    flags = {"use_lora": True, "lora_dropout": 0.0, "learning_rate": 1e-3, "sample": 25, "tasks": "sid_history_to_sid"}
    for name, pack_rows in (("rows", 0), ("trees", 1)):
        done = succeed(
            "sft.py",
            **sft_flags(files, base, tmp_path / name, batch_size=2, micro_batch_size=2, pack_rows=pack_rows, **flags),
        )
        assert ("token trees: off" in done.stdout) == (name == "rows")
    assert_same_run(tmp_path / "rows", tmp_path / "trees", 1e-5)
