"""Every part of a model of ours takes tensors without rows, forward and backward: the last step of an epoch may have
micro-batches without any."""

import pytest
import torch
from architectures import build
from models import IDS, adapted, examples
from torch import nn

import lora_utils
from minionerec.data.examples import Collator
from minionerec.flags import AdapterFlags
from minionerec.model import head, int8_rows, token_trees
from minionerec.model.experts import LeanParameter
from minionerec.model.low_rank import _LowRankUpdate
from minionerec.training.sft_trainer import row_losses

SHAPES = [(0, 8), (2, 0, 8), (0, 3, 8)]
WEIGHT = torch.randn(10, 8)


def check(function, *shape: int, dtype=torch.float32):
    """The result has no rows, and the input gets a gradient of its shape."""
    x = torch.zeros(shape, dtype=dtype, requires_grad=True)
    result = function(x)
    assert result.shape[:-1] == x.shape[:-1]
    result.sum().backward()
    assert x.grad.shape == x.shape and x.grad.dtype == dtype


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_matmuls_without_rows(shape, dtype):
    packed = int8_rows.pack(WEIGHT)
    check(lambda x: int8_rows._Int8Linear.apply(x, packed), *shape, dtype=dtype)
    check(lambda x: head.float32_linear(x, WEIGHT.to(dtype)), *shape, dtype=dtype)
    a, b = torch.randn(2, 8, requires_grad=True), torch.randn(10, 2, requires_grad=True)
    for dropout in (0.0, 0.5):
        for matmul in ((WEIGHT.to(dtype), None), ()):

            def updated(x, dropout=dropout, matmul=matmul):
                base = None if matmul else nn.functional.linear(x, WEIGHT.to(dtype))
                return _LowRankUpdate.apply(base, x, a, b, 2.0, dropout, 0, dtype, *matmul)

            check(updated, *shape, dtype=dtype)
    assert not a.grad.any() and not b.grad.any()


def test_rows_in_8_bits_without_rows():
    packed = int8_rows.pack(WEIGHT)
    assert int8_rows.unpack(packed[torch.zeros(2, 0, dtype=torch.long)], torch.bfloat16).shape == (2, 0, 8)
    assert int8_rows.pack(WEIGHT[:0]).shape == (0, 12)


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss", "llama4_text"])
def test_experts_without_tokens(name):
    model = build(name)
    model = lora_utils.add_lora(model, lora_utils.lora_config(model, IDS, AdapterFlags(lora_r=4)))
    wrapped = [module for module in model.modules() if isinstance(module, LeanParameter)]
    routing = () if name == "llama4_text" else (torch.zeros(0, 2, dtype=torch.long), torch.zeros(0, 2))
    check(lambda x: wrapped[0](x, *routing), 0, 64)  # around the others


@pytest.mark.parametrize("tied", [True, False])
def test_sid_rows_without_tokens(tied):
    model = adapted("qwen2", tied, "lora")
    check(model.get_output_embeddings(), 0, 64)
    found = model.get_input_embeddings()(torch.zeros(2, 0, dtype=torch.long))
    found.sum().backward()
    assert found.shape == (2, 0, 64)


def test_losses_without_response_tokens():
    none = torch.zeros(0, dtype=torch.long)
    for logits in (torch.zeros(0, 10, requires_grad=True), torch.zeros(3, 10, requires_grad=True)):
        token_trees.edge_losses(logits * 1.0, none, none).sum().backward()
        assert not logits.grad.any()
    model, batch = adapted("qwen2", True, "lora"), Collator(0)([])
    assert batch["input_ids"].shape == batch["labels"].shape == (1, 2)
    losses, row = row_losses(model, batch)
    losses.sum().backward()
    assert losses.shape == row.shape == (0,)
    assert all(p.grad is not None and not p.grad.any() for p in model.parameters() if p.requires_grad)


def test_a_batch_has_the_rows_it_was_given():
    assert Collator(0)(examples(3))["input_ids"].shape[0] == 3
