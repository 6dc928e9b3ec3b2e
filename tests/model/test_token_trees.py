"""Token trees against the rows one by one: what is merged, values and gradients."""

import copy
import json
from collections import Counter
from functools import cache
from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from architectures import build
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st
from models import ARCHITECTURES, adapted, make_model
from plain import with_adapter
from transformers import AutoModelForCausalLM, BitsAndBytesConfig
from trees import batches_of_rows, beginnings_of, examples, inputs_of, of_users, size_of

from minionerec.data.examples import Collator
from minionerec.model import loading, token_trees
from minionerec.model.token_trees import TreeCollator, attend_in_blocks, split
from minionerec.training.sft_trainer import plan_trees, row_losses, tree_losses
from minionerec.training.tree_batches import Prefixes

model_without_window = cache(make_model)


# --- What is merged ---------------------------------------------------------------------------------------------------


@given(batches_of_rows, st.sampled_from([0.01, 0.1, 1.0]), st.sampled_from([1, 16]))
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


@given(batches_of_rows, st.integers(1, 6), st.integers(1, 9), st.integers(1, 9))
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


def test_rows_of_one_token_predict_nothing():
    rows = [{"input_ids": [5], "prompt_length": 1}] * 2
    assert TreeCollator(0, 64)(rows)["input_ids"].shape == (1, 1)


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
