"""Token trees against the rows one by one: what is merged, values and gradients, runs of the trainer and of sft.py."""

import copy
import json
import re
import shutil
from collections import Counter
from functools import cache
from itertools import combinations, pairwise
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from architectures import build
from datasets import Dataset
from helpers import run_command, sft_flags
from hypothesis import given, settings
from hypothesis import strategies as st
from models import ARCHITECTURES, adapted, make_model
from plain import with_adapter
from processes import assert_same_run, two_processes
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, TrainingArguments

from minionerec.checkpoint import Checkpoint, newest_checkpoint
from minionerec.data.examples import Collator
from minionerec.model import loading, token_trees
from minionerec.model.token_trees import TreeCollator, attend_in_blocks, split
from minionerec.training.row_batches import StepSampler
from minionerec.training.sft_trainer import SFTTrainer, plan_trees, row_losses, step_order, tree_losses
from minionerec.training.tree_batches import Prefixes, Size, TreeBatches
from sft import SFTFlags

model_without_window = cache(make_model)


def examples(count: int, seed: int = 0, most: int = 9) -> list[dict]:
    """Rows over three tokens, many of which begin alike; some twice."""
    generator = np.random.default_rng(seed)
    rows = []
    for _ in range(count):
        ids = generator.integers(1, 4, generator.integers(3, most + 1)).tolist()
        rows.append({"input_ids": ids, "prompt_length": int(generator.integers(1, len(ids))), "length": len(ids)})
    return rows


def of_users(users: int, seed: int = 0) -> list[dict]:
    """Rows of an instruction, a user's history up to some item, and the next item, user by user."""
    generator = np.random.default_rng(seed)
    rows = []
    for user in range(users):
        items = generator.integers(3, 90, (generator.integers(2, 7), 3)).tolist()
        for count in range(1, len(items)):
            prompt = [1, 2, 1, *(token for item in items[:count] for token in item), 2]
            ids = [*prompt, *items[count], 1]
            rows.append({"input_ids": ids, "prompt_length": len(prompt), "length": len(ids), "user": user})
    return rows


def inputs_of(rows: list[dict]) -> list[list[int]]:
    """What the model reads: all but the last token, which is only predicted."""
    return [row["input_ids"][:-1] for row in rows]


def beginnings_of(inputs: list[list[int]]) -> set[tuple[int, ...]]:
    return {tuple(ids[:end]) for ids in inputs for end in range(1, len(ids) + 1)}


# --- What is merged ---------------------------------------------------------------------------------------------------

ids_of_a_row = st.lists(st.integers(1, 3), min_size=2, max_size=9)
batches_of_rows = st.lists(
    st.tuples(ids_of_a_row, st.integers(1, 8)).map(
        lambda row: {"input_ids": row[0], "prompt_length": min(row[1], len(row[0]) - 1)}
    ),
    min_size=1,
    max_size=12,
)


@given(batches_of_rows, st.sampled_from([0.01, 0.1, 1.0]), st.sampled_from([1, 16]))
@settings(max_examples=80, deadline=None)
def test_a_tree_holds_every_beginning_once_and_every_response_token(rows, hidden_size, multiple):
    batch = TreeCollator(0, hidden_size, multiple)(rows)
    assert batch["input_ids"].shape[1] % multiple == 0
    inputs = token_trees.model_inputs(model_without_window(), batch)
    # The beginning that a node stands for: the tokens it sees, in the order of their positions.
    beginnings = []
    names = ("input_ids", "position_ids", "attention_mask")
    for tokens, position, visible in zip(*(inputs[name] for name in names), strict=True):
        of_row = []
        for node, seen in enumerate(visible[0]):
            sees = (seen == 0).nonzero().squeeze(1)
            assert node in sees and position[sees].tolist() == list(range(len(sees)))
            of_row.append(tuple(tokens[sees].tolist()))
        nodes = [beginning for beginning in of_row if beginning != (0,)]  # of padding
        assert len(nodes) == len(set(nodes)) and set(of_row[len(nodes) :]) <= {(0,)}
        beginnings += of_row
    assert set(beginnings) - {(0,)} == beginnings_of(inputs_of(rows))
    if len(batch["input_ids"]) == 1:
        assert len(beginnings) < len(beginnings_of(inputs_of(rows))) + multiple
    elif multiple == 1:  # padding and all, no more than the rows one by one
        assert len(beginnings) <= len(rows) * max(map(len, inputs_of(rows)))
    # Every response token of every row is predicted by what stands before it, and the head runs once for a node.
    expected = Counter(
        (tuple(row["input_ids"][:at]), row["input_ids"][at])
        for row in rows
        for at in range(row["prompt_length"], len(row["input_ids"]))
    )
    predicting, labels = batch["predicting"][batch["predicted_by"]].tolist(), batch["labels"].tolist()
    assert Counter((beginnings[node], label) for node, label in zip(predicting, labels, strict=True)) == expected
    assert batch["predicting"].tolist() == sorted(set(predicting))


def shared(a: list[int], b: list[int]) -> int:
    return next((at for at, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def size_of(rows: list[dict]) -> Size:
    return Size(len(beginnings_of(inputs_of(rows))), sum(len(r["input_ids"]) - r["prompt_length"] for r in rows))


def plan(rows: list[dict], step_rows: int, micro_rows: int, epochs=1, seed=3, pack_rows=16, processes=1, process=0):
    prefixes = Prefixes(Dataset.from_list(rows))
    order = step_order(prefixes, pack_rows, step_rows, seed)
    return TreeBatches(prefixes, order, epochs, micro_rows, step_rows, processes, process)


@given(batches_of_rows, st.integers(1, 5), st.data())
@settings(max_examples=50, deadline=None)
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


@given(batches_of_rows, st.integers(1, 6), st.integers(1, 9), st.integers(1, 9))
@settings(max_examples=50, deadline=None)
def test_a_split_makes_the_largest_part_small(rows, parts, of_nodes, of_responses):
    prefixes = Prefixes(Dataset.from_list(rows))
    order, common = prefixes.sorted(np.arange(len(rows)))
    parts = min(parts, len(rows))
    nodes, responses = prefixes.length[order] - common, prefixes.responses[order]
    cost = np.stack([nodes * of_responses, responses * of_nodes])
    starts = split(cost, np.stack([common * of_responses, 0 * common]), parts).tolist()
    assert len(starts) == parts + 1 and starts[0] == 0 and starts[-1] == len(rows)
    assert all(a < b for a, b in pairwise(starts))

    def measure(start: int, end: int) -> float:
        size = size_of([rows[i] for i in order[start:end]])
        return max(size.nodes / of_nodes, size.responses / of_responses)

    @cache
    def best(start: int, parts: int) -> float:
        if parts == 1:
            return measure(start, len(rows))
        return min(max(measure(start, end), best(end, parts - 1)) for end in range(start + 1, len(rows) - parts + 2))

    assert max(measure(a, b) for a, b in pairwise(starts)) == best(0, parts)


# --- The order of the rows --------------------------------------------------------------------------------------------


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


# --- Values and gradients ---------------------------------------------------------------------------------------------


def gradients(model) -> dict[str, torch.Tensor]:
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return grads


def check(model, rows: list[dict], hidden_size: int | None = 64, tolerance: float = 1e-5) -> None:
    """Loss and gradients of the rows as trees, in one micro-batch and in several, are those of the rows one by one."""
    losses, _ = row_losses(model, Collator(0)(rows))
    losses.sum().backward()
    expected = gradients(model)
    for micro_batches in (1, 3):
        total, labels = 0.0, 0
        for start in range(micro_batches):
            batch = TreeCollator(0, hidden_size)(rows[start::micro_batches])
            of_batch, _ = tree_losses(model, batch)
            of_batch.sum().backward()
            total, labels = total + of_batch.detach().sum(), labels + len(of_batch)
        assert labels == len(losses)
        torch.testing.assert_close(total, losses.detach().sum(), atol=0, rtol=tolerance)
        grads = gradients(model)
        assert grads.keys() == expected.keys()
        for name, grad in expected.items():
            largest = grad.abs().max().item()
            torch.testing.assert_close(grads[name], grad, atol=tolerance * max(1, largest), rtol=tolerance)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("method", ["full", "lora"])
def test_trees_change_nothing(architecture, tied, method):
    model = adapted(architecture, tied, method)
    check(model, of_users(6))
    check(model, examples(20))


def test_several_tensor_rows_and_eager_attention():
    assert len(TreeCollator(0, 0.5)(of_users(12))["input_ids"]) > 3
    check(adapted("qwen2", True, "full"), of_users(12), hidden_size=0.5)
    model = adapted("llama", False, "full")
    model.set_attn_implementation("eager")
    check(model, of_users(6))


@pytest.mark.parametrize("architecture", ["qwen2", "llama", "mistral", "phi3"])
@pytest.mark.parametrize("method", ["full", "lora"])
def test_attention_in_blocks(architecture, method, monkeypatch):
    """The same losses and gradients as rows one by one, though no block sees all nodes; with a window, too."""
    monkeypatch.setattr(token_trees, "BLOCK", 5)
    window = {"sliding_window": 8} if architecture == "mistral" else {}
    model = with_adapter(make_model(architecture, scale=2.0, **window)) if method == "lora" else None
    model = model or make_model(architecture, scale=2.0, **window)
    rows, asked = of_users(12), []
    attend = token_trees.sdpa_attention_forward
    monkeypatch.setattr(
        token_trees, "sdpa_attention_forward", lambda *a, **k: asked.append(a[2].shape[2]) or attend(*a, **k)
    )
    assert attend_in_blocks(model) and asked
    asked.clear()
    check(model, rows, hidden_size=None)
    nodes = len(beginnings_of(inputs_of(rows)))
    assert len(asked) > nodes / 5 and max(asked) < nodes / 4
    # Batches of separate rows attend as before, and what is saved does not name the blocks.
    asked.clear()
    row_losses(model, Collator(0)(rows))
    assert len(asked) == model.config.num_hidden_layers
    assert "token_trees" not in json.dumps(model.config.to_dict())


@pytest.mark.parametrize("key_heads", [1, 3, 6])
@pytest.mark.parametrize("size", [0.3, 3.0, 12.0])
def test_attention_by_matmuls_errs_less_than_torchs(key_heads, size):
    """In values and gradients, for scores of any size, against float64."""
    torch.manual_seed(0)
    nodes = torch.arange(150)
    seen = (nodes <= nodes[:, None]) & (torch.rand(150, 150) > 0.4) | torch.eye(150, dtype=torch.bool)
    mask = torch.zeros(1, 1, 150, 150).masked_fill_(~seen, torch.finfo(torch.bfloat16).min)
    cuts = [(slice(i, i + 40), slice(i + 40)) for i in range(0, 150, 40)]
    blocks = [(nodes[queries], nodes[keys], mask[..., queries, keys].bfloat16()) for queries, keys in cuts]
    shapes = (1, 6, 150, 16), (1, key_heads, 150, 16), (1, key_heads, 150, 8)
    inputs = [torch.randn(shape).bfloat16() for shape in shapes]
    inputs[0] *= size
    gradient = torch.randn(1, 6, 150, 8).bfloat16()

    def results(attend, dtype):
        given = [tensor.detach().to(dtype, copy=True).requires_grad_() for tensor in inputs]
        result = attend(*given)
        return result, *torch.autograd.grad(result, given, gradient.to(dtype))

    def torchs(*given):
        mask_of = mask.to(given[0].dtype)
        return torch.nn.functional.scaled_dot_product_attention(*given, mask_of, scale=0.6, enable_gqa=True)

    exact, other = results(torchs, torch.float64), results(torchs, torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        ours = results(lambda *given: token_trees._MatmulAttention.apply(*given, 0.6, blocks), torch.bfloat16)
    for found, theirs, wanted in zip(ours, other, exact, strict=True):
        assert found.dtype == torch.bfloat16 and found.shape == wanted.shape
        assert (found - wanted).norm() < 1.02 * (theirs - wanted).norm() + 1e-5 * wanted.norm()
        assert (found - wanted).norm() < 5e-3 * wanted.norm()


def test_blocks_attend_by_matmuls_in_16_bits(monkeypatch):
    """The gradients of whole rows in float32, under autocast and in a 16-bit model, as closely as torch's own attention
    gives them, or within 5%."""
    monkeypatch.setattr(token_trees, "BLOCK", 5)
    model, rows = with_adapter(make_model("qwen2", scale=2.0)), of_users(12)
    torchs, torchs_errors = copy.deepcopy(model), {}
    row_losses(model, Collator(0)(rows))[0].sum().backward()
    expected = gradients(model)
    for under_autocast in (True, False):
        if not under_autocast:
            torchs.to(torch.bfloat16)
        with torch.autocast("cpu", torch.bfloat16, enabled=under_autocast):
            tree_losses(torchs, TreeCollator(0, None)(rows), dtype=torch.bfloat16)[0].sum().backward()
        errors = {name: (grad - expected[name]).norm() for name, grad in gradients(torchs).items()}
        torchs_errors[under_autocast] = errors
    assert attend_in_blocks(model)
    monkeypatch.setattr(token_trees, "sdpa_attention_forward", lambda *_, **__: pytest.fail("torch's own attention"))
    for under_autocast in (True, False):
        if not under_autocast:
            model.to(torch.bfloat16)
        with torch.autocast("cpu", torch.bfloat16, enabled=under_autocast):
            tree_losses(model, TreeCollator(0, None)(rows), dtype=torch.bfloat16)[0].sum().backward()
        for name, grad in gradients(model).items():
            most = max(0.05 * expected[name].norm(), torchs_errors[under_autocast][name])
            assert (grad - expected[name]).norm() < most, name


@pytest.mark.parametrize("architecture", ["gpt_oss", "mpt", "two kinds of layers"])
def test_models_whose_attention_takes_no_blocks_keep_their_own(architecture):
    if architecture == "two kinds of layers":
        model = make_model("qwen2")
        model.config.sliding_window, model.config.layer_types = 8, ["sliding_attention", "full_attention"]
    else:
        model = build(architecture)
    before = model.config._attn_implementation
    assert not attend_in_blocks(model)
    assert model.config._attn_implementation == before


def test_blocks_that_do_not_reach_a_layer_are_noticed(monkeypatch):
    model = make_model("qwen2")
    layer = model.model.layers[1]
    forward = layer.forward
    monkeypatch.setattr(layer, "forward", lambda *args, tree_blocks=None, **more: forward(*args, **more))
    assert not attend_in_blocks(model)
    assert model.config._attn_implementation == "sdpa"


def test_a_base_in_4_bits_and_gradient_checkpointing(tmp_path):
    make_model(scale=2.0).save_pretrained(tmp_path)
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32, quantization_config=config)
    assert model.is_loaded_in_4bit
    loading._keep_training_layout(model)
    model, rows = with_adapter(model), of_users(6)
    check(model, rows)
    tree_losses(model, TreeCollator(0, 64)(rows))[0].sum().backward()
    expected = gradients(model)
    model.activation_checkpointing_enable({"use_reentrant": False})
    model.enable_input_require_grads()
    for hidden_size in (64, None):
        assert hidden_size or attend_in_blocks(model)
        tree_losses(model.train(), TreeCollator(0, hidden_size)(rows))[0].sum().backward()
        for name, grad in gradients(model).items():
            torch.testing.assert_close(grad, expected[name], atol=1e-5, rtol=1e-4)


def test_autocast_to_bfloat16():
    model, rows = adapted("qwen2", True, "lora"), of_users(6)
    with torch.autocast("cpu", torch.bfloat16):
        losses, _ = row_losses(model, Collator(0)(rows))
        of_trees, _ = tree_losses(model, TreeCollator(0, 64)(rows), dtype=torch.bfloat16)
    assert of_trees.dtype == torch.float32
    torch.testing.assert_close(of_trees.sum(), losses.sum(), atol=0, rtol=1e-2)


def test_a_batch_without_rows_computes_one_node_and_moves_nothing():
    model = adapted("qwen2", False, "lora")
    losses, row = tree_losses(model, TreeCollator(0, 64)([]))
    losses.sum().backward()
    grads = gradients(model)
    assert len(losses) == len(row) == 0
    assert grads and all(p.requires_grad == (name in grads) for name, p in model.named_parameters())
    assert all((grad == 0).all() for grad in grads.values())


def way_of(model, rows: list[dict]) -> str:
    """What keeps `plan_trees` from merging rows, or nothing."""
    said, dataset = [], Dataset.from_list(rows)
    state = SimpleNamespace(print=said.append, num_processes=1, process_index=0)
    planned = plan_trees(model, dataset, dataset, 16, 16, 4, 1, 3, state)
    assert len(said) == 1 and (planned is None) == said[0].startswith("token trees: off; ")
    return "" if planned else said[0].removeprefix("token trees: off; every row is computed by itself, since ")


@pytest.mark.parametrize(
    ("architecture", "merges"),
    [
        *((architecture, True) for architecture in ("gemma3_text", "gpt_oss", "llama4_text", "mixtral", "cohere2")),
        *((architecture, False) for architecture in ("mpt", "lfm2", "qwen3_5_text")),
    ],
)
def test_windows_experts_and_layers_that_ignore_the_mask(architecture, merges):
    model, rows = build(architecture), of_users(6)
    assert (way_of(model, rows) == "") == merges
    if merges:
        check(model, rows, tolerance=1e-4)


def test_a_window_that_rows_are_longer_than():
    model, rows = make_model("mistral", scale=2.0, sliding_window=8), of_users(6)
    assert way_of(model, rows) == "" and max(row["length"] for row in rows) > 2 * 8
    check(model, rows)


# --- Training ---------------------------------------------------------------------------------------------------------


def trainer_of(folder, rows: list[dict], batches: TreeBatches | None, micro: int, accumulation: int, **more):
    """An SFT trainer on `rows`, in their order where there are no `batches`."""
    return SFTTrainer(
        model=adapted("qwen2", True, "lora"),
        run={},
        data_collator=Collator(0),
        train_batches=batches,
        train_dataset=Dataset.from_list(rows),
        eval_dataset=Dataset.from_list(of_users(5, seed=9)),
        args=TrainingArguments(
            **{
                "output_dir": str(folder),
                "per_device_train_batch_size": micro,
                "per_device_eval_batch_size": 4,
                "gradient_accumulation_steps": accumulation,
                "num_train_epochs": 1,
                "learning_rate": 1e-2,
                "lr_scheduler_type": "constant",
                "optim": "sgd",
                "train_sampling_strategy": "sequential",
                "logging_steps": 1,
                "eval_strategy": "steps",
                "eval_steps": 1,
                "prediction_loss_only": True,
                "report_to": "none",
                "use_cpu": True,
                "remove_unused_columns": False,
                "dataloader_pin_memory": False,
                "save_strategy": "no",
                "disable_tqdm": True,
                "restore_callback_states_from_checkpoint": True,
                **more,
            }
        ),
    )


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
    done = run_command("sft.py", **flags)
    assert done.returncode == 0, done.stderr[-3000:]
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
    done = run_command("sft.py", **one)
    assert done.returncode == 0, done.stderr[-3000:]
    said = re.search(r"^token trees: .*", done.stdout, re.M)[0]
    rows, tokens, nodes = (int(n.replace(",", "")) for n in re.findall(r"[\d,]*\d", said))
    assert rows == 8 and 0 < nodes < 0.8 * tokens
    dry = run_command("sft.py", **{**one, "output_dir": tmp_path / "dry"}, dry_run=True)
    assert dry.returncode == 0 and said in dry.stdout.splitlines(), dry.stderr[-3000:]
    two_processes("torchrun", tmp_path, "sft.py", two)
    assert_same_run(tmp_path / "one", tmp_path / "two", 1e-5)
    # One process finds the place where two of them stopped.
    shutil.rmtree(newest_checkpoint(str(tmp_path / "two")))
    shutil.rmtree(tmp_path / "two" / "final_checkpoint")
    state = json.loads((Path(newest_checkpoint(str(tmp_path / "two"))) / "trainer_state.json").read_text())
    assert 1 < state["epoch"] < 2
    done = run_command("sft.py", **two, resume_from_checkpoint=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert_same_run(tmp_path / "one", tmp_path / "two", 1e-5)


def test_rows_of_a_user_are_a_32nd_of_a_step_unless_a_flag_says_otherwise():
    found = [SFTFlags(batch_size=size).rows_together for size in (16, 32, 63, 64, 128, 512)]
    assert found == [1, 1, 1, 2, 4, 16]
    assert [SFTFlags(pack_rows=rows).rows_together for rows in (0, 1, 7)] == [0, 1, 7]


def test_steps_at_random_give_the_curve_of_the_plain_way(files, base, tmp_path):
    flags = {"use_lora": True, "lora_dropout": 0.0, "learning_rate": 1e-3, "sample": 25, "tasks": "sid_history_to_sid"}
    for name, pack_rows in (("rows", 0), ("trees", 1)):
        done = run_command(
            "sft.py",
            **sft_flags(files, base, tmp_path / name, batch_size=2, micro_batch_size=2, pack_rows=pack_rows, **flags),
        )
        assert done.returncode == 0, done.stderr[-3000:]
        assert ("token trees: off" in done.stdout) == (name == "rows")
    assert_same_run(tmp_path / "rows", tmp_path / "trees", 1e-5)
